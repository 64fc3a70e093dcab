"""Exact gradients and exact expectations of estimators for processes in continuous time.

As ``oracle``, of which this is the counterpart: the sampler, ``annotate``, ``credit`` and ``loss``
are the ones that train, run on every outcome of their draws. Here ``annotate`` may draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.algorithms.base import Algorithm
from rescore.proof.oracle import (
    GROUP_SIZE,
    EnumeratingRng,
    Estimate,
    GroupsOfTwo,
    distinct_rows,
    on_all_outcomes,
)
from rescore.proof.score_worlds import ScoreWorld
from rescore.proof.worlds import POLICY_SEED, REFERENCE_SEED
from rescore.sampling.policy import Models, RatePolicy
from rescore.sampling.record import Record
from rescore.types import Actions, Credited, RateTrajectory, Scored


class Draws(NamedTuple):
    """Every outcome of the sampler that is possible."""

    trajectory: RateTrajectory
    probability: Float[Tensor, " N"]
    """Under the sampler that ran, with its graph."""


def enumerate_draws(policy: RatePolicy, world: ScoreWorld, record: Record) -> Draws:
    """Run the sampler on all outcomes of its draws; those of probability 0 are left out."""
    trajectory, probability = on_all_outcomes(
        lambda n, rng: policy.draw(world.prompts(n), record, rng), EnumeratingRng
    )
    possible = (probability > 0).nonzero()[:, 0]
    return Draws(trajectory.take(possible), probability[possible])


def exact_gradient(world: ScoreWorld, beta: float = 0.0) -> Float[Tensor, " D"]:
    """The gradient of J = E[r(x_0)] - beta KL(path law || reference's path law), by autograd."""
    policy, parameters = world.policy(POLICY_SEED)
    paths = enumerate_draws(policy, world, Record())
    value = world.reward(paths.trajectory.x_0)
    if beta:
        reference, _ = world.policy(REFERENCE_SEED)
        theirs = enumerate_draws(reference, world, Record())
        assert len(theirs.probability) == len(value), "the KL is infinite"
        value = value - beta * (paths.probability / theirs.probability.detach()).log()
    return _flat(torch.autograd.grad((paths.probability * value).sum(), parameters))


class ScoreGroups(GroupsOfTwo):
    """Samples with what an algorithm notes about each, and any two.

    Outcomes of the sampler that leave the same record are one; their ``log_prob`` is NaN unless
    every move is kept, for they differ in it. ``select`` and ``annotate`` work sample by sample, so
    they run once per sample and outcome of what ``annotate`` draws, not per group.

    Args:
        algorithm: whose estimator is enumerated.
        world: where.
    """

    def __init__(self, algorithm: Algorithm, world: ScoreWorld) -> None:
        algorithm.check(world.decoder, GROUP_SIZE, ["reward"])
        self.algorithm = algorithm
        self.new, self.parameters = world.policy(POLICY_SEED)
        self.ref = world.policy(REFERENCE_SEED)[0] if algorithm.uses_reference else None
        critic = world.critic() if algorithm.uses_critic else None
        self.models = Models(new=self.new, ref=self.ref, critic=critic)
        algorithm.check_models(self.models)

        drawn, probability = enumerate_draws(self.new, world, algorithm.record)
        paths = drawn.map(torch.Tensor.detach)
        if algorithm.record.moves != "all":
            paths = replace(paths, log_prob=torch.full_like(paths.log_prob, torch.nan))
        moves = [paths.step, paths.before.flatten(1), paths.after.flatten(1)]
        path, first = distinct_rows(torch.cat([paths.x_0, *moves], 1))
        of_path = probability.new_zeros(len(first)).index_add(0, path, probability.detach())
        selected = algorithm.select(self.models, paths.take(first))
        reward = world.reward(selected.trajectory.x_0)
        self._annotate(Scored(**selected.fields(), reward=reward, terms={}), of_path)

    def _annotate(self, scored: Scored, probability: Float[Tensor, " N"]) -> None:
        """Every sample with every outcome of what is drawn about it; equal notes are one."""
        n_samples = len(probability)
        dry = EnumeratingRng(torch.zeros(n_samples, dtype=torch.long))
        self.algorithm.annotate(self.models, scored, dry)
        sample = torch.arange(n_samples).repeat_interleave(dry.n_outcomes)
        rng = EnumeratingRng(torch.arange(dry.n_outcomes).repeat(n_samples))
        rows = self._rows()
        items = self.algorithm.annotate(self.models, scored.take(sample), rng)
        self.forwards = (self._rows() - rows) / len(sample)
        notes = [note.flatten(1).double() for note in items.notes.values()]
        item, first = distinct_rows(torch.cat([sample[:, None].double(), *notes], 1))
        joint = probability[sample] * rng.probability.detach()
        self.probability = joint.new_zeros(len(first)).index_add(0, item, joint)
        self.items = items.take(first)

    def _names(self, item: Int[Tensor, " N"], credited: Credited) -> Int[Tensor, "N K"]:
        n_columns = credited.advantage.shape[1]
        name = item[:, None] * n_columns + torch.arange(n_columns)
        distinct, number = credited.advantage.unique(return_inverse=True)
        return name * len(distinct) + number

    def _action_gradients(self, actions: Actions) -> tuple[Float[Tensor, "N D"], float]:
        n_actions, rows = len(actions.step), self._rows()
        rng = EnumeratingRng(torch.zeros(n_actions, dtype=torch.long))
        loss = self.algorithm.loss(self.models, actions, rng).loss
        assert rng.n_outcomes == 1, "a loss that draws has to be enumerated, which is not done here"
        return -gradients_of(loss, self.parameters), (self._rows() - rows) / n_actions

    def _rows(self) -> int:
        return self.new.rows + (0 if self.ref is None else self.ref.rows)


def expectation(algorithm: Algorithm, world: ScoreWorld) -> Estimate:
    """Mean and variance of an algorithm's estimator over all groups of two and all its draws."""
    return ScoreGroups(algorithm, world).estimate()


def gradients_of(loss: Float[Tensor, " N"], parameters: Sequence[Tensor]) -> Float[Tensor, "N D"]:
    """The gradient of every loss.

    That of a weighted sum of losses is linear in the weights; its derivative by them, one parameter
    at a time, gives that of every loss.
    """
    weight = torch.ones_like(loss, requires_grad=True)
    slope = _flat(torch.autograd.grad((loss * weight).sum(), parameters, create_graph=True))
    columns = [torch.autograd.grad(one, weight, retain_graph=True)[0] for one in slope]
    return torch.stack(columns, 1)


def _flat(parts: tuple[Tensor, ...]) -> Float[Tensor, " D"]:
    return torch.cat([part.flatten() for part in parts])
