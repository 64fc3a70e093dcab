"""The loop, once: sample, score, credit, update, log, evaluate, checkpoint; on one process or many.

Every process builds the prompts of the whole batch and samples its own share of the groups; the
scored batch is then gathered, so credit sees all of it, and every process takes every W-th
(sample, step) pair. Randomness is per sample and the loss a plain weighted sum, so the result does
not depend on the number of processes or on the micro-batch size.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.evaluation.metrics import evaluate, summarise
from rescore.objectives.advantages import zero_variance
from rescore.rewards.reward import RewardError
from rescore.sampling.policy import Policy
from rescore.tasks.task import Split
from rescore.training.log import Console, MetricsFile, Sink, TensorBoard
from rescore.training.rollout import probe, rollout
from rescore.training.update import update
from rescore.training.world import TrainState, World, save_state
from rescore.types import MaskedTrajectory, Scored

EVALUATION_SEED: dict[Split, int] = {"train": 0x7EA1, "validation": 0x7A11, "test": 0x5EED}
"""Mixed into the run's seed: evaluation noise is not training noise, and where prompts are all
alike, checkpoints are not chosen on the very samples that they are tested on."""

SAME_REQUEST_S = 1.0
"""Seconds within which repeated signals to stop count as one."""


class Interrupted(Exception):
    """The user asked to stop; the run is saved."""


def train(world: World, out: Path, console: Console) -> None:
    """Run the loop from the state the world is in to ``run.steps``, in the run directory ``out``.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run is saved.
        RewardError: a reward failed; the run is saved as of the last finished step.
        TrainingError: the probe failed, or too many updates were not finite.
        StorageError: the disk refused; earlier checkpoints are intact.
    """
    run, state, main = world.run, world.state, world.accelerator.is_main_process
    sinks: list[Sink] = [MetricsFile(out / "metrics.jsonl")] if main else []
    if main and run.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard", start=state.step))
    evaluations = MetricsFile(out / "evaluations.jsonl") if main else None
    started, probed, saved = time.perf_counter() - state.elapsed_s, False, state.step

    def assess() -> None:
        clock = time.perf_counter()
        values = evaluate_split(world, "validation", run.evaluate.n)
        summary = summarise(values)
        value = summary[run.evaluate.by]["mean"]
        if state.best_value is None or value > state.best_value:
            state.best_step, state.best_value = state.step, value
        row = {
            "step": state.step,
            "split": "validation",
            "weights": "base" if state.step == 0 else "trained",
            "n": len(values["reward"]),
            "metrics": summary,
            "time_s": time.perf_counter() - clock,
        }
        if evaluations is not None:
            evaluations.log(row)
        console.evaluation({name: m["mean"] for name, m in summary.items()})

    def save() -> None:
        nonlocal saved
        if main:
            save_state(world, out / "checkpoints")
        world.accelerator.wait_for_everyone()
        saved = state.step

    if state.best_step is None:  # a new run, and not one that continues from its first checkpoint
        assess()
        save()
    console.start_at(state.step)
    with ExitStack() as stack:
        stopping = stack.enter_context(graceful_stop())
        for sink in sinks:
            stack.callback(sink.close)
        while state.step < run.steps:
            clock, cpu = time.perf_counter(), time.process_time()
            rows = world.network_rows()
            with world.at(state.step):
                try:
                    scored, times = rollout(world, state.step)
                except RewardError:
                    if saved != state.step:
                        save()
                    raise
                rows = world.network_rows() - rows
                credited = world.run.algorithm.credit(scored)
                gap = None if probed else probe(world, credited)
                if gap is not None:
                    console.note(f"ratio probe: {gap:.1e} nat per step")
                    probed = True
                fitted = world.run.algorithm.fit(world.models, credited)
                update_clock = time.perf_counter()
                rows -= world.network_rows()  # of the probe, which not every step makes
                metrics = update(world, credited, state.step)
            metrics["network_rows"] = world.over_all(rows + world.network_rows())
            state.step += 1
            state.samples += run.batch_size
            state.cpu_s += time.process_time() - cpu
            state.elapsed_s = time.perf_counter() - started
            seconds = time.perf_counter() - clock
            times["time/update_s"] = time.perf_counter() - update_clock
            times["time/step_s"] = seconds
            times["time/elapsed_s"] = state.elapsed_s
            row = {
                "step": state.step,
                **rollout_metrics(scored),
                **fitted,
                **metrics,
                "samples": state.samples,
                "skipped_updates": world.updater.counts.skipped,
                **{name: value for name, value in times.items() if name.startswith("time/")},
                "time/samples_per_s": run.batch_size / seconds,
            }
            for sink in sinks:
                sink.log(row)
            console.update(state.step, row)
            last, stop = state.step == run.steps, world.anywhere(stopping())
            if last or state.step % run.evaluate.every == 0:
                assess()
            if last or stop or state.step % run.save_every == 0 or is_best(state):
                save()
            if stop and not last:
                raise Interrupted(f"saved at step {state.step} of {run.steps}")


def is_best(state: TrainState) -> bool:
    """True if the step just evaluated is the best so far, whose weights must be kept."""
    return state.best_step == state.step


def rollout_metrics(scored: Scored) -> dict[str, float]:
    """What a rollout earned, and how spread out it was."""
    trajectory = scored.trajectory
    metrics = {"reward": scored.reward.mean(), **{n: v.mean() for n, v in scored.terms.items()}}
    equal = zero_variance(scored.reward[:, None], trajectory.prompts.group)
    metrics["zero_variance_groups"] = equal.double().mean()
    if isinstance(trajectory, MaskedTrajectory) and trajectory.entropy is not None:
        metrics["entropy"] = trajectory.entropy.sum(1).mean()
    if scored.completion_terms:
        counted = scored.step_weight != 0
        completion = torch.stack(list(scored.completion_terms.values())).sum(0)[counted]
        finished = scored.reward[:, None].expand_as(counted)[counted].to(completion)
        metrics["completion_reward"] = completion.mean()
        metrics["completion_correlation"] = correlation(completion, finished)
    names = list(metrics)
    values = torch.stack([metrics[name].double() for name in names]).tolist()
    return dict(zip(names, values, strict=True))


def correlation(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Pearson's; 0 where one of the two does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return (x * y).sum() / (x.norm() * y.norm()).clamp_min(torch.finfo(x.dtype).tiny)


def evaluate_split(
    world: World, split: Split, n: int, *, policy: Policy | None = None
) -> dict[str, Tensor]:
    """Per-sample terms on the first ``n`` prompts of a split, each process doing its share.

    Args:
        world: whose averaged weights are evaluated, unless ``policy`` is given.
        split: of the task.
        n: prompts, if the split has so many.
        policy: evaluate this one instead.
    """
    run, accelerator = world.run, world.accelerator
    index = torch.arange(min(n, run.task.size(split)))
    mine = index[accelerator.process_index :: accelerator.num_processes]
    own = world.models.new if policy is None else policy
    values, failure = {}, None
    with world.averaged() if policy is None else nullcontext(), world.autocast():
        try:
            values = evaluate(
                own,
                run.task,
                split,
                mine,
                seed=run.seed ^ EVALUATION_SEED[split],
                device=accelerator.device,
            )
        except RewardError as error:
            failure = error
    if world.anywhere(failure is not None):
        raise failure or RewardError("a reward failed on another process, which says more")
    if accelerator.num_processes == 1:
        return values
    width = math.ceil(len(index) / accelerator.num_processes)

    def all_ranks(value: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(value, (0, width - len(value)))
        gathered = accelerator.gather(padded)
        assert isinstance(gathered, Tensor)
        return gathered.view(-1, width).T.flatten()[: len(index)]

    return {name: all_ranks(value) for name, value in values.items()}


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came; a second Ctrl-C stops at once.

    A second signal within ``SAME_REQUEST_S`` is the same request: under torchrun, Ctrl-C reaches
    every process twice, from the terminal and from the launcher.
    """
    asked = math.inf

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if time.monotonic() > asked + SAME_REQUEST_S:
            raise KeyboardInterrupt
        asked = min(asked, time.monotonic())

    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked < math.inf
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
