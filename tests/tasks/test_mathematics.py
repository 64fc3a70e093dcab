"""Word problems: rows become prompts, gold completions earn everything, tests stay secret."""

from __future__ import annotations

import dataclasses
import json
import string
import sys

import pytest
import torch

from rescore.rewards.text import FACTS, unpack
from rescore.tasks.mathematics import Gsm8k, Math500
from rescore.tasks.tokenizers import Characters

ASCII = Characters(alphabet=string.printable)
SPLITS = ("train", "validation", "test")


def gsm8k_row(n):
    return {
        "question": f"Ann has {n} nuts and buys\n{n} more. How many nuts has she?",
        "answer": f"She has {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} nuts.\n#### {2 * n:,}",
    }


def math_row(n):
    solution = rf"Halve it: $\frac{{{n}}}{{2}}$. Thus $x = \boxed{{\frac{{{n}}}{{2}}}}$."
    return {"problem": f"Solve $2x = {n}$.", "solution": solution}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sources(folder, row, *, test=range(40)):
    """120 training rows and, by default, 40 test rows; they have nothing in common."""
    return {
        "train": write(folder / "train.jsonl", map(row, range(400, 520))),
        "test": write(folder / "test.jsonl", map(row, test)),
    }


def gsm8k(files, **fields):
    sizes = {"prompt_length": 400, "completion_length": 160, "validation_share": 0.2}
    return Gsm8k(**{"tokenizer": ASCII, **sizes, **files, **fields})


def math500(files, **fields):
    sizes = {"prompt_length": 400, "completion_length": 160, "validation_share": 0.2}
    return Math500(**{"tokenizer": ASCII, **sizes, **files, **fields})


@pytest.fixture(params=["gsm8k", "math500"])
def task(request, tmp_path):
    """Either task, on its own little problems."""
    if request.param == "gsm8k":
        return gsm8k(sources(tmp_path, gsm8k_row))
    pytest.importorskip("math_verify")
    return math500(sources(tmp_path, math_row))


def everything(task, split):
    return task.prompts(split, torch.arange(task.size(split)))


# What both have in common


def test_gold_completions_earn_every_term(task):
    """In every split, with and without a prefill; every term is in [0, 1]."""
    for prefill in ("", "<reasoning>", "<reasoning>\n"):
        task = dataclasses.replace(task, prefill=prefill)
        task.check()
        task.validate(task.size("train"))
        prompts = everything(task, "validation")
        texts = task.completions(task.gold(prompts))
        assert texts == [problem.gold for problem in task.problems("validation")]
        for outputs in (task.gold(prompts), prompts.tokens, task.gold(prompts).flip(0)):
            for value in task.reward.terms(outputs, prompts).values():
                assert bool(((value >= 0) & (value <= 1)).all())


def test_a_model_that_writes_nothing_earns_nothing(task):
    """A canvas that is still masked, and one that ends at once."""
    prompts = everything(task, "test")
    empty = prompts.tokens.where(~prompts.editable, ASCII.end_id)
    for outputs in (prompts.tokens, empty):
        assert all(not bool(value.any()) for value in task.reward.terms(outputs, prompts).values())


def test_the_gold_completion_of_another_problem_is_wrong(task):
    """And keeps the format."""
    prompts = everything(task, "test")
    terms = task.reward.terms(task.gold(prompts).roll(1, 0), prompts)
    assert not bool(terms.pop("correctness").any())
    assert all(bool((value == 1).all()) for value in terms.values())


def test_every_training_row_is_in_train_or_validation(task):
    """Once; the test rows are all there, in their order."""
    questions = {split: [p.question for p in task.problems(split)] for split in SPLITS}
    assert len(questions["train"]) + len(questions["validation"]) == 120
    assert len(set(questions["train"]) | set(questions["validation"])) == 120
    assert len(questions["validation"]) < 45
    assert len(questions["test"]) == 40
    assert all(str(n) in question for n, question in enumerate(questions["test"]))


def test_prompts_are_the_instruction_and_the_question(task):
    """As text; an empty instruction leaves the question alone."""
    shown = task.show(everything(task, "test").tokens[3])
    assert shown.startswith(task.instruction + "\n\n")
    assert shown.endswith("." * task.completion_length)
    bare = dataclasses.replace(task, instruction="", prompt_length=60)
    question = task.problems("test")[3].question.removeprefix(task.instruction + "\n\n")
    assert bare.problems("test")[3].question == question
    assert all(tag in task.instruction for tag in ("<reasoning>", "</reasoning>", "<answer>"))


def test_test_problems_are_never_trained_on(tmp_path):
    """Training rows that also stand in the test set are dropped, however they are written."""
    shouted = [{**gsm8k_row(n), "question": gsm8k_row(n)["question"].upper()} for n in (3, 5)]
    train = [*map(gsm8k_row, range(400, 500)), *map(gsm8k_row, range(30)), *shouted]
    task = gsm8k(
        {
            "train": write(tmp_path / "a.jsonl", train),
            "test": write(tmp_path / "b.jsonl", map(gsm8k_row, range(40))),
        }
    )
    asked = [{p.question.casefold() for p in task.problems(split)} for split in SPLITS]
    assert not asked[2] & (asked[0] | asked[1])
    assert len(asked[0] | asked[1]) == 100


