"""Saving and resuming: safetensors and JSON, no pickle, complete or invisible.

    checkpoints/00000020/{model,optimizer,...}.safetensors  state.json  manifest.json

A checkpoint is written under another name, its manifest (sizes and SHA-256 of every file) last, and
renamed when all of it is on the disk. A process killed at any point leaves the earlier ones whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FORMAT = "rescore-checkpoint-1"
MANIFEST, STATE, TENSORS, PARTIAL = "manifest.json", "state.json", ".safetensors", ".partial-dir"


class StorageError(OSError):
    """The disk refused a write; the message says what is still intact."""


class CheckpointError(ValueError):
    """A checkpoint is truncated, incomplete or not one of ours."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue as if it had never stopped."""

    step: int
    """Number of updates done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem ("model", "optimizer", "ema") to named tensors, each kept in its dtype."""
    state: dict[str, Any]
    """The rest, as JSON: string keys, lists and no tuples, finite numbers."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data``, or leave it as it was.

    Raises:
        StorageError: the disk is full or refuses; no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _write(temporary, data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except OSError as error:
        kept = "its earlier content is intact" if path.exists() else "nothing was left there"
        raise StorageError(f"cannot write {path}: {error.strerror}; {kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of JSON with sorted keys; NaN and infinities are a ValueError."""
    write_atomic(path, _json(value))


def save(
    directory: Path, checkpoint: Checkpoint, *, keep_last: int, keep: Collection[int] = ()
) -> None:
    """Write ``directory/<step>`` completely or not at all, then delete what is not to be kept.

    Kept are this checkpoint, the ``keep_last`` latest and the steps in ``keep``. Left-overs of
    writes that were interrupted are deleted.

    Raises:
        StorageError: the disk is full or refuses; complete checkpoints are intact.
        ValueError: ``keep_last`` < 1, or ``state`` would not come back from JSON as it is.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last}; expected at least 1 checkpoint to keep")
    if json.loads(_json(checkpoint.state)) != checkpoint.state:
        raise ValueError("state changes on its way through JSON; use string keys and no tuples")
    target = directory / f"{checkpoint.step:08d}"
    partial, replaced = target.with_suffix(PARTIAL), target.with_suffix(".replaced" + PARTIAL)
    try:
        _delete_partial(directory)
        partial.mkdir(parents=True)
        files = {}
        for name, data in _contents(checkpoint):
            _write(partial / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {"format": FORMAT, "step": checkpoint.step, "files": files}
        _write(partial / MANIFEST, _json(manifest).encode())
        _sync(partial)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _sync(directory)
        for step in set(steps(directory)[:-keep_last]) - {checkpoint.step, *keep}:
            old = directory / f"{step:08d}"
            old.rename(old.with_suffix(PARTIAL))
        _delete_partial(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"saving the checkpoint of step {checkpoint.step} in {directory} failed: "
            f"{error.strerror}; complete and intact there: {steps(directory) or 'none'}"
        ) from error


def steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    names = [manifest.parent.name for manifest in directory.glob(f"*/{MANIFEST}")]
    return sorted(int(n) for n in names if n.isdecimal() and n == f"{int(n):08d}")


def latest(directory: Path) -> int | None:
    """The step of the latest complete checkpoint, if there is one."""
    return max(steps(directory), default=None)


def load(directory: Path, step: int, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest.

    Raises:
        CheckpointError: missing, truncated, altered or written by something else.
    """
    folder = directory / f"{step:08d}"
    try:
        manifest = json.loads(_read(folder / MANIFEST))
        if (manifest["format"], manifest["step"]) != (FORMAT, step):
            raise CheckpointError(
                f"{MANIFEST} is of a {manifest['format']} of step {manifest['step']}, "
                f"expected a {FORMAT} of step {step}"
            )
        data = {name: _read(folder / name, **file) for name, file in manifest["files"].items()}
    except (KeyError, TypeError, ValueError) as error:
        ours = isinstance(error, CheckpointError)
        problem = error if ours else f"{MANIFEST} is truncated or foreign"
        rest = [s for s in steps(directory) if s != step]
        advice = f"delete {folder} to resume from step {rest[-1]}" if rest else "start a new run"
        raise CheckpointError(f"{folder} is no complete checkpoint: {problem}; {advice}") from error
    state = json.loads(data.pop(STATE))
    tensors = {
        name.removesuffix(TENSORS): {
            k: v.to(device) for k, v in safetensors.torch.load(file).items()
        }
        for name, file in data.items()
    }
    return Checkpoint(step, tensors, state)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of an optimiser such as AdamW as tensors named ``<parameter>.<state>``.

    They are the live ones, not copies; ``save`` copies. Hyper-parameters are not among them: they
    come from the run's configuration. A parameter that never had a gradient has no state.

    Args:
        optimizer: every entry of its state is a tensor.
        named: ``dict(model.named_parameters())``, covering every parameter of the optimiser.
    """
    names = _parameter_names(optimizer, named)
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}.{key}": value for i in state for key, value in state[i].items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Undo ``optimizer_tensors``, bitwise; the optimiser keeps its own hyper-parameters.

    Raises:
        CheckpointError: an entry belongs to no parameter of the optimiser, or not in its shape.
    """
    index = {name: i for i, name in enumerate(_parameter_names(optimizer, named))}
    state: dict[int, dict[str, Tensor]] = {}
    for entry, value in tensors.items():
        name, _, key = entry.rpartition(".")
        if name not in index or (key != "step" and value.shape != named[name].shape):
            raise CheckpointError(
                f"optimiser state '{entry}' of shape {tuple(value.shape)} fits no parameter of "
                f"this optimiser; resume with the model and recipe the checkpoint was written with"
            )
        state.setdefault(index[name], {})[key] = value.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def claim(directory: Path) -> None:
    """Make ``directory`` an empty, writable output directory, with its parents.

    Raises:
        ValueError: it is not empty, not a directory, or cannot be created or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        found = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        file = next((p for p in (directory, *directory.parents) if p.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
        raise ValueError(
            f"cannot write to output directory {directory}: {reason}; choose another directory"
        ) from error
    if found:
        raise ValueError(
            f"output directory {directory} is not empty ({len(found)} entries, such as "
            f"{found[0]}); choose another one, or resume the run that is in it"
        )


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """File names and contents, one at a time; copies make shared and strided tensors plain."""
    for stem, tensors in checkpoint.tensors.items():
        plain = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        yield stem + TENSORS, safetensors.torch.save(plain)
    yield STATE, _json(checkpoint.state).encode()


def _parameter_names(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which ``Optimizer.state_dict`` numbers the parameters."""
    names = {id(parameter): name for name, parameter in named.items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n"


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, bytes: int | None = None, sha256: str | None = None) -> bytes:
    """A file of a checkpoint, compared with its size and hash where they are given."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from error
    if bytes not in (None, len(data)):
        raise CheckpointError(f"{path.name} has {len(data)} bytes, expected {bytes}")
    if sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise CheckpointError(f"{path.name} was altered: its SHA-256 is not {sha256}")
    return data


def _delete_partial(directory: Path) -> None:
    for path in directory.glob("*" + PARTIAL):
        shutil.rmtree(path)


def _sync(directory: Path) -> None:
    """Put the names in a directory on the disk, as ``_write`` does with contents."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
