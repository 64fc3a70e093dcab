"""Credit: baselines inside a group, and which steps to train on."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Baseline = Literal["none", "group_mean", "leave_one_out"]
"""What is subtracted from a reward; see ``centre``."""


def centre(
    reward: Float[Tensor, " B"], group: Int[Tensor, " B"], baseline: Baseline
) -> Float[Tensor, " B"]:
    """Reward minus a baseline made of the rewards of the same group.

    ``group_mean`` includes the sample itself, which scales the expected gradient by 1 - 1/G
    (GRPO, arXiv:2402.03300, without the division by the standard deviation). ``leave_one_out``
    averages the others, which is unbiased (RLOO, arXiv:2402.14740). In a group of equal rewards the
    advantage is exactly 0.

    Args:
        reward: one number per sample.
        group: group of each sample, numbers in [0, B).
        baseline: what to subtract.
    """
    if baseline == "none":
        return reward
    total = torch.zeros_like(reward, dtype=torch.float64).index_add(0, group, reward.double())
    count = torch.zeros_like(total).index_add(0, group, torch.ones_like(total))
    centred = reward - (total / count)[group]
    if baseline == "leave_one_out":
        centred = centred * (count / (count - 1))[group]
    return torch.where(zero_variance(reward, group), 0.0, centred).to(reward.dtype)


def zero_variance(reward: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Tensor:
    """True for the samples of groups whose rewards are all equal. Bool[B]."""
    low = torch.full_like(reward, torch.inf).scatter_reduce(0, group, reward, "amin")
    high = torch.full_like(reward, -torch.inf).scatter_reduce(0, group, reward, "amax")
    return (low == high)[group]


def top_steps(entropy: Float[Tensor, "B T"], n: int) -> Int[Tensor, "B n"]:
    """The n steps of largest entropy of each sample, largest first, the earlier step on a tie.

    Source: EGSPO, arXiv:2603.12554: keep the K steps that bound the error of a truncated gradient
    best.
    """
    return entropy.argsort(dim=1, descending=True, stable=True)[:, :n]


def entropy_proportional(
    entropy: Float[Tensor, "B T"], delta: float, active: Tensor
) -> Float[Tensor, "B T"]:
    """q_t = (H_t + delta) / sum, over the steps that reveal something (``active``: Bool[B, T])."""
    weight = torch.where(active, entropy + delta, 0.0)
    return weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
