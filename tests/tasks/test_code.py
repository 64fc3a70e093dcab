"""Code tasks: their prompts, what completions earn, their splits and the flag."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest
import torch
import tyro

from rescore import cli
from rescore.rewards.sandbox import Limits, Sandbox, namespaces_available
from rescore.tasks.code import HumanEval, Mbpp, humaneval, kodcode, mbpp, program
from rescore.tasks.tokenizers import Characters

LETTERS = Characters(alphabet="".join(map(chr, [10, *range(32, 127)])))
UNSAFE = not namespaces_available()
SPLITS = ("train", "validation", "test")

HUMANEVAL = {
    "task_id": "Own/0",
    "prompt": (
        "from typing import List\n\n\ndef double(x: int) -> int:\n    return 2 * x\n\n\n"
        "def doubled(xs: List[int]) -> List[int]:\n"
        '    """Every number twice as large.\n    >>> doubled([1])\n    [2]\n    """\n'
    ),
    "entry_point": "doubled",
    "canonical_solution": "    return [double(x) for x in xs]\n",
    "test": (
        "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([]) == []\n"
        "    assert candidate([1, -3]) == [2, -6]\n"
        "    assert candidate([7]) == [double(7)], 'the helper of the prompt'\n    assert True\n"
    ),
}
MBPP = {
    "task_id": 1,
    "text": "Write a function that counts the vowels of a word.",
    "code": (
        "def isvowel(c):\r\n    return c in 'aeiou'\r\n"
        "def vowels(w):\r\n    return sum(map(isvowel, w))"
    ),
    "test_list": ["assert vowels('ma') == len(SET)", "assert vowels('') == floor(0.5)"],
    "test_setup_code": "SET = {1}",
    "test_imports": ["from math import floor"],
}
KODCODE = {
    "question": "Write `area(a, b)`, the area of a rectangle; negative sides raise ValueError.",
    "solution": (
        "def area(a, b):\n    if min(a, b) < 0:\n        raise ValueError\n    return a * b\n"
    ),
    "test": (
        "import math\nfrom solution import area\n\n\n"
        "def test_area():\n    assert area(2, 3) == 6\n\n\n"
        "def test_negative():\n    try:\n        area(-1, 1)\n        assert False\n"
        "    except ValueError:\n        assert math.isclose(area(0.5, 0.5), 0.25)\n"
    ),
}


def many(row, column, count):
    """Different problems of one form."""
    return [{**row, column: f"{row[column]} ({number})"} for number in range(count)]


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


@pytest.fixture
def task(write):
    """Tests of HumanEval's form, training problems of the two others."""
    rows = many(KODCODE, "question", 20) + many(MBPP, "text", 20)
    return HumanEval(
        train=write("train.jsonl", rows),
        test=write("test.jsonl", [HUMANEVAL]),
        tokenizer=LETTERS,
        prompt_length=1200,
        completion_length=600,
        validation_share=0.3,
        limits=Limits(seconds=30.0),
        unsafe_code_rewards=UNSAFE,
    )


def answer(source, reasoning="It is easy."):
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n```python\n{source}\n```\n</answer>"


def earned(task, problem, texts):
    """All terms of completions for one problem, by name."""
    facts = [problem.facts] * len(texts)
    return {name: function(texts, facts) for name, function in task.functions.items()}


@pytest.mark.parametrize(
    ("problem", "names"),
    [(humaneval(HUMANEVAL), ["doubled"]), (mbpp(MBPP), ["vowels"]), (kodcode(KODCODE), ["area"])],
)
def test_gold_completions_earn_everything(task, problem, names):
    """In each of the three forms, and the functions under test are known."""
    assert problem.facts["names"] == names
    assert all(f"`{name}`" in problem.question for name in names)
    assert set(map(tuple, earned(task, problem, [problem.gold]).values())) == {(1.0,)}


