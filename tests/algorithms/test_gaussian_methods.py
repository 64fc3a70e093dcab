"""DDPO, DPOK and Flow-GRPO: what they have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gaussians import (
    SOLVERS,
    GaussianBase,
    GaussianTask,
    gaussian_path,
    gaussian_run,
    gradient,
    losses_by_hand,
    move,
    resumed,
    second_rollout,
)
from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.algorithms.reinforce import Reinforce
from rescore.models.unet import UNet, UNetConfig
from rescore.sampling.decoder import Decoder, GaussianDecoder
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import Task
from rescore.training.base import Base
from rescore.training.optim import Optim
from rescore.training.rollout import PROBE_TOLERANCE, probe
from rescore.training.update import update
from tiny import assert_same_run

METHODS = {"ddpo": Ddpo, "dpok": Dpok, "flow_grpo": FlowGrpo}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_the_laws_of_the_steps(method, solver, beta):
    """Away from the old parameters: steps one by one, by torch.distributions and autograd."""
    algorithm = METHODS[method](clip=0.05, beta=beta)
    run = gaussian_run(algorithm=algorithm, task=GaussianTask(labels=3), **SOLVERS[solver])
    world, scored = second_rollout(run)
    credited = algorithm.credit(scored)
    move(world, 0.1)
    path = gaussian_path(scored.trajectory)
    by_hand = losses_by_hand(world, path, credited.advantage, clip=0.05, beta=beta)
    expected = torch.autograd.grad(by_hand.sum() / 16, list(world.module.parameters()))
    for a, b in zip(gradient(world, credited), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert float(a.abs().max()) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_update_is_that_of_reinforce(method, solver):
    """Every ratio is 1 and every KL has gradient 0 at the reference."""
    algorithm = METHODS[method](beta=0.3)
    run = gaussian_run(algorithm=algorithm, task=GaussianTask(labels=3), **SOLVERS[solver])
    world, scored = second_rollout(run)
    credited = algorithm.credit(scored)
    gap = probe(world, credited)
    assert gap is not None and gap < 1e-12
    found = gradient(world, credited)
    world.run = replace(world.run, algorithm=Reinforce())
    world.models = replace(world.models, ref=None)
    for a, b in zip(found, gradient(world, credited), strict=True):
        torch.testing.assert_close(a, b)


@dataclass(frozen=True, kw_only=True)
class ImageTask(GaussianTask):
    """Images to be made brighter."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 4, 4)


@dataclass(frozen=True, kw_only=True)
class UNetBase(Base):
    """A UNet of random weights, its head among them."""

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        network = UNet(UNetConfig(size=4, widths=(8, 16), n_labels=3), generator=generator)
        nn.init.normal_(network.out.weight, std=0.1, generator=generator)
        return network.to(device)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("solver", ["ddim", "two_steps"])
@pytest.mark.parametrize("algorithm", [Ddpo(beta=0.1, n_steps=3), Dpok(), FlowGrpo()])
def test_a_convolutional_network_trains(algorithm, solver, precision):
    """Ratio 1 and KL 0 at the start, sums in float64, then one update that moves."""
    run = gaussian_run(
        task=ImageTask(labels=3),
        base=UNetBase(),
        decoder=SOLVERS[solver]["decoder"],
        algorithm=algorithm,
        precision=precision,
        optim=Optim(lr=0.02, warmup=0, epochs=2, micro_batch=40),
    )
    world, scored = second_rollout(run)
    assert gaussian_path(scored.trajectory).log_prob.dtype == torch.float64
    assert scored.notes["ref"].dtype == torch.float32
    credited = algorithm.credit(scored)
    gap = probe(world, credited)
    assert gap is not None and gap < PROBE_TOLERANCE[precision][1]
    actions = credited.actions(credited.pairs())
    with world.autocast():
        terms = algorithm.loss(world.models, actions, SampleRng(0, torch.arange(1)))
    assert terms.loss.dtype == torch.float64
    same = 1e-9 if precision == "float32" else 0.05  # batches of other sizes round otherwise
    assert float(terms.metrics["kl_new_ref"].max()) < same
    before = world.module.get_parameter("out.weight").detach().clone()
    metrics = update(world, credited, 1)
    assert metrics["kl_new_ref"] > 0
    assert 0 < metrics["gradient_norm"] < float("inf")
    assert not torch.equal(before, world.module.get_parameter("out.weight"))


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        pytest.param(Ddpo(beta=0.1, n_steps=2), {}, id="drawn steps, held to the reference"),
        pytest.param(Dpok(critic_batch=9, critic_epochs=2), {}, id="a critic and its batches"),
        pytest.param(
            FlowGrpo(std="batch"),
            {
                "decoder": replace(SOLVERS["flow_sde"]["decoder"], window=(0, 3)),
                "base": SOLVERS["flow_sde"]["base"],
            },
            id="a flow, a window of noise",
        ),
    ],
)
def test_a_run_resumes_bitwise(algorithm, changes, tmp_path):
    """Several updates per rollout, in float32."""
    run = gaussian_run(
        algorithm=algorithm,
        optim=Optim(lr=0.02, epochs=2, mini_batches=2, micro_batch=7),
        steps=3,
        precision="float32",
        base=GaussianBase(theta=(0.1, -0.1)),
        task=GaussianTask(labels=3),
    )
    assert_same_run(*resumed(replace(run, **changes), tmp_path))


@pytest.mark.parametrize(
    ("changes", "decoder", "message"),
    [
        ({}, GaussianDecoder(steps=5, solver="ddim_ode"), "ddim_ode draws no noise"),
        ({}, GaussianDecoder(steps=5, solver="heun"), "heun draws no noise"),
        ({}, Decoder(steps=4), "{} is for continuous samples, but a Decoder"),
        ({"beta": -0.1}, GaussianDecoder(steps=5), "{}: beta=-0.1 must be 0 or more"),
        ({"beta": math.inf}, GaussianDecoder(steps=5), "{}: beta=inf"),
        ({"clip": 0.0}, GaussianDecoder(steps=5), "{}: clip=0.0 nats"),
        ({"clip": math.nan}, GaussianDecoder(steps=5), "{}: clip=nan nats"),
        ({"clip": 21.0}, GaussianDecoder(steps=5), "{}: clip=21.0 .* at most 20"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_refusals(method, changes, decoder, message):
    with pytest.raises(ValueError, match=message.format(method)):
        METHODS[method](**changes).check(decoder, 4, ("level",))


@pytest.mark.parametrize("method", ["ddpo", "flow_grpo"])
def test_a_group_of_one_has_no_statistics(method):
    with pytest.raises(ValueError, match="group_size=1"):
        METHODS[method]().check(GaussianDecoder(steps=5), 1, ("level",))
