"""DPOK: a value of noised samples is subtracted before it learns; an exact KL of every step."""

import pytest
import torch

from gaussians import (
    GaussianTask,
    gaussian_path,
    gaussian_policy,
    gaussian_rollout,
    gaussian_run,
    second_rollout,
)
from rescore.algorithms.dpok import Dpok
from rescore.models.value import ValueCritic
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.policy import Models
from rescore.training.rollout import rollout


def critic_of(models: Models) -> ValueCritic:
    assert isinstance(models.critic, ValueCritic)
    return models.critic


def test_the_critic_is_subtracted_before_it_learns():
    """r - V of what it said at each state and time, told the label; a sample of 4 counts 1/4."""
    algorithm = Dpok(critic_lr=0.05, critic_epochs=20)
    task = GaussianTask(labels=3)
    run = gaussian_run(algorithm=algorithm, task=task, batch_size=4, group_size=1)
    world, scored = second_rollout(run)
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


def test_what_the_critic_explains_is_reported():
    """1 - mean (r - V)^2 / var r, of a critic that judges before it learns."""
    algorithm = Dpok(critic_batch=16 * 5, critic_epochs=1)
    world, scored = second_rollout(gaussian_run(algorithm=algorithm))
    error = (scored.reward[:, None] - scored.notes["value"]).double()
    expected = 1 - error.square().mean() / scored.reward.double().var(correction=0)
    logged = algorithm.fit(world.models, algorithm.credit(scored))
    assert logged == {"value_explained": pytest.approx(float(expected), abs=1e-6)}


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Dpok(critic_lr=0.0), "critic_lr must be positive"),
        (Dpok(critic_epochs=0), "critic_epochs must be at least 1"),
        (Dpok(critic_batch=0), "critic_batch must be at least 1"),
    ],
)
def test_refusals(algorithm, message):
    with pytest.raises(ValueError, match=message):
        algorithm.check(GaussianDecoder(steps=5), 4, ("level",))
    Dpok().check(GaussianDecoder(steps=5), 1, ("level",))
