r"""Rewards from preferences: a Bradley-Terry model of which of two replies a person would choose.

A reward model gives a prompt with a reply a number r; the chosen reply y wins over y' with

$$P(y \succ y') = \sigma(r(x, y) - r(x, y')).$$

Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs"; as the reward of a
language model, Ouyang et al. 2022, arXiv:2203.02155.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.rewards.text import Facts

Encode = Callable[[Sequence[str], Sequence[str]], tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]]
"""Prompts and replies to tokens, and where they are not padding."""

PADDING = -1
"""What stands in a pair of unequal sequences after the end of the shorter one."""
PROMPT = "prompt"
"""Name of the prompt in the facts of a problem."""


# Pairs


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two replies to a prompt, and which was chosen."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | Path) -> list[PreferencePair]:
    """Pairs from a JSONL file: an object per line with the texts prompt, chosen and rejected.

    Other fields and blank lines are skipped.

    Raises:
        ValueError: the file is missing, empty or not UTF-8, or a line is no pair; the message
            names file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"'{path}' does not exist; expected a JSONL file of preference pairs")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    numbered = enumerate(lines, start=1)
    pairs = [_pair(line, f"{path}:{number}") for number, line in numbered if line.strip()]
    if not pairs:
        raise ValueError(f"{path} has no preference pairs; expected at least one line")
    return pairs


def _pair(line: str, where: str) -> PreferencePair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}; expected an object")
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(record.get(name), str):
            raise ValueError(
                f"{where}: '{name}' is {record.get(name)!r}; expected a text (there are the "
                f"fields {sorted(record)})"
            )
    if record["chosen"] == record["rejected"]:
        raise ValueError(
            f"{where}: chosen and rejected are both {record['chosen'][:60]!r}; equal replies say "
            f"nothing, remove the line"
        )
    return PreferencePair(
        prompt=record["prompt"], chosen=record["chosen"], rejected=record["rejected"]
    )


def write_pairs(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Write pairs as JSONL, which ``read_pairs`` reads back."""
    lines = [
        json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) for p in pairs
    ]
    Path(path).expanduser().write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# The model


def bradley_terry_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    r"""Negative log-likelihood of each choice, $-\log \sigma(r_{chosen} - r_{rejected})$, nats.

    Args:
        chosen: scores of the chosen replies.
        rejected: scores of the rejected ones.
    """
    exact = torch.promote_types(chosen.dtype, torch.float32)
    return -F.logsigmoid(chosen.to(exact) - rejected.to(exact))


def pair_accuracy(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> float:
    """Fraction of pairs whose chosen reply has the higher score; a tie counts one half."""
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return right.mean().item()


@torch.no_grad()
def scores(
    module: nn.Module,
    encode: Encode,
    prompts: Sequence[str],
    replies: Sequence[str],
    *,
    batch: int = 256,
) -> Float[Tensor, " B"]:
    """The score of every reply to its prompt, on the CPU, in float32 or better.

    Args:
        module: maps tokens (B, L) and ``attend`` (B, L) to scores (B,); should be in evaluation
            mode.
        encode: makes its input.
        prompts: what was asked.
        replies: as many replies.
        batch: sequences per forward pass.
    """
    device = next(module.parameters()).device
    parts = [torch.zeros(0)]
    for at in range(0, len(replies), batch):
        tokens, attend = encode(prompts[at : at + batch], replies[at : at + batch])
        score = module(tokens.to(device), attend.to(device)).cpu()
        parts.append(score.to(torch.promote_types(score.dtype, torch.float32)))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class PreferenceReward:
    r"""A reward model as a reward function of text: $(r(x, y) - \mu) / \sigma$.

    A Bradley-Terry model is determined up to a constant, and its scale depends on how sharp the
    choices were; mean and standard deviation over known replies make both known.
    """

    module: nn.Module
    """Maps tokens (B, L) and ``attend`` (B, L) to scores (B,)."""
    encode: Encode
    """Makes its input."""
    mean: float = 0.0
    """mu: what counts as 0."""
    std: float = 1.0
    """sigma: what counts as 1."""

    def __post_init__(self) -> None:
        if not 0 < self.std < float("inf"):
            raise ValueError(f"std is {self.std}; expected a positive number")

    def __call__(self, texts: Sequence[str], facts: Sequence[Facts], /) -> Any:
        """One number per completion; ``facts["prompt"]`` is what each replies to."""
        prompts = [fact[PROMPT] for fact in facts]
        return (scores(self.module, self.encode, prompts, texts) - self.mean) / self.std

    def margins(self, pairs: Sequence[PreferencePair]) -> Float[Tensor, " n"]:
        """Score of the chosen reply minus that of the rejected one, before standardisation."""
        prompts = [pair.prompt for pair in pairs]
        chosen = scores(self.module, self.encode, prompts, [pair.chosen for pair in pairs])
        rejected = scores(self.module, self.encode, prompts, [pair.rejected for pair in pairs])
        return chosen - rejected

    def accuracy(self, pairs: Sequence[PreferencePair]) -> float:
        """Fraction of pairs that the model orders as they were chosen; a tie counts one half."""
        margin = self.margins(pairs)
        return pair_accuracy(margin, torch.zeros_like(margin))

    def loss(self, pairs: Sequence[PreferencePair]) -> float:
        """Mean of ``bradley_terry_loss`` over pairs, nats."""
        margin = self.margins(pairs)
        return bradley_terry_loss(margin, torch.zeros_like(margin)).double().mean().item()


class Difference(nn.Module):
    """Maps pairs of sequences to the difference of their scores, the log-odds of the choice.

    A logistic fit of it with every target 1 minimises ``bradley_terry_loss``.

    Args:
        module: maps tokens (B, L) and ``attend`` (B, L) to scores (B,).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pairs: Int[Tensor, "B 2 L"]) -> Float[Tensor, " B"]:
        """Chosen minus rejected, from the two rows of each pair; ``PADDING`` is padding."""
        attend = pairs != PADDING
        rows = pairs.masked_fill(~attend, 0).transpose(0, 1).flatten(0, 1)
        chosen, rejected = self.module(rows, attend.transpose(0, 1).flatten(0, 1)).chunk(2)
        return chosen - rejected
