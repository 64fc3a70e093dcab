"""What it saves to put all steps of a micro-batch through the network at once.

    OMP_NUM_THREADS=1 python benchmarks/fused_timesteps.py       # about a CPU-minute

The gradient of DDPO's loss on the same paths, once with all (sample, step) pairs in one forward, as
the trainer does, and once with a forward and a backward pass for every step, as is usual elsewhere.
Both alternate in one run, so a busy machine disturbs both alike; medians of CPU-seconds. Expected:
at least 1.5 times as fast for tiny networks on 8 x 8, nowhere more than 5 % slower; exits with 1
if not.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from rescore.algorithms.ddpo import Ddpo
from rescore.models.unet import UNet, UNetConfig
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import Models
from rescore.sampling.rng import SampleRng
from rescore.types import Conditions, Credited, Scored

NETWORKS = {
    "tiny, 8 x 8": (UNetConfig(size=8, widths=(8, 16)), 1.5),
    "small, 8 x 8": (UNetConfig(size=8, widths=(24, 48)), 1 / 1.05),
    "small, 16 x 16": (UNetConfig(size=16, widths=(24, 48)), 1 / 1.05),
    "larger, 32 x 32": (UNetConfig(size=32, widths=(32, 64, 128)), 1 / 1.05),
}
"""Name of a network to its shape and the least that fusing must gain."""


@dataclass
class Options:
    """What to measure."""

    batch: int = 4
    """Samples."""
    steps: int = 10
    """Steps of each path; the last one draws no noise and is not trained on."""
    repeats: int = 15
    """Of each way; medians are shown."""


def rollout(network: UNet, options: Options) -> tuple[Models, Credited]:
    """Paths of a network with random weights and rewards, ready for an update."""
    policy = GaussianPolicy(network, GaussianDecoder(steps=options.steps))
    row = torch.arange(options.batch)
    prompts = Conditions(group=torch.zeros_like(row), sample_id=row, info={}, inputs={})
    algorithm, models = Ddpo(), Models(policy)
    selected = algorithm.select(models, policy.sample(prompts, algorithm.record, SampleRng(0, row)))
    reward = torch.randn(options.batch, generator=torch.Generator().manual_seed(0))
    scored = Scored(**selected.fields(), reward=reward, terms={"reward": reward})
    return models, algorithm.credit(scored)


def gradient(models: Models, credited: Credited, parts: list[Tensor]) -> list[Tensor]:
    """The gradient of the loss, a forward and a backward pass for each of the parts."""
    assert isinstance(models.new, GaussianPolicy) and isinstance(models.new.network, UNet)
    weights = list(models.new.network.parameters())
    for weight in weights:
        weight.grad = None
    for pairs in parts:
        actions = credited.actions(pairs)
        rng = SampleRng(0, actions.trajectory.prompts.sample_id)
        loss = Ddpo().loss(models, actions, rng).loss
        (actions.weight * loss).sum().backward()
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]


def seconds(models: Models, credited: Credited, parts: list[Tensor]) -> float:
    """CPU-seconds of one gradient."""
    clock = time.process_time()
    gradient(models, credited, parts)
    return time.process_time() - clock


def main(options: Options) -> None:
    """Measure every network and print the table as Markdown."""
    print("| network | parameters | step by step, ms | fused, ms | gain | expected | difference |")
    print("|---|---|---|---|---|---|---|")
    missed = False
    for name, (config, expected) in NETWORKS.items():
        network = config.network(torch.Generator().manual_seed(0))
        with torch.no_grad():  # the head starts at 0
            network.out.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        models, credited = rollout(network, options)
        pairs = credited.pairs()
        apart = [pairs[pairs[:, 1] == k] for k in pairs[:, 1].unique()]
        one, many = gradient(models, credited, [pairs]), gradient(models, credited, apart)
        largest = max(float(g.abs().max()) for g in one)
        difference = max(float((a - b).abs().max()) for a, b in zip(one, many, strict=True))
        times = [
            (seconds(models, credited, apart), seconds(models, credited, [pairs]))
            for _ in range(options.repeats)
        ]
        slow, fast = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        missed = missed or slow / fast < expected
        n_parameters = sum(p.numel() for p in network.parameters())
        print(
            f"| {name} | {n_parameters} | {slow:.1f} | {fast:.1f} | {slow / fast:.2f} | "
            f"{expected:.2f} | {difference / largest:.1e} |"
        )
    sys.exit(int(missed))


if __name__ == "__main__":
    main(tyro.cli(Options))
