"""The reference is asked once per state, only where it is needed, and gives the exact KL."""

from dataclasses import replace

import pytest
import torch

from gaussians import (
    SOLVERS,
    GaussianTask,
    gaussian_path,
    gaussian_policy,
    gaussian_rollout,
    gaussian_run,
    move,
)
from rescore.algorithms.ddpo import Ddpo
from rescore.processes.gaussian import TwoStep
from rescore.sampling.record import Score
from rescore.sampling.reference import kl_to_reference, reference_outputs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n_steps", [None, 2])
def test_the_kl_is_that_of_both_policies_asked(solver, n_steps):
    """As if the reference were called on every pair; 0 as long as both are equal."""
    algorithm = Ddpo(beta=0.1, n_steps=n_steps)
    run = gaussian_run(algorithm=algorithm, task=GaussianTask(labels=3), **SOLVERS[solver])
    world, scored = gaussian_rollout(run)
    new, ref = gaussian_policy(world.models.new), gaussian_policy(world.models.ref)
    credited = algorithm.credit(scored)
    actions = credited.actions(credited.pairs())
    for by in (0.0, 0.1):
        move(world, by)
        mine = new.transition(actions.trajectory, actions.step, Score())
        theirs = ref.transition(actions.trajectory, actions.step, Score())
        found = kl_to_reference(mine, actions.notes)
        torch.testing.assert_close(found, mine.kl(theirs))
        assert bool((found > 0).all()) is (by > 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_is_asked_about_once(solver):
    """Rows: states that steps with noise start from, and those before for two-step solvers."""
    world, scored = gaussian_rollout(gaussian_run(algorithm=Ddpo(beta=0.1), **SOLVERS[solver]))
    ref = gaussian_policy(world.models.ref)
    random = gaussian_path(scored.trajectory).random
    assert ref.rows == int(random.sum())
    before = ref.rows
    chosen = torch.tensor([3, 1, 1]).expand(16, 3)
    weight = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).expand(16, 3)
    notes = reference_outputs(ref, replace(scored, step=chosen, step_weight=weight))
    states = {3, 1} & set(random[0].nonzero().flatten().tolist())
    if isinstance(ref.steps, TwoStep):
        states |= {k - 1 for k in states}
        assert notes["ref_before"].shape == (16, 3, 2)
    assert ref.rows - before == 16 * len(states)
    assert notes["ref"].shape == (16, 3, 2)


def test_parts_are_the_whole():
    """Any number of rows at a time; nothing asked is nothing said."""
    run = gaussian_run(algorithm=Ddpo(beta=0.1), task=GaussianTask(labels=3))
    world, scored = gaussian_rollout(run)
    ref = gaussian_policy(world.models.ref)
    notes = reference_outputs(replace(ref, forward_rows=7), scored)
    assert torch.equal(notes["ref"], scored.notes["ref"])
    none = replace(scored, step_weight=torch.zeros_like(scored.step_weight))
    assert not reference_outputs(ref, none)["ref"].any()
