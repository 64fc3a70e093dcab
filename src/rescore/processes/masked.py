"""The absorbing (masked) process: noising, the reverse step, and its exact log-probability.

A reverse step looks at the canvas x_t, chooses n of the masked positions and writes one token at
each. Two laws take part: the sampling law p~ = softmax(logits / temperature) that tokens are drawn
from, and the confidence law p = softmax(logits) that some orders choose positions by. All
log-probabilities are in nats and in float32 or better.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Order = Literal[
    "random",
    "left_to_right",
    "max_prob",
    "low_confidence",
    "soft_low_confidence",
    "plackett_luce",
]
"""How a step chooses positions; part of the policy.

random: uniformly, without replacement. left_to_right: the leftmost. max_prob: where max_v p(v) is
largest. low_confidence: sample a token everywhere, keep the n with the largest p(token) (LLaDA's
"low-confidence remasking"). soft_low_confidence: sample a token everywhere, draw for each a time
from the exponential law of rate p(token)^(1 / position_temperature), keep the n earliest; colder is
closer to low_confidence. plackett_luce: without replacement in proportion to
exp(max_v log p(v) / position_temperature); the weights depend on the state only.
"""

FAR_BELOW = -1e30
"""A log-weight that vanishes in a sum but, unlike -inf, has gradients that are 0 and not NaN."""


def mask_tokens(
    x_0: Int[Tensor, "B L"],
    editable: Bool[Tensor, "B L"],
    alpha_t: Float[Tensor, " B"],
    u: Float[Tensor, "B L"],
    mask_id: int,
) -> Int[Tensor, "B L"]:
    """Draw x_t from q(x_t | x_0): every editable token survives with probability ``alpha_t``.

    Source: MDLM, arXiv:2406.07524, section 3.1.

    Args:
        x_0: clean tokens.
        editable: positions the process may touch.
        alpha_t: survival probability of each sample.
        u: independent uniforms in [0, 1); a token is masked where ``u >= alpha_t``.
        mask_id: the mask token.
    """
    return torch.where(editable & (u >= alpha_t[:, None]), mask_id, x_0)


def blocks_of(editable: Bool[Tensor, "B L"], n_blocks: int) -> Int[Tensor, "B L"]:
    """Number of the block each position belongs to, -1 where it is not editable.

    The editable positions of a sample are cut, left to right, into ``n_blocks`` runs whose lengths
    differ by at most one: for a contiguous completion these are the blocks of semi-autoregressive
    decoding.
    """
    place = editable.cumsum(1) - 1
    count = editable.sum(1, keepdim=True).clamp(min=1)
    block = torch.div(place * n_blocks, count, rounding_mode="floor")
    return torch.where(editable, block, -1)


def reveal_quota(
    block: Int[Tensor, "B L"], n_blocks: int, n_steps: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """How many tokens each step reveals, and how many are candidates at its start.

    A block of m tokens gets ``n_steps / n_blocks`` steps of ``m // steps`` tokens; the first
    ``m % steps`` of them reveal one more.
    """
    per_block = n_steps // n_blocks
    numbers = torch.arange(n_blocks, device=block.device)
    size = (block[:, None, :] == numbers[None, :, None]).sum(-1)  # [B, n_blocks]
    i = torch.arange(per_block, device=block.device)
    base, extra = size // per_block, size % per_block
    quota = base[..., None] + (i < extra[..., None])  # [B, n_blocks, per_block]
    candidates = size[..., None] - (quota.cumsum(-1) - quota)
    return quota.flatten(1).long(), candidates.flatten(1).long()


def token_log_probs(
    logits: Float[Tensor, "*B V"], temperature: float = 1.0
) -> Float[Tensor, "*B V"]:
    """log softmax(logits / temperature) in float32 or better; at 0 all mass is at the argmax."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        top = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, top, 0.0)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def confidence_log_probs(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
    """log softmax(logits) that stays ordered where the largest probability rounds to 1.

    The largest entry is computed as -log1p(sum of the other odds), so two confidences of 1 - 1e-9
    and 1 - 1e-10 differ in float32; a plain softmax ties them, and position choices then hang on
    rounding.
    """
    log_p = token_log_probs(logits)
    top, index = log_p.max(-1, keepdim=True)
    odds = (log_p - top).exp().scatter(-1, index, 0.0)
    return log_p.scatter(-1, index, -torch.log1p(odds.sum(-1, keepdim=True)))


def entropy(log_p: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """Shannon entropy of categoricals in nats; tokens of probability 0 contribute 0."""
    return -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)


def tokens_log_prob(
    log_p: Float[Tensor, "N R V"], token: Int[Tensor, "N R"], revealed: Bool[Tensor, "N R"]
) -> Float[Tensor, " N"]:
    """The paper's score of a step: the sum of log p~(token) over the revealed rows.

    Source: EGSPO, arXiv:2603.12554: the policy as a product over the newly revealed positions. It
    leaves out the probability of choosing those positions: for left-to-right and max_prob that is 1
    given the state (their exact gradient is the almost-everywhere one: J jumps where two
    confidences cross); for the other orders see the functions below.
    """
    log_prob = log_p.gather(-1, token[..., None]).squeeze(-1)
    return torch.where(revealed, log_prob, 0.0).sum(-1)


