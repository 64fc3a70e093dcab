"""`rescore verify` for Gaussian noise: quadrature through the code that trains."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.algorithms.reinforce import Reinforce
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.processes.convert import convert_prediction
from rescore.processes.gaussian import HeunStep, Step
from rescore.proof import gaussian_oracle
from rescore.proof.cases import (
    CASES,
    DDIM,
    ONE_STATE,
    QUIET,
    TWO_DDIM,
    TWO_FLOW,
    TWO_STATES,
    WITHOUT_NOISE,
    GaussianCase,
)
from rescore.proof.gaussian_oracle import (
    GaussianGroups,
    QuadratureRng,
    enumerate_draws,
    exact_gradient,
    expectation,
    nodes,
)
from rescore.proof.gaussian_worlds import (
    CURVATURE,
    GOAL,
    POLICY,
    REFERENCE,
    GaussianWorld,
    GivenValue,
)
from rescore.proof.verify import check, expected_figures
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record
from rescore.sampling.reference import kl_at
from rescore.sampling.rng import SampleRng, Stream
from rescore.types import Credited, Scored, Terms

CLAIMS = [case for claims in CASES.values() for case in claims() if isinstance(case, GaussianCase)]
TWO_M = TWO_STATES[-1]


# The claims ---------------------------------------------------------------------------------------


def test_every_algorithm_is_as_claimed_in_every_world():
    """One row of each; ``test_verify`` has each option, in one world."""
    quick = {
        (case.name, str(case.world), case.claimed): case
        for case in CLAIMS
        if case.group_size == 1 or (case.world.steps == 2 and not of_batch(case))
    }
    expected = expected_figures()
    rows = [check(case, expected) for case in quick.values()]
    assert [row for row in rows if not row.ok] == []
    assert len({row.world for row in rows}) == len(
        {*ONE_STATE, *TWO_STATES, *QUIET, *WITHOUT_NOISE}
    )
    assert {row.algorithm for row in rows} == {
        "reinforce", "score_as_action", "dpok", "ddpo", "flow_grpo",
    }  # fmt: skip


def of_batch(case: GaussianCase) -> bool:
    """Whether groups must be credited one by one, which takes long."""
    return "batch" in case.option or "whitening" in case.option


def test_drawing_steps_changes_no_expectation():
    """Whatever the standard deviation does to DDPO, n of T steps do nothing to it."""
    every, one = (expectation(Ddpo(n_steps=n), TWO_DDIM) for n in (None, 1))
    torch.testing.assert_close(one.mean, every.mean)
    assert one.variance > every.variance
    assert one.forwards == pytest.approx(every.forwards / 2)


# Objectives by recursion of moments ---------------------------------------------------------------


def vector(*values: Tensor | float) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])


def objective(world: GaussianWorld, beta: float, kl: str) -> tuple[Tensor, Tensor]:
    """E[r] - beta KL, by mean and covariance of y = (x_k, x_{k-1}); and the parameters it is of.

    What the network says is c x + d; in y, a step is x_{k+1} = move . y + shift + std z, and its
    mean is apart . y + away from the reference's.
    """
    policy, parameters = world.policy(POLICY)
    reference, _ = world.policy(REFERENCE)
    m, C = vector(0, 0), torch.diag(vector(1, 0))
    kl_so_far, before = vector(0)[0], None
    for k in range(world.steps):
        t, s, step = policy.times[k], policy.times[k + 1], steps_of(policy).take(slice(k, k + 1))
        (d, c), (d_ref, c_ref) = (
            network.predict(vector(0, 1)[:, None], t.expand(2), {})[:, 0].diff(prepend=vector(0))
            for network in (policy.network, reference.network)
        )
        now = (c, d, c - c_ref, d - d_ref)
        before = now if before is None else before
        on_x, on_a, on_x_before, on_a_before, std = coefficients_of(step)
        move = vector(on_x + on_a * now[0], on_x_before + on_a_before * before[0])
        apart = vector(on_a * now[2], on_a_before * before[2])
        away = on_a * now[3] + on_a_before * before[3]
        if kl == "step" and std > 0:
            kl_so_far = kl_so_far + ((apart @ m + away) ** 2 + apart @ C @ apart) / (2 * std**2)
        if kl == "continuous":
            share = ((1 + world.eta**2) / (2 * world.eta)) ** 2 / 2
            share = share * world.schedule.g2_integral(s, t) / world.schedule.sigma(t) ** 2
            square = (now[2] * m[0] + now[3]) ** 2 + now[2] ** 2 * C[0, 0]
            kl_so_far = kl_so_far + share * square
        gain = torch.stack([move, vector(1, 0)])
        m = gain @ m + vector(on_a * now[1] + on_a_before * before[1], 0)
        C = gain @ C @ gain.T + torch.diag(vector(std**2, 0))
        before = now
    return -CURVATURE * ((m[0] - GOAL) ** 2 + C[0, 0]) - beta * kl_so_far, parameters


def steps_of(policy: GaussianPolicy) -> Step:
    assert not isinstance(policy.steps, HeunStep)
    return policy.steps


def coefficients_of(step: Step) -> tuple[float, ...]:
    """A, B, A', B', S; those that there are not are 0."""
    names = ("on_x", "on_a", "on_x_before", "on_a_before", "std")
    return tuple(float(getattr(step, name, 0.0)) for name in names)


@pytest.mark.parametrize(
    ("world", "beta", "kl"),
    [
        *((world, 0.0, "step") for world in (*ONE_STATE, *TWO_STATES, *QUIET, *WITHOUT_NOISE)),
        *((world, 0.5, "step") for world in (DDIM, ONE_STATE[1], TWO_FLOW, *TWO_STATES, *QUIET)),
        *((world, 0.5, "continuous") for world in (DDIM, ONE_STATE[0], ONE_STATE[2])),
    ],
    ids=str,
)
def test_exact_gradients_are_those_of_the_moments(world, beta, kl):
    """Quadrature through the sampler = recursion of two moments, to 1e-10."""
    value, parameters = objective(world, beta, kl)
    (by_moments,) = torch.autograd.grad(value, parameters)
    found = exact_gradient(world, beta, kl)
    assert float((found - by_moments).norm() / by_moments.norm()) < 1e-10


@pytest.mark.parametrize(
    ("world", "beta", "kl", "design"),
    [
        (DDIM, 0.0, "step", "plain"),
        (DDIM, 0.5, "step", "cos_sin"),
        (DDIM, 0.5, "continuous", "linear"),
        (TWO_FLOW, 0.5, "step", "constant"),
        (QUIET[0], 0.5, "step", "plain"),
        (WITHOUT_NOISE[2], 0.5, "continuous", "plain"),
        (TWO_M, 0.5, "step", "cos_sin"),
        (TWO_M, 0.5, "continuous", "plain"),
    ],
    ids=str,
)
def test_the_critic_knows_the_objective(world, beta, kl, design):
    """V at the start is J in the mean; what it says does not hang on ``skip`` being right."""
    critic = world.critic(beta, kl, design=design)
    z, weight = nodes()
    x, t = z[:, None], torch.ones(len(z)).double()
    skip = None
    if design != "plain":
        output = world.policy(POLICY)[0].network.predict(x, t, {})
        levels = (world.schedule.alpha(t), world.schedule.sigma(t))
        hat = convert_prediction(output, x, *levels, source=world.prediction, target="x_0")
        skip = world.reward(hat)
    with torch.no_grad():
        value = weight @ critic.value(x, t, {}, skip)
    torch.testing.assert_close(value, objective(world, beta, kl)[0].detach())
    wrong = weight @ world.critic(beta, kl, wrong=True).value(x, t, {}, None)
    assert abs(float(wrong - value)) > 0.01


def test_a_value_of_one_state_is_wrong_where_there_are_two():
    """2M's chain goes on from x_k and x_{k-1}: with the latter held at 0, V is another."""
    table = TWO_M.values(0.5, "step")
    assert float(table[1:-1, :, 2].abs().max()) > 0.01
    assert float(table[[0, -1], :, 2].abs().max()) == 0  # none before the first, none asked after

    class OfOneState(GivenValue):
        def value(self, x_t, t, inputs, skip):
            return super().value(x_t[:, :1], t, inputs, skip)

    critic = OfOneState(TWO_M, table, "cos_sin")
    exact = exact_gradient(TWO_M, 0.5, "step")
    for algorithm in (
        ScoreAsAction(form="ppo", beta=0.5),
        ScoreAsAction(form="score_gradient", beta=0.5),
    ):
        found = expectation(algorithm, TWO_M, critic=critic, group_size=1)
        assert float((found.mean - exact).norm() / exact.norm()) > 0.01


