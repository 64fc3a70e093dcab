"""A run from beginning to end: directory, base, loop, and the table at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from rich.console import Console as Terminal
from torch import Tensor, nn

from rescore.evaluation.film import film_strip
from rescore.evaluation.metrics import summarise
from rescore.evaluation.plots import sheet
from rescore.evaluation.report import build_report
from rescore.models.finetune import reference
from rescore.sampling.decoder import Decoding
from rescore.sampling.policy import Policy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import ContinuousTask, Split, TokenTask
from rescore.training import checkpoint
from rescore.training.checkpoint import CheckpointError, write_atomic, write_json
from rescore.training.directory import Origin, check_same, default_cache, describe_directory
from rescore.training.log import Console, MetricsFile, read
from rescore.training.loop import EVALUATION_SEED, evaluate_split, train
from rescore.training.run import Precision, Run
from rescore.training.world import (
    World,
    accelerator_for,
    as_network,
    build,
    load_state,
    load_weights,
    policy_with,
)

SHEET = 32
"""Images in a sheet of samples in the report."""
SAMPLED = Path("samples") / "sampled.png"
"""Where ``rescore sample`` puts pictures, in the run directory, if nothing else is said."""


def start(run: Run, origin: Origin, out: Path, *, resume: bool) -> Path:
    """Train ``run`` in the directory ``out``, or continue it there; returns the report.

    Raises:
        ValueError: the run, the directory or the checkpoint is not usable; nothing was written.
        Interrupted, RewardError, TrainingError, StorageError: as ``loop.train``.
    """
    run.check()
    accelerator = accelerator_for(run)
    groups = run.batch_size // run.group_size
    if groups % accelerator.num_processes:
        raise ValueError(
            f"{groups} groups (batch_size / group_size) cannot be shared by "
            f"{accelerator.num_processes} processes; groups stay whole, so use a multiple"
        )
    if run.evaluate.control and accelerator.num_processes > 1:
        raise ValueError("evaluate.control is timed, so it takes one process; turn it off")
    step = None
    if resume:
        check_same(out, run)
        step = checkpoint.latest(out / "checkpoints")
        if step is None and (out / "metrics.jsonl").exists() and read(out / "metrics.jsonl"):
            raise CheckpointError(f"{out} has lost its checkpoints; start the run anew elsewhere")
    elif accelerator.is_main_process:
        checkpoint.claim(out)
    accelerator.wait_for_everyone()

    main = accelerator.is_main_process
    with Console(origin.recipe, run.steps, enabled=main) as console:
        module = build_base(run, accelerator, console.note)
        digest = weights_digest(module)
        world = build(run, module, accelerator)
        if main and not resume:
            describe_directory(out, run, origin)
        if step is not None:
            load_state(world, out / "checkpoints", step)
        if world.state.base_sha256 not in (None, digest):
            raise CheckpointError(
                f"the base model differs from the one this run started from (sha256 {digest[:12]}, "
                f"expected {str(world.state.base_sha256)[:12]}); restore it to resume"
            )
        world.state.base_sha256 = digest
        if resume:  # without a checkpoint: the run was stopped before its first one
            if main:
                describe_directory(out, run, origin)
                for name in ("metrics.jsonl", "evaluations.jsonl"):
                    MetricsFile(out / name).truncate_after(-1 if step is None else step)
            console.note(f"resumed from step {world.state.step}")
        accelerator.wait_for_everyone()
        train(world, out, console)
        finish(world, origin, out, console)
    report = out / "report.html"
    if main:
        build_report(out)
    return report


def build_base(run: Run, accelerator: Accelerator, note: Callable[[str], None]) -> nn.Module:
    """The base network; the main process goes first, so that others find it in the cache."""
    with accelerator.main_process_first():
        return run.base.build(
            run.task, seed=run.seed, cache=default_cache(), device=accelerator.device, note=note
        )


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + plain.numpy().tobytes())
    return digest.hexdigest()


def finish(world: World, origin: Origin, out: Path, console: Console) -> None:
    """Evaluate the best checkpoint and the base on the test split; write the table and the film."""
    run = world.run
    load_best(world, out / "checkpoints")
    best = world.models.new
    if run.lora is not None:
        base = policy_with(reference(world.module), run)
    else:
        module = build_base(run, world.accelerator, console.note)
        base = policy_with(as_network(module, run), run)
    rows: list[dict[str, Any]] = []

    def assess(label: str, policy: Policy, cpu_s: float | None) -> dict[str, Tensor]:
        values = evaluate_split(world, "test", run.evaluate.n_test, policy=policy)
        rows.append({"label": label, "metrics": summarise(values), "cpu_s": cpu_s})
        return values

    before = assess("base", base, None)
    if run.evaluate.control:
        clock = time.process_time()
        longer = run.base.continued(
            build_base(run, world.accelerator, console.note),
            run.task,
            seed=run.seed,
            cpu_s=world.state.cpu_s,
            note=console.note,
        )
        seconds = time.process_time() - clock
        control = policy_with(as_network(longer, run), run)
        assess("base, further pre-trained for as long", control, seconds)
    after = assess(f"after RL ({origin.recipe})", best, world.state.cpu_s)
    if world.accelerator.is_main_process:
        result = {
            "n": len(after["reward"]),
            "split": "test",
            "protocol": str(run.decoder),
            "best_step": world.state.best_step,
            "headline": run.evaluate.by,
            "rows": rows,
        }
        write_json(out / "result.json", result)
        changed = (before[run.evaluate.by] != after[run.evaluate.by]).nonzero()
        number = int(changed[0]) if len(changed) else 0
        write_samples(world, base, best, number, out)
        for row in rows:
            console.note(result_line(row))


def load_best(world: World, directory: Path) -> None:
    """Give the module the best weights on validation: the averaged ones, if the run averages."""
    assert world.state.best_step is not None
    saved = checkpoint.load(directory, world.state.best_step, world.accelerator.device)
    tensors = dict(saved.tensors["model"])
    if "ema" in saved.tensors:
        tensors |= {n: t.to(tensors[n]) for n, t in saved.tensors["ema"].items() if n in tensors}
    load_weights(world.module, tensors)


def write_samples(world: World, base: Policy, best: Policy, number: int, out: Path) -> None:
    """What the report shows of samples before and after, on the same noise.

    Tokens: a film of the test prompt ``number``, if it has a gold output. Images: a sheet of the
    first test prompts.
    """
    task, device = world.run.task, world.accelerator.device
    seed = world.run.seed ^ EVALUATION_SEED["test"]
    index = torch.tensor([number])
    if isinstance(task, TokenTask) and task.gold(task.prompts("test", index)) is not None:
        (out / "samples").mkdir(exist_ok=True)
        with world.autocast():
            strips = [
                film_strip(policy, task, "test", number, seed=seed, label=label, device=device)
                for label, policy in (("before", base), ("after", best))
            ]
        title = f"Test prompt {number}, the first whose {world.run.evaluate.by} changed"
        film = {
            "title": f"{title}; {world.run.decoder}",
            "puzzle": dataclasses.asdict(task.layout),
            "strips": strips,
        }
        write_json(out / "samples" / "film.json", film)
    if isinstance(task, ContinuousTask):
        rows = torch.arange(min(SHEET, task.size("test")), device=device)
        prompts = task.prompts("test", rows.cpu()).to(device)
        for label, policy in (("before", base), ("after", best)):
            with world.autocast():
                sampled = policy.sample(prompts, Record(), SampleRng(seed, rows)).x_0
            images = task.pictures(policy.finished(sampled))
            if images is not None:
                write_sheet(images, out / "samples" / f"{label}.png")


def write_sheet(images: Float[Tensor, "n C H W"], path: Path) -> None:
    """Images as a PNG file, up to eight in a row; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sheet(images, columns=min(8, len(images))))


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How to load the best checkpoint of a run."""

    device: str
    """A torch device: cpu, cuda, cuda:1."""
    precision: Precision
    """Of the network."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Loading):
    """How to evaluate the best checkpoint of a run."""

    decoder: Decoding
    """How it is sampled."""
    seed: int
    """Of the noise."""
    split: Split = "test"
    """Of the task."""
    n: int = 512
    """Prompts, one sample each."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")


@dataclass(frozen=True, kw_only=True)
class Sampling(Evaluation):
    """What to sample from the best checkpoint of a run."""

    n: int = 2
    """How many samples, of the first prompts of the split, if none are given; from the first one
    again where the split ends."""
    prompts: tuple[str, ...] = ()
    """Prompts as text, such as 16-character Sudokus."""
    out: Path | None = None
    """PNG file for samples that are pictures; default samples/sampled.png in the run directory."""


def evaluate_run(run: Run, directory: Path, options: Evaluation) -> dict[str, Any]:
    """Means and standard errors of a run's best checkpoint, as a row of the table.

    Args:
        run: as built from the directory's recipe and options.
        directory: the run directory.
        options: the run's own seed and decoder give the numbers of its table.

    Raises:
        ValueError: the device cannot be used, or the directory has no usable checkpoint.
    """
    world = best_world(run, directory, options, options.decoder)
    world.run = dataclasses.replace(world.run, seed=options.seed)
    values = evaluate_split(world, options.split, options.n)
    label = f"{directory}, {options.split}, {options.decoder}"
    return {"label": label, "metrics": summarise(values)}


def sample_run(run: Run, directory: Path, options: Sampling) -> list[str]:
    """Prompt, reward terms and output of a run's best checkpoint as text, one entry per prompt.

    Samples that are pictures also go, in order, into a PNG file, which the last entry names.

    Raises:
        ValueError: as ``evaluate_run``; a given prompt is not valid; or there are no pictures to
            write where the options say.
    """
    task = run.task
    if options.prompts:
        prompts = task.read(options.prompts)
    else:
        prompts = task.prompts(options.split, torch.arange(options.n) % task.size(options.split))
    world = best_world(run, directory, options, options.decoder)
    prompts = prompts.to(world.accelerator.device)
    with world.autocast():
        rng = SampleRng(options.seed, prompts.sample_id)
        sampled = world.models.new.sample(prompts, Record(), rng).x_0
    outputs = world.models.new.finished(sampled)
    images = task.pictures(outputs) if isinstance(task, ContinuousTask) else None
    if images is None and options.out is not None:
        raise ValueError(f"samples of this run are no pictures to write to {options.out}")
    terms = task.reward.terms(outputs, prompts)
    entries = [
        "\n".join(
            [
                task.show_prompt(prompts, i),
                ", ".join(f"{name} {value[i].item():.2f}" for name, value in terms.items()) + ":",
                task.show(outputs[i]),
            ]
        )
        for i in range(prompts.n_samples)
    ]
    if images is None:
        return entries
    path = options.out or directory / SAMPLED
    write_sheet(images, path)
    return [*entries, f"pictures: {path}"]


def best_world(run: Run, directory: Path, options: Loading, decoder: Decoding) -> World:
    """The world of a run with its best weights, to be used with a decoder.

    Raises:
        ValueError: the device cannot be used, or the directory has no usable checkpoint.
    """
    run = dataclasses.replace(run, device=options.device, precision=options.precision, ema=0.0)
    run.check()
    step = checkpoint.latest(directory / "checkpoints")
    if step is None:
        raise CheckpointError(f"{directory} has no complete checkpoint")
    accelerator = accelerator_for(run)
    note = Console(str(directory), run.steps, terminal=Terminal(stderr=True)).note
    module = build_base(run, accelerator, note)
    digest = weights_digest(module)
    world = build(run, module, accelerator)
    saved = checkpoint.load(directory / "checkpoints", step).state["train"]
    if run.lora is not None and saved["base_sha256"] != digest:
        raise CheckpointError(
            f"the adapters of {directory} belong to another base (sha256 {digest[:12]}, expected "
            f"{saved['base_sha256'][:12]}); restore that base to use them"
        )
    world.run = dataclasses.replace(run, decoder=decoder)  # which need not suit the algorithm
    policy = policy_with(as_network(module, world.run), world.run)
    world.models = dataclasses.replace(world.models, new=policy)
    world.state.best_step = saved["best_step"]
    load_best(world, directory / "checkpoints")
    return world


def result_line(row: dict[str, Any]) -> str:
    """One row of the table as a line of text."""
    metrics = row["metrics"].items()
    return f"{row['label']}: " + "  ".join(
        f"{n} {m['mean']:.3f} ± {m['se']:.3f}" for n, m in metrics
    )
