"""How a model is decoded; part of the policy: a network decoded otherwise is another policy."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.processes import solvers
from rescore.processes.convert import Prediction
from rescore.processes.gaussian import AffineStep, HeunStep, Step
from rescore.processes.gaussian_schedules import DiscreteTable, GaussianSchedule, RectifiedFlow
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

    def at(self, progress: float) -> Decoding:
        """How rollouts are sampled at a fraction of the run, 0 at its first and 1 at its last."""
        return self


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


Solver = Literal[
    "ddim",
    "euler_maruyama",
    "flow_sde",
    "flow_match_stochastic",
    "dpm_solver_2m_sde",
    "ddim_ode",
    "probability_flow",
    "heun",
    "dpm_solver_2m",
]
"""Names of the functions of ``rescore.processes.solvers``."""
WITH_ETA: tuple[Solver, ...] = ("ddim", "euler_maruyama", "flow_sde")
"""Random solvers that can draw more or less noise."""
TWO_STEP: tuple[Solver, ...] = ("dpm_solver_2m_sde", "dpm_solver_2m")
"""Solvers that look at a state and at the one before."""
DETERMINISTIC: tuple[Solver, ...] = ("ddim_ode", "probability_flow", "heun", "dpm_solver_2m")
"""Solvers whose steps have no density."""


@dataclass(frozen=True, kw_only=True)
class GaussianDecoder(Decoding):
    """A solver of the reverse equation of a process with Gaussian noise, and its times."""

    solver: Solver = "ddim"
    """How a step is made. The last four draw no noise, so they serve evaluation, and methods that
    use no likelihood."""
    eta: float = 1.0
    """Noise of ``ddim`` and ``euler_maruyama``, 1 as in the process itself; of ``flow_sde`` the
    noise level. Other solvers leave no choice."""
    eta_end: float | None = None
    """``eta`` of the last rollout, reached from ``eta`` in equal steps; None = the same throughout.
    Evaluation keeps ``eta``."""
    window: tuple[int, int] | None = None
    """First step that draws noise, and the first after it that does not (MixGRPO's SDE window);
    the others are steps of ``ddim_ode``. None = all."""
    spacing: Literal["linear", "leading", "trailing"] = "linear"
    """Times of the steps: ``linear`` in t from ``t_max`` to ``t_min``; or entries of the table of a
    ``DiscreteTable`` as diffusers spaces them, and 0 last."""
    offset: int = 0
    """Added to the entries of ``leading``: diffusers' ``steps_offset``."""
    t_max: float = 1.0
    """Where ``linear`` starts."""
    t_min: float = 0.0
    """Where ``linear`` ends; above 0 some noise is left in the samples."""
    shift: float = 1.0
    """Moves linear times towards noise, t -> shift t / (1 + (shift - 1) t), as SD3 does."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"decoder: steps={self.steps}; expected at least 1")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(
                f"decoder: times from t_max={self.t_max} to t_min={self.t_min}; expected "
                f"0 <= t_min < t_max <= 1"
            )
        if self.spacing != "linear" and (self.t_max, self.t_min, self.shift) != (1.0, 0.0, 1.0):
            raise ValueError(
                f"decoder: t_max, t_min and shift are for spacing='linear', not '{self.spacing}', "
                f"whose times are those of the network's table; leave them out"
            )
        if not (0 < self.shift < math.inf and self.offset >= 0):
            raise ValueError(
                f"decoder: shift={self.shift} must be positive, offset={self.offset} at least 0"
            )
        if self.solver in WITH_ETA:
            if not 0 < self.eta < math.inf:
                raise ValueError(
                    f"decoder: eta={self.eta} leaves {self.solver} without noise, so without "
                    f"likelihoods; use an eta above 0, or one of {', '.join(DETERMINISTIC)}"
                )
        elif self.eta != 1:
            raise ValueError(
                f"decoder: {self.solver} has no eta, but eta={self.eta}; those that have are "
                f"{', '.join(WITH_ETA)}"
            )
        if self.eta_end is not None and not (
            self.solver in WITH_ETA and 0 < self.eta_end < math.inf
        ):
            raise ValueError(
                f"decoder: eta_end={self.eta_end} with {self.solver}; expected a number above 0 "
                f"and one of {', '.join(WITH_ETA)}"
            )
        if self.window is not None:
            if self.solver not in WITH_ETA:
                raise ValueError(
                    f"decoder: a window of noise needs one of {', '.join(WITH_ETA)}, not "
                    f"{self.solver}"
                )
            if not 0 <= self.window[0] < self.window[1] <= self.steps:
                raise ValueError(
                    f"decoder: window={self.window}; expected 0 <= first < after last <= steps="
                    f"{self.steps}"
                )

    @property
    def two_step(self) -> bool:
        """Whether a step looks at the state before its own as well."""
        return self.solver in TWO_STEP

    @property
    def is_random(self) -> bool:
        """Whether steps draw noise, so that they have likelihoods."""
        return self.solver not in DETERMINISTIC

    def at(self, progress: float) -> GaussianDecoder:
        if self.eta_end is None:
            return self
        return replace(self, eta=self.eta + progress * (self.eta_end - self.eta), eta_end=None)

    def check(self, schedule: GaussianSchedule, prediction: Prediction) -> None:
        """Refuse a network that the solver cannot serve, at the start of a run or at its end.

        Raises:
            ValueError: as ``solve``.
        """
        self.solve(schedule, prediction)
        if self.eta_end is not None:  # what lies between the two draws less noise than one of them
            try:
                self.at(1.0).solve(schedule, prediction)
            except ValueError as error:
                raise ValueError(
                    f"decoder: eta goes from {self.eta:g} to eta_end={self.eta_end:g}, where "
                    f"{self.solver} cannot follow: {error}"
                ) from error

    @property
    def noise_eta(self) -> float:
        """eta of the equation that the solver follows; 1 for those without noise or without one."""
        if self.solver == "flow_sde":
            return self.eta / math.sqrt(2)
        return self.eta

    def shorter(self) -> Iterator[GaussianDecoder]:
        for steps in range(2, self.steps):
            yield replace(self, steps=steps, window=None)

    def times(self, schedule: GaussianSchedule) -> Float[Tensor, " M"]:
        """The times of the states, from noise to data, float64.

        Raises:
            ValueError: a spacing by entries, and a schedule without a table, or with a shorter one.
        """
        if self.spacing == "linear":
            t = torch.linspace(self.t_max, self.t_min, self.steps + 1, dtype=torch.float64)
            return self.shift * t / (1 + (self.shift - 1) * t)
        if not isinstance(schedule, DiscreteTable):
            raise ValueError(
                f"decoder: spacing='{self.spacing}' counts entries of a table, which a "
                f"{type(schedule).__name__} has not; use 'linear'"
            )
        n_entries = len(schedule.alphas_cumprod)
        if self.steps > n_entries:
            raise ValueError(
                f"decoder: steps={self.steps}, but the network's table has {n_entries} entries; "
                f"use no more steps than that"
            )
        if self.spacing == "leading":
            entry = torch.arange(self.steps).flip(0) * (n_entries // self.steps) + self.offset
            if int(entry[0]) >= n_entries:
                raise ValueError(
                    f"decoder: {self.steps} steps with offset={self.offset} start at entry "
                    f"{int(entry[0])} of a table of {n_entries}; use fewer steps or offset=0"
                )
        else:
            place = torch.arange(self.steps, dtype=torch.float64) * n_entries / self.steps
            entry = (n_entries - place).round().long() - 1
        return torch.cat([schedule.time_of(entry), torch.zeros(1, dtype=torch.float64)])

    def solve(self, schedule: GaussianSchedule, prediction: Prediction) -> Step | HeunStep:
        """The coefficients of all steps, a row each.

        Raises:
            ValueError: the solver cannot serve this schedule, prediction or start, see its own
                description.
        """
        times = self.times(schedule)
        t, s = times[:-1], times[1:]
        if self.two_step:
            before = torch.cat([t[:1], t[:-1]])
            function = getattr(solvers, self.solver)
            return function(schedule, before, t, s, prediction=prediction)
        if self.solver == "flow_sde":
            if not isinstance(schedule, RectifiedFlow):
                raise ValueError(
                    f"decoder: flow_sde is for a RectifiedFlow, not a {type(schedule).__name__}; "
                    f"use 'euler_maruyama'"
                )
            step = solvers.flow_sde(schedule, t, s, prediction=prediction, noise_level=self.eta)
        elif self.solver in ("ddim", "euler_maruyama"):
            function = solvers.ddim if self.solver == "ddim" else solvers.euler_maruyama
            step = function(schedule, t, s, prediction=prediction, eta=self.eta)
        else:
            return getattr(solvers, self.solver)(schedule, t, s, prediction=prediction)
        if self.window is None:
            return step
        number = torch.arange(self.steps)
        inside = (self.window[0] <= number) & (number < self.window[1])
        quiet = solvers.ddim_ode(schedule, t, s, prediction=prediction)
        return AffineStep(
            torch.where(inside, step.on_x, quiet.on_x),
            torch.where(inside, step.on_a, quiet.on_a),
            torch.where(inside, step.std, 0.0),
        )

    def __str__(self) -> str:
        eta = f"({self.eta:g})" if self.solver in WITH_ETA else ""
        return f"{self.steps} steps of {self.solver.replace('_', ' ')}{eta}"
