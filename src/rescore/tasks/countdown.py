"""Countdown: reach a target from three or four numbers, each used exactly once, with + - * /.

Problems, and the split each belongs to, come from ``countdown_problems``, or from files.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from rescore.rewards.answers import final_answer
from rescore.rewards.arithmetic import evaluate, numbers_in
from rescore.rewards.text import Facts, TextFunction
from rescore.tasks.countdown_problems import (
    COUNTS,
    LARGEST,
    SPLITS,
    Numbers,
    needed_lengths,
    problem_pool,
    solve,
    split_of,
)
from rescore.tasks.records import Record, located, read_split
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import Characters, Tokenizer
from rescore.types import Examples

Wording = Literal["bare", "instructions"]


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


def _within(values: Sequence[int], name: str, bounds: tuple[int, int]) -> None:
    if not all(bounds[0] <= value <= bounds[1] for value in values):
        raise ValueError(
            f"{list(values)} is not within {name}={bounds}; widen that range, or leave the row out"
        )


@functools.lru_cache(maxsize=16)
def _recorded_problems(
    source: str,
    split: Split,
    count: int,
    numbers: tuple[int, int],
    targets: tuple[int, int],
    size: int,
    wording: Wording,
) -> tuple[Problem, ...]:
    rows = read_split(
        source,
        split,
        read=_from_record,
        content=lambda row: tuple(sorted(row[0])),
        split_of=split_of,
    )
    fitting = {
        (*sorted(row[0]), row[1]): (place, row) for place, row in rows if len(row[0]) == count
    }
    if not fitting:
        raise ValueError(f"'{source}' has no problem of {count} numbers for split '{split}'")
    problems = []
    for place, (given, target) in itertools.islice(fitting.values(), size):
        with located(place):
            _within(given, "numbers", numbers)
            _within([target], "targets", targets)
            problems.append(_solved(given, target, wording))
    return tuple(problems)


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
    ``count`` numbers are taken, at most as many as the pools hold, and must be within the ranges
    above. A folder has a file for each split, of which training leaves out what has the numbers of
    a validation or test problem, and validation those of a test problem; anything else is one
    table, split by ``split_of``."""

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
        if isinstance(self.tokenizer, Characters):
            example = _problem((1, 2, 3), 6, "1+2+3", self.wording)
            needed = {*"0123456789+-*/()=,", *example.question, *example.gold}
            missing = "".join(sorted(needed - set(self.tokenizer.alphabet)))
            if missing:
                raise ValueError(
                    f"the alphabet of the tokenizer lacks {missing!r}, which "
                    f"wording='{self.wording}' is written with; add them, or take a "
                    f"PretrainedTokenizer for 'instructions' and Characters() for 'bare'"
                )

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems drawn, or read from the source.

        Raises:
            ValueError: there are fewer than the pool is to hold, or a row of the source cannot
                be read or solved, or is not within the ranges; names the row.
        """
        pools = {"train": self.pool, "validation": self.validation_pool, "test": self.test_pool}
        size = pools[split]
        ranges = self.count, self.numbers, self.targets
        if self.source is not None:
            return _recorded_problems(self.source, split, *ranges, size, self.wording)
        return _drawn_problems(*ranges, split, size, self.seed, self.wording)

    def check(self) -> None:
        """Read the problems of every split, and put the longest texts into the windows.

        Raises:
            ValueError: see ``problems``; or a prompt or a gold completion does not fit.
        """
        super().check()
        for split in SPLITS:
            self._completion(max((problem.gold for problem in self.problems(split)), key=len))

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
