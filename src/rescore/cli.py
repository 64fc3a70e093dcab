"""The command line: ``rescore COMMAND ...``; see ``rescore --help``."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
        raise UserError(_unknown("recipe", name, known))
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
class Where:
    """Where a run is written."""

    out: Path | None = None
    """Run directory; default runs/RECIPE-seedN-TIME."""
    resume: Path | None = None
    """Continue the run in this directory; of its options only --steps may change."""


TRAIN_HELP = """Train a recipe, evaluate it on the test split and write a report.

--out DIR      run directory; default runs/RECIPE-seedN-TIME
--resume DIR   continue the run in DIR; of its options only --steps may change"""


def train(arguments: Sequence[str]) -> None:
    """rescore train RECIPE|FILE.py [--out DIR] [--resume DIR] [overrides]"""
    from rescore.training.directory import Origin, read_run
    from rescore.training.session import start

    name, rest = _recipe_name(arguments)
    where, overrides = tyro.cli(Where, args=rest, return_unknown_args=True, add_help=False)
    if name is None and where.resume:  # the directory knows the recipe and its options
        stored = read_run(where.resume)
        name = _stored_recipe(where.resume, stored)
        overrides = [*stored["arguments"], *overrides]
    if where.out and where.resume:
        raise UserError("--resume continues in its own directory; leave --out away")
    run = _parse("train", name, overrides, TRAIN_HELP)
    assert name is not None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    new = Path("runs") / f"{Path(name.partition(':')[0]).stem}-seed{run.seed}-{stamp}"
    out = where.resume or where.out or new
    origin = Origin(recipe=name, arguments=tuple(overrides))
    print(f"report: {start(run, origin, out, resume=where.resume is not None)}")


def pretrain(arguments: Sequence[str]) -> None:
    """rescore pretrain RECIPE|FILE.py [overrides]"""
    from rescore.training.directory import default_cache

    name, rest = _recipe_name(arguments)
    run = _parse("pretrain", name, rest, "Train the base of a recipe and keep it in the cache.")
    run.check()
    module = run.base.build(
        run.task, seed=run.seed, cache=default_cache(), device=run.device, note=print
    )
    size = sum(p.numel() for p in module.parameters())
    print(f"base of {name}: {size:,} parameters, kept in {default_cache()}")


@dataclass(kw_only=True)
class Evaluate:
    """Evaluate the best checkpoint of a run."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""
    split: str = "test"
    """train, validation or test."""
    n: int = 512
    """Prompts, one sample each."""
    steps: int | None = None
    """Decode in another number of steps than the run did."""
    order: str | None = None
    """Decode in another order than the run did."""
    temperature: float | None = None
    """Sample at another temperature; 0 takes the most probable tokens."""


def evaluate(arguments: Sequence[str]) -> None:
    """rescore eval RUN [--split test] [--n 512] [--steps K] [--order O] [--temperature T]"""
    from rescore.training.session import evaluate_run, result_line

    options = tyro.cli(Evaluate, args=list(arguments), prog="rescore eval")
    changes = {name: getattr(options, name) for name in ("steps", "order", "temperature")}
    run = _stored_run(options.directory)
    for row in evaluate_run(run, options.directory, options.split, options.n, _given(changes)):
        print(result_line(row))


@dataclass(kw_only=True)
class Sample:
    """Print samples of the best checkpoint of a run."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""
    prompts: tuple[str, ...] = ()
    """Prompts as text, such as 16-character Sudokus; default: prompts of the test split."""
    n: int = 2
    """How many test prompts, if none are given."""
    seed: int = 0
    """Of the noise."""
    steps: int | None = None
    """Decode in another number of steps than the run did."""
    order: str | None = None
    """Decode in another order than the run did."""
    temperature: float | None = None
    """Sample at another temperature; 0 takes the most probable tokens."""


def sample(arguments: Sequence[str]) -> None:
    """rescore sample RUN [--prompts TEXT ...] [--n 2] [--seed 0] [--steps K]"""
    from rescore.training.session import sample_run

    options = tyro.cli(Sample, args=list(arguments), prog="rescore sample")
    changes = {name: getattr(options, name) for name in ("steps", "order", "temperature")}
    run = _stored_run(options.directory)
    texts = sample_run(
        run, options.directory, options.prompts, options.n, options.seed, _given(changes)
    )
    print("\n\n".join(texts))


@dataclass(kw_only=True)
class Verify:
    """Compare every algorithm's expected gradient with the exact one, by enumeration."""

    algorithms: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of algorithms; all if none is given."""
    json: Path | None = None
    """Also write the rows to this file."""


def verify(arguments: Sequence[str]) -> None:
    """rescore verify [ALGORITHM ...] [--json FILE]"""
    from rescore.proof.verify import print_rows
    from rescore.proof.verify import verify as verify_rows
    from rescore.training.checkpoint import write_json

    options = tyro.cli(Verify, args=list(arguments), prog="rescore verify")
    unknown = [name for name in options.algorithms if name not in algorithms()]
    if unknown:
        raise UserError(_unknown("algorithm", unknown[0], algorithms()))
    rows = verify_rows(options.algorithms or None)
    print_rows(rows)
    if options.json:
        write_json(options.json, [dataclasses.asdict(row) for row in rows])
    if not all(row.ok for row in rows):
        sys.exit(1)


@dataclass(kw_only=True)
class Bench:
    """Measure where an RL step spends its time, against the bare network calls."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of recipes; every recipe that runs on a CPU if none is given."""
    json: Path | None = None
    """Also write the rows to this file."""
    repeats: int = 7
    """RL steps measured, each beside a bare one; the figures are medians."""


