"""Images from texts, judged by functions of the images and their texts."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from rescore.models.images import PROMPT
from rescore.rewards.images import Images, jpeg_size, warn_if_black
from rescore.rewards.reward import Reward, RewardFunction
from rescore.tasks.records import content, place
from rescore.tasks.task import ContinuousTask, Split, check_numbers
from rescore.types import Conditions, Given, Points, State

Judge = Callable[[Images, Sequence[str]], Any]
"""A reward: images [B 3 H W] in [0, 1] and the text of each, to one number per image."""

CUTS = (0.8, 0.9)
"""Places between 0 and 1 at which validation and test begin."""
FEW = 10
"""Fewer prompts than this are not split: all of them are in every split."""


@dataclass(frozen=True, kw_only=True)
class ImagePrompts(ContinuousTask):
    """Prompts in words for a text-to-image model; samples are its latents.

    A prompt is its number among the texts, both for the network and for rewards. The validation
    prompts are a panel: they are judged on the same noise every time.
    """

    source: str | tuple[str, ...]
    """A text file with a prompt in every line, or the prompts. The hash of its text decides on the
    split of each: 8, 1 and 1 in ten are expected, and every split gets one. Fewer than 10 are all
    in every split, so that nothing is held out. Case and spacing do not count."""
    latents: tuple[int, int, int] = (4, 64, 64)
    """Channels, rows and columns of the latents, which the size of the images follows from."""
    judges: Mapping[str, Judge] = dataclasses.field(default_factory=lambda: {"jpeg_kb": jpeg_size})
    """The terms of the reward by name; see ``rescore.rewards`` for ``images``, ``http`` and
    ``clip``, all of which fit."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of the terms, 1 where not named; a negative one turns a reward into a penalty."""

    def __post_init__(self) -> None:
        if min(self.latents) < 1:
            raise ValueError(f"latents={self.latents}; expected three positive sizes")
        if not self.judges:
            raise ValueError("judges is empty; name at least one reward")
        _ = self.reward  # refuses weights of terms that do not exist

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every prompt once, in the order of the source.

        Raises:
            ValueError: there is no such file, or nothing in it.
        """
        lines: Sequence[str] = (
            self.source if isinstance(self.source, tuple) else _lines(self.source)
        )
        texts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not texts:
            raise ValueError(f"there are no prompts in {self.source!r}; expected one in every line")
        return texts

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """Numbers of the prompts of each split, in the order of the source.

        A cut that would leave a split empty moves by one prompt.
        """
        places = [place(content({"text": text}, "text")) for text in self.texts]
        known = sorted(set(places))
        if len(known) < FEW:
            return {split: list(range(len(places))) for split in get_args(Split)}
        test = min(max(bisect_left(known, CUTS[1]), 2), len(known) - 1)
        validation = min(max(bisect_left(known, CUTS[0]), 1), test - 1)
        ends = (0.0, known[validation], known[test], 1.0)
        return {
            split: [number for number, here in enumerate(places) if low <= here < high]
            for split, low, high in zip(get_args(Split), ends[:-1], ends[1:], strict=True)
        }

    @cached_property
    def _typed(self) -> list[str]:
        """Prompts that a person typed, with the numbers after those of the source."""
        return []

    @cached_property
    def _warned(self) -> set[str]:
        """What was warned of already: once is enough in a run."""
        return set()

    def text(self, number: int) -> str:
        """The prompt with this number."""
        n = len(self.texts)
        return self.texts[number] if number < n else self._typed[number - n]

    def texts_of(self, prompts: Given) -> list[str]:
        """The text of each row."""
        return [self.text(number) for number in prompts.info[PROMPT].tolist()]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latents

    @property
    def n_labels(self) -> int:
        return len(self.texts)

    @property
    def reward(self) -> Reward:
        """The judges, told the texts; the first batch of black images is warned of."""
        functions: dict[str, RewardFunction] = {
            name: partial(self._judge, judge) for name, judge in self.judges.items()
        }
        return Reward(functions, self.weights)

    def _judge(self, judge: Judge, images: State, prompts: Given, /) -> Any:
        if "black" not in self._warned and warn_if_black(images):
            self._warned.add("black")
        return judge(images, self.texts_of(prompts))

    def check(self) -> None:
        """Read the prompts and split them.

        Raises:
            ValueError: there are none.
        """
        _ = self._numbers

    def size(self, split: Split) -> int:
        return len(self._numbers[split])

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Conditions:
        """The prompts with these numbers within the split.

        Raises:
            ValueError: a number is not in ``[0, size(split))``.
        """
        numbers = self._numbers[split]
        check_numbers(index, split, len(numbers))
        return _conditions(torch.tensor(numbers, dtype=torch.long)[index])

    def clean(self, split: Split) -> Points:
        raise ValueError(
            "prompts have no images to train a base on; start from a PretrainedPipeline"
        )

    def read(self, texts: Sequence[str]) -> Conditions:
        """Prompts from any texts."""
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(f"the prompts are {list(texts)}; expected at least one, none empty")
        numbers = []
        for text in (text.strip() for text in texts):
            known = [*self.texts, *self._typed]
            if text not in known:
                self._typed.append(text)
            numbers.append(known.index(text) if text in known else len(known))
        return _conditions(torch.tensor(numbers))

    def show(self, sample: State, /) -> str:
        """What there is to say of an image in a line."""
        height, width = sample.shape[1:]
        return f"an image of {height} x {width} pixels, brightness {sample.mean():.2f}"

    def show_prompt(self, prompts: Given, row: int) -> str:
        return self.text(int(prompts.info[PROMPT][row]))

    def pictures(self, outputs: State) -> State:
        return outputs


def _lines(file: str) -> list[str]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {file}; expected a text file, a prompt in every line")
    return path.read_text(encoding="utf-8").splitlines()


def _conditions(number: Int[Tensor, " B"]) -> Conditions:
    row = torch.arange(len(number))
    return Conditions(group=row, sample_id=row, info={PROMPT: number}, inputs={PROMPT: number})
