"""Credit: returns of steps, baselines inside a group, and steps that cover the entropy."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Baseline = Literal["none", "group_mean", "leave_one_out"]
"""What is subtracted from a reward; see ``centre``."""


def centre(
    returns: Float[Tensor, "B K"],
    group: Int[Tensor, " B"],
    baseline: Baseline,
    known: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B K"]:
    """Returns minus a baseline made of the returns of the same group in the same column.

    ``group_mean`` includes the sample itself, which scales the expected gradient by 1 - 1/G
    (GRPO, arXiv:2402.03300, without the division by the standard deviation). ``leave_one_out``
    averages the others, which is unbiased (RLOO, arXiv:2402.14740). Where all returns of a group
    are equal the result is exactly 0.

    Args:
        returns: one number per sample and step.
        group: group of each sample, numbers in [0, B).
        baseline: what to subtract.
        known: False where there is no return; such entries take no part and become 0.
    """
    known = torch.ones_like(returns, dtype=torch.bool) if known is None else known
    if baseline == "none":
        return torch.where(known, returns, 0.0)
    value = torch.where(known, returns, 0.0).double()
    total = torch.zeros_like(value).index_add(0, group, value)[group]
    count = torch.zeros_like(value).index_add(0, group, known.double())[group]
    centred = returns - total / count
    if baseline == "leave_one_out":
        centred = centred * (count / (count - 1))
    vary = known & ~zero_variance(returns, group, known)
    return torch.where(vary, centred, 0.0).to(returns.dtype)


def zero_variance(
    returns: Float[Tensor, "B K"],
    group: Int[Tensor, " B"],
    known: Bool[Tensor, "B K"] | None = None,
) -> Bool[Tensor, "B K"]:
    """True where the (known) returns of the whole group are equal in this column."""
    known = torch.ones_like(returns, dtype=torch.bool) if known is None else known
    where = group[:, None].expand_as(returns)
    low = torch.full_like(returns, torch.inf)
    low = low.scatter_reduce(0, where, torch.where(known, returns, torch.inf), "amin")
    high = torch.full_like(returns, -torch.inf)
    high = high.scatter_reduce(0, where, torch.where(known, returns, -torch.inf), "amax")
    return (low >= high)[group]


def normalise_std(
    advantage: Float[Tensor, "B K"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B K"]:
    """Divided by the standard deviation inside the group (n - 1 in it) plus 1e-8, by column.

    GRPO's normalisation (arXiv:2402.03300), for advantages that are centred already. The divisor
    depends on the rewards, so the expected gradient is no longer a multiple of that of E[r]; after
    it, ``group_mean`` and ``leave_one_out`` are the same up to the 1e-8. Where all entries of a
    group are equal the result is exactly 0.

    Args:
        advantage: ``centre``'s result, all of whose entries count.
        group: group of each sample, numbers in [0, B).
    """
    same = zero_variance(advantage, group)
    normalised = advantage.double() / (_std(advantage, group) + 1e-8)
    return torch.where(same, 0.0, normalised).to(advantage.dtype)


def standardise(
    returns: Float[Tensor, "B K"], group: Int[Tensor, " B"], spread: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "B K"]:
    """(return - mean of the group) / (standard deviation + 1e-8), by column; n - 1 in the latter.

    Source: GRPO, arXiv:2402.03300; DDPO's per-prompt statistics, arXiv:2305.13301. Biased, as
    ``normalise_std``. Where all returns of a group are equal the result is exactly 0.

    Args:
        returns: one number per sample and step.
        group: whose mean is subtracted, numbers in [0, B).
        spread: whose standard deviation divides: groups as large or larger; None = ``group``.
    """
    std = _std(returns, group if spread is None else spread)
    return (centre(returns, group, "group_mean").double() / (std + 1e-8)).to(returns.dtype)


def _std(value: Float[Tensor, "B K"], group: Int[Tensor, " B"]) -> Float[Tensor, "B K"]:
    """Standard deviation inside the group of each entry, by column, float64; of one entry 0."""
    value = value.double()
    count = torch.zeros_like(value).index_add(0, group, torch.ones_like(value))[group]
    mean = torch.zeros_like(value).index_add(0, group, value)[group] / count
    square = torch.zeros_like(value).index_add(0, group, (value - mean).square())[group]
    return (square / (count - 1).clamp(min=1)).sqrt()


def stepwise_advantage(
    reward: Float[Tensor, " B"],
    completion_reward: Float[Tensor, "B K"],
    lam: Float[Tensor, "B K"],
    group: Int[Tensor, " B"],
    known: Bool[Tensor, "B K"],
    *,
    baseline: Baseline,
    normalise: bool,
    centre_completions: bool,
) -> Float[Tensor, "B K"]:
    r"""EGSPO-SA's advantage: $r + \lambda (r - \hat r)$, over $1 + \lambda$ if asked, centred.

    Source: arXiv:2603.12554, the stepwise advantage. r is the reward of the finished sample,
    r_hat that of the one-step completion of the state before the step. r_hat depends on that state
    alone, so it is a legal baseline: the expected gradient is that of lambda = 0, times 1 + lambda
    where it is not normalised.

    Args:
        reward: r.
        completion_reward: r_hat.
        lam: lambda >= 0; infinity leaves r - r_hat (only if normalised and constant).
        group: group of each sample, numbers in [0, B).
        known: False where there is no completion.
        baseline: what is subtracted inside a group, column by column.
        normalise: divide by 1 + lambda.
        centre_completions: False centres r alone.
    """
    share = torch.where(lam.isinf(), 1.0, lam / (1 + lam))
    scale = torch.ones_like(lam) if normalise else 1 + lam
    spread = reward[:, None].expand_as(lam)
    if centre_completions:
        own = centre(scale * spread, group, baseline)
        return own - centre(scale * share * completion_reward, group, baseline, known)
    own = (1 - share) * centre(spread, group, baseline)
    return scale * (own + share * (spread - completion_reward))


def covering_steps(entropy: Float[Tensor, "B T"], mass: float) -> Bool[Tensor, "B T"]:
    """The fewest steps of largest entropy that hold at least this share of a path's entropy.

    Source: the adaptive branch of EGSPO's released code (arXiv:2603.12554), where alpha = 0.7. The
    earlier step comes first on a tie; a path without entropy has none.
    """
    value, order = entropy.double().sort(dim=1, descending=True, stable=True)
    before = value.cumsum(1) - value
    needed = (before < mass * value.sum(1, keepdim=True)) & (value > 0)
    return torch.zeros_like(needed).scatter(1, order, needed)
