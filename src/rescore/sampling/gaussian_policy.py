"""The policy of a network for Gaussian noise: every step a normal law, known from its solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.gaussian_network import CountedOutputs, Decodes, GaussianNetwork, state_dtype
from rescore.processes.gaussian import (
    AffineStep,
    DeterministicStep,
    HeunStep,
    RandomStep,
    Step,
    TwoStep,
    step_kl,
    step_log_prob,
)
from rescore.sampling.base import Policy, Transition
from rescore.sampling.chunks import over_rows
from rescore.sampling.continuous import sample_gaussian
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng
from rescore.types import Conditions, GaussianTrajectory, Given, State, Trajectory


@dataclass(frozen=True)
class At:
    """A policy at given steps of given paths: the coefficients of the steps and what it says."""

    step: Step | None
    """A row per action; None where only the present state was looked at."""
    t: Float[Tensor, " N"]
    """Time of the state, and of the next one."""
    s: Float[Tensor, " N"]
    x_t: State
    a: State
    """Output of the network there, with gradients if they are enabled."""
    x_before: State | None = None
    """The state before, for two-step solvers."""
    a_before: State | None = None

    def with_density(self) -> tuple[RandomStep, Bool[Tensor, " N"]]:
        """The steps with noise, of length 1 where they have none, and where they have some.

        Raises:
            ValueError: a deterministic solver.
        """
        if not isinstance(self.step, AffineStep | TwoStep):
            raise ValueError(
                f"a {type(self.step).__name__} has no likelihood; use a random solver, or a loss "
                f"that needs none"
            )
        random = self.step.is_random
        return replace(self.step, std=torch.where(random, self.step.std, 1.0)), random

    def kl(self, other: State, other_before: State | None = None) -> Float[Tensor, " N"]:
        """KL(these steps || those from the same states of who says ``other``), exact, nats.

        0 where a step draws no noise.

        Args:
            other: output at the same states.
            other_before: at the states before them, for two-step solvers.

        Raises:
            ValueError: a deterministic solver.
        """
        step, random = self.with_density()
        kl = step_kl(step, self.a, other, a_before=self.a_before, a_before_ref=other_before)
        return torch.where(random, kl, 0.0)


@dataclass(frozen=True)
class GaussianTransition(Transition):
    """Steps of a random solver. Where a step draws no noise, log-probability and KL are 0."""

    at: At

    def kl(self, other: GaussianTransition) -> Float[Tensor, " N"]:
        """|difference of the means|^2 / (2 std^2)."""
        return self.at.kl(other.at.a, other.at.a_before)


@dataclass(frozen=True)
class GaussianPolicy(Policy[GaussianTrajectory, GaussianTransition]):
    """pi(x_s | x_t) of a solver of the reverse equation, step by step of its times."""

    network: GaussianNetwork
    decoder: GaussianDecoder
    forward_rows: int = 1024
    """Network rows per forward without gradients; any value gives the same paths and numbers."""

    @property
    def rows(self) -> int:
        return self.network.rows if isinstance(self.network, CountedOutputs) else 0

    @cached_property
    def steps(self) -> Step | HeunStep:
        """The coefficients of every step, a row each."""
        return self.decoder.solve(self.network.schedule, self.network.prediction)

    @cached_property
    def times(self) -> Float[Tensor, " M"]:
        """Of the states, from noise to data."""
        return self.decoder.times(self.network.schedule)

    def draw(self, prompts: Given, record: Record, rng: Rng) -> GaussianTrajectory:
        assert isinstance(prompts, Conditions)
        dtype = state_dtype(self._bare)
        return sample_gaussian(self.network, self.decoder, prompts, record, rng, dtype)

    def finished(self, x_0: State) -> Float[Tensor, "B ..."]:
        network = self._bare
        if not isinstance(network, Decodes):
            return x_0
        with torch.no_grad():
            return torch.cat(over_rows(lambda rows: network.decode(x_0[rows]), len(x_0), at_most=8))

    def now(self, trajectory: GaussianTrajectory, step: Int[Tensor, " N"]) -> At:
        """The policy at the state before step ``step[i]`` of path i, whatever the solver."""
        times, x_t = self.times.to(step.device), trajectory.state(step)
        t, s = times[step], times[step + 1]
        return At(None, t, s, x_t, self.network.predict(x_t, t.to(x_t), trajectory.prompts.inputs))

    def at(self, trajectory: GaussianTrajectory, step: Int[Tensor, " N"]) -> At:
        """The policy at step ``step[i]`` of path i: one network row each, two of two-step solvers.

        Raises:
            ValueError: ``heun``, whose steps need another state in between.
        """
        table, times = self.steps, self.times.to(step.device)
        if isinstance(table, HeunStep):
            raise ValueError(
                "heun looks at a state between two others, which no loss does; train with another "
                "solver and keep heun for evaluation"
            )
        rows = table.to(step.device).take(step)
        x_t, t, s = trajectory.state(step), times[step], times[step + 1]
        inputs = trajectory.prompts.inputs
        if isinstance(rows, AffineStep | DeterministicStep):
            return At(rows, t, s, x_t, self.network.predict(x_t, t.to(x_t), inputs))
        earlier = (step - 1).clamp(min=0)
        x_before = trajectory.state(earlier)
        twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
        moments = torch.cat([t, times[earlier]]).to(x_t)
        both = self.network.predict(torch.cat([x_t, x_before]), moments, twice)
        a, a_before = both.chunk(2)
        return At(rows, t, s, x_t, a, x_before, a_before)

    def transition(
        self, trajectory: Trajectory, step: Int[Tensor, " N"], score: Score
    ) -> GaussianTransition:
        assert isinstance(trajectory, GaussianTrajectory)
        at = self.at(trajectory, step)
        coefficients, random = at.with_density()
        x_s = trajectory.state(step + 1)
        log_prob = step_log_prob(
            coefficients, at.x_t, at.a, x_s, x_before=at.x_before, a_before=at.a_before
        )
        return GaussianTransition(torch.where(random, log_prob, 0.0), at)

    @property
    def _bare(self) -> GaussianNetwork:
        network = self.network
        return network.network if isinstance(network, CountedOutputs) else network
