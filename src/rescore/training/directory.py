"""The run directory: what a run is (run.json), where it ran (environment.json), its recipe."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rescore.training.checkpoint import write_atomic, write_json
from rescore.training.run import Run, describe, differences

EXTENDABLE = {"steps"}
"""Fields of a run that a resume may change."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How the run was asked for: enough to build it again."""

    recipe: str
    """Name of a recipe, or the path of a file that defines one."""
    arguments: tuple[str, ...]
    """Overrides, as typed."""

    @property
    def command(self) -> str:
        return " ".join(["rescore train", self.recipe, *self.arguments])


def default_cache() -> Path:
    """Where bases trained by the project are kept: $RESCORE_CACHE or ~/.cache/rescore."""
    return Path(os.environ.get("RESCORE_CACHE") or Path.home() / ".cache" / "rescore")


def describe_directory(out: Path, run: Run, origin: Origin) -> None:
    """Write run.json and environment.json, and a copy of the recipe if it is a file."""
    source = Path(origin.recipe.partition(":")[0])
    copy = out / "recipe.py"
    if source.suffix == ".py" and not copy.exists():  # a resume runs the copy
        write_atomic(copy, source.read_text())
    write_json(
        out / "run.json",
        {
            "recipe": origin.recipe,
            "arguments": list(origin.arguments),
            "command": origin.command,
            "seed": run.seed,
            "config": describe(run),
        },
    )
    if not (out / "environment.json").exists():  # a resumed run keeps what it started in
        write_json(out / "environment.json", environment(run))


def environment(run: Run) -> dict[str, Any]:
    """Versions, device, threads and the git revision, if there is one."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": run.device,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "git": git_revision(),
        **{name: version(name) for name in ("rescore", "torch", "numpy", "accelerate")},
    }


def git_revision() -> str | None:
    """The commit of the working directory, with ``-dirty`` if files differ; None outside git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_run(directory: Path) -> dict[str, Any]:
    """run.json of a run directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = directory / "run.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{directory} is not a run directory: {path} cannot be read ({error.strerror})"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the run directory is damaged") from error


def check_same(directory: Path, run: Run) -> None:
    """Refuse to resume a run as a different one.

    Raises:
        ValueError: fields other than ``steps`` differ, with both values; or ``steps`` shrinks, or
            grows in a run whose algorithm or decoder follows a schedule of that length.

    The continued run equals one that had more ``steps`` from the start, but for the evaluation at
    the end of the shorter one, if ``evaluate.every`` does not divide its steps.
    """
    old, new = read_run(directory)["config"], describe(run)
    changed = differences(old, new)
    scheduled = run.algorithm.at(1.0) != run.algorithm or run.decoder.at(1.0) != run.decoder
    refused = {
        name: (was, now)
        for name, (was, now) in changed.items()
        if name not in EXTENDABLE or now < was or scheduled  # schedules end with the run
    }
    if refused:
        lines = [
            f"  {name}: {was!r} in the run, {now!r} now" for name, (was, now) in refused.items()
        ]
        raise ValueError(
            "\n".join(
                [
                    f"{directory} holds a different run; a resume may only raise 'steps':",
                    *lines,
                    "repeat the original options, or start a new run with --out",
                ]
            )
        )
