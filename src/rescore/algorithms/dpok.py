r"""DPOK: policy gradients with a KL to the pretrained model, and a value of noised samples.

The objective is the expected reward less beta times the KL of whole paths, a sum over steps:

    - sum_k min(rho_k A_k, clip(rho_k) A_k)  +  beta sum_k KL(pi_new(. | x_k) || pi_ref(. | x_k)),
    A_k = r(x_0) - V(x_k, t_k),    V fitted to r by squared error,
    KL_k = (B^2 / 2 S^2) |a_new - a_ref|^2    for a step x_{k+1} = A x_k + B a + S z.

Source: Fan et al. 2023, arXiv:2305.16381. V is a small network of the noised sample (a
``ValueCritic`` of design ``plain``). It predicts before it is fitted to the same rollout, so it
knows nothing of what comes after x_k and is a legal baseline; the first rollout trains it alone.

Bias: none in the reward's part, until a ratio is clipped; the KL has no gradient through how often
a state is visited. The released code clamps the ratio without the minimum, which stops gradients
that would undo a step as well, and its KL is the squared distance of the predicted noises without
B^2 / 2 S^2, which is not the KL of the paths; docs/algorithms/dpok.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rescore.algorithms.base import Algorithm, check_continuous, check_trust_region, clipped_steps
from rescore.models.value import ValueCritic, value_critic_for
from rescore.sampling.decoder import Decoding, GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import Models
from rescore.sampling.record import Record
from rescore.sampling.reference import reference_outputs
from rescore.sampling.rng import Rng
from rescore.sampling.values import path_values, visited
from rescore.tasks.task import ContinuousTask, Task
from rescore.types import Actions, Credited, GaussianTrajectory, Scored, Terms


@dataclass(frozen=True, kw_only=True)
class Dpok(Algorithm):
    """DPOK on every step that draws noise."""

    clip: float = 0.2
    """The log-ratio of a step gains nothing beyond this in either direction, nats, summed over all
    dimensions. The released code's clip times d: 1.64 for its 1e-4 and latents of 4 x 64 x 64."""
    beta: float = 0.01
    """Weight of KL(new || ref), exact within each step and taken at the visited states, reward
    units per nat; 0 keeps no reference."""
    critic_lr: float = 1e-3
    """Learning rate of V."""
    critic_epochs: int = 4
    """Passes of V over the states of a rollout, to serve the next."""
    critic_batch: int = 256
    """States per step of V."""

    citation: ClassVar[str] = """@inproceedings{fan2023dpok,
  title     = {{DPOK}: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models},
  author    = {Fan, Ying and Watkins, Olivia and Du, Yuqing and Liu, Hao and Ryu, Moonkyung and
               Boutilier, Craig and Abbeel, Pieter and Ghavamzadeh, Mohammad and Lee, Kangwook and
               Lee, Kimin},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  note      = {arXiv:2305.16381}
}"""

    @property
    def record(self) -> Record:
        return Record(moves="all")

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    @property
    def uses_critic(self) -> bool:
        return True

    @property
    def warm_up(self) -> int:
        return 1

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        super().check(decoder, group_size, terms)
        check_continuous("dpok", decoder)
        check_trust_region("dpok", self.clip, self.beta)
        for name in ("critic_epochs", "critic_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"dpok: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.critic_lr < math.inf:
            raise ValueError(f"dpok: critic_lr must be positive, got {self.critic_lr}")

    def critic(self, task: Task, decoder: Decoding, seed: int) -> ValueCritic:
        assert isinstance(task, ContinuousTask) and isinstance(decoder, GaussianDecoder)
        return value_critic_for(
            task.shape,
            task.prompts("train", torch.zeros(1, dtype=torch.long)).inputs,
            n_labels=task.n_labels,
            n_states=1 + decoder.two_step,
            design="plain",
            seed=seed,
        )

    @torch.no_grad()
    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        """Value every state before it is learned from, and ask the reference about it."""
        critic, path = _critic(models), scored.trajectory
        assert isinstance(path, GaussianTrajectory) and isinstance(models.new, GaussianPolicy)
        value, _ = path_values(models.new, critic, path)
        fitted = (critic.fitted > 0).expand(scored.step.shape)
        notes = {"value": value.gather(1, scored.step), "fitted": fitted}
        if models.ref is not None:
            notes |= reference_outputs(models.ref, scored)
        return replace(scored, notes={**scored.notes, **notes})

    def credit(self, scored: Scored) -> Credited:
        advantage = scored.reward[:, None] - scored.notes["value"].to(scored.reward)
        active = scored.trajectory.acts() & scored.notes["fitted"]
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def fit(self, models: Models, credited: Credited) -> dict[str, float]:
        path, policy, step = credited.trajectory, models.new, credited.step
        assert isinstance(path, GaussianTrajectory) and isinstance(policy, GaussianPolicy)
        sample = torch.arange(len(step), device=step.device)[:, None].expand_as(step).flatten()
        explained = _critic(models).fit(
            lambda rows: visited(policy, path, sample[rows], step.flatten()[rows]),
            None,
            credited.reward[:, None].expand_as(step).flatten(),
            lr=self.critic_lr,
            epochs=self.critic_epochs,
            batch=self.critic_batch,
        )
        return {"value_explained": explained}

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        return clipped_steps(models, actions, self.clip, self.beta)


def _critic(models: Models) -> ValueCritic:
    assert isinstance(models.critic, ValueCritic)
    return models.critic
