r"""SEPO: policy gradients for discrete diffusion through concrete scores.

Source: Zekri and Boullé 2025, "Fine-Tuning Discrete Diffusion Models with Policy Gradient Methods",
arXiv:2502.01384. The finished sample is the only action. A network of concrete scores
$s_y = \pi(y) / \pi(x)$ at the last noise level t_0 knows the log-probability of a state through
its normaliser, $\log \pi(x) = -\log \sum_y s_y$; the loss is $-f(r, A) \log \pi(x)$ with the
coefficient f a constant of the gradient.

Bias: the theorem needs the scores of *all* states, a network gives those of the neighbours that
differ in one token. ``conditional`` replaces pi(y) by pi(y^l | x^-l), which makes it REINFORCE on
the pseudo-likelihood: exact for one position and for independent ones. ``ball`` and ``joint`` (the
paper's weights) shrink with the length. A masked model has no score at finished samples, so masks
are put back: ``elbo``, the bound of the log-likelihood, and ``pseudo_likelihood``. Both the bound
and the scores describe the sampler only as far as the network is a perfect one; "rescore verify
sepo" shows each mode once with perfect scores and once against the sampler that really runs.

The released code does not follow the theorem; docs/algorithms/sepo.md lists what it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.algorithms.base import Algorithm, check_group
from rescore.models.critics import Critic, critic_for
from rescore.models.denoiser import CountedScores, KnownLikelihood
from rescore.objectives.advantages import Baseline, centre, normalise_std
from rescore.objectives.divergences import finite
from rescore.objectives.policy_gradient import ratio_metrics
from rescore.objectives.score_entropy import (
    Coefficient,
    ball_log_policy,
    coefficient,
    conditional_log_policy,
    joint_surrogate,
    sepo_loss,
)
from rescore.processes.layout import states_apart
from rescore.sampling.chunks import over_rows
from rescore.sampling.decoder import Decoding, RateDecoder
from rescore.sampling.policy import Models, Policy, RatePolicy
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng
from rescore.sampling.surrogates import (
    hidden_sets,
    masked_log_policy,
    neighbours,
    snis_log_likelihood,
)
from rescore.tasks.task import Task, TokenTask
from rescore.types import Actions, Credited, RateTrajectory, Scored, Selected, Terms, Trajectory

Mode = Literal["conditional", "ball", "joint", "elbo", "pseudo_likelihood"]
"""What stands for log pi(x); see ``Sepo``."""

KEPT_BYTES = 2**28
"""Largest table of the reference's step laws that is kept between the updates of a rollout; a
larger one is computed anew in each."""
SNIS_BYTES = 2**31
"""Largest table of scores that the self-normalised estimate of ``joint`` may need at once."""


@dataclass(frozen=True, kw_only=True)
class Sepo(Algorithm):
    """SEPO in five modes, with group or critic advantages; a ``RateDecoder`` samples."""

    mode: Mode | None = None
    """What stands for log pi(x). ``conditional``: the sum of log pi(x^l | x^-l), from one network
    row. ``ball``: log of pi(x) over the mass of x and its neighbours. ``joint``: the paper's sum
    over neighbours weighted by pi(y). ``elbo``: the bound of a masked model, over ``masks`` random
    hidden sets. ``pseudo_likelihood``: ``masks`` positions hidden one at a time. None:
    ``conditional`` for uniform noise, ``elbo`` for masked models."""
    coefficient: Coefficient = "ppo_min"
    """f(r, A): ``ppo_min`` min(r A, clip(r) A), the paper's; ``plain`` r A, exact off-policy;
    ``capped`` min(r, 1 + clip_high) A."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    baseline: Baseline | Literal["critic"] = "group_mean"
    """What is subtracted from the reward: something of the group, or a critic that sees the prompt
    only (a learned number where there is none), which the first rollout serves alone."""
    normalise_std: bool = True
    """Divide by the standard deviation of the group, as GRPO does: biased."""
    masks: int = 4
    """m: hidden sets per sample for ``elbo`` and ``pseudo_likelihood``; a network row each."""
    antithetic: bool = True
    """``elbo`` draws its sets in pairs: c positions from one end of a random order, n + 1 - c from
    the other."""
    likelihood: Literal["snis", "network"] = "snis"
    """Where ``joint`` has pi(x) from: self-normalised importance sampling over neighbours, as in
    the paper's code (inconsistent for more than one position), or the network itself, which then
    has ``log_likelihood``."""
    snis_draws: int = 10
    """M: draws of ``snis`` per sample; a network row each."""
    beta: float = 0.0
    """Weight of KL(path law || reference's path law), reward units per nat; 0 keeps no
    reference. Its gradient is taken at the visited states."""
    kl_steps: int = 4
    """Steps of the chain, drawn at random, that estimate the path KL; a network row each, for the
    reference once per rollout and for the policy in every update."""
    critic_lr: float = 0.01
    """Learning rate of the critic."""
    critic_epochs: int = 10
    """Optimiser steps of the critic per rollout."""

    citation: ClassVar[str] = """@article{zekri2025sepo,
  title   = {Fine-Tuning Discrete Diffusion Models with Policy Gradient Methods},
  author  = {Zekri, Oussama and Boull{\\'e}, Nicolas},
  journal = {arXiv preprint arXiv:2502.01384},
  year    = {2025}
}"""

    @property
    def record(self) -> Record:
        return Record(moves=self.kl_steps if self.uses_reference else 0)

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    @property
    def uses_critic(self) -> bool:
        return self.baseline == "critic"

    @property
    def warm_up(self) -> int:
        return int(self.uses_critic)

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        super().check(decoder, group_size, terms)
        if not isinstance(decoder, RateDecoder):
            raise ValueError(
                f"sepo asks for scores at the last noise level, which a {type(decoder).__name__} "
                f"does not have; use a RateDecoder"
            )
        if self.baseline not in ("critic", "none"):
            check_group(f"baseline='{self.baseline}'", group_size, "baseline='none'")
        if self.normalise_std and group_size < 2:
            raise ValueError(
                f"sepo: normalise_std divides by the spread of a group, but group_size="
                f"{group_size}; use group_size >= 2 or turn it off"
            )
        for name in ("masks", "snis_draws", "kl_steps", "critic_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"sepo: {name} must be at least 1, got {getattr(self, name)}")
        if self.kl_steps > decoder.n_moves and self.uses_reference:
            raise ValueError(
                f"sepo: kl_steps={self.kl_steps} of a chain of {decoder.n_moves} steps; use 1 to "
                f"{decoder.n_moves}"
            )
        if not (0 <= self.beta < math.inf and 0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(
                f"sepo: beta={self.beta}, clip_low={self.clip_low}, clip_high={self.clip_high}; "
                f"none may be negative, and clip_low is at most 1"
            )
        if not 0 < self.critic_lr < math.inf:
            raise ValueError(f"sepo: critic_lr must be positive, got {self.critic_lr}")
        if self.mode == "ball" and self.baseline == "none":
            raise ValueError(
                "sepo: mode='ball' is not invariant to a constant added to the reward; use a "
                "baseline"
            )

    def check_process(self, *, uniform: bool) -> None:
        mode = self._mode(uniform)
        if not uniform and mode in ("conditional", "ball", "joint"):
            raise ValueError(
                f"sepo: mode='{mode}' uses the scores of a finished sample, and those of a masked "
                f"model do not depend on its weights there, so nothing would be learned; use "
                f"mode='elbo' or 'pseudo_likelihood'"
            )
        if uniform and mode in ("elbo", "pseudo_likelihood"):
            raise ValueError(
                f"sepo: mode='{mode}' hides tokens behind masks, which a model of uniform noise "
                f"does not know; use mode='conditional'"
            )
        if mode == "elbo" and self.antithetic and self.masks % 2:
            raise ValueError(
                f"sepo: antithetic sets come in pairs, but masks={self.masks}; make it even, or "
                f"turn antithetic off"
            )

    def check_models(self, models: Models) -> None:
        policy = _rates(models.new)
        self.check_process(uniform=policy.network.process.mask_id is None)
        mode = self._mode(policy.network.process.mask_id is None)
        network = policy.network
        known = isinstance(network, CountedScores) and isinstance(network.network, KnownLikelihood)
        if mode == "joint" and self.likelihood == "network" and not known:
            raise ValueError(
                "sepo: likelihood='network', but the network has no log_likelihood(); use 'snis', "
                "or another mode"
            )

    def critic(self, task: Task, decoder: Decoding, seed: int) -> Critic:
        assert isinstance(task, TokenTask)
        prompts = task.prompts("train", torch.zeros(1, dtype=torch.long))
        return critic_for(prompts, max(task.vocab_size, task.mask_id + 1), seed)

    def select(self, models: Models, trajectory: Trajectory) -> Selected:
        step = torch.full_like(trajectory.x_0[:, :1], trajectory.n_steps)
        weight = torch.ones_like(trajectory.log_prob[:, :1])
        return Selected(trajectory=trajectory, step=step, step_weight=weight)

    @torch.no_grad()
    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        """Draw what old and new policy share, and score the samples under the old one."""
        policy, trajectory = _rates(models.new), _tokens(scored.trajectory)
        notes: dict[str, Tensor] = {}
        mode = self._mode(policy.network.process.mask_id is None)
        if mode in ("elbo", "pseudo_likelihood"):
            notes["hidden"] = hidden_sets(
                trajectory.prompts,
                self.masks,
                sizes=mode == "elbo",
                antithetic=self.antithetic,
                step=trajectory.n_steps + 1,
                rng=rng,
            )
        elif mode == "joint" and self.likelihood == "snis":
            notes["neighbour"] = self._neighbours(policy, trajectory, rng)
        rows = self.masks if "hidden" in notes else 1 + sum(n.shape[1] for n in notes.values())

        def part(index: Int[Tensor, " n"]) -> Tensor:
            index = index.to(trajectory.x_0.device)
            some = {name: note[index] for name, note in notes.items()}
            return self._log_policy(policy, trajectory.take(index), some)[0]

        at_most = max(1, policy.forward_rows // rows)
        notes["log_policy_old"] = torch.cat(over_rows(part, len(trajectory.x_0), at_most=at_most))
        if models.critic is not None:
            assert isinstance(models.critic, Critic)
            notes["value"] = models.critic.value(trajectory.prompts).clone()
            notes["fitted"] = models.critic.fitted.repeat(len(notes["value"]))
        if models.ref is not None and self._keeps_reference(policy, trajectory):
            notes["log_p_ref"] = self._reference_laws(_rates(models.ref), trajectory)
        one_column = {name: note[:, None] for name, note in notes.items()}
        return replace(scored, notes={**scored.notes, **one_column})

    def credit(self, scored: Scored) -> Credited:
        group, reward = scored.trajectory.prompts.group, scored.reward[:, None]
        if self.baseline == "critic":
            advantage = reward - scored.notes["value"].to(reward)
        else:
            advantage = centre(reward, group, self.baseline)
        if self.normalise_std:
            advantage = normalise_std(advantage, group)
        active = (advantage != 0) | self.uses_reference
        active = active & _tokens(scored.trajectory).prompts.editable.any(1, keepdim=True)
        if self.baseline == "critic":  # the first rollout is for the critic alone
            active = active & scored.notes["fitted"]
        weight = torch.where(active, scored.step_weight / len(reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def fit(self, models: Models, credited: Credited) -> dict[str, float]:
        if models.critic is None:
            return {}
        assert isinstance(models.critic, Critic)
        prompts = _tokens(credited.trajectory).prompts
        error = models.critic.fit(
            prompts, credited.reward, lr=self.critic_lr, epochs=self.critic_epochs
        )
        return {"value_error": float(error)}

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        policy, notes, trajectory = _rates(models.new), actions.notes, _tokens(actions.trajectory)
        log_policy, surrogate = self._log_policy(policy, trajectory, notes)
        old = notes["log_policy_old"]
        if surrogate is None:
            terms = sepo_loss(
                log_policy,
                old,
                actions.advantage,
                self.coefficient,
                self.clip_low,
                self.clip_high,
                trajectory.prompts.editable if log_policy.ndim == 2 else None,
            )
        else:  # joint: the ratio is of pi(x), the gradient of the sum over neighbours
            metrics = ratio_metrics(log_policy, old)
            factor = coefficient(
                metrics["ratio"], actions.advantage, self.coefficient, self.clip_low, self.clip_high
            )
            terms = Terms(loss=-factor * surrogate, metrics=metrics)
        if not self.uses_reference:
            return terms
        kl = self._path_kl(models, trajectory, notes)
        return Terms(
            loss=terms.loss + self.beta * kl, metrics={**terms.metrics, "kl_new_ref": kl.detach()}
        )

    def _mode(self, uniform: bool) -> Mode:
        return self.mode or ("conditional" if uniform else "elbo")

    def _log_policy(
        self, policy: RatePolicy, trajectory: RateTrajectory, notes: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "N *positions"], Float[Tensor, " N"] | None]:  # noqa: UP037
        """log pi or what stands for it, and what has its gradient where that is something else."""
        network, x = policy.network, trajectory.x_0
        mode = self._mode(network.process.mask_id is None)
        prompts = trajectory.prompts
        if mode in ("elbo", "pseudo_likelihood"):
            return masked_log_policy(network, x, prompts, notes["hidden"]), None
        level = policy.decoder.moves()[-1][1]
        noise = torch.full((len(x),), level, dtype=torch.float64, device=x.device)
        log_score = network.log_score(x, noise, attend=prompts.attend)
        if mode == "conditional":
            return conditional_log_policy(log_score, x, prompts.editable), None
        if mode == "ball":
            return ball_log_policy(log_score, x, prompts.editable), None
        with torch.no_grad():
            if self.likelihood == "network":
                assert isinstance(policy.network, CountedScores)
                assert isinstance(policy.network.network, KnownLikelihood)
                log_pi = policy.network.network.log_likelihood(x)
            else:
                neighbour = notes["neighbour"]
                log_pi = snis_log_likelihood(network, level, log_score, x, prompts, neighbour)
        return log_pi, joint_surrogate(log_score, log_pi, prompts.editable)

    def _neighbours(
        self, policy: RatePolicy, trajectory: RateTrajectory, rng: Rng
    ) -> Int[Tensor, "B M L"]:
        """The states that ``snis`` visits.

        Raises:
            ValueError: a sample alone needs a table of more than ``SNIS_BYTES``.
        """
        x, prompts, n_states = trajectory.x_0, trajectory.prompts, policy.network.process.n_states
        needed = self.snis_draws * x.shape[1] * n_states * 4
        if needed > SNIS_BYTES:
            raise ValueError(
                f"sepo: likelihood='snis' with {self.snis_draws} draws over {x.shape[1]} positions "
                f"and {n_states} tokens needs {needed / 2**30:.1f} GiB per sample (at most "
                f"{SNIS_BYTES / 2**30:.0f}); use mode='conditional', which needs one row"
            )
        level = policy.decoder.moves()[-1][1]

        def part(index: Int[Tensor, " n"]) -> Tensor:
            index = index.to(x.device)
            some = prompts.take(index)
            noise = torch.full((len(index),), level, dtype=torch.float64, device=x.device)
            return policy.network.log_score(x[index], noise, attend=some.attend)

        log_score = torch.cat(over_rows(part, len(x), at_most=policy.forward_rows))
        step = trajectory.n_steps + 1
        return neighbours(log_score, x, prompts.editable, self.snis_draws, step=step, rng=rng)

    def _keeps_reference(self, policy: RatePolicy, trajectory: RateTrajectory) -> bool:
        n_samples, length = trajectory.x_0.shape
        table = n_samples * self.kl_steps * length * policy.network.process.n_states
        return 4 * table <= KEPT_BYTES

    def _reference_laws(
        self, ref: RatePolicy, trajectory: RateTrajectory
    ) -> Float[Tensor, "B M L S"]:
        """Log of the reference's law after every kept step, without zeros."""

        def part(index: Int[Tensor, " n"]) -> Tensor:
            paths, step = _kept_steps(trajectory.take(index.to(trajectory.x_0.device)))
            log_p = finite(ref.transition(paths, step, Score()).log_p)
            return log_p.unflatten(0, (len(index), -1))

        at_most = max(1, ref.forward_rows // self.kl_steps)
        return torch.cat(over_rows(part, len(trajectory.x_0), at_most=at_most))

    def _path_kl(
        self, models: Models, trajectory: RateTrajectory, notes: Mapping[str, Tensor]
    ) -> Float[Tensor, " N"]:
        """Path KL(new || ref) estimated from the kept steps, exact within each, nats."""
        assert models.ref is not None
        paths, step = _kept_steps(trajectory)
        new = _rates(models.new).transition(paths, step, Score())
        if "log_p_ref" in notes:
            log_p_ref = states_apart(notes["log_p_ref"].flatten(0, 1))
        else:
            with torch.no_grad():
                log_p_ref = finite(_rates(models.ref).transition(paths, step, Score()).log_p)
        kl = new.kl_to(log_p_ref)
        return kl.view(len(trajectory.x_0), -1).mean(1) * trajectory.n_steps


def _kept_steps(trajectory: RateTrajectory) -> tuple[RateTrajectory, Int[Tensor, " NM"]]:
    """Every path once for each of its kept steps, and their numbers."""
    index = torch.arange(len(trajectory.x_0), device=trajectory.x_0.device)
    paths = trajectory.take(index.repeat_interleave(trajectory.step.shape[1]))
    return paths, trajectory.step.flatten()


def _rates(policy: Policy) -> RatePolicy:
    assert isinstance(policy, RatePolicy)
    return policy


def _tokens(trajectory: Trajectory) -> RateTrajectory:
    assert isinstance(trajectory, RateTrajectory)
    return trajectory