def random_order_log_prob(
    n_candidates: Int[Tensor, " N"], n_revealed: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """log of (m - n)! / m!, an ordered draw of n out of m without preference; float64, constant."""
    m, n = n_candidates.double(), n_revealed.double()
    return torch.lgamma(m - n + 1) - torch.lgamma(m + 1)


def plackett_luce_log_prob(
    log_weight: Float[Tensor, "N R"], place: Int[Tensor, "N R"], candidate: Bool[Tensor, "N R"]
) -> Float[Tensor, " N"]:
    """log of prod_i w_(i) / (sum of the weights not drawn before the i-th), an ordered draw.

    Source: Plackett 1975, Applied Statistics 24(2). ``place`` is the order of the draw, -1 for rows
    not drawn.
    """
    log_weight = torch.where(candidate, log_weight, FAR_BELOW)
    last = torch.where(place >= 0, place, place.shape[-1])
    row = last.argsort(dim=-1, stable=True)
    drawn = (place >= 0).gather(-1, row)
    log_weight = log_weight.gather(-1, row)
    remaining = log_weight.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(drawn, log_weight - remaining, 0.0).sum(-1)


def low_confidence_log_prob(
    logits: Float[Tensor, "N R V"],
    log_p: Float[Tensor, "N R V"],
    token: Int[Tensor, "N R"],
    place: Int[Tensor, "N R"],
    candidate: Bool[Tensor, "N R"],
) -> Float[Tensor, " N"]:
    """Sum over the rows not revealed of log F, F = P(the row drew a token of lower confidence).

    The log-probability of the positions that low-confidence remasking keeps, given their tokens;
    with ``tokens_log_prob`` it makes the exact log-probability of the step.

    With c* the smallest confidence among the revealed tokens and l* its position, row j lost if it
    drew a token w with (p_j(w), -j) lexicographically below (c*, -l*): ties go to the lower
    position, as in the sampler. The sets of losing tokens are held fixed, so the gradient is the
    almost-everywhere one. Where such a set is empty the step is impossible: -inf, without gradient.
    """
    if place.shape[-1] == 0:  # no sample chooses anything in this step
        return log_p.new_zeros(len(place))
    revealed = place >= 0
    confidence = confidence_log_probs(logits.detach())
    drawn = confidence.gather(-1, token[..., None]).squeeze(-1)
    lowest = torch.where(revealed, drawn, torch.inf).amin(-1, keepdim=True)
    row = torch.arange(place.shape[-1], device=place.device)
    last = torch.where(revealed & (drawn == lowest), row, -1).amax(-1, keepdim=True)
    loses = (confidence < lowest[..., None]) | (
        (confidence == lowest[..., None]) & (row > last)[..., None]
    )
    competing = candidate & ~revealed & revealed.any(-1, keepdim=True)
    possible = (loses & log_p.isfinite()).any(-1)
    log_f = torch.where(loses, log_p, FAR_BELOW).logsumexp(-1)
    log_f = torch.where(possible, log_f, -torch.inf)
    return torch.where(competing, log_f, 0.0).sum(-1)


def race_log_prob(
    logits: Float[Tensor, "N R V"],
    log_p: Float[Tensor, "N R V"],
    token: Int[Tensor, "N R"],
    log_time: Float[Tensor, "N R"],
    place: Int[Tensor, "N R"],
    candidate: Bool[Tensor, "N R"],
    position_temperature: float,
) -> Float[Tensor, " N"]:
    r"""Log-density of the times of soft_low_confidence, given the tokens revealed.

    With rates w_j(v) = p_j(v)^(1 / position_temperature), revealed set U and t* its latest time:

        sum over U of (log w(token) - w(token) time) + sum over the rest of
        log sum_v p~(v) exp(-w(v) t*),

    the last being the probability that a row is later than t* whatever token it drew. Times are
    part of the action and held fixed; with ``tokens_log_prob`` this is the exact log-density of the
    step. It is a smooth relative of ``low_confidence_log_prob``.
    """
    if place.shape[-1] == 0:  # no sample chooses anything in this step
        return log_p.new_zeros(len(place))
    revealed = place >= 0
    log_rate = confidence_log_probs(logits) / position_temperature
    drawn = log_rate.gather(-1, token[..., None]).squeeze(-1)
    on_time = torch.where(revealed, drawn - (drawn + log_time).exp(), 0.0).sum(-1)
    latest = torch.where(revealed, log_time, -torch.inf).amax(-1, keepdim=True)[..., None]
    late = (log_p - (log_rate + latest).exp()).logsumexp(-1)
    competing = candidate & ~revealed & revealed.any(-1, keepdim=True)
    return on_time + torch.where(competing, late, 0.0).sum(-1)
