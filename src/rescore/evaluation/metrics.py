"""What a policy earns on a split: per-sample terms, means and standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.sampling.policy import Policy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import Split, Task


class Mean(TypedDict):
    """A mean over independent samples and its standard error."""

    mean: float
    se: float


def evaluate(
    policy: Policy,
    task: Task,
    split: Split,
    index: Int[Tensor, " n"],
    *,
    seed: int,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> dict[str, Float[Tensor, " n"]]:
    """Every reward term and the total ``reward`` of one sample per prompt.

    The noise of a prompt depends on its number and the seed only, so two policies evaluated on the
    same prompts are compared on the same noise.
    """
    if not len(index):  # more processes than prompts
        return {name: torch.zeros(0, device=device) for name in ("reward", *task.reward.functions)}
    parts: dict[str, list[Tensor]] = {}
    for rows in index.split(batch_size):
        prompts = task.prompts(split, rows).to(device)
        rng = SampleRng(seed, rows.to(device))
        outputs = policy.sample(prompts, Record(), rng).x_0
        terms = task.reward.terms(policy.finished(outputs), prompts)
        for name, value in {"reward": task.reward.total(terms), **terms}.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def summarise(values: Mapping[str, Float[Tensor, " n"]]) -> dict[str, Mean]:
    """Mean and standard error of the mean (sample standard deviation / sqrt n) of each term."""
    return {name: mean_and_error(value) for name, value in values.items()}


def mean_and_error(value: Float[Tensor, " n"]) -> Mean:
    """Mean and standard error; the error of a single value is 0."""
    value = value.double()
    spread = value.std().item() if len(value) > 1 else 0.0
    return Mean(mean=value.mean().item(), se=spread / len(value) ** 0.5)
