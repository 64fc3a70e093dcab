"""How a model is decoded; part of the policy: a network decoded otherwise is another policy."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from rescore.processes.masked import Order
from rescore.processes.schedules import LogLinear, Noise


@dataclass(frozen=True, kw_only=True)
class Decoding(abc.ABC):
    """A decoding protocol."""

    steps: int
    """T: denoising steps."""

    @abc.abstractmethod
    def shorter(self) -> Iterator[Decoding]:
        """The same protocol with fewer steps, the fewest first."""


@dataclass(frozen=True, kw_only=True)
class Decoder(Decoding):
    """Ancestral decoding of a masked model, in blocks and in an order."""

    steps: int
    """T: denoising steps, in all blocks together."""
    blocks: int = 1
    """Blocks finished in turn, left to right (semi-autoregressive); 1 = whole sequence."""
    order: Order = "random"
    """Which positions a step reveals."""
    temperature: float = 1.0
    """Of the law that tokens are drawn from; 0 takes the most probable token (evaluation only)."""
    position_temperature: float = 0.5
    """Of the position weights of ``plackett_luce`` and ``soft_low_confidence``."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.blocks < 1 or self.steps % self.blocks:
            raise ValueError(
                f"decoder: steps={self.steps} does not split into blocks={self.blocks}; "
                f"steps must be a positive multiple of blocks"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"decoder: temperature must not be negative, got {self.temperature}")
        if not 0 < self.position_temperature < math.inf:
            raise ValueError(
                f"decoder: position_temperature must be positive, got {self.position_temperature}"
            )

    def shorter(self) -> Iterator[Decoder]:
        for per_block in range(2, self.steps_per_block):
            yield replace(self, steps=per_block * self.blocks)

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.blocks

    def __str__(self) -> str:
        blocks = "" if self.blocks == 1 else f", {self.blocks} blocks"
        order = self.order.replace("_", " ")
        return f"{self.steps} steps{blocks}, {order} order, temperature {self.temperature:g}"


Move = Literal["predictor", "corrector", "denoise"]
"""The kinds of step of a process in continuous time."""


@dataclass(frozen=True, kw_only=True)
class RateDecoder(Decoding):
    """The reverse of a process in continuous time, on the grid t = 1, 1 - 1/T, ..., 1/T, 0.

    T - 1 predictor steps lead to t_0 = 1/T, then come the corrector steps, which stay there, and
    one step that removes the remaining noise: T + n_c network evaluations.
    """

    noise: Noise = field(default_factory=LogLinear)
    """Law of the noise the network was trained under."""
    predictor: Literal["analytic", "euler"] = "analytic"
    """``euler``: tau-leaping, every rate held for the step. ``analytic``: the scores held instead
    (SEDD's Tweedie predictor); of masked models the ancestral step of MDLM."""
    corrector_steps: int = 0
    """n_c: steps along the gradient flow of the law at t_0."""
    corrector_size: float = 0.5
    """Length of a corrector step as a fraction of the total noise at t_0. A masked token is
    revealed with about this probability, so above 1 a step would overshoot."""

    def __post_init__(self) -> None:
        if self.steps < 2 or self.corrector_steps < 0:
            raise ValueError(
                f"decoder: steps={self.steps}, corrector_steps={self.corrector_steps}; expected at "
                f"least 2 steps, the last of which denoises, and no fewer than 0 corrector steps"
            )
        if not 0 < self.corrector_size <= 1:
            raise ValueError(
                f"decoder: corrector_size must lie in (0, 1], got {self.corrector_size}"
            )

    def shorter(self) -> Iterator[RateDecoder]:
        for steps in range(2, self.steps):
            yield replace(self, steps=steps, corrector_steps=min(1, self.corrector_steps))

    @property
    def n_moves(self) -> int:
        """T + n_c: the steps of a path."""
        return self.steps + self.corrector_steps

    @property
    def t_0(self) -> float:
        """The last time before the final step; the noise level of the corrector."""
        return 1 / self.steps

    def moves(self) -> list[tuple[Move, float, float]]:
        """Every step in turn: its kind, the total noise it starts at, and the length of the step.

        The length is in units of total noise: for ``euler`` the rate at the start times the time.
        """
        t = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        level = self.noise.total_noise(t)
        removed = level[:-1] - level[1:]
        if self.predictor == "euler":
            removed[:-1] = self.noise.rate(t[:-2]) / self.steps
        removed[-1] = level[-2]  # all there is
        start, length = level[:-1].tolist(), removed.tolist()
        predictor: list[tuple[Move, float, float]] = [
            ("predictor", start[k], length[k]) for k in range(self.steps - 1)
        ]
        size = self.corrector_size * start[-1]
        corrector: tuple[Move, float, float] = ("corrector", start[-1], size)
        return [*predictor, *[corrector] * self.corrector_steps, ("denoise", start[-1], length[-1])]

    def __str__(self) -> str:
        corrector = f" + {self.corrector_steps} corrector" if self.corrector_steps else ""
        return f"{self.steps}{corrector} steps, {self.predictor} predictor"
