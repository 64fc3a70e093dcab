"""What the methods for continuous samples have in common: a convolutional network, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from gaussians import SOLVERS, GaussianTask, gaussian_path, gaussian_rollout, gaussian_run
from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.models.unet import UNet, UNetConfig
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import Task
from rescore.training.base import Base
from rescore.training.optim import Optim
from rescore.training.rollout import PROBE_TOLERANCE, probe, rollout
from rescore.training.update import update


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
    world, scored = gaussian_rollout(run)
    algorithm.fit(world.models, algorithm.credit(scored))
    scored, _ = rollout(world, 1)
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