# Broken on purpose --------------------------------------------------------------------------------


class WrongSign(ScoreAsAction):
    def loss(self, models, actions, rng) -> Terms:
        terms = super().loss(models, actions, rng)
        return replace(terms, loss=-terms.loss)


class NoDirectKl(ScoreAsAction):
    """The gradient of the running cost at the mean action is left out."""

    def loss(self, models, actions, rng) -> Terms:
        with_kl = super().loss(models, actions, rng)
        return replace(with_kl, loss=with_kl.loss - self.beta * self._of(models, actions))

    def _of(self, models, actions) -> Tensor:
        policy = models.new
        at = policy.at(actions.trajectory, actions.step)
        return kl_at(policy, at, actions.notes["ref"], None, self.kl)


class CountsEveryDrawOnce(ScoreAsAction):
    def credit(self, scored) -> Credited:
        return super().credit(replace(scored, step_weight=torch.ones_like(scored.step_weight)))


class HalfTheSlope(ScoreAsAction):
    def annotate(self, models, scored, rng) -> Scored:
        noted = super().annotate(models, scored, rng)
        return replace(noted, notes={**noted.notes, "slope": noted.notes["slope"] / 2})


class ForgetsTheLastStep(Reinforce):
    def credit(self, scored) -> Credited:
        credited = super().credit(scored)
        last = credited.step == scored.trajectory.n_steps - 1
        return replace(credited, weight=credited.weight.masked_fill(last, 0.0))


