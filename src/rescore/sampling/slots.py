"""One-step completions kept in K slots while sampling: memory does not grow with the steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.sampling.record import Slots
from rescore.sampling.rng import Rng, Stream
from rescore.types import Completions


class CompletionSlots:
    """A running choice of K steps per sample and the completion made before each of them.

    ``top_entropy`` keeps the K largest entropies, the earlier step on a tie. ``reservoir`` keeps K
    independent draws, step t with probability w_t / sum w, w_t = entropy_t + delta: slot k takes
    step t with probability w_t / (w_0 + ... + w_t) (A-Chao with one slot; Chao 1982, Biometrika
    69).
    """

    def __init__(self, plan: Slots, canvas: Int[Tensor, "B L"]) -> None:
        shape = (canvas.shape[0], plan.n)
        self.plan = plan
        self.step = torch.full(shape, -1, device=canvas.device)
        self.tokens = canvas[:, None, :].repeat(1, plan.n, 1)
        self.key = torch.full(shape, -torch.inf, dtype=torch.float64, device=canvas.device)
        self.total = torch.zeros(shape[0], dtype=torch.float64, device=canvas.device)

    def offer(
        self,
        step: int,
        completion: Int[Tensor, "B L"],
        entropy: Float[Tensor, " B"],
        active: Bool[Tensor, " B"],
        rng: Rng,
    ) -> None:
        """Consider one step; samples that reveal nothing in it (not ``active``) keep theirs."""
        columns = torch.arange(self.plan.n, device=self.step.device)
        if self.plan.by == "top_entropy":
            lowest = self.key == self.key.amin(1, keepdim=True)
            latest = torch.where(lowest, self.step, -2)  # of tied steps the latest goes
            worst = latest.argmax(1, keepdim=True)
            better = entropy[:, None] > self.key.gather(1, worst)
            take = (columns == worst) & better & active[:, None]
            self.key = torch.where(take, entropy[:, None].double(), self.key)
        else:
            weight = torch.where(active, entropy.double() + self.plan.delta, 0.0)
            odds = torch.stack([self.total, weight], -1)[:, None].expand(-1, self.plan.n, -1)
            where = columns.expand(len(weight), -1)
            draw = rng.categorical(odds.contiguous(), Stream.SLOT, step, where)
            take = (draw == 1) & active[:, None]
            self.total = self.total + weight
        self.step = torch.where(take, step, self.step)
        self.tokens = torch.where(take[..., None], completion[:, None, :], self.tokens)

    def completions(self) -> Completions:
        """The slots as recorded; ``step`` is -1 in a slot that never took one."""
        return Completions(tokens=self.tokens, step=self.step)
