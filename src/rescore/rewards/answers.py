r"""Rewards on written answers: was the format kept, and is the answer right?

A completion reasons first and answers last:

    <reasoning> ... </reasoning> <answer> ... </answer>

Its answer is what the last ``\boxed{...}`` of its last answer block holds, or the whole block where
nothing is boxed. No answer block, no credit. The functions of ``texts`` and ``facts`` are reward
terms: each is in [0, 1], and ``facts["answer"]`` is the reference answer.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

from rescore.rewards.text import Facts

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
"""What a completion is made of, in this order, each once."""

LONGEST_ANSWER = 300
"""Characters of an answer that is read as mathematics; a longer one must equal the reference."""
LARGEST_POWER = 1000
"""The largest exponent that is evaluated, and the largest number beside a factorial."""
TIMEOUT_S = 2
"""Seconds given to reading one answer, and to one comparison."""

_FORMAT = re.compile(r"\s*<reasoning>(.+)</reasoning>\s*<answer>(.+)</answer>\s*", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{$][^$\n]*)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(
    r"(?P<sign>[-+\N{MINUS SIGN}]?) \s* (?:\\?\$)? \s*"
    r"(?P<digits> (?: [0-9]{1,3} (?:,[0-9]{3})+ | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )"
    r"\.? \s* (?:\\?%)? \.?",
    re.VERBOSE,
)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_INVISIBLE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ]|\$|~")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_POWER = re.compile(r"(?P<base>\S?)\s*(?:\^|\*\*)\s*")
_PLAIN_EXPONENT = re.compile(r"[-+]?[0-9.]+|\\circ|\\prime")
_COUNTING = re.compile(r"(?<!\\)!|binom|choose")
_BRACKET_FACTORIAL = re.compile(r"[)\]}!]\s*!")


# Strings


def answer_block(text: str) -> str | None:
    """What stands in the last closed ``<answer>...</answer>``, stripped; None if there is none."""
    close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(close, 0))
    if start < 0:
        return None
    return text[start:].removeprefix("<answer>").partition("</answer>")[0].strip()


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` (or ``\fbox{...}``) whose braces are balanced.

    Where no box has braces, ``\boxed 5`` holds the rest of its formula or line. None if there is no
    box at all.
    """
    for match in reversed(list(_BOX.finditer(text))):
        inside = _braced(text, match.end())
        if inside is not None:
            return inside.strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1].strip() if bare else None


def final_answer(text: str) -> str | None:
    """The answer of a completion: the last box of the last answer block, or the whole block."""
    block = answer_block(text)
    if block is None:
        return None
    inside = boxed(block)
    return block if inside is None else inside


def tag_share(text: str) -> float:
    """Quarters for the tags of ``TAGS`` that occur exactly once, in their order.

    A tag counts if it comes after those counted before it.
    """
    counted, end = 0, 0
    for tag in TAGS:
        place = text.find(tag, end)
        if place >= 0 and text.count(tag) == 1:
            counted, end = counted + 1, place + len(tag)
    return counted / len(TAGS)


def well_formed(text: str) -> bool:
    """Reasoning, then an answer, neither empty, each tag once and nothing around them."""
    match = _FORMAT.fullmatch(text)
    once = all(text.count(tag) == 1 for tag in TAGS)
    return match is not None and once and all(part.strip() for part in match.groups())


def number(text: str) -> Fraction | None:
    """The number a text is, exactly; None if it is anything else, or over ``LONGEST_ANSWER``.

    A sign, a dollar sign in front, commas between thousands, a decimal part, a percent sign and a
    full stop behind are understood; ``50%`` is 50.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    value = Fraction(match["digits"].replace(",", ""))
    return value if match["sign"] in ("", "+") else -value


def equivalent(answer: str, reference: str) -> bool:
    r"""Whether two answers in LaTeX say the same: ``\frac{1}{2}`` and ``0.5``, ``1,2`` and ``2,1``.

    Equal up to spacing is equal. Everything else is judged by math-verify (Kydlíček 2025,
    github.com/huggingface/Math-Verify), unless it is too long, has unbalanced braces or raises
    numbers to powers that cannot be computed in reasonable time; then the answers differ. It reads
    expressions without asking that they be simplified: ``2+2`` is ``4``.

    Raises:
        ValueError: math-verify is not installed, or this is not the main thread, where alone its
            timeouts work.
    """
    if _plain(answer) == _plain(reference):
        return bool(_plain(answer))
    if not (_affordable(answer) and _affordable(reference)):
        return False
    verify = load_math_verify().verify
    return bool(verify(_parsed(reference), _parsed(answer), timeout_seconds=TIMEOUT_S))


def load_math_verify() -> ModuleType:
    """The library that compares mathematical expressions.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import math_verify
    except ImportError:
        raise ValueError(
            "comparing mathematical answers needs the package math-verify, which is not installed; "
            'pip install "rescore[language]"'
        ) from None
    return math_verify