def bench(arguments: Sequence[str]) -> None:
    """rescore bench [RECIPE ...] [--json FILE]"""
    from rescore.training.bench import measure, print_rows
    from rescore.training.checkpoint import write_json

    options = tyro.cli(Bench, args=list(arguments), prog="rescore bench")
    runs = {name: find_recipe(name)() for name in options.recipes or sorted(recipes())}
    rows = [measure(name, run, repeats=options.repeats) for name, run in runs.items()]
    print_rows(rows)
    if options.json:
        write_json(options.json, [dataclasses.asdict(row) for row in rows])


@dataclass(kw_only=True)
class Report:
    """Write the report of a run again."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path | None = None
    """HTML file; default report.html in the run directory."""


def report(arguments: Sequence[str]) -> None:
    """rescore report RUN [--out FILE]"""
    from rescore.evaluation.report import build_report

    options = tyro.cli(Report, args=list(arguments), prog="rescore report")
    print(build_report(options.directory, options.out))


def list_everything(arguments: Sequence[str]) -> None:
    """rescore list"""
    for title, items in (("Recipes", recipes()), ("Algorithms", algorithms())):
        print(f"{title}:")
        for name, item in sorted(items.items()):
            print(f"  {name:24}{(inspect.getdoc(item) or '').splitlines()[0]}")


def cite(arguments: Sequence[str]) -> None:
    """rescore cite ALGORITHM"""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(f"rescore cite takes one algorithm; there are {', '.join(algorithms())}")
    if arguments[0] not in algorithms():
        raise UserError(_unknown("algorithm", arguments[0], algorithms()))
    print(algorithms()[arguments[0]].citation)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "pretrain": pretrain,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "verify": verify,
    "bench": bench,
    "report": report,
    "list": list_everything,
    "cite": cite,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit 0, 2 for the user's mistakes, 130 when stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rescore COMMAND ...\n\nRL fine-tuning of diffusion models.\n\ncommands:")
        print("\n".join(f"  {inspect.getdoc(command)}" for command in COMMANDS.values()))
        print("\nrescore COMMAND --help lists the options; --seed, --device and --precision are")
        print("among those of every command that runs a recipe.")
        return
    if arguments[0] == "--version":
        from rescore import __version__

        print(__version__)
        return
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(_unknown("command", arguments[0], COMMANDS))
        COMMANDS[arguments[0]](arguments[1:])
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
    except KeyboardInterrupt:
        print("\nstopped at once; resume from the last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Print the message of an expected error and return its exit code; raise any other again."""
    from rescore.rewards.reward import RewardError
    from rescore.training.loop import Interrupted
    from rescore.training.optim import TrainingError

    if isinstance(error, Interrupted):
        print(f"\nstopped; {error}", file=sys.stderr)
        return 130
    if isinstance(error, ValueError | RewardError | TrainingError | OSError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    raise error


# Arguments --------------------------------------------------------------------------------------


def algorithms() -> dict[str, Any]:
    """Every algorithm by the name of its module."""
    from rescore.algorithms import base

    found = {}
    for module in pkgutil.iter_modules([str(Path(base.__file__).parent)]):
        content = importlib.import_module(f"rescore.algorithms.{module.name}")
        for _, item in inspect.getmembers(content, inspect.isclass):
            if item.__module__ == content.__name__ and issubclass(item, base.Algorithm):
                if not inspect.isabstract(item):
                    found[module.name] = item
    return found


def _recipe_name(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The leading name of a recipe, if there is one, and the options after it."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def _parse(verb: str, name: str | None, overrides: Sequence[str], description: str) -> Run:
    """The run of a recipe with its fields overridden by options."""
    if name is None and {"-h", "--help"} & set(overrides):
        print(f"usage: rescore {verb} RECIPE|FILE.py [overrides]\n\n{description}\n")
        print(f"rescore {verb} RECIPE --help shows the fields of a recipe; rescore list the recipes.")
        sys.exit(0)
    if name is None:
        raise UserError(f"usage: rescore {verb} RECIPE|FILE.py [overrides]; see rescore list")
    run = find_recipe(name)()
    return tyro.cli(
        type(run),
        default=run,
        args=list(overrides),
        prog=f"rescore {verb} {name}",
        description=description,
    )


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}There are: {', '.join(sorted(known))}"


def _stored_run(directory: Path) -> Run:
    """The run of a run directory, built again from its recipe and options."""
    from rescore.training.directory import read_run

    stored = read_run(directory)
    return _parse("train", _stored_recipe(directory, stored), stored["arguments"], TRAIN_HELP)


def _stored_recipe(directory: Path, stored: dict[str, Any]) -> str:
    """The recipe of a run: its name, or the copy of its file in the run directory."""
    path, colon, function = stored["recipe"].partition(":")
    return f"{directory / 'recipe.py'}{colon}{function}" if path.endswith(".py") else path
