"""A task: prompts, a reward, three splits that share no content, and clean data for a base."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rescore.rewards.reward import Reward
from rescore.types import Examples, Prompts

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A canvas as a table of cells, with thicker lines around boxes."""

    rows: int
    columns: int
    box_rows: int
    box_columns: int


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Data and judgement, without a model. Subclass, add fields, implement the members below."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens V that a model of this task predicts."""

    @property
    def mask_id(self) -> int:
        """The mask token; V unless a tokenizer says otherwise."""
        return self.vocab_size

    @abc.abstractmethod
    def symbol(self, token: int) -> str:
        """One ordinary token as text."""

    @property
    def layout(self) -> Layout:
        """How to draw a canvas; one row unless a task says otherwise."""
        return Layout(rows=1, columns=self.length, box_rows=1, box_columns=self.length)

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """L: positions of the canvas."""

    @property
    @abc.abstractmethod
    def reward(self) -> Reward:
        """What an output is worth; every term of it is reported by name."""

    @abc.abstractmethod
    def size(self, split: Split) -> int:
        """Number of prompts in a split."""

    @abc.abstractmethod
    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Prompts:
        """The prompts with these numbers, each its own group; ``sample_id`` is the row number.

        A pure function of its arguments.
        """

    @abc.abstractmethod
    def clean(self, split: Split) -> Examples:
        """Finished sequences of a split, to train or validate a base model on.

        Raises:
            ValueError: this task has none.
        """

    def gold(self, prompts: Prompts) -> Int[Tensor, "B L"] | None:
        """A perfect output for each prompt; None where there is no such thing."""
        return None

    @abc.abstractmethod
    def read(self, texts: Sequence[str]) -> Prompts:
        """Prompts from texts that a person typed, each checked.

        Raises:
            ValueError: a text is no valid prompt; says which and why.
        """

    @abc.abstractmethod
    def show(self, tokens: Int[Tensor, " L"]) -> str:
        """One canvas as text a person can read; masks are dots."""

    def check(self) -> None:
        """Refuse what cannot work on this machine, before anything is loaded or written.

        Raises:
            ValueError: says what is missing and what to do.
        """
        return

    def validate(self, n: int = 16) -> None:
        """Score the gold outputs of each split and demand the full reward of every term.

        Raises:
            ValueError: a gold output earns less than 1 in some term.
        """
        for split in ("train", "validation", "test"):
            prompts = self.prompts(split, torch.arange(min(n, self.size(split))))
            gold = self.gold(prompts)
            if gold is None:
                return
            for name, value in self.reward.terms(gold, prompts).items():
                if bool((value != 1).any()):
                    raise ValueError(
                        f"gold outputs of split '{split}' earn {value.min().item()} in '{name}'; "
                        f"expected 1"
                    )
