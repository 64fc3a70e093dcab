"""Checkpoints: complete or invisible, what comes back is what was saved, and clear refusals."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rescore.training import checkpoint
from rescore.training.checkpoint import Checkpoint, CheckpointError, StorageError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def make(step: int, size: int = 8) -> Checkpoint:
    weight = torch.arange(size, dtype=torch.float64) + step
    tensors = {"model": {"w": weight, "b": weight[:1].float()}, "optimizer": {"w.exp_avg": -weight}}
    return Checkpoint(step=step, tensors=tensors, state={"best": 0.1 + step, "history": [1, None]})


def assert_same(got: Checkpoint, expected: Checkpoint) -> None:
    assert (got.step, got.state) == (expected.step, expected.state)
    assert set(got.tensors) == set(expected.tensors)
    for stem, tensors in expected.tensors.items():
        assert set(got.tensors[stem]) == set(tensors)
        for name, tensor in tensors.items():
            assert got.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(got.tensors[stem][name], tensor)


def in_child(function: Callable[[], object]) -> tuple[int, str]:
    """Exit status and outcome of ``function`` in a process of its own, to kill or to limit."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(function())
        except BaseException:
            text = traceback.format_exc()
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def refused_at(n_bytes: int, write: Callable[[], None]) -> str:
    """The message of the StorageError that ``write`` raises when no file may exceed ``n_bytes``."""

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        try:
            write()
        except StorageError as error:
            return f"refused: {error}"
        return "written"

    return in_child(limited)[1]


