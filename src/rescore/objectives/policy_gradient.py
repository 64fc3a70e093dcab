"""Policy-gradient objectives: functions of log-probabilities and advantages, to be minimised."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.types import Terms

LARGEST_LOG_RATIO = 80.0
"""Logged ratios stop at exp of this, short of float32's largest number."""


def score_function(
    log_prob: Float[Tensor, " N"],
    log_prob_old: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
) -> Terms:
    r"""REINFORCE: $-A \log \pi_\theta(a \mid s)$, per step.

    Source: Williams 1992, Machine Learning 8, section 4; valid only for actions drawn from the
    current policy. ``log_prob_old`` feeds the metrics, not the loss.

    Args:
        log_prob: log pi_theta(a | s), nats. The only argument gradients flow through.
        log_prob_old: log pi_old(a | s), nats, as recorded.
        advantage: reward units.
    """
    possible = log_prob != -torch.inf
    loss = -advantage.detach() * torch.where(possible, log_prob, 0.0)
    return Terms(loss=loss, metrics=ratio_metrics(log_prob, log_prob_old))


def clipped_surrogate(
    log_prob: Float[Tensor, " N"],
    log_prob_old: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    *,
    clip_low: float,
    clip_high: float,
) -> Terms:
    r"""PPO's clipped surrogate $-\min(\rho A, \mathrm{clip}(\rho) A)$, per step.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. (7), negated so that it is minimised;
    separate bounds as in DAPO, arXiv:2503.14476. An action that is impossible under the new policy
    (log-probability -inf) has ratio 0 and no gradient.

    Args:
        log_prob: log pi_theta(a | s), nats. The only argument gradients flow through.
        log_prob_old: log pi_old(a | s), nats.
        advantage: A(s, a), reward units.
        clip_low: the ratio gains nothing below ``1 - clip_low``.
        clip_high: the ratio gains nothing above ``1 + clip_high``.
    """
    log_ratio = log_prob - log_prob_old.detach()
    # Where A >= 0 the gain is capped above 1 + clip_high: stop well before exp overflows, or the
    # gradient of the branch not taken would be 0 * inf.
    cap = torch.where(advantage >= 0, math.log(2 * (1 + clip_high)), torch.inf)
    ratio = torch.minimum(log_ratio, cap.to(log_ratio)).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage.detach(), clipped * advantage.detach())
    metrics = ratio_metrics(log_prob, log_prob_old)
    metrics["clip_fraction"] = (ratio != clipped).to(loss.dtype).detach()
    return Terms(loss=loss, metrics=metrics)


def ratio_metrics(
    log_prob: Float[Tensor, " N"], log_prob_old: Float[Tensor, " N"]
) -> dict[str, Float[Tensor, " N"]]:
    """The ratio pi_new / pi_old, the k3 estimate of KL(old || new), and impossible steps.

    k3 = ratio - 1 - log ratio (Schulman, joschu.net/blog/kl-approx.html); impossible steps are left
    out of it.
    """
    log_ratio = (log_prob - log_prob_old).detach()
    possible = log_ratio != -torch.inf
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    k3 = torch.where(possible, ratio - 1 - log_ratio, 0.0)
    return {"ratio": ratio, "kl_old_new": k3, "impossible": (~possible).to(k3.dtype)}
