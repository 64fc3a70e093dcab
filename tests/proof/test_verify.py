"""The oracle behind `rescore verify`: it proves what is true and refuses what is not."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from rescore.algorithms import algorithms
from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.proof import cases as claims
from rescore.proof.cases import CASES, Case, Claim, exact_score
from rescore.proof.oracle import EnumeratingRng, Groups, enumerate_paths
from rescore.proof.verify import check, expected_figures, print_rows, verify
from rescore.proof.worlds import POLICY_SEED, REFERENCE_SEED, Tabled, World
from rescore.sampling.discrete import sample_masked
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng, Stream
from rescore.types import Credited, Scored, Selected, Trajectory

SMALL = World(3, 3, 2, 1, "mlp")
ALL_CASES = [case for algorithm in CASES.values() for case in algorithm()]


def test_every_algorithm_has_claims_and_every_biased_one_a_figure():
    """Nothing is left out of the table, and no figure outlives its row."""
    assert sorted(algorithms()) == sorted(CASES)
    rows = [(f"{c.name}|{c.option}|{c.world}", c.claimed) for c in ALL_CASES]
    assert len(set(rows)) == len(rows)
    assert {name for name, claimed in rows if claimed == "biased"} == set(expected_figures())


def test_every_option_is_as_claimed_on_its_smallest_world():
    """The quick part of the table: each option once."""
    expected = expected_figures()
    largest_first = sorted(ALL_CASES, key=_size, reverse=True)
    quick = {(case.name, case.option): case for case in largest_first}
    rows = [check(case, expected) for case in quick.values()]
    assert [row for row in rows if not row.ok] == []


def _size(case: Claim) -> int:
    world = case.world
    if isinstance(world, World):
        return world.vocab_size**world.length * world.steps
    return 0  # all of them are tiny


@pytest.mark.slow
def test_every_row_is_as_claimed():
    """The whole table of `rescore verify`."""
    rows = verify()
    assert [row for row in rows if not row.ok] == []
    assert len(rows) == len(ALL_CASES)
    assert all(row.bias > 1e-3 for row in rows if row.claimed == "biased")


class WrongSign(Reinforce):
    def credit(self, scored: Scored) -> Credited:
        credited = super().credit(scored)
        return replace(credited, advantage=-credited.advantage)


class MeanOverSteps(Reinforce):
    def credit(self, scored: Scored) -> Credited:
        credited = super().credit(scored)
        return replace(credited, weight=credited.weight / scored.step.shape[1])


class UnweightedDraws(Egspo):
    def select(self, models: Models, trajectory: Trajectory) -> Selected:
        selected = super().select(models, trajectory)
        return replace(selected, step_weight=torch.full_like(selected.step_weight, 2.0))


class ForgetsLastStep(Reinforce):
    def credit(self, scored: Scored) -> Credited:
        credited = super().credit(scored)
        last = credited.step == scored.trajectory.n_steps - 1
        return replace(credited, weight=credited.weight.masked_fill(last, 0.0))


@pytest.mark.parametrize(
    ("algorithm", "factor"),
    [
        (WrongSign(), 1.0),
        (MeanOverSteps(), 1.0),
        (ForgetsLastStep(), 1.0),
        (UnweightedDraws(n_steps=1, selection="importance", baseline="none", beta=0.0), 1.0),
        (Reinforce(baseline="group_mean"), 1.0),
        (Reinforce(), 0.5),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else f"{value:g}",
)
def test_a_broken_algorithm_or_a_false_claim_is_not_ok(algorithm, factor):
    """Each of these looks like policy gradient and is not what it is claimed to be."""
    row = check(Case(algorithm=algorithm, world=SMALL, temperature=0.7, factor=factor), {})
    assert not row.ok
    assert row.bias > 0.1


def test_a_broken_sampler_law_is_not_ok():
    """Scoring another order's steps, or at another temperature, is seen."""
    low = Case(algorithm=Reinforce(), world=SMALL, order="low_confidence", factor=1.0)
    assert not check(low, {}).ok
    exact = replace(low, algorithm=Reinforce(score=exact_score("low_confidence")))
    assert check(exact, {}).ok
    score = Score(score_temperature=1.0)
    assert not check(
        Case(algorithm=Reinforce(score=score), world=SMALL, temperature=0.7, factor=1.0), {}
    ).ok


def test_a_biased_row_is_ok_only_at_its_figure():
    """A bias that moves by more than 1e-6, or that nobody committed, is reported."""
    case = next(case for case in ALL_CASES if case.claimed == "biased" and case.world == SMALL)
    key, figure = check(case, {}).key, expected_figures()[check(case, {}).key]
    assert check(case, {key: figure}).ok
    assert not check(case, {key: figure + 1e-5}).ok
    assert not check(case, {}).ok


@pytest.mark.parametrize(
    "algorithm",
    [
        Reinforce(),
        Reinforce(baseline="group_mean"),
        Egspo(n_steps=2, selection="importance", baseline="none"),
        Egspo(n_steps=1, kl="exact", score=Score(form="tokens_and_selection")),
    ],
    ids=lambda a: type(a).__name__ + a.baseline,
)
def test_a_group_gives_in_the_crowd_what_it_gives_alone(algorithm):
    """One batch of all groups, equal actions merged, tables for networks: nothing changes.

    The comparison runs the pipeline as a trainer would, on two samples and the network itself.
    """
    world, decoder = SMALL, SMALL.decoder("random", 0.7)
    groups = Groups(algorithm, world, decoder, exact_values=False)
    n_items = len(groups.probability)
    members = torch.randint(n_items, (200, 2), generator=torch.Generator().manual_seed(0))
    together, forwards = groups.gradients(members)

    denoiser = world.denoiser(POLICY_SEED)
    ref = MaskedPolicy(world.denoiser(REFERENCE_SEED), decoder)
    models = Models(new=MaskedPolicy(denoiser, decoder), ref=ref)
    for i in (0, 17, 101, 199):
        alone, cost = groups.gradients(members[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])
        assert cost[0] == forwards[i]
        credited = algorithm.credit(_as_batch(groups.items.take(members[i])))
        actions = credited.actions(credited.pairs())
        terms = algorithm.loss(models, actions, SampleRng(0, torch.arange(1)))
        total = (terms.loss * actions.weight).sum()
        parts = torch.autograd.grad(total, list(denoiser.parameters()))
        plain = -torch.cat([part.flatten() for part in parts])
        torch.testing.assert_close(plain, together[i])


