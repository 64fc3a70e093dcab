"""EGSPO: policy gradient on the denoising steps of highest entropy.

Source: Kunde et al., "Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection
and Stepwise Advantages", arXiv:2603.12554. Per sample, the K steps whose revealed tokens had the
largest entropy under the sampling policy are trained with PPO's clipped surrogate and a KL to the
reference.

Bias: top-K drops steps and lets the sampled path choose which, so its gradient is biased.
``selection="importance"`` draws K steps with replacement, q proportional to H + delta, and weights
each draw by 1 / (K q); it is unbiased. The group mean scales the gradient by 1 - 1/G.

Deviations from the released code, all towards the paper: tokens are scored under the law they were
sampled from, temperature included (``score.score_temperature=1`` restores the code's mismatch);
entropies are sums over the revealed positions under the sampling law, not means at temperature 1;
all K steps of a rollout enter the same update, and the loss is not divided by the tokens per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from rescore.algorithms.base import Algorithm, check_group
from rescore.objectives.advantages import Baseline, centre, entropy_proportional, top_steps
from rescore.objectives.divergences import KlEstimator, categorical_kl, kl_estimate
from rescore.objectives.policy_gradient import clipped_surrogate
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import Models
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng, Stream
from rescore.types import Actions, Credited, MaskedTrajectory, Scored, Selected, Terms


@dataclass(frozen=True, kw_only=True)
class Egspo(Algorithm):
    """Entropy-guided step selection with a clipped surrogate."""

    n_steps: int = 8
    """K: steps trained per sample (draws, for ``importance``)."""
    selection: Literal["top", "importance"] = "top"
    """``top``: the K steps of largest entropy (the paper's). ``importance``: unbiased draws."""
    delta: float = 0.01
    """Added to the entropies of ``importance`` (nats), so that every step can be drawn."""
    baseline: Baseline = "group_mean"
    """What is subtracted from the reward; the paper's is the group mean."""
    clip_low: float = 0.2
    """The ratio gains nothing below 1 - clip_low."""
    clip_high: float = 0.5
    """The ratio gains nothing above 1 + clip_high."""
    beta: float = 0.04
    """Weight of KL(new || ref), reward units per nat; 0 keeps no reference."""
    kl: KlEstimator | Literal["exact"] = "k3"
    """How the KL of a step is taken: the exact sum over the vocabulary, or a sampled estimator. As
    losses, ``k2`` and ``exact`` have the gradient of KL(new || ref), ``k3`` that of
    KL(ref || new), and ``k1`` a gradient of mean 0."""
    score: Score = Score()
    """What the log-probability of a step counts."""

    citation: ClassVar[str] = """@article{kunde2026egspo,
  title   = {Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection
             and Stepwise Advantages},
  author  = {Kunde, V. T. and Doudi, F. and Farahbakhsh, M. and Kalathil, D. and Narayanan, K.
             and Chamberland, J.-F.},
  journal = {arXiv preprint arXiv:2603.12554},
  year    = {2026}
}"""

    @property
    def record(self) -> Record:
        return Record(score=self.score, entropy=True)

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    def check(self, decoder: Decoder, group_size: int) -> None:
        super().check(decoder, group_size)
        check_group(self.baseline, group_size)
        if self.n_steps < 1 or (self.selection == "top" and self.n_steps > decoder.steps):
            raise ValueError(
                f"egspo: n_steps={self.n_steps} cannot be selected from {decoder.steps} denoising "
                f"steps; use 1 to {decoder.steps}"
            )
        if not (0 <= self.beta < math.inf and 0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(
                f"egspo: beta={self.beta}, clip_low={self.clip_low}, clip_high={self.clip_high}; "
                f"none may be negative, and clip_low is at most 1"
            )
        if not 0 < self.delta < math.inf:
            raise ValueError(
                f"egspo: delta={self.delta} must be positive, or a step of entropy 0 is never drawn"
            )

    def select(self, trajectory: MaskedTrajectory, rng: Rng) -> Selected:
        assert trajectory.entropy is not None
        entropy = trajectory.entropy
        if self.selection == "top":
            step = top_steps(entropy, self.n_steps)
            return Selected(
                trajectory=trajectory,
                step=step,
                step_weight=torch.ones_like(entropy.gather(1, step)),
            )
        q = entropy_proportional(entropy, self.delta, trajectory.revealed() > 0)
        slots = torch.arange(self.n_steps, device=q.device).expand(len(q), -1)
        rows = q[:, None, :].expand(-1, self.n_steps, -1).contiguous()
        step = rng.categorical(rows, Stream.SELECT, 0, slots)
        return Selected(
            trajectory=trajectory, step=step, step_weight=1 / (self.n_steps * q.gather(1, step))
        )

    def annotate(self, models: Models, scored: Scored) -> Scored:
        if not self.uses_reference or self.kl == "exact":
            return scored
        assert models.ref is not None
        with torch.no_grad():
            columns = [
                models.ref.transition(scored.trajectory, step, self.score).log_prob
                for step in scored.step.unbind(1)
            ]
        return replace(scored, notes={**scored.notes, "log_prob_ref": torch.stack(columns, 1)})

    def credit(self, scored: Scored) -> Credited:
        advantage = centre(scored.reward, scored.trajectory.prompts.group, self.baseline)
        advantage = advantage[:, None].expand_as(scored.step_weight)
        active = scored.trajectory.revealed().gather(1, scored.step) > 0
        if not self.uses_reference:
            active = active & (advantage != 0)
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        new = models.new.transition(actions.trajectory, actions.step, self.score)
        terms = clipped_surrogate(
            new.log_prob,
            actions.log_prob_old,
            actions.advantage,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        if not self.uses_reference:
            return terms
        if self.kl == "exact":
            assert models.ref is not None
            with torch.no_grad():
                ref = models.ref.transition(actions.trajectory, actions.step, self.score)
            kl = categorical_kl(new.log_p, ref.log_p, new.revealed)
        else:
            kl = kl_estimate(new.log_prob, actions.notes["log_prob_ref"], self.kl)
        return Terms(
            loss=terms.loss + self.beta * kl,
            metrics={**terms.metrics, "kl_new_ref": kl.detach()},
        )
