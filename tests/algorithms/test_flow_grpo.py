"""Flow-GRPO: group-relative advantages, the clipped surrogate of random steps, an exact KL."""

import math
from dataclasses import replace

import pytest
import torch

from gaussians import (
    SOLVERS,
    gaussian_policy,
    gaussian_rollout,
    gaussian_run,
    move,
)
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.processes.gaussian_schedules import RectifiedFlow
from rescore.sampling.record import Score
from rescore.sampling.reference import kl_to_reference

REWARD = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 40.0], dtype=torch.float64)
"""Of three groups of two; the second has no variance."""


@pytest.mark.parametrize(
    ("std", "by"),
    [
        ("group", [math.sqrt(2), math.sqrt(2), 1, 1, 20 * math.sqrt(2), 20 * math.sqrt(2)]),
        ("batch", [math.sqrt(((REWARD - 8) ** 2).sum() / 5)] * 6),
    ],
)
def test_credit_by_hand(std, by):
    """The mean is always the group's; the noise of the last step is 0."""
    algorithm = FlowGrpo(std=std, beta=0.0)
    _, scored = gaussian_rollout(gaussian_run(algorithm=algorithm, batch_size=6, group_size=2))
    credited = algorithm.credit(replace(scored, reward=REWARD))
    less = torch.tensor([-1.0, 1, 0, 0, -20, 20], dtype=torch.float64)
    expected = (less / torch.tensor(by, dtype=torch.float64))[:, None].expand(6, 5)
    torch.testing.assert_close(credited.advantage, expected)
    trained = (torch.arange(5) < 4) & (expected != 0)
    assert torch.equal(credited.weight, trained.double() / 6)
    held = replace(algorithm, beta=0.1).credit(replace(scored, reward=REWARD))
    assert len(held.pairs()) == 6 * 4


def test_the_kl_of_a_flow_step_by_hand():
    """dt/2 (s (1 - t) / (2 t) + 1 / s)^2 |v - v_ref|^2 with s = a sqrt(t / (1 - t))."""
    algorithm = FlowGrpo(beta=0.1)
    world, scored = gaussian_rollout(gaussian_run(algorithm=algorithm, **SOLVERS["flow_sde"]))
    policy = gaussian_policy(world.models.new)
    assert policy.network.schedule == RectifiedFlow()
    credited = algorithm.credit(scored)
    actions = credited.actions(credited.pairs())
    move(world, 0.1)
    new = policy.transition(actions.trajectory, actions.step, Score())
    t, dt = policy.times[actions.step], (policy.times[:-1] - policy.times[1:])[actions.step]
    s = 0.7 * (t / (1 - t)).sqrt()
    apart = (new.at.a - actions.notes["ref"]).square().sum(1)
    by_hand = dt / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * apart
    torch.testing.assert_close(kl_to_reference(new, actions.notes), by_hand)


def test_only_the_window_is_trained():
    """Steps 1 and 2 of five."""
    _, scored = gaussian_rollout(gaussian_run(algorithm=FlowGrpo(), **SOLVERS["window"]))
    weight = FlowGrpo().credit(scored).weight
    assert (weight > 0).any(0).tolist() == [False, True, True, False, False]
