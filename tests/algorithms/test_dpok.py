"""DPOK: a value of noised samples is subtracted before it learns; an exact KL of every step."""

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
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.reinforce import Reinforce
from rescore.models.value import ValueCritic
from rescore.sampling.decoder import Decoder, GaussianDecoder
from rescore.sampling.policy import Models
from rescore.sampling.rng import SampleRng
from rescore.training.optim import Optim
from rescore.training.rollout import probe, rollout
from rescore.training.world import World
from rescore.types import Scored
from tiny import assert_same_run


def critic_of(models: Models) -> ValueCritic:
    assert isinstance(models.critic, ValueCritic)
    return models.critic


def second_rollout(algorithm: Dpok, **changes: object) -> tuple[World, Scored]:
    """After the critic has learned from the first."""
    run = gaussian_run(algorithm=algorithm, task=GaussianTask(labels=3), **changes)
    world, first = gaussian_rollout(run)
    algorithm.fit(world.models, algorithm.credit(first))
    return world, rollout(world, 1)[0]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_is_that_of_the_laws_of_the_steps(solver, beta):
    """Away from the old parameters: steps one by one, by torch.distributions and autograd."""
    algorithm = Dpok(clip=0.05, beta=beta)
    world, scored = second_rollout(algorithm, **SOLVERS[solver])
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
    algorithm = Dpok(beta=0.3)
    world, scored = second_rollout(algorithm, **SOLVERS[solver])
    credited = algorithm.credit(scored)
    gap = probe(world, credited)
    assert gap is not None and gap < 1e-12
    found = gradient(world, credited)
    world.run = replace(world.run, algorithm=Reinforce())
    world.models = replace(world.models, ref=None)
    for a, b in zip(found, gradient(world, credited), strict=True):
        torch.testing.assert_close(a, b)


def test_the_critic_is_subtracted_before_it_learns():
    """r - V of what it said at each state and time, told the label; a sample of 4 counts 1/4."""
    algorithm = Dpok(critic_lr=0.05, critic_epochs=20)
    world, scored = second_rollout(algorithm, batch_size=4, group_size=1)
    critic, path = critic_of(world.models), gaussian_path(scored.trajectory)
    times, inputs = gaussian_policy(world.models.new).times, path.prompts.inputs
    with torch.no_grad():
        value = torch.stack(
            [critic.value(path.path[:, k], times[k].expand(4), inputs, None) for k in range(5)], 1
        )
    credited = algorithm.credit(scored)
    torch.testing.assert_close(credited.advantage, scored.reward[:, None] - value)
    assert torch.equal(credited.weight, (torch.arange(5) < 4).double().expand(4, 5) / 4)
    assert float(value.std()) > 0.01
    algorithm.fit(world.models, credited)
    torch.testing.assert_close(scored.notes["value"], value)
    with torch.no_grad():
        after = critic.value(path.path[:, 4], times[4].expand(4), inputs, None)
    error, before = after - scored.reward, value[:, 4] - scored.reward
    assert error.square().mean() < before.square().mean()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_first_rollout_is_for_the_critic(beta):
    """No policy is trained, not even towards the reference."""
    algorithm = Dpok(beta=beta)
    world, scored = gaussian_rollout(gaussian_run(algorithm=algorithm))
    credited = algorithm.credit(scored)
    assert len(credited.pairs()) == 0
    assert int(critic_of(world.models).fitted) == 0
    algorithm.fit(world.models, credited)
    assert int(critic_of(world.models).fitted) == 1
    assert len(algorithm.credit(rollout(world, 1)[0]).pairs()) == 16 * 4


def test_the_critic_learns_what_the_states_foretell():
    """After a few rollouts it explains most of the reward late in the path, none of it early."""
    algorithm = Dpok(critic_lr=0.01, critic_epochs=10)
    run = gaussian_run(algorithm=algorithm, batch_size=256, task=GaussianTask(dims=1))
    world = gaussian_rollout(run)[0]
    for step in range(5):
        scored = rollout(world, step)[0]
        algorithm.fit(world.models, algorithm.credit(scored))
    error = algorithm.credit(rollout(world, 5)[0]).advantage.square().mean(0)
    share = 1 - error / rollout(world, 5)[0].reward.var()
    assert float(share[0]) < 0.2
    assert float(share[4]) > 0.9
    assert bool((share.diff() > 0).all())


def test_the_error_of_the_value_is_reported():
    """The mean square of r - V."""
    algorithm = Dpok()
    world, scored = second_rollout(algorithm)
    credited = algorithm.credit(scored)
    actions = credited.actions(credited.pairs())
    terms = algorithm.loss(world.models, actions, SampleRng(0, torch.arange(64)))
    torch.testing.assert_close(terms.metrics["value_error"], actions.advantage**2)


def test_a_run_resumes_bitwise(tmp_path):
    """With the critic's weights, optimiser and batches."""
    run = gaussian_run(
        algorithm=Dpok(critic_batch=9, critic_epochs=2),
        optim=Optim(lr=0.02, epochs=2, mini_batches=2, micro_batch=7),
        steps=3,
        precision="float32",
        base=GaussianBase(theta=(0.1, -0.1)),
        task=GaussianTask(labels=3),
    )
    assert_same_run(*resumed(run, tmp_path))


@pytest.mark.parametrize(
    ("algorithm", "decoder", "message"),
    [
        (Dpok(), GaussianDecoder(steps=5, solver="ddim_ode"), "ddim_ode draws no noise"),
        (Dpok(), Decoder(steps=4), "dpok is for continuous samples, but a Decoder"),
        (Dpok(beta=-0.1), GaussianDecoder(steps=5), "beta=-0.1 must be 0 or more"),
        (Dpok(clip=math.nan), GaussianDecoder(steps=5), "clip=nan nats"),
        (Dpok(critic_lr=0.0), GaussianDecoder(steps=5), "critic_lr must be positive"),
        (Dpok(critic_epochs=0), GaussianDecoder(steps=5), "critic_epochs must be at least 1"),
        (Dpok(critic_batch=0), GaussianDecoder(steps=5), "critic_batch must be at least 1"),
    ],
)
def test_refusals(algorithm, decoder, message):
    with pytest.raises(ValueError, match=message):
        algorithm.check(decoder, 4, ("level",))
    Dpok().check(GaussianDecoder(steps=5), 1, ("level",))
