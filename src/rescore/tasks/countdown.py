"""Countdown: reach a target from three or four numbers, each used exactly once, with + - * /.

Problems are drawn so that they can be solved: a random expression is worked out from left to right,
and where its value is an integer within range that value is the target. Splits are made from a hash
of the numbers alone: no set of numbers that a model trains on is one it is judged on, whatever the
seed and the pool.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from torch import Tensor

from rescore.rewards.answers import final_answer
from rescore.rewards.arithmetic import evaluate, numbers_in
from rescore.rewards.text import Facts, TextFunction
from rescore.tasks.records import Record, read_records
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import Characters, Tokenizer
from rescore.types import Examples

Wording = Literal["bare", "instructions"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COUNTS = (2, 3, 4)
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


# The problems


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


# The words


def _question(numbers: Sequence[int], target: int, wording: Wording) -> str:
    if wording == "bare":
        return f"{','.join(map(str, sorted(numbers)))}={target}"
    return (
        f"Write an arithmetic expression that equals {target}, using the numbers "
        f"{', '.join(map(str, numbers))}.\n"
        "Every one of these numbers must appear exactly once, and no other number may appear. The "
        "operations +, -, * and / and parentheses are allowed.\n"
        "First think inside <reasoning> and </reasoning>. Then give the expression alone inside "
        "<answer> and </answer>: no equals sign, no target, no words.\n"
        "If the numbers were 4, 6, 11 and the target 13, a correct reply would be:\n"
        "<reasoning>\n6 * 4 is 24, and 24 - 11 is 13.\n</reasoning>\n"
        "<answer>\n6 * 4 - 11\n</answer>"
    )


def _problem(numbers: Sequence[int], target: int, expression: str, wording: Wording) -> Problem:
    worded = (
        f"<reasoning>\n{expression} = {target}\n</reasoning>\n<answer>\n{expression}\n</answer>"
    )
    return Problem(
        question=_question(numbers, target, wording),
        gold=expression if wording == "bare" else worded,
        facts={"numbers": list(numbers), "target": target},
    )


def _solved(numbers: Sequence[int], target: int, wording: Wording) -> Problem:
    """A problem given from outside.

    Raises:
        ValueError: it has too few or too many numbers, or no solution.
    """
    if len(numbers) not in COUNTS:
        raise ValueError(f"{len(numbers)} numbers were given; expected one of {COUNTS}")
    expression = solve(numbers, target)
    if expression is None:
        raise ValueError(f"{target} cannot be made from the numbers {list(numbers)}")
    return _problem(numbers, target, expression, wording)


@functools.lru_cache(maxsize=16)
def _drawn_problems(
    count: int,
    numbers: tuple[int, int],
    targets: tuple[int, int],
    split: Split,
    size: int,
    seed: int,
    wording: Wording,
) -> tuple[Problem, ...]:
    pool = problem_pool(count, numbers, targets, split, size, seed)
    return tuple(_problem(*key, expression, wording) for key, expression in pool.items())


def _read(text: str) -> tuple[Numbers, int]:
    """Numbers and target of a text such as ``3,5,7=22``.

    Raises:
        ValueError: it has another form.
    """
    found = re.fullmatch(r"\s*(\d{1,4}(?:\s*,\s*\d{1,4})*)\s*=\s*(\d{1,9})\s*", text)
    if not found:
        raise ValueError(f"{text!r} is no problem; expected numbers and a target: '3,5,7=22'")
    return tuple(int(number) for number in found[1].split(",")), int(found[2])


def _from_record(record: Record) -> tuple[Numbers, int]:
    """Numbers and target of a row ``{"nums", "target"}`` or ``{"input", "output"}``.

    Raises:
        ValueError: it is neither.
    """
    match record:
        case {"nums": list(numbers), "target": target}:
            return _read(f"{','.join(map(str, numbers))}={target}")
        case {"input": numbers, "output": target}:
            return _read(f"{numbers}={target}")
    raise ValueError(
        f"a record is {record}; expected a list 'nums' and a 'target', or 'input' and 'output'"
    )


def _recorded(source: str, split: Split) -> list[tuple[Numbers, int]]:
    """The problems of a split; none has the numbers of one in another split."""
    if not Path(source).expanduser().is_dir():
        rows = map(_from_record, read_records(source, "train"))
        return [row for row in rows if split_of(row[0]) == split]
    later = SPLITS[SPLITS.index(split) + 1 :]
    held_out = itertools.chain.from_iterable(read_records(source, other) for other in later)
    secret = {tuple(sorted(_from_record(record)[0])) for record in held_out}
    rows = map(_from_record, read_records(source, split))
    return [row for row in rows if tuple(sorted(row[0])) not in secret]


@functools.lru_cache(maxsize=16)
def _recorded_problems(
    source: str, split: Split, count: int, size: int, wording: Wording
) -> tuple[Problem, ...]:
    fitting = (row for row in _recorded(source, split) if len(row[0]) == count)
    rows = {(*sorted(numbers), target): (numbers, target) for numbers, target in fitting}
    if not rows:
        raise ValueError(f"'{source}' has no problem of {count} numbers for split '{split}'")
    return tuple(_solved(*row, wording) for row in itertools.islice(rows.values(), size))


# The rewards


def _is_expression(answer: str, facts: Facts) -> bool:
    return bool(numbers_in(answer))


def _uses_the_numbers(answer: str, facts: Facts) -> bool:
    return sorted(numbers_in(answer)) == sorted(facts["numbers"])


def _solves(answer: str, facts: Facts) -> bool:
    return _uses_the_numbers(answer, facts) and evaluate(answer) == facts["target"]


def _term(judge: Callable[[str, Facts], bool], read: Callable[[str], str | None]) -> TextFunction:
    """1 where ``judge`` is true of what ``read`` finds in a text; 0 where that is no expression."""

    def holds(text: str, known: Facts) -> bool:
        answer = read(text)
        try:
            return answer is not None and judge(answer, known)
        except ValueError:
            return False

    def term(texts: Sequence[str], facts: Sequence[Facts], /) -> list[float]:
        return [float(holds(*pair)) for pair in zip(texts, facts, strict=True)]

    return term


# The task


@dataclass(frozen=True, kw_only=True)
class Countdown(TextTask):
    """Numbers and a target; the completion is an expression.

    The bare wording is for small models that read characters: the question is ``7,12,30=35``, the
    completion ``30+12-7``. With instructions it is a task for a language model, which reasons
    first and answers between tags. The defaults fit the bare wording; ``Countdown.bare`` makes
    other ranges fit.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    tokenizer: Tokenizer = Characters()
    """Text to tokens and back."""
    prompt_length: int = 15
    """Columns for the prompt; a longer one is refused."""
    completion_length: int = 13
    """Columns that the model writes."""
    count: int = 3
    """Numbers of a problem: 2, 3 or 4."""
    numbers: tuple[int, int] = (1, 100)
    """Smallest and largest number; uniform over this range before the target is asked for."""
    targets: tuple[int, int] = (1, 100)
    """Smallest and largest target."""
    pool: int = 8192
    """Distinct training problems."""
    validation_pool: int = 256
    """Distinct validation problems."""
    test_pool: int = 512
    """Distinct test problems."""
    clean_limit: int | None = None
    """Training problems shown by ``clean`` with a solution, the first of them; None = all."""
    seed: int = 0
    """Draws the problems; has no say in which numbers belong to which split."""
    wording: Wording = "bare"
    """How a problem is put: in as few characters as possible, or as instructions."""
    source: str | None = None
    """Where to read problems instead of drawing them, as ``read_records`` understands it: rows
    ``{"nums": [3, 5, 7], "target": 22}`` or ``{"input": "3,5,7", "output": "22"}``. Those of
    ``count`` numbers are taken, at most as many as the pools hold. A folder has a file for each
    split, of which training leaves out what has the numbers of a validation or test problem, and
    validation those of a test problem; anything else is one table, split by ``split_of``."""

    @classmethod
    def bare(
        cls,
        *,
        count: int = 3,
        numbers: tuple[int, int] = (1, 100),
        targets: tuple[int, int] = (1, 100),
        **fields: Any,
    ) -> Countdown:
        """The bare wording of these ranges, in windows that just fit."""
        prompt, completion = needed_lengths(count, numbers, targets)
        return cls(
            count=count,
            numbers=numbers,
            targets=targets,
            prompt_length=prompt,
            completion_length=completion,
            **fields,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count not in COUNTS:
            raise ValueError(f"count is {self.count}; expected one of {COUNTS}")
        for name in ("numbers", "targets"):
            least, most = getattr(self, name)
            if not 1 <= least <= most <= LARGEST:
                raise ValueError(
                    f"{name} is {(least, most)}; expected a range (least, most) within 1 to "
                    f"{LARGEST}"
                )
        for name in ("pool", "validation_pool", "test_pool", "clean_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        needed = needed_lengths(self.count, self.numbers, self.targets)
        windows = self.prompt_length, self.completion_length
        if self.wording == "bare" and (windows[0] < needed[0] or windows[1] < needed[1]):
            raise ValueError(
                f"prompt_length and completion_length are {windows}; {self.count} numbers up to "
                f"{self.numbers[1]} and targets up to {self.targets[1]} need {needed}"
            )

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems drawn, or read from the source.

        Raises:
            ValueError: there are fewer than the pool is to hold, or a row of the source cannot
                be read or solved.
        """
        pools = {"train": self.pool, "validation": self.validation_pool, "test": self.test_pool}
        size = pools[split]
        if self.source is not None:
            return _recorded_problems(self.source, split, self.count, size, self.wording)
        ranges = self.count, self.numbers, self.targets
        return _drawn_problems(*ranges, split, size, self.seed, self.wording)

    def problem(self, text: str) -> Problem:
        """The problem of a text such as ``3,5,7=22``, as ``show`` prints it.

        Raises:
            ValueError: it has another form or no solution.
        """
        return _solved(*_read(text), self.wording)

    def clean(self, split: Split) -> Examples:
        """Every problem of a split with its gold completion.

        Of the training split only the first ``clean_limit``.
        """
        limit = self.clean_limit if split == "train" else None
        prompts = self._prompts(self.problems(split)[:limit])
        return Examples(x_0=self.gold(prompts), editable=prompts.editable, attend=prompts.attend)

    def show(self, tokens: Int[Tensor, " L"]) -> str:
        """Prompt and completion as text, bare ones set apart by a space; masks are dots."""
        text = super().show(tokens)
        if self.wording != "bare":
            return text
        start = len(super().show(tokens[: self.prompt_length]))
        return f"{text[:start]} {text[start:]}"

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """What an answer is judged by, each 1 or 0.

        ``solve_rate``: the expression uses every number once and equals the target, exactly.
        ``numbers_used``: it uses every number once, whatever its value. ``well_formed``: it is an
        arithmetic expression; words, code and empty answers are not.
        """
        read = str if self.wording == "bare" else final_answer
        return {
            "solve_rate": _term(_solves, read),
            "numbers_used": _term(_uses_the_numbers, read),
            "well_formed": _term(_is_expression, read),
        }

    @property
    def default_weights(self) -> Mapping[str, float]:
        """A problem counts when it is solved; the other terms are reported."""
        return {"solve_rate": 1.0, "numbers_used": 0.0, "well_formed": 0.0}
