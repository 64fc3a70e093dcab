"""From prompts to a scored batch, gathered from all processes, and the probe of its replay."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from rescore.processes.gaussian import TwoStep
from rescore.rewards.reward import RewardError
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.rng import SampleRng
from rescore.training.optim import TrainingError
from rescore.training.run import Run
from rescore.training.world import World
from rescore.types import (
    Actions,
    Credited,
    Given,
    MaskedTrajectory,
    Scored,
    Selected,
    TokenTrajectory,
)

PROBE_TOLERANCE = {
    "float32": (1e-5, 1e-5),
    "float64": (1e-12, 1e-12),
    "bfloat16": (0.05, 1.0),
}
"""Mean and largest difference allowed, in nats per action, between recorded and replayed
log-probabilities. In bfloat16 neighbouring logits near 20 are 0.125 apart, so single steps may
differ by that; a systematic difference shows in the mean. Steps of continuous samples: times
the root of the dimensions."""
PROBE_ROWS = 512
"""Actions replayed by the probe."""


def prompt_index(seed: int, step: int, n: int, size: int) -> Tensor:
    """Prompt numbers of a step, Int[n]: without repeats until all ``size`` were used. Pure."""
    place = torch.arange(step * n, (step + 1) * n)
    epochs = torch.div(place, size, rounding_mode="floor")
    index = torch.empty_like(place)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        index[inside] = permutation(size, (seed, 0, epoch))[place[inside] % size]
    return index


def permutation(n: int, key: tuple[int, ...]) -> Int[Tensor, " n"]:
    """The numbers below n in an order that is a pure function of the key, of all its bits.

    ``torch.Generator.manual_seed`` would look at 32 of them only.
    """
    return torch.from_numpy(np.random.default_rng(key).permutation(n))


def batch_prompts(run: Run, step: int) -> Given:
    """The prompts of a step, each ``group_size`` times; a pure function of (seed, step)."""
    n = run.batch_size // run.group_size
    index = prompt_index(run.seed, step, n, run.task.size("train"))
    prompts = run.task.prompts("train", index.repeat_interleave(run.group_size))
    group = torch.arange(n).repeat_interleave(run.group_size)
    sample_id = step * run.batch_size + torch.arange(run.batch_size)
    return dataclasses.replace(prompts, group=group, sample_id=sample_id)


def rollout(world: World, step: int) -> tuple[Scored, dict[str, float]]:
    """Sample, select, score, annotate and gather one batch; also the seconds each part took.

    The seconds are wall (``time/...``) and CPU (``cpu/...``).

    Raises:
        RewardError: a reward failed, on this process or on another one.
    """
    run, accelerator = world.run, world.accelerator
    clock = [(time.perf_counter(), time.process_time())]
    prompts = batch_prompts(run, step)
    share = run.batch_size // accelerator.num_processes
    first = accelerator.process_index * share
    prompts = prompts.take(torch.arange(first, first + share)).to(accelerator.device)
    rng = SampleRng(run.seed, prompts.sample_id)
    with world.autocast():
        trajectory = world.models.new.sample(prompts, run.algorithm.record, rng)
        selected = run.algorithm.select(world.models, trajectory)
    clock.append((time.perf_counter(), time.process_time()))
    if world.anywhere(not bool(trajectory.x_0.isfinite().all())):
        raise TrainingError(
            f"step {step}: the network made samples that are not finite; "
            + ("look at the base model and the decoder" if step == 0 else "")
            + ("start a new run with a lower optim.lr, or in float32" if step > 0 else "")
        )
    scored = score(world, selected)
    clock.append((time.perf_counter(), time.process_time()))
    failure = None
    try:
        with world.autocast():
            scored = run.algorithm.annotate(world.models, scored, rng)
    except RewardError as error:  # of states on the way, which some methods ask about
        failure = error
    if world.anywhere(failure is not None):
        raise failure or RewardError("a reward failed on another process, which says more")
    scored = gather(accelerator, scored)
    if not bool(scored.trajectory.log_prob.isfinite().all()):
        raise TrainingError(
            f"step {step}: the network gave logits that are not finite, so nothing can be sampled; "
            + ("look at the base model and decoder.temperature" if step == 0 else "")
            + ("start a new run with a lower optim.lr, or in float32" if step > 0 else "")
        )
    clock.append((time.perf_counter(), time.process_time()))
    seconds: dict[str, float] = {}
    parts = ("rollout", "reward", "annotate")
    for name, before, after in zip(parts, clock[:-1], clock[1:], strict=True):
        seconds[f"time/{name}_s"] = after[0] - before[0]
        seconds[f"cpu/{name}_s"] = after[1] - before[1]
    return scored, seconds


def score(world: World, selected: Selected) -> Scored:
    """Judge the finished samples and the selected completions; if one process fails, all do.

    Outputs of tokens of a group that are equal are judged once: a completion often is the finished
    sample. Completions in columns of weight 0 are not looked at.
    """
    trajectory, reward = selected.trajectory, world.run.task.reward
    n_samples = len(trajectory.x_0)
    outputs = world.models.new.finished(trajectory.x_0)
    sample = torch.arange(n_samples, device=outputs.device)
    row = number = sample
    counted = selected.step_weight != 0
    if selected.completion is not None:
        of_sample, column = counted.nonzero().unbind(1)
        outputs = torch.cat([outputs, selected.completion[of_sample, column]])
        sample = torch.cat([sample, of_sample])
    if isinstance(trajectory, TokenTrajectory):
        row, number = first_of_each(torch.cat([trajectory.prompts.group[sample, None], outputs], 1))
    judged, failure = {}, None
    try:
        judged = reward.terms(outputs[row], trajectory.prompts.take(sample[row]))
    except RewardError as error:
        failure = error
    if world.anywhere(failure is not None):
        raise failure or RewardError("a reward failed on another process, which says more")
    every = {name: value[number] for name, value in judged.items()}
    terms = {name: value[:n_samples] for name, value in every.items()}
    completion_terms = {}
    if selected.completion is not None:
        for name, value in every.items():
            empty = torch.zeros_like(selected.step_weight)
            of_completions = value[n_samples:].to(empty) * reward.weights.get(name, 1.0)
            completion_terms[name] = empty.masked_scatter(counted, of_completions)
    return Scored(
        **{**selected.fields(), "completion": None},
        reward=reward.total(terms).to(trajectory.log_prob.dtype),
        terms=terms,
        completion_terms=completion_terms,
    )


def first_of_each(names: Int[Tensor, "N C"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " N"]]:
    """The first row of each kind of equal rows, as they came, and the kind of every row."""
    table, number = names.unique(dim=0, return_inverse=True)
    row = torch.full((len(table),), len(names), device=names.device)
    row = row.scatter_reduce(0, number, torch.arange(len(names), device=names.device), "amin")
    order = row.argsort()
    return row[order], order.argsort()[number]


def gather(accelerator: Accelerator, scored: Scored) -> Scored:
    """The scored batch of all processes, on every process, in the order of the whole batch."""
    if accelerator.num_processes == 1:
        return scored

    def all_ranks(tensor: Tensor) -> Tensor:
        if not tensor.numel():  # which not every backend can gather
            n_rows = len(tensor) * accelerator.num_processes
            return tensor.new_empty((n_rows, *tensor.shape[1:]))
        whole = accelerator.gather(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor)
        assert isinstance(whole, Tensor)
        return whole.to(tensor.dtype)

    if not isinstance(scored.trajectory, MaskedTrajectory):
        return scored.map(all_ranks)
    widths = (scored.trajectory.max_revealed, scored.trajectory.max_candidates)
    widest = all_ranks(torch.tensor([widths], device=accelerator.device)).amax(0).tolist()
    whole = scored.map(all_ranks)
    trajectory = dataclasses.replace(
        whole.trajectory, max_revealed=widest[0], max_candidates=widest[1]
    )
    return dataclasses.replace(whole, trajectory=trajectory)


def probe(world: World, credited: Credited) -> float | None:
    """Put actions to the loss before the first update, where every ratio must be 1.

    Rounding grows with the sums that a log-probability is made of, see ``summands``. In bfloat16
    steps of continuous samples are also looked at by ``probe_alike``.

    Returns:
        The largest |log ratio|, nats per step; None if nothing is trained on in this batch.

    Raises:
        TrainingError: it exceeds ``PROBE_TOLERANCE``.
    """
    run, pairs = world.run, credited.pairs()
    if not len(pairs):
        return None
    generator = torch.Generator().manual_seed(run.seed)  # an even stride could miss steps
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:PROBE_ROWS].sort().values]
    parts = pairs.split(run.optim.micro_batch)
    gap = torch.cat([log_ratios(world, credited, part) for part in parts]).nan_to_num(nan=math.inf)
    mean, worst = gap.mean().item(), gap.max().item()
    tolerance = PROBE_TOLERANCE[run.precision]
    if not (mean <= tolerance[0] and worst <= tolerance[1]):
        raise TrainingError(
            f"replayed log-probabilities differ from the recorded ones by {worst:.3g} nat per "
            f"step, {mean:.3g} on average (at most {tolerance[1]:g} and {tolerance[0]:g} in "
            f"{run.precision}), so the ratio would not start at 1; the "
            f"network gives other outputs in training than in sampling: look for dropout, batch "
            f"statistics, other global state, rows that influence each other, or weights that are "
            f"not finite"
        )
    narrow = run.precision == "bfloat16" and run.algorithm.uses_likelihood
    if narrow and isinstance(world.models.new, GaussianPolicy):
        probe_alike(world, world.models.new, credited, pairs)
    return worst


def probe_alike(
    world: World, policy: GaussianPolicy, credited: Credited, pairs: Int[Tensor, "N 2"]
) -> None:
    """Put actions to the loss beside as many others as there were in the sampler's forwards.

    In bfloat16 what a network says of a row depends on how many rows are beside it, by as much as a
    wrong timestep changes it. Beside as many as in sampling it says the same to the last bit, so
    that float32's bound holds and shows mistakes below the rounding. Nothing is demanded where
    kernels give another result when asked again, or where the memory is too small.

    Raises:
        TrainingError: a ratio is too far from 1.
    """
    share = world.run.batch_size // world.accelerator.num_processes
    rows = min(policy.forward_rows, share)
    n = rows // 2 if isinstance(policy.steps, TwoStep) else rows  # which looks at two states
    alike = pairs[pairs[:, 0] % share < share // rows * rows]  # the last forward may be smaller
    if rows not in (n, 2 * n) or not len(alike):
        return
    whole = alike[torch.arange(math.ceil(len(alike) / n) * n) % len(alike)].split(n)
    try:
        gaps = [log_ratios(world, credited, part) for part in (whole[0], *whole)]
    except torch.OutOfMemoryError:
        return
    worst, bound = torch.cat(gaps).max().item(), PROBE_TOLERANCE["float32"][1]
    if torch.equal(gaps[0], gaps[1]) and not worst <= bound:
        raise TrainingError(
            f"replayed log-probabilities differ from the recorded ones by {worst:.3g} nat per step "
            f"and root of the dimensions (at most {bound:g}), in forwards of {rows} rows as in "
            f"sampling, where nothing is rounded in another way: what is computed must differ, "
            f"such as times, guidance, prompts or stored states; if memory ran short in sampling, "
            f"lower forward_rows"
        )


def log_ratios(world: World, credited: Credited, pairs: Int[Tensor, "N 2"]) -> Float[Tensor, " N"]:
    """|log ratio| of a micro-batch, over its ``summands``."""
    actions = credited.actions(pairs)
    rng = SampleRng(world.run.seed, actions.trajectory.prompts.sample_id)
    with world.autocast(), torch.no_grad():
        ratio = world.run.algorithm.loss(world.models, actions, rng).metrics["ratio"]
    return ratio.log().abs() / summands(actions)


def summands(actions: Actions) -> Float[Tensor, " N"]:
    """What to divide a difference of log-probabilities by, so that rounding looks alike.

    The number of tokens written, where the action is a whole sample; else 1, or the square root of
    the dimensions that a Gaussian step sums over.
    """
    one = torch.ones_like(actions.weight)
    if isinstance(actions.trajectory, TokenTrajectory):
        written = actions.trajectory.prompts.editable.sum(1).clamp(min=1)
        return torch.where(actions.step == actions.trajectory.n_steps, written, one)
    return one * math.sqrt(actions.trajectory.x_0[0].numel())