def test_the_whole_task_is_valid(task):
    """Gold outputs, as tokens, earn 1 in every term of every split."""
    task.check()
    task.validate(2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer("def doubled(xs): return [2 * x for x in xs]"), (1, 1, 1, 1)),
        (answer("def doubled(xs): return [double(x) for x in xs]"), (1, 1, 1, 1)),
        (answer("def doubled(xs) -> List[int]: return [2 * abs(x) for x in xs]"), (2 / 3, 0, 1, 1)),
        (answer("def other(xs): return xs"), (0, 0, 1, 1)),
        (answer("def doubled(xs): return"), (0, 0, 1, 1)),
        (answer("this is no program"), (0, 0, 1, 1)),
        (answer("import sys\nsys.exit(0)"), (0, 0, 0, 1)),
        (answer("open('/usr/x/y', 'w')"), (0, 0, 0, 1)),
        ("```python\ndef doubled(xs): return [2 * x for x in xs]\n```", (1, 1, 1, 0)),
        (answer("def doubled(xs): return [2 * x for x in xs]") + "\nDone.", (1, 1, 1, 0)),
        ("<answer>def doubled(xs): return [2 * x for x in xs]</answer>", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_rewards_by_hand(task, text, expected):
    """Fraction passed, all passed, ran to its end, format."""
    terms = earned(task, humaneval(HUMANEVAL), [text])
    values = tuple(terms[name][0] for name in ("tests_passed", "solved", "ran", "format"))
    assert values == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer("x = 1"), "x = 1\n"),
        (answer("x = 1", "First:\n```python\nx = 2\n```"), "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n"),
        ("<answer>\n```python\nx = '```'\n```", "x = '```'\n"),
        ("<answer>\n```\nx = 1\n```\n</answer>", None),
        ("<answer>\n```python\nx = 1", None),
        ("```python\nx = 1\n```\n<answer>x = 1</answer>", None),
    ],
)
def test_the_program_is_the_first_block_of_the_answer(text, expected):
    """Blocks in the reasoning are not it; one that does not end is none."""
    assert program(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        answer("x = 1").replace("<reasoning>", "", 1),
        answer("x = 1").replace("```python", "```", 1),
        answer("x = 1").replace("\n```\n</answer>", "\n</answer>"),
        answer("x = 1") * 2,
        answer("x = 1\n```\n```python\nx = 2"),
        answer("x = 1", "<reasoning>"),
        "Well: " + answer("x = 1"),
    ],
)
def test_anything_else_is_not_well_formed(task, text):
    """One tag or fence missing, doubled, or words around."""
    assert task.functions["format"]([answer("x = 1"), text], [{}, {}]) == [1.0, 0.0]


def test_a_program_that_does_not_end_did_not_run(task):
    """Nor does it earn what it passed before."""
    short = dataclasses.replace(task, limits=Limits(seconds=1.0))
    text = answer("def doubled(xs):\n    while xs: pass\n    return []")
    terms = earned(short, humaneval(HUMANEVAL), [text])
    assert (terms["ran"], terms["tests_passed"], terms["format"]) == ([0.0], [0.0], [1.0])


def test_results_stay_with_their_completions(task):
    """Between completions without a program, and whatever finishes first."""
    good, bad = (answer(f"def doubled(xs): return {value}") for value in ("[2 * x for x in xs]", 0))
    slow = answer("import time\ntime.sleep(0.5)\ndef doubled(xs): return [2 * x for x in xs]")
    texts = ["", slow, bad, "no program", good, bad]
    terms = earned(task, humaneval(HUMANEVAL), texts)
    assert terms["solved"] == [0, 1, 0, 0, 1, 0]
    assert terms["ran"] == [0, 1, 1, 0, 1, 1]


def test_all_terms_read_one_execution(task):
    """A program that draws its answer gets one score, in every term and for every equal sample."""
    text = answer(
        "import random\nlucky = random.SystemRandom().random() < 0.5\n"
        "def doubled(xs): return [2 * x for x in xs] if lucky else None"
    )
    for number in range(6):
        texts = [text.replace("0.5", f"0.5 + {number} * 0")] * 3
        terms = earned(task, humaneval(HUMANEVAL), texts)
        assert terms["tests_passed"] == terms["solved"]
        assert len(set(terms["solved"])) == 1


def test_weights_choose_what_is_optimised(task):
    """Reported terms weigh nothing unless named."""
    prompts = task.prompts("test", torch.tensor([0]))
    terms = task.reward.terms(task.gold(prompts), prompts)
    assert list(terms) == ["tests_passed", "solved", "ran", "format"]
    assert task.reward.total(terms).tolist() == [1.25]
    other = dataclasses.replace(task, reward_weights={"solved": 2.0, "format": 0.0})
    assert other.reward.total(terms).tolist() == [3.0]


# Splits