def test_what_comes_back_is_what_was_saved(tmp_path):
    """Dtypes, shapes and bits survive, for shared, strided, scalar and empty tensors as well."""
    shared = torch.tensor([1.5, -0.0, float("nan")])
    tensors = {
        "f64": torch.tensor([0.1, 1e-310], dtype=torch.float64),
        "bf16": torch.tensor([0.1]).bfloat16(),
        "i64": torch.tensor([2**62 + 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(6.0).reshape(2, 3).T[::2],
        "expanded": torch.tensor([7.0]).expand(3),
        "tied": shared,
        "tied_too": shared,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    state = {"value": 0.1 + 0.2, "key": [2**63, -1], "none": None, "nested": {"a": {}}}
    checkpoint.save(tmp_path, Checkpoint(7, {"model": tensors, "ema": {}}, state), keep_last=1)
    got = checkpoint.load(tmp_path, 7)
    assert got.state == state and set(got.tensors) == {"model", "ema"}
    for name, tensor in tensors.items():
        loaded = got.tensors["model"][name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(loaded, tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert {path.suffix for path in (tmp_path / "00000007").iterdir()} == {".safetensors", ".json"}


def test_latest_is_the_highest_complete_step(tmp_path):
    """Ordered by number, blind to anything that is not a finished checkpoint."""
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, make(step), keep_last=9)
    (tmp_path / "00000200").mkdir()
    shutil.copytree(tmp_path / "00000100", tmp_path / "00000300.partial-dir")
    shutil.copytree(tmp_path / "00000100", tmp_path / "400")
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    assert checkpoint.latest(tmp_path) == 100


def test_retention(tmp_path):
    """The last two and the best stay; left-overs of an interrupted write go."""
    (tmp_path / "00000001.partial-dir").mkdir()
    for step in range(1, 6):
        checkpoint.save(tmp_path, make(step), keep_last=2, keep=[2, 77])
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000004", "00000005"]
    checkpoint.save(tmp_path, make(3), keep_last=1)
    assert checkpoint.steps(tmp_path) == [3, 5]
    with pytest.raises(ValueError, match="keep_last = 0"):
        checkpoint.save(tmp_path, make(6), keep_last=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    """A later write of the same step wins."""
    checkpoint.save(tmp_path, make(5), keep_last=1)
    again = Checkpoint(5, {"model": {"w": torch.ones(1)}}, {"new": True})
    checkpoint.save(tmp_path, again, keep_last=1)
    assert_same(checkpoint.load(tmp_path, 5), again)
    assert os.listdir(tmp_path) == ["00000005"]


@pytest.mark.parametrize("new_step", [3, 2], ids=["next step", "same step again"])
def test_a_kill_at_any_point_leaves_only_whole_checkpoints(tmp_path, new_step):
    """Killed before its n-th change of the file system, for every n: the old or the new one is
    the latest, every visible one loads, and the next save cleans up.
    """
    origin = tmp_path / "origin"
    for step in (1, 2):
        checkpoint.save(origin, make(step), keep_last=2)
    outcomes = []
    for n in itertools.count():
        directory = tmp_path / str(n)
        shutil.copytree(origin, directory)

        def killed_at_change(directory: Path = directory, n: int = n) -> None:
            changes = itertools.count()

            def hook(event: str, arguments: tuple) -> None:
                writes = event == "open" and arguments[2] & os.O_WRONLY
                moves = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
                if (writes or moves) and next(changes) == n:
                    os._exit(9)

            sys.addaudithook(hook)
            checkpoint.save(directory, make(new_step, size=9), keep_last=2)

        status, text = in_child(killed_at_change)
        visible = checkpoint.steps(directory)
        for step in visible:
            got = checkpoint.load(directory, step)
            assert_same(got, make(step, size=got.tensors["model"]["w"].numel()))
        outcomes.append((visible, checkpoint.load(directory, visible[-1]).tensors["model"]["w"]))
        checkpoint.save(directory, make(4), keep_last=1)
        assert os.listdir(directory) == ["00000004"]
        if status == 0:
            assert text == "None"
            break
    new = [len(w) == 9 for _, w in outcomes]
    assert new == sorted(new) and not new[0] and new[-1]  # from old to new once, never back
    assert new.count(False) > len(FILES)  # one kill before each file at least
    assert all(
        1 in visible for (visible, _), is_new in zip(outcomes, new, strict=True) if not is_new
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_to_any_file_is_detected(tmp_path, name, damage):
    """A file cut short, altered or missing is named, with the way out."""
    for step in (1, 2):
        checkpoint.save(tmp_path, make(step), keep_last=2)
    path = tmp_path / "00000002" / name
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-9])
    elif damage == "altered":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path, 2)
    message = str(caught.value)
    assert name in message and f"delete {path.parent} to resume from step 1" in message
    if damage == "truncated" and name != "manifest.json":
        assert f"has {len(data) - 9} bytes, expected {len(data)}" in message
    assert_same(checkpoint.load(tmp_path, 1), make(1))


@pytest.mark.parametrize(
    "manifest",
    [
        '{"weight_map": {}}',
        "[1]",
        "null",
        "",
        b"\xff\x80\x00",
        '{"format": "rescore-checkpoint-0", "step": 3, "files": {}}',
        '{"format": "rescore-checkpoint-1", "step": 4, "files": {}}',
    ],
)
def test_a_foreign_directory_is_refused(tmp_path, manifest):
    """A manifest of something else, of another version or of another step is not loaded."""
    (tmp_path / "00000003").mkdir()
    data = manifest if isinstance(manifest, bytes) else manifest.encode()
    (tmp_path / "00000003" / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json .*start a new run"):
        checkpoint.load(tmp_path, 3)


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}])
def test_state_that_json_would_change_is_refused(tmp_path, state):
    """Tuples, integer keys and NaN would come back as something else, so nothing is written."""
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, Checkpoint(1, {}, state), keep_last=1)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path):
    """Without room for its tensors a checkpoint is refused and leaves nothing behind."""
    checkpoint.save(tmp_path, make(1), keep_last=1)
    big = make(2, size=100_000)
    message = refused_at(4096, lambda: checkpoint.save(tmp_path, big, keep_last=1))
    assert message.startswith("refused: saving the checkpoint of step 2 in ")
    assert "File too large" in message and "intact there: [1]" in message
    assert os.listdir(tmp_path) == ["00000001"]
    assert_same(checkpoint.load(tmp_path, 1), make(1))


