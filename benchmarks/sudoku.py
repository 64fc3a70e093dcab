"""The README's table: 4x4 Sudoku, several seeds, base, control and RL, with standard errors.

    python benchmarks/sudoku.py --out runs/benchmark     # about 20 CPU-minutes

Each seed trains its own base and its own policy. Numbers are means over seeds of the mean over 512
test puzzles; standard errors are over seeds. Runs already in the output directory are kept.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Options:
    """What to run."""

    out: Path
    """Run directories and table go here."""
    recipes: tuple[str, ...] = ("sudoku_egspo", "sudoku_reinforce")
    """Recipes, each with the control: as many CPU-seconds of further pre-training."""
    seeds: int = 3
    """Seeds 0, 1, ... of each recipe."""


def rows_of(recipe: str, seed: int, out: Path) -> list[dict]:
    """The rows of one run's table, running it if it is not there."""
    directory = out / f"{recipe}-{seed}"
    if not (directory / "result.json").exists():
        command = [sys.executable, "-m", "rescore", "train", recipe, "--seed", str(seed)]
        command += ["--evaluate.control", "--out", str(directory)]
        subprocess.run(command, check=True)
    return json.loads((directory / "result.json").read_text())["rows"]


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def main(options: Options) -> None:
    """Run what is missing and print the table as Markdown."""
    lines = [
        "| recipe | row | solve_rate | cell_accuracy | gain in solve_rate | CPU-s |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in options.recipes:
        runs = [rows_of(recipe, seed, options.out) for seed in range(options.seeds)]
        for number, row in enumerate(runs[0]):
            each = [rows[number]["metrics"] for rows in runs]
            solved = [m["solve_rate"]["mean"] for m in each]
            right = [m["cell_accuracy"]["mean"] for m in each]
            bases = [rows[0]["metrics"]["solve_rate"]["mean"] for rows in runs]
            gains = [after - before for after, before in zip(solved, bases, strict=True)]
            seconds = [rows[number]["cpu_s"] for rows in runs]
            cpu = "" if number == 0 else f"{statistics.mean(seconds):.0f}"
            gain = "" if number == 0 else mean_and_error(gains)
            lines.append(
                f"| {recipe} | {row['label']} | {mean_and_error(solved)} | "
                f"{mean_and_error(right)} | {gain} | {cpu} |"
            )
    table = "\n".join(lines)
    (options.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