# Reward terms


def tags(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """``tag_share``: partial credit for the format."""
    return [tag_share(text) for text in texts]


def strict_format(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """1 where the format is kept to the letter (``well_formed``), else 0."""
    return [float(well_formed(text)) for text in texts]


def gives_number(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """1 where the final answer is a number, right or wrong, else 0."""
    return [float(number(final_answer(text) or "") is not None) for text in texts]


def gives_box(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """1 where the last answer block has a box, else 0."""
    return [float(boxed(answer_block(text) or "") is not None) for text in texts]


def number_correct(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """1 where the final answer is the number ``facts["answer"]``, else 0."""
    pairs = zip(texts, facts, strict=True)
    return [float(_same_number(final_answer(text), fact["answer"])) for text, fact in pairs]


def math_correct(texts: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """1 where the final answer is ``equivalent`` to ``facts["answer"]``, else 0."""
    pairs = zip(texts, facts, strict=True)
    return [float(equivalent(final_answer(text) or "", fact["answer"])) for text, fact in pairs]


def _same_number(answer: str | None, reference: str) -> bool:
    value = number(answer or "")
    return value is not None and value == number(reference)


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at ``start`` and the one that closes it; None if none does."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # an escaped brace is a character
        if depth == 0 and match[0] == "}":
            return text[start + 1 : match.start()]
    return None


def _plain(answer: str) -> str:
    r"""An answer without what cannot be seen: ``\left( \dfrac{1}{2} \right)`` is ``(\frac{1}{2})``.

    Words lose their ``\text``; two numbers with a space between them stay two.
    """
    shown = _INVISIBLE.sub("", _TEXT.sub(r"\1", answer))
    shown = re.sub(r"\\[dt]frac", r"\\frac", shown)
    return _SPACE.sub("", shown.strip()).removesuffix(".")


def _affordable(answer: str) -> bool:
    """Whether computing with an answer ends soon: it is short, and so are its numbers."""
    if len(answer) > LONGEST_ANSWER or _braced("{" + answer + "}", 0) != answer:
        return False
    if _COUNTING.search(answer) and max(_numerals(answer), default=0) > LARGEST_POWER:
        return False
    return _tower(answer) <= LARGEST_POWER and not _BRACKET_FACTORIAL.search(answer)


def _tower(answer: str) -> float:
    """How large powers get: the largest exponent on a symbol times all on brackets.

    Infinite where an exponent has an exponent or a factorial.
    """
    largest, brackets = 1, 1
    for match in _POWER.finditer(answer):
        exponent = _exponent(answer, match.end())
        after = answer[match.end() + len(exponent) :].lstrip()
        if re.search(r"\^|\*\*|!", exponent) or after.startswith(("^", "**")):
            return math.inf
        size = math.prod(max(1, numeral) for numeral in _numerals(exponent))
        if match["base"] in (")", "]", "}"):
            brackets *= size
        else:
            largest = max(largest, size)
    return float(largest * brackets)


def _numerals(answer: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", answer)]


def _exponent(answer: str, start: int) -> str:
    """The numeral or the bracketed group at ``start``; all that is left from a command on."""
    plain = _PLAIN_EXPONENT.match(answer, start)
    if plain is not None:
        return plain[0]
    opened, depth = answer[start : start + 1], 0
    if opened not in ("{", "("):
        return answer[start:] if opened == "\\" else opened
    for place in range(start, len(answer)):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(answer[place], 0)
        if depth == 0:
            return answer[start : place + 1]
    return answer[start:]


@functools.lru_cache(maxsize=8192)
def _parsed(answer: str) -> Any:
    """What math-verify makes of an answer: a list of expressions, empty if it cannot read it."""
    library = load_math_verify()
    formula = "\\boxed{" + re.sub(r"\\?\$", " ", answer) + "}"
    config = library.LatexExtractionConfig(boxed_match_priority=0)
    return library.parse(formula, [config], parsing_timeout=TIMEOUT_S)
