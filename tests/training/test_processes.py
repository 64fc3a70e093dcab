"""Two processes equal one; a killed, interrupted or full-disked process can be continued.

Run as a script under torchrun, this file does what ``on_every_process`` says.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gaussians import gaussian_run
from rescore.algorithms.egspo import Egspo
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.algorithms.sepo import Sepo
from rescore.models.tiny import MlpDenoiser
from rescore.models.transformer import TransformerConfig
from rescore.rewards.reward import RewardError
from rescore.rewards.text import FACTS, Facts, TextFunction, unpack
from rescore.sampling.decoder import Decoder, GaussianDecoder, RateDecoder
from rescore.tasks.countdown import Countdown
from rescore.tasks.sudoku import Sudoku
from rescore.tasks.task import Task
from rescore.training import checkpoint
from rescore.training.base import Base
from rescore.training.directory import Origin
from rescore.training.log import Console
from rescore.training.loop import Interrupted, evaluate_split, train
from rescore.training.optim import Optim
from rescore.training.rollout import probe, rollout
from rescore.training.run import Evaluate, Run
from rescore.training.session import start
from rescore.training.update import update
from rescore.training.world import World
from rescore.types import Credited, Prompts
from tiny import (
    L,
    Match,
    TransformerBase,
    V,
    assert_same_run,
    last_checkpoint,
    matches,
    rows,
    tiny_run,
    tiny_world,
)

pytestmark = pytest.mark.usefixtures("undrawn")  # here, but not in other processes

TESTS = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS)]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# Two processes ----------------------------------------------------------------------------------


class Spare(MlpDenoiser):
    """Has a parameter that its output does not depend on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class SpareBase(Base):
    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        return Spare(V, L, generator=torch.Generator().manual_seed(seed))


TINY = tiny_run(
    algorithm=Egspo(n_steps=2, beta=0.05),
    optim=Optim(lr=0.05, epochs=2, mini_batches=2, micro_batch=5),
    steps=5,
    ema=0.8,
    evaluate=Evaluate(every=2, n=5, n_test=6),
)
"""Twenty updates, in float64; an odd number of validation prompts."""

SUDOKU = replace(
    TINY,
    task=Sudoku(side=4, blanks=(6, 12)),
    base=TransformerBase(
        config=TransformerConfig(vocab_size=4, length=16, width=32, depth=2, heads=2)
    ),
    decoder=Decoder(steps=4),
    algorithm=Egspo(n_steps=2, beta=0.0),
    optim=Optim(),
    precision="float32",
    batch_size=64,
)


