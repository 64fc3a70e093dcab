"""Exact gradients and exact expectations of estimators for Gaussian noise, by quadrature.

As ``oracle``, of which this is the counterpart: the sampler, ``select``, ``annotate``, ``credit``
and ``loss`` are the ones that train. Every normal draw takes the nodes of a Gauss-Hermite rule; in
a ``GaussianWorld`` all estimators that do not divide by a standard deviation are polynomials in the
draws, of a degree for which the rule is exact.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.algorithms.base import Algorithm
from rescore.models.critics import Learned
from rescore.proof.gaussian_worlds import POLICY, REFERENCE, GaussianWorld, KlMeaning
from rescore.proof.oracle import EnumeratingRng, Estimate, on_all_outcomes
from rescore.proof.score_oracle import gradients_of
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import Models
from rescore.sampling.record import Record
from rescore.sampling.rng import Stream
from rescore.types import Actions, Credited, GaussianTrajectory, Scored, joined

N_NODES = 4
"""Of every normal. Exact up to degree 7 in each; (reward times score)^2, of which the variance is
made, has degree 6 in each."""
N_COMPARED = 9
"""Groups whose credit is compared with and without the others."""


class QuadratureRng(EnumeratingRng):
    """As its base, and normals take the nodes of a Gauss-Hermite rule, by their weights.

    Nodes depend on no parameter, so what is made of them is differentiable.
    """

    def normal(self, stream: Stream, step: int, where: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """The nodes of this outcome, one per row name."""
        n_rows = where.shape[1]
        z, weight = nodes()
        digit = self._digit(N_NODES**n_rows)[:, None] // N_NODES ** torch.arange(n_rows) % N_NODES
        self.probability = self.probability * weight[digit].prod(-1)
        return z[digit]


@functools.cache
def nodes() -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Nodes and weights of a standard normal."""
    z, weight = np.polynomial.hermite_e.hermegauss(N_NODES)
    return torch.from_numpy(z), torch.from_numpy(weight / math.sqrt(2 * math.pi))


class Draws(NamedTuple):
    """Every outcome of the sampler's draws."""

    trajectory: GaussianTrajectory
    probability: Float[Tensor, " N"]


def enumerate_draws(policy: GaussianPolicy, world: GaussianWorld, record: Record) -> Draws:
    """Run the sampler on all outcomes of its draws, with gradients through the states."""
    return Draws(
        *on_all_outcomes(lambda n, rng: policy.draw(world.prompts(n), record, rng), QuadratureRng)
    )


def exact_gradient(
    world: GaussianWorld,
    beta: float = 0.0,
    kl: KlMeaning = "step",
    *,
    only_random: bool = False,
) -> Float[Tensor, " 3"]:
    """The gradient of J = E[r(x_0)] - beta KL, by autograd through the sampler's states.

    Args:
        world: where.
        beta: weight of the KL of the steps, summed along the path.
        kl: its meaning.
        only_random: the part of the gradient through steps that draw noise.
    """
    policy, parameters = world.policy(POLICY, only_random=only_random)
    paths, probability = enumerate_draws(policy, world, Record(moves="all"))
    value = world.reward(paths.x_0)
    if beta:
        reference, _ = world.policy(REFERENCE)
        for k in range(world.steps):
            step = torch.full_like(paths.first, k)
            new, ref = policy.at(paths, step), reference.at(paths, step)
            value = value - beta * world.kl(new, ref, kl)
    return torch.autograd.grad(probability @ value, parameters)[0]


