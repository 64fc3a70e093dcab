"""Pre-train the small bases that the project's own recipes start from."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rescore.models.denoiser import NetworkConfig, TokenConfig
from rescore.models.gaussian_network import GaussianConfig
from rescore.tasks.task import ContinuousTask, Task, TokenTask
from rescore.training.base import Base
from rescore.training.supervised import Row, Supervised, fit


@dataclass(frozen=True, kw_only=True)
class Pretrain(Supervised, Base):
    """Everything that defines a base model, apart from the task's data."""

    model: NetworkConfig
    """Shape of the network, which must fit the task: its vocabulary and length, or its samples."""

    @property
    def uniform(self) -> bool | None:
        return self.model.uniform

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        return cached_base(self, task, cache, seed=seed, device=device, progress=_teller(note))

    def continued(
        self,
        module: nn.Module,
        task: Task,
        *,
        seed: int,
        cpu_s: float,
        note: Callable[[str], None],
    ) -> nn.Module:
        device = next(module.parameters()).device
        clock: list[float] = []  # at each row of a short trial, so that validation is timed too

        def tick(row: Row) -> None:
            clock.append(time.process_time())

        trial = dataclasses.replace(self, steps=self.validate_every, warmup=0)
        pretrain(trial, task, seed=seed + 1, start=module, device=device, progress=tick)
        per_step = (clock[-1] - clock[0]) / trial.steps
        longer = dataclasses.replace(self, steps=max(1, round(cpu_s / per_step)))
        tell = _teller(note)
        return pretrain(longer, task, seed=seed + 1, start=module, device=device, progress=tell)


def _teller(note: Callable[[str], None]) -> Callable[[Row], None]:
    return lambda row: note(
        f"pre-training step {row.step}: validation bound {row.validation:.3f} nats per sample"
    )


def pretrain(
    config: Pretrain,
    task: Task,
    *,
    seed: int = 0,
    start: nn.Module | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Row], None] = lambda row: None,
) -> nn.Module:
    """Train a base on ``task.clean("train")``; the same arguments give the same bits.

    Args:
        config: the model and its training.
        task: where the data comes from.
        seed: of the initial weights, then of the batches and their noise.
        start: continue from a copy of this network instead of a new one.
        device: where to train.
        progress: told the losses at the start, every ``validate_every`` steps and at the end.

    Raises:
        ValueError: the model does not fit the task.
        RuntimeError: a gradient is not finite.
    """
    check_fit(config.model, task)
    generator = torch.Generator().manual_seed(seed)
    model = config.model.network(generator) if start is None else copy.deepcopy(start)
    model.to(device)
    data, held_out = task.clean("train"), task.clean("validation")
    fit(model, data, held_out, config, generator, progress=progress)
    return model


def check_fit(model: NetworkConfig, task: Task) -> None:
    """Refuse a network of another shape than the task's samples.

    Raises:
        ValueError: says what to make equal.
    """
    if isinstance(model, TokenConfig) and isinstance(task, TokenTask):
        if (model.vocab_size, model.length) != (task.vocab_size, task.length):
            raise ValueError(
                f"model of vocab_size {model.vocab_size} and length {model.length} for a task of "
                f"vocab_size {task.vocab_size} and length {task.length}; make them equal"
            )
    elif isinstance(model, GaussianConfig) and isinstance(task, ContinuousTask):
        if model.shape != task.shape:
            raise ValueError(
                f"model of samples of shape {model.shape} for a task of shape {task.shape}; make "
                f"them equal"
            )
    else:
        raise ValueError(
            f"a {type(model).__name__} makes other samples than {type(task).__name__} needs: "
            f"tokens and continuous samples do not go together"
        )


def cached_base(
    config: Pretrain,
    task: Task,
    cache_dir: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[Row], None] = lambda row: None,
) -> nn.Module:
    """``pretrain``, or what an earlier call with the same configuration and data has stored.

    A base is a folder ``cache_dir/<hash>`` with ``base.safetensors`` and ``base.json``
    (configuration and log). It is written aside and renamed when complete, so it is there whole or
    not at all.

    Raises:
        ValueError: the cached base is damaged.
        OSError: the cache cannot be written.
    """
    plain = {
        **dataclasses.asdict(config),
        "network": type(config.model).__name__,
        "schedule": type(config.schedule).__name__,
        "noise": str(config.noise),
        "process": str(getattr(config.model, "schedule", None)),
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
    }
    folder = cache_dir / _key(plain, task)
    if not folder.exists():
        rows: list[Row] = []

        def log(row: Row) -> None:
            rows.append(row)
            progress(row)

        model = pretrain(config, task, seed=seed, device=device, progress=log)
        _store(folder, plain, model, rows)
    model = config.model.network(torch.Generator())
    try:
        model.load_state_dict(load_file(folder / "base.safetensors"))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"the cached base in {folder} is damaged ({error}); "
            f"delete that folder to train it again"
        ) from error
    return model.to(device)


def _key(plain: dict[str, Any], task: Task) -> str:
    """Hash of configuration, seed, data and machine: what decides the weights to the last bit."""
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=_entries).encode())
    for split in ("train", "validation"):
        data = task.clean(split)
        digest.update(f"{split} {tuple(data.x_0.shape)}".encode())
        parts = data.fields()
        parts |= parts.pop("inputs", {})
        for part in parts.values():
            digest.update(b"" if part is None else part.numpy().tobytes())
    return digest.hexdigest()[:16]


def _entries(value: object) -> list[Any]:
    """Of a tensor, such as the table of a schedule: all of them, which its text would not show."""
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} in a configuration cannot be written as JSON")
    return value.tolist()


def _store(folder: Path, plain: dict[str, Any], model: nn.Module, rows: list[Row]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as aside:
        whole = Path(aside) / "whole"
        whole.mkdir()
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        save_file(weights, whole / "base.safetensors")
        log = {"config": plain, "log": [dataclasses.asdict(row) for row in rows]}
        (whole / "base.json").write_text(json.dumps(log, indent=1, default=_entries))
        try:
            os.replace(whole, folder)
        except OSError:
            if not folder.exists():  # not merely that another process was first
                raise