def test_splits_share_no_problem(task):
    """Validation is part of the training source; nothing is lost."""
    asked = {split: {problem.question for problem in task.problems(split)} for split in SPLITS}
    assert all(asked.values())
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 41
    assert len(asked["train"]) > len(asked["validation"])


def test_what_is_tested_is_not_trained_on(task, write):
    """A file that holds the test problems too gives the others only."""
    rows = [HUMANEVAL, *many(KODCODE, "question", 40)]
    leaky = dataclasses.replace(task, train=write("leaky.jsonl", rows))
    assert sum(len(leaky.problems(split)) for split in ("train", "validation")) == 40


@pytest.mark.parametrize("field", ["train", "test"])
def test_a_missing_source_is_refused_before_anything_is_loaded(task, field):
    """By ``check``."""
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' does not exist"):
        dataclasses.replace(task, **{field: "nowhere.jsonl"}).check()


def test_each_split_is_read_from_its_own_file_of_a_folder(task, write, tmp_path):
    """Training and validation from ``train``, the test from ``test``."""
    rows = many(KODCODE, "question", 20)
    write("folder/train.jsonl", rows[:15])
    write("folder/test.jsonl", rows[15:])
    same = dataclasses.replace(task, train=str(tmp_path / "folder"), test=str(tmp_path / "folder"))
    assert len(same.problems("test")) == 5
    assert sum(len(same.problems(split)) for split in ("train", "validation")) == 15


def test_the_description_may_be_called_prompt():
    """As in the sanitized form of MBPP."""
    row = {**MBPP, "prompt": MBPP["text"]}
    del row["text"]
    assert mbpp(row) == mbpp(MBPP)


@pytest.mark.parametrize(
    "change",
    [
        {"test": "import numpy\n" + KODCODE["test"]},
        {"test": "from solution import Area\ndef test(): assert Area"},
        {"test": "def test_nothing(): assert True"},
        {"test": "from . import helpers\n" + KODCODE["test"]},
    ],
)
def test_training_problems_that_cannot_be_tested_are_left_out(change):
    """More than the standard library, more than functions, or no function at all."""
    assert kodcode({**KODCODE, **change}) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "?", "answer": "!"}],
            r"row 0 of .* has the columns \['answer', 'question'\]",
        ),
        ([MBPP, {**MBPP, "code": "def f(:"}], "row 1 of .* is no Python"),
        ([{**KODCODE, "test": ""}], "none of the records of .* can be used"),
    ],
)
def test_records_of_no_known_form_are_refused(task, write, rows, message):
    """The message names the row, and what it has."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(task, test=write("bad.jsonl", rows)).problems("test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"prefill": "Well"}, "prefill is 'Well'"),
        ({"reward_weights": {"speed": 1.0}}, r"unknown terms \['speed'\]"),
    ],
)
def test_impossible_fields_are_refused(task, fields, message):
    """At construction."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(task, **fields)


def test_a_typed_problem_is_posed_and_an_empty_one_refused(task):
    """It has no tests, so nothing passes."""
    assert "a greeting" in task.problem("Print a greeting.").question
    assert earned(task, task.problem("Print a greeting."), [answer("x = 1")])["solved"] == [0]
    with pytest.raises(ValueError, match="number 0 .* empty"):
        task.read([" "])


# The flag


def test_the_flag_is_the_same_wherever_the_task_is_nested(task):
    """``--unsafe-code-rewards``, without the names of the fields above it."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outer:
        task: Mbpp

    default = Outer(task=Mbpp(tokenizer=LETTERS, prompt_length=9, completion_length=9))
    for arguments, expected in (
        ([], False),
        (["--unsafe-code-rewards"], True),
        (["--no-unsafe-code-rewards"], False),
    ):
        parsed = tyro.cli(
            Outer, args=arguments, default=default, config=(tyro.conf.AvoidSubcommands,)
        )
        assert parsed.task.unsafe_code_rewards is expected
        assert parsed.task.sandbox.unsafe is expected
    limited = tyro.cli(Outer, args=["--task.limits.seconds", "2.5"], default=default)
    assert limited.task.sandbox.limits.seconds == 2.5


def test_a_task_does_not_start_where_programs_cannot_be_locked_in(task, tmp_path):
    """Unless the flag is given."""

    class Elsewhere(HumanEval):
        @property
        def sandbox(self):
            return dataclasses.replace(super().sandbox, launchers=(str(tmp_path / "none"),))

    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    assert isinstance(task.sandbox, Sandbox)
    with pytest.raises(ValueError, match="none: not installed.*--unsafe-code-rewards"):
        Elsewhere(**{**fields, "unsafe_code_rewards": False}).check()
    Elsewhere(**{**fields, "unsafe_code_rewards": True}).check()


# Through the command line

RECIPE = """
import dataclasses
from rescore.algorithms.reinforce import Reinforce
from rescore.models.transformer import TransformerConfig
from rescore.rewards.sandbox import Limits
from rescore.sampling.decoder import Decoder
from rescore.tasks.code import Mbpp
from rescore.tasks.tokenizers import Characters
from rescore.training.pretrain import Pretrain
from rescore.training.run import Evaluate, Run

