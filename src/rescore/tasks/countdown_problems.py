"""Countdown problems: generation, search for a solution, and the split numbers belong to.

Problems are drawn so that they can be solved: a random expression is worked out from left to right,
and where its value is an integer within range that value is the target. Splits are made from a hash
of the numbers alone: no set of numbers that a model trains on is one it is judged on, whatever the
seed and the pool.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Int

from rescore.tasks.task import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COUNTS = (2, 3, 4)
"""How many numbers a problem can have."""
LARGEST = 9999
"""Largest number of a problem: products of four stay within 64 bits."""
_SHARES = (7, 8, 10)
"""Of 10 parts of all sets of numbers: train below the first bound, then validation, then test."""
_DRAWS = 1 << 15
"""Expressions drawn at a time."""
_PATIENCE = 8
"""Times without a new problem after which a split counts as used up."""

Numbers = tuple[int, ...]


def split_of(numbers: Sequence[int]) -> Split:
    """The split of a set of numbers; depends neither on their order nor on a target."""
    text = ",".join(map(str, sorted(numbers)))
    part = int(hashlib.sha256(text.encode()).hexdigest(), 16) % _SHARES[-1]
    return SPLITS[sum(part >= bound for bound in _SHARES)]


def needed_lengths(
    count: int, numbers: tuple[int, int], targets: tuple[int, int]
) -> tuple[int, int]:
    """Columns that hold every bare prompt, and every solution without needless brackets.

    Args:
        count: numbers of a problem; c of them need at most c - 2 pairs of brackets.
        numbers: smallest and largest number.
        targets: smallest and largest target.
    """
    digits = count * len(str(numbers[1]))
    separators = count - 1
    return digits + separators + 1 + len(str(targets[1])), digits + separators + 2 * (count - 2)


def written(numbers: Sequence[int], operators: Sequence[str]) -> str:
    """The numbers joined from left to right, with the fewest brackets.

    Where a sum or a product goes on for several numbers, those added come before those
    subtracted, those multiplied before those divided by, and larger ones first.
    """
    first = "*" if operators[0] in "*/" else "+"
    terms = zip((first, *operators), numbers, strict=True)
    text = ""
    for product, run in itertools.groupby(terms, key=lambda term: term[0] in "*/"):
        ordered = sorted(run, key=lambda term: (term[0] in "-/", -term[1]))
        rest = "".join(f"{operator}{number}" for operator, number in ordered)
        text = rest[1:] if not text else f"({text}){rest}" if product else text + rest
    return text


@functools.lru_cache(maxsize=16)
def problem_pool(
    count: int,
    numbers: tuple[int, int],
    targets: tuple[int, int],
    split: Split,
    size: int,
    seed: int,
) -> dict[tuple[Numbers, int], str]:
    """Distinct problems, sorted numbers and target, each with an expression that solves it.

    Numbers and operators of the expression are uniform; intermediate values may be fractions or
    negative. A pure function of its arguments.

    Raises:
        ValueError: the split has fewer problems, as far as drawing can tell.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    pool: dict[tuple[Numbers, int], str] = {}
    dull = 0
    while dull < _PATIENCE:
        before = len(pool)
        drawn = rng.integers(numbers[0], numbers[1], (_DRAWS, count), endpoint=True)
        operators = rng.integers(4, size=(_DRAWS, count - 1))
        top, bottom = _worked_out(drawn, operators)
        target = top // bottom
        keep = (top % bottom == 0) & (targets[0] <= target) & (target <= targets[1])
        for row, which, value in zip(
            drawn[keep].tolist(), operators[keep].tolist(), target[keep].tolist(), strict=True
        ):
            key = tuple(sorted(row)), value
            if key not in pool and split_of(row) == split:
                pool[key] = written(row, ["+-*/"[operator] for operator in which])
                if len(pool) == size:
                    return pool
        dull = dull + 1 if len(pool) == before else 0
    raise ValueError(
        f"split '{split}' has {len(pool)} problems of {count} numbers within {numbers} and targets "
        f"within {targets}, and {size} are wanted; make the pool smaller or widen the ranges"
    )


def _worked_out(
    numbers: Int[np.ndarray, "n c"], operators: Int[np.ndarray, "n d"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Numerators and denominators of expressions worked out from left to right."""
    top, bottom = numbers[:, 0], np.ones_like(numbers[:, 0])
    for number, operator in zip(numbers[:, 1:].T, operators.T, strict=True):
        choices = [top + number * bottom, top - number * bottom, top * number, top]
        top = np.choose(operator, choices)
        bottom = np.where(operator == 3, bottom * number, bottom)
    return top, bottom


@dataclass(frozen=True)
class _Part:
    value: Fraction | int
    text: str
    kind: Literal["number", "sum", "product"]


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that uses every number once and equals the target; None if there is none.

    One of sums and differences alone where that is enough.
    """
    parts = [_Part(number, str(number), "number") for number in sorted(numbers, reverse=True)]
    return _search(parts, target, "+-") or _search(parts, target, "+-*/")


def _search(parts: list[_Part], target: int, operators: str) -> str | None:
    """Join two of the parts in every way, then search among what is left."""
    if len(parts) == 1:
        return parts[0].text if parts[0].value == target else None
    for i, j in itertools.permutations(range(len(parts)), 2):
        rest = [part for k, part in enumerate(parts) if k not in (i, j)]
        for operator in operators:
            joined = _join(parts[i], operator, parts[j])
            found = _search([joined, *rest], target, operators) if joined else None
            if found:
                return found
    return None


def _join(left: _Part, operator: str, right: _Part) -> _Part | None:
    """Two parts as one; None for a division by zero and for what other parts write shorter.

    ``a - (b - c)`` is ``a + c - b``, so a sum never stands on the right in a sum, nor a product
    on the right in a product.
    """
    kind = "product" if operator in "*/" else "sum"
    if right.kind == kind or (operator == "/" and right.value == 0):
        return None
    value = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: Fraction(a) / b,
    }[operator](left.value, right.value)
    sides = [
        f"({side.text})" if kind == "product" and side.kind == "sum" else side.text
        for side in (left, right)
    ]
    return _Part(value, operator.join(sides), kind)
