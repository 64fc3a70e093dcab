"""Arithmetic a model wrote: exact values, and refusals that cost no time."""

from __future__ import annotations

import time
import warnings
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rescore.rewards.arithmetic import DEEPEST, LONGEST, MOST_DIGITS, evaluate, numbers_in


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        ("2*4-3", 5, [2, 4, 3]),
        ("3-2*4", -5, [3, 2, 4]),  # products before sums
        ("10-4-3", 3, [10, 4, 3]),  # from left to right
        ("24/4/3", 2, [24, 4, 3]),
        ("(3-2)*4", 4, [3, 2, 4]),
        ("10-(4-3)", 9, [10, 4, 3]),
        ("7/2", Fraction(7, 2), [7, 2]),
        ("1/3*3", 1, [1, 3, 3]),  # exactly, not to rounding
        ("100/49*49-100", 0, [100, 49, 49, 100]),
        ("-3+7", 4, [3, 7]),
        ("7--3", 10, [7, 3]),
        ("-(3-7)*2", 8, [3, 7, 2]),
        (" 6 * 4 - 11\n", 13, [6, 4, 11]),
        ("999999999999*999999999999", 999999999999**2, [999999999999] * 2),
    ],
)
def test_expressions_by_hand(text, value, numbers):
    """Each value is exact, and the numbers are those written, in order."""
    assert evaluate(text) == value
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no arithmetic expression"),
        ("()", r"contains '\(\)'"),
        ("3+", "no arithmetic expression"),
        ("(3+4", "no arithmetic expression"),
        ("3 4", "no arithmetic expression"),
        ("9**9", r"contains '9 \*\* 9'"),
        ("9**9**9", r"contains '9 \*\* 9 \*\* 9'"),
        ("1+9**9", r"contains '9 \*\* 9'"),
        ("-(9//2)", "contains '9 // 2'"),
        ("(9**9)*2", r"contains '9 \*\* 9'"),
        ("+3", r"contains '\+3'"),
        ("3(4)", r"contains '3\(4\)'"),
        ("(4)(5)", r"contains '4\(5\)'"),
        ("1.5", r"characters \['\.'\]"),
        ("3,4", r"characters \[','\]"),
        ("3+4=7", r"characters \['='\]"),
        ("3\n+4", "characters"),
        ("1e9", r"characters \['e'\]"),
        ("0x1F", "characters"),
        ("1_000", r"characters \['_'\]"),
        ("x", r"characters \['x'\]"),
        ("True", "characters"),
        ("9%2", r"characters \['%'\]"),
        ("~3", r"characters \['~'\]"),
        ("[3]", "characters"),
        ("__import__('os').system('true')", "characters"),
        ("(3).real", "characters"),
        ("3\N{MULTIPLICATION SIGN}4", "characters"),
        ("\N{ARABIC-INDIC DIGIT THREE}+4", "characters"),
        ("007", "no arithmetic expression"),
        ("1" * (MOST_DIGITS + 1), f"more than {MOST_DIGITS} digits"),
        ("9*" * 100 + "99", f"202 characters; at most {LONGEST}"),
        ("9" * 100_000, "100000 characters"),
        ("(" * (DEEPEST + 1) + "3" + ")" * (DEEPEST + 1), f"more than {DEEPEST} brackets"),
        ("(" * LONGEST, f"more than {DEEPEST} brackets"),
    ],
)
def test_what_is_no_expression_is_refused(text, reason):
    """By both functions, without a warning, at once, and the message says why."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (evaluate, numbers_in):
            with pytest.raises(ValueError, match=reason):
                read(text)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("text", ["1/0", "3/(5-5)", "1/(1/3-1/3)", "-4/-0"])
def test_division_by_zero_has_no_value(text):
    """It is an expression, with numbers in it; its value is refused."""
    assert numbers_in(text)
    with pytest.raises(ValueError, match="divides by zero"):
        evaluate(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(" * DEEPEST + "3" + ")" * DEEPEST, 3),
        ("-" * (LONGEST - 1) + "3", -3),
        ("1" + "+1" * ((LONGEST - 1) // 2), (LONGEST + 1) // 2),
        ("9" * MOST_DIGITS, 10**MOST_DIGITS - 1),
        ("(1)+" * 40 + "1", 41),  # brackets side by side are not deep
    ],
)
def test_the_largest_of_everything_is_read(text, value):
    """The bounds themselves are within bounds."""
    assert evaluate(text) == value


def expressions():
    """Pairs of a text, every operation in brackets, and its value, None where zero divides."""

    def negated(inner):
        text, value = inner
        return f"(-{text})", None if value is None else -value

    def joined(left, operator, right):
        (a, x), (b, y) = left, right
        text = f"({a}{operator}{b})"
        if x is None or y is None or (operator == "/" and y == 0):
            return text, None
        return text, {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[operator]

    numbers = st.integers(0, 30).map(lambda n: (str(n), Fraction(n)))
    return st.recursive(
        numbers,
        lambda inner: (
            st.builds(joined, inner, st.sampled_from("+-*/"), inner) | st.builds(negated, inner)
        ),
        max_leaves=6,
    )


@given(expressions())
def test_values_follow_the_tree_that_was_written(expression):
    """The value of any bracketed tree is that of its operations."""
    text, value = expression
    if value is None:
        with pytest.raises(ValueError, match="divides by zero"):
            evaluate(text)
    else:
        assert evaluate(text) == value


@given(st.text("0123456789+-*/() .e_=\n", max_size=30))
def test_any_text_has_a_value_or_is_refused(text):
    """Nothing but ValueError ever comes out; what is evaluated has readable numbers."""
    try:
        value = evaluate(text)
    except ValueError:
        return
    assert isinstance(value, Fraction)
    assert all(isinstance(number, int) for number in numbers_in(text))
