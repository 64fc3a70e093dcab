"""From a credited batch to updated weights: mini-batches, micro-batches, metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from rescore.sampling.rng import SampleRng
from rescore.training.rollout import permutation
from rescore.training.run import Run
from rescore.training.world import World
from rescore.types import Credited, Terms


def mini_batches(run: Run, credited: Credited, step: int) -> Iterator[Tensor]:
    """The pairs of each update in turn: equal shares of the samples, shuffled in every epoch."""
    pairs, optim = credited.pairs(), run.optim
    if optim.mini_batches == 1:
        for _ in range(optim.epochs):
            yield pairs
        return
    for epoch in range(optim.epochs):
        share = permutation(run.batch_size, (run.seed, 1, step, epoch)) % optim.mini_batches
        share = share.to(pairs.device)
        for part in range(optim.mini_batches):
            yield pairs[share[pairs[:, 0]] == part]


def update(world: World, credited: Credited, step: int) -> dict[str, float]:
    """All updates of one rollout; the metrics are means over the pairs trained on."""
    run, accelerator = world.run, world.accelerator
    sums = MetricSums(accelerator.device)
    norms, micro_batch = [], run.optim.micro_batch
    for pairs in mini_batches(run, credited, step):
        if not len(pairs):
            continue
        mine = pairs[accelerator.process_index :: accelerator.num_processes]
        idle = not len(mine)  # fewer pairs than processes: take part, but count for nothing
        mine = pairs[:1] if idle else mine
        total = None
        while total is None:
            before = copy.deepcopy(sums)
            try:
                total = accumulate(world, credited, mine, micro_batch, sums, idle=idle)
            except torch.OutOfMemoryError:
                if micro_batch == 1:
                    raise
            if total is None:
                world.updater.optimizer.zero_grad()  # of the parts that did fit
                torch.cuda.empty_cache()
                micro_batch, sums = (min(micro_batch, len(mine)) + 1) // 2, before
        norm = world.updater.step(total)
        norms += [] if norm is None else [norm]
    metrics = sums.result(accelerator)
    metrics["gradient_norm"] = torch.stack(norms).mean().item() if norms else math.nan
    return metrics


def accumulate(
    world: World,
    credited: Credited,
    pairs: Int[Tensor, "N 2"],
    micro_batch: int,
    sums: MetricSums,
    *,
    idle: bool,
) -> Float[Tensor, ""]:
    """Add the gradient of the weighted loss of all pairs, a part at a time; returns that loss.

    All steps of a micro-batch, whichever samples they are of, go through the network in one batch.
    With ``idle`` the pairs count for nothing.
    """
    run = world.run
    total = torch.zeros((), device=pairs.device, dtype=credited.weight.dtype)
    for chunk in pairs.split(micro_batch):
        actions = credited.actions(chunk)
        rng = SampleRng(run.seed, actions.trajectory.prompts.sample_id)
        with world.autocast():
            terms = run.algorithm.loss(world.models, actions, rng)
        weight = actions.weight * (0.0 if idle else run.optim.mini_batches)
        loss = (terms.loss * weight).sum()
        loss.backward()
        total += loss.detach()
        sums.add(terms, count=0 if idle else len(chunk))
    return total


class MetricSums:
    """Sums, counts and extremes of per-action metrics, kept on the device until asked for."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.low = torch.tensor(math.inf, device=device)
        self.high = torch.tensor(-math.inf, device=device)

    def add(self, terms: Terms, *, count: int) -> None:
        """Add one micro-batch; with ``count`` 0 only its names."""
        self.count += count
        for name, value in {**terms.metrics, "loss": terms.loss.detach()}.items():
            value = value.double() if count else torch.zeros_like(value)
            self.sums[name] = self.sums.get(name, 0.0) + value.sum()
        if count:
            self.low = torch.minimum(self.low, terms.metrics["ratio"].min().float())
            self.high = torch.maximum(self.high, terms.metrics["ratio"].max().float())

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, ``ratio_min`` and ``ratio_max``; one synchronisation.

        Without any pair (every group had equal rewards) there is nothing to report.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        count = torch.tensor(float(self.count), device=self.low.device)
        row = torch.stack([count, self.low, self.high, *(self.sums[name] for name in names)])
        rows = row[None]
        if accelerator.num_processes > 1:
            gathered = accelerator.gather(rows)
            assert isinstance(gathered, Tensor)
            rows = gathered
        means = (rows[:, 3:].sum(0) / rows[:, 0].sum()).tolist()
        metrics = dict(zip(names, means, strict=True))
        del metrics["ratio"]
        ends = {"ratio_min": rows[:, 1].min().item(), "ratio_max": rows[:, 2].max().item()}
        return {**metrics, **ends}