def test_a_failed_atomic_write_changes_nothing(tmp_path):
    """The old content stays, no temporary file remains; a success replaces it whole."""
    path = tmp_path / "run.json"
    checkpoint.write_json(path, {"b": 0.1, "a": [1, None]})
    assert json.loads(path.read_text()) == {"b": 0.1, "a": [1, None]}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    before = path.read_bytes()
    message = refused_at(1000, lambda: checkpoint.write_atomic(path, b"x" * 5000))
    assert message.startswith(f"refused: cannot write {path}: File too large")
    assert "earlier content is intact" in message
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(path, {"a": float("inf")})
    assert path.read_bytes() == before
    with pytest.raises(StorageError, match="Is a directory"):
        (tmp_path / "folder").mkdir()
        checkpoint.write_atomic(tmp_path / "folder", "text")
    with pytest.raises(StorageError, match="Not a directory"):
        checkpoint.write_atomic(path / "below", "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "run.json"]
    checkpoint.write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()


def test_an_atomic_write_replaces_the_file_as_a_whole(tmp_path):
    """The old content is never written over: another name of it still has it afterwards."""
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("old")
    os.link(path, other)
    checkpoint.write_atomic(path, "new")
    assert (path.read_text(), other.read_text()) == ("new", "old")


class Net(nn.Module):
    """Two layers, a scalar, and a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.scale * self.b(self.a(x).tanh())


def build() -> tuple[Net, torch.optim.AdamW, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = Net()
    groups = [  # in another order than named_parameters
        {"params": [net.unused, *net.b.parameters()], "weight_decay": 0.3},
        {"params": [net.scale, *net.a.parameters()], "lr": 0.02},
    ]
    return net, torch.optim.AdamW(groups, lr=0.01), dict(net.named_parameters())


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def test_training_continues_bitwise(tmp_path):
    """Three steps, save, load into a fresh model and optimiser, three more: equal to six steps."""
    straight, optimizer, named = build()
    train(straight, optimizer, range(6))

    first, optimizer_1, named_1 = build()
    train(first, optimizer_1, range(3))
    tensors = {
        "model": first.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(optimizer_1, named_1),
    }
    checkpoint.save(tmp_path, Checkpoint(3, tensors, {}), keep_last=1)

    second, optimizer_2, named_2 = build()
    saved = checkpoint.load(tmp_path, 3)
    second.load_state_dict(saved.tensors["model"])
    kept = {name: t.clone() for name, t in saved.tensors["optimizer"].items()}
    checkpoint.load_optimizer_tensors(optimizer_2, named_2, saved.tensors["optimizer"])
    train(second, optimizer_2, range(3, 6))
    for name, parameter in named.items():
        assert torch.equal(parameter, named_2[name])
    final = checkpoint.optimizer_tensors(optimizer, named)
    resumed = checkpoint.optimizer_tensors(optimizer_2, named_2)
    assert {n.rpartition(".")[2] for n in final} == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(name.startswith("unused") for name in final)
    assert set(final) == set(resumed)
    assert all(torch.equal(final[name], resumed[name]) for name in final)
    for name, tensor in kept.items():  # training did not write into what was loaded
        assert torch.equal(saved.tensors["optimizer"][name], tensor)


def test_optimizer_state_keeps_the_new_hyper_parameters():
    """Learning rates come from the optimiser at hand, not from the one that was saved."""
    net, optimizer, named = build()
    train(net, optimizer, range(1))
    tensors = checkpoint.optimizer_tensors(optimizer, named)
    _, other, other_named = build()
    other.param_groups[0]["lr"] = 0.5
    checkpoint.load_optimizer_tensors(other, other_named, tensors)
    assert [g["lr"] for g in other.param_groups] == [0.5, 0.02]


def test_optimizer_state_of_another_model_is_refused():
    """An entry of an unknown parameter or in another shape is named."""
    _, optimizer, named = build()
    with pytest.raises(CheckpointError, match=r"'c\.weight\.exp_avg' of shape \(4, 3\)"):
        checkpoint.load_optimizer_tensors(optimizer, named, {"c.weight.exp_avg": torch.zeros(4, 3)})
    with pytest.raises(CheckpointError, match=r"'a\.weight\.exp_avg' of shape \(3, 4\)"):
        checkpoint.load_optimizer_tensors(optimizer, named, {"a.weight.exp_avg": torch.zeros(3, 4)})


def test_claim_makes_an_empty_directory(tmp_path):
    """New with its parents, or already there and empty; nothing is left in it."""
    checkpoint.claim(tmp_path / "a" / "b")
    checkpoint.claim(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_claim_refuses(tmp_path):
    """A directory with something in it, a file, a path below a file, where no file can be."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"is not empty \(1 entries, such as file\)"):
        checkpoint.claim(tmp_path)
    for path in (file, file / "run", file / "deep" / "run"):
        with pytest.raises(ValueError, match=f"{file} is a file; choose another"):
            checkpoint.claim(path)
    with pytest.raises(ValueError, match="cannot write to output directory /proc/run"):
        checkpoint.claim(Path("/proc/run"))
