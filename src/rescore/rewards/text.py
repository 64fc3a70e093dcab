"""Rewards on text: what a completion says, judged by functions of strings.

A text reward function takes the completions and the facts of their problems and returns one number
each, higher is better:

    def concise(texts, facts):
        return [1.0 if len(text) < 100 else 0.0 for text in texts]

The facts of a problem (its answer, its numbers, its unit tests) are JSON and travel with the
prompts as bytes, so that a batch can be split, moved and gathered like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from rescore.rewards.reward import RewardFunction
from rescore.types import Prompts

Facts = Mapping[str, Any]
"""What a reward needs to know about a problem, as JSON."""
FACTS = "facts"
"""Name of the packed facts in ``Prompts.info``."""


@runtime_checkable
class TextFunction(Protocol):
    """What a user writes: one number per completion, higher is better."""

    def __call__(self, texts: Sequence[str], facts: Sequence[Facts], /) -> Any:
        """Anything ``torch.as_tensor`` turns into one finite number per text."""
        ...


def on_text(
    functions: Mapping[str, TextFunction], decode: Callable[[Int[Tensor, "B L"]], list[str]]
) -> dict[str, RewardFunction]:
    """The same terms as functions of tokens, for a ``Reward``.

    A batch is decoded once, whatever the number of terms.

    Args:
        functions: term name to function of text.
        decode: the text of each completion, given the canvases.
    """
    last: list[Any] = [None, None, [], []]  # outputs, prompts, texts, facts

    def bind(function: TextFunction) -> RewardFunction:
        def term(outputs: Int[Tensor, "B L"], prompts: Prompts, /) -> Any:
            if last[0] is not outputs or last[1] is not prompts:
                last[:] = [outputs, prompts, decode(outputs), unpack(prompts.info[FACTS])]
            return function(last[2], last[3])

        return term

    return {name: bind(function) for name, function in functions.items()}


def pack(facts: Sequence[Facts]) -> UInt8[Tensor, "B W"]:
    """JSON as UTF-8 bytes, padded with zeros to the longest of the batch."""
    texts = [json.dumps(item, sort_keys=True).encode() for item in facts]
    width = max(map(len, texts), default=0)
    if width == 0:
        return torch.zeros(len(texts), 0, dtype=torch.uint8)
    flat = bytearray(b"".join(text.ljust(width, b"\0") for text in texts))
    return torch.frombuffer(flat, dtype=torch.uint8).view(len(texts), width)


def unpack(table: UInt8[Tensor, "B W"]) -> list[dict[str, Any]]:
    """Undo ``pack``."""
    return [json.loads(bytes(row).rstrip(b"\0")) for row in table.cpu().numpy()]
