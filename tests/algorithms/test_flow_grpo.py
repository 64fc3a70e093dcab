"""Flow-GRPO: group-relative advantages, the clipped surrogate of random steps, an exact KL."""

import math
from dataclasses import replace

import pytest
import torch

from gaussians import (
    SOLVERS,
    GaussianBase,
    GaussianTask,
    gaussian_path,
    gaussian_policy,
    gaussian_rollout,
    gaussian_run,
    gradient,
    losses_by_hand,
    move,
    resumed,
)
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.algorithms.reinforce import Reinforce
from rescore.processes.gaussian import RectifiedFlow
from rescore.sampling.decoder import Decoder, GaussianDecoder
from rescore.sampling.record import Score
from rescore.sampling.reference import kl_to_reference
from rescore.training.optim import Optim
from rescore.training.rollout import probe
from tiny import assert_same_run


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_is_that_of_the_laws_of_the_steps(solver, beta):
    """Away from the old parameters: steps one by one, by torch.distributions and autograd."""
    algorithm = FlowGrpo(clip=0.05, beta=beta)
    world, scored = gaussian_rollout(gaussian_run(algorithm=algorithm, **SOLVERS[solver]))
    credited = algorithm.credit(scored)
    move(world, 0.1)
    path = gaussian_path(scored.trajectory)
    by_hand = losses_by_hand(world, path, credited.advantage, clip=0.05, beta=beta)
    expected = torch.autograd.grad(by_hand.sum() / 16, list(world.module.parameters()))
    for a, b in zip(gradient(world, credited), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert float(a.abs().max()) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_update_is_that_of_reinforce(solver):
    """Every ratio is 1 and every KL has gradient 0 at the reference."""
    algorithm = FlowGrpo(beta=0.3)
    world, scored = gaussian_rollout(gaussian_run(algorithm=algorithm, **SOLVERS[solver]))
    credited = algorithm.credit(scored)
    gap = probe(world, credited)
    assert gap is not None and gap < 1e-12
    found = gradient(world, credited)
    world.run = replace(world.run, algorithm=Reinforce())
    world.models = replace(world.models, ref=None)
    for a, b in zip(found, gradient(world, credited), strict=True):
        torch.testing.assert_close(a, b)


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


def test_a_run_resumes_bitwise(tmp_path):
    """A flow in float32, in a window of noise."""
    run = gaussian_run(
        algorithm=FlowGrpo(std="batch"),
        decoder=GaussianDecoder(steps=5, solver="flow_sde", eta=0.7, t_max=0.95, window=(0, 3)),
        base=GaussianBase(schedule=RectifiedFlow(), prediction="flow"),
        optim=Optim(lr=0.02, epochs=2, mini_batches=2, micro_batch=7),
        steps=2,
        precision="float32",
        task=GaussianTask(labels=3),
    )
    assert_same_run(*resumed(run, tmp_path))


@pytest.mark.parametrize(
    ("algorithm", "decoder", "group_size", "message"),
    [
        (FlowGrpo(), GaussianDecoder(steps=5, solver="ddim_ode"), 4, "ddim_ode draws no noise"),
        (FlowGrpo(), Decoder(steps=4), 4, "flow_grpo is for continuous samples, but a Decoder"),
        (FlowGrpo(beta=-0.1), GaussianDecoder(steps=5), 4, "beta=-0.1 must be 0 or more"),
        (FlowGrpo(clip=-0.1), GaussianDecoder(steps=5), 4, "clip=-0.1 nats"),
        (FlowGrpo(), GaussianDecoder(steps=5), 1, "group_size=1"),
    ],
)
def test_refusals(algorithm, decoder, group_size, message):
    with pytest.raises(ValueError, match=message):
        algorithm.check(decoder, group_size, ("level",))
