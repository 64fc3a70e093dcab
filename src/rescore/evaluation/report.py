"""One self-contained HTML file that tells what a run did, from the files of its directory.

No network, no script: tables, inline SVG, a film strip of one puzzle or a sheet of images. Whatever
a run has not written yet is left out with a sentence, so that a run can be looked at while it is
going.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from rescore.evaluation import plots


def build_report(run: Path, out: Path | None = None) -> Path:
    r"""Write the report of a run directory, complete or not at all, and return where it is.

    A difference of two means has the standard error $\sqrt{s_1^2 + s_2^2}$, which takes the two
    rows as independent. The same files give the same bytes.

    Args:
        run: a directory written by ``rescore train``. Only its ``run.json`` must exist.
        out: the HTML file; ``report.html`` in the run directory when None.

    Raises:
        ValueError: ``run`` is not a run directory, or one of its files is not JSON or lacks
            a field.
    """
    described = _described(run)
    metrics = _rows(run / "metrics.jsonl", "step")
    evaluations = _rows(run / "evaluations.jsonl", "step", "split", "weights", "metrics")
    html = _template().render(
        run=described,
        facts=_facts(described, metrics),
        comparison=Comparison.read(run / "result.json"),
        film=Film.read(run / "samples" / "film.json"),
        sheets=_sheets(run / "samples"),
        learning=plots.learning_panels(metrics, evaluations),
        diagnostics=plots.diagnostic_panels(metrics, evaluations),
        to_json=json.dumps,
        environment=_load(run / "environment.json"),
    )
    out = out or run / "report.html"
    _write_atomically(out, html)
    return out


# --- reading ----------------------------------------------------------------------------------


def _described(run: Path) -> Mapping[str, Any]:
    described = _load(run / "run.json", "recipe", "command", "config", "seed")
    if described is None:
        raise ValueError(
            f"{run} is not a run directory: it holds no run.json; "
            f"give the directory that 'rescore train' wrote (its --out)"
        )
    _check(described["config"], f"{run / 'run.json'}, config", ())
    return described


def _load(path: Path, *keys: str) -> Mapping[str, Any] | None:
    """The JSON object in ``path``, which must have ``keys``; None where there is no such file."""
    return _object(path.read_text("utf-8"), str(path), keys) if path.is_file() else None


def _rows(path: Path, *keys: str) -> list[Mapping[str, Any]]:
    """The objects of a JSONL file, none where there is no file.

    A last line without its newline is still being written and is not read.
    """
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").split("\n")[:-1]
    return [_object(line, f"{path}, line {i}", keys) for i, line in enumerate(lines, start=1)]


def _object(text: str, where: str, keys: Iterable[str]) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    return _check(value, where, keys)


def _check(value: Any, where: str, keys: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}; expected an object")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{where} lacks {missing}; it has {sorted(value)}")
    return value


# --- before and after -------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None where it is not known."""

    mean: float
    se: float | None

    @classmethod
    def read(cls, value: Any, where: str) -> Estimate:
        mean = plots.finite(_check(value, where, ("mean", "se"))["mean"])
        if mean is None:
            raise ValueError(f"{where} has the mean {value['mean']!r}; expected a finite number")
        return cls(mean, plots.finite(value["se"]))

    def __sub__(self, other: Estimate) -> Estimate:
        both = [se for se in (self.se, other.se) if se is not None]
        return Estimate(self.mean - other.mean, math.hypot(*both) if len(both) == 2 else None)

    def show(self, sign: str = "-") -> str:
        """Three decimals, ``mean ± s.e.``; ``sign="+"`` writes the plus of a difference."""
        mean = f"{self.mean:{sign}.3f}".replace("-", "\N{MINUS SIGN}")
        return mean if self.se is None else f"{mean} ± {self.se:.3f}"

    @property
    def verdict(self) -> str:
        """``up`` or ``down`` beyond two standard errors, else ``within``, or ``unknown``."""
        if self.se is None:
            return "unknown"
        if abs(self.mean) <= 2 * self.se:
            return "within"
        return "up" if self.mean > 0 else "down"


@dataclass(frozen=True)
class Row:
    """A row of the table: each metric, and by how much it differs from the first row's."""

    label: str
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    cpu_s: float | None


