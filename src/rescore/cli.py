"""The command line: ``rescore COMMAND ...``; see ``rescore --help``."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:  # torch takes over a second to import; --help and list do without
    from rescore.training.run import Run

Recipe = Callable[[], Any]


class UserError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do."""


# Recipes ----------------------------------------------------------------------------------------


def recipes() -> dict[str, Recipe]:
    """Every recipe of the installed packages: public functions without arguments, by name."""
    found: dict[str, Recipe] = {}
    for entry in entry_points(group="rescore.recipes"):
        found |= recipes_in(entry.load())
    return found


def recipes_in(module: ModuleType) -> dict[str, Recipe]:
    """The public functions that a module defines and that take no arguments."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(function).parameters
    }


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or ``FILE.py`` (its only recipe) or ``FILE.py:function``.

    Raises:
        UserError: there is none; suggests the closest name.
    """
    path, _, function = name.partition(":")
    if path.endswith(".py"):
        known = recipes_in(_module(Path(path)))
        if not function and len(known) == 1:
            return next(iter(known.values()))
        name = function or "recipe"
    else:
        known = recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"unknown recipe '{name}'{hint} There are: {', '.join(sorted(known))}")
    return known[name]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path} is not a file; give the path of a Python file with a recipe")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# Commands ---------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Train:
    """Train, evaluate on the test split and write a report."""

    run: tyro.conf.OmitArgPrefixes[Any]
    out: Path | None = None
    """Run directory; default runs/RECIPE-seedN-TIME."""
    resume: Path | None = None
    """Continue the run in this directory; only --steps may differ."""


def train(arguments: Sequence[str]) -> None:
    """``rescore train RECIPE|FILE.py [--out DIR] [--resume DIR] [overrides]``."""
    from rescore.training.directory import Origin, read_run
    from rescore.training.session import start

    name, rest = _first(arguments, "train RECIPE|FILE.py", optional="--resume" in arguments)
    if name is None:  # rescore train --resume DIR: the recipe and its options are in the directory
        directory = Path(rest[rest.index("--resume") + 1]) if len(rest) > 1 else Path()
        stored = read_run(directory)
        name = stored["recipe"]
        if name.endswith(".py") or ".py:" in name:
            name = str(directory / "recipe.py") + (":" + name.split(":")[1] if ":" in name else "")
        rest = [*stored["arguments"], *rest]
    options = _options(Train, name, rest)
    run: Run = options.run
    kept = _without(rest, ("--out", "--resume"))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    out = options.resume or options.out or Path("runs") / f"{Path(name).stem}-seed{run.seed}-{stamp}"
    origin = Origin(recipe=name, arguments=tuple(kept))
    report = start(run, origin, out, resume=options.resume is not None)
    print(f"report: {report}")


@dataclass(kw_only=True)
class Pretrain:
    """Train the base model of a recipe and keep it in the cache."""

    run: tyro.conf.OmitArgPrefixes[Any]


def pretrain(arguments: Sequence[str]) -> None:
    """``rescore pretrain RECIPE [overrides]``."""
    from rescore.training.directory import default_cache

    name, rest = _first(arguments, "pretrain RECIPE")
    run: Run = _options(Pretrain, name, rest).run
    run.check()
    module = run.base.build(
        run.task, seed=run.seed, cache=default_cache(), device=run.device, note=print
    )
    size = sum(p.numel() for p in module.parameters())
    print(f"base of {name}: {size:,} parameters, in {default_cache()}")