class KnowsTheEnd(Dpok):
    """A baseline that has seen the reward."""

    def annotate(self, models, scored, rng) -> Scored:
        noted = super().annotate(models, scored, rng)
        value = noted.notes["value"] / 2 + scored.reward[:, None] / 2
        return replace(noted, notes={**noted.notes, "value": value})


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (WrongSign(beta=0.5), {}),
        (WrongSign(beta=0.5, form="score_gradient"), {}),
        (NoDirectKl(beta=0.5), {}),
        (NoDirectKl(beta=0.5, form="score_gradient"), {}),
        (CountsEveryDrawOnce(beta=0.5, n_steps=1), {}),
        (CountsEveryDrawOnce(beta=0.5, n_steps=1, form="score_gradient"), {}),
        (HalfTheSlope(beta=0.5, form="score_gradient"), {}),
        (ScoreAsAction(beta=0.5, kl="continuous"), {"kl": "step"}),
        (ScoreAsAction(beta=0.5), {"beta": 0.25}),
        (ScoreAsAction(beta=0.5, form="score_gradient"), {"beta": 0.25}),
        (ScoreAsAction(beta=0.5), {"value": "wrong"}),
        (ScoreAsAction(beta=0.5, form="score_gradient"), {"value": "wrong"}),
        (ScoreAsAction(beta=0.0), {"world": QUIET[1]}),
        (ForgetsTheLastStep(), {"value": None}),
        (Reinforce(), {"value": None, "factor": 0.5}),
        (Reinforce(), {"value": None, "world": QUIET[0]}),
        (Reinforce(baseline="group_mean"), {"value": None}),
        (KnowsTheEnd(beta=0.0), {}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else str(value),
)
def test_a_broken_algorithm_or_a_false_claim_is_not_ok(algorithm, changes):
    """Each of these looks like policy gradient and is not what it is claimed to be."""
    beta = algorithm.beta
    kl = algorithm.kl if isinstance(algorithm, ScoreAsAction) else "step"
    group_size = 2 if isinstance(algorithm, Reinforce) else 1
    world = TWO_DDIM if isinstance(algorithm, Reinforce) else DDIM
    case = GaussianCase(
        algorithm=algorithm, world=world, beta=beta, kl=kl, value="exact", group_size=group_size,
        factor=1.0,
    )  # fmt: skip
    row = check(replace(case, **changes), {})
    assert not row.ok
    assert row.bias > 0.02


# The machinery ------------------------------------------------------------------------------------


