"""`rescore verify` in continuous time: worlds of exact scores, and the sampler that really runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from torch import nn

from rescore.algorithms.reinforce import Reinforce
from rescore.algorithms.sepo import Mode, Sepo
from rescore.models.critics import Critic, ScalarCritic
from rescore.objectives.score_entropy import ball_log_policy, conditional_log_policy
from rescore.processes.convert import log_probs_from_score
from rescore.proof.cases import (
    ENERGIES,
    ONE_POSITION,
    PLAIN_SEPO,
    SAMPLERS,
    TWO_POSITIONS,
    ScoreCase,
    reinforce,
    sepo,
)
from rescore.proof.score_oracle import ScoreGroups, enumerate_draws, exact_gradient, expectation
from rescore.proof.score_worlds import EnergyWorld, ScoreWorld
from rescore.proof.verify import check
from rescore.proof.worlds import POLICY_SEED, REFERENCE_SEED
from rescore.sampling.policy import Models
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.types import Credited, Scored, Terms

ONE = EnergyWorld(process="uniform", vocab_size=5, length=1)
TWO = EnergyWorld(process="uniform", vocab_size=3, length=2)
MASKED = replace(TWO, process="absorbing")
MASKED_SAMPLER = replace(TWO_POSITIONS, process="absorbing")
CLAIMS = [*sepo(), *(case for case in reinforce() if isinstance(case, ScoreCase))]
CONDITIONAL = replace(PLAIN_SEPO, mode="conditional")
ELBO = replace(PLAIN_SEPO, mode="elbo", masks=2)


def sepo_claims() -> Iterator[tuple[ScoreCase, Sepo]]:
    for case in sepo():
        assert isinstance(case.algorithm, Sepo)
        yield case, case.algorithm


# The claims ---------------------------------------------------------------------------------------


def test_every_mode_is_exact_where_that_is_claimed():
    """In every world, with the plain options; ``test_verify`` has the options and the figures."""
    rows = [
        check(case, {})
        for case in CLAIMS
        if case.factor == 1
        and not any(word in case.option for word in ("coefficient", "baseline=none", "critic"))
    ]
    assert [row for row in rows if not row.ok] == []
    assert len({row.world for row in rows}) == len([*ENERGIES, *SAMPLERS]) - 4


def test_no_mode_is_called_unbiased_on_exact_scores_alone():
    """Every mode has rows in both worlds, and none is claimed for the sampler that really runs."""
    kinds = {mode: set() for mode in get_args(Mode)}
    for case, algorithm in sepo_claims():
        if algorithm.mode is not None:
            kinds[algorithm.mode].add(case.world.kind)
        assert case.world.kind == "energy" or case.factor is None
    assert all(kind == {"energy", "sampler"} for kind in kinds.values())


def test_what_is_exact_where_the_scores_are():
    """``joint``: one position; ``conditional``: also independent ones; the bound: everywhere."""
    exact = {}
    for case, algorithm in sepo_claims():
        if isinstance(case.world, EnergyWorld) and not algorithm.normalise_std:
            where = (case.world.length == 1, case.world.network == "factorised")
            exact.setdefault((algorithm.mode, *where), set()).add(case.factor is not None)
    assert exact[("joint", True, False)] == exact[("conditional", True, False)] == {True}
    assert exact[("joint", False, False)] == exact[("joint", False, True)] == {False}
    assert exact[("conditional", False, True)] == {True}
    assert exact[("conditional", False, False)] == {False}
    assert all(value == {True} for key, value in exact.items() if key[0] == "elbo")


def test_conditional_is_the_pseudo_likelihood_whatever_the_process():
    """One law, asked by uniform and by masked scores: the same expected gradient."""
    uniform = expectation(CONDITIONAL, TWO).mean
    for masks in (1, 2, 4):
        singly = replace(PLAIN_SEPO, mode="pseudo_likelihood", masks=masks)
        torch.testing.assert_close(expectation(singly, MASKED).mean, uniform)


# The estimator against formulas -------------------------------------------------------------------


def elbo(policy, x):
    """The bound by its definition: sizes 1 ... L evenly, sets of a size evenly, L / size each."""
    network, mask_id = policy.network, policy.network.process.mask_id
    length, total = x.shape[1], 0.0
    for size in range(1, length + 1):
        for hidden in itertools.combinations(range(length), size):
            canvas = x.index_fill(1, torch.tensor(hidden), mask_id)
            level = -math.log1p(-min(size / length, 1 - 1e-3))
            noise = torch.full((len(x),), level, dtype=torch.float32)
            log_p = log_probs_from_score(network.log_score(canvas, noise), mask_id)
            of_x = log_p.gather(-1, x[..., None]).squeeze(-1)[:, list(hidden)].sum(1)
            total = total + of_x / (size * math.comb(length, size))
    return total


def scores(policy, x):
    return policy.network.log_score(x, torch.full((len(x),), policy.decoder.moves()[-1][1]))


STANDS_FOR = {
    "conditional": lambda policy, x: conditional_log_policy(scores(policy, x), x).sum(1),
    "ball": lambda policy, x: ball_log_policy(scores(policy, x), x),
    "elbo": elbo,
}


@pytest.mark.parametrize("world", [*SAMPLERS, TWO, MASKED], ids=lambda w: f"{w.kind} {w}")
def test_the_expected_step_is_reinforce_on_what_stands_for_log_pi(world):
    """Leave-one-out: sum_x p(x) (r(x) - E[r]) grad log-pi-hat(x), p being the sampler's law."""
    policy, parameters = world.policy(POLICY_SEED)
    drawn = enumerate_draws(policy, world, Record())
    p, x = drawn.probability.detach(), drawn.trajectory.x_0
    reward = world.reward(x)
    for mode in ("conditional", "ball") if world.process == "uniform" else ("elbo",):
        log_pi = STANDS_FOR[mode](policy, x)
        parts = torch.autograd.grad((p * (reward - p @ reward) * log_pi).sum(), parameters)
        by_hand = torch.cat([part.flatten() for part in parts])
        found = expectation(replace(PLAIN_SEPO, mode=mode, masks=2), world).mean
        torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("kl_steps", [1, 2])
