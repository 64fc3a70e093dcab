"""The oracle behind `rescore verify`: it proves what is true and refuses what is not."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from itertools import groupby

import pytest
import torch
from rich.console import Console

from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.proof import cases as claims
from rescore.proof.cases import CASES, WORLDS, Case, exact_score
from rescore.proof.oracle import EnumeratingRng, Groups, enumerate_paths
from rescore.proof.verify import algorithm_names, check, expected_figures, print_rows, verify
from rescore.proof.worlds import POLICY_SEED, REFERENCE_SEED, Tabled, World
from rescore.sampling.discrete import sample_masked
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.types import Credited, MaskedTrajectory, Scored, Selected

SMALL = World(3, 3, 2, 1, "mlp")
ALL_CASES = [case for algorithm in CASES.values() for case in algorithm()]


def test_every_algorithm_has_claims_and_every_biased_one_a_figure():
    """Nothing is left out of the table, and no figure outlives its row."""
    assert sorted(algorithm_names()) == sorted(CASES)
    rows = [(f"{c.name}|{c.option}|{c.world}", c.claimed) for c in ALL_CASES]
    assert len(set(rows)) == len(rows)
    assert {name for name, claimed in rows if claimed == "biased"} == set(expected_figures())


def test_every_option_is_as_claimed_on_its_smallest_world():
    """The quick part of the table: each option once."""
    expected = expected_figures()
    by_option = groupby(ALL_CASES, key=lambda case: (case.name, case.option))
    quick = {option: min(group, key=_size) for option, group in by_option}
    rows = [check(case, expected) for case in quick.values()]
    assert [row for row in rows if not row.ok] == []


def _size(case: Case) -> int:
    world = case.world
    return world.vocab_size**world.length * world.steps


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
    def select(self, trajectory: MaskedTrajectory, rng: EnumeratingRng) -> Selected:
        selected = super().select(trajectory, rng)
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
        (UnweightedDraws(n_steps=1, selection="importance", baseline="none", beta=0), 1.0),
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
    assert not check(Case(algorithm=Reinforce(score=score), world=SMALL, temperature=0.7, factor=1.0), {}).ok


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
    """One batch of all groups, equal actions merged, tables for networks: all of it changes nothing.

    The comparison runs the pipeline as a trainer would, on two samples and the network itself.
    """
    world, decoder = SMALL, SMALL.decoder("random", 0.7)
    groups = Groups(algorithm, world, decoder)
    n_items = len(groups.probability)
    members = torch.randint(n_items, (200, 2), generator=torch.Generator().manual_seed(0))
    together, forwards = groups.gradients(members)

    denoiser = world.denoiser(POLICY_SEED)
    ref = MaskedPolicy(world.denoiser(REFERENCE_SEED), decoder) if algorithm.beta_or_0 else None
    ...
