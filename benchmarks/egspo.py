"""The table of docs/algorithms/egspo.md: four methods on three tasks with matched rollout budgets.

    python benchmarks/egspo.py --out runs/egspo            # about 2 CPU-hours; also curves.svg
    python benchmarks/egspo.py --out runs/egspo --tasks sudoku --seeds 1

Each seed trains its own base, which the four methods share. All settings but those named in
``METHODS`` are the recipe's: the same rollouts, learning rate and evaluation. The checkpoint is
chosen on validation; numbers are means over seeds of the mean over 512 test prompts, standard
errors are over seeds. Runs already in the output directory are kept.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

TASKS = {
    "sudoku": ("sudoku_reinforce", "sudoku_egspo_sa", "cell_accuracy"),
    "sudoku9": ("sudoku9_reinforce", "sudoku9_egspo_sa", "cell_accuracy"),
    "countdown": ("countdown_reinforce", "countdown_egspo_sa", "numbers_used"),
}
"""Task to its recipe for REINFORCE, its recipe for EGSPO-SA, and a second metric."""
METHODS = {
    "REINFORCE, all steps": None,
    "EGSPO": ("--algorithm.lam", "0"),
    "EGSPO-SA": (),
    "EGSPO importance": ("--algorithm.lam", "0", "--algorithm.selection", "importance"),
}
"""Method to the options that make it of the EGSPO-SA recipe; None takes that of REINFORCE."""


@dataclass
class Options:
    """What to run."""

    out: Path
    """Run directories and table go here."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Of ``TASKS``."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of ``METHODS``."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""


def directory_of(task: str, method: str, seed: int, out: Path) -> Path:
    """Where a run is."""
    return out / f"{task}-{method.replace(' ', '-').replace(',', '')}-{seed}"


@dataclass
class Cell:
    """One run, as far as the table needs it."""

    rows: list[dict]
    """Base, then after RL."""
    wall_s: float
    network_rows: float

    @classmethod
    def of(cls, task: str, method: str, seed: int, out: Path) -> Cell:
        """Read a run, making it if it is not there."""
        directory = directory_of(task, method, seed, out)
        if not (directory / "result.json").exists():
            reinforce, egspo_sa, _ = TASKS[task]
            changes = METHODS[method]
            recipe = reinforce if changes is None else egspo_sa
            new = [recipe, "--seed", str(seed), *(changes or ()), "--out"]
            again = (directory / "run.json").exists()
            arguments = ["--resume"] if again else new
            command = [sys.executable, "-m", "rescore", "train", *arguments, str(directory)]
            subprocess.run(command, check=True)
        rows = json.loads((directory / "result.json").read_text())["rows"]
        metrics = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
        return cls(
            rows=rows,
            wall_s=metrics[-1]["time/elapsed_s"],
            network_rows=sum(row["network_rows"] for row in metrics),
        )


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def plot(options: Options) -> None:
    """Write ``curves.svg``: validation solve rate against rollouts, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(options.tasks), figsize=(4 * len(options.tasks), 3.2), squeeze=False
    )
    for panel, task in zip(panels[0], options.tasks, strict=True):
        for method in options.methods:
            runs = []
            for seed in options.seeds:
                lines = (directory_of(task, method, seed, options.out) / "evaluations.jsonl").open()
                runs.append([json.loads(line) for line in lines])
            steps = [row["step"] for row in runs[0]]
            rates = [
                statistics.mean(rows[i]["metrics"]["solve_rate"]["mean"] for rows in runs)
                for i in range(len(steps))
            ]
            panel.plot(steps, rates, label=method)
        panel.set(title=task, xlabel="rollouts", ylabel="validation solve rate")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(options.out / "curves.svg")


def main(options: Options) -> None:
    """Run what is missing, print the table as Markdown and draw the curves."""
    lines = [
        "| task | method | solve_rate | gain | second metric | CPU-s | wall s | network rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in options.tasks:
        second = TASKS[task][2]
        for method in options.methods:
            cells = [Cell.of(task, method, seed, options.out) for seed in options.seeds]

            def values(row: int, name: str, cells: list[Cell] = cells) -> list[float]:
                return [cell.rows[row]["metrics"][name]["mean"] for cell in cells]

            before, after = values(0, "solve_rate"), values(-1, "solve_rate")
            if method == options.methods[0]:
                lines.append(
                    f"| {task} | base | {mean_and_error(before)} | | "
                    f"{second} {mean_and_error(values(0, second))} | | | |"
                )
            gain = [b - a for a, b in zip(before, after, strict=True)]
            cpu = statistics.mean(cell.rows[-1]["cpu_s"] for cell in cells)
            wall = statistics.mean(cell.wall_s for cell in cells)
            rows = statistics.mean(cell.network_rows for cell in cells)
            lines.append(
                f"| {task} | {method} | {mean_and_error(after)} | {mean_and_error(gain)} | "
                f"{second} {mean_and_error(values(-1, second))} | {cpu:.0f} | {wall:.0f} | "
                f"{rows:,.0f} |"
            )
    table = "\n".join(lines)
    (options.out / "table.md").write_text(table + "\n")
    print(table)
    plot(options)


if __name__ == "__main__":
    main(tyro.cli(Options))
