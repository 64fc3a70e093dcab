"""From a credited batch to weights: how the batch is cut changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.models.denoiser import Denoiser
from rescore.rewards.reward import RewardFunction
from rescore.sampling.rng import SampleRng
from rescore.training.optim import Optim
from rescore.training.rollout import rollout
from rescore.training.run import Run
from rescore.training.update import mini_batches, update
from rescore.training.world import World
from rescore.types import Credited, Prompts
from tiny import TransformerBase, masked, masked_policy, tiny_run, tiny_world

CLIPPED = Egspo(n_steps=2, beta=0.1, clip_low=0.01, clip_high=0.02)
"""Bounds tight enough to be hit after one update."""


def credited_batch(run: Run, step: int = 0) -> tuple[World, Credited]:
    world = tiny_world(run)
    scored, _ = rollout(world, step)
    return world, run.algorithm.credit(scored)


def weights(world: World) -> Tensor:
    return torch.cat([p.detach().flatten() for p in world.module.parameters()])


def moments(world: World) -> Tensor:
    """The mean gradient that Adam remembers."""
    state = world.updater.optimizer.state
    return torch.cat([state[p]["exp_avg"].flatten() for p in world.module.parameters()])


@pytest.mark.parametrize("algorithm", [Reinforce(), CLIPPED])
@pytest.mark.parametrize("base", ["mlp", "transformer"])
def test_the_micro_batch_changes_nothing(algorithm, base):
    """Gradients, weights and metrics are those of one whole backward pass, to 1e-12.

    Adam divides the rounding errors of a gradient that is zero, such as that of a key's bias in
    attention, by its epsilon: weights are compared where there is a gradient.
    """
    found = []
    for micro_batch in (512, 7, 1):
        epochs = 1 if algorithm.on_policy else 2
        optim = Optim(micro_batch=micro_batch, lr=0.01, warmup=0, epochs=epochs)
        run = tiny_run(algorithm=algorithm, optim=optim)
        run = replace(run, base=TransformerBase()) if base == "transformer" else run
        world, credited = credited_batch(run)
        before = weights(world)
        metrics = update(world, credited, 0)
        assert len(credited.pairs()) > 8
        assert not torch.equal(weights(world), before)
        found.append((moments(world), weights(world), metrics))
    for moment, theta, metrics in found[1:]:
        torch.testing.assert_close(moment, found[0][0], rtol=0, atol=1e-14)
        known = moment.abs() > 1e-12
        assert known.double().mean() > 0.5
        torch.testing.assert_close(theta[known], found[0][1][known], rtol=0, atol=1e-12)
        assert metrics.keys() == found[0][2].keys()
        for name, value in metrics.items():  # extremes are kept in float32
            tolerance = 1e-6 if name.startswith("ratio_") else 1e-12
            assert value == pytest.approx(found[0][2][name], rel=tolerance, abs=1e-12), name


def test_the_gradient_is_that_of_the_weighted_loss():
    """grad = sum over pairs of weight * grad loss, taken pair by pair with autograd."""
    run = tiny_run(optim=Optim(micro_batch=5, clip_norm=1e9))
    world, credited = credited_batch(run)
    parameters = list(world.module.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for sample, column in credited.pairs().tolist():
        step = credited.step[sample, column]
        path = credited.trajectory.take(torch.tensor([sample]))
        score = run.algorithm.record.score
        log_prob = world.models.new.transition(path, step[None], score).log_prob
        grads = torch.autograd.grad(log_prob.sum(), parameters)
        coefficient = -credited.advantage[sample, column] / run.batch_size
        for total, grad in zip(expected, grads, strict=True):
            total += coefficient * grad
    norm = torch.stack([grad.square().sum() for grad in expected]).sum().sqrt()
    metrics = update(world, credited, 0)
    assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-12)
    # After one update Adam remembers a tenth of the gradient.
    for p, grad in zip(parameters, expected, strict=True):
        moment = world.updater.optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_mini_batches_cut_each_epoch_into_equal_shares_of_the_samples(n):
    """Each pair is trained on once per epoch; no update gets more samples than another."""
    run = tiny_run(algorithm=Egspo(n_steps=3, beta=0.1), optim=Optim(mini_batches=n, epochs=3))
    _, credited = credited_batch(run)
    credited = replace(credited, weight=torch.ones_like(credited.weight))
    parts = list(mini_batches(run, credited, 0))
    assert len(parts) == 3 * n == run.optim.updates_per_rollout
    whole = sorted(map(tuple, credited.pairs().tolist()))
    orders = []
    for epoch in range(3):
        inside = parts[epoch * n : (epoch + 1) * n]
        assert sorted(tuple(pair) for part in inside for pair in part.tolist()) == whole
        assert {len(part[:, 0].unique()) for part in inside} == {run.batch_size // n}
        orders.append([part.tolist() for part in inside])
    if n > 1:
        assert orders[0] != orders[1] != orders[2] != orders[0], "epochs are shuffled anew"
        assert [p.tolist() for p in mini_batches(run, credited, 1)] != [p.tolist() for p in parts]
        other = replace(run, seed=1)
        assert [p.tolist() for p in mini_batches(other, credited, 0)] != [p.tolist() for p in parts]
    again = list(mini_batches(run, credited, 0))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_mini_batches_average_to_the_whole_batch():
    """At the same weights, the mean of the mini-batch gradients is the gradient of the batch."""
    gradients = {}
    for n in (1, 4):
        run = tiny_run(
            algorithm=Egspo(n_steps=2, beta=0.1),
            optim=Optim(mini_batches=n, lr=1e-300, warmup=0, clip_norm=1e9, betas=(0.0, 0.99)),
        )
        world, credited = credited_batch(run)
        sums = [torch.zeros_like(p) for p in world.module.parameters()]

        def add(*_: object, sums=sums, world=world) -> None:
            for total, p in zip(sums, world.module.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad

        world.updater.optimizer.register_step_pre_hook(add)
        update(world, credited, 0)
        gradients[n] = torch.cat([total.flatten() / n for total in sums])
    torch.testing.assert_close(gradients[4], gradients[1], rtol=1e-12, atol=1e-14)


def constant(outputs: Tensor, prompts: Prompts) -> Tensor:
    return torch.ones(len(outputs))


def first_group_only(outputs: Tensor, prompts: Prompts) -> Tensor:
    """Differs inside group 0, equal inside all others."""
    return torch.where(prompts.group == 0, (outputs == prompts.info["target"]).sum(1), 0)


@dataclass
class Counting:
    """A ``Denoiser`` that counts the rows it is asked for with gradients on."""

    network: Denoiser
    trained: int = 0

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    def predict(self, x_t, *, attend=None, positions=None) -> Tensor:
        self.trained += len(x_t) * torch.is_grad_enabled()
        return self.network.predict(x_t, attend=attend, positions=positions)


def run_with(function: RewardFunction, **changes) -> Run:
    run = tiny_run(**changes)
    return replace(run, task=replace(run.task, functions={"term": function}))


def counted(world: World) -> Counting:
    policy = masked_policy(world.models.new)
    counting = Counting(policy.denoiser)
    world.models = replace(world.models, new=replace(policy, denoiser=counting))
    return counting


@pytest.mark.parametrize("algorithm", [Reinforce(), Egspo(n_steps=2, beta=0.0)])
def test_groups_of_equal_rewards_cost_no_network_rows(algorithm):
    """Only the one group whose rewards differ is trained on."""
    world, credited = credited_batch(run_with(first_group_only, algorithm=algorithm))
    pairs = credited.pairs()
    assert set(credited.trajectory.prompts.group[pairs[:, 0]].tolist()) == {0}
    counting = counted(world)
    update(world, credited, 0)
    assert counting.trained == len(pairs) <= 4 * 3


def test_skipping_groups_leaves_the_gradient_as_it_is():
    """The weights are those of training on every pair, the skipped ones included."""
    run = run_with(first_group_only, optim=Optim(lr=0.1, warmup=0))
    world, credited = credited_batch(run)
    update(world, credited, 0)
    full, _ = credited_batch(run)
    everything = masked(credited.trajectory).revealed() > 0
    update(full, replace(credited, weight=torch.where(everything, 1 / run.batch_size, 0.0)), 0)
    assert int(everything.sum()) > len(credited.pairs())
    torch.testing.assert_close(weights(world), weights(full), rtol=0, atol=1e-12)


def test_a_batch_without_any_difference_is_no_update():
    """All rewards equal: no network rows, no update, weights as they were."""
    world, credited = credited_batch(run_with(constant))
    before, counting = weights(world), counted(world)
    metrics = update(world, credited, 0)
    assert counting.trained == 0
    assert torch.equal(weights(world), before)
    assert metrics.keys() == {"gradient_norm"}
    assert math.isnan(metrics["gradient_norm"])
    assert world.updater.counts.done == world.updater.counts.skipped == 0


def test_metrics_are_means_and_extremes_over_the_pairs_trained_on():
    """By hand from one big micro-batch, with old log-probabilities that are not the new ones."""
    run = tiny_run(algorithm=replace(CLIPPED, beta=0.0), optim=Optim(micro_batch=3, clip_norm=1e-9))
    world, credited = credited_batch(run)
    actions = credited.actions(credited.pairs())
    rng = SampleRng(run.seed, actions.trajectory.prompts.sample_id)
    path, shift = actions.trajectory, 0.1 * actions.advantage[:, None]
    shifted = replace(actions, trajectory=replace(path, log_prob=path.log_prob - shift))
    terms = run.algorithm.loss(world.models, shifted, rng)
    old = credited.trajectory.log_prob.clone()
    sample, column = credited.pairs().unbind(1)
    old[sample, credited.step[sample, column]] = shifted.log_prob_old
    credited = replace(credited, trajectory=replace(credited.trajectory, log_prob=old))
    metrics = update(world, credited, 0)
    for name in ("kl_old_new", "clip_fraction", "impossible"):
        assert metrics[name] == pytest.approx(terms.metrics[name].mean().item(), rel=1e-12), name
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["loss"] == pytest.approx(terms.loss.mean().item(), rel=1e-12)
    assert metrics["ratio_min"] == pytest.approx(terms.metrics["ratio"].min().item(), rel=1e-6)
    assert metrics["ratio_max"] == pytest.approx(terms.metrics["ratio"].max().item(), rel=1e-6)
    assert metrics["ratio_min"] < 1 < metrics["ratio_max"]
    assert "ratio" not in metrics
