"""Sudoku as infilling: the puzzle is the canvas, its blanks are the masks.

Digits are tokens ``0 .. side - 1`` (shown as 1 .. side) and the mask token is ``side``. Every
puzzle has exactly one solution. Splits are made by solution grid, from a hash of its digits alone:
no grid that a model trains on is the answer to a puzzle it is judged on, whatever the seed and the
pool.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.rewards.reward import Reward
from rescore.tasks.sudoku_grids import BOXES, MOST_BLANKS, completions, grids_4x4, puzzle_pool
from rescore.tasks.task import Layout, Split, TokenTask, check_numbers
from rescore.types import Examples, Prompts


def _right(outputs: Int[Tensor, "B L"], prompts: Prompts) -> Bool[Tensor, "B L"]:
    return (outputs == prompts.info["solution"]) & prompts.editable


def cell_accuracy(outputs: Int[Tensor, "B L"], prompts: Prompts) -> Float[Tensor, " B"]:
    """Fraction of the blank cells filled as in the solution; given cells do not count."""
    return _right(outputs, prompts).sum(1) / prompts.editable.sum(1)


def solve_rate(outputs: Int[Tensor, "B L"], prompts: Prompts) -> Float[Tensor, " B"]:
    """1 where every blank cell is filled as in the solution, else 0."""
    return (_right(outputs, prompts) == prompts.editable).all(1).float()


def _joined(parts: list[str], n: int, separator: str) -> list[str]:
    """The parts, n at a time."""
    return [separator.join(parts[at : at + n]) for at in range(0, len(parts), n)]


@dataclass(frozen=True, kw_only=True)
class Sudoku(TokenTask):
    """Puzzles with one solution: 4x4 from all 288 grids, 6x6 and 9x9 generated.

    Pools are drawn on first use, the same for the same fields.

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
    clean_limit: int | None = None
    """Finished training grids shown by ``clean``, the first of them; None = all. Puzzles are of
    every training grid all the same: solved examples may be scarce where rewards are not."""
    seed: int = 0
    """Draws the puzzles; has no say in which grid belongs to which split."""
    reward_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"cell_accuracy": 1.0, "solve_rate": 0.0}
    )
    """What is optimised: weights of ``cell_accuracy`` and ``solve_rate``, 0 where not named."""

    def __post_init__(self) -> None:
        if self.side not in BOXES:
            raise ValueError(f"side is {self.side}; expected one of {sorted(BOXES)}")
        fewest, most = self.blanks
        if not 1 <= fewest <= most <= MOST_BLANKS[self.side]:
            raise ValueError(
                f"blanks is {self.blanks}; a {self.side}x{self.side} puzzle takes a range "
                f"(fewest, most) within 1 to {MOST_BLANKS[self.side]}"
            )
        for field in ("pool", "validation_pool", "test_pool", "clean_limit"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}; expected 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        _ = self.reward  # refuses weights of terms that do not exist

    @property
    def vocab_size(self) -> int:
        """The digits."""
        return self.side

    def symbol(self, token: int) -> str:
        """The digits 1 to ``side``."""
        return str(token + 1)

    @property
    def layout(self) -> Layout:
        """The grid and its boxes."""
        rows, columns = BOXES[self.side]
        return Layout(rows=self.side, columns=self.side, box_rows=rows, box_columns=columns)

    @property
    def length(self) -> int:
        """The cells, row by row."""
        return self.side**2

    @property
    def reward(self) -> Reward:
        """``cell_accuracy`` and ``solve_rate``: both reported, weighted by ``reward_weights``."""
        functions = {"cell_accuracy": cell_accuracy, "solve_rate": solve_rate}
        return Reward(functions, dict.fromkeys(functions, 0.0) | dict(self.reward_weights))

    def size(self, split: Split) -> int:
        """Puzzles in the pool of a split."""
        return {
            "train": self.pool,
            "validation": self.validation_pool,
            "test": self.test_pool,
        }[split]

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Prompts:
        """The puzzles with these numbers; ``info["solution"]`` (B, L) is the finished grid of each.

        Raises:
            ValueError: a number is not in ``[0, size(split))``, or the pool is larger than the
                number of puzzles there are.
        """
        check_numbers(index, split, self.size(split), "puzzle")
        rows = index.cpu().numpy()
        puzzles, solutions = self._pool(split)
        return self._as_prompts(torch.tensor(puzzles[rows]), torch.tensor(solutions[rows]))

    def clean(self, split: Split) -> Examples:
        """4x4: every grid of the split. Larger: the solutions of its pool, duplicates removed.

        Of the training split only the first ``clean_limit``.
        """
        grids = grids_4x4(split) if self.side == 4 else np.unique(self._pool(split)[1], axis=0)
        x_0 = torch.tensor(grids[: self.clean_limit] if split == "train" else grids)
        return Examples(x_0=x_0, editable=torch.ones_like(x_0, dtype=torch.bool))

    def gold(self, prompts: Prompts) -> Int[Tensor, "B L"]:
        """The solution of each puzzle."""
        return prompts.info["solution"]

    def show(self, tokens: Int[Tensor, " L"]) -> str:
        """Rows of digits, boxes set apart by lines; ``parse`` reads it back."""
        rows, columns = BOXES[self.side]
        cells = ["." if t == self.mask_id else self.symbol(t) for t in tokens.tolist()]
        boxes = _joined(cells, columns, " ")
        lines = _joined(boxes, self.side // columns, " | ")
        rule = "-+-".join(["-" * (2 * columns - 1)] * (self.side // columns))
        return f"\n{rule}\n".join(_joined(lines, rows, "\n"))

    def parse(self, puzzle: str) -> Int[Tensor, " L"]:
        """The canvas a text means: digits row by row, ``0`` or ``.`` for a blank.

        Spaces, line breaks and the box lines ``| - +`` are skipped.

        Raises:
            ValueError: any other character, or a wrong number of cells.
        """
        cells = [char for char in puzzle if char not in " \t\r\n|-+"]
        known = {self.symbol(digit): digit for digit in range(self.side)}
        known |= {"0": self.mask_id, ".": self.mask_id}
        strange = sorted(set(cells) - set(known))
        if strange:
            raise ValueError(
                f"puzzle {puzzle!r} has the characters {strange}; expected the digits 1 to "
                f"{self.side}, and 0 or . for blanks"
            )
        if len(cells) != self.length:
            raise ValueError(
                f"puzzle {puzzle!r} has {len(cells)} cells; expected {self.length}, row by row"
            )
        return torch.tensor([known[char] for char in cells])

    def solutions(self, canvas: Int[Tensor, " L"], *, limit: int = 2) -> Int[Tensor, "n L"]:
        """The first ``limit`` ways to complete a canvas; with 2, one row means "exactly one"."""
        found = list(itertools.islice(completions(canvas.tolist()), limit))
        return torch.tensor(found, dtype=torch.int64).reshape(-1, self.length)

    def read(self, texts: Sequence[str]) -> Prompts:
        """Prompts from texts that ``parse`` reads, each solved here.

        Raises:
            ValueError: a puzzle is malformed, has no blank, no solution or more than one; the
                message says which puzzle and why.
        """
        if not texts:
            raise ValueError("no puzzle was given; expected at least one")
        solved = []
        for number, text in enumerate(texts):
            try:
                solved.append(self._solve(text))
            except ValueError as error:
                raise ValueError(f"number {number} of the given puzzles: {error}") from None
        canvases, solutions = zip(*solved, strict=True)
        return self._as_prompts(torch.stack(canvases), torch.stack(solutions))

    def _solve(self, text: str) -> tuple[Int[Tensor, " L"], Int[Tensor, " L"]]:
        canvas = self.parse(text)
        if not bool((canvas == self.side).any()):
            raise ValueError(f"puzzle {text!r} has no blank cell; leave at least one to fill")
        found = self.solutions(canvas)
        if len(found) != 1:
            count = "no solution" if len(found) == 0 else "more than one solution"
            raise ValueError(f"puzzle {text!r} has {count}; expected exactly one")
        return canvas, found[0]

    def _pool(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        return puzzle_pool(self.side, self.blanks, split, self.size(split), self.seed)

    def _as_prompts(self, canvas: Int[Tensor, "B L"], solution: Int[Tensor, "B L"]) -> Prompts:
        number = torch.arange(len(canvas))
        return Prompts(
            tokens=canvas,
            editable=canvas == self.side,
            group=number,
            sample_id=number,
            info={"solution": solution},
        )