def familiar(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """The share of characters that occur in the gold completion of their own problem."""
    pairs = zip(texts, facts, strict=True)
    return [sum(c in fact["gold"] for c in text) / max(len(text), 1) for text, fact in pairs]


def digits(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """The share of digits."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


@dataclass(frozen=True, kw_only=True)
class Characterful(Countdown):
    """Countdown with rewards that random weights earn a part of."""

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        return {"familiar": familiar, "digits": digits}

    @property
    def default_weights(self) -> Mapping[str, float]:
        return {"familiar": 1.0, "digits": 0.25}


COUNTDOWN = Characterful.bare(
    count=2, targets=(1, 30), pool=20, validation_pool=6, test_pool=6, seed=5
)
TEXT = replace(
    TINY,
    task=COUNTDOWN,
    base=TransformerBase(
        config=TransformerConfig(
            vocab_size=COUNTDOWN.vocab_size, length=COUNTDOWN.length, width=16, depth=1, heads=2
        )
    ),
    decoder=Decoder(steps=4),
    algorithm=Egspo(n_steps=2, lam=0.5, beta=0.05),
)
"""Facts travel as bytes, and completions are judged."""

ADAPTIVE = replace(TINY, algorithm=Egspo(selection="adaptive", lam=0.5, beta=0.05))
"""Samples train on different numbers of steps, whose completions are asked for afterwards."""


SEPO = replace(
    TINY,
    decoder=RateDecoder(steps=3, corrector_steps=1),
    algorithm=Sepo(baseline="critic", normalise_std=False, masks=2, beta=0.05, kl_steps=2),
    steps=6,
)
"""Hidden sets and kept moves are gathered; every process fits its critic to the whole batch, the
first time without an update of the policy."""
SEPO_GROUPS = replace(SEPO, algorithm=replace(SEPO.algorithm, baseline="leave_one_out"))

ACTIONS = gaussian_run(
    decoder=GaussianDecoder(steps=5, solver="dpm_solver_2m_sde"),
    algorithm=ScoreAsAction(critic_epochs=2, critic_batch=16),
    **{name: getattr(SEPO, name) for name in ("optim", "steps", "ema", "evaluate")},
)
"""Continuous samples; outputs, values and their slopes are gathered."""
SLOPES = replace(
    ACTIONS,
    decoder=GaussianDecoder(steps=5),
    algorithm=replace(ACTIONS.algorithm, form="score_gradient", n_steps=2),
)


def weights(world: World) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in world.module.named_parameters()}


def first_update(run: Run, change: Callable[[Credited], Credited]) -> dict[str, Tensor]:
    """Log-probabilities and gradient of the first update, and the weights after it."""
    world = tiny_world(run)
    scored, _ = rollout(world, 0)
    gradient: dict[str, Tensor] = {}

    def note(*_: object) -> None:
        for name, p in world.module.named_parameters():
            assert p.grad is not None
            gradient[f"gradient/{name}"] = p.grad.clone()

    world.updater.optimizer.register_step_pre_hook(note)
    metrics = update(world, change(run.algorithm.credit(scored)), 0)
    return {
        "log_prob": scored.trajectory.log_prob,
        "x_0": scored.trajectory.x_0,
        "reward": scored.reward,
        "step": scored.step.contiguous(),
        "step_weight": scored.step_weight,
        **{f"completion/{name}": value for name, value in scored.completion_terms.items()},
        **{f"info/{name}": value for name, value in scored.trajectory.prompts.info.items()},
        "probe": torch.tensor(probe(tiny_world(run), run.algorithm.credit(scored))),
        "skipped": torch.tensor(world.updater.counts.skipped),
        **{f"metric/{name}": torch.tensor(value) for name, value in metrics.items()},
        **gradient,
        **{f"weight/{name}": tensor for name, tensor in weights(world).items()},
    }


def keep(n: int, credited: Credited) -> Credited:
    """Train on the first n pairs only."""
    pairs = credited.pairs()[:n]
    weight = torch.zeros_like(credited.weight)
    weight[pairs[:, 0], pairs[:, 1]] = 0.5
    return replace(credited, weight=weight)


def spoil(credited: Credited) -> Credited:
    """One advantage, of the second process if there is one, is NaN."""
    sample, column = credited.pairs()[1].tolist()
    advantage = credited.advantage.clone()
    advantage[sample, column] = torch.nan
    return replace(credited, advantage=advantage)


def last_half_only(outputs: Tensor, prompts: Prompts) -> Tensor:
    """Equal in every group of the first process of two."""
    return torch.where(prompts.group >= 2, matches(outputs, prompts), 1.0)


def last_group_of_step_1(prompts: Prompts) -> bool:
    """Samples 28 to 31, of which those with the same output are judged once."""
    return bool(((prompts.sample_id >= 28) & (prompts.sample_id < 32)).any())


def broken_at_the_end(outputs: Tensor, prompts: Prompts) -> Tensor:
    """Raises for the last group of the second step: in the second process of two."""
    if last_group_of_step_1(prompts):
        raise KeyError("no such board")
    return matches(outputs, prompts)


def interrupts_at_the_end(outputs: Tensor, prompts: Prompts) -> Tensor:
    """Ctrl-C, for one process, while that group is judged."""
    if last_group_of_step_1(prompts):
        os.kill(os.getpid(), signal.SIGINT)
    return matches(outputs, prompts)


def trained(run: Run, out: Path) -> dict[str, Tensor]:
    """The weights after a whole run of 20 updates, and the reward terms they earn."""
    out.mkdir(exist_ok=True)
    world = tiny_world(run)
    train(world, out, Console("", run.steps, enabled=False))
    assert world.updater.counts.done == 20
    critic = {} if world.models.critic is None else world.models.critic.saved()
    found = {**weights(world), **evaluate_split(world, "validation", 5)}
    return {**found, **{f"critic/{name}": tensor for name, tensor in critic.items()}}


def stopped(run: Run, out: Path, error: type[Exception]) -> Tensor:
    """The steps done and saved by a run that ends with an error."""
    out.mkdir(exist_ok=True)
    world = tiny_world(run)
    with pytest.raises(error):
        train(world, out, Console("", run.steps, enabled=False))
    return torch.tensor([world.state.step, *checkpoint.steps(out / "checkpoints")])


def on_every_process(out: Path) -> dict[str, Tensor]:
    """Everything that must not depend on the number of processes."""
    plain = tiny_run(optim=Optim(lr=0.05, warmup=0))
    found: dict[str, dict[str, Tensor]] = {
        "sudoku": first_update(SUDOKU, lambda credited: credited),
        "odd": first_update(plain, lambda credited: keep(7, credited)),
        "one": first_update(plain, lambda credited: keep(1, credited)),
        "none": first_update(plain, lambda credited: keep(0, credited)),
        "spoiled": first_update(plain, spoil),
        "spare": first_update(
            replace(plain, base=SpareBase(), optim=Optim(weight_decay=0.1)), lambda c: c
        ),
        "one side": first_update(
            replace(plain, task=Match(functions={"term": last_half_only})), lambda c: c
        ),
        "mini-batches": first_update(
            replace(TINY, optim=replace(TINY.optim, mini_batches=8)), lambda c: keep(9, c)
        ),
        "text": first_update(TEXT, lambda credited: credited),
        "adaptive": first_update(ADAPTIVE, lambda credited: credited),
        "sepo": first_update(SEPO_GROUPS, lambda credited: credited),
        "sepo, no KL": first_update(
            replace(SEPO_GROUPS, algorithm=replace(SEPO_GROUPS.algorithm, beta=0.0)), lambda c: c
        ),
        "tiny": trained(TINY, out / "tiny"),
        "sepo run": trained(SEPO, out / "sepo"),
        "text run": trained(TEXT, out / "text"),
        "adaptive run": trained(ADAPTIVE, out / "adaptive"),
        "actions run": trained(ACTIONS, out / "actions"),
        "slopes run": trained(SLOPES, out / "slopes"),
    }
    for name, reward, error in (
        ("broken", broken_at_the_end, RewardError),
        ("interrupted", interrupts_at_the_end, Interrupted),
    ):
        run = replace(plain, task=Match(functions={"term": reward}), save_every=10)
        found[name] = {"steps": stopped(run, out / name, error)}
    return {f"{case}/{name}": t for case, tensors in found.items() for name, t in tensors.items()}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories with what one process found, and what each of two found."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    safetensors.torch.save_file(on_every_process(one), one / "0.safetensors")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", __file__, str(two)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return one, two


@pytest.fixture(scope="module")
def found(one_and_two: tuple[Path, Path]) -> list[dict[str, Tensor]]:
    """What one process found, and what the first and the second of two found."""
    one, two = one_and_two
    files = (one / "0.safetensors", two / "0.safetensors", two / "1.safetensors")
    return [safetensors.torch.load_file(file) for file in files]


EXACT = (
    *("odd", "one", "none", "spoiled", "spare", "one side", "mini-batches"),
    *("text", "adaptive", "sepo", "sepo, no KL"),
)
RUNS = ("tiny", "text run", "adaptive run", "sepo run", "actions run", "slopes run")


def of(case: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{case}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{case}/")
    }


@pytest.mark.parametrize("case", [*EXACT, *RUNS])
def test_two_processes_equal_one_in_float64(case, found):
    """Whole runs of 20 updates, and updates whose pairs cannot be shared evenly, to 1e-10."""
    one, first, second = (of(case, tensors) for tensors in found)
    assert one
    assert one.keys() == first.keys() == second.keys()
    for name, tensor in one.items():
        assert tensor.dtype == first[name].dtype
        tolerance = 1e-6 if name.startswith("metric/ratio") else 1e-10  # extremes are float32
        for other in (first[name], second[name]):
            torch.testing.assert_close(other, tensor, rtol=0, atol=tolerance, equal_nan=True)


def test_two_processes_equal_one_on_sudoku_in_float32(found):
    """The same samples; log-probabilities and gradient of the first update to 1e-5."""
    one, first, second = (of("sudoku", tensors) for tensors in found)
    assert one.keys() == first.keys()
    for other in (first, second):
        assert torch.equal(other["x_0"], one["x_0"])
        assert torch.equal(other["reward"], one["reward"])
        assert other["probe"] <= 1e-5
        for name, tensor in one.items():
            if name == "log_prob" or name.startswith("gradient/"):
                torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)
    assert max(tensor.abs().max() for name, tensor in one.items() if "gradient/" in name) > 1e-2


def test_the_weights_of_two_processes_stay_the_same(found):
    """Bitwise: there is no copy from one to the other that would hide a drift."""
    _, first, second = found
    for name, tensor in first.items():
        assert torch.equal(tensor.nan_to_num(9e9), second[name].nan_to_num(9e9)), name


def test_the_cases_are_what_they_say(found):
    """Updates with and without pairs; the NaN of one process is skipped by both."""
    one = found[0]
    assert "one/gradient/weight_in" in one
    assert "none/gradient/weight_in" not in one
    assert [int(one[f"{case}/skipped"]) for case in ("odd", "spoiled")] == [0, 1]
    assert one["one side/metric/gradient_norm"] > 0
    assert not torch.equal(one["spare/weight/spare"], torch.ones(2, dtype=torch.float64))


def test_completions_and_facts_are_worth_gathering(found):
    """Rewards and completions differ; the facts of the two halves differ in length."""
    one = found[0]
    facts = one[f"text/info/{FACTS}"]
    width = [int((half != 0).any(0).sum()) for half in facts.chunk(2)]
    assert width[0] != width[1] and max(width) == facts.shape[1]
    assert len({fact["gold"] for fact in unpack(facts)}) == 4
    for case, names in (("text", ("familiar", "digits")), ("adaptive", ("matches", "solved"))):
        assert one[f"{case}/reward"].unique().numel() >= 4
        for name in names:
            assert one[f"{case}/completion/{name}"].unique().numel() > 1
    trained_on = (one["adaptive/step_weight"] != 0).sum(1)
    assert trained_on.unique().numel() > 1


def test_the_files_of_two_processes_are_those_of_one(one_and_two):
    """Metrics to rounding, the same evaluations, the same checkpoints; only one writes."""
    one, two = (directory / "tiny" for directory in one_and_two)
    assert rows(one / "evaluations.jsonl") == rows(two / "evaluations.jsonl")
    metrics, others = rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl")
    assert [row["step"] for row in others] == [1, 2, 3, 4, 5]
    for row, other in zip(metrics, others, strict=True):
        assert other == pytest.approx(row, rel=1e-6, abs=1e-10)
    steps = [checkpoint.steps(directory / "checkpoints") for directory in (one, two)]
    assert steps[0] == steps[1]
    saved = [last_checkpoint(directory) for directory in (one, two)]
    assert saved[0].state["updates"] == saved[1].state["updates"]
    for name, tensor in saved[0].tensors["ema"].items():
        torch.testing.assert_close(saved[1].tensors["ema"][name], tensor, rtol=0, atol=1e-10)


def test_what_stops_one_process_stops_all(found):
    """A reward that fails in the second, and Ctrl-C in the second: the same step, saved once."""
    for tensors in found:
        assert tensors["broken/steps"].tolist() == [1, 0, 1]
        assert tensors["interrupted/steps"].tolist()[0] == 2
        assert tensors["interrupted/steps"].tolist()[-1] == 2


# A process that ends ----------------------------------------------------------------------------

RECIPE = """from tiny import Run, TransformerBase, tiny_run


def quick() -> Run:
    return tiny_run(base=TransformerBase(), steps=60, save_every=7, ema=0.5)
"""
QUICK = tiny_run(base=TransformerBase(), steps=60, save_every=7, ema=0.5)


def rescore(*arguments: object, limit: int | None = None) -> subprocess.Popen[str]:
    """``rescore`` in a process of its own, which can write files of ``limit`` bytes at most."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command: Sequence[str] = [sys.executable, "-m", "rescore", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restrict,
    )


def wait_for_rows(process: subprocess.Popen[str], out: Path, n: int) -> None:
    """Until the metrics of n steps are written."""
    path, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    start(QUICK, Origin(recipe=str(recipe), arguments=()), out, resume=False)
    return out


def test_kill_9_and_resume_equal_the_uninterrupted_run(recipe, uninterrupted, tmp_path):
    """At a random point; ``rescore train --resume DIR`` alone continues, bitwise."""
    out, point = tmp_path / "run", random.randrange(1, 50)
    process = rescore("train", recipe, "--out", out)
    wait_for_rows(process, out, point)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"killed after {point} rows"
    assert not (out / "result.json").exists()
    resumed = rescore("train", "--resume", out)
    message = resumed.communicate()[1]
    assert resumed.returncode == 0, message
    assert_same_run(uninterrupted, out)
    assert "<svg " in (out / "report.html").read_text()


def test_ctrl_c_saves_and_exits_with_130(recipe, uninterrupted, tmp_path):
    """The step under way is finished and saved; no row is later than the checkpoint."""
    out = tmp_path / "run"
    process = rescore("train", recipe, "--out", out)
    wait_for_rows(process, out, 10)
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    assert process.returncode == 130, message
    assert "Traceback" not in message
    assert f"rescore train --resume {out}" in message
    saved = last_checkpoint(out)
    assert 10 <= saved.step < 60
    assert f"step {saved.step} of 60" in message
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(1, saved.step + 1))
    start(QUICK, Origin(recipe=str(recipe), arguments=()), out, resume=True)
    assert_same_run(uninterrupted, out)