class GaussianGroups:
    """All that an algorithm may meet: samples with what it notes about each, and any few.

    ``select`` and ``annotate`` work sample by sample, so they run once per sample and outcome of
    what ``annotate`` draws, not per group.

    Args:
        algorithm: whose estimator is enumerated.
        world: where.
        critic: of an algorithm that uses one.
        group_size: samples of one prompt, which are a batch.
    """

    def __init__(
        self, algorithm: Algorithm, world: GaussianWorld, critic: Learned | None, group_size: int
    ) -> None:
        algorithm.check(world.decoder, group_size, ["reward"])
        self.algorithm, self.group_size = algorithm, group_size
        self.new, self.parameters = world.policy(POLICY)
        self.ref = world.policy(REFERENCE)[0] if algorithm.uses_reference else None
        assert (critic is not None) == algorithm.uses_critic
        self.models = Models(new=self.new, ref=self.ref, critic=critic)
        algorithm.check_models(self.models)

        drawn, probability = enumerate_draws(self.new, world, algorithm.record)
        selected = algorithm.select(self.models, drawn.map(torch.Tensor.detach))
        reward = world.reward(selected.trajectory.x_0)
        scored = Scored(**selected.fields(), reward=reward, terms={})

        n_samples = len(reward)
        dry = QuadratureRng(torch.zeros(n_samples, dtype=torch.long))
        algorithm.annotate(self.models, scored, dry)
        sample = torch.arange(n_samples).repeat_interleave(dry.n_outcomes)
        rng = QuadratureRng(torch.arange(dry.n_outcomes).repeat(n_samples))
        rows = self._rows()
        self.items = algorithm.annotate(self.models, scored.take(sample), rng)
        self.forwards = (self._rows() - rows) / len(sample)
        self.probability = probability[sample] * rng.probability

    def gradients(
        self, members: Int[Tensor, "M G"]
    ) -> tuple[Float[Tensor, "M 3"], Float[Tensor, " M"]]:
        """The gradient that each group, alone in a batch, steps along, and its forwards."""
        n_groups = len(members)
        credited = self._credited(members)
        pairs = credited.pairs()
        total = torch.zeros(n_groups, len(self.parameters), dtype=torch.float64)
        if not len(pairs):
            return total, torch.full((n_groups,), self.forwards, dtype=torch.float64)
        actions, group = credited.actions(pairs), pairs[:, 0] // self.group_size
        gradient, forwards = self._action_gradients(actions)
        total.index_add_(0, group, actions.weight[:, None] * gradient)
        n_actions = group.bincount(minlength=n_groups)
        return total, self.forwards + forwards * n_actions.double() / self.group_size

    def _credited(self, members: Int[Tensor, "M G"]) -> Credited:
        """What ``credit`` says of each group alone in a batch, group after group.

        All groups form one batch, which ``credit`` divides by; that is undone. Unless it treats
        some of them otherwise when they are alone, as statistics of the batch do: then one by one.
        """
        rows = torch.arange(members.numel()).view_as(members)
        items = self.items.take(members.flatten())
        together = self.algorithm.credit(_grouped(items, rows))
        together = replace(together, weight=together.weight * len(members))

        def alone(group: int) -> Credited:
            return self.algorithm.credit(_grouped(items.take(rows[group]), rows[:1]))

        for group in torch.linspace(0, len(members) - 1, N_COMPARED).long().tolist():
            mine, among = alone(group), together.take(rows[group])
            if not torch.allclose(mine.advantage * mine.weight, among.advantage * among.weight):
                return joined([alone(i) for i in range(len(members))])
        return together

    def _action_gradients(self, actions: Actions) -> tuple[Float[Tensor, "N 3"], float]:
        """Minus the gradient of the loss of each action, and the network rows each needs."""
        n_actions, rows = len(actions.step), self._rows()
        rng = QuadratureRng(torch.zeros(n_actions, dtype=torch.long))
        loss = self.algorithm.loss(self.models, actions, rng).loss
        assert rng.n_outcomes == 1, "a loss that draws has to be enumerated, which is not done here"
        return -gradients_of(loss, [self.parameters]), (self._rows() - rows) / n_actions

    def _rows(self) -> int:
        return self.new.rows + (0 if self.ref is None else self.ref.rows)


def _grouped(items: Scored, rows: Int[Tensor, "M G"]) -> Scored:
    """The same samples, those of a row a group."""
    group = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    prompts = replace(items.trajectory.prompts, group=group)
    return replace(items, trajectory=replace(items.trajectory, prompts=prompts))


def expectation(
    algorithm: Algorithm,
    world: GaussianWorld,
    *,
    critic: Learned | None = None,
    group_size: int = 2,
) -> Estimate:
    """Mean and variance of an algorithm's estimator over all groups and all its draws.

    The order of a group plays no part, so each is met once, as often as it has orders.

    Args:
        algorithm: whose estimator is enumerated.
        world: where.
        critic: of an algorithm that uses one.
        group_size: 2, or 1 for methods without a baseline, of which more steps can be enumerated.
    """
    groups = GaussianGroups(algorithm, world, critic, group_size)
    item = range(len(groups.probability))
    members = torch.tensor(list(itertools.combinations_with_replacement(item, group_size)))
    orders = torch.ones(len(members)) if group_size == 1 else 1 + (members[:, 0] != members[:, 1])
    probability = orders * groups.probability[members].prod(1)
    gradient, forwards = groups.gradients(members)
    mean = probability @ gradient
    variance = probability @ gradient.square().sum(1) - mean.square().sum()
    return Estimate(mean, float(variance), float(probability @ forwards))
