"""The interface of an algorithm: what it records, selects, credits and minimises."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rescore.models.critics import Learned
from rescore.objectives.policy_gradient import clipped_surrogate
from rescore.sampling.decoder import Decoder, Decoding, GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianTransition
from rescore.sampling.policy import Models
from rescore.sampling.record import Record, Score
from rescore.sampling.reference import kl_to_reference
from rescore.sampling.rng import Rng
from rescore.tasks.task import Task
from rescore.types import Actions, Credited, Scored, Selected, Terms, Trajectory

LARGEST_CLIP = 20.0
"""Bound of a log-ratio, nats, beyond which a clip would do nothing but overflow."""


@dataclass(frozen=True, kw_only=True)
class Algorithm(abc.ABC):
    """A method. Frozen: the instance is its own configuration; state lives elsewhere.

    Data flow: ``record`` -> sampling -> ``select`` -> rewards -> ``annotate`` -> ``credit`` ->
    ``fit`` -> ``loss``.
    """

    citation: ClassVar[str]
    """BibTeX of the source."""

    @property
    @abc.abstractmethod
    def record(self) -> Record:
        """What the sampler must save."""

    @property
    def uses_reference(self) -> bool:
        """True if ``annotate`` or ``loss`` asks for ``models.ref``."""
        return False

    @property
    def uses_likelihood(self) -> bool:
        """False if ``loss`` asks for no log-probability, so that deterministic solvers serve."""
        return True

    @property
    def on_policy(self) -> bool:
        """True if the loss is valid for one optimiser step per rollout only."""
        return False

    @property
    def uses_critic(self) -> bool:
        """True if ``annotate`` asks for ``models.critic``, which ``fit`` trains."""
        return False

    @property
    def warm_up(self) -> int:
        """Rollouts at the start that train what is beside the policy, and not the policy."""
        return 0

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        """Refuse a decoder, a group size or a reward that the method cannot use.

        Args:
            decoder: how paths are sampled.
            group_size: samples per prompt.
            terms: names of the reward terms.

        Raises:
            ValueError: says which, and what to change.
        """
        if isinstance(decoder, Decoder) and decoder.temperature <= 0:
            raise ValueError(
                f"decoder: temperature={decoder.temperature:g} makes the policy deterministic, and "
                f"its log-probabilities have no gradient to train on; use one above 0"
            )
        if isinstance(decoder, GaussianDecoder) and self.uses_likelihood and not decoder.is_random:
            raise ValueError(
                f"decoder: {decoder.solver} draws no noise, so its steps have no likelihood, which "
                f"{type(self).__name__} needs; use a random solver, such as ddim with eta=1"
            )

    def check_process(self, *, uniform: bool) -> None:
        """Refuse a kind of noise that the method cannot use; by default none.

        Args:
            uniform: whether tokens are replaced by others; False: by the mask.

        Raises:
            ValueError: says why, and what to change.
        """
        return

    def check_models(self, models: Models) -> None:
        """Refuse networks that the method cannot use; by default none.

        Raises:
            ValueError: says why, and what to change.
        """
        return

    def at(self, progress: float) -> Algorithm:
        """The method at a fraction of the run, 0 at its first rollout and 1 at its last."""
        return self

    def critic(self, task: Task, decoder: Decoding, seed: int) -> Learned | None:
        """What is learned beside the policy, made new; by default nothing.

        Args:
            task: what it must predict.
            decoder: of the policy.
            seed: of its weights.
        """
        return None

    def select(self, models: Models, trajectory: Trajectory) -> Selected:
        """Choose the steps that count; the default is all of them, each once."""
        n_samples, n_steps = trajectory.log_prob.shape
        step = torch.arange(n_steps, device=trajectory.x_0.device).expand(n_samples, -1)
        weight = torch.ones_like(trajectory.log_prob)
        return Selected(trajectory=trajectory, step=step, step_weight=weight)

    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        """Add, once per rollout, what needs a model but no policy gradient; by default nothing."""
        return scored

    @abc.abstractmethod
    def credit(self, scored: Scored) -> Credited:
        """Turn rewards into advantages and weights. Pure; sees the whole batch, not the models."""

    def fit(self, models: Models, credited: Credited) -> dict[str, float]:
        """Fit what is learned beside the policy on the whole batch, before the policy's updates.

        By default nothing. ``credit`` has been given already, so what is fitted here serves the
        next rollout: a baseline that knows the rewards it is subtracted from would be biased.

        Returns:
            What to log.
        """
        return {}

    @abc.abstractmethod
    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        """The unreduced loss of a micro-batch. Sees the models, not the batch."""


def check_group(option: str, group_size: int, otherwise: str) -> None:
    """What compares the samples of a group needs company.

    Args:
        option: what compares them, as it is written.
        group_size: samples per prompt.
        otherwise: the option that does not.

    Raises:
        ValueError: a group of one.
    """
    if group_size < 2:
        raise ValueError(
            f"{option} compares the samples of a group, but group_size={group_size}; use "
            f"group_size >= 2 or {otherwise}"
        )


def check_continuous(name: str, decoder: Decoding) -> None:
    """A method of the Gaussian steps of continuous samples.

    Raises:
        ValueError: a decoder of tokens.
    """
    if not isinstance(decoder, GaussianDecoder):
        raise ValueError(
            f"{name} is for continuous samples, but a {type(decoder).__name__} makes tokens; "
            f"expected a GaussianDecoder"
        )


def check_trust_region(name: str, clip: float, beta: float) -> None:
    """A clip of the log-ratio and the weight of a KL.

    Raises:
        ValueError: one of them is no such thing.
    """
    if not 0 < clip <= LARGEST_CLIP:
        raise ValueError(
            f"{name}: clip={clip} nats bounds the log-ratio of a step; expected more than 0 and at "
            f"most {LARGEST_CLIP:g}, which clips next to nothing"
        )
    if not 0 <= beta < math.inf:
        raise ValueError(f"{name}: beta={beta} must be 0 or more, and finite")


def clipped_steps(models: Models, actions: Actions, clip: float, beta: float) -> Terms:
    """The clipped surrogate of each step of a random solver, plus beta KL(new || ref) of the step.

    Args:
        models: ``new`` is a ``GaussianPolicy``.
        actions: noted with ``reference_outputs`` where ``beta`` is not 0.
        clip: bound of the log-ratio in either direction, nats, summed over all dimensions.
        beta: weight of the exact KL, units of the advantage per nat.
    """
    new = models.new.transition(actions.trajectory, actions.step, Score())
    assert isinstance(new, GaussianTransition)
    terms = clipped_surrogate(
        new.log_prob,
        actions.log_prob_old,
        actions.advantage,
        clip_low=-math.expm1(-clip),
        clip_high=math.expm1(clip),
    )
    if beta == 0:
        return terms
    kl = kl_to_reference(new, actions.notes)
    return Terms(loss=terms.loss + beta * kl, metrics={**terms.metrics, "kl_new_ref": kl.detach()})