@pytest.mark.parametrize("world", [TWO_POSITIONS, MASKED_SAMPLER], ids=str)
def test_the_kl_of_the_kept_steps_is_that_of_the_paths_in_the_mean(world, kl_steps):
    """E over paths and kept steps of the estimate = sum over paths of p log(p / p_ref)."""
    policy, reference = world.policy(POLICY_SEED)[0], world.policy(REFERENCE_SEED)[0]
    ours, theirs = (enumerate_draws(each, world, Record()) for each in (policy, reference))
    exact = (ours.probability * (ours.probability / theirs.probability).log()).sum()
    algorithm = replace(PLAIN_SEPO, beta=1.0, kl_steps=kl_steps, masks=2)
    groups = ScoreGroups(algorithm, world)
    reward = torch.zeros_like(groups.items.reward)  # no advantage: the loss is the KL alone
    credited = algorithm.credit(replace(groups.items, reward=reward, trajectory=_pairs(groups)))
    actions = credited.actions(credited.pairs())
    terms = algorithm.loss(groups.models, actions, SampleRng(0, torch.arange(1)))
    torch.testing.assert_close(groups.probability @ terms.loss, exact)


def _pairs(groups: ScoreGroups):
    trajectory = groups.items.trajectory
    group = torch.zeros(len(groups.probability), dtype=torch.long)
    return replace(trajectory, prompts=replace(trajectory.prompts, group=group))


# A baseline may know the prompt, not the sample ---------------------------------------------------


class KnowsTheSample(Sepo):
    """A critic that predicts the reward of the very sample it is subtracted from."""

    share = 1.0

    def annotate(self, models, scored: Scored, rng) -> Scored:
        noted = super().annotate(models, scored, rng)
        value = self.share * scored.reward[:, None]
        return replace(noted, notes={**noted.notes, "value": value})


class HalfKnowsTheSample(KnowsTheSample):
    share = 0.5


@dataclass(frozen=True, kw_only=True)
class OtherCritic(EnergyWorld):
    level: float

    def critic(self) -> Critic:
        critic = ScalarCritic()
        nn.init.constant_(critic.level, self.level)
        critic.fitted.fill_(True)
        return critic


@pytest.mark.parametrize("level", [-2.0, 0.0, 0.5, 7.0])
@pytest.mark.parametrize("process", ["uniform", "absorbing"])
def test_whatever_a_critic_says_of_the_prompt_changes_no_expectation(process, level):
    """V(c): E[grad log pi(x | c)] V(c) = 0; it changes the variance."""
    world = OtherCritic(process=process, vocab_size=5, length=1, level=level)
    mode = "conditional" if process == "uniform" else "elbo"
    algorithm = replace(PLAIN_SEPO, mode=mode, baseline="critic", masks=2)
    estimate, exact = expectation(algorithm, world), exact_gradient(world)
    torch.testing.assert_close(estimate.mean, exact)
    other = expectation(algorithm, replace(world, level=level + 1))
    assert abs(other.variance - estimate.variance) > 1e-3 * estimate.variance


def test_a_critic_that_sees_the_sample_takes_the_gradient_away():
    """V(x) = R(x) leaves nothing, however well it predicts; half of it leaves half."""
    settings = {"mode": "conditional", "baseline": "critic", "normalise_std": False}
    exact = exact_gradient(ONE)
    assert exact.norm() > 0.01
    nothing = expectation(KnowsTheSample(**settings), ONE)
    assert not nothing.mean.any() and nothing.variance == 0
    half = expectation(HalfKnowsTheSample(**settings), ONE)
    torch.testing.assert_close(half.mean, exact / 2)


