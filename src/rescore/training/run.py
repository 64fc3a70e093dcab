"""Run: everything that defines a run, frozen."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from rescore.algorithms.base import Algorithm
from rescore.models.finetune import Lora
from rescore.models.language import require
from rescore.sampling.decoder import Decoding
from rescore.tasks.task import Task
from rescore.training.base import Base
from rescore.training.optim import Optim

Precision = Literal["float32", "float64", "bfloat16"]
"""Of the network. ``bfloat16`` is autocast; frozen weights keep the type they were loaded in, and
log-probabilities are float32."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When and on how many prompts to evaluate."""

    every: int = 10
    """Steps between evaluations on the validation split."""
    n: int = 256
    """Validation prompts, one sample each, the same noise every time."""
    n_test: int = 512
    """Test prompts for the table at the end."""
    by: str = "reward"
    """What chooses the best checkpoint on validation: ``reward`` or the name of a reward term."""
    control: bool = False
    """Also evaluate the base after the same CPU-seconds of further pre-training."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete description of a training run; a recipe is a function that returns one."""

    task: Task
    """Prompts, reward and splits."""
    base: Base
    """Where the network comes from."""
    decoder: Decoding
    """How it is sampled, in training and evaluation."""
    algorithm: Algorithm
    """The method, which is its own configuration."""
    steps: int
    """Rollouts, each followed by ``optim.updates_per_rollout`` updates."""
    batch_size: int = 256
    """Samples per rollout, over all processes."""
    group_size: int = 8
    """Samples per prompt."""
    optim: Optim = field(default_factory=Optim)
    """How weights are updated."""
    forward_rows: int = 1024
    """Most network rows per forward without gradients; fewer are tried when memory ends. Changes
    no result."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    ema: float = 0.0
    """Decay of an average of the weights that is evaluated and kept as best; 0 = none."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """When to evaluate."""
    save_every: int = 20
    """Steps between checkpoints."""
    keep_last: int = 2
    """Latest checkpoints kept, besides the best on validation."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events; needs the extra ``logging``."""
    seed: int = 0
    """Seeds everything: the base that is trained, prompts, rollouts and evaluation noise."""
    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1."""
    precision: Precision = "float32"
    """Of the network."""

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded or written.

        Raises:
            ValueError: says what was got, what was expected and what to change.
        """
        for name in (
            "steps",
            "batch_size",
            "group_size",
            "save_every",
            "keep_last",
            "forward_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("every", "n", "n_test"):
            if getattr(self.evaluate, name) < 1:
                raise ValueError(
                    f"evaluate.{name} must be at least 1, got {getattr(self.evaluate, name)}"
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by group_size={self.group_size}; "
                f"groups stay whole, so use a multiple of {self.group_size}"
            )
        if self.batch_size % self.optim.mini_batches:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by "
                f"optim.mini_batches={self.optim.mini_batches}"
            )
        if self.steps <= self.algorithm.warm_up:
            raise ValueError(
                f"steps={self.steps}, but the first {self.algorithm.warm_up} of them train a "
                f"critic and not the policy; use more"
            )
        if self.algorithm.on_policy and self.optim.updates_per_rollout > 1:
            raise ValueError(
                f"{type(self.algorithm).__name__} is on-policy: one update per rollout, but "
                f"optim.epochs={self.optim.epochs} x optim.mini_batches={self.optim.mini_batches}; "
                f"set both to 1 or use an algorithm with a ratio"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}; 0 turns it off")
        if self.evaluate.by not in ("reward", *self.task.reward.functions):
            raise ValueError(
                f"evaluate.by='{self.evaluate.by}' is no reward term; choose one of "
                f"{['reward', *self.task.reward.functions]}"
            )
        if self.device.startswith("mps"):
            raise ValueError("device mps has no float64, which noise is drawn in; use --device cpu")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("no tensorboard found; pip install 'rescore[logging]'")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device '{self.device}' cannot be used here ({str(error).splitlines()[0][:120]}); "
                f"try --device cpu"
            ) from error
        if self.evaluate.control and type(self.base).continued is Base.continued:
            raise ValueError(
                f"evaluate.control trains the base further, which a {type(self.base).__name__} "
                f"cannot; turn it off"
            )
        if self.lora is not None:
            require("peft", "lora", "language")
        self.base.check_training(adapters=self.lora is not None, precision=self.precision)
        self.base.check(self.task, self.device)
        self.task.check()
        self.algorithm.check(self.decoder, self.group_size, tuple(self.task.reward.functions))
        if self.base.uniform is not None:
            self.algorithm.check_process(uniform=self.base.uniform)


def describe(value: Any) -> Any:
    """A configuration as strict JSON.

    Dataclasses become objects with a ``class`` key; functions and classes their names; numbers that
    are not finite, and anything else, text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two descriptions differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in sorted({*old, *new}):
            path = f"{prefix}.{name}" if prefix else name
            found |= differences(old.get(name), new.get(name), path)
        return found
    return {} if old == new else {prefix: (old, new)}
