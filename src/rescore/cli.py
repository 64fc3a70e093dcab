"""The command line: ``rescore COMMAND ...``; see ``rescore --help``.

Modules that need torch are imported inside the commands, because torch takes a second to import and
a mistyped command should not.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rescore.training.recipes import FILE_MODULE, recipes, run_of, unknown

if TYPE_CHECKING:
    from rescore.training.run import Run

Command = Callable[[Sequence[str]], None]

DRY_RUN = "--dry-run"


@dataclass(kw_only=True)
class Where:
    """Where a run is written."""

    out: Path | None = None
    resume: Path | None = None


def train(arguments: Sequence[str]) -> None:
    """Train a recipe, evaluate it on the test split and write a report.

    --out DIR      run directory; default runs/RECIPE-seedN-TIME
    --resume DIR   continue the run in DIR with its recipe and options; --steps may grow
    --dry-run      try the recipe of a large model on a tiny one of random weights, on any machine
    """
    from rescore.training.directory import Origin
    from rescore.training.loop import Interrupted
    from rescore.training.session import start

    where, rest = tyro.cli(Where, args=arguments, return_unknown_args=True, add_help=False)
    recipe, overrides = _leading(rest)
    if where.resume:
        if where.out:
            raise ValueError("--resume continues in its own directory; leave --out away")
        stored, copy, options = _stored(where.resume)
        if recipe not in (None, stored):
            raise ValueError(f"{where.resume} is a run of '{stored}', not of '{recipe}'")
        recipe, source, overrides = stored, copy, [*options, *overrides]
    else:
        recipe = source = _needed(recipe, "train RECIPE|FILE.py", train, overrides)
        if not where.out and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("several processes must agree on a directory; name it with --out DIR")
    out = where.resume or where.out
    if out is None:
        plain = _overridden(source, train, [word for word in overrides if word != DRY_RUN])
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{Path(recipe.partition(':')[0]).stem}-seed{plain.seed}-{stamp}"
    run = _overridden(source, train, overrides, out)
    origin = Origin(recipe=recipe, arguments=tuple(overrides))
    try:
        written = start(run, origin, out, resume=where.resume is not None)
    except Interrupted as stop:
        print(f"\nstopped, {stop}; rescore train --resume {out} continues", file=sys.stderr)
        sys.exit(130)
    if os.environ.get("RANK", "0") == "0":
        print(f"report: {written}")


def pretrain(arguments: Sequence[str]) -> None:
    """Train the base model of a recipe and keep it in the cache."""
    from rescore.training.directory import default_cache

    name, rest = _leading(arguments)
    recipe = _needed(name, "pretrain RECIPE|FILE.py", pretrain, rest)
    run = _overridden(recipe, pretrain, rest)
    run.check()
    cache = default_cache()
    module = run.base.build(run.task, seed=run.seed, cache=cache, device=run.device, note=print)
    size = sum(p.numel() for p in module.parameters())
    print(f"base of {recipe}: {size:,} parameters, kept in {cache}")


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate the best checkpoint of a run, by default as the run itself does."""
    from rescore.training.session import Evaluation, evaluate_run, result_line

    directory, run, options = _revisit(Evaluation, "eval", evaluate, arguments)
    print(result_line(evaluate_run(run, directory, options)))


def sample(arguments: Sequence[str]) -> None:
    """Print samples of the best checkpoint of a run: prompt, reward terms, output or a PNG file."""
    from rescore.training.session import Sampling, sample_run

    directory, run, options = _revisit(Sampling, "sample", sample, arguments)
    print("\n\n".join(sample_run(run, directory, options)))


def export(arguments: Sequence[str]) -> None:
    """Write the best weights of a run on a pretrained model: adapters for peft, or all merged.

    --out DIR    a new folder
    --merged     all weights in the layout of the original checkpoint
    """
    from rescore.training.export import Export, export_run

    directory, run, options = _revisit(Export, "export", export, arguments)
    print(export_run(run, directory, options))