def test_training_on_the_test_set_is_refused(tmp_path):
    """The same file for both leaves nothing."""
    source = write(tmp_path / "a.jsonl", map(gsm8k_row, range(8)))
    with pytest.raises(ValueError, match=r"all 8 records .* 8 distinct texts in column 'question'"):
        gsm8k({"train": source, "test": source}).check()


def test_sources_are_read_on_first_use_and_only_once(tmp_path):
    """A constructor reads nothing; files may vanish after the first use."""
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "test")}
    names = {split: str(file) for split, file in files.items()}
    task = gsm8k(names)
    with pytest.raises(ValueError, match=r"test\.jsonl' does not exist"):
        task.check()
    assert sources(tmp_path, gsm8k_row) == names
    task.check()
    first = task.problems("train")
    for file in files.values():
        file.unlink()
    assert gsm8k(names).problems("train") is first
    gsm8k(names).check()


def test_other_fields_are_other_problems(tmp_path):
    """The cache tells sources, shares and instructions apart."""
    files = sources(tmp_path, gsm8k_row)
    half = gsm8k(files, validation_share=0.5)
    assert len(half.problems("validation")) > len(gsm8k(files).problems("validation")) + 10
    assert gsm8k(files, instruction="Go.").problems("test")[0].question.startswith("Go.\n\nAnn")
    swapped = gsm8k({"train": files["test"], "test": files["train"]})
    assert len(swapped.problems("test")) == 120


# GSM8K


def test_a_gsm8k_row_by_hand(tmp_path):
    """Calculator marks go, the number behind #### is the answer."""
    task = gsm8k(sources(tmp_path, gsm8k_row, test=range(750, 760)), instruction="")
    problem = task.problems("test")[0]
    assert problem.question == "Ann has 750 nuts and buys\n750 more. How many nuts has she?"
    assert problem.gold == (
        "<reasoning>\nShe has 750+750=1500 nuts.\n</reasoning>\n<answer>\n1,500\n</answer>"
    )
    assert problem.facts == {"answer": "1,500"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>1500</answer>", (1, 1, 0.5, 0)),
        ("<answer>$1,500.00</answer>", (1, 1, 0.5, 0)),
        (r"<answer>\boxed{1500}</answer>", (1, 1, 0.5, 0)),
        ("<answer>1501</answer>", (0, 1, 0.5, 0)),
        ("<answer>many</answer>", (0, 0, 0.5, 0)),
        ("<reasoning>a\nb</reasoning>\n<answer>1501</answer>", (0, 1, 1, 1)),
        ("1500", (0, 0, 0, 0)),
    ],
)
def test_gsm8k_terms_by_hand(text, expected):
    """Correctness, number, tags, strict format, with weights 2 and three times 1/2."""
    task = gsm8k({})
    prompts = task.read(["How much is 750 + 750? #### 1,500"])
    outputs = torch.cat(
        [
            prompts.tokens[:, : task.prompt_length],
            torch.tensor([ASCII.encode(text) + [ASCII.end_id] * (160 - len(text))]),
        ],
        dim=1,
    )
    terms = task.reward.terms(outputs, prompts)
    assert list(terms) == ["correctness", "number", "format", "strict_format"]
    assert tuple(value.item() for value in terms.values()) == expected
    correct, is_number, tags, strict = expected
    assert task.reward.total(terms).item() == 2 * correct + (is_number + tags + strict) / 2


# MATH


def test_a_math_row_by_hand(tmp_path):
    """The last box is the answer, and stands in a box again."""
    pytest.importorskip("math_verify")
    task = math500(sources(tmp_path, math_row, test=range(7, 12)), instruction="")
    problem = task.problems("test")[0]
    assert problem.question == "Solve $2x = 7$."
    assert problem.gold == (
        "<reasoning>\nHalve it: $\\frac{7}{2}$. Thus $x = \\boxed{\\frac{7}{2}}$.\n</reasoning>\n"
        "<answer>\n\\boxed{\\frac{7}{2}}\n</answer>"
    )
    assert problem.facts == {"answer": r"\frac{7}{2}"}


