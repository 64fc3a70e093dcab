"""DDPO: the clipped surrogate of steps, all or some; statistics of groups or of the batch."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gaussians import (
    GaussianTask,
    gaussian_rollout,
    gaussian_run,
    gradient,
    move,
)
from rescore.algorithms.ddpo import Ddpo
from rescore.models.unet import UNet, UNetConfig
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.policy import policy_of
from rescore.sampling.rng import SampleRng
from rescore.types import Conditions, Credited, Scored

TERMS = ("level",)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "trains"),
    [
        (0.29, 1.0, -math.exp(0.29), True),
        (0.31, 1.0, -math.exp(0.30), False),  # more of it would gain nothing
        (0.31, -1.0, math.exp(0.31), True),  # but what is bad may be undone from anywhere
        (-0.31, 1.0, -math.exp(-0.31), True),
        (-0.31, -1.0, math.exp(-0.30), False),
        (-0.29, -1.0, math.exp(-0.29), True),
    ],
)
def test_the_clip_is_of_the_summed_log_ratio(log_ratio, advantage, loss, trains):
    """clip = 0.3 nats of a step, whatever the number of dimensions."""
    algorithm = Ddpo(clip=0.3)
    run = gaussian_run(algorithm=algorithm, task=GaussianTask(dims=7))
    world, scored = gaussian_rollout(run)
    old = replace(scored.trajectory, log_prob=scored.trajectory.log_prob - log_ratio)
    step = torch.full_like(scored.step, 2)
    one = torch.full(step.shape, advantage, dtype=torch.float64)
    fields = {**scored.fields(), "trajectory": old, "step": step}
    credited = Credited(**fields, advantage=one, weight=torch.ones_like(one))
    actions = credited.actions(torch.tensor([[3, 0]]))
    terms = algorithm.loss(world.models, actions, SampleRng(0, torch.arange(1)))
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([loss], dtype=torch.float64))
    grad = torch.autograd.grad(terms.loss.sum(), list(world.module.parameters()))
    assert any(bool(g.any()) for g in grad) is trains
    assert bool(terms.metrics["clip_fraction"]) is (abs(log_ratio) > 0.3)


REWARD = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 40.0], dtype=torch.float64)
"""Of three groups of two; the second has no variance."""
STD = math.sqrt(((REWARD - 8) ** 2).sum() / 5)


@pytest.mark.parametrize(
    ("changes", "advantage"),
    [
        ({}, [-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0, -math.sqrt(0.5), math.sqrt(0.5)]),
        ({"advantage_clip": 0.5}, [-0.5, 0.5, 0.0, 0.0, -0.5, 0.5]),
        ({"statistics": "batch"}, [(r - 8) / STD for r in REWARD.tolist()]),
        (
            {"statistics": "batch", "advantage_clip": 0.4},
            [-0.4, (3 - 8) / STD, (2 - 8) / STD, (2 - 8) / STD, -0.4, 0.4],
        ),
    ],
)
def test_credit_by_hand(changes, advantage):
    """The same at every step; weight 1 / B where there is noise and something to learn."""
    algorithm = Ddpo(**changes)
    run = gaussian_run(algorithm=algorithm, batch_size=6, group_size=2)
    _, scored = gaussian_rollout(run)
    credited = algorithm.credit(replace(scored, reward=REWARD))
    expected = torch.tensor(advantage, dtype=torch.float64)[:, None].expand(6, 5)
    torch.testing.assert_close(credited.advantage, expected)
    trained = (torch.arange(5) < 4) & (expected != 0)
    assert torch.equal(credited.weight, trained.double() / 6)


def test_equal_rewards_leave_the_kl():
    """Groups that agree teach nothing, but are held to the reference."""
    run = gaussian_run(algorithm=Ddpo(beta=0.1), batch_size=6, group_size=2)
    _, scored = gaussian_rollout(run)
    scored = replace(scored, reward=torch.ones_like(REWARD))
    assert len(Ddpo(beta=0.1).credit(scored).pairs()) == 6 * 4
    assert len(Ddpo().credit(scored).pairs()) == 0


@dataclass(frozen=True)
class Ordering(SampleRng):
    """Puts the same steps first for every sample."""

    first: tuple[int, ...]

    def ordered(self, log_weight: Tensor, n: int, step: int, where: Tensor) -> Tensor:
        rest = [k for k in range(log_weight.shape[1]) if k not in self.first]
        return torch.tensor([*self.first, *rest])[:n].expand(len(log_weight), n)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_some_of_the_steps_stand_for_all_of_them(n):
    """Averaged over every set of n of the four steps with noise: the gradient of all four."""
    algorithm = Ddpo(beta=0.2)
    run = gaussian_run(algorithm=algorithm)
    world, scored = gaussian_rollout(run)
    move(world, 0.05)
    whole = gradient(world, algorithm.credit(scored))
    some = replace(algorithm, n_steps=n)
    sets = list(itertools.combinations(range(4), n))
    mean = [torch.zeros_like(g) for g in whole]
    for first in sets:
        drawn = some.annotate(world.models, scored, Ordering(0, torch.arange(16), first))
        found = gradient(world, some.credit(drawn))
        mean = [m + g / len(sets) for m, g in zip(mean, found, strict=True)]
    for a, b in zip(mean, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("n", "weight"), [(1, 4.0), (3, 4 / 3), (5, 1.0)])
def test_steps_without_noise_are_never_drawn(n, weight):
    """Distinct ones of the first four, weighted T / n; all four where more are asked for."""
    _, scored = gaussian_rollout(gaussian_run(algorithm=Ddpo(n_steps=n), batch_size=64))
    drawn = scored.step_weight > 0
    assert drawn.sum(1).tolist() == [min(n, 4)] * 64
    torch.testing.assert_close(
        scored.step_weight[drawn], torch.full((64 * min(n, 4),), weight, dtype=torch.float64)
    )
    chosen = [row[kept].tolist() for row, kept in zip(scored.step, drawn, strict=True)]
    assert all(len(set(steps)) == len(steps) and max(steps) < 4 for steps in chosen)
    assert {step for steps in chosen for step in steps} == {0, 1, 2, 3}


def test_a_sample_draws_its_own_steps():
    """The same ones whatever else is in the batch."""
    algorithm = Ddpo(n_steps=2)
    world, scored = gaussian_rollout(gaussian_run(algorithm=algorithm))
    rows = torch.tensor([7, 2])
    whole = Ddpo().select(world.models, scored.trajectory.take(rows))
    reward = scored.reward[rows]
    few = Scored(**whole.fields(), reward=reward, terms={"level": reward})
    again = algorithm.annotate(world.models, few, SampleRng(world.run.seed, rows))
    assert torch.equal(again.step, scored.step[rows])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-5)])
def test_all_steps_in_one_forward_are_the_steps_one_by_one(dtype, tolerance):
    """A UNet's gradient, largest difference over largest entry."""
    config = UNetConfig(size=8, widths=(8, 16), n_labels=3)
    network = UNet(config, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():  # the head starts at 0
        network.out.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    algorithm = Ddpo(clip=0.05)
    world, _ = gaussian_rollout(gaussian_run(algorithm=algorithm))
    policy = policy_of(network, GaussianDecoder(steps=6), 64)
    row = torch.arange(4)
    prompts = Conditions(
        group=row // 2, sample_id=row, info={}, inputs={"label": torch.tensor([0, 1, 2, 0])}
    )
    path = policy.sample(prompts, algorithm.record, SampleRng(0, row))
    world.models, world.module = replace(world.models, new=policy), network
    reward = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=dtype)
    selected = algorithm.select(world.models, path)
    credited = algorithm.credit(Scored(**selected.fields(), reward=reward, terms={"r": reward}))
    with torch.no_grad():
        network.out.weight *= 1.1
    pairs = credited.pairs()
    together = gradient(world, credited, pairs)
    one_by_one = [torch.zeros_like(g) for g in together]
    for k in range(5):
        found = gradient(world, credited, pairs[pairs[:, 1] == k])
        one_by_one = [a + g for a, g in zip(one_by_one, found, strict=True)]
    largest = max(float(g.abs().max()) for g in together)
    apart = max(float((a - b).abs().max()) for a, b in zip(together, one_by_one, strict=True))
    assert largest > 0
    assert apart < tolerance * largest


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Ddpo(advantage_clip=0.0), "advantage_clip=0.0"),
        (Ddpo(n_steps=0), "n_steps=0 of a path of 5 steps"),
        (Ddpo(n_steps=6), "n_steps=6 of a path of 5 steps"),
    ],
)
def test_refusals(algorithm, message):
    with pytest.raises(ValueError, match=message):
        algorithm.check(GaussianDecoder(steps=5), 4, TERMS)


def test_what_works_is_not_refused():
    """A group of one with the statistics of the batch, no clip of advantages, all of the steps."""
    Ddpo(statistics="batch", advantage_clip=math.inf).check(GaussianDecoder(steps=5), 1, TERMS)
    Ddpo(n_steps=5, clip=20.0).check(GaussianDecoder(steps=5), 2, TERMS)