def warm_start(arguments: Sequence[str]) -> None:
    """Fine-tune the base of a recipe on demonstrations, to start RL from.

    --data FILE    rows with question and completion
    --out DIR      a new folder for the weights; train with --base.weights DIR
    --steps, --batch, --lr, --micro-batch, --held-out and the other fields of Sft
    """
    from rescore.training.sft import Sft, sft

    name, rest = _leading(arguments)
    recipe = _needed(name, "sft RECIPE|FILE.py", warm_start, rest)
    options, rest = tyro.cli(
        Sft, args=rest, return_unknown_args=True, add_help=False, prog=f"rescore sft {recipe}"
    )
    out = sft(_overridden(recipe, warm_start, rest, options.out), options, print)
    print(f"rescore train {recipe} --base.weights {out}")


@dataclass(kw_only=True)
class Verify:
    """Compare the expected gradient of every algorithm with the exact one, by enumeration."""

    algorithms: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of algorithms; all if none is given."""
    json: Path | None = None
    """Also write the rows to this file."""


def verify(arguments: Sequence[str]) -> None:
    """Compare the expected gradient of every algorithm with the exact one, by enumeration."""
    options = tyro.cli(Verify, args=arguments, prog="rescore verify")
    from rescore.proof.verify import print_rows
    from rescore.proof.verify import verify as verify_rows

    rows = verify_rows(options.algorithms or None)
    print_rows(rows)
    _write_rows(options.json, rows)
    if not all(row.ok for row in rows):
        sys.exit(1)


@dataclass(kw_only=True)
class Bench:
    """Measure where an RL step spends its time, beside the bare network calls."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of recipes; if none is given, every installed one that runs on the CPU, trains its
    own base and finds its packages."""
    json: Path | None = None
    """Also write the rows to this file."""
    repeats: int = 7
    """RL steps measured, each beside a bare one; the figures are medians."""
    seed: int | None = None
    """Instead of the recipe's."""
    device: str | None = None
    """Instead of the recipe's."""
    precision: Literal["float32", "float64", "bfloat16"] | None = None
    """Instead of the recipe's."""


def bench(arguments: Sequence[str]) -> None:
    """Measure where an RL step spends its time, beside the bare network calls."""
    options = tyro.cli(Bench, args=arguments, prog="rescore bench")
    from rescore.training.bench import check_measurable, measure, print_rows, serves

    changes = {name: getattr(options, name) for name in ("seed", "device", "precision")}
    changes = {name: value for name, value in changes.items() if value is not None}
    names = options.recipes or sorted(recipes())
    runs = {name: dataclasses.replace(run_of(name), **changes) for name in names}
    if not options.recipes:
        runs = {name: run for name, run in runs.items() if serves(run)}
        if left_out := sorted(set(names) - set(runs)):
            print(f"left out, name them to measure them: {', '.join(left_out)}")
    for run in runs.values():
        check_measurable(run, repeats=options.repeats)
    rows = [measure(name, run, repeats=options.repeats) for name, run in runs.items()]
    print_rows(rows)
    _write_rows(options.json, rows)


@dataclass(kw_only=True)
class Report:
    """Write the report of a run again."""

    directory: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path | None = None
    """HTML file; default report.html in the run directory."""


def report(arguments: Sequence[str]) -> None:
    """Write the report of a run again."""
    options = tyro.cli(Report, args=arguments, prog="rescore report")
    from rescore.evaluation.report import build_report

    print(build_report(options.directory, options.out))


@dataclass(kw_only=True)
class List:
    """List the recipes and the algorithms there are."""


def list_everything(arguments: Sequence[str]) -> None:
    """List the recipes and the algorithms there are."""
    tyro.cli(List, args=arguments, prog="rescore list")
    from rescore.algorithms import algorithms

    for title, items in (("Recipes", recipes()), ("Algorithms", algorithms())):
        print(f"{title}:")
        for name, item in sorted(items.items()):
            print(f"  {name:26}{_headline(item)}")


@dataclass(kw_only=True)
class Cite:
    """Print the BibTeX entry of the source of an algorithm."""

    algorithm: tyro.conf.Positional[str]
    """Its name; see ``rescore list``."""


def cite(arguments: Sequence[str]) -> None:
    """Print the BibTeX entry of the source of an algorithm."""
    name = tyro.cli(Cite, args=arguments, prog="rescore cite").algorithm
    from rescore.algorithms import algorithms

    known = algorithms()
    if name not in known:
        raise unknown("algorithm", name, known)
    print(known[name].citation)


