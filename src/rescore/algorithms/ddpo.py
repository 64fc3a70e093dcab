r"""DDPO: policy gradients on the denoising steps of a diffusion model.

Every step of a random solver is an action with a Gaussian law, $\pi(x_s \mid x_t)$, and the reward
of the finished sample is that of all of them. DDPO-IS, the form with importance sampling, minimises

    - sum_k min(rho_k A, clip(rho_k) A),    rho_k = pi_new(x_{k+1} | x_k) / pi_old(x_{k+1} | x_k),
    A = (r - mean) / std, over the samples of the same prompt or over the batch, within +-5.

Source: Black, Janner, Du, Kostrikov and Levine 2023, arXiv:2305.13301; DDPO-SF, the form without a
ratio, is ``Reinforce``. The KL of ``beta`` is an addition.

Bias: dividing by the standard deviation and clipping advantages change the direction of the
expected gradient; the mean that includes the sample scales it by 1 - 1/n; the clipped ratio leaves
the first update of a rollout alone. ``n_steps`` is unbiased.

The released code averages the log-ratio over the d dimensions of a sample: its ratio is
rho^(1/d), so that its clip of 1e-4 is a log-ratio of 1e-4 d here; docs/algorithms/ddpo.md.
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
from rescore.sampling.slots import some_steps
from rescore.types import Actions, Credited, Scored, Terms


@dataclass(frozen=True, kw_only=True)
class Ddpo(Algorithm):
    """DDPO-IS: the clipped surrogate on every step that draws noise."""

    statistics: Literal["group", "batch"] = "group"
    """Whose mean and standard deviation make advantages of rewards: the samples of the same prompt,
    or all of the rollout."""
    advantage_clip: float = 5.0
    """Advantages beyond this count as this, standard deviations; infinity leaves them alone."""
    clip: float = 0.2
    """The log-ratio of a step gains nothing beyond this in either direction, nats, summed over all
    dimensions. The released code's clip times d: 1.64 for its 1e-4 and latents of 4 x 64 x 64."""
    beta: float = 0.0
    """Weight of KL(new || ref), exact within each step and taken at the visited states, units of
    the advantage per nat; 0 keeps no reference."""
    n_steps: int | None = None
    """n: steps of each path to train on, drawn at random among the T with noise and weighted by
    T / n; None = all."""

    citation: ClassVar[str] = """@article{black2023ddpo,
  title   = {Training Diffusion Models with Reinforcement Learning},
  author  = {Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and
             Levine, Sergey},
  journal = {arXiv preprint arXiv:2305.13301},
  year    = {2023}
}"""

    @property
    def record(self) -> Record:
        return Record(moves="all")

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        super().check(decoder, group_size, terms)
        check_continuous("ddpo", decoder)
        check_trust_region("ddpo", self.clip, self.beta)
        if self.statistics == "group":
            check_group("statistics='group'", group_size, "statistics='batch'")
        if not self.advantage_clip > 0:
            raise ValueError(f"ddpo: advantage_clip={self.advantage_clip} must be positive")
        if self.n_steps is not None and not 1 <= self.n_steps <= decoder.steps:
            raise ValueError(
                f"ddpo: n_steps={self.n_steps} of a path of {decoder.steps} steps; use 1 to "
                f"{decoder.steps}, or None for all"
            )

    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        """Draw the steps to train on, and ask the reference about them."""
        if self.n_steps is not None:
            step, weight = some_steps(scored.trajectory.acts(), self.n_steps, rng)
            scored = replace(scored, step=step, step_weight=weight)
        if models.ref is None:
            return scored
        return replace(scored, notes={**scored.notes, **reference_outputs(models.ref, scored)})

    def credit(self, scored: Scored) -> Credited:
        group = scored.trajectory.prompts.group
        compared = group if self.statistics == "group" else torch.zeros_like(group)
        advantage = standardise(scored.reward[:, None].expand_as(scored.step_weight), compared)
        advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        active = scored.trajectory.acts().gather(1, scored.step)
        active = active & ((advantage != 0) | self.uses_reference)
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        return clipped_steps(models, actions, self.clip, self.beta)
