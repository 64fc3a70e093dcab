"""A run that is stopped, killed or extended continues as if it had never stopped, bitwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rescore.algorithms.egspo import Egspo
from rescore.models.finetune import Lora
from rescore.rewards.reward import RewardError
from rescore.training import checkpoint
from rescore.training.checkpoint import CheckpointError
from rescore.training.directory import Origin, read_run
from rescore.training.log import MetricsFile
from rescore.training.loop import Interrupted
from rescore.training.optim import Optim
from rescore.training.run import Evaluate, Run
from rescore.training.session import start
from rescore.training.world import load_state
from rescore.types import Prompts
from tiny import (
    MlpBase,
    TransformerBase,
    assert_same_run,
    in_training,
    last_checkpoint,
    masked_policy,
    rows,
    solved,
    tiny_run,
    tiny_world,
)

pytestmark = pytest.mark.usefixtures("undrawn")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"ema": 0.8},
    "adapters": {
        "base": TransformerBase(),
        "lora": Lora(rank=2, alpha=4),
        "algorithm": Egspo(n_steps=2, beta=0.05),
    },
    "off-policy": {
        "algorithm": Egspo(n_steps=2, selection="importance", beta=0.05, kl="exact"),
        "optim": Optim(epochs=2, mini_batches=2, micro_batch=7, weight_decay=0.01),
        "ema": 0.5,
        "precision": "float32",
    },
}


def session(run: Run, out: Path, *, resume: bool = False) -> Path:
    return start(run, Origin(recipe="tiny", arguments=()), out, resume=resume)


def acting(run: Run, step: int, action: Callable[[int], Any]) -> Run:
    """The same run by name, but ``action`` judges a step; it is told how many outputs there are."""
    plain = run.task.reward.functions["matches"]

    def act(outputs: Tensor, prompts: Prompts) -> Any:
        if in_training(prompts) and int(prompts.sample_id[0]) // run.batch_size == step:
            return action(len(outputs))
        return plain(outputs, prompts)

    act.__module__, act.__qualname__ = "tiny", "matches"
    functions = {"matches": act, "solved": solved}
    return replace(run, task=replace(run.task, functions=functions))


class Killed(BaseException):
    """Ends a run where it is: nothing is saved on the way out."""


def kill(n: int) -> None:
    raise Killed


def staircase(n: int) -> Tensor:
    """Rewards from 0 to nearly 1."""
    return torch.arange(n) / n


def interrupt(n: int) -> Tensor:
    """Ctrl-C while the samples of a batch are judged, which goes on to the end."""
    os.kill(os.getpid(), signal.SIGINT)
    return staircase(n)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of the uninterrupted run of a variant, made once."""
    made: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("straight") / variant
            session(tiny_run(**VARIANTS[variant]), made[variant])
        return made[variant]

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_resumes_bitwise(variant, straight, tmp_path):
    """Killed in step 3 with the checkpoint of step 2 on disk: weights, optimiser and rows."""
    run = tiny_run(**VARIANTS[variant])
    with pytest.raises(Killed):
        session(acting(run, 3, kill), tmp_path / "killed")
    assert last_checkpoint(tmp_path / "killed").step == 2
    assert len(rows(tmp_path / "killed" / "metrics.jsonl")) == 3
    session(run, tmp_path / "killed", resume=True)
    assert_same_run(straight(variant), tmp_path / "killed")
    assert results(straight(variant)) == results(tmp_path / "killed")


