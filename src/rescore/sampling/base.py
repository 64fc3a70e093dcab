"""What a policy is: a network and the way it is decoded."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.sampling.chunks import over_rows
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng, SampleRng
from rescore.types import Given, Outputs, Trajectory, joined

P = TypeVar("P", bound=Trajectory)
Q = TypeVar("Q", bound="Transition")


@dataclass(frozen=True)
class Transition(abc.ABC):
    """How a policy sees given steps of given paths."""

    log_prob: Float[Tensor, " N"]
    """Log-probability of each step, nats, summed over what the score counts."""

    @abc.abstractmethod
    def kl(self, other: Any) -> Float[Tensor, " N"]:
        """KL(self || other) of each step from the same state, exact, nats; both of one kind."""


class Policy(abc.ABC, Generic[P, Q]):
    """A network and the way it is decoded: draws paths, and scores steps of given paths."""

    forward_rows: int

    @abc.abstractmethod
    def draw(self, prompts: Given, record: Record, rng: Rng) -> P:
        """One path per prompt in one batch; the caller decides about gradients."""

    @abc.abstractmethod
    def transition(self, trajectory: Trajectory, step: Int[Tensor, " N"], score: Score) -> Q:
        """Score step ``step[i]`` of path i: one network row each, with gradients if enabled."""

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Canvases put through the network so far; 0 if nobody counts."""

    def finished(self, x_0: Outputs) -> Outputs:
        """What rewards judge: the samples themselves, unless they are codes of something else."""
        return x_0

    @torch.no_grad()
    def sample(self, prompts: Given, record: Record, rng: SampleRng) -> P:
        """Draw one path per prompt, recording what ``record`` asks for; a part at a time."""

        def part(rows: Int[Tensor, " n"]) -> P:
            rows = rows.to(prompts.sample_id.device)
            return self.draw(prompts.take(rows), record, rng.take(rows))

        return joined(over_rows(part, prompts.n_samples, at_most=self.forward_rows))

    @torch.no_grad()
    def log_probs(
        self, trajectory: Trajectory, step: Int[Tensor, "B K"], score: Score
    ) -> Float[Tensor, "B K"]:
        """Score several steps of each path: B K network rows, a part at a time, no gradients."""
        n_columns = step.shape[1]

        def part(rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            rows = rows.to(step.device)
            number = step.flatten()[rows]
            paths = trajectory.around(rows // n_columns, number)
            return self.transition(paths, number, score).log_prob

        parts = over_rows(part, step.numel(), at_most=self.forward_rows)
        return torch.cat(parts).view_as(step)