# Broken on purpose --------------------------------------------------------------------------------


class WrongSign(Sepo):
    def loss(self, models, actions, rng) -> Terms:
        terms = super().loss(models, actions, rng)
        return replace(terms, loss=-terms.loss)


class ScalesWithPositions(Sepo):
    def credit(self, scored: Scored) -> Credited:
        credited = super().credit(scored)
        return replace(credited, weight=credited.weight / scored.trajectory.x_0.shape[1])


class OneFixedSet(Sepo):
    def annotate(self, models, scored: Scored, rng) -> Scored:
        noted = super().annotate(models, scored, rng)
        everything = torch.ones_like(noted.notes["hidden"])
        return replace(noted, notes={**noted.notes, "hidden": everything})


class ForgetsTheLastMove(Reinforce):
    def credit(self, scored: Scored) -> Credited:
        credited = super().credit(scored)
        last = credited.step == scored.trajectory.n_steps - 1
        return replace(credited, weight=credited.weight.masked_fill(last, 0.0))


@pytest.mark.parametrize(
    ("algorithm", "world", "factor"),
    [
        (WrongSign(mode="conditional", baseline="leave_one_out", normalise_std=False), ONE, 1.0),
        (ScalesWithPositions(masks=2, baseline="leave_one_out", normalise_std=False), MASKED, 1.0),
        (OneFixedSet(masks=2, baseline="leave_one_out", normalise_std=False), MASKED, 1.0),
        (ForgetsTheLastMove(), TWO_POSITIONS, 1.0),
        (ForgetsTheLastMove(), MASKED_SAMPLER, 1.0),
        (replace(CONDITIONAL, baseline="group_mean"), ONE, 1.0),
        (replace(CONDITIONAL, normalise_std=True), ONE, 1.0),
        (CONDITIONAL, TWO, 1.0),
        (CONDITIONAL, ONE_POSITION, 1.0),
        (ELBO, MASKED_SAMPLER, 1.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, (Sepo, Reinforce)) else str(value),
)
def test_a_broken_algorithm_or_a_false_claim_is_not_ok(algorithm, world, factor):
    """Each of these looks like policy gradient and is not what it is claimed to be."""
    row = check(ScoreCase(algorithm=algorithm, world=world, factor=factor), {})
    assert not row.ok
    assert row.bias > 0.1


# The machinery ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [*ENERGIES, *SAMPLERS], ids=lambda w: f"{w.kind} {w}")
def test_probabilities_sum_to_one_and_their_gradients_to_nothing(world):
    """The enumerated outcomes are all there are."""
    policy, parameters = world.policy(POLICY_SEED)
    draws = enumerate_draws(policy, world, Record())
    total = draws.probability.sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))
    parts = torch.autograd.grad(total, parameters)
    assert max(float(part.abs().max()) for part in parts) < 1e-14
    assert float(world.reward(draws.trajectory.x_0).std()) > 0.1


@pytest.mark.parametrize("world", ENERGIES, ids=str)
def test_the_scores_of_an_energy_world_are_exact(world):
    """Ratios of neighbours for uniform noise; conditionals of the law under masks."""
    policy, _ = world.policy(POLICY_SEED)
    energy, states, V = policy.network.network, world.states, world.vocab_size
    law = energy.log_likelihood(states).exp().detach()
    torch.testing.assert_close(law.sum(), torch.ones((), dtype=torch.float64))
    noise = torch.full((1,), 0.7)
    if world.process == "uniform":
        log_score = energy.log_score(states, noise.expand(len(states)))
        for n, position, v in itertools.product(range(len(states)), range(world.length), range(V)):
            y = states[n].clone()
            y[position] = v
            m = int((states == y).all(1).nonzero())
            expected = (law[m] / law[n]).log()
            torch.testing.assert_close(log_score[n, position, v], expected)
        return
    for hidden in itertools.product([False, True], repeat=world.length):
        hide = torch.tensor(hidden)
        canvas = states.masked_fill(hide, V)
        log_p = log_probs_from_score(energy.log_score(canvas, noise.expand(len(canvas))), V)
        for n, position in itertools.product(range(len(states)), range(world.length)):
            if not hidden[position]:
                continue
            agrees = (states[:, ~hide] == states[n, ~hide]).all(1)
            here = [law[agrees & (states[:, position] == v)].sum() for v in range(V)]
            expected = torch.stack(here) / law[agrees].sum()
            torch.testing.assert_close(log_p[n, position, :V].exp(), expected)


