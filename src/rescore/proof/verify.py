"""`rescore verify`: is the expected gradient of every algorithm what it is claimed to be?

Each row compares the exact expectation of an estimator, made of one group of two samples, with the
exact gradient of its objective. Both are enumerations of the code that trains (see ``oracle``,
``score_oracle`` and ``gaussian_oracle``).

    python -m rescore.proof.verify --write     commits the figures of the biased rows anew
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from rescore.algorithms import algorithms
from rescore.proof.cases import CASES, ORDERS, Claim

EXACT = 1e-10
"""Largest bias of a row that claims none; float64 rounding stays far below."""
FIGURE = 1e-6
"""Largest distance of the bias of a biased row from the committed figure."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim, checked. Written to JSON under these names."""

    algorithm: str
    option: str
    world: str
    claimed: Literal["unbiased", "scaled", "biased"]
    factor: float | None
    """What the gradient is claimed to be multiplied by; None for ``biased``."""
    bias: float
    """|E[estimator] - factor * grad J| / |grad J|, with factor 1 for ``biased``."""
    cosine: float
    """Between E[estimator] and grad J."""
    norm_ratio: float
    """|E[estimator]| / |grad J|."""
    variance: float
    """Trace of the covariance of the estimator."""
    forwards: float
    """Network rows per sample that it costs after the rollout."""
    ok: bool

    @property
    def key(self) -> str:
        """Name of the row in ``expected.json``."""
        return f"{self.algorithm}|{self.option}|{self.world}"


def verify(names: Sequence[str] | None = None) -> list[Row]:
    """Check every claim about the named algorithms (all of them when None).

    Raises:
        ValueError: no such algorithm, or one about which nothing is claimed in ``cases``.
    """
    known = sorted(algorithms())
    for name in names or known:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"the algorithms are {known}"
            raise ValueError(f"unknown algorithm '{name}'; {hint}")
        if name not in CASES:
            raise ValueError(
                f"nothing is claimed about algorithm '{name}'; add a function to "
                f"rescore/proof/cases.py that says on which worlds it is unbiased"
            )
    expected = expected_figures()
    return [check(case, expected) for name in names or known for case in CASES[name]()]


def check(case: Claim, expected: Mapping[str, float]) -> Row:
    """Enumerate one case; ``expected`` has the figures of the biased ones."""
    exact, estimate = case.measure()
    factor = 1.0 if case.factor is None else case.factor
    bias = (estimate.mean - factor * exact).norm() / exact.norm()
    row = Row(
        algorithm=case.name,
        option=case.option,
        world=str(case.world),
        claimed=case.claimed,
        factor=case.factor,
        bias=float(bias),
        cosine=float(torch.cosine_similarity(estimate.mean, exact, dim=0)),
        norm_ratio=float(estimate.mean.norm() / exact.norm()),
        variance=estimate.variance,
        forwards=estimate.forwards,
        ok=False,
    )
    if case.factor is None:
        ok = row.key in expected and abs(row.bias - expected[row.key]) <= FIGURE
    else:
        ok = row.bias <= EXACT
    return replace(row, ok=ok)


def expected_figures() -> dict[str, float]:
    """Committed bias of every row that is claimed to be biased, by ``Row.key``."""
    return json.loads((files("rescore.proof") / "expected.json").read_text())


def write_expected(path: Path) -> None:
    """Replace the committed figures by what is measured now. For maintainers, after a look."""
    rows = [check(case, {}) for cases in CASES.values() for case in cases()]
    figures = {row.key: round(row.bias, 9) for row in rows if row.claimed == "biased"}
    path.write_text(json.dumps(figures, indent=1) + "\n")


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """One line per setting and claim, with the range over worlds, orders and temperatures.

    Rows that are not ok follow one by one.
    """
    console = console or Console()
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 120)
    for algorithm, of_algorithm in groupby(rows, lambda row: row.algorithm):
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in of_algorithm:
            words = row.option.split()
            settings = [w for w in words if not w.startswith(("order=", "temperature="))]
            lines.setdefault((" ".join(settings) or "(defaults)", row.claimed), []).append(row)
        console.print(_table(algorithm, {key: lines[key] for key in sorted(lines)}))
    failed = {(f"{row.option} | {row.world}", row.claimed): [row] for row in rows if not row.ok}
    if failed:
        console.print(_table("not ok", failed))
    console.print(f"{len(rows)} rows, {len(rows) - len(failed)} ok")


def _table(title: str, lines: Mapping[tuple[str, str], Sequence[Row]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("options", width=30)
    table.add_column("orders", width=14)
    for name in ("rows", "claimed", "bias", "cosine", "norm", "variance", "forwards", "ok"):
        left = name in ("claimed", "ok")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for (settings, claimed), rows in lines.items():
        words = (word for row in rows for word in row.option.split())
        orders = dict.fromkeys(word[6:] for word in words if word.startswith("order="))
        factor = {f" {row.factor:g}" for row in rows if row.claimed == "scaled"}
        largest = max(row.bias for row in rows)
        table.add_row(
            settings,
            "all" if len(orders) == len(ORDERS) else "\n".join(orders),
            str(len(rows)),
            claimed + "".join(factor),
            f"{largest:.0e}" if largest < 1e-3 else _range([row.bias for row in rows], ".2f"),
            _range([row.cosine for row in rows], ".2f"),
            _range([row.norm_ratio for row in rows], ".2f"),
            _range([row.variance for row in rows], ".2g"),
            _range([row.forwards for row in rows], ".1f"),
            "yes" if all(row.ok for row in rows) else "NO",
        )
    return table


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} {high}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    write_expected(Path(__file__).with_name("expected.json"))