@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(Mbpp):
    texts: tuple[str, ...] = ()
    launchers: tuple[str, ...] = ("bwrap", "unshare")

    def completions(self, outputs):  # whatever the model writes, these are the programs
        return [self.texts[row % len(self.texts)] for row in range(len(outputs))]

    @property
    def sandbox(self):
        return dataclasses.replace(super().sandbox, launchers=self.launchers)

def recipe() -> Run:
    task = Written(
        train=TRAIN, test=TEST, texts=TEXTS, launchers=LAUNCHERS, limits=Limits(seconds=SECONDS),
        tokenizer=Characters(alphabet="".join(map(chr, [10, *range(32, 127)]))),
        prompt_length=560, completion_length=200, validation_share=0.4,
    )
    model = TransformerConfig(
        vocab_size=task.vocab_size, length=task.length, width=16, depth=1, heads=2
    )
    return Run(
        task=task, base=Pretrain(model=model, steps=1, batch=2, validation_rows=2),
        decoder=Decoder(steps=2), algorithm=Reinforce(), steps=2, batch_size=8, group_size=8,
        evaluate=Evaluate(every=2, n=2, n_test=2),
    )
"""
HONEST = "def vowels(w): return sum(c in 'aeiou' for c in w)"
UNRULY = {
    "forks": "import os\nfor n in range(40): os.fork()",
    "loops": "while True: pass",
    "writes": "open('/usr/rescore', 'w')",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "exits": "import os\nos._exit(0)",
    "fills the memory": "x = bytearray(1 << 34)",
}


@pytest.fixture
def recipe(write, tmp_path, monkeypatch):
    """Writes a recipe whose completions are answers with these programs, on MBPP's form."""
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "cache"))
    plain = {**MBPP, "code": MBPP["code"].replace("\r", "")}
    rows = many({**plain, "text": "Count the vowels."}, "text", 12)
    values = {"TRAIN": write("a.jsonl", rows[:9]), "TEST": write("b.jsonl", rows[9:])}

    def recipe(programs, seconds, launchers=("bwrap", "unshare")):
        given = values | {"TEXTS": tuple(map(answer, programs)), "SECONDS": seconds}
        given |= {"LAUNCHERS": launchers}
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE + "\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items()))
        return str(path)

    return recipe


def trained(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(UNSAFE, reason="this machine gives no namespaces")
def test_a_run_goes_on_whatever_programs_do(recipe, tmp_path):
    """Six of eight samples fork, loop, write, connect, exit or fill the memory: they earn nothing.

    All of it is seen in the mean of ``ran``; the other two samples pass, and nobody connected.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        unruly = [source.replace("{port}", str(port)) for source in UNRULY.values()]
        file, out = recipe([HONEST, *unruly, HONEST], 3.0), tmp_path / "run"
        cli.main(["train", file, "--out", str(out)])
        with pytest.raises(TimeoutError):
            server.accept()
    rows = trained(out)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        found = {name: row[name] for name in ("ran", "solved", "tests_passed", "format")}
        assert found == {"ran": 0.25, "solved": 0.25, "tests_passed": 0.25, "format": 1.0}


def test_a_run_starts_without_namespaces_only_by_the_flag(recipe, tmp_path, capsys):
    """Else it is refused before anything is written, with the flag's name."""
    file, out = recipe([HONEST], 30.0, launchers=("no-such-launcher",)), tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", file, "--out", str(out)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "no-such-launcher: not installed" in said and "--unsafe-code-rewards" in said
    assert not out.exists()
    cli.main(["train", file, "--out", str(out), "--unsafe-code-rewards"])
    assert [row["ran"] for row in trained(out)] == [1.0, 1.0]