def test_a_full_disk_stops_with_a_message_and_can_be_continued(recipe, uninterrupted, tmp_path):
    """The moments of Adam do not fit: only step 0 is saved, whole, and can be continued."""
    folder = uninterrupted / "checkpoints" / "00000060"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    limit = sizes["optimizer.safetensors"] - 1
    assert limit > 1.5 * max(size for name, size in sizes.items() if "optimizer" not in name)
    out = tmp_path / "run"
    process = rescore("train", recipe, "--out", out, limit=limit)
    message = process.communicate()[1]
    assert process.returncode == 2, message
    assert "Traceback" not in message
    assert "saving the checkpoint of step" in message
    assert "File too large" in message
    intact = checkpoint.steps(out / "checkpoints")
    assert intact == [0]
    assert str(intact) in message
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"00000000"}
    start(QUICK, Origin(recipe=str(recipe), arguments=()), out, resume=True)
    assert_same_run(uninterrupted, out)


@pytest.mark.slow
def test_torchrun_runs_the_command_line(recipe, uninterrupted, tmp_path):
    """``torchrun -m rescore train``: the same run as that of one process, up to rounding."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc_per_node", "2", "-m", "rescore", "train", str(recipe), "--out", str(out)]
    done = subprocess.run(
        [*launcher, *options], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    one, two = last_checkpoint(uninterrupted), last_checkpoint(out)
    for name, tensor in one.tensors["ema"].items():
        torch.testing.assert_close(two.tensors["ema"][name], tensor, rtol=0, atol=1e-9)
    assert (out / "report.html").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    tensors = on_every_process(directory)
    safetensors.torch.save_file(tensors, directory / f"{os.environ['RANK']}.safetensors")
