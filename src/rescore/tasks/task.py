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
from rescore.types import Clean, Conditions, Examples, Given, Outputs, Points, Prompts, State

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
    """Data and judgement, without a model; subclass ``TokenTask`` or ``ContinuousTask``."""

    @property
    @abc.abstractmethod
    def reward(self) -> Reward:
        """What an output is worth; every term of it is reported by name."""

    @abc.abstractmethod
    def size(self, split: Split) -> int:
        """Number of prompts in a split."""

    @abc.abstractmethod
    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Given:
        """The prompts with these numbers, each its own group; ``sample_id`` is the row number.

        A pure function of its arguments.
        """

    @abc.abstractmethod
    def clean(self, split: Split) -> Clean:
        """Finished samples of a split, to train or validate a base model on.

        Raises:
            ValueError: this task has none.
        """

    @abc.abstractmethod
    def read(self, texts: Sequence[str]) -> Given:
        """Prompts from texts that a person typed, each checked.

        Raises:
            ValueError: a text is no valid prompt; says which and why.
        """

    @abc.abstractmethod
    def show(self, sample: Outputs, /) -> str:
        """One finished sample, without a batch axis, as text a person can read."""

    @abc.abstractmethod
    def show_prompt(self, prompts: Given, row: int) -> str:
        """One prompt as text a person can read."""

    def check(self) -> None:
        """Refuse what cannot work on this machine, before anything is loaded or written.

        Raises:
            ValueError: says what is missing and what to do.
        """
        return


@dataclass(frozen=True, kw_only=True)
class TokenTask(Task):
    """A task whose samples are sequences of tokens. Subclass, add fields, implement the members."""

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

    @abc.abstractmethod
    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Prompts: ...

    @abc.abstractmethod
    def clean(self, split: Split) -> Examples: ...

    @abc.abstractmethod
    def read(self, texts: Sequence[str]) -> Prompts: ...

    def gold(self, prompts: Prompts) -> Int[Tensor, "B L"] | None:
        """A perfect output for each prompt; None where there is no such thing."""
        return None

    @abc.abstractmethod
    def show(self, tokens: Int[Tensor, " L"], /) -> str:
        """One canvas as text a person can read; masks are dots."""

    def show_prompt(self, prompts: Given, row: int) -> str:
        assert isinstance(prompts, Prompts)
        return self.show(prompts.tokens[row])

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


@dataclass(frozen=True, kw_only=True)
class ContinuousTask(Task):
    """A task whose samples are points or images. Subclass, add fields, implement the members."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one sample, as the network makes it."""

    @property
    def n_labels(self) -> int:
        """Values of the input "label", for tasks that have one."""
        return 0

    @abc.abstractmethod
    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Conditions: ...

    @abc.abstractmethod
    def clean(self, split: Split) -> Points: ...

    @abc.abstractmethod
    def read(self, texts: Sequence[str]) -> Conditions: ...

    def pictures(self, outputs: State) -> State | None:
        """Samples as images [B 1 H W] or [B 3 H W] in [0, 1] for the report; None: not images."""
        return None


def check_numbers(index: Int[Tensor, " B"], split: Split, n: int, what: str = "prompt") -> None:
    """Numbers of prompts lie in ``[0, n)``.

    Args:
        index: the numbers.
        split: for the message.
        n: prompts of the split.
        what: they are called.

    Raises:
        ValueError: one does not.
    """
    outside = index[(index < 0) | (index >= n)].tolist()
    if outside:
        raise ValueError(
            f"{what} {outside[0]} of split '{split}' does not exist; expected 0 to {n - 1}"
        )
