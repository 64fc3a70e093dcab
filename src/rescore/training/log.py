"""Where numbers go: a file that survives a kill, TensorBoard, and a live display."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.columns import Columns
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rescore.training.checkpoint import StorageError, write_atomic

Row = Mapping[str, Any]
"""Metric name to number, string, or mapping of further ones."""

HEADLINES = (
    *("reward", "solve_rate", "cell_accuracy", "kl_old_new", "kl_new_ref", "entropy"),
    *("clip_fraction", "ratio_min", "ratio_max", "gradient_norm", "time/samples_per_s"),
)
"""The metrics of an RL step that a person watches, in the order of the display."""


class Sink(Protocol):
    """Takes rows of metrics."""

    def log(self, row: Row) -> None:
        """Keep ``row``; its "step" is the number of updates done when it was measured."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...


class MetricsFile:
    """One line of JSON per row, handed to the system before ``log`` returns.

    JSON has no NaN and no infinities: they become null and are counted in ``n_non_finite``.

    Raises:
        StorageError: from the constructor and ``log``: the disk is full or refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_non_finite = 0
        """Values written as null since this object was made."""
        self._append("")

    def log(self, row: Row) -> None:
        self._append(json.dumps(self._finite(row), allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Cut rows later than ``step`` and a last line torn by a kill; the rest stays bitwise."""
        kept = [line for line, row in _lines(self.path) if row["step"] <= step]
        write_atomic(self.path, "".join(kept))

    def close(self) -> None:
        pass

    def _finite(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._finite(item) for name, item in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            self.n_non_finite += 1
            return None
        return value

    def _append(self, text: str) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise StorageError(
                f"cannot write metrics to {self.path}: {error.strerror}; earlier rows are intact"
            ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``MetricsFile``, without a last line torn by a kill; null where not finite.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    parsed = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                parsed.append((line.rstrip("\n") + "\n", json.loads(line)))
            except ValueError as error:
                if line.endswith("\n"):
                    raise ValueError(
                        f"{path}, line {number}: got {line[:40]!r}, expected a JSON object; "
                        f"remove that line"
                    ) from error
    return parsed


class TensorBoard:
    """Numbers as TensorBoard scalars in ``directory``; a ValueError without the extra ``logging``.

    A run that continues says after how many updates (``start``); points beyond them are hidden.
    """

    def __init__(self, directory: Path, *, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("no tensorboard found; pip install 'rescore[logging]'") from error
        self._writer = SummaryWriter(str(directory), purge_step=start + 1)

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Console:
    """A live display of a run on a terminal; about twenty plain lines anywhere else.

    Args:
        title: short name of the run.
        total_steps: number of updates the run ends with.
        enabled: False on every process but the first; nothing is printed then.
        metrics: names of the metrics to show, in order.
        terminal: where to print; standard output by default.
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        *,
        enabled: bool = True,
        metrics: tuple[str, ...] = HEADLINES,
        terminal: Terminal | None = None,
    ) -> None:
        self._terminal = terminal or Terminal()
        self._enabled, self._metrics = enabled, metrics
        self._row: Row = {}
        self._validation: Row = {}
        self._validated_at = 0
        self._printed_at = -math.inf
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, expand=True, speed_estimate_period=600)
        self._task = self._progress.add_task(title, total=total_steps)
        drawable = self._terminal.is_terminal and not self._terminal.is_dumb_terminal
        self._live = (
            Live(get_renderable=self._render, console=self._terminal, refresh_per_second=2)
            if enabled and drawable
            else None
        )

    def __enter__(self) -> Console:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def start_at(self, step: int) -> None:
        """Say where a resumed run continues, so that time is estimated from its own steps."""
        self._progress.update(self._task, completed=step)

    def update(self, step: int, row: Row) -> None:
        """Show the metrics of the update that made the number of updates ``step``."""
        self._progress.update(self._task, completed=step)
        self._row = row
        task, now = self._progress.tasks[0], time.monotonic()
        every = max(1, int(task.total or 0) // 20)
        if step % every == 0 or task.finished or now - self._printed_at > 30:
            self._printed_at = now
            left = "" if task.time_remaining is None else f"  eta {task.time_remaining:.0f} s"
            shown = {name: row[name] for name in self._metrics if name in row}
            self._line(f"step {step}/{task.total:.0f}  {_words(shown)}{left}")

    def evaluation(self, row: Row) -> None:
        """Show validation results of the current step until the next ones."""
        self._validation, self._validated_at = row, int(self._progress.tasks[0].completed)
        self._line(f"validation at step {self._validated_at}  {_words(row)}")

    def note(self, text: str) -> None:
        """Print a line that stays, above the live display."""
        if self._enabled:
            self._terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        if not self._live:
            self.note(text)

    def _render(self) -> RenderableType:
        """The bar, the validated metrics beside their training values, and the other metrics."""
        validated, other = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
        for heading in ("", "training", f"validation at {self._validated_at}"):
            validated.add_column(heading, justify="right" if heading else "left", style="bold")
        for name, value in self._validation.items():
            validated.add_row(Text(name), _cell(self._row.get(name, "")), _cell(value))
        for name in self._metrics:
            if name in self._row and name not in self._validation:
                other.add_row(Text(name), _cell(self._row[name]))
        tables = [table for table in (validated, other) if table.row_count]
        return Group(self._progress, Columns(tables, padding=(0, 4)))


def _words(row: Row) -> str:
    return "  ".join(f"{name} {_cell(value)}" for name, value in row.items())


def _cell(value: Any) -> Text:
    """Four significant digits of a float; red where it is not finite."""
    if not isinstance(value, float):
        return Text(str(value))
    digits = f"{value:#.4g}".rstrip(".")
    return Text(digits, style="" if math.isfinite(value) else "bold red")
