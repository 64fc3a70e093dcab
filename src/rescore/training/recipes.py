"""Recipes: functions without arguments that return a ``Run``, found by name or in a file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a mistyped name is answered without the second that torch takes to import
    from rescore.training.run import Run

FILE_MODULE = "recipe"
"""Name under which a recipe file is imported: the same for the file and for its copy in a run
directory, so that both describe the same run."""


def recipes() -> dict[str, Callable[[], Run]]:
    """Every recipe of the installed packages, by name: entry points of ``rescore.recipes``."""
    found: dict[str, Callable[[], Run]] = {}
    for entry in entry_points(group="rescore.recipes"):
        found |= recipes_in(entry.load())
    return found


def recipes_in(module: ModuleType) -> dict[str, Callable[[], Run]]:
    """The public functions that a module defines itself and that take no arguments."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(function).parameters
    }


def run_of(recipe: str) -> Run:
    """The run that a recipe describes.

    Args:
        recipe: a name, ``FILE.py`` (its only recipe) or ``FILE.py:function``. A file must not
            import its neighbours, because its copy in the run directory has none.

    Raises:
        ValueError: there is no such recipe (with the closest name), the file fails, or what it
            returns is no ``Run``.
    """
    path, _, function = recipe.partition(":")
    if path.endswith(".py"):
        with _blaming(Path(path)):
            known = recipes_in(_module(Path(path)))
            name = function or _only(path, known)
            run = _get(known, name)()
    else:
        run = _get(recipes(), recipe)()
    from rescore.training.run import Run

    if not isinstance(run, Run):
        raise ValueError(f"recipe '{recipe}' returned {type(run).__name__}; expected a Run")
    return run


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the closest one that does."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return ValueError(f"unknown {kind} '{name}'; {hint}There are: {', '.join(sorted(known))}")


def _get(known: dict[str, Callable[[], Run]], name: str) -> Callable[[], Run]:
    if name not in known:
        raise unknown("recipe", name, known)
    return known[name]


def _only(path: str, known: dict[str, Callable[[], Run]]) -> str:
    if len(known) == 1:
        return next(iter(known))
    if known:
        choices = ", ".join(f"{path}:{name}" for name in sorted(known))
        raise ValueError(f"{path} has several recipes; name one: {choices}")
    raise ValueError(f"{path} has no recipe: a public function without arguments, defined there")


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a Python file with a recipe")
    spec = importlib.util.spec_from_file_location(FILE_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE_MODULE] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever the code of a recipe file raises into one message that names the line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
        if not lines and not isinstance(error, SyntaxError):
            raise
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{path}{where}: {type(error).__name__}: {error}") from error