@pytest.mark.parametrize(
    "world", [TWO, replace(TWO_POSITIONS, corrector_steps=1), MASKED_SAMPLER], ids=str
)
def test_the_enumeration_is_of_the_sampler_that_trains(world: ScoreWorld):
    """Samples drawn by SampleRng come as often as they are probable."""
    policy, n = world.policy(POLICY_SEED)[0], 20_000
    outcomes = enumerate_draws(policy, world, Record())
    rng = SampleRng(seed=5, sample_id=torch.arange(n))
    drawn = policy.sample(world.prompts(n), Record(), rng)
    place = world.vocab_size ** torch.arange(world.length)
    names, known = (t.x_0 @ place for t in (drawn, outcomes.trajectory))
    size = world.vocab_size**world.length
    p = torch.zeros(size, dtype=torch.float64)
    p.index_add_(0, known, outcomes.probability.detach())
    chi_square = ((names.bincount(minlength=size) - n * p) ** 2 / (n * p)).sum()
    assert abs(chi_square - (size - 1)) < 4 * (2 * (size - 1)) ** 0.5


@pytest.mark.parametrize(
    ("algorithm", "world"),
    [
        (Reinforce(), replace(TWO_POSITIONS, corrector_steps=1)),
        (Sepo(mode="conditional"), TWO),
        (replace(PLAIN_SEPO, mode="joint", snis_draws=2), TWO),
        (ELBO, MASKED),
        (replace(ELBO, beta=0.5, kl_steps=1), MASKED_SAMPLER),
        (replace(PLAIN_SEPO, beta=0.5, kl_steps=2), TWO_POSITIONS),
    ],
    ids=lambda value: str(value) if isinstance(value, ScoreWorld) else type(value).__name__,
)
def test_a_group_gives_in_the_crowd_what_it_gives_alone(algorithm, world):
    """One batch of all groups, equal actions merged, all gradients at once: nothing changes.

    The comparison runs the pipeline as a trainer would, on two samples.
    """
    groups = ScoreGroups(algorithm, world)
    n_items = len(groups.probability)
    torch.testing.assert_close(groups.probability.sum(), torch.ones((), dtype=torch.float64))
    members = torch.randint(n_items, (200, 2), generator=torch.Generator().manual_seed(0))
    together, forwards = groups.gradients(members)
    new, parameters = world.policy(POLICY_SEED)
    models = Models(new=new, ref=world.policy(REFERENCE_SEED)[0])
    for i in (0, 17, 101, 199):
        alone, cost = groups.gradients(members[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])
        assert cost[0] == forwards[i]
        batch = groups.items.take(members[i])
        prompts = replace(batch.trajectory.prompts, group=torch.zeros(2, dtype=torch.long))
        batch = replace(batch, trajectory=replace(batch.trajectory, prompts=prompts))
        actions = algorithm.credit(batch)
        actions = actions.actions(actions.pairs())
        terms = algorithm.loss(models, actions, SampleRng(0, torch.arange(1)))
        total = (terms.loss * actions.weight).sum()
        parts = torch.autograd.grad(total, parameters)
        torch.testing.assert_close(-torch.cat([p.flatten() for p in parts]), together[i])


def test_forwards_count_old_policy_updates_and_reference():
    """One row for the old policy and one per update, times the masks; two per step of the KL."""

    def forwards(algorithm, world):
        return check(ScoreCase(algorithm=algorithm, world=world, factor=None), {}).forwards

    unlucky = enumerate_draws(TWO.policy(POLICY_SEED)[0], TWO, Record()).probability
    differ = 1 - float(unlucky.detach().square().sum())
    assert forwards(replace(CONDITIONAL, baseline="critic"), TWO) == pytest.approx(2)
    assert forwards(CONDITIONAL, TWO) == pytest.approx(1 + differ)
    assert forwards(ELBO, MASKED) == pytest.approx(2 + 2 * differ)
    snis = replace(PLAIN_SEPO, mode="joint", snis_draws=2)
    assert forwards(snis, TWO) == pytest.approx(1 + 3 + 3 * differ)
    kl = replace(CONDITIONAL, beta=0.5, kl_steps=2)
    assert forwards(kl, TWO_POSITIONS) == pytest.approx(1 + 1 + 2 * (1 + 1))
    assert forwards(Reinforce(baseline="none"), replace(TWO_POSITIONS, steps=3)) == pytest.approx(3)


def test_a_score_case_says_what_was_checked():
    """Settings that differ from the defaults, the kind of world, and its shape."""
    case = ScoreCase(algorithm=CONDITIONAL, world=TWO, factor=None)
    words = "mode=conditional baseline=leave_one_out normalise_std=False world=energy"
    assert case.option == words and str(case.world) == "V3L2 uniform mlp"
    corrected = replace(MASKED_SAMPLER, corrector_steps=1, predictor="euler")
    assert str(corrected) == "V2L2 absorbing 2+1 euler"
    assert corrected.decoder.n_moves == 3 and corrected.decoder.predictor == "euler"
