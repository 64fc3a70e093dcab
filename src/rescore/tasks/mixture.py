r"""Gaussian mixtures with a quadratic reward: the KL-regularised optimum is known.

Of J = E[r(x_0)] - beta KL(p || p_pre) the best p is p*(x) = p_pre(x) exp(r(x) / beta) / Z with
J* = beta log Z, and no other law of paths does better: where alpha_1 is near 0 the noise a path
starts from says nothing about its end. For a mixture and a quadratic reward p* is a mixture, noised
p* has a known score, and the optimal value of a noised sample is

    V*(x, t) = beta log E_pre[exp(r(x_0) / beta) | x_t = x] = J* + beta log p*_t(x) / p_t(x).

A chain of few steps has an optimum of its own, which ``chain_optimum`` knows for one Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.mixture import GaussianMixture
from rescore.processes.gaussian import AffineStep
from rescore.processes.gaussian_schedules import GaussianSchedule
from rescore.rewards.reward import Reward
from rescore.tasks.task import ContinuousTask, Split
from rescore.types import Conditions, Given, Points, State

SIZES: Mapping[Split, int] = {"train": 4096, "validation": 1024, "test": 4096}
"""Numbers of each split: of the noise samples are made from, and of clean samples."""
SEEDS: Mapping[Split, int] = {"train": 0, "validation": 1, "test": 2}
"""Of the clean samples."""


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """r(x) = <slope, x - centre> - curvature / 2 |x - centre|^2."""

    slope: tuple[float, ...]
    curvature: float
    centre: tuple[float, ...]

    def __call__(self, outputs: State, prompts: Given, /) -> Float[Tensor, " B"]:
        away = outputs - outputs.new_tensor(self.centre)
        return away @ outputs.new_tensor(self.slope) - self.curvature / 2 * away.square().sum(1)


@dataclass(frozen=True, kw_only=True)
class Mixture(ContinuousTask):
    """Points of a mixture, judged by a quadratic; prompts give nothing, they count the samples.

    Raises:
        ValueError: the mixture is none, or the reward is of another dimension or convex.
    """

    weights: tuple[float, ...]
    """Of the components; as ``means`` and ``std``, see ``GaussianMixture``."""
    means: tuple[tuple[float, ...], ...]
    std: float
    slope: tuple[float, ...]
    """Of the reward at ``centre``."""
    curvature: float = 0.0
    """How fast the slope falls: 0 = a linear reward."""
    centre: tuple[float, ...] | None = None
    """Where the reward is 0; None = the origin."""

    def __post_init__(self) -> None:
        n_dims = self.mixture.n_dims
        for name in ("slope", "centre"):
            value = getattr(self, name)
            if value is not None and len(value) != n_dims:
                raise ValueError(
                    f"{name} is {value}; expected {n_dims} numbers, the dimension of the means"
                )
        if not 0 <= self.curvature < math.inf:
            raise ValueError(
                f"curvature is {self.curvature}; expected 0 or more: with a reward that grows "
                f"faster than the density falls there is no optimum"
            )

    @property
    def mixture(self) -> GaussianMixture:
        """What the pretrained model generates."""
        return GaussianMixture(weights=self.weights, means=self.means, std=self.std)

    @property
    def judge(self) -> Quadratic:
        """The reward as a function."""
        centre = (0.0,) * self.mixture.n_dims if self.centre is None else self.centre
        return Quadratic(slope=self.slope, curvature=self.curvature, centre=centre)

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.mixture.n_dims,)

    @property
    def reward(self) -> Reward:
        """``quadratic``, and of several components whether a sample is nearest to each, unused."""
        n_modes = len(self.weights)
        modes = {f"mode_{k}": partial(self._nearest_is, k) for k in range(n_modes) if n_modes > 1}
        return Reward({"quadratic": self.judge, **modes}, dict.fromkeys(modes, 0.0))

    def _nearest_is(self, k: int, outputs: State, prompts: Given, /) -> Float[Tensor, " B"]:
        means = outputs.new_tensor(self.means)
        return ((outputs[:, None] - means).square().sum(2).argmin(1) == k).float()

    def size(self, split: Split) -> int:
        return SIZES[split]

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Conditions:
        row = torch.arange(len(index))
        return Conditions(group=row, sample_id=row, info={}, inputs={})

    def clean(self, split: Split) -> Points:
        """Independent samples of the mixture."""
        generator = torch.Generator().manual_seed(SEEDS[split])
        return Points(x_0=self.mixture.draw(SIZES[split], generator))

    def read(self, texts: Sequence[str]) -> Conditions:
        """Always refuses.

        Raises:
            ValueError: nothing is given to a mixture.
        """
        raise ValueError(
            f"got the prompts {list(texts)}, but a mixture is sampled without any; leave them out"
        )

    def show(self, sample: State, /) -> str:
        return "(" + ", ".join(f"{value:.3f}" for value in sample.tolist()) + ")"

    def show_prompt(self, prompts: Given, row: int) -> str:
        return "nothing given"


GAUSSIAN = Mixture(
    weights=(1.0,), means=((1.0,),), std=0.5, slope=(0.0,), curvature=2.0, centre=(2.0,)
)
"""N(1, 1/4) and r = -(x - 2)^2: with beta = 1/2, p* = N(1.5, 1/8)."""
THREE_MODES = Mixture(
    weights=(0.5, 0.3, 0.2),
    means=((-1.5, 0.0), (1.5, 0.0), (0.0, 2.0)),
    std=0.3,
    slope=(0.6, 0.4),
)
"""The likeliest mode earns the least: with beta = 1 the weights of p* are .147, .532 and .321."""


# ---- the optimum of all laws ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """p*, and what it earns."""

    task: Mixture
    beta: float
    mixture: GaussianMixture
    """p*."""
    reward: float
    """E*[r]."""
    kl: float
    """KL(p* || p_pre), nats."""

    @property
    def objective(self) -> float:
        """J*."""
        return self.reward - self.beta * self.kl

    def value(
        self, schedule: GaussianSchedule, x_t: Float[Tensor, "B D"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """V*(x_t, t), reward units."""
        best, given = (m.log_density(schedule, x_t, t) for m in (self.mixture, self.task.mixture))
        return self.objective + self.beta * (best - given)


def optimum(task: Mixture, *, beta: float) -> Optimum:
    """p* of a task.

    Seen from the centre of a reward with slope u and curvature q, every component becomes

        N(n, s^2) -> N((n + s^2 u / beta) / (1 + a s^2), s^2 / (1 + a s^2)),    a = q / beta,

    and its weight is multiplied by E_k[exp(r / beta)].

    Raises:
        ValueError: beta is not positive.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; expected a positive number: without a KL p* is a point")
    given, judge, d = task.mixture, task.judge, task.mixture.n_dims
    slope, centre = (torch.tensor(v, dtype=torch.float64) for v in (judge.slope, judge.centre))
    away = torch.tensor(given.means, dtype=torch.float64) - centre
    variance = given.std**2
    shrink = 1 + judge.curvature / beta * variance
    exponent = variance * slope @ slope / (2 * beta**2) + away @ slope / beta
    exponent = exponent - judge.curvature / (2 * beta) * away.square().sum(1)
    log_weights = torch.tensor(given.weights, dtype=torch.float64).log() + exponent / shrink
    log_z = log_weights.logsumexp(0) - d / 2 * math.log(shrink)
    weights, moved = log_weights.softmax(0), (away + variance * slope / beta) / shrink
    reward = moved @ slope - judge.curvature / 2 * (moved.square().sum(1) + d * variance / shrink)
    mean_reward = float(weights @ reward)
    return Optimum(
        task=task,
        beta=beta,
        mixture=replace(
            given,
            weights=tuple(weights.tolist()),
            means=tuple(map(tuple, (moved + centre).tolist())),
            std=math.sqrt(variance / shrink),
        ),
        reward=mean_reward,
        kl=mean_reward / beta - float(log_z),
    )


