"""Arithmetic that a model wrote, evaluated exactly and without running it.

An expression is made of integers, ``+ - * /``, unary minus, brackets and spaces. Everything else is
refused, and what is accepted is bounded in length, depth and digits, so no answer can cost time.
"""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

LONGEST = 200
"""Characters of an expression."""
DEEPEST = 20
"""Brackets inside brackets."""
MOST_DIGITS = 12
"""Digits of one number."""

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> Fraction:
    """The exact value of an expression.

    Raises:
        ValueError: it is no expression, is too large, or divides by zero; says which.
    """
    try:
        return _value(_parse(text))
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


def numbers_in(text: str) -> list[int]:
    """The numbers written in an expression, from left to right.

    Raises:
        ValueError: it is no expression or is too large; says which.
    """
    _parse(text)
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _parse(text: str) -> ast.expr:
    """The syntax tree of an expression, every node of it known."""
    text = text.strip()
    if len(text) > LONGEST:
        raise ValueError(f"an expression has {len(text)} characters; at most {LONGEST} are read")
    strange = sorted(set(re.sub(r"[0-9+\-*/() ]", "", text)))
    if strange:
        raise ValueError(f"{text!r} has the characters {strange}; expected digits and + - * / ( )")
    if _depth(text) > DEEPEST:
        raise ValueError(f"{text!r} has more than {DEEPEST} brackets inside one another")
    if re.search(rf"\d{{{MOST_DIGITS + 1}}}", text):
        raise ValueError(f"{text!r} has a number of more than {MOST_DIGITS} digits")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no arithmetic expression: {error.msg}") from None
    _check(tree, text)
    return tree


def _depth(text: str) -> int:
    """The most brackets open at once."""
    depth = deepest = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    return deepest


def _check(node: ast.expr, text: str) -> None:
    match node:
        case ast.Constant(value=int()):
            return
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check(operand, text)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            _check(left, text)
            _check(right, text)
        case _:
            what = ast.unparse(node)
            raise ValueError(f"{text!r} contains {what!r}; only + - * / of integers are read")


def _value(node: ast.AST) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise AssertionError(f"{node} passed _check")
