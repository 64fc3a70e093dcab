"""What stands in for the log-probability of a finished sample, where that cannot be had.

The random parts (which positions are hidden, which neighbours are visited) are drawn once per
rollout and given to both policies of a ratio, so that it is exactly 1 while they are equal.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.denoiser import CountedScores, ScoreNetwork
from rescore.objectives.score_entropy import masked_log_prob, snis_log_prob
from rescore.processes.convert import log_probs_from_score
from rescore.processes.masked import FAR_BELOW
from rescore.sampling.rng import Rng, Stream
from rescore.types import Prompts

MOST_HIDDEN = 1 - 1e-3
"""Share of hidden positions at which the noise level told to a network stops rising."""


def hidden_sets(
    prompts: Prompts, n: int, *, sizes: bool, antithetic: bool, step: int, rng: Rng
) -> Bool[Tensor, "B n L"]:
    """Random sets of editable positions to hide, ``n`` per sample.

    Args:
        prompts: what is editable.
        n: sets per sample.
        sizes: True: the size c is uniform in 1 ... E and the set uniform among those of its size;
            False: n different positions, one each (sets beyond the E-th stay empty).
        antithetic: draw sizes in pairs: the first c positions of a random order, and the last
            E + 1 - c; ``n`` must be even.
        step: a number no draw of the sampler bears, and the n after it.
        rng: draws them.
    """
    editable = prompts.editable
    n_samples, length = editable.shape
    count = editable.sum(1, keepdim=True)  # E
    where = torch.arange(length, device=editable.device).expand(n_samples, -1)
    log_weight = torch.where(editable, 0.0, FAR_BELOW)
    if not sizes:
        place = rng.ordered(log_weight, length, step, where).argsort(1)
        number = torch.arange(n, device=editable.device)[:, None]
        return (place[:, None] == number) & editable[:, None]
    n_draws = n // 2 if antithetic else n
    even = (where < count).to(torch.float32)[:, None].expand(-1, n_draws, -1)
    draw = torch.arange(n_draws, device=editable.device).expand(n_samples, -1)
    size = 1 + rng.categorical(even.contiguous(), Stream.SLOT, step, draw)
    sets = []
    for number in range(n_draws):
        place = rng.ordered(log_weight, length, step + number, where).argsort(1)
        c = size[:, number, None]
        sets.append(place < c)
        if antithetic:
            sets.append((place >= c - 1) & (place < count))
    return torch.stack(sets, 1) & editable[:, None]


def masked_log_policy(
    network: ScoreNetwork, x_0: Int[Tensor, "N L"], prompts: Prompts, hidden: Bool[Tensor, "N n L"]
) -> Float[Tensor, " N"]:
    r"""Mean over the sets of $\frac{E}{c} \sum_{l \text{ hidden}} \log p(x_0^l \mid \text{rest})$.

    With sets of random size it estimates the ELBO of a masked model, with single positions the log
    pseudo-likelihood; see ``masked_log_prob``. A network row per set. Nats.
    """
    n_samples, n_sets, length = hidden.shape
    mask_id = network.process.mask_id
    assert mask_id is not None
    flat = hidden.flatten(0, 1)
    tokens = x_0.repeat_interleave(n_sets, 0)
    attend = None if prompts.attend is None else prompts.attend.repeat_interleave(n_sets, 0)
    count = prompts.editable.sum(1).repeat_interleave(n_sets)
    size = flat.sum(1)
    share = (size / count.clamp(min=1)).clamp(min=0.5 / length, max=MOST_HIDDEN)  # never no noise
    canvas = torch.where(flat, mask_id, tokens)
    noise = -torch.log1p(-share)
    if isinstance(network, CountedScores):
        log_p = network.clean_log_probs(canvas, noise, attend=attend)
    else:
        log_p = log_probs_from_score(network.log_score(canvas, noise, attend=attend), mask_id)
    per_set = masked_log_prob(log_p, tokens, flat, count / size.clamp(min=1))
    filled = (size > 0).view(n_samples, n_sets).sum(1).clamp(min=1)
    return per_set.view(n_samples, n_sets).sum(1) / filled


def neighbours(
    log_score: Float[Tensor, "N L S"],
    x: Int[Tensor, "N L"],
    editable: Bool[Tensor, "N L"],
    n: int,
    *,
    step: int,
    rng: Rng,
) -> Int[Tensor, "N n L"]:
    """n draws of ``heat_bath`` from x: one position, evenly, gets a token from its conditional."""
    draws = torch.arange(n, device=x.device).expand(len(x), -1)
    even = editable.to(log_score)[:, None].repeat(1, n, 1)
    position = rng.categorical(even, Stream.SLOT, step, draws)
    conditional = log_score.scatter(-1, x[..., None], 0.0).softmax(-1)
    conditional = conditional.take_along_dim(position[..., None], dim=1)
    token = rng.categorical(conditional, Stream.TOKEN, step, draws)
    return x[:, None].repeat(1, n, 1).scatter(2, position[..., None], token[..., None])


def heat_bath(
    log_score: Float[Tensor, "N L S"], x: Int[Tensor, "N L"], editable: Bool[Tensor, "N L"]
) -> Float[Tensor, "N L S"]:
    """Probability that the heat bath picks position l and writes token v: pi(v | x^-l) / E."""
    conditional = log_score.scatter(-1, x[..., None], 0.0).softmax(-1)
    return conditional * (editable / editable.sum(1, keepdim=True).clamp(min=1))[..., None]


def snis_log_likelihood(
    network: ScoreNetwork,
    total_noise: float,
    log_score: Float[Tensor, "N L S"],
    x: Int[Tensor, "N L"],
    prompts: Prompts,
    neighbour: Int[Tensor, "N n L"],
) -> Float[Tensor, " N"]:
    r"""log pi(x) by self-normalised importance sampling over neighbours of x.

    $\hat\pi(x) = \sum_i w_i K(x \mid z_i) / \sum_i w_i$ with $z_i \sim K(\cdot \mid x)$, K the heat
    bath, and $w_i = 1 / (s(z_i)_x K(z_i \mid x))$. Exact for one position; for more the draws reach
    the neighbours of x only, and the estimate does not tend to pi(x) however many there are.
    A network row per draw, besides the scores at x.

    Source: the estimate of SEPO's released code (arXiv:2502.01384), for x instead of all its
    neighbours, whose probabilities follow from it and the scores.
    """
    n_samples, n_draws, _ = neighbour.shape
    z, origin = neighbour.flatten(0, 1), x.repeat_interleave(n_draws, 0)
    editable = prompts.editable.repeat_interleave(n_draws, 0)
    attend = None if prompts.attend is None else prompts.attend.repeat_interleave(n_draws, 0)
    noise = torch.full((len(z),), total_noise, dtype=torch.float64, device=x.device)
    score_z = network.log_score(z, noise, attend=attend)
    back = torch.where(z != origin, score_z.gather(-1, origin[..., None]).squeeze(-1), 0.0).sum(
        1
    )  # log pi(x) - log pi(z)
    there = _heat_bath_log_prob(log_score.repeat_interleave(n_draws, 0), origin, z, editable)
    return_ = _heat_bath_log_prob(score_z, z, origin, editable)
    shape = (n_samples, n_draws)
    return snis_log_prob((-back - there).view(shape), return_.view(shape))


def _heat_bath_log_prob(
    log_score: Float[Tensor, "N L S"],
    start: Int[Tensor, "N L"],
    end: Int[Tensor, "N L"],
    editable: Bool[Tensor, "N L"],
) -> Float[Tensor, " N"]:
    """log K(end | start) for states that differ in one token at most."""
    cell = heat_bath(log_score, start, editable).gather(-1, end[..., None]).squeeze(-1)
    moved = start != end
    stayed = ~moved.any(1, keepdim=True)
    return torch.where(moved | stayed, cell, 0.0).sum(1).log()
