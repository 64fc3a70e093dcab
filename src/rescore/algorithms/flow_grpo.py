r"""Flow-GRPO: group-relative policy optimisation of flow-matching models.

A flow model samples by an ordinary equation, which draws nothing. Flow-GRPO samples by a random one
with the same marginals (the solver ``flow_sde``), whose steps have Gaussian laws, and minimises

    sum_k [ - min(rho_k A, clip(rho_k) A) + beta KL_k ],    A = (r - mean of the group) / std,
    KL_k = |mean_new - mean_ref|^2 / (2 std_k^2)            of the step that is simulated.

For ``flow_sde`` with noise s_t and steps of length dt, KL_k is
dt/2 (s_t (1 - t) / (2 t) + 1 / s_t)^2 |v_new - v_ref|^2: dt is in the step's coefficients. Any
random solver and any prediction will do; none of this depends on the flow.

Source: Liu et al. 2025, arXiv:2505.05470. Noise and training in a few steps only, with the ordinary
equation in all others (Flow-GRPO-Fast; MixGRPO, arXiv:2507.21802), is the decoder's ``window``.

Bias: dividing by the standard deviation changes the direction of the expected gradient, the mean
that includes the sample scales it by 1 - 1/G, and the KL has no gradient through how often a state
is visited. What differs from the released code is listed in docs/algorithms/flow-grpo.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from rescore.algorithms.base import (
    Algorithm,
    check_continuous,
    check_group,
    check_trust_region,
    clipped_steps,
)
from rescore.objectives.advantages import standardise
from rescore.sampling.decoder import Decoding
from rescore.sampling.policy import Models
from rescore.sampling.record import Record
from rescore.sampling.reference import reference_outputs
from rescore.sampling.rng import Rng
from rescore.types import Actions, Credited, Scored, Terms


@dataclass(frozen=True, kw_only=True)
class FlowGrpo(Algorithm):
    """Flow-GRPO on every step that draws noise."""

    std: Literal["group", "batch"] = "group"
    """Whose standard deviation divides the rewards, less the mean of their group: the group's (the
    paper's), or that of the whole rollout (the released settings for SD3.5)."""
    clip: float = 0.2
    """The log-ratio of a step gains nothing beyond this in either direction, nats, summed over all
    dimensions. The released code's times d, for latents of 16 x 64 x 64: 6.55 for the 1e-4 of its
    settings with a KL, .66 for the 1e-5 of Flow-GRPO-Fast."""
    beta: float = 0.01
    """Weight of KL(new || ref), exact within each step and taken at the visited states, units of
    the advantage per nat; 0 keeps no reference. The released code leaves out dt, so that no one
    value is its own: its 0.04 is 0.04 dt here, 0.004 in 10 even steps."""

    citation: ClassVar[str] = """@article{liu2025flowgrpo,
  title   = {Flow-GRPO: Training Flow Matching Models via Online RL},
  author  = {Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and
             Wang, Xintao and Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
  journal = {arXiv preprint arXiv:2505.05470},
  year    = {2025}
}"""

    @property
    def record(self) -> Record:
        return Record(moves="all")

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        super().check(decoder, group_size, terms)
        check_continuous("flow_grpo", decoder)
        check_trust_region("flow_grpo", self.clip, self.beta)
        check_group("flow_grpo", group_size, "a method without groups, such as ddpo or dpok")

    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        """Ask the reference about every step."""
        if models.ref is None:
            return scored
        return replace(scored, notes={**scored.notes, **reference_outputs(models.ref, scored)})

    def credit(self, scored: Scored) -> Credited:
        group = scored.trajectory.prompts.group
        spread = group if self.std == "group" else torch.zeros_like(group)
        returns = scored.reward[:, None].expand_as(scored.step_weight)
        advantage = standardise(returns, group, spread)
        active = scored.trajectory.acts() & ((advantage != 0) | self.uses_reference)
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        return clipped_steps(models, actions, self.clip, self.beta)
