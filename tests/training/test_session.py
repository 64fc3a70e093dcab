"""A run that is stopped, killed or extended continues as if it had never stopped, bitwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    MlpBase,
    TransformerBase,
    assert_same_run,
    last_checkpoint,
    matches,
    rows,
    solved,
    tiny_run,
    tiny_world,
)
from torch import Tensor, nn

from rescore.algorithms.egspo import Egspo
from rescore.models.finetune import Lora
from rescore.rewards.reward import RewardError
from rescore.training import checkpoint
from rescore.training.checkpoint import CheckpointError
from rescore.training.directory import Origin
from rescore.training.log import MetricsFile
from rescore.training.loop import Interrupted
from rescore.training.optim import Optim
from rescore.training.run import Evaluate, Run
from rescore.training.session import start
from rescore.training.world import load_state
from rescore.types import Prompts

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


def with_reward(run: Run, function: Callable[[Tensor, Prompts], Any]) -> Run:
    return replace(run, task=replace(run.task, functions={"matches": function, "solved": solved}))


@dataclass
class During:
    """Does something when the samples of a step are judged, and is ``matches`` otherwise."""

    step: int
    action: Callable[[], None]
    batch_size: int = 16
    __module__ = "tests"
    seen: list[int] = field(default_factory=list, compare=False)

    def __call__(self, outputs: Tensor, prompts: Prompts) -> Tensor:
        first = int(prompts.sample_id[0])
        if len(outputs) == self.batch_size and first == self.step * self.batch_size:
            self.action()
        return matches(outputs, prompts)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise ZeroDivisionError("no such board")


class Killed(BaseException):
    """Ends a run where it is, as a kill would."""


def kill() -> None:
    raise Killed


def stop_at(step: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``matches`` act while the rollout of ``step`` is judged."""
    import tiny

    during = During(step, action)

    def matches(outputs: Tensor, prompts: Prompts) -> Tensor:
        return during(outputs, prompts)

    matches.__module__, matches.__qualname__ = "tiny", "matches"
    monkeypatch.setattr(tiny, "matches", matches)


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
