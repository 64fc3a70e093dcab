"""Does scoring the choice of positions pay? The table in docs/log.md: seven forms, 4x4 Sudoku.

    python benchmarks/selection_forms.py --out runs/forms        # about 8 CPU-minutes

Every form is the recipe sudoku_egspo with another reveal order or score: the same bases, rollouts,
learning rate and evaluation, a quarter of its steps. Means and standard errors over seeds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

EXACT = ("--algorithm.score.form", "tokens_and_selection")
FORMS = {
    "low_confidence, tokens": ("low_confidence",),
    "low_confidence, selection x 0.3": (
        "low_confidence",
        *EXACT,
        "--algorithm.score.selection-weight",
        "0.3",
    ),
    "low_confidence, exact": ("low_confidence", *EXACT),
    "soft_low_confidence, tokens": ("soft_low_confidence",),
    "soft_low_confidence, exact": ("soft_low_confidence", *EXACT),
    "plackett_luce, tokens": ("plackett_luce",),
    "plackett_luce, exact": ("plackett_luce", *EXACT),
}
"""Name of a form to its reveal order and options."""


@dataclass
class Options:
    """What to run."""

    out: Path
    """Run directories and table go here."""
    forms: tuple[str, ...] = tuple(FORMS)
    """Of ``FORMS``."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    steps: int = 100
    """Rollouts of each run."""


def rows_of(form: str, seed: int, options: Options) -> list[dict]:
    """The rows of one run's table, running it if it is not there."""
    order, *score = FORMS[form]
    directory = options.out / f"{form.replace(',', '').replace(' ', '-')}-{seed}"
    if not (directory / "result.json").exists():
        command = [sys.executable, "-m", "rescore", "train", "sudoku_egspo", "--seed", str(seed)]
        command += ["--steps", str(options.steps), "--decoder.order", order, *score]
        subprocess.run([*command, "--out", str(directory)], check=True)
    return json.loads((directory / "result.json").read_text())["rows"]


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def main(options: Options) -> None:
    """Run what is missing and print the table as Markdown."""
    lines = ["| form | base | after RL | gain |", "|---|---|---|---|"]
    for form in options.forms:
        runs = [rows_of(form, seed, options) for seed in options.seeds]
        before = [rows[0]["metrics"]["solve_rate"]["mean"] for rows in runs]
        after = [rows[-1]["metrics"]["solve_rate"]["mean"] for rows in runs]
        gain = [b - a for a, b in zip(before, after, strict=True)]
        cells = [form, *map(mean_and_error, (before, after, gain))]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    (options.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