@dataclass(frozen=True)
class Comparison:
    """What ``result.json`` holds: rows with the same metrics, the first of them the reference."""

    n: int
    split: str
    protocol: str
    rows: Sequence[Row]
    metrics: Sequence[str]
    """Names in the order of the columns; the first is the one that counts."""

    @classmethod
    def read(cls, path: Path) -> Comparison | None:
        result = _load(path, "n", "split", "protocol", "rows")
        if result is None:
            return None
        rows: list[Row] = []
        for i, item in enumerate(result["rows"]):
            where = f"{path}, row {i}"
            item = _check(item, where, ("label", "metrics"))
            values = {
                name: Estimate.read(value, f"{where}, {name}")
                for name, value in _check(item["metrics"], where, ()).items()
            }
            first = rows[0].values if rows else values
            if not values or values.keys() != first.keys():
                raise ValueError(
                    f"{where} has the metrics {list(values)}; expected {list(first) or 'some'}, "
                    f"the same in every row"
                )
            differences = {name: values[name] - first[name] for name in values if rows}
            rows.append(Row(item["label"], values, differences, plots.finite(item.get("cpu_s"))))
        if not rows:
            raise ValueError(f"{path} has no rows; expected one for the base model at least")
        names = sorted(rows[0].values, key=lambda name: name != result.get("headline"))
        return cls(result["n"], result["split"], result["protocol"], rows, names)

    @property
    def gaps(self) -> list[tuple[str, Estimate]]:
        """By how much the last row exceeds each row before it, in the metric that counts."""
        *others, last = self.rows
        name = self.metrics[0]
        return [(row.label, last.values[name] - row.values[name]) for row in others]


# --- samples ----------------------------------------------------------------------------------


def _sheets(samples: Path) -> dict[str, str]:
    """Sheets of images before and after as data URIs, by label; empty unless both are there."""
    files = {label: samples / f"{label}.png" for label in ("before", "after")}
    if not all(file.is_file() for file in files.values()):
        return {}
    coded = {label: base64.b64encode(file.read_bytes()).decode() for label, file in files.items()}
    return {label: f"data:image/png;base64,{code}" for label, code in coded.items()}


# --- film -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One canvas: its cells as (text, CSS classes)."""

    step: int
    cells: Sequence[tuple[str, str]]

    def count(self, state: str) -> int:
        return sum(state in classes.split() for _, classes in self.cells)


@dataclass(frozen=True)
class Strip:
    """The frames of one sample, first to last."""

    label: str
    note: str
    frames: Sequence[Frame]


@dataclass(frozen=True)
class Film:
    """The same puzzle denoised by several models."""

    title: str
    columns: int
    strips: Sequence[Strip]

    @classmethod
    def read(cls, path: Path) -> Film | None:
        film = _load(path, "title", "puzzle", "strips")
        if film is None:
            return None
        sizes = ("rows", "columns", "box_rows", "box_columns")
        puzzle = _check(film["puzzle"], f"{path}, puzzle", sizes)
        strips = [
            _strip(strip, puzzle, f"{path}, strip {i}") for i, strip in enumerate(film["strips"])
        ]
        return cls(film["title"], puzzle["columns"], strips)


def _strip(value: Any, puzzle: Mapping[str, Any], where: str) -> Strip:
    strip = _check(value, where, ("label", "frames", "given", "solution", "note"))
    given, solution, previous = strip["given"], strip["solution"], None
    borders = _borders(puzzle)
    frames = []
    for i, item in enumerate(strip["frames"]):
        cells = _check(item, f"{where}, frame {i}", ("step", "cells"))["cells"]
        if not len(cells) == len(given) == len(solution) == len(borders):
            raise ValueError(
                f"{where}, frame {i} has {len(cells)} cells, {len(given)} given flags and "
                f"{len(solution)} solution cells; expected {len(borders)} of each, "
                f"rows times columns of the puzzle"
            )
        states = map(cell_state, cells, previous or cells, given, solution)
        classes = [
            f"{state} {border}".strip() for state, border in zip(states, borders, strict=True)
        ]
        frames.append(Frame(item["step"], list(zip(cells, classes, strict=True))))
        previous = cells
    return Strip(strip["label"], strip["note"], frames)


def cell_state(cell: str, before: str, given: bool, solution: str) -> str:
    """How a cell is drawn: ``given``, ``blank``, ``right`` or ``wrong``; ``new`` if it changed."""
    if given:
        return "given"
    if not cell:
        return "blank"
    verdict = "right" if cell == solution else "wrong"
    return verdict if cell == before else f"{verdict} new"


def _borders(puzzle: Mapping[str, Any]) -> list[str]:
    """For each cell, the sides on which a box ends inside the puzzle."""
    rows, columns = puzzle["rows"], puzzle["columns"]
    height, width = puzzle["box_rows"], puzzle["box_columns"]
    return [
        " ".join(
            name
            for name, at, box, n in (("below", r, height, rows), ("beside", c, width, columns))
            if (at + 1) % box == 0 and at + 1 < n
        )
        for r in range(rows)
        for c in range(columns)
    ]


# --- writing ----------------------------------------------------------------------------------


def _facts(run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader wants to know before anything else, a few words each."""
    last = metrics[-1] if metrics else {}
    samples, seconds = plots.finite(last.get("samples")), plots.finite(last.get("time/elapsed_s"))
    facts = [f"seed {run['seed']}", f"{last['step'] if last else 0} RL steps"]
    if samples is not None:
        facts.append(f"{samples:,.0f} samples")
    if seconds is not None:
        facts.append(f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min")
    return facts


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    return environment.from_string(source)


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