def test_a_run_killed_in_its_first_step_evaluates_the_base_once(straight, tmp_path):
    """The checkpoint of step 0 has been evaluated already."""
    with pytest.raises(Killed):
        session(acting(tiny_run(), 0, kill), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").step == 0
    session(tiny_run(), tmp_path / "run", resume=True)
    assert_same_run(straight("plain"), tmp_path / "run")


def results(out: Path) -> dict[str, Any]:
    """The table at the end, without clocks, and the film."""
    result = json.loads((out / "result.json").read_text())
    for row in result["rows"]:
        row.pop("cpu_s")
    return {**result, "film": (out / "samples" / "film.json").read_text()}


def test_the_runs_compared_are_worth_comparing(straight):
    """Weights move, the average lags behind, adapters train alone; all variants differ."""
    saved = {variant: last_checkpoint(straight(variant)) for variant in VARIANTS}
    base = dict(tiny_world(tiny_run()).module.named_parameters())
    plain = saved["plain"].tensors
    assert all(not torch.equal(base[name], tensor) for name, tensor in plain["model"].items())
    average = saved["average"].tensors
    assert average["ema"]["n_updates"] == 4
    assert all(not torch.equal(average["ema"][n], t) for n, t in average["model"].items())
    assert all(".lora_" in name for name in saved["adapters"].tensors["model"])
    assert saved["off-policy"].state["updates"]["done"] == 4 * 4
    assert json.dumps(rows(straight("plain") / "metrics.jsonl")) != json.dumps(
        rows(straight("off-policy") / "metrics.jsonl")
    )


@pytest.mark.parametrize("variant", ["plain", "off-policy"])
def test_a_run_that_is_extended_equals_the_longer_one(variant, straight, tmp_path):
    """Two steps, then ``steps`` raised to four: an end is no different from a middle."""
    run = tiny_run(**VARIANTS[variant])
    session(replace(run, steps=2), tmp_path / "run")
    session(run, tmp_path / "run", resume=True)
    assert_same_run(straight(variant), tmp_path / "run")
    assert read_run(tmp_path / "run")["config"]["steps"] == 4


def test_extending_between_evaluations_adds_one_row_and_changes_no_weight(straight, tmp_path):
    """A run of 3 steps evaluates at its end, which a run of 4 does not."""
    session(tiny_run(steps=3), tmp_path / "run")
    session(tiny_run(), tmp_path / "run", resume=True)
    long, extended = last_checkpoint(straight("plain")), last_checkpoint(tmp_path / "run")
    for name, tensor in long.tensors["model"].items():
        assert torch.equal(tensor, extended.tensors["model"][name])
    assert rows(straight("plain") / "metrics.jsonl") == rows(tmp_path / "run" / "metrics.jsonl")
    evaluated = [row["step"] for row in rows(tmp_path / "run" / "evaluations.jsonl")]
    assert evaluated == [0, 2, 3, 4]


def test_a_kill_between_an_evaluation_and_its_checkpoint(straight, tmp_path):
    """Rows that are later than the checkpoint are cut, and so is a torn line; they come again."""
    out = tmp_path / "run"
    shutil.copytree(straight("plain"), out)
    shutil.rmtree(out / "checkpoints" / "00000004")
    for name in ("result.json", "report.html"):
        (out / name).unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    assert [row["step"] for row in rows(out / "evaluations.jsonl")] == [0, 2, 4]
    session(tiny_run(), out, resume=True)
    assert_same_run(straight("plain"), out)
    assert results(straight("plain")) == results(out)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(straight, tmp_path):
    """Killed during pre-training or the first evaluation: nothing was done that could be lost."""
    out = tmp_path / "run"
    shutil.copytree(straight("plain"), out)
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.jsonl").write_text("")
    session(tiny_run(), out, resume=True)
    assert_same_run(straight("plain"), out)


def test_a_run_that_lost_its_checkpoints_is_refused(straight, tmp_path):
    """Its metrics say that steps were done; they are not repeated behind the user's back."""
    out = tmp_path / "run"
    shutil.copytree(straight("plain"), out)
    shutil.rmtree(out / "checkpoints")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="lost its checkpoints"):
        session(tiny_run(), out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_truncated_checkpoint_is_refused_and_nothing_is_lost(straight, tmp_path):
    """The message names the file, the sizes and the way out, which works."""
    out = tmp_path / "run"
    shutil.copytree(straight("plain"), out)
    model = out / "checkpoints" / "00000004" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    metrics = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes.*step 2"):
        session(tiny_run(steps=6), out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(model.parent)
    session(tiny_run(), out, resume=True)
    assert_same_run(straight("plain"), out)


def test_a_finished_run_may_be_resumed(straight, tmp_path):
    """Nothing is trained; the table is made again, the same."""
    out = tmp_path / "run"
    shutil.copytree(straight("average"), out)
    (out / "result.json").unlink()
    session(tiny_run(**VARIANTS["average"]), out, resume=True)
    assert_same_run(straight("average"), out)
    assert results(straight("average")) == results(out)


class OtherBase(MlpBase):
    """Like the base of the run in name and shape, but not in its weights."""

    __module__, __qualname__ = "tiny", "MlpBase"

    def build(self, *args: Any, seed: int, **kwargs: Any) -> nn.Module:
        return super().build(*args, seed=seed + 1, **kwargs)


def test_another_base_under_the_same_name_is_refused(straight, tmp_path):
    """With adapters or a KL, the reference would be another one."""
    out = tmp_path / "run"
    shutil.copytree(straight("plain"), out)
    before = (out / "run.json").read_bytes(), (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="base model differs.*sha256"):
        session(tiny_run(base=OtherBase(), steps=6), out, resume=True)
    assert before == ((out / "run.json").read_bytes(), (out / "metrics.jsonl").read_bytes())


def test_a_checkpoint_of_another_model_is_refused(straight):
    """The names of parameters that differ are said."""
    world = tiny_world(tiny_run(base=TransformerBase()))
    with pytest.raises(CheckpointError, match="checkpoint is of another model: '"):
        load_state(world, straight("plain") / "checkpoints", 4)


def test_the_counters_of_a_run_come_back(straight):
    world = tiny_world(tiny_run())
    load_state(world, straight("plain") / "checkpoints", 4)
    assert world.state.step == 4
    assert world.state.samples == 64
    assert world.state.elapsed_s >= world.state.cpu_s > 0
    assert world.updater.counts.done == 4


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path):
    """Stopped in step 1: the checkpoint of step 2 is there although none was due; so it goes on."""
    run = acting(tiny_run(save_every=3, evaluate=Evaluate(every=3, n=6, n_test=6)), 1, interrupt)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="saved at step 2 of 4"):
        session(run, tmp_path / "run")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert last_checkpoint(tmp_path / "run").step == 2
    quiet = acting(run, 1, staircase)
    session(quiet, tmp_path / "run", resume=True)
    session(quiet, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_ctrl_c_in_the_last_step_finishes_the_run(tmp_path):
    """There is nothing left to stop."""
    report = session(acting(tiny_run(), 3, interrupt), tmp_path / "run")
    assert report.exists()
    assert last_checkpoint(tmp_path / "run").step == 4


def two_columns(n: int) -> Tensor:
    return torch.zeros(n, 2)


def not_a_number(n: int) -> Tensor:
    return torch.full((n,), torch.nan)


def raising(n: int) -> Tensor:
    raise ZeroDivisionError("no board")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (two_columns, r"'matches' returned shape \((\d+), 2\); expected \(\1,\)"),
        (not_a_number, r"'matches' returned nan for sample 0 \(sample_id (48|49|50|51)"),
        (raising, "'matches' raised ZeroDivisionError: no board"),
    ],
)
def test_a_reward_that_breaks_leaves_the_last_finished_step(action, message, straight, tmp_path):
    """It is saved although no checkpoint was due; with the reward mended the run is the same."""
    run = tiny_run()
    with pytest.raises(RewardError, match=message):
        session(acting(run, 3, action), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 3
    session(run, tmp_path / "run", resume=True)
    assert_same_run(straight("plain"), tmp_path / "run")


def test_rows_say_what_they_are(straight):
    """The names of the metrics and of the evaluations, which the report and the README quote."""
    metrics = rows(straight("adapters") / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[0].keys() == {
        *("step", "samples", "reward", "matches", "solved", "zero_variance_groups", "entropy"),
        *("loss", "gradient_norm", "skipped_updates", "impossible", "kl_old_new", "kl_new_ref"),
        "network_rows",
        *("clip_fraction", "ratio_min", "ratio_max"),
    }
    assert metrics[0]["kl_new_ref"] == pytest.approx(0, abs=1e-12)
    assert metrics[3]["kl_new_ref"] > 1e-6
    evaluations = rows(straight("average") / "evaluations.jsonl")
    assert [(row["step"], row["weights"]) for row in evaluations] == [
        (0, "base"),
        (2, "trained"),
        (4, "trained"),
    ]
    assert all(row["split"] == "validation" and row["n"] == 6 for row in evaluations)
    assert evaluations[0]["metrics"].keys() == {"reward", "matches", "solved"}
    assert evaluations[0]["metrics"]["reward"].keys() == {"mean", "se"}


def test_an_output_directory_that_cannot_be_used_is_refused(tmp_path):
    """Not empty, or below a regular file; nothing in it is touched."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        session(tiny_run(), tmp_path)
    with pytest.raises(ValueError, match="file is a file; choose another directory"):
        session(tiny_run(), tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_the_directory_of_a_run(straight):
    """All files of a finished run, no left-overs."""
    names = {path.name for path in straight("plain").iterdir()}
    assert names == {
        *("run.json", "environment.json", "metrics.jsonl", "evaluations.jsonl"),
        *("checkpoints", "samples", "result.json", "report.html"),
    }


def test_adapters_leave_the_base_alone(straight):
    """After training, the network without its adapters is the base, bitwise."""
    run = tiny_run(**VARIANTS["adapters"])
    world = tiny_world(run)
    assert world.models.ref is not None
    prompts = run.task.prompts("train", torch.arange(6))
    assert isinstance(prompts, Prompts)
    x_t = prompts.tokens
    with torch.no_grad():
        base = masked_policy(world.models.new).denoiser.predict(x_t)
        load_state(world, straight("adapters") / "checkpoints", 4)
        assert torch.equal(masked_policy(world.models.ref).denoiser.predict(x_t), base)
        assert not torch.equal(masked_policy(world.models.new).denoiser.predict(x_t), base)
    frozen = {n: p for n, p in world.module.named_parameters() if not p.requires_grad}
    fresh = dict(tiny_world(run).module.named_parameters())
    assert frozen
    assert all(torch.equal(p, fresh[name]) for name, p in frozen.items())


def test_metrics_files_of_both_kinds_are_cut(tmp_path):
    """What ``start`` relies on: cutting after -1 empties a file."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log({"step": 0})
    file.truncate_after(-1)
    assert rows(tmp_path / "metrics.jsonl") == []
