"""Sudoku in words: the puzzles of ``Sudoku`` as questions to a language model.

The model reasons and then writes the finished grid as one line of digits. Splits are those of
``Sudoku``, by solution grid. Rows of a file may have several solutions; the one stored with the
puzzle is the one asked for by ``cell_accuracy`` and ``solve_rate``, any is good for ``valid``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rescore.rewards.answers import answer_block, well_formed
from rescore.rewards.text import Facts, TextFunction
from rescore.tasks.records import Record, read_split
from rescore.tasks.sudoku import Sudoku
from rescore.tasks.sudoku_grids import BOXES, completions, puzzle_pool, split_of
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask

# The rewards


def cell_accuracy(texts: Sequence[str], facts: Sequence[Facts], /) -> list[float]:
    """Fraction of the empty cells filled as in the stored solution.

    Of the answer only the digits are read, those beyond the last cell left out; a cell without a
    digit is wrong. Given cells do not count. 0 without an answer.

    Source: the Sudoku reward of d1, arXiv:2504.12216.
    """
    return [_fraction_right(_digits(t), known) for t, known in zip(texts, facts, strict=True)]


def solve_rate(texts: Sequence[str], facts: Sequence[Facts], /) -> list[float]:
    """1 where the digits of the answer are the stored solution, given cells included, else 0."""
    pairs = zip(texts, facts, strict=True)
    return [float(_digits(text) == known["solution"]) for text, known in pairs]


def valid(texts: Sequence[str], facts: Sequence[Facts], /) -> list[float]:
    """1 where the digits of the answer are a legal grid that keeps every given cell, else 0."""
    pairs = zip(texts, facts, strict=True)
    return [float(_completes(_digits(text), known["puzzle"])) for text, known in pairs]


def kept_format(texts: Sequence[str], facts: Sequence[Facts], /) -> list[float]:
    """1 for reasoning, then an answer of one digit per cell and nothing else in it; else 0."""
    pairs = zip(texts, facts, strict=True)
    return [float(_kept_format(text, known["puzzle"])) for text, known in pairs]


def _kept_format(text: str, puzzle: str) -> bool:
    digits = rf"[1-9]{{{len(puzzle)}}}"
    return well_formed(text) and bool(re.fullmatch(digits, answer_block(text) or ""))


def _digits(text: str) -> str:
    """The digits of the last answer block; none where there is no block."""
    return re.sub(r"[^0-9]", "", answer_block(text) or "")


def _fraction_right(digits: str, known: Facts) -> float:
    puzzle, solution = known["puzzle"], known["solution"]
    filled = digits[: len(puzzle)].ljust(len(puzzle), "0")
    cells = zip(puzzle, solution, filled, strict=True)
    right = [digit == wanted for given, wanted, digit in cells if given == "0"]
    return sum(right) / len(right)


def _completes(digits: str, puzzle: str) -> bool:
    """Whether a grid is legal and keeps the given cells of a puzzle."""
    side = round(len(puzzle) ** 0.5)
    grid = [int(digit) - 1 for digit in digits]
    if len(grid) != len(puzzle) or not all(0 <= digit < side for digit in grid):
        return False
    kept = all(given in ("0", digit) for given, digit in zip(puzzle, digits, strict=True))
    return kept and next(completions(grid), None) is not None


# The words


def _problem(puzzle: str, solution: str) -> Problem:
    cells = len(puzzle)
    side = round(cells**0.5)
    rows, columns = BOXES[side]
    lines = [solution[at : at + side] for at in range(0, cells, side)]
    return Problem(
        question=(
            f"Complete this {side}x{side} Sudoku. The grid is written as {cells} digits, row after "
            f"row from the top left corner, and 0 stands for an empty cell:\n{puzzle}\n"
            f"In the finished grid every row, every column and every {rows}x{columns} box holds "
            f"each of the digits 1 to {side} once; the digits already there stay.\n"
            "First reason inside <reasoning> and </reasoning>. Then write the finished grid inside "
            f"<answer> and </answer>: {cells} digits in the same order, nothing between them."
        ),
        gold=(
            f"<reasoning>\nThe rows are {', '.join(lines)}.\n</reasoning>\n"
            f"<answer>\n{solution}\n</answer>"
        ),
        facts={"puzzle": puzzle, "solution": solution},
    )


def _line(canvas: Sequence[int] | np.ndarray) -> str:
    """A canvas as digits, 0 for a blank."""
    side = round(len(canvas) ** 0.5)
    return "".join(str((int(token) + 1) % (side + 1)) for token in canvas)


@functools.lru_cache(maxsize=16)
def _drawn_problems(
    side: int, blanks: tuple[int, int], split: Split, size: int, seed: int
) -> tuple[Problem, ...]:
    puzzles, solutions = puzzle_pool(side, blanks, split, size, seed)
    return tuple(map(_problem, map(_line, puzzles), map(_line, solutions)))


def _from_record(record: Record) -> tuple[str, str]:
    """Puzzle and solution of a row ``{"Puzzle", "Solution"}``, both as digits.

    Raises:
        ValueError: it is none, or the solution does not complete the puzzle.
    """
    match record:
        case {"Puzzle": str(puzzle), "Solution": str(solution)}:
            if _posed(puzzle) and re.fullmatch("[1-9]+", solution) and _completes(solution, puzzle):
                return puzzle, solution
    raise ValueError(
        f"a record is {record}; expected a 'Puzzle', row by row with 0 for an empty cell, and a "
        f"'Solution' that completes it, both as texts of digits"
    )


def _posed(puzzle: str) -> bool:
    """Whether a text is a puzzle of a known size with a cell to fill."""
    cells = {side**2 for side in BOXES}
    return bool(re.fullmatch("[0-9]+", puzzle)) and len(puzzle) in cells and "0" in puzzle


@functools.lru_cache(maxsize=16)
def _recorded_problems(source: str, split: Split, side: int, size: int) -> tuple[Problem, ...]:
    recorded = read_split(
        source,
        split,
        read=_from_record,
        content=lambda row: tuple(int(digit) - 1 for digit in row[1]),
        split_of=split_of,
    )
    rows = dict.fromkeys(row for _, row in recorded if len(row[0]) == side**2)
    if not rows:
        raise ValueError(f"'{source}' has no {side}x{side} puzzle for split '{split}'")
    return tuple(_problem(*row) for row in itertools.islice(rows, size))


# The task


@dataclass(frozen=True, kw_only=True)
class SudokuText(TextTask):
    """A puzzle in words; the completion ends with the finished grid between answer tags.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    side: int = 4
    """Digits, and cells in a row: 4 (boxes of 2x2), 6 (2x3) or 9 (3x3)."""
    blanks: tuple[int, int] = (6, 12)
    """Fewest and most blank cells of a puzzle; their number is uniform over this range."""
    pool: int = 8192
    """Distinct training puzzles."""
    validation_pool: int = 256
    """Distinct validation puzzles."""
    test_pool: int = 512
    """Distinct test puzzles."""
    seed: int = 0
    """Draws the puzzles; has no say in which grid belongs to which split."""
    source: str | None = None
    """Where to read puzzles instead of drawing them, as ``read_records`` understands it: rows with
    the columns ``Puzzle`` and ``Solution``. Those of this size are taken, at most as many as the
    pools hold. A folder has a file for each split, of which training leaves out what has the
    solution of a validation or test puzzle, and validation those of a test puzzle; anything else
    is one table, split by solution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.puzzles  # refuses fields out of range

    @property
    def puzzles(self) -> Sudoku:
        """The same puzzles as a task of cells."""
        return Sudoku(
            side=self.side,
            blanks=self.blanks,
            pool=self.pool,
            validation_pool=self.validation_pool,
            test_pool=self.test_pool,
            seed=self.seed,
        )

    def problems(self, split: Split) -> Sequence[Problem]:
        """Puzzles drawn, with one solution each, or read from the source.

        Raises:
            ValueError: there are fewer than the pool is to hold, or a row of the source is no
                puzzle with its solution.
        """
        size = self.puzzles.size(split)
        if self.source is not None:
            return _recorded_problems(self.source, split, self.side, size)
        return _drawn_problems(self.side, self.blanks, split, size, self.seed)

    def problem(self, text: str) -> Problem:
        """The problem of a typed puzzle, in the form that ``Sudoku.parse`` reads.

        Raises:
            ValueError: it is malformed, has no blank, no solution or more than one.
        """
        canvas = self.puzzles.parse(text)
        found = self.puzzles.solutions(canvas)
        if not bool((canvas == self.side).any()) or len(found) != 1:
            raise ValueError(
                f"puzzle {text!r} has {len(found)} solutions (2 means more than one) and "
                f"{int((canvas == self.side).sum())} blanks; expected one solution and some blanks"
            )
        return _problem(_line(canvas.tolist()), _line(found[0].tolist()))

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """``cell_accuracy``, ``solve_rate``, ``valid``, and ``format``."""
        return {
            "cell_accuracy": cell_accuracy,
            "solve_rate": solve_rate,
            "valid": valid,
            "format": kept_format,
        }

    @property
    def default_weights(self) -> Mapping[str, float]:
        """The fraction of right cells counts; the other terms are reported."""
        return {"cell_accuracy": 1.0, "solve_rate": 0.0, "valid": 0.0, "format": 0.0}
