"""The handwritten digits that come with scikit-learn: 1797 images of 8 x 8, split by content."""

from __future__ import annotations

import functools
import hashlib
import importlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.language import require
from rescore.tasks.task import Split
from rescore.types import Stage, State

SIZE = 8
"""Rows and columns."""
N_CLASSES = 10
"""Digits."""
Half = Literal[0, 1]
"""Of the training split: what the classifier in the reward learns from, and the one that judges."""

SHARES: dict[Split, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Expected share of the images in each split."""


@dataclass(frozen=True, kw_only=True)
class Digitised(Stage):
    """Images and what they show."""

    images: Float[Tensor, "n 1 8 8"]
    """-1 is paper, 1 is ink; 17 levels."""
    labels: Int[Tensor, " n"]


def part(split: Split, half: Half | None = None) -> Digitised:
    """The images of a split, or of half of it, in a fixed order.

    The SHA-256 of an image decides where it goes, so equal images go together.

    Raises:
        ValueError: scikit-learn is not installed; says how to install it.
    """
    images, place, side = _all()
    lowest = 0.0
    for name, share in SHARES.items():
        if name == split:
            inside = (lowest <= place) & (place < lowest + share)
            return images.take(inside if half is None else inside & (side == half))
        lowest += share
    raise ValueError(f"split is '{split}'; choose one of {list(SHARES)}")


def intensity(outputs: State) -> State:
    """Samples as what can be shown: ink from 0 to 1, what lies beyond cut off."""
    return ((outputs + 1) / 2).clamp(0, 1)


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)  # classifiers learn from these tensors, whoever asked first
def _all() -> tuple[Digitised, Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Everything, the place of each image in [0, 1), and its half."""
    require("sklearn", "the digits task", "digits")
    found = importlib.import_module("sklearn.datasets").load_digits()
    levels = torch.from_numpy(found.images).to(torch.uint8)
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in levels]
    place = torch.tensor([int.from_bytes(digest[:4]) / 2**32 for digest in digests])
    side = torch.tensor([digest[4] % 2 for digest in digests])
    images = (levels.float() / 8 - 1)[:, None]
    labels = torch.from_numpy(found.target).long()
    return Digitised(images=images, labels=labels), place.double(), side
