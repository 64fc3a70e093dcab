r"""Word problems with one right answer: GSM8K (a number) and MATH (an expression in LaTeX).

The model is asked to write ``<reasoning>...</reasoning>`` and then ``<answer>...</answer>``.
Sources are files, folders or data sets of the hub (``rescore.tasks.records``). A part of the
training problems, chosen by their content, is the validation split, and no problem of the test
split is in the other two.

Sources: GSM8K, Cobbe et al. 2021, arXiv:2110.14168; MATH, Hendrycks et al. 2021, arXiv:2103.03874;
its 500 test problems, Lightman et al. 2023, arXiv:2305.20050. The weights of the reward terms
follow d1, Zhao et al. 2025, arXiv:2504.12216.
"""

from __future__ import annotations

import abc
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from rescore.rewards import answers
from rescore.rewards.text import TextFunction
from rescore.tasks.records import Record, located, read_records, split_by_content, without
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask

FORMAT = (
    "Solve the problem below. First write down your reasoning, step by step, between <reasoning> "
    "and </reasoning>. Then write {answer} between <answer> and </answer>, and stop."
)
"""What every instruction says."""
UNEXPLAINED = "The answer was given."
"""The reasoning of a problem that a person typed."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A row of a data set, understood."""

    question: str
    reasoning: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class WordProblems(TextTask):
    """Problems in words with a reference answer.

    Nothing is read before the first problem is asked for.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    train: str
    """Source of the problems to train and validate on."""
    test: str
    """Source of the problems to test on."""
    validation_share: float = 0.05
    """Expected fraction of the training source that is kept for validation."""
    instruction: str
    """What is said before every problem; may be empty."""

    columns: ClassVar[tuple[str, ...]]
    """Columns that a row must have, each a text."""

    @staticmethod
    @abc.abstractmethod
    def solved(row: Record) -> Solved:
        """What a row with the ``columns`` says.

        Raises:
            ValueError: it has no answer that can be judged.
        """

    @staticmethod
    @abc.abstractmethod
    def row(question: str, answer: str) -> Record:
        """The row of a question and an answer that a person typed."""

    @staticmethod
    @abc.abstractmethod
    def written(answer: str) -> str:
        """An answer as it should stand between the tags."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share is {self.validation_share}; expected more than 0, less than 1"
            )
        if not "<reasoning>\n".startswith(self.prefill):
            raise ValueError(
                f"prefill is {self.prefill!r}; expected the beginning of '<reasoning>\\n', with "
                f"which every right answer starts"
            )

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; sources are read once per process.

        Raises:
            ValueError: a source cannot be read, or one of its rows cannot be used.
        """
        parts = _parts(type(self), self.train, self.test, self.validation_share, self.instruction)
        return parts[split]

    def problem(self, text: str) -> Problem:
        """A typed ``question #### answer``.

        Raises:
            ValueError: the question or the answer is missing, or the answer cannot be judged.
        """
        question, _, answer = (part.strip() for part in text.rpartition("####"))
        if not question or not answer:
            raise ValueError(f"{text!r} is not of the form 'question #### answer'")
        return _problem(type(self), self.solved(self.row(question, answer)), self.instruction)

    def check(self) -> None:
        """Read both sources to the end.

        Raises:
            ValueError: a source cannot be read, or one of its rows cannot be used.
        """
        super().check()
        self.problems("test")


@dataclass(frozen=True, kw_only=True)
class Gsm8k(WordProblems):
    """Grade-school word problems whose answer is a number.

    Rows are ``{"question", "answer"}``, the answer being a solution and then ``#### 42``.
    """

    train: str = "hub:openai/gsm8k:main"
    test: str = "hub:openai/gsm8k:main"
    instruction: str = FORMAT.format(answer="the result, as a number without its unit,")

    columns: ClassVar[tuple[str, ...]] = ("question", "answer")

    @staticmethod
    def solved(row: Record) -> Solved:
        reasoning, _, answer = row["answer"].rpartition("####")
        if answers.number(answer) is None:
            raise ValueError(f"'answer' ends in {row['answer'][-40:]!r}; expected '#### a number'")
        calculator = re.compile(r"<<[^<>]*>>")  # marks of the data set, as in 2*3=<<2*3=6>>6
        return Solved(
            question=row["question"].strip(),
            reasoning=calculator.sub("", reasoning).strip(),
            answer=answer.strip(),
        )

    @staticmethod
    def row(question: str, answer: str) -> Record:
        return {"question": question, "answer": f"{UNEXPLAINED}\n#### {answer}"}

    @staticmethod
    def written(answer: str) -> str:
        return answer

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """Is it right, is it a number, and is the format kept: partly, and to the letter."""
        return {
            "correctness": answers.number_correct,
            "number": answers.gives_number,
            "format": answers.tags,
            "strict_format": answers.strict_format,
        }

    @property
    def default_weights(self) -> Mapping[str, float]:
        """2 for the right answer, 1/2 for everything else."""
        return {"correctness": 2.0, "number": 0.5, "format": 0.5, "strict_format": 0.5}


@dataclass(frozen=True, kw_only=True)
class Math500(WordProblems):
    r"""Competition problems whose answer is an expression in ``\boxed{}``.

    Rows are ``{"problem", "solution"}``; the answer is the column ``answer`` where there is one,
    else the last box of the solution.
    """

    train: str = "hub:ankner/math-500"
    test: str = "hub:HuggingFaceH4/MATH-500"
    instruction: str = FORMAT.format(answer=r"the result as \boxed{result}, in LaTeX,")

    columns: ClassVar[tuple[str, ...]] = ("problem", "solution")

    @staticmethod
    def solved(row: Record) -> Solved:
        answer = row.get("answer") or answers.boxed(row["solution"])
        if not answer:
            raise ValueError(
                rf"it has no 'answer', and no \boxed{{}} in its solution, which ends in "
                rf"{row['solution'][-40:]!r}"
            )
        return Solved(
            question=row["problem"].strip(),
            reasoning=row["solution"].strip(),
            answer=answer.strip(),
        )

    @staticmethod
    def row(question: str, answer: str) -> Record:
        return {"problem": question, "solution": UNEXPLAINED, "answer": answer}

    @staticmethod
    def written(answer: str) -> str:
        return rf"\boxed{{{answer}}}"

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """Is it right, is it boxed, and is the format kept: partly, and to the letter."""
        return {
            "correctness": answers.math_correct,
            "box": answers.gives_box,
            "format": answers.tags,
            "strict_format": answers.strict_format,
        }

    @property
    def default_weights(self) -> Mapping[str, float]:
        """2 for the right answer, 1/2 for the box and the tags; the strict format is reported."""
        return {"correctness": 2.0, "box": 0.5, "format": 0.5, "strict_format": 0.0}

    def check(self) -> None:
        """Look for math-verify, then read both sources to the end.

        Raises:
            ValueError: it is not installed, or a source cannot be used.
        """
        answers.load_math_verify()
        super().check()


@functools.lru_cache(maxsize=8)
def _parts(
    task: type[WordProblems], train: str, test: str, validation_share: float, instruction: str
) -> Mapping[Split, Sequence[Problem]]:
    """The problems of every split."""
    held_out = _rows(task, test, "test")
    key = task.columns[0]
    usable = without(_rows(task, train, "train"), held_out, key)
    shares = {"train": 1 - validation_share, "validation": validation_share}
    parts = {**split_by_content(usable, key, shares), "test": held_out}
    return {
        cast(Split, split): [_problem(task, task.solved(row), instruction) for row in rows]
        for split, rows in parts.items()
    }


def _rows(task: type[WordProblems], source: str, split: Split) -> list[dict[str, Any]]:
    """The rows of a source, each of which can be used."""
    rows = read_records(source, split)
    for number, row in enumerate(rows):
        with located(f"row {number} of '{source}', split '{split}'"):
            for column in task.columns:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise ValueError(
                        f"column '{column}' is {row.get(column)!r}; expected a text "
                        f"(there are the columns {sorted(row)})"
                    )
            task.solved(row)
    return rows


def _problem(task: type[WordProblems], solved: Solved, instruction: str) -> Problem:
    """A solved row as a question, a completion in the format, and the answer."""
    said = [part for part in (instruction, solved.question) if part]
    return Problem(
        question="\n\n".join(said),
        gold=f"<reasoning>\n{solved.reasoning}\n</reasoning>\n"
        f"<answer>\n{task.written(solved.answer)}\n</answer>",
        facts={"answer": solved.answer},
    )
