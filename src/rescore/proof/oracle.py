"""Exact gradients and exact expectations of estimators, by enumeration of the code that trains.

The sampler and the algorithms draw through the ``Rng`` protocol. ``EnumeratingRng`` implements it
so that row b of a batch takes outcome number b; running the real sampler once on a batch of all
outcomes gives every path with its exact, differentiable probability. No formula of an algorithm and
no log-probability of a step is repeated here.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

from rescore.algorithms.base import Algorithm
from rescore.processes.masked import FAR_BELOW
from rescore.proof.worlds import POLICY_SEED, REFERENCE_SEED, Tabled, World, jacobian
from rescore.sampling.decoder import Decoder
from rescore.sampling.discrete import sample_masked
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Record
from rescore.sampling.rng import Stream
from rescore.types import Actions, Credited, MaskedTrajectory, Scored

GROUP_SIZE = 2
CHUNK = 2**15
"""Groups treated at once; bounds the memory, changes nothing else."""
Drawn = TypeVar("Drawn")


class EnumeratingRng:
    """Draws that are given: row b takes outcome ``outcome[b]``, read as digits, one per call.

    A categorical call of R rows over V tokens is a digit of radix V^R; an ordered draw of n out of
    m is one of radix m! / (m - n)!. The radices must be the same for all rows of the batch.
    """

    def __init__(self, outcome: Int[Tensor, " B"]) -> None:
        self.rest = outcome
        self.n_outcomes = 1
        """Outcomes of the calls made so far."""
        self.probability = torch.ones(len(outcome), dtype=torch.float64)
        """Of the outcome of each row; differentiable in what was passed."""

    def categorical(
        self, probs: Float[Tensor, "B R V"], stream: Stream, step: int, where: Int[Tensor, "B R"]
    ) -> Int[Tensor, "B R"]:
        """The tokens of this outcome; their probabilities are multiplied up."""
        n_rows, n_tokens = probs.shape[1:]
        place = n_tokens ** torch.arange(n_rows)
        token = self._digit(n_tokens**n_rows)[:, None] // place % n_tokens
        exact = probs.double()  # equal weights may come in float32, whose 1/3 is not exact enough
        drawn = exact.gather(-1, token[..., None]).squeeze(-1) / exact.sum(-1)
        self.probability = self.probability * drawn.prod(-1)
        return token

    def ordered(
        self, log_weight: Float[Tensor, "B R"], n: int, step: int, where: Int[Tensor, "B R"]
    ) -> Int[Tensor, "B n"]:
        """The rows of this outcome; the i-th is drawn in proportion to the weights still there."""
        candidate = log_weight > FAR_BELOW / 2
        m = int(candidate[0].sum())
        draws = torch.tensor(list(itertools.permutations(range(m), n)))
        chosen = candidate.nonzero()[:, 1].view(-1, m).gather(1, draws[self._digit(len(draws))])
        weight = log_weight.double().softmax(-1)
        for row in chosen.split(1, dim=1):
            share = weight.gather(1, row) / weight.sum(1, keepdim=True)
            self.probability = self.probability * share.squeeze(1)
            weight = weight.scatter(1, row, 0.0)
        return chosen

    def log_times(
        self, log_rate: Float[Tensor, "B R"], step: int, where: Int[Tensor, "B R"]
    ) -> Float[Tensor, "B R"]:
        """Times are continuous.

        Raises:
            ValueError: always.
        """
        raise ValueError("times cannot be enumerated; soft_low_confidence is proven by quadrature")

    def normal(self, stream: Stream, step: int, where: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Normals are continuous.

        Raises:
            ValueError: always.
        """
        raise ValueError("normals cannot be enumerated; continuous samples are proven elsewhere")

    def _digit(self, radix: int) -> Int[Tensor, " B"]:
        self.n_outcomes *= radix
        digit, self.rest = self.rest % radix, self.rest // radix
        return digit