# ---- the optimum of a chain ----------------------------------------------------------------------


class ChainOptimum(NamedTuple):
    """The best that a chain of Gaussian steps can do."""

    objective: float
    """J."""
    reward: float
    """E[r]."""
    kl: float
    """Sum over the steps of the exact KL, nats."""
    mean: float
    """Of the samples."""
    variance: float
    """Of the samples."""


def chain_optimum(
    task: Mixture,
    schedule: GaussianSchedule,
    step: AffineStep,
    t: Float[Tensor, " T"],
    *,
    beta: float,
) -> ChainOptimum:
    r"""The optimum over all policies of a simulated chain that starts from N(0, 1), in 1-D.

    With the pretrained step x' ~ N(F x + G, S^2) a policy chooses m in its place and pays
    beta (m - F x - G)^2 / 2 S^2. Values are quadratic, V_k(x) = c - P x^2 / 2 + q x, from the
    reward backwards: the best choice is m = F x + G + S^2 (q - P (F x + G)) / (beta + P S^2). A
    step without noise stays as it is: any change of it would cost an infinite KL.

    Args:
        task: one Gaussian in one dimension.
        schedule: the noise.
        step: every step, for a network that predicts the score.
        t: where every step starts.
        beta: weight of the KL.

    Raises:
        ValueError: another mixture, or beta is not positive.
    """
    if task.shape != (1,) or len(task.weights) != 1 or not beta > 0:
        raise ValueError(
            f"chain_optimum is for one Gaussian in one dimension and beta > 0; got "
            f"{len(task.weights)} components, {task.shape[0]} dimensions and beta={beta}"
        )
    judge, ((mean,),) = task.judge, task.means
    (slope,), (centre,), curvature = judge.slope, judge.centre, judge.curvature
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variance = alpha**2 * task.std**2 + sigma**2
    on_x = step.on_x - step.on_a / variance
    offset = step.on_a * alpha * mean / variance
    rows = list(zip(on_x.tolist(), offset.tolist(), (step.std**2).tolist(), strict=True))
    bend, pull, level = curvature, slope + curvature * centre, 0.0
    level -= slope * centre + curvature / 2 * centre**2
    choices = []
    for f, g, noise in reversed(rows):
        choices.append((bend, pull))
        price = beta + bend * noise
        kept = beta / price
        level += noise * (pull**2 / price - bend) / 2 + kept * (pull * g - bend * g**2 / 2)
        bend, pull = kept * bend * f**2, kept * f * (pull - bend * g)
    objective = level - bend / 2
    at, spread, kl = 0.0, 1.0, 0.0
    for (f, g, noise), (bend, pull) in zip(rows, reversed(choices), strict=True):
        price, at, spread = beta + bend * noise, f * at + g, f**2 * spread
        kl += noise * ((pull - bend * at) ** 2 + bend**2 * spread) / (2 * price**2)
        at = at + noise * (pull - bend * at) / price
        spread = (beta / price) ** 2 * spread + noise
    reward = slope * (at - centre) - curvature / 2 * ((at - centre) ** 2 + spread)
    return ChainOptimum(objective, reward, kl, at, spread)
