"""REINFORCE on denoising trajectories: every step, one on-policy gradient per rollout.

Source: Williams 1992, Machine Learning 8, 229-256, applied to the denoising MDP: the reward of the
finished sample multiplies the sum of the step scores. With no baseline or leave-one-out the
expected gradient is exactly that of E[r]; the group mean scales it by 1 - 1/G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rescore.algorithms.base import Algorithm, check_group
from rescore.objectives.advantages import Baseline, centre
from rescore.objectives.policy_gradient import score_function
from rescore.sampling.decoder import Decoder, Decoding
from rescore.sampling.policy import Models
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng
from rescore.types import Actions, Credited, Scored, Terms


@dataclass(frozen=True, kw_only=True)
class Reinforce(Algorithm):
    """REINFORCE over all steps."""

    baseline: Baseline = "leave_one_out"
    """What is subtracted from the reward."""
    score: Score = Score()
    """What the log-probability of a step counts."""
    beta: float = 0.0
    """Weight of KL(new || ref), exact within each step and taken at the visited states, reward
    units per nat; 0 keeps no reference."""

    citation: ClassVar[str] = """@article{williams1992simple,
  title   = {Simple statistical gradient-following algorithms for connectionist
             reinforcement learning},
  author  = {Williams, Ronald J.},
  journal = {Machine Learning},
  volume  = {8},
  pages   = {229--256},
  year    = {1992}
}"""

    @property
    def record(self) -> Record:
        return Record(score=self.score, moves="all")

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    @property
    def on_policy(self) -> bool:
        return True

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        super().check(decoder, group_size, terms)
        if self.baseline != "none":
            check_group(f"baseline='{self.baseline}'", group_size, "baseline='none'")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"reinforce: beta={self.beta} must not be negative")
        if not isinstance(decoder, Decoder) and self.score != Score():
            raise ValueError(
                f"reinforce: score={self.score} is about the order of a masked decoder; leave it "
                f"out with a {type(decoder).__name__}, whose steps have one log-probability"
            )

    def credit(self, scored: Scored) -> Credited:
        returns = scored.reward[:, None].expand_as(scored.step_weight)
        advantage = centre(returns, scored.trajectory.prompts.group, self.baseline)
        active = ((advantage != 0) | self.uses_reference) & scored.trajectory.acts()
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        new = models.new.transition(actions.trajectory, actions.step, self.score)
        terms = score_function(new.log_prob, actions.log_prob_old, actions.advantage)
        if models.ref is None:
            return terms
        with torch.no_grad():
            ref = models.ref.transition(actions.trajectory, actions.step, self.score)
        kl = new.kl(ref)
        return Terms(
            loss=terms.loss + self.beta * kl, metrics={**terms.metrics, "kl_new_ref": kl.detach()}
        )