def on_all_outcomes(
    sample: Callable[[int, EnumeratingRng], Drawn], kind: type[EnumeratingRng]
) -> tuple[Drawn, Float[Tensor, " N"]]:
    """What a sampler makes of every outcome of its draws, and their probabilities, with graphs.

    Args:
        sample: makes n samples with the draws it is given.
        kind: of draws.
    """
    dry = kind(torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        sample(1, dry)
    rng = kind(torch.arange(dry.n_outcomes))
    with torch.enable_grad():
        return sample(dry.n_outcomes, rng), rng.probability


class Paths(NamedTuple):
    """Every path the sampler can take."""

    trajectory: MaskedTrajectory
    probability: Float[Tensor, " N"]
    """Under the sampler that ran, with its graph."""


def enumerate_paths(denoiser: Tabled, decoder: Decoder, world: World, record: Record) -> Paths:
    """Run ``sample_masked`` on all outcomes; outcomes that give the same path are added up.

    Several do where the sampler draws more than it keeps: ``low_confidence`` drops proposals, and a
    slot forgets the steps it exchanged. Paths that keep other steps are other paths.
    """
    all_of_them, probability = on_all_outcomes(
        lambda n, rng: sample_masked(denoiser, decoder, world.prompts(n), record, rng),
        EnumeratingRng,
    )
    possible = (probability > 0).nonzero()[:, 0]
    paths, probability = all_of_them.take(possible), probability[possible]
    kept = [] if paths.kept is None else [paths.kept.step]
    name = torch.cat([paths.x_0, paths.rank, *kept], 1)
    path, first = distinct_rows(name)
    return Paths(
        trajectory=paths.map(torch.Tensor.detach).take(first),
        probability=probability.new_zeros(len(first)).index_add(0, path, probability),
    )


def distinct_rows(table: Shaped[Tensor, "N C"]) -> tuple[Int[Tensor, " N"], Int[Tensor, " M"]]:
    """The number of each row among the M distinct ones, and a row that has each number."""
    number = table.unique(dim=0, return_inverse=True)[1]
    row = torch.arange(len(number))
    n_distinct = int(number.max()) + 1
    return number, torch.full((n_distinct,), len(row)).scatter_reduce(0, number, row, "amin")


def _values(
    trajectory: MaskedTrajectory,
    probability: Float[Tensor, " N"],
    reward: Float[Tensor, " N"],
    mask_id: int,
) -> Float[Tensor, "N T"]:
    """V(x_t) = E[r | x_t] at the state before every step, from all paths."""
    columns = []
    for k in range(trajectory.n_steps):
        step = torch.full((len(reward),), k)
        state, first = distinct_rows(trajectory.state(step, mask_id))
        mass = torch.zeros(len(first), dtype=reward.dtype).index_add(0, state, probability)
        total = torch.zeros_like(mass).index_add(0, state, probability * reward)
        columns.append((total / mass)[state])
    return torch.stack(columns, 1)


def exact_gradient(world: World, decoder: Decoder, beta: float = 0.0) -> Float[Tensor, " D"]:
    """The gradient of J = E[r(x_0)] - beta KL(path law || reference's path law), by autograd.

    For max_prob and low_confidence it is the almost-everywhere one.
    """
    denoiser = Tabled.of(world.denoiser(POLICY_SEED), world.canvases())
    paths = enumerate_paths(denoiser, decoder, world, Record())
    value = world.reward(paths.trajectory.x_0)
    if beta:
        with torch.no_grad():
            reference = Tabled.of(world.denoiser(REFERENCE_SEED), world.canvases())
        theirs = enumerate_paths(reference, decoder, world, Record())
        assert torch.equal(paths.trajectory.rank, theirs.trajectory.rank), "laws on other paths"
        value = value - beta * (paths.probability / theirs.probability.detach()).log()
    gradient = denoiser.gradient((paths.probability * value).sum())
    return gradient.flatten() @ jacobian(world).flatten(0, 2)


@dataclass(frozen=True)
class Estimate:
    """An estimator of the gradient made of one group of two samples, in expectation."""

    mean: Float[Tensor, " D"]
    variance: float
    """Trace of the covariance."""
    forwards: float
    """Network rows per sample after the rollout."""


class GroupsOfTwo(abc.ABC):
    """All that an algorithm may meet: samples with what it notes about each, and any two."""

    algorithm: Algorithm
    items: Scored
    """The samples."""
    probability: Float[Tensor, " N"]
    """Of each."""
    forwards: float
    """Network rows per sample for its notes."""

    def estimate(self) -> Estimate:
        """The mean and variance of the estimator over all groups."""
        item = torch.arange(len(self.probability))
        mean, square, forwards = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for members in torch.cartesian_prod(item, item).split(CHUNK):
            probability = self.probability[members].prod(1)
            gradient, rows = self.gradients(members)
            mean = mean + probability @ gradient
            square = square + probability @ gradient.norm(dim=1).square()
            forwards = forwards + probability @ rows
        return Estimate(mean, float(square - mean.square().sum()), float(forwards))

    def gradients(
        self, members: Int[Tensor, "M 2"]
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, " M"]]:
        """The gradient that each group, alone in a batch, would step along, and its forwards.

        All groups form one batch for ``credit``, which divides by the batch; that is undone.
        ``loss`` sees actions, not the batch, so equal actions are put to it once.
        """
        n_groups = len(members)
        group = torch.arange(n_groups).repeat_interleave(GROUP_SIZE)
        batch = self.items.take(members.flatten())
        prompts = replace(batch.trajectory.prompts, group=group, sample_id=torch.arange(len(group)))
        batch = replace(batch, trajectory=replace(batch.trajectory, prompts=prompts))
        credited = self.algorithm.credit(batch)
        weight = credited.weight * n_groups

        width, name = weight.shape[1], self._names(members.flatten(), credited).flatten()
        trained = weight.flatten() != 0
        trained[0] = True  # never nothing: a weight of 0 adds nothing
        place = trained.nonzero()[:, 0]
        distinct, action = name[place].unique(return_inverse=True)
        example = torch.empty_like(distinct).scatter_(0, action, place)
        gradient, rows = self._action_gradients(
            credited.actions(torch.stack([example // width, example % width], 1))
        )
        column = torch.zeros_like(name).scatter_(0, place, action)
        shape = (n_groups, GROUP_SIZE * width)
        total = embedding_bag(
            column.view(shape), gradient, mode="sum", per_sample_weights=weight.view(shape)
        )
        n_actions = (weight.view(shape) != 0).double().sum(1)
        return total, self.forwards + rows * n_actions / GROUP_SIZE

    @abc.abstractmethod
    def _names(self, item: Int[Tensor, " N"], credited: Credited) -> Int[Tensor, "N K"]:
        """A number for each action of some items; equal for equal actions only."""

    @abc.abstractmethod
    def _action_gradients(self, actions: Actions) -> tuple[Float[Tensor, "N D"], float]:
        """Minus the gradient of the loss of each action, and the network rows each needs."""


class Groups(GroupsOfTwo):
    """Paths with the steps that an algorithm selects on each, and any two.

    ``select`` and ``annotate`` work sample by sample, so they run once per path, not per group.

    Args:
        algorithm: whose estimator is enumerated.
        world: where.
        decoder: how paths are sampled.
        exact_values: put the exact value of each state in the place of its completion's reward.
    """

    def __init__(
        self, algorithm: Algorithm, world: World, decoder: Decoder, *, exact_values: bool
    ) -> None:
        algorithm.check(decoder, GROUP_SIZE, ["reward"])
        self.algorithm, self.world = algorithm, world
        canvases = world.canvases()
        self.new = Tabled.of(world.denoiser(POLICY_SEED), canvases)
        self.ref = Tabled.of(world.denoiser(REFERENCE_SEED), canvases)
        ref = MaskedPolicy(self.ref, decoder) if algorithm.uses_reference else None
        self.models = Models(new=MaskedPolicy(self.new, decoder), ref=ref)

        paths, probability = enumerate_paths(self.new, decoder, world, algorithm.record)
        self.new.uses.clear()
        self.probability = probability.detach()
        self.path = distinct_rows(torch.cat([paths.x_0, paths.rank], 1))[0]
        rows = self._rows()
        selected = algorithm.select(self.models, paths)
        reward = world.reward(selected.trajectory.x_0)
        completion_terms = {}
        if exact_values:
            value = _values(paths, self.probability, reward, world.vocab_size)
            completion_terms["reward"] = value.gather(1, selected.step)
        elif selected.completion is not None:
            flat = world.reward(selected.completion.flatten(0, 1))
            completion_terms["reward"] = flat.view(selected.step.shape)
        fields = {**selected.fields(), "completion": None}
        scored = Scored(**fields, reward=reward, terms={}, completion_terms=completion_terms)
        rng = EnumeratingRng(torch.zeros(len(reward), dtype=torch.long))
        self.items = algorithm.annotate(self.models, scored, rng)
        assert rng.n_outcomes == 1, "what annotate draws is not enumerated here"
        self.forwards = (self._rows() - rows) / len(reward)

    def _names(self, item: Int[Tensor, " N"], credited: Credited) -> Int[Tensor, "N K"]:
        name = self.path[item][:, None] * self.world.steps + credited.step
        for values in (credited.advantage, *credited.notes.values()):
            distinct, number = values.unique(return_inverse=True)
            name = name * len(distinct) + number
        return name

    def _action_gradients(self, actions: Actions) -> tuple[Float[Tensor, "N D"], float]:
        n_actions, rows = len(actions.step), self._rows()
        self.new.uses.clear()
        rng = EnumeratingRng(torch.zeros(n_actions, dtype=torch.long))
        loss = self.algorithm.loss(self.models, actions, rng).loss
        assert rng.n_outcomes == 1, "a loss that draws has to be enumerated, which is not done here"
        ((state, logits),) = self.new.uses  # one network row per action
        (part,) = torch.autograd.grad(loss.sum(), [logits])
        slope = jacobian(self.world)
        gradient = slope.new_zeros(n_actions, slope.shape[-1])
        for s in state.unique():
            gradient[state == s] = -part[state == s].flatten(1) @ slope[s].flatten(0, 1)
        return gradient, (self._rows() - rows) / n_actions

    def _rows(self) -> int:
        return self.new.rows + self.ref.rows


def expectation(
    algorithm: Algorithm, world: World, decoder: Decoder, *, exact_values: bool = False
) -> Estimate:
    """Mean and variance of an algorithm's estimator over all groups of two and all selections.

    Args:
        algorithm: whose estimator is enumerated.
        world: where.
        decoder: how paths are sampled.
        exact_values: put the exact value of each state in the place of its completion's reward.
    """
    return Groups(algorithm, world, decoder, exact_values=exact_values).estimate()
