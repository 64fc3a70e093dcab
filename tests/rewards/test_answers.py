r"""Answers in text: what is extracted, which format counts, and which answers are equal."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest

from rescore.rewards import answers
from rescore.rewards.answers import (
    answer_block,
    boxed,
    equivalent,
    final_answer,
    number,
    tag_share,
    well_formed,
)

GOOD = "<reasoning>\nTwo and two\nmake four.\n</reasoning>\n<answer>\n4\n</answer>"
BOXED = GOOD.replace("\n4\n", "\n\\boxed{4}\n")


@pytest.fixture
def math_verify():
    """Skip where the library that compares expressions is not installed."""
    return pytest.importorskip("math_verify")


# Extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>4</answer>", "4"),
        ("<answer>\n 4 \n</answer>", "4"),  # over several lines, stripped
        ("<answer>3</answer> no: <answer>4</answer> done", "4"),  # the last one
        ("<answer>3</answer> no: <answer>4", "3"),  # the last one that is closed
        ("<answer>3 <answer>4</answer>", "4"),  # from the tag that is opened last
        ("<answer>4</answer></answer>", "4"),  # up to the tag that is closed first
        ("<answer></answer>", ""),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer>4<answer>", None),
        ("<Answer>4</Answer>", None),
        ("4", None),
        ("", None),
    ],
)
def test_the_last_answer_block_is_the_answer(text, expected):
    """Whatever stands around it; None without one."""
    assert answer_block(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{4}.", "4"),
        (r"\boxed{3} or \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # braces inside
        (r"\boxed{\{1, 2\}} and }", r"\{1, 2\}"),  # escaped braces inside, a stray one behind
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # escaped and without a partner
        (r"\boxed{a\\}", r"a\\"),  # a line break is no escape of the brace behind it
        (r"\boxed{3} then \boxed{4", "3"),  # the last one that is closed
        (r"\boxed{x + \boxed{4}}", "4"),
        ("\\boxed{\n4\n}", "4"),
        (r"\fbox{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"$\boxed 4$ is it", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        ("\boxed{4}", None),  # a backspace, then "oxed"
        ("boxed{4}", None),
        ("4", None),
    ],
)
def test_the_last_balanced_box_is_found(text, expected):
    """Braces are counted, escaped ones are characters."""
    assert boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<answer>it is \boxed{4}</answer>", "4"),
        (r"\boxed{3} <answer>4</answer>", "4"),  # a box outside of the block says nothing
        (r"<answer>\boxed{3}</answer><answer>4</answer>", "4"),
        (r"\boxed{4}", None),
    ],
)
def test_the_final_answer_is_in_the_last_block(text, expected):
    """Boxed or not."""
    assert final_answer(text) == expected


# Format


@pytest.mark.parametrize(
    ("text", "share", "strict"),
    [
        (GOOD, 1, True),
        (f"\n{GOOD}\n\n", 1, True),  # blank lines around do no harm
        ("<reasoning>a</reasoning><answer>4</answer>", 1, True),  # nor does a single line
        (f"{GOOD} done", 1, False),
        (f"So: {GOOD}", 1, False),
        ("<reasoning>a</reasoning> so <answer>4</answer>", 1, False),
        ("<reasoning> </reasoning><answer>4</answer>", 1, False),  # no reasoning
        ("<reasoning>a</reasoning><answer>\n</answer>", 1, False),  # no answer
        ("<reasoning>a</reasoning><answer>4", 3 / 4, False),  # cut off
        ("<reasoning>a<answer>4</answer>", 3 / 4, False),
        ("<reasoning>a</reasoning>4", 2 / 4, False),
        ("<answer>4</answer>", 2 / 4, False),
        ("<answer>4</answer><reasoning>a</reasoning>", 2 / 4, False),  # the wrong order
        ("</answer><answer></reasoning><reasoning>", 1 / 4, False),
        (GOOD + GOOD, 0, False),  # everything twice
        (GOOD.replace("four", "<answer>"), 3 / 4, False),  # one tag twice
        ("4", 0, False),
        ("", 0, False),
    ],
)
def test_format_by_hand(text, share, strict):
    """A quarter per tag that occurs once and in order; strictly, nothing else may be there."""
    assert tag_share(text) == share
    assert well_formed(text) is strict


# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        (" 42 ", 42),
        ("+42", 42),
        ("-42", -42),
        ("−42", -42),  # a minus sign that is no hyphen
        ("042", 42),
        ("1,234,567", 1234567),
        ("$1,000.50", Fraction(2001, 2)),
        (r"\$5", 5),
        ("-$5", -5),
        ("50%", 50),
        (r"50\%", 50),
        ("42.", 42),
        ("42.0", 42),
        ("0.1", Fraction(1, 10)),  # exactly, not the nearest float
        (".5", Fraction(1, 2)),
        ("$3.", 3),
        ("12345678901234567890123", 12345678901234567890123),
        ("12,34", None),  # commas stand between thousands
        ("1,2345", None),
        (",5", None),
        ("4 2", None),
        ("42 apples", None),
        ("x = 42", None),
        ("1/2", None),
        ("6*7", None),
        ("1e3", None),
        ("1e999999999", None),
        ("9**9**9", None),
        ("inf", None),
        ("nan", None),
        ("٤٢", None),  # digits, but no ASCII ones
        ("--5", None),
        ("4.2.1", None),
        ("9" * 10_000, None),
        ("", None),
        (".", None),
        ("-", None),
    ],
)
def test_numbers_are_read_exactly(text, value):
    """Signs of money, percent and thousands are understood; nothing is evaluated."""
    assert number(text) == value


# Mathematics


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("0.51", r"\frac{1}{2}", False),
        ("10000", r"10,\!000", True),
        (r"\$32", "32", True),
        ("2, 1", "1, 2", True),
        ("1, 2, 3", "1, 2", False),
        ("(2, 1)", "(1, 2)", False),  # an ordered pair
        ("[1, 2)", "[1, 2]", False),
        (r"\left[ 1, 2 \right)", "[1,2)", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x", "(x+1)^2", False),
        (r"\text{East}", "East", True),
        (r"\text{West}", "East", False),
        (r"45^\circ", "45", True),
        ("x = 5", "5", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("-5", "5", False),
        ("34", "3 4", False),  # two numbers are not one
        ("4.", "4", True),
        ("", "4", False),
        ("4", "", False),
        ("", "", False),
        (r"4} or \boxed{5", "4", False),  # the box cannot be left
        (r"4} or \boxed{5", "5", False),
        (r"\left(\frac{1}{2}\right)^{50}", "2^{-50}", True),  # large, and within reason
        ("100!", r"\frac{101!}{101}", True),
        ("not mathematics {", "4", False),
    ],
)
def test_equal_expressions_by_hand(math_verify, answer, reference, same):
    """By value, not by spelling."""
    assert equivalent(answer, reference) is same


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "9^9^9^9",
        "9**9**9**9",
        "{{9^9}^99}^9",
        "9^{9}^{9}^{9}",
        "((9^{999})^{999})^{999}",
        "((2^{9})^{200})^{2}",
        r"4} or \boxed{5",
        "9^{99999999}",
        r"9^\frac{99999999}{1}",
        r"9^\left(99999999\right)",
        r"9^{9\cdot 9\cdot 9\cdot 9\cdot 9\cdot 9\cdot 9\cdot 9}",
        "9^{(9)(9)(9)(9)(9)(9)(9)(9)(9)(9)}",
        "9^{9999!}",
        "99999999!",
        "((9!)!)!",
        "9!!!!",
        r"\binom{999999999}{333333333}",
        "+".join(["1"] * 100_000),
        "{" * 100_000,
        "(" * 100_000,
        "^" * 100_000,
    ],
)
def test_no_answer_can_hang_a_run(monkeypatch, answer):
    """Numbers too large to write down and expressions too long to read never reach the library.

    It is hidden here, so asking for it would raise.
    """
    monkeypatch.setitem(sys.modules, "math_verify", None)
    start = time.process_time()
    assert not equivalent(answer, "12")
    assert not equivalent("12", answer)
    assert time.process_time() - start < 1.5


def test_what_takes_too_long_all_the_same_is_stopped(math_verify):
    """By the timeouts of the library; here they are met in the comparison."""
    start = time.monotonic()
    assert not equivalent("(x+y+z+a+b+c)^{400}", "(x+y+z+a+b+d)^{400}")
    assert time.monotonic() - start < 3 * answers.TIMEOUT_S


def test_an_answer_that_is_refused_can_still_be_spelled_right(math_verify):
    """The same text is the same answer, however large its value."""
    assert equivalent(r"\left( 9^{9^{9^9}} \right)", "(9^{9^{9^9}})")
    assert not equivalent("9^{9^{9^8}}", "9^{9^{9^9}}")


def test_other_threads_are_refused_rather_than_left_without_timeouts(math_verify):
    """Where no signal arrives nothing could be stopped."""
    caught: list[ValueError] = []

    def judge():
        try:
            equivalent("1 + 16", "17")
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert "threaded environment" in str(caught[0])


def test_a_missing_library_is_named(monkeypatch):
    """With the command that installs it; equal texts need no library."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert equivalent("17", "17")
    with pytest.raises(ValueError, match=r'math-verify.*pip install "rescore\[language\]"'):
        equivalent("17", "18")


