"""Programs from descriptions: training on KodCode or MBPP, tests on HumanEval or MBPP.

A completion reasons, then answers with one Python block. The program in it runs in a sandbox
(``rescore.rewards.sandbox``), once per distinct program, and every term reads the same result.

Records come in three forms, told apart by their columns; see ``humaneval``, ``mbpp``, ``kodcode``.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from rescore.rewards.sandbox import Limits, Result, Sandbox, Trial
from rescore.rewards.text import Facts, TextFunction
from rescore.tasks.records import Record, read_records, split_by_content, without
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask

INSTRUCTIONS = """\
Solve the programming problem below in Python.

First think inside <reasoning> and </reasoning>. Then put the finished program inside <answer> and \
</answer>, as one block that starts with ```python and ends with ```. The program must define \
{names} and import what it needs; it is not given any input."""

FENCED = re.compile(r"```python[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
FORMAT = re.compile(
    r"\s*<reasoning>((?!</?reasoning>).)*</reasoning>\s*"
    r"<answer>\s*```python[ \t]*\n((?!```).)*\n```\s*</answer>\s*",
    re.DOTALL,
)


def program(text: str) -> str | None:
    """The first Python block of the answer; of the whole text where no answer is marked."""
    answer = ANSWER.search(text)
    block = FENCED.search(answer[1] if answer else text)
    return block[1] if block else None


def well_formed(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """1 for reasoning and an answer of one Python block, in this order and nothing else."""
    return [float(FORMAT.fullmatch(text) is not None) for text in texts]


@dataclass(frozen=True, kw_only=True)
class Code(TextTask):
    """Problems whose answers are programs with tests.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    train: str
    """Records to train on: a file, a folder or ``hub:owner/name``, see ``rescore.tasks.records``.
    Part of them, chosen by content, is the validation split."""
    test: str
    """Records to test on; a problem that stands here is not trained on."""
    validation_share: float = 0.05
    """Expected fraction of the training records kept for validation."""
    limits: Limits = Limits()
    """What each program may use."""
    workers: int = 4
    """Programs that run at the same time."""
    unsafe_code_rewards: Annotated[
        bool, tyro.conf.arg(name="unsafe-code-rewards", prefix_name=False)
    ] = False
    """Run the programs of the model without namespaces: they may do what you may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; expected 1 or more")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share is {self.validation_share}; expected more than 0, less than 1"
            )
        if not "<reasoning>\n".startswith(self.prefill):
            raise ValueError(
                f"prefill is {self.prefill!r}; expected the beginning of '<reasoning>\\n', with "
                f"which every well-formed answer starts"
            )

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """``tests_passed``, ``solved``, ``ran`` and ``format``, each in [0, 1]."""
        return {
            "tests_passed": self.tests_passed,
            "solved": self.solved,
            "ran": self.ran,
            "format": well_formed,
        }

    @property
    def default_weights(self) -> Mapping[str, float]:
        """The tests decide; the format helps where none is passed yet."""
        return {"tests_passed": 1.0, "solved": 0.0, "ran": 0.0, "format": 0.25}

    @property
    def sandbox(self) -> Sandbox:
        """Where programs run."""
        return Sandbox(limits=self.limits, unsafe=self.unsafe_code_rewards)

    def tests_passed(self, texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
        """Fraction of the assertions that hold; 0 unless the program lived to the last one."""
        return [result.passed if result else 0.0 for result in self.results(texts, facts)]

    def solved(self, texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
        """1 where every assertion holds: pass@1."""
        return [
            float(result is not None and result.outcome == "passed")
            for result in self.results(texts, facts)
        ]

    def ran(self, texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
        """1 where a program ran within its limits; 0 where there is none, or it was stopped."""
        return [
            float(result is not None and result.outcome in ("passed", "failed"))
            for result in self.results(texts, facts)
        ]

    def results(self, texts: Sequence[str], facts: Sequence[Facts]) -> list[Result | None]:
        """What became of each completion's program; None where it has none."""
        programs = [program(text) for text in texts]
        trials = {
            row: Trial(
                source=fact["prelude"] + "\n\n" + source,
                tests=fact["tests"],
                reference=fact["reference"],
                names=tuple(fact["names"]),
            )
            for row, (source, fact) in enumerate(zip(programs, facts, strict=True))
            if source is not None
        }
        results = self.sandbox.run_many(list(trials.values()), self.workers)
        found = dict(zip(trials, results, strict=True))
        return [found.get(row) for row in range(len(texts))]

    def check(self) -> None:
        """Look for a way to lock programs in, then read both sources to the end.

        Raises:
            ValueError: there is none and ``unsafe_code_rewards`` is not set, or a source cannot be
                used.
        """
        self.sandbox.check()
        super().check()

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; sources are read once per process.

        Raises:
            ValueError: a source cannot be read, or a record is of no known form.
        """
        if split == "test":
            return _tested(self.test)
        return _trained(self.train, self.test, self.validation_share)[split]

    def problem(self, text: str) -> Problem:
        """A typed problem has no tests: it can be answered, but passes none."""
        if not text.strip():
            raise ValueError("it is empty; expected the description of a program")
        return pose(text, reference="pass", tests="", names=())


@dataclass(frozen=True, kw_only=True)
class HumanEval(Code):
    """Train on KodCode, complete the 164 functions of HumanEval."""

    train: str = "hub:KodCode/KodCode-Light-RL-10K"
    """Records to train on."""
    test: str = "hub:openai/openai_humaneval"
    """Records to test on."""


@dataclass(frozen=True, kw_only=True)
class Mbpp(Code):
    """Train and test on MBPP: a sentence and three assertions each."""

    train: str = "hub:google-research-datasets/mbpp"
    """Records to train on."""
    test: str = "hub:google-research-datasets/mbpp"
    """Records to test on."""


def pose(
    text: str, *, reference: str, tests: str, names: Sequence[str], prelude: str = ""
) -> Problem:
    """A problem in the words of this task.

    Args:
        text: the description.
        reference: a program that passes.
        tests: assertions, see ``Trial``.
        names: the functions under test.
        prelude: trusted code that runs before the program of an answer.
    """
    wanted = " and ".join(f"`{name}`" for name in names) or "what is asked for"
    gold = (
        f"<reasoning>\nThe program is known.\n</reasoning>\n"
        f"<answer>\n```python\n{reference.strip()}\n```\n</answer>"
    )
    facts = {"prelude": prelude, "reference": reference, "tests": tests, "names": list(names)}
    return Problem(
        question=f"{INSTRUCTIONS.format(names=wanted)}\n\n{text.strip()}", gold=gold, facts=facts
    )


def humaneval(row: Record) -> Problem:
    """Complete a function; columns ``prompt, entry_point, test, canonical_solution``.

    The prompt's own imports and helpers are there for the answer. Source: Chen et al. 2021,
    arXiv:2107.03374.
    """
    entry, prompt = row["entry_point"], row["prompt"]
    return pose(
        f"Complete this function:\n\n```python\n{prompt.strip()}\n```",
        reference=prompt + row["canonical_solution"],
        tests=f"{row['test']}\ncheck({entry})\n",
        names=[entry],
        prelude=prompt,  # a program as it stands: the last function's body is its docstring
    )


def mbpp(row: Record) -> Problem:
    """A description with assertions; columns ``text`` or ``prompt``, ``code, test_list``.

    If there are columns ``test_imports`` (lines) and ``test_setup_code``, they come first. The
    functions under test are those of the reference that the assertions name. Source: Austin et al.
    2021, arXiv:2108.07732.
    """
    shown = "\n".join(row["test_list"])
    setup = [*row.get("test_imports", []), row.get("test_setup_code", "")]
    called = {node.id for node in ast.walk(ast.parse(shown)) if isinstance(node, ast.Name)}
    return pose(
        f"{row.get('text') or row['prompt']}\n\nIt must satisfy:\n\n```python\n{shown}\n```",
        reference=row["code"],
        tests="\n".join([*setup, shown]),
        names=sorted(_functions(row["code"]) & called),
    )


def kodcode(row: Record) -> Problem | None:
    """A question with ``test_*`` functions; columns ``question, solution, test``.

    The tests import the functions under test from ``solution``. None where they import anything but
    functions, or more than the standard library. Source: Xu et al. 2025, arXiv:2503.02951.
    """
    imports = _imports(row["test"])
    names = imports.pop("solution", set())
    if not names or not names <= _functions(row["solution"]):
        return None
    if not imports.keys() <= sys.stdlib_module_names:
        return None
    return pose(row["question"], reference=row["solution"], tests=row["test"], names=sorted(names))


_FORMS = {
    ("entry_point", "prompt", "test", "canonical_solution"): humaneval,
    ("test_list", "code"): mbpp,
    ("question", "solution", "test"): kodcode,
}


def _problems(source: str, split: str) -> list[Problem]:
    """The usable problems of a source."""
    problems = []
    for number, row in enumerate(read_records(source, split)):
        forms = [form for columns, form in _FORMS.items() if row.keys() >= set(columns)]
        if not forms:
            raise ValueError(
                f"row {number} of '{source}', split '{split}' has the columns {sorted(row)}; "
                f"expected those of one of {[' '.join(columns) for columns in _FORMS]}"
            )
        try:
            problem = forms[0](row)
        except SyntaxError as error:
            raise ValueError(f"row {number} of '{source}' is no Python: {error}") from error
        if problem is not None:
            problems.append(problem)
    if not problems:
        raise ValueError(f"none of the records of '{source}', split '{split}' can be used")
    return problems


@functools.lru_cache(maxsize=8)
def _tested(source: str) -> list[Problem]:
    return _problems(source, "test")


@functools.lru_cache(maxsize=8)
def _trained(source: str, test: str, share: float) -> dict[str, list[Problem]]:
    """Training and validation problems; none of them is asked in the test."""

    def asked(problems: Sequence[Problem]) -> list[Record]:
        return [{"question": problem.question, "problem": problem} for problem in problems]

    rows = without(asked(_problems(source, "train")), asked(_tested(test)), "question")
    parts = split_by_content(rows, "question", {"train": 1 - share, "validation": share})
    return {split: [row["problem"] for row in rows] for split, rows in parts.items()}


def _functions(source: str) -> set[str]:
    """Names of the functions at the top of a program."""
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def _imports(source: str) -> dict[str, set[str]]:
    """Top-level modules that a program imports, each with the names taken from it."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name.partition(".")[0], set())
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found.setdefault((node.module or ".").partition(".")[0], set()).update(names)
    return found
