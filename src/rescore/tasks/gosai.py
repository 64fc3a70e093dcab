"""Measured sequences in the layout of Gosai et al., for those who have the file.

A table with a header and a row per sequence, as in the ``gosai_all.csv`` that the code of DRAKES
reads: a column ``seq`` of 200 letters A C G T, and columns ``hepg2``, ``k562`` and ``sknsh`` with
the activity measured in each cell line. Other columns are ignored. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rescore.tasks.dna_sequences import LENGTH, LETTERS, Library, Measured

CELLS = ("hepg2", "k562", "sknsh")
"""Names of the columns with activities."""
SEQUENCE = "seq"
"""Name of the column with the letters."""
_SEPARATOR = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_CODE = np.full(256, 255, dtype=np.uint8)
_CODE[list(LETTERS.encode())] = _CODE[list(LETTERS.lower().encode())] = range(4)


@dataclass(frozen=True, kw_only=True)
class Gosai(Library):
    """The activity of real and designed sequences in one of three cell lines."""

    path: str
    """A .csv, or a .tsv or .txt with tabs."""
    cell: str = "hepg2"
    """Whose activity counts: hepg2, k562 or sknsh."""
    limit: int | None = None
    """Only so many rows from the top; None = all, 1.6 kB of memory each."""

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell is '{self.cell}'; expected one of {list(CELLS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; expected 1 or more, or None for all rows")

    def check(self) -> None:
        """Read the first row.

        Raises:
            ValueError: there is no such file, or it has another layout.
        """
        next(_rows(self.path, self.cell))

    def everything(self) -> Measured:
        """Every sequence of the file once, with its first measurement; letters may be lower case.

        Raises:
            ValueError: a row is malformed; the message names file and line.
        """
        return _read(self)


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)
def _read(source: Gosai) -> Measured:
    found: dict[bytes, float] = {}
    for number, (sequence, activity) in enumerate(_rows(source.path, source.cell)):
        if number == source.limit:
            break
        found.setdefault(sequence, activity)
    tokens = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, LENGTH)
    return Measured(
        tokens=torch.tensor(tokens.astype(np.int64)),
        activity=torch.tensor(list(found.values()), dtype=torch.float32),
    )


def _rows(path: str, cell: str) -> Iterator[tuple[bytes, float]]:
    """Tokens, a byte each, and activity of every row, at least one."""
    file = Path(path).expanduser()
    separator = _SEPARATOR.get(file.suffix)
    if separator is None:
        raise ValueError(f"'{path}' ends in '{file.suffix}'; expected one of {list(_SEPARATOR)}")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            table = csv.DictReader(lines, delimiter=separator)
            _check_columns(path, table.fieldnames)
            empty = True
            for row in table:
                yield _row(f"'{path}', line {table.line_num}", row, cell)
                empty = False
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' is no table of text ({error})") from error
    if empty:
        raise ValueError(f"'{path}' has a header and no rows; expected at least one sequence")


def _check_columns(path: str, names: Sequence[str] | None) -> None:
    missing = [name for name in (SEQUENCE, *CELLS) if name not in (names or [])]
    if missing:
        raise ValueError(
            f"'{path}', line 1: the columns {missing} are missing; found {list(names or [])}, "
            f"expected {[SEQUENCE, *CELLS]}"
        )


def _row(place: str, row: Mapping[str, str | None], cell: str) -> tuple[bytes, float]:
    letters, measured = row[SEQUENCE] or "", row[cell] or ""
    if len(letters) != LENGTH:
        raise ValueError(
            f"{place}: a sequence of {len(letters)} letters; expected {LENGTH}. Leave such rows out"
        )
    tokens = _CODE[np.frombuffer(letters.encode("latin-1", "replace"), dtype=np.uint8)]
    if (tokens > 3).any():
        at = int((tokens > 3).argmax())
        raise ValueError(
            f"{place}: letter {at + 1} is {letters[at]!r}; expected A, C, G or T. Leave such rows "
            f"out"
        )
    try:
        activity = float(measured)
    except ValueError:
        activity = math.nan
    if not math.isfinite(activity):
        raise ValueError(f"{place}: {cell} is {measured!r}; expected a finite number")
    return tokens.tobytes(), activity
