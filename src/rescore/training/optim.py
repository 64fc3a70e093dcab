"""The update: AdamW, warm-up, clipping, reduction over processes, skipping what is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from rescore.models.finetune import Ema


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How weights are updated from one rollout."""

    lr: float = 3e-4
    """Learning rate of AdamW after warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: int = 10
    """Updates over which the learning rate rises linearly."""
    clip_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    epochs: int = 1
    """Passes over a rollout."""
    mini_batches: int = 1
    """Updates per pass; each uses an equal share of the samples."""
    micro_batch: int = 512
    """Most network rows per backward pass; fewer are tried when memory ends. Changes no result."""
    max_skipped: int = 10
    """Stop after this many updates in a row were skipped as non-finite."""

    def __post_init__(self) -> None:
        for name in ("epochs", "mini_batches", "micro_batch", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim: {name} must be at least 1, got {getattr(self, name)}")
        if not (0 < self.lr < math.inf and self.clip_norm > 0):
            raise ValueError(
                f"optim: lr and clip_norm must be positive, got {self.lr} and {self.clip_norm}"
            )
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim: {name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim: betas must lie in [0, 1), got {self.betas}")

    @property
    def updates_per_rollout(self) -> int:
        return self.epochs * self.mini_batches


@dataclass
class UpdateCounts:
    """Updates done and skipped so far."""

    done: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Updater:
    """Owns the optimiser and the moving average; ``step`` turns gradients into an update."""

    def __init__(
        self, module: nn.Module, optim: Optim, accelerator: Accelerator, ema: Ema | None
    ) -> None:
        self.optim, self.ema, self.accelerator = optim, ema, accelerator
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self.counts = UpdateCounts()

    def step(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""] | None:
        """Sum gradients over processes, clip, update. Returns the gradient norm, None if skipped.

        Args:
            loss: the weighted loss of this process, only looked at for being finite.

        Raises:
            TrainingError: ``max_skipped`` updates in a row had a non-finite loss or gradient.
        """
        parameters = list(self.named.values())
        for p in parameters:  # one that the loss does not reach has a gradient of zero
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.accelerator.num_processes > 1:
            loss = self._reduce(parameters, loss)
        norm = nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm)
        if not bool(torch.isfinite(norm + loss)):
            self.optimizer.zero_grad()
            self.counts.skipped += 1
            self.counts.skipped_in_a_row += 1
            if self.counts.skipped_in_a_row >= self.optim.max_skipped:
                raise TrainingError(
                    f"{self.counts.skipped_in_a_row} updates in a row had a non-finite loss or "
                    f"gradient (loss {loss.item()}, gradient norm {norm.item()}); lower optim.lr, "
                    f"or use --precision float32"
                )
            return None
        self.counts.skipped_in_a_row = 0
        warm = min(1.0, (self.counts.done + 1) / (self.optim.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr * warm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.counts.done += 1
        if self.ema is not None:
            self.ema.update()
        return norm

    def _reduce(self, parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace gradients and loss by their sums over all processes, in one message."""
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in grads), loss.detach().to(grads[0].dtype)[None]])
        flat = self.accelerator.reduce(flat, "sum")
        assert isinstance(flat, Tensor)
        for grad, part in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return flat[-1]
