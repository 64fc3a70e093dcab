"""Sudoku grids and puzzles: search, generation, and the split each grid belongs to.

A canvas is ``side ** 2`` integers row by row: digits ``0 .. side - 1``, and ``side`` for a blank.
The best kept library, py-sudoku, does not serve: it draws 9x9 puzzles without asking that their
solution be unique (7 of 20 had several, and its issue 6 says so) and seeds the global generator.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from rescore.tasks.task import Split

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Side of the grid to (rows, columns) of a box."""
MOST_BLANKS = {4: 12, 6: 26, 9: 56}
"""Most blanks of a puzzle: exact for 4x4 (4 clues needed), else what most grids can be dug to."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_SHARES = (200, 232, 288)
"""Of 288 parts of all grids: train below the first bound, validation below the next, then test."""

Cells = tuple[int, ...]


@functools.cache
def _units(side: int) -> list[tuple[int, int, int]]:
    """Row, column and box of every cell, numbered from 0 to ``3 * side - 1``."""
    rows, columns = BOXES[side]
    return [
        (r, side + c, 2 * side + r // rows * (side // columns) + c // columns)
        for r, c in itertools.product(range(side), repeat=2)
    ]


def completions(
    canvas: Sequence[int], digits: Sequence[Sequence[int]] | None = None
) -> Iterator[Cells]:
    """Every legal way to fill the blanks, depth first, the cell with fewest candidates next.

    Args:
        canvas: ``side ** 2`` cells; nothing is yielded when the given digits already clash.
        digits: for each cell the digits it may take, in the order tried; all of them when None.
    """
    side = math.isqrt(len(canvas))
    units, board = _units(side), list(canvas)
    allowed = digits or [range(side)] * len(board)
    free = [(1 << side) - 1] * (3 * side)  # one bit per digit that a unit still lacks
    blanks: list[int] = []
    for cell, digit in enumerate(board):
        if digit == side:
            blanks.append(cell)
            continue
        r, c, b = units[cell]
        if not free[r] & free[c] & free[b] & (1 << digit):
            return
        for unit in units[cell]:
            free[unit] ^= 1 << digit

    def search() -> Iterator[Cells]:
        if not blanks:
            yield tuple(board)
            return
        place, candidates, fewest = 0, 0, side + 1
        for i, cell in enumerate(blanks):
            r, c, b = units[cell]
            options = free[r] & free[c] & free[b]
            count = options.bit_count()
            if count < fewest:
                place, candidates, fewest = i, options, count
                if count <= 1:
                    break
        cell = blanks.pop(place)
        r, c, b = units[cell]
        for digit in allowed[cell]:
            bit = candidates & (1 << digit)
            if bit:
                board[cell] = digit
                free[r] ^= bit
                free[c] ^= bit
                free[b] ^= bit
                yield from search()
                free[r] ^= bit
                free[c] ^= bit
                free[b] ^= bit
        blanks.insert(place, cell)

    yield from search()


def _content_hash(grid: Sequence[int]) -> int:
    text = "".join(str(digit + 1) for digit in grid)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


@functools.cache
def grids_4x4(split: Split) -> Int[np.ndarray, "n 16"]:
    """The 4x4 grids of a split: all 288 in the order of their content hash, cut in three."""
    ranked = sorted(completions([4] * 16), key=_content_hash)
    bounds = (0, *_SHARES)
    part = SPLITS.index(split)
    return np.array(ranked[bounds[part] : bounds[part + 1]])


def split_of(grid: Sequence[int]) -> Split:
    """The split of a finished grid; depends on nothing but its digits."""
    if len(grid) == 16:
        return next(s for s in SPLITS if (grids_4x4(s) == np.asarray(grid)).all(1).any())
    part = _content_hash(grid) % _SHARES[-1]
    return SPLITS[sum(part >= bound for bound in _SHARES)]


def determined(grids: Int[np.ndarray, "n 16"]) -> Bool[np.ndarray, "n 65536"]:
    """Which of the ``2 ** 16`` sets of given cells admit no 4x4 grid but this one, cell i as bit i.

    A set fails when another grid agrees on it; so each agreement of two grids fails, and so does
    every subset of one that fails.
    """
    every = np.concatenate([grids_4x4(split) for split in SPLITS])
    agreement = (grids[:, None] == every[None]) @ (1 << np.arange(16))
    fails = np.zeros((len(grids), 1 << 16), dtype=bool)
    row, other = np.nonzero(agreement != (1 << 16) - 1)
    fails[row, agreement[row, other]] = True
    for cell in range(16):
        halves = fails.reshape(len(grids), -1, 2, 1 << cell)
        halves[:, :, 0] |= halves[:, :, 1]
    return ~fails


def _puzzles_4x4(
    blanks: Int[np.ndarray, " n"], split: Split, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "n 16"], Int[np.ndarray, "n 16"]]:
    """Distinct puzzles with these numbers of blanks, uniform among all that have one solution."""
    grids = grids_4x4(split)
    unique = determined(grids)
    cells = np.arange(1 << 16)[:, None] >> np.arange(16) & 1
    pick = np.zeros(len(blanks), dtype=np.int64)
    for count in np.unique(blanks):
        wanted = np.flatnonzero(blanks == count)
        exist = np.flatnonzero(unique & (cells.sum(1) == 16 - count))
        if len(exist) < len(wanted):
            raise ValueError(
                f"split '{split}' has {len(exist)} 4x4 puzzles with {count} blanks and one "
                f"solution, and {len(wanted)} are wanted; make the pool smaller or widen `blanks`"
            )
        pick[wanted] = exist[rng.choice(len(exist), len(wanted), replace=False)]
    solution, given = grids[pick >> 16], cells[pick & 0xFFFF] == 1
    return np.where(given, solution, 4), solution


def _random_grid(side: int, split: Split, rng: np.random.Generator) -> Cells:
    """A random search from the empty canvas, its digits renamed until it belongs to the split."""
    order = rng.permuted(np.tile(np.arange(side), (side * side, 1)), axis=1).tolist()
    grid = next(completions([side] * side**2, order))
    while split_of(grid) != split:
        names = rng.permutation(side).tolist()
        grid = tuple(names[digit] for digit in grid)
    return grid


def _dig(grid: Cells, blanks: int, rng: np.random.Generator) -> Cells | None:
    """Empty cells in random order wherever no other digit could stand; None if too few can go."""
    side = math.isqrt(len(grid))
    canvas = list(grid)
    digits: list[Sequence[int]] = [range(side)] * len(grid)
    for cell in rng.permutation(len(grid)).tolist():
        canvas[cell] = side
        digits[cell] = [digit for digit in range(side) if digit != grid[cell]]
        if next(completions(canvas, digits), None) is not None:
            canvas[cell] = grid[cell]
        digits[cell] = range(side)
        if canvas.count(side) == blanks:
            return tuple(canvas)
    return None


def _puzzles_dug(
    side: int, blanks: Int[np.ndarray, " n"], split: Split, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "n L"], Int[np.ndarray, "n L"]]:
    """Distinct puzzles with these numbers of blanks, each dug out of a random grid of the split."""
    puzzles: dict[Cells, Cells] = {}
    while len(puzzles) < len(blanks):
        grid = _random_grid(side, split, rng)
        puzzle = _dig(grid, int(blanks[len(puzzles)]), rng)
        if puzzle is not None:
            puzzles[puzzle] = grid
    return np.array(list(puzzles)), np.array(list(puzzles.values()))


@functools.lru_cache(maxsize=16)
def puzzle_pool(
    side: int, blanks: tuple[int, int], split: Split, count: int, seed: int
) -> tuple[Int[np.ndarray, "n L"], Int[np.ndarray, "n L"]]:
    """``count`` distinct puzzles with one solution, and those solutions.

    The number of blanks is uniform over the inclusive range ``blanks``. A pure function of its
    arguments.

    Raises:
        ValueError: the split has fewer such puzzles (4x4 only).
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    counts = rng.integers(blanks[0], blanks[1], size=count, endpoint=True)
    if side == 4:
        return _puzzles_4x4(counts, split, rng)
    return _puzzles_dug(side, counts, split, rng)