def test_the_library_is_loaded_only_when_it_is_needed():
    """Importing the rewards imports no symbolic mathematics."""
    script = "import sys, rescore.rewards.answers; sys.exit('math_verify' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=False)
    assert loaded.returncode == 0


# Reward terms


def terms(*functions):
    return {function.__name__: function for function in functions}


NUMBERS = terms(answers.number_correct, answers.gives_number, answers.tags, answers.strict_format)
MATHS = terms(answers.math_correct, answers.gives_box, answers.tags, answers.strict_format)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, (1, 1, 1, 1)),
        (BOXED, (1, 1, 1, 1)),
        (GOOD.replace("4", "4.00"), (1, 1, 1, 1)),
        (GOOD.replace("4", "5"), (0, 1, 1, 1)),
        (GOOD.replace("4", "four"), (0, 0, 1, 1)),
        (GOOD.replace("4", "2+2"), (0, 0, 1, 1)),
        (GOOD.removesuffix("</answer>"), (0, 0, 3 / 4, 0)),
        ("<answer>4</answer>", (1, 1, 1 / 2, 0)),
        ("<answer>5</answer><answer>4</answer>", (1, 1, 0, 0)),
        ("<answer>4</answer><answer>5</answer>", (0, 1, 0, 0)),
        ("4", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_terms_for_numbers_by_hand(text, expected):
    """Right, a number, tags, strict format; the reference answer is 4."""
    got = [function([text], [{"answer": "4"}]) for function in NUMBERS.values()]
    assert got == [[value] for value in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOXED, (1, 1, 1, 1)),
        (GOOD, (1, 0, 1, 1)),
        (BOXED.replace("4", r"\frac{8}{2}"), (1, 1, 1, 1)),
        (BOXED.replace("4", "5"), (0, 1, 1, 1)),
        (GOOD + r"\boxed{4}", (1, 0, 1, 0)),  # a box outside of the block is none
        (r"\boxed{4}", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_terms_for_mathematics_by_hand(math_verify, text, expected):
    """Right, boxed, tags, strict format; the reference answer is 4."""
    got = [function([text], [{"answer": "4"}]) for function in MATHS.values()]
    assert got == [[value] for value in expected]


@pytest.mark.parametrize("function", [*NUMBERS.values(), *MATHS.values()])
def test_every_text_is_judged_by_its_own_facts(function, math_verify):
    """In order, one number each; an empty batch has none."""
    texts = [BOXED, "nothing", BOXED.replace("4", "7")]
    facts = [{"answer": "4"}, {"answer": "5"}, {"answer": "7"}]
    assert function(texts, facts) == [1.0, 0.0, 1.0]
    assert function([], []) == []


def test_what_is_no_number_equals_no_number():
    """Not even itself."""
    assert answers.number_correct(["<answer>ten</answer>"], [{"answer": "ten"}]) == [0.0]
