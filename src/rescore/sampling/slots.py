"""Steps chosen on the way down, with their completions: memory does not grow with the steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.processes.masked import FAR_BELOW
from rescore.sampling.record import Slots
from rescore.sampling.rng import Rng, Stream
from rescore.types import Kept


class StepSlots:
    """A running choice of K steps per sample, and the completion made before each of them.

    ``top`` and ``bottom`` keep the K best keys seen so far. ``uniform`` and ``random`` know their
    steps beforehand. ``importance`` keeps K independent reservoirs of one: slot k takes step t with
    probability w_t / (w_0 + ... + w_t), which leaves it there with w_t / sum w (A-Chao with one
    slot; Chao 1982, Biometrika 69).

    Args:
        plan: what to keep.
        canvas: x_T.
        active: steps in which a sample reveals something; others are never kept.
        rng: draws the steps of ``random`` now, and the exchanges of ``importance`` later.
    """

    def __init__(
        self, plan: Slots, canvas: Int[Tensor, "B L"], active: Bool[Tensor, "B T"], rng: Rng
    ) -> None:
        self.n = active.shape[1] if plan.n is None else plan.n
        if plan.by != "importance" and self.n > active.shape[1]:
            raise ValueError(f"{self.n} distinct steps cannot be kept of {active.shape[1]}")
        shape = (canvas.shape[0], self.n)
        self.plan, self.active, self.rng = plan, active, rng
        self.step = torch.full(shape, -1, device=canvas.device)
        self.key = torch.full(shape, -torch.inf, dtype=torch.float64, device=canvas.device)
        """Entropy (negative for ``bottom``) or, for ``importance``, weight of the step kept."""
        self.total = torch.zeros(shape[0], dtype=torch.float64, device=canvas.device)
        self.tokens = canvas[:, None, :].repeat(1, self.n, 1) if plan.completions else None
        if plan.by == "uniform":
            self.planned = evenly_spaced(active, self.n)
        elif plan.by == "random":
            self.planned = random_steps(active, self.n, rng)

    def offer(
        self,
        step: int,
        completion: Int[Tensor, "B L"] | None,
        entropy: Float[Tensor, " B"] | None,
    ) -> None:
        """Consider one step. ``entropy`` may be None for the choices that do not look at it."""
        by, active = self.plan.by, self.active[:, step]
        if by in ("uniform", "random"):
            take = self.planned == step
        elif by == "importance":
            assert entropy is not None
            take = self._exchange(step, entropy.double(), active)
        else:
            assert entropy is not None
            take = self._improves(entropy.double() if by == "top" else -entropy.double(), active)
        self.step = torch.where(take, step, self.step)
        if self.tokens is not None:
            assert completion is not None
            self.tokens = torch.where(take[..., None], completion[:, None, :], self.tokens)

    def _improves(self, key: Float[Tensor, " B"], active: Bool[Tensor, " B"]) -> Tensor:
        """The slot of the worst key, if the new one is better; of tied ones the latest goes."""
        lowest = self.key == self.key.amin(1, keepdim=True)
        worst = torch.where(lowest, self.step, -2).argmax(1, keepdim=True)
        slot = torch.arange(self.n, device=key.device)
        better = key[:, None] > self.key.gather(1, worst)
        take = (slot == worst) & better & active[:, None]
        self.key = torch.where(take, key[:, None], self.key)
        return take

    def _exchange(
        self, step: int, entropy: Float[Tensor, " B"], active: Bool[Tensor, " B"]
    ) -> Tensor:
        weight = torch.where(active, entropy + self.plan.delta, 0.0)
        odds = torch.stack([self.total, weight], -1)[:, None].expand(-1, self.n, -1)
        slot = torch.arange(self.n, device=entropy.device).expand(len(weight), -1)
        draw = self.rng.categorical(odds.contiguous(), Stream.SLOT, step, slot)
        take = (draw == 1) & active[:, None]
        self.total = self.total + weight
        self.key = torch.where(take, weight[:, None], self.key)
        return take

    def kept(self, dtype: torch.dtype) -> Kept:
        """The slots as they are; those of ``top`` and ``bottom`` by decreasing key."""
        step, tokens, filled = self.step, self.tokens, self.step >= 0
        if self.plan.by == "importance":
            weight = self.total[:, None] / (self.n * self.key)
        else:
            weight = torch.ones_like(self.key)
        if self.plan.by in ("top", "bottom"):
            by_step = step.argsort(dim=1, stable=True)
            order = by_step.gather(
                1, self.key.gather(1, by_step).argsort(dim=1, descending=True, stable=True)
            )
            step, filled = step.gather(1, order), filled.gather(1, order)
            if tokens is not None:
                tokens = tokens.take_along_dim(order[..., None], dim=1)
        weight = torch.where(filled, weight, 0.0).to(dtype)
        return Kept(step=step, step_weight=weight, completion=tokens)


def evenly_spaced(active: Bool[Tensor, "B T"], n: int) -> Int[Tensor, "B n"]:
    """n of the active steps at equal distances, the first and the last among them; -1 if too few.

    With n = 1 it is the last.
    """
    count = active.sum(1, keepdim=True)
    slot = torch.arange(n, device=active.device)
    if n == 1:
        place = count - 1
    else:  # rounded half up; with count <= n every active step is taken once
        wide = (2 * slot * (count - 1) + n - 1).div(2 * (n - 1), rounding_mode="floor")
        place = torch.where(count > n, wide, torch.where(slot < count, slot, -1))
    order = (~active).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.where(place >= 0, order.gather(1, place.clamp(min=0)), -1)


def random_steps(active: Bool[Tensor, "B T"], n: int, rng: Rng) -> Int[Tensor, "B n"]:
    """n distinct active steps, drawn without preference; -1 if there are too few."""
    n_samples, n_steps = active.shape
    where = torch.arange(n_steps, device=active.device).expand(n_samples, -1)
    log_weight = torch.where(active, 0.0, FAR_BELOW)
    step = rng.ordered(log_weight, n, n_steps, where)  # no step bears this number
    return torch.where(active.gather(1, step), step, -1)


def some_steps(
    active: Bool[Tensor, "B T"], n: int, rng: Rng
) -> tuple[Int[Tensor, "B n"], Float[Tensor, "B n"]]:
    """``random_steps`` and their weights, with which a sum over them is that over all in the mean.

    Of T active steps n have weight T / n, float64; where there are fewer than n each has weight 1,
    and the rest are step 0 of weight 0.
    """
    step = random_steps(active, n, rng)
    drawn = step >= 0
    share = active.sum(1, keepdim=True).double() / drawn.sum(1, keepdim=True)
    return step.clamp(min=0), torch.where(drawn, share, 0.0)