def test_a_group_of_equal_rewards_costs_and_gives_nothing():
    """Its advantages are 0, so no network row is spent on it."""
    groups = Groups(Reinforce(), SMALL, SMALL.decoder("random", 0.7), exact_values=False)
    gradient, forwards = groups.gradients(torch.tensor([[5, 5]]))
    assert not gradient.any()
    assert forwards.item() == 0


def _as_batch(scored: Scored) -> Scored:
    prompts = replace(scored.trajectory.prompts, group=torch.zeros(2, dtype=torch.long))
    return replace(scored, trajectory=replace(scored.trajectory, prompts=prompts))


@pytest.mark.parametrize("order", ["random", "plackett_luce", "low_confidence"])
def test_the_enumeration_is_of_the_sampler_that_trains(order):
    """Paths drawn by SampleRng are among the enumerated ones, as often as these are probable."""
    decoder, n = SMALL.decoder(order, 0.7), 20_000
    denoiser = Tabled.of(SMALL.denoiser(POLICY_SEED), SMALL.canvases())
    paths, probability = enumerate_paths(denoiser, decoder, SMALL, Record())
    rng = SampleRng(seed=5, sample_id=torch.arange(n))
    with torch.no_grad():
        drawn = sample_masked(denoiser, decoder, SMALL.prompts(n), Record(), rng)
    known, names = (torch.cat([t.x_0, t.rank], 1) for t in (paths, drawn))
    hit = (names[:, None] == known[None]).all(-1)
    assert bool((hit.sum(1) == 1).all())
    expected = n * probability.detach()
    chi_square = ((hit.sum(0) - expected) ** 2 / expected).sum()
    freedom = len(known) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_draws_that_are_given_have_the_probabilities_of_real_ones():
    """Two rows drawn by the weights 1, 2, 5, and a token by the weights 2, 8, by hand."""
    rng = EnumeratingRng(torch.arange(6 * 2))
    log_weight = torch.tensor([1.0, 2.0, 5.0]).log().expand(12, -1)
    chosen = rng.ordered(log_weight, 2, 0, torch.zeros(12, 3, dtype=torch.long))
    probs = torch.tensor([2.0, 8.0]).expand(12, 1, 2)
    token = rng.categorical(probs, Stream.TOKEN, 0, torch.zeros(12, 1, dtype=torch.long))
    assert rng.n_outcomes == 12
    found = {
        (*rows.tolist(), int(t)): float(p)
        for rows, t, p in zip(chosen, token[:, 0], rng.probability, strict=True)
    }
    assert len(found) == 12
    assert found[(2, 0, 1)] == pytest.approx(5 / 8 * 1 / 3 * 0.8)
    assert found[(0, 1, 0)] == pytest.approx(1 / 8 * 2 / 7 * 0.2)
    assert sum(found.values()) == pytest.approx(1)


def test_forwards_count_the_rows_of_steps_with_a_coefficient():
    """All steps without a baseline; twice with a reference; none where rewards are equal."""

    def row(algorithm):
        return check(Case(algorithm=algorithm, world=SMALL, factor=None), {})

    assert row(Reinforce(baseline="none")).forwards == pytest.approx(2)
    assert row(Egspo(n_steps=1)).forwards == pytest.approx(2)
    assert row(Egspo(n_steps=2, kl="exact")).forwards == pytest.approx(4)
    equal = check(Case(algorithm=Reinforce(), world=SMALL, factor=None), {}).forwards
    denoiser = Tabled.of(SMALL.denoiser(POLICY_SEED), SMALL.canvases())
    paths, graph = enumerate_paths(denoiser, SMALL.decoder("random", 1.0), SMALL, Record())
    p = graph.detach()
    same = (paths.x_0[:, None] == paths.x_0[None]).all(-1)
    assert equal == pytest.approx(2 * (1 - float(p @ same.double() @ p)))


def test_unknown_and_unclaimed_algorithms_are_refused(monkeypatch):
    """The closest name is suggested; silence about an algorithm is an error."""
    with pytest.raises(ValueError, match="did you mean 'reinforce'"):
        verify(["reinforc"])
    monkeypatch.delitem(claims.CASES, "egspo")
    with pytest.raises(ValueError, match=r"nothing is claimed about algorithm 'egspo'"):
        verify()


def test_the_printed_table_fits_and_names_what_failed():
    """120 columns; a row that is not ok is listed by itself."""
    case = Case(algorithm=Reinforce(), world=SMALL, order="low_confidence", factor=1.0)
    good = replace(case, algorithm=Reinforce(score=exact_score("low_confidence")))
    out = io.StringIO()
    print_rows([check(good, {}), check(case, {})], Console(file=out, width=120))
    text = out.getvalue()
    assert "2 rows, 1 ok" in text
    assert "order=low_confidence |" in text
    assert "score=tokens_and_selection" in text
    assert "…" not in text