COMMANDS: dict[str, Command] = {
    "pretrain": pretrain,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "export": export,
    "sft": warm_start,
    "verify": verify,
    "bench": bench,
    "report": report,
    "list": list_everything,
    "cite": cite,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 1 a claim fails, 2 the user's mistake, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rescore COMMAND ...\n\nRL fine-tuning of diffusion models.\n\ncommands:")
        print("\n".join(f"  {name:10}{_headline(item)}" for name, item in COMMANDS.items()))
        print("\nrescore COMMAND --help lists the options. --seed, --device and --precision are")
        print("among those of every command that runs a model.")
        return
    if arguments[0] == "--version":
        from rescore import __version__

        print(__version__)
        return
    try:
        if arguments[0] not in COMMANDS:
            raise unknown("command", arguments[0], COMMANDS)
        COMMANDS[arguments[0]](arguments[1:])
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nstopped at once", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _expected(error: Exception) -> bool:
    """True for what the disk refuses and for a ``raise`` of ours or of a recipe file: no bug."""
    if isinstance(error, OSError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, ValueError | RuntimeError):
        return False
    line = inspect.getframeinfo(trace).code_context or [""]
    ours = trace.tb_frame.f_globals["__name__"].startswith(("rescore", FILE_MODULE))
    return ours and line[0].lstrip().startswith("raise")


def _headline(item: object) -> str:
    return (inspect.getdoc(item) or "").partition("\n")[0]


def _leading(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The leading name, if there is one, and the options after it."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def _needed(name: str | None, usage: str, command: Command, rest: Sequence[str]) -> str:
    """The leading name; the list of options depends on it, so --help alone explains the command."""
    if name is not None:
        return name
    usage = f"usage: rescore {usage} [options]"
    if not {"-h", "--help"} & set(rest):
        raise ValueError(f"the first argument is missing; {usage}")
    name = usage.split()[3]
    print(f"{usage}\n\n{inspect.getdoc(command)}\n\nWith {name}, --help lists all options.")
    sys.exit(0)


def _overridden(
    recipe: str, command: Command, options: Sequence[str], directory: Path | None = None
) -> Run:
    """The run of a recipe with fields changed by options; the classes of its parts stay.

    With ``--dry-run`` it is the dry run that is changed; its weights lie beside the run directory.
    """
    run, options = run_of(recipe), list(options)
    if directory is not None and DRY_RUN in options:
        from rescore.training.dry_run import dry_run

        options.remove(DRY_RUN)
        run = dry_run(run, directory.with_name(f"{directory.name}-weights"))
    return tyro.cli(
        type(run),
        default=run,
        args=options,
        prog=f"rescore {command.__name__} {recipe}",
        description=inspect.getdoc(command),
        config=(tyro.conf.AvoidSubcommands,),
    )


def _stored(directory: Path) -> tuple[str, str, list[str]]:
    """Recipe of a run directory, where to find it now (the copy, if it was a file), and options."""
    from rescore.training.directory import read_run

    stored = read_run(directory)
    path, colon, function = stored["recipe"].partition(":")
    source = f"{directory / 'recipe.py'}{colon}{function}" if path.endswith(".py") else path
    return stored["recipe"], source, stored["arguments"]


def _revisit(
    kind: type[Any], name: str, command: Command, arguments: Sequence[str]
) -> tuple[Path, Run, Any]:
    """A run directory, its run, and how to use it: as the run did, but for what options change."""
    leading, rest = _leading(arguments)
    directory = Path(_needed(leading, f"{name} RUN", command, rest))
    _, source, options = _stored(directory)
    run = _overridden(source, train, options, directory)
    known = {field.name for field in dataclasses.fields(kind)}
    shared = known & {"decoder", "seed", "device", "precision"}
    default = kind(**{name: getattr(run, name) for name in shared})
    chosen = tyro.cli(
        kind,
        default=default,
        args=rest,
        prog=f"rescore {name} {directory}",
        description=inspect.getdoc(command),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return directory, run, chosen


def _write_rows(path: Path | None, rows: Sequence[Any]) -> None:
    from rescore.training.checkpoint import write_json

    if path is not None:
        write_json(path, [dataclasses.asdict(row) for row in rows])
