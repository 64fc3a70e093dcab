r"""SEPO: policy gradients, and pre-training, of models that give concrete scores.

A concrete score is $s_{l,v} = \pi(y) / \pi(x)$, y being x with token l replaced by v. As policies
sum to one, the scores of one state against *all* others hold its log-probability, and
$\nabla \log \pi(x) = -\sum_{y \ne x} \pi(y) \nabla \log s_y$ (SEPO, arXiv:2502.01384). A network
gives scores of the neighbours that differ in one token alone, so for more than one position
something stands for the missing ones: ``conditional_log_policy``, ``ball_log_policy`` and
``joint_surrogate`` are three answers. All are exact for one position; the first also where
positions are independent; otherwise they are biased.

Throughout, ``log_score`` is finite or -inf (an impossible neighbour), and 0 at ``x`` itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.objectives.policy_gradient import ratio_metrics
from rescore.types import Terms

Coefficient = Literal["plain", "ppo_min", "capped"]
"""How importance ratio and advantage make the factor of a gradient; see ``coefficient``."""


def score_entropy(
    log_score: Float[Tensor, "B L S"],
    ratio: Float[Tensor, "B L S"],
    backward_rates: Float[Tensor, "B L S"],
    positions: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, " B"]:
    r"""Denoising score entropy $\sum_{l,y} Q(x_t, y) [s_y - r_y \log s_y + r_y (\log r_y - 1)]$.

    With $r_y = p(y \mid x_0) / p(x_t \mid x_0)$ its mean over x_t is, up to a constant, that of the
    same expression with the true score in place of r, so the true score minimises it. Never
    negative; in nats per unit of total noise: times the rate at t, and averaged over t, it bounds
    the negative log-likelihood up to the divergence at full noise.

    Source: Lou et al. 2024 (SEDD), arXiv:2310.16834, the denoising score entropy.

    Args:
        log_score: log s. The only argument gradients flow through.
        ratio: r, at least 0.
        backward_rates: Q(x_t, y), the rate of jumps y -> x_t, at least 0; where 0 nothing counts.
        positions: True where a position counts; all do if None.
    """
    ratio, backward_rates = ratio.detach(), backward_rates.detach()
    log_score = _exact(log_score)
    counted = backward_rates > 0
    if positions is not None:
        counted = counted & positions[..., None]
    log_s = torch.where(counted, log_score, 0.0)
    r = torch.where(counted, ratio, 0.0).to(log_s)
    cross = r * torch.where(r > 0, log_s, 0.0)
    entropy = log_s.exp() - cross + torch.xlogy(r, r) - r
    return torch.where(counted, backward_rates.to(log_s) * entropy, 0.0).sum((-2, -1))


def conditional_log_policy(
    log_score: Float[Tensor, "B L S"],
    x: Int[Tensor, "B L"],
    positions: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L"]:
    r"""$\log \pi(x^l \mid x^{-l}) = -\log \sum_v s_{l,v}$, per position, nats.

    Its sum over positions is the log pseudo-likelihood, and its gradient is that of SEPO's sum over
    neighbours weighted by $\pi(y^l \mid x^{-l})$ in place of $\pi(y)$. Exact for one position and
    where positions are independent.

    Args:
        log_score: log s. The only argument gradients flow through; not read at x.
        x: the state.
        positions: True where a position counts; the others are 0.
    """
    return -torch.logsumexp(_counted(log_score, positions).scatter(-1, x[..., None], 0.0), -1)


def ball_log_policy(
    log_score: Float[Tensor, "B L S"],
    x: Int[Tensor, "B L"],
    positions: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, " B"]:
    r"""$-\log (1 + \sum_{l, v \ne x^l} s_{l,v})$: log of pi(x) over the mass of x and neighbours.

    Unlike the other two it is not invariant to a constant added to the reward: centre the reward.

    Args:
        log_score: log s. The only argument gradients flow through; not read at x.
        x: the state.
        positions: True where a position counts; neighbours at the others are left out.
    """
    others = _counted(log_score, positions).scatter(-1, x[..., None], -torch.inf).flatten(1)
    return -torch.logsumexp(torch.cat([others.new_zeros(len(others), 1), others], 1), 1)


def joint_surrogate(
    log_score: Float[Tensor, "B L S"],
    log_pi: Float[Tensor, " B"],
    positions: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, " B"]:
    r"""$-\sum_{l,v} \mathrm{sg}(\pi(x) s_{l,v}) \log s_{l,v}$: SEPO's own estimate of grad log pi.

    Its gradient is the theorem's sum over neighbours, $-\sum_y \pi(y) \nabla \log s_y$, with
    $\pi(y) = \pi(x) s_y$; its value means nothing. Exact where the neighbours are all states
    (one position); with more positions most of the sum is missing and it shrinks.

    Source: Zekri and Boullé 2025 (SEPO), arXiv:2502.01384, the policy-gradient theorem.

    Args:
        log_score: log s, which is 0 at x. The only argument gradients flow through.
        log_pi: log pi(x), or an estimate of it: one number per sample, so an error of it scales
            the gradient of the sample.
        positions: True where a position counts; neighbours at the others are left out.
    """
    log_s = _counted(log_score, positions)
    weight = (log_pi.to(log_s)[:, None, None] + log_s).exp().detach()
    return -(weight * torch.where(log_s == -torch.inf, 0.0, log_s)).sum((-2, -1))


def masked_log_prob(
    log_p: Float[Tensor, "N L S"],
    x_0: Int[Tensor, "N L"],
    hidden: Bool[Tensor, "N L"],
    weight: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    r"""$w \sum_{l \text{ hidden}} \log p_\theta(x_0^l \mid x_0^{\text{not hidden}})$, nats.

    Where n positions are editable and m of them hidden:

    - one draw of the evidence lower bound (ELBO): m uniform in 1..n, the set uniform among those of
      size m, weight n / m. The mean over draws is log pi(x_0) if the conditionals are those of one
      law, by the chain rule over a random order, and a lower bound of the log-likelihood of a
      masked model otherwise;
    - one draw of the log pseudo-likelihood: m = 1, weight n / k for each of k draws.

    Source: the any-order form of the bound of masked diffusion (LLaDA, arXiv:2502.09992; Ou et al.,
    arXiv:2406.03736).

    Args:
        log_p: log p(x_0^l | canvas with the hidden positions masked). The only argument gradients
            flow through; -inf allowed.
        x_0: tokens to score; ignored where not hidden.
        hidden: True where the network saw the mask.
        weight: w, above 0.
    """
    token = torch.where(hidden, x_0, 0)[..., None]
    log_prob = _exact(log_p).gather(-1, token).squeeze(-1)
    log_prob = torch.where(hidden, log_prob, 0.0).sum(-1)
    return weight.detach().to(log_prob) * log_prob


def coefficient(
    ratio: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    kind: Coefficient,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "*shape"]:
    r"""The factor of $-\nabla \log \pi$: made of the importance ratio r and the advantage A.

    - ``plain``: r A, the exact off-policy gradient;
    - ``ppo_min``: min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), SEPO's choice;
    - ``capped``: min(r, 1 + clip_high) A, the truncated weight of CISPO, arXiv:2506.13585.

    No gradient flows through it, so a clipped action still has one, of a bounded factor, unlike in
    PPO; and under ``ppo_min`` a large r counts in full where A < 0.
    """
    ratio, advantage = ratio.detach(), advantage.detach()
    if kind == "plain":
        return ratio * advantage
    if kind == "capped":
        return ratio.clamp(max=1 + clip_high) * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage)


def sepo_loss(
    log_policy: Float[Tensor, "N ..."],
    log_policy_old: Float[Tensor, "N ..."],
    advantage: Float[Tensor, " N"],
    kind: Coefficient,
    clip_low: float,
    clip_high: float,
    positions: Bool[Tensor, "N L"] | None = None,
) -> Terms:
    r"""$-\sum_l \mathrm{sg}(f(r_l, A)) \log \pi_l$ with $r_l = \pi_l / \pi_l^{old}$, per action.

    f is ``coefficient``. log pi has one number per action (``ball_log_policy``,
    ``masked_log_prob``) or one per position (``conditional_log_policy``), each with its own ratio.
    Where new and old are equal the ratio is exactly 1. Ratios stop at exp of
    ``LARGEST_LOG_RATIO``; what is impossible under the new policy (-inf) has ratio 0, no gradient.
    Metrics of positions are averaged over those that count; ``clip_fraction`` is the share of
    ratios beyond the bounds that ``kind`` has.

    Source: Zekri and Boullé 2025 (SEPO), arXiv:2502.01384, the objective with its weights
    $\pi_\theta(y) f(r)$, which are constants of the gradient; summed over y it is the gradient of
    log pi(x), negated (see the top of the file).

    Args:
        log_policy: log pi_theta, nats. The only argument gradients flow through.
        log_policy_old: the same under the policy that sampled, by the same function on the same
            hidden positions.
        advantage: A of the whole sample, reward units.
        kind: see ``coefficient``.
        clip_low: not read by ``plain`` and ``capped``.
        clip_high: not read by ``plain``.
        positions: True where a position counts; all do if None.

    Raises:
        ValueError: log_policy, log_policy_old and positions differ in shape.
    """
    counted = torch.ones_like(log_policy, dtype=torch.bool) if positions is None else positions
    if not log_policy.shape == log_policy_old.shape == counted.shape:
        raise ValueError(
            f"got log_policy of shape {tuple(log_policy.shape)}, log_policy_old "
            f"{tuple(log_policy_old.shape)} and positions {tuple(counted.shape)}, expected one "
            "shape: score new and old with the same function; positions need one number each"
        )
    new, old = log_policy, log_policy_old
    if log_policy.ndim == 1:
        new, old, counted = new[:, None], old[:, None], counted[:, None]
    new, old = (torch.where(counted, log_prob, 0.0) for log_prob in (new, old))

    flat = ratio_metrics(new.flatten(), old.flatten())
    metrics = {name: value.view_as(new) for name, value in flat.items()}
    ratio = metrics["ratio"]
    spread = advantage[:, None].to(ratio).expand_as(ratio)
    factor = coefficient(ratio, spread, kind, clip_low, clip_high)
    loss = -(factor * torch.where(new == -torch.inf, 0.0, new)).sum(-1)

    low = 1 - clip_low if kind == "ppo_min" else -torch.inf
    high = torch.inf if kind == "plain" else 1 + clip_high
    metrics["clip_fraction"] = ((ratio < low) | (ratio > high)).to(ratio.dtype)
    n_counted = counted.sum(-1).clamp(min=1)
    return Terms(
        loss=loss,
        metrics={
            name: torch.where(counted, value, 0.0).sum(-1) / n_counted
            for name, value in metrics.items()
        },
    )


def snis_log_prob(
    log_weight: Float[Tensor, "N M"], log_kernel: Float[Tensor, "N M"]
) -> Float[Tensor, " N"]:
    r"""Self-normalised importance sampling: $\log (\sum_i w_i K(y \mid z_i) / \sum_i w_i)$.

    With $z_i$ from a proposal, $w_i \propto \pi(z_i) / \text{proposal}(z_i)$, it tends to
    $\sum_z \pi(z) K(y \mid z)$, with a bias of order 1/M: log pi(y) if K leaves pi unchanged and
    the proposal reaches every state. From neighbours alone, all a network has scores for, it tends
    to something else. No gradient flows through it.

    Source: the estimate of pi(y) in SEPO's released code, arXiv:2502.01384.

    Args:
        log_weight: log w, up to a constant per row; -inf allowed.
        log_kernel: log K(y | z_i); -inf allowed.

    Raises:
        ValueError: all weights of a row are 0.
    """
    log_weight, log_kernel = _exact(log_weight.detach()), _exact(log_kernel.detach())
    log_total = torch.logsumexp(log_weight, -1)
    if bool((log_total == -torch.inf).any()):
        raise ValueError("all weights of a row are 0: the proposal drew only impossible states")
    return torch.logsumexp(log_weight + log_kernel, -1) - log_total


def _exact(x: Tensor) -> Tensor:
    """float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def _counted(
    log_score: Float[Tensor, "B L S"], positions: Bool[Tensor, "B L"] | None
) -> Float[Tensor, "B L S"]:
    """The scores in float32 or better, those at positions that do not count impossible."""
    log_score = _exact(log_score)
    if positions is None:
        return log_score
    return torch.where(positions[..., None], log_score, -torch.inf)
