"""EGSPO and EGSPO-SA: policy gradient on the denoising steps of highest entropy.

Source: Kunde et al., "Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection
and Stepwise Advantages", arXiv:2603.12554. Per sample, the K steps whose revealed tokens had the
largest entropy under the sampling policy are trained with PPO's clipped surrogate and a KL to the
reference. With ``lam`` > 0 (EGSPO-SA) the return of a step is r + lam (r - r_hat), r_hat being the
reward of the one-step greedy completion of the state before it, recorded on the way down.

Bias: top-K drops steps and lets the sampled path choose which, so its gradient is biased; with
``lam`` > 0 and a group baseline even at K = T, because a rank is known only when a path has ended.
``importance`` draws K steps with replacement, q proportional to H + delta, and weights each draw by
1 / (K q): unbiased. ``random`` is K / T times the gradient where every step reveals something. The
group mean scales it by 1 - 1/G, returns that are not normalised by 1 + lam if lam is constant.

What differs from the released code, and why, is listed in docs/algorithms/egspo.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.algorithms.base import Algorithm, check_group
from rescore.objectives.advantages import Baseline, centre, covering_steps, stepwise_advantage
from rescore.objectives.divergences import KlEstimator, categorical_kl, kl_estimate
from rescore.objectives.policy_gradient import clipped_surrogate
from rescore.sampling.decoder import Decoder, Decoding
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Choice, Record, Score, Slots
from rescore.sampling.rng import Rng
from rescore.types import (
    Actions,
    Credited,
    MaskedTrajectory,
    Scored,
    Selected,
    Terms,
    Trajectory,
)


@dataclass(frozen=True, kw_only=True)
class Egspo(Algorithm):
    """Entropy-guided step selection with a clipped surrogate; EGSPO-SA where ``lam`` > 0."""

    n_steps: int = 8
    """K: steps trained per sample (draws, for ``importance``); ``all`` and ``adaptive`` need
    none."""
    selection: Choice | Literal["all", "adaptive"] = "top"
    """``top``: the K steps of largest entropy (the paper's). ``bottom``: of smallest, to compare.
    ``uniform``: evenly spaced, with the last. ``random``: K distinct ones. ``importance``: unbiased
    draws. ``all``: every step. ``adaptive``: the fewest steps that hold ``mass`` of the entropy of
    their path."""
    delta: float = 0.01
    """Added to the entropies of ``importance`` (nats), so that every step can be drawn."""
    mass: float = 0.7
    """alpha: share of a path's entropy that ``adaptive`` covers."""
    lam: float = 0.0
    """lambda of the stepwise return r + lambda (r - r_hat). 0: EGSPO. 0.5: the shipped EGSPO-SA."""
    lam_schedule: Literal["constant", "rising"] = "constant"
    """``rising``: lambda (t + 1) / T in step t = 0 ... T - 1, as completions get better."""
    normalise: bool = True
    """Divide stepwise returns by 1 + lambda."""
    completion_term: str | None = None
    """Name of the one reward term that r_hat counts, with its weight; None = the whole reward."""
    centre_completions: bool = True
    """False centres r alone and adds lambda (r - r_hat) as it is."""
    baseline: Baseline = "group_mean"
    """What is subtracted from the returns of a group, rank by rank; the paper's is the mean."""
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
    aggregation: Literal["sum", "mean"] = "sum"
    """``mean`` divides the log-probability of a step by its number of tokens n, so the ratio is a
    geometric mean: 1 / n of the gradient where n is constant, else biased."""
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
        completions, slots = self.lam > 0, None
        if self.selection == "all" and completions:
            slots = Slots(n=None, by="uniform", completions=True)
        elif self.selection not in ("all", "adaptive"):
            slots = Slots(
                n=self.n_steps, by=self.selection, delta=self.delta, completions=completions
            )
        return Record(score=self.score, entropy=True, slots=slots)

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        super().check(decoder, group_size, terms)
        if not isinstance(decoder, Decoder):
            raise ValueError(
                f"egspo selects steps by the entropy of the tokens they reveal, which a "
                f"{type(decoder).__name__} does not do; use a Decoder, or reinforce"
            )
        if self.baseline != "none":
            check_group(f"baseline='{self.baseline}'", group_size, "baseline='none'")
        distinct = self.selection in ("top", "bottom", "uniform", "random")
        if self.n_steps < 1 or (distinct and self.n_steps > decoder.steps):
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
        if not 0 < self.mass <= 1:
            raise ValueError(f"egspo: mass={self.mass} is a share of the entropy, in (0, 1]")
        plain = self.normalise and self.centre_completions and self.lam_schedule == "constant"
        if not (0 <= self.lam < math.inf or (self.lam == math.inf and plain)):
            raise ValueError(
                f"egspo: lam={self.lam} must not be negative, and infinite (r - r_hat alone) only "
                f"with normalise, centre_completions and a constant schedule"
            )
        if self.completion_term is not None and self.completion_term not in terms:
            raise ValueError(
                f"egspo: completion_term='{self.completion_term}' is no reward term; choose one of "
                f"{list(terms)}"
            )
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuse a setting that was changed and yet changes nothing."""
        stepwise = ("lam_schedule", "normalise", "completion_term", "centre_completions")
        needs = {
            "delta": (self.selection == "importance", "selection='importance'"),
            "mass": (self.selection == "adaptive", "selection='adaptive'"),
            **dict.fromkeys(stepwise, (self.lam > 0, "lam above 0")),
        }
        for name, (is_met, need) in needs.items():
            value, default = getattr(self, name), getattr(Egspo, name)
            if value != default and not is_met:
                raise ValueError(
                    f"egspo: {name}={value!r} has no effect without {need}; set that, or leave "
                    f"{name} at {default!r}"
                )

    def select(self, models: Models, trajectory: Trajectory) -> Selected:
        assert isinstance(trajectory, MaskedTrajectory)
        kept, path = trajectory.kept, replace(trajectory, kept=None)
        if kept is not None:
            return Selected(
                trajectory=path,
                step=kept.step.clamp(min=0),
                step_weight=kept.step_weight,
                completion=kept.completion,
            )
        selected = super().select(models, path)
        chosen = trajectory.acts()
        if self.selection == "adaptive":
            assert trajectory.entropy is not None
            chosen = chosen & covering_steps(trajectory.entropy, self.mass)
        selected = replace(selected, step_weight=selected.step_weight * chosen)
        if self.lam == 0:
            return selected
        assert isinstance(models.new, MaskedPolicy)
        sample, step = chosen.nonzero().unbind(1)  # these completions cost a network row each
        completion = path.x_0[:, None, :].repeat(1, path.n_steps, 1)
        completion[sample, step] = models.new.completions(path.take(sample), step)
        return replace(selected, completion=completion)

    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        if not self.uses_reference or self.kl == "exact":
            return scored
        assert models.ref is not None
        log_prob = models.ref.log_probs(scored.trajectory, scored.step, self.score)
        return replace(scored, notes={**scored.notes, "log_prob_ref": log_prob})

    def credit(self, scored: Scored) -> Credited:
        advantage = self._advantage(scored)
        active = scored.trajectory.acts().gather(1, scored.step)
        if not self.uses_reference:
            active = active & (advantage != 0)
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def _advantage(self, scored: Scored) -> Float[Tensor, "B K"]:
        group = scored.trajectory.prompts.group
        if self.lam == 0:
            returns = scored.reward[:, None].expand_as(scored.step_weight)
            return centre(returns, group, self.baseline)
        terms = scored.completion_terms
        counted = terms.values() if self.completion_term is None else [terms[self.completion_term]]
        completion_reward = torch.stack(list(counted)).sum(0).to(scored.reward.dtype)
        lam = torch.full_like(completion_reward, self.lam)
        if self.lam_schedule == "rising":
            lam = lam * (scored.step + 1) / scored.trajectory.n_steps
        return stepwise_advantage(
            scored.reward,
            completion_reward,
            lam,
            group,
            scored.step_weight != 0,
            baseline=self.baseline,
            normalise=self.normalise,
            centre_completions=self.centre_completions,
        )

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        new = models.new.transition(actions.trajectory, actions.step, self.score)
        share = 1.0 if self.aggregation == "sum" else 1 / new.revealed.sum(1).clamp(min=1)
        terms = clipped_surrogate(
            new.log_prob * share,
            actions.log_prob_old * share,
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
            kl = share * categorical_kl(new.log_p, ref.log_p, new.revealed)
        else:
            log_prob_ref = actions.notes["log_prob_ref"]
            kl = kl_estimate(new.log_prob * share, log_prob_ref * share, self.kl)
        return Terms(
            loss=terms.loss + self.beta * kl,
            metrics={**terms.metrics, "kl_new_ref": kl.detach()},
        )