def test_nodes_have_the_moments_of_normals():
    """Two normals to a row and one more call: all moments up to degree 7 of each."""
    rng = QuadratureRng(torch.arange(4**3))
    first = rng.normal(Stream.START, 0, torch.zeros(64, 2, dtype=torch.long))
    second = rng.normal(Stream.NOISE, 0, torch.zeros(64, 1, dtype=torch.long))
    z = torch.cat([first, second], 1)
    assert rng.n_outcomes == 64 and len(z.unique(dim=0)) == 64
    for powers in itertools.product(range(8), repeat=3):
        exact = math.prod(0 if power % 2 else math.prod(range(1, power, 2)) for power in powers)
        found = rng.probability @ z.pow(torch.tensor(powers)).prod(1)
        assert float(found) == pytest.approx(exact, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize(
    ("algorithm", "world", "value"),
    [
        (Reinforce(), TWO_M, None),
        (ScoreAsAction(beta=0.5), TWO_DDIM, "exact"),
        (ScoreAsAction(beta=0.5, form="score_gradient"), TWO_FLOW, "exact"),
        (Dpok(beta=0.5), TWO_DDIM, "exact"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_more_nodes_change_nothing(algorithm, world, value, monkeypatch):
    """Mean and variance are those of the normal law; of three nodes the variance is not."""
    group_size = 2 if value is None else 1
    beta = getattr(algorithm, "beta", 0.0)

    def estimate(n_nodes: int):
        monkeypatch.setattr(gaussian_oracle, "N_NODES", n_nodes)
        nodes.cache_clear()
        critic = None if value is None else world.critic(beta)
        return expectation(algorithm, world, critic=critic, group_size=group_size)

    three, four, five = (estimate(n_nodes) for n_nodes in (3, 4, 5))
    nodes.cache_clear()
    for other in (three, five):
        torch.testing.assert_close(four.mean, other.mean, rtol=1e-11, atol=1e-11)
    assert five.variance == pytest.approx(four.variance, rel=1e-11)
    if not (isinstance(algorithm, ScoreAsAction) and algorithm.form == "score_gradient"):
        assert abs(three.variance - four.variance) > 1e-4 * four.variance


@pytest.mark.parametrize(
    ("algorithm", "world"),
    [
        (Reinforce(beta=0.5), TWO_DDIM),
        (Ddpo(beta=0.1), TWO_M),
        (Ddpo(statistics="batch"), TWO_DDIM),
        (FlowGrpo(std="batch"), TWO_FLOW),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_group_gives_in_the_crowd_what_it_gives_alone(algorithm, world):
    """The gradient of its loss in a batch of its own, without any of the machinery."""
    groups = GaussianGroups(algorithm, world, None, 2)
    members = torch.tensor([[0, 5], [17, 40], [3, 3], [63, 9]])
    together, forwards = groups.gradients(members)
    for i, pair in enumerate(members):
        items = groups.items.take(pair)
        prompts = replace(items.trajectory.prompts, group=torch.zeros(2, dtype=torch.long))
        items = replace(items, trajectory=replace(items.trajectory, prompts=prompts))
        credited = algorithm.credit(items)
        actions = credited.actions(credited.pairs())
        if not len(actions.step):
            assert not together[i].any() and forwards[i] == groups.forwards
            continue
        terms = algorithm.loss(groups.models, actions, SampleRng(0, torch.arange(1)))
        total = (terms.loss * actions.weight).sum()
        (plain,) = torch.autograd.grad(total, groups.parameters)
        torch.testing.assert_close(-plain, together[i])


def test_statistics_of_the_batch_are_those_of_one_group():
    """Of a batch of one group they are the group's, whoever else is enumerated with it."""
    of_group, of_batch = (
        expectation(Ddpo(statistics=statistics), GaussianWorld(steps=1))
        for statistics in ("group", "batch")
    )
    torch.testing.assert_close(of_group.mean, of_batch.mean)
    assert of_group.variance == pytest.approx(of_batch.variance)


@pytest.mark.parametrize("world", [TWO_DDIM, TWO_M, TWO_FLOW], ids=str)
def test_the_quadrature_is_of_the_sampler_that_trains(world):
    """Rewards of samples drawn by SampleRng have the same mean."""
    policy, _ = world.policy(POLICY)
    draws = enumerate_draws(policy, world, Record())
    exact = float((draws.probability @ world.reward(draws.trajectory.x_0)).detach())
    n = 20_000
    drawn = policy.sample(world.prompts(n), Record(), SampleRng(5, torch.arange(n)))
    reward = world.reward(drawn.x_0)
    assert abs(float(reward.mean()) - exact) < 4 * float(reward.std()) / n**0.5


@pytest.mark.parametrize(
    ("algorithm", "world", "value", "forwards"),
    [
        (Reinforce(baseline="none"), DDIM, None, 3),
        (Reinforce(baseline="none"), TWO_M, None, 4),
        (Reinforce(baseline="none", beta=0.5), DDIM, None, 6),
        (Dpok(beta=0.5), DDIM, "exact", 6),
        (ScoreAsAction(n_steps=1, design="plain"), DDIM, "exact", 4),
        (ScoreAsAction(beta=0.0, form="score_gradient"), DDIM, "exact", 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_network_rows_are_counted(algorithm, world, value, forwards):
    """One for each step, two of two-step solvers; the reference's; those hat x_0 goes through."""
    critic = None
    if value is not None:
        critic = world.critic(design=getattr(algorithm, "design", "plain"))
    estimate = expectation(algorithm, world, critic=critic, group_size=1)
    assert estimate.forwards == pytest.approx(forwards)


class CountsCredits(Reinforce):
    """How often it was asked to credit a batch."""

    asked: ClassVar[int] = 0

    def credit(self, scored) -> Credited:
        type(self).asked += 1
        return super().credit(scored)


def test_groups_are_credited_together_unless_that_changes_something():
    """One by one would take minutes."""
    expectation(CountsCredits(), TWO_DDIM)
    assert CountsCredits.asked < 20
