"""Divergences between policies: sampled estimators and exact sums."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimators of KL(new || ref) from samples of new; see ``kl_estimate``."""


def kl_estimate(
    log_prob: Float[Tensor, " N"], log_prob_ref: Float[Tensor, " N"], estimator: KlEstimator
) -> Float[Tensor, " N"]:
    r"""One-sample estimates of KL(new || ref), with d = log pi_ref(a|s) - log pi_new(a|s).

    k1 = -d (unbiased value, gradient of mean 0), k2 = d^2 / 2 (biased value; its gradient is that
    of KL(new || ref)), k3 = exp(d) - 1 - d (unbiased value; its gradient is that of KL(ref ||
    new)). The gradients are those for actions drawn from the new policy and given states.

    Source: Schulman, joschu.net/blog/kl-approx.html; the gradients are checked by enumeration in
    ``tests/objectives``. Steps that are impossible under either policy contribute 0 (under the
    reference alone, where the true KL is infinite, too).

    Args:
        log_prob: log pi_new(a | s), nats. Gradients flow through it.
        log_prob_ref: log pi_ref(a | s), nats.
        estimator: which of the three.
    """
    possible = (log_prob != -torch.inf) & (log_prob_ref != -torch.inf)
    d = torch.where(possible, log_prob_ref.detach() - log_prob, 0.0)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.exp() - 1 - d


def categorical_kl(
    log_p: Float[Tensor, "N R V"], log_q: Float[Tensor, "N R V"], rows: Bool[Tensor, "N R"]
) -> Float[Tensor, " N"]:
    """Exact sum over the chosen rows of KL(p || q) = sum_v p_v (log p_v - log q_v), nats.

    Source: the exact form of EGSPO's KL (arXiv:2603.12554), summed over the vocabulary. It covers
    the tokens at the revealed positions, not the choice of positions.
    """
    counted = log_p.isfinite() & rows[..., None]
    gap = torch.where(counted, log_p - log_q.detach(), 0.0)
    return torch.where(rows, (log_p.exp() * gap).sum(-1), 0.0).sum(-1)


def law_kl(
    p: Float[Tensor, "N R V"], log_q: Float[Tensor, "N R V"], rows: Bool[Tensor, "N R"]
) -> Float[Tensor, " N"]:
    """``categorical_kl`` from probabilities p instead of their logarithms; log q is finite."""
    log_p = (p + (p == 0).to(p)).log()  # 0 where p is 0
    return torch.where(rows, (p * (log_p - log_q.detach())).sum(-1), 0.0).sum(-1)


LEAST_LOG_PROB = math.log(1e-6)
"""See ``finite``."""


def finite(log_q: Float[Tensor, "N R V"]) -> Float[Tensor, "N R V"]:
    """A reference's law with what it excludes at a probability of 1e-6; the rest as it is.

    A step of an imperfect score network may exclude, by a clipped probability, what another network
    does; the true KL would be infinite.
    """
    return torch.where(log_q == -torch.inf, LEAST_LOG_PROB, log_q)
