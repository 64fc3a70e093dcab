"""Pre-train the small masked-diffusion bases that the project's own recipes start from.

MDLM (arXiv:2406.07524): minimise the masked cross-entropy over stratified times, everything
editable. All randomness comes from seeded generators; noise is drawn on the
CPU in float64, whatever the device.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rescore.models.transformer import Transformer, TransformerConfig
from rescore.objectives.denoising import masked_cross_entropy
from rescore.processes.masked import mask_tokens
from rescore.processes.schedules import Linear, Schedule
from rescore.tasks.task import Task
from rescore.training.base import Base

MIN_T = 1e-3
"""Training times lie in [MIN_T, 1], as in MDLM's code: keeps the weight 1 / t finite."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Base):
    """Everything that defines a base model, apart from the task's data."""

    model: TransformerConfig
    """Shape of the network; ``vocab_size`` and ``length`` must be the task's."""
    steps: int
    """Optimiser steps."""
    batch: int = 128
    """Sequences per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; falls to 0 along a half cosine."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    clip: float = 1.0
    """Largest norm of the gradient of the mean loss per position."""
    schedule: Schedule = dataclasses.field(default_factory=Linear)
    """Law of the training times."""
    validate_every: int = 50
    """Steps between two rows of the log."""
    validation_rows: int = 1024
    """Sequences in the validation loss, the same ones under the same masks every time. Best a
    multiple of the length."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> Transformer:
        return cached_base(self, task, cache, seed=seed, device=device, progress=_teller(note))

    def continued(
        self,
        module: nn.Module,
        task: Task,
        *,
        seed: int,
        cpu_s: float,
        note: Callable[[str], None],
    ) -> Transformer:
        assert isinstance(module, Transformer)
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
        f"pre-training step {row.step}: validation bound {row.validation:.3f} nats per sequence"
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the log of a pre-training."""

    step: int
    """Optimiser steps taken."""
    train: float | None
    """Mean bound over the batches since the last row, nats per sequence; None at step 0."""
    validation: float
    """The bound on the validation sequences, nats per sequence."""


def pretrain(
    config: Pretrain,
    task: Task,
    *,
    seed: int = 0,
    start: Transformer | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Row], None] = lambda row: None,
) -> Transformer:
    """Train a base on ``task.clean("train")``; the same arguments give the same bits.

    Args:
        config: the model and its training.
        task: where the data comes from.
        seed: of the initial weights, then of the batches and their noise.
        start: continue from a copy of this network instead of a new one.
        device: where to train.
        progress: told the losses at the start, every ``validate_every`` steps and at the end.

    Raises:
        ValueError: the model does not fit the task's vocabulary or length.
        RuntimeError: a gradient is not finite.
    """
    shape = config.model if start is None else start.config
    if (shape.vocab_size, shape.length) != (task.vocab_size, task.length):
        raise ValueError(
            f"model of vocab_size {shape.vocab_size} and length {shape.length} for a task of "
            f"vocab_size {task.vocab_size} and length {task.length}; make them equal"
        )
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(shape, generator=generator) if start is None else copy.deepcopy(start)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    data, held_out = task.clean("train"), task.clean("validation")

    def report(step: int, train: float | None) -> None:
        validation = validation_bound(model, held_out, config)
        progress(Row(step=step, train=train, validation=validation))

    report(0, None)
    total, since = torch.zeros((), device=device), 0
    for step in range(config.steps):
        x_0 = data[torch.randint(len(data), (config.batch,), generator=generator)]
        t = stratified_times(torch.rand(config.batch, generator=generator, dtype=torch.float64))
        u = torch.rand(x_0.shape, generator=generator, dtype=torch.float64)
        loss = bound(model, x_0, t, u, config.schedule).mean()
        optimizer.zero_grad()
        (loss / task.length).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(step, config)
        optimizer.step()
        total, since = total + loss.detach(), since + 1
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            report(step + 1, total.item() / since)
            total, since = torch.zeros((), device=device), 0
    return model


def bound(
    model: Transformer,
    x_0: Int[Tensor, "B L"],
    t: Float[Tensor, " B"],
    u: Float[Tensor, "B L"],
    schedule: Schedule,
) -> Float[Tensor, " B"]:
    """One-sample estimate of the bound on -log p(x_0), nats; ``x_0`` and noise on the CPU."""
    editable = torch.ones_like(x_0, dtype=torch.bool)
    x_t = mask_tokens(x_0, editable, schedule.alpha(t), u, model.mask_id)
    device = next(model.parameters()).device
    x_0, x_t, weight = x_0.to(device), x_t.to(device), schedule.weight(t).float().to(device)
    return masked_cross_entropy(model.predict(x_t), x_0, x_t == model.mask_id, weight)


def stratified_times(u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """One time in each of B equal parts of [MIN_T, 1], at the fraction ``u`` of its part.

    The low-discrepancy sampler of MDLM (arXiv:2406.07524): the batch covers all times, the mean
    loss stays unbiased and its variance falls.
    """
    part = torch.arange(len(u), dtype=u.dtype)
    return MIN_T + (1 - MIN_T) * (part + u) / len(u)


def rate(step: int, config: Pretrain) -> float:
    """Fraction of the peak learning rate: linear warm-up times a half cosine down to 0."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@torch.no_grad()
def validation_bound(model: Transformer, x_0: Int[Tensor, "n L"], config: Pretrain) -> float:
    """The bound on held-out sequences under fixed masks, nats per sequence.

    Uses its form in the number m of masks, uniform in 1 ... L: the mean of L / m times the masked
    cross-entropy (LLaDA, arXiv:2502.09992, eq. 6). The value is the same as over times, for every
    schedule, with less noise; here the rows take the values of m in equal shares.
    """
    rows, length = config.validation_rows, x_0.shape[1]
    row = torch.arange(rows)
    n_masked = 1 + row * length // rows
    u = torch.rand(rows, length, generator=torch.Generator().manual_seed(0))
    masked = u.argsort(1).argsort(1) < n_masked[:, None]
    device = next(model.parameters()).device
    total = 0.0
    for part in row.split(config.batch):
        clean, hidden = x_0[part % len(x_0)].to(device), masked[part].to(device)
        logits = model.predict(torch.where(hidden, model.mask_id, clean))
        weight = (length / n_masked[part]).to(device)
        total += masked_cross_entropy(logits, clean, hidden, weight).double().sum().item()
    return total / rows


def cached_base(
    config: Pretrain,
    task: Task,
    cache_dir: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[Row], None] = lambda row: None,
) -> Transformer:
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
        "schedule": type(config.schedule).__name__,
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
    model = Transformer(config.model, generator=torch.Generator())
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
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for split in ("train", "validation"):
        data = task.clean(split)
        digest.update(f"{split} {tuple(data.shape)}".encode() + data.long().numpy().tobytes())
    return digest.hexdigest()[:16]


def _store(folder: Path, plain: dict[str, Any], model: Transformer, rows: list[Row]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as aside:
        whole = Path(aside) / "whole"
        whole.mkdir()
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        save_file(weights, whole / "base.safetensors")
        log = {"config": plain, "log": [dataclasses.asdict(row) for row in rows]}
        (whole / "base.json").write_text(json.dumps(log, indent=1))
        try:
            os.replace(whole, folder)
        except OSError:
            if not folder.exists():  # not merely that another process was first
                raise