def test_an_answer_column_comes_before_the_box():
    """Where there is one that is not empty."""
    row = math_row(7)
    assert Math500.solved({**row, "answer": " 3.5 "}).answer == "3.5"
    assert Math500.solved({**row, "answer": ""}).answer == r"\frac{7}{2}"
    assert Math500.solved({**row, "solution": "Clear.", "answer": "3.5"}).reasoning == "Clear."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<answer>\boxed{\frac{7}{2}}</answer>", (1, 1, 0.5, 0)),
        (r"<answer>so it is \boxed{3.5}.</answer>", (1, 1, 0.5, 0)),
        ("<answer>7/2</answer>", (1, 0, 0.5, 0)),
        (r"<answer>\boxed{7}</answer>", (0, 1, 0.5, 0)),
        (r"<reasoning>a\nb</reasoning>\n<answer>\boxed{7}</answer>", (0, 1, 1, 0)),
        ("<reasoning>a\nb</reasoning>\n<answer>\n\\boxed{7}\n</answer>", (0, 1, 1, 1)),
        (r"\boxed{\frac{7}{2}}", (0, 0, 0, 0)),
    ],
)
def test_math_terms_by_hand(text, expected):
    """Correctness, box, tags, strict format, with weights 2, 1/2, 1/2 and 0."""
    pytest.importorskip("math_verify")
    task = math500({})
    prompts = task.read([r"Solve $2x = 7$. #### \frac{7}{2}"])
    outputs = torch.cat(
        [
            prompts.tokens[:, : task.prompt_length],
            torch.tensor([ASCII.encode(text) + [ASCII.end_id] * (160 - len(text))]),
        ],
        dim=1,
    )
    terms = task.reward.terms(outputs, prompts)
    assert list(terms) == ["correctness", "box", "format", "strict_format"]
    assert tuple(value.item() for value in terms.values()) == expected
    correct, box, tags, _ = expected
    assert task.reward.total(terms).item() == 2 * correct + (box + tags) / 2


def test_a_missing_library_is_found_by_the_check(tmp_path, monkeypatch):
    """Before a model is loaded."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r'pip install "rescore\[language\]"'):
        math500(sources(tmp_path, math_row)).check()


# Typed problems


@pytest.mark.parametrize("make", [gsm8k, math500])
def test_typed_problems_have_their_answer(make):
    """Behind the last ####; the gold completion earns everything, no file is read."""
    if make is math500:
        pytest.importorskip("math_verify")
    task = make({"train": "nowhere.jsonl", "test": "nowhere.jsonl"})
    prompts = task.read(["How much is 2 #### 2? #### 22", "How much is 3 + 4? #### 7"])
    assert [fact["answer"] for fact in unpack(prompts.info[FACTS])] == ["22", "7"]
    terms = task.reward.terms(task.gold(prompts), prompts)
    assert all(value.tolist() == [1, 1] for value in terms.values())
    assert task.show(prompts.tokens[0]).rstrip(".").endswith("\n\nHow much is 2 #### 2?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("How much is 3 + 4?", "is not of the form 'question #### answer'"),
        ("How much is 3 + 4? ####", "is not of the form"),
        (" #### 7", "is not of the form"),
        ("How much is 3 + 4? #### seven", "expected '#### a number'"),
    ],
)
def test_a_typed_problem_without_an_answer_is_refused(text, message):
    """The message says which and why."""
    with pytest.raises(ValueError, match=f"number 1 of the given problems: .*{message}"):
        gsm8k({}).read(["What is 1? #### 1", text])


# Refusals


@pytest.mark.parametrize(
    ("make", "row", "message"),
    [
        (gsm8k, {"question": "a", "answer": "#### many"}, r"'answer' ends in '#### many'"),
        (gsm8k, {"question": "a", "answer": "no number 5 marked"}, "expected '#### a number'"),
        (gsm8k, {"question": "a"}, r"column 'answer' is None; .*columns \['question'\]"),
        (gsm8k, {"question": "a", "answer": 5}, "column 'answer' is 5; expected a text"),
        (gsm8k, {"question": " ", "answer": "#### 5"}, "column 'question' is ' '"),
        (math500, {"problem": "a", "solution": "it is 5"}, r"no 'answer', and no \\boxed\{\}"),
        (math500, {"problem": "a", "solution": r"\boxed{}"}, "no 'answer'"),
        (math500, {"problem": "a", "answer": "5"}, "column 'solution' is None"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, make, row, message):
    """With its number and its source, by the check."""
    if make is math500:
        pytest.importorskip("math_verify")
    good = gsm8k_row if make is gsm8k else math_row
    files = sources(tmp_path, good)
    files["train"] = write(tmp_path / "bad.jsonl", [good(901), good(902), row])
    with pytest.raises(ValueError, match=rf"row 2 of '.*bad\.jsonl', split 'train': .*{message}"):
        make(files).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_share": 0.0}, "validation_share is 0.0; expected more than 0"),
        ({"validation_share": 1.0}, "validation_share is 1.0"),
        ({"prefill": "Sure!"}, "prefill is 'Sure!'; expected the beginning of '<reasoning>"),
        ({"prompt_length": 0}, "prompt_length must be at least 1"),
        ({"reward_weights": {"speed": 1.0}}, r"unknown terms \['speed'\]"),
    ],
)
@pytest.mark.parametrize("make", [gsm8k, math500])
def test_impossible_fields_are_refused(make, fields, message):
    """At construction; nothing is read for it."""
    with pytest.raises(ValueError, match=message):
        make({"train": "nowhere.jsonl", "test": "nowhere.jsonl"}, **fields)
