"""Continuous-time Markov chains on tokens: rates, reverse steps and the gradient-flow corrector.

Both forward processes replace a token, at rate 1 per unit of total noise, by a draw from a law pi,
their limit, whatever the token was. With columns as sources, Q[y, x] = rate of x -> y,

    Q = pi 1^T - I    and    exp(n Q) = e^-n I + (1 - e^-n) pi 1^T,    for every real n.

Positions jump independently. A network gives log s(x)_{l,v} = log p_t(x with token l replaced by v)
/ p_t(x), of shape [B, L, S]; its entry at the present token is 0 by definition, whatever finite
number stands there, and -inf says that a state cannot be reached. Time is measured in total noise
throughout; a schedule with rate(t) speeds it up. Sources: SEDD, arXiv:2310.16834, and its code
(graph_lib.py, sampling.py of louaaron/Score-Entropy-Discrete-Diffusion), whose conventions these
are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.processes.layout import one_hot, states_apart

Length = TypeVar("Length", bound=Tensor | float)


@dataclass(frozen=True)
class _Replacement:
    """What both processes share; they differ in the law a token is replaced by."""

    n_states: int

    def _limit(self, dtype: torch.dtype, device: torch.device | None = None) -> Float[Tensor, " S"]:
        raise NotImplementedError

    def limit_probs(
        self, x: Int[Tensor, "*B"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*B S"]:
        """pi, the law of every token at infinite noise, once for each token of ``x``."""
        return self._limit(dtype, x.device).expand(*x.shape, -1)

    def rate_matrix(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "S S"]:
        """Q = pi 1^T - I of one token: Q[y, x] is the rate of x -> y, and columns sum to 0."""
        return self._limit(dtype)[:, None] - torch.eye(self.n_states, dtype=dtype)

    def forward_rates(
        self, x: Int[Tensor, "*B"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*B S"]:
        """Q(y, x) for y != x, the rates at which noise leaves ``x``; 0 at y = x."""
        return self._limit(dtype, x.device) * (1 - one_hot(x, self.n_states, dtype))

    def backward_rates(
        self, x: Int[Tensor, "*B"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*B S"]:
        """Q(x, y) for y != x, the rates at which noise leads to ``x``; 0 at y = x."""
        into_x = self._limit(dtype, x.device)[x][..., None]
        return into_x * (1 - one_hot(x, self.n_states, dtype))

    def noised_probs(
        self, x_0: Int[Tensor, "B L"], total_noise: Float[Tensor, " B"]
    ) -> Float[Tensor, "B L S"]:
        """The law of x_t given x_0: the columns x_0 of exp(total_noise Q)."""
        noise = _precise(total_noise)[:, None, None]
        replaced = -torch.expm1(-noise) * self._limit(noise.dtype, x_0.device)
        return replaced + torch.exp(-noise) * one_hot(x_0, self.n_states, noise.dtype)

    def noised(
        self, x_0: Int[Tensor, "B L"], total_noise: Float[Tensor, " B"], u: Float[Tensor, "B L"]
    ) -> Int[Tensor, "B L"]:
        """x_t drawn from ``noised_probs`` with a uniform u in [0, 1) per token."""
        stays = torch.exp(-_precise(total_noise))[:, None].to(u)
        cdf = self._limit(u.dtype, x_0.device).cumsum(0)
        rest = ((u - stays) / (1 - stays)).clamp(min=0)
        drawn = torch.searchsorted(cdf, rest, right=True).clamp(max=self.n_states - 1)
        return torch.where(u < stays, x_0, drawn)


@dataclass(frozen=True)
class Uniform(_Replacement):
    """Every token jumps to a uniformly drawn one; all states are ordinary tokens.

    Q = 1 1^T / S - I, as SEDD's ``Uniform``.

    Raises:
        ValueError: fewer than two states.
    """

    n_states: int
    """S, the size of the vocabulary."""

    def __post_init__(self) -> None:
        _check_states(self.n_states)

    @property
    def mask_id(self) -> None:
        """There is no mask."""
        return

    def _limit(self, dtype: torch.dtype, device: torch.device | None = None) -> Float[Tensor, " S"]:
        return torch.full((self.n_states,), 1 / self.n_states, dtype=dtype, device=device)


@dataclass(frozen=True)
class Absorbing(_Replacement):
    """Every token falls into the mask, one of the states, at rate 1 and stays there.

    As SEDD's ``Absorbing``, with the mask at any place in the vocabulary.

    Raises:
        ValueError: fewer than two states, or a mask that is not one of them.
    """

    n_states: int
    """S, the number of ordinary tokens and the mask."""
    mask_id: int

    def __post_init__(self) -> None:
        _check_states(self.n_states)
        if not 0 <= self.mask_id < self.n_states:
            raise ValueError(
                f"mask_id is {self.mask_id}, but the states are 0 to {self.n_states - 1}: "
                "n_states counts the mask too"
            )

    def _limit(self, dtype: torch.dtype, device: torch.device | None = None) -> Float[Tensor, " S"]:
        return (torch.arange(self.n_states, device=device) == self.mask_id).to(dtype)


Process = Uniform | Absorbing
"""The forward process of one token."""

Law = Literal["analytic", "euler", "corrector"]
"""A law of tokens after a step: ``analytic_probs``, ``euler_probs`` or ``corrector_probs``."""
LEAST_LOG_SCORE = -80.0
"""Scores of a masked token that are below exp of this count as 0."""


def reverse_rates(
    process: Process, x: Int[Tensor, "B L"], log_score: Float[Tensor, "B L S"]
) -> Float[Tensor, "B L S"]:
    """s(x)_y Q(x, y), the rates of the process run backwards, y != x; 0 at y = x.

    Source: SEDD, arXiv:2310.16834; ``reverse_rate`` of its code, which adds minus their sum at x.
    """
    log_score = states_apart(_precise(log_score))
    return process.backward_rates(x, log_score.dtype) * log_score.exp()


def euler_probs(
    process: Process,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    size: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """The law of each next token after an Euler (tau-leaping) step of the reverse process.

    onehot(x) + size Qbar(., x). A step so long that a token leaves with probability above 1 leaves
    it for certain: the negative probability of staying is taken as 0 and the rest normalised.

    Source: SEDD's Euler predictor, whose draw treats negative probabilities in the same way.

    Args:
        process: the forward process.
        x: the present tokens.
        log_score: log p_t(y) / p_t(x).
        size: length of the step in total noise: h rate(t).
    """
    if isinstance(process, Absorbing):
        return _absorbing(process, x, log_score, keep=1.0, leave=size)
    return _leap(process, x, reverse_rates(process, x, log_score), size)


def corrector_probs(
    process: Process,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    size: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """The law of each next token after a step of the gradient flow at a fixed noise level.

    onehot(x) + size Q^c(., x) with Q^c(y, x) = Q(y, x) + s(x)_y Q(x, y): noise at rate 1 and
    denoise at the rate that makes up for it. Where s are the ratios of a law p, Q^c is reversible
    with respect to p, and dp'/dtau = Q^c p' lowers KL(p' || p) until p' = p; the stationary law of
    the discrete step is p up to O(size). Steps that are too long are cut as in ``euler_probs``.

    Source: the gradient flow of SEPO, arXiv:2502.01384; the sum of forward and reverse rates is the
    predictor-corrector scheme of Campbell et al. 2022, arXiv:2205.14987.

    Args:
        process: the forward process.
        x: the present tokens.
        log_score: log p_t(y) / p_t(x) at the noise level that is kept.
        size: length of the step in total noise.
    """
    if isinstance(process, Absorbing):
        back = _absorbing(process, x, log_score, keep=1.0, leave=size)
        mask = one_hot(torch.full_like(x, process.mask_id), process.n_states, back.dtype)
        falls = mask - one_hot(x, process.n_states, back.dtype)  # nothing at a masked token
        return back + _per_sample(size, back).clamp(max=1) * falls
    back = reverse_rates(process, x, log_score)
    return _leap(process, x, process.forward_rates(x, back.dtype) + back, size)


def analytic_probs(
    process: Process,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    delta_noise: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """The law of each next token after an analytic ("Tweedie") step of the reverse process.

    (exp(-d Q) s(x))_y exp(d Q)(x, y), d = ``delta_noise``: the ratio p_{t-d}(y) / p_t(x) times the
    probability of the noise that leads from y to x. Exact, for a step of any length, where there is
    one position and the scores are exact. The products sum to 1 over y whatever the scores; wrong
    scores can make some negative, which are taken as 0 and the rest normalised. With uniform noise
    the step is computed in float64, because at much noise only the differences of the scores, all
    close to 1, matter; there it is good for steps up to d = 30.

    Source: SEDD, arXiv:2310.16834; ``staggered_score`` and ``transp_transition`` of its code.

    Args:
        process: the forward process.
        x: the present tokens.
        log_score: log p_t(y) / p_t(x).
        delta_noise: length of the step in total noise: total_noise(t) - total_noise(s).
    """
    if isinstance(process, Absorbing):
        noise = torch.as_tensor(delta_noise, dtype=torch.float64).reshape(-1)
        keep, leave = torch.exp(-noise), -torch.expm1(-noise)
        return _absorbing(process, x, log_score, keep=keep, leave=leave)
    return _analytic_uniform(process, x, states_apart(_precise(log_score)), delta_noise)


def denoise_probs(
    process: Process,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    total_noise: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """The law of each clean token: the analytic step over all the noise, never to the mask.

    With absorbing noise a masked token becomes y with probability in proportion to s(x)_y, whatever
    the noise, and every other token stays: an analytic step of infinite length.

    Source: the final ``Denoiser`` step of SEDD's code.

    Args:
        process: the forward process.
        x: the present tokens.
        log_score: log p_t(y) / p_t(x).
        total_noise: all the noise there is in ``x``.
    """
    return analytic_probs(process, x, log_score, denoising_length(process, total_noise))


def masked_law(
    process: Absorbing,
    x: Int[Tensor, "B L"],
    clean: Float[Tensor, "B L S"],
    total_noise: Float[Tensor, " B"],
    law: Law,
    length: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """The same laws from p(x_0 | x_t) at masked tokens, of which the scores are k p.

    As sum_y s_y = k = 1 / (e^n - 1), a masked token leaves with probability
    min(1, leave k / keep), whichever tokens are likely, for one drawn from p.

    Args:
        process: the forward process.
        x: the present tokens.
        clean: probabilities of the clean token, 0 for the mask; not read at other tokens.
        total_noise: n, all the noise there is in ``x``.
        law: which of the three steps.
        length: of the step in total noise.
    """
    noise = torch.as_tensor(length, dtype=torch.float64, device=x.device).reshape(-1)
    analytic = law == "analytic"
    keep = torch.exp(-noise) if analytic else torch.ones_like(noise)
    leave = -torch.expm1(-noise) if analytic else noise
    leaves = leave / torch.expm1(total_noise.double())
    share = (leaves / torch.maximum(leaves, keep)).to(clean)[:, None]
    own = one_hot(x, process.n_states, clean.dtype)
    masked = (x == process.mask_id).to(clean)
    moves = masked * share
    probs = clean * moves[..., None] + own * (1 - moves)[..., None]
    if law != "corrector":
        return probs
    mask = one_hot(torch.full_like(x, process.mask_id), process.n_states, clean.dtype)
    return probs + noise.clamp(max=1).to(clean).reshape(-1, 1, 1) * (mask - own)


def denoising_length(process: Process, total_noise: Length) -> Length | float:
    """Length of the analytic step that removes all noise; with a mask an infinite one."""
    return total_noise if isinstance(process, Uniform) else math.inf


def kl_rate(
    process: Process,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    log_score_ref: Float[Tensor, "B L S"],
) -> Float[Tensor, " B"]:
    r"""$\sum_{y \ne x} Q(x, y) (s_y \log(s_y / s^{ref}_y) - s_y + s^{ref}_y)$, over all positions.

    In nats per unit of total noise: integrated over the noise along paths of the reverse process
    with rates s Q it is KL(path law || path law of the reference). Never negative, and 0 where the
    scores are equal; infinite where the reference cannot reach what ``log_score`` can. A position
    that never moves, such as one of a prompt, adds nothing when its scores are -inf in both.

    Source: KL of two Markov jump processes by their rates; DRAKES, arXiv:2410.13643.

    Args:
        process: the forward process.
        x: the present tokens.
        log_score: of the policy.
        log_score_ref: of the reference, at the same ``x`` and noise.
    """
    log_score, log_score_ref = _precise(log_score), _precise(log_score_ref)
    rates = process.backward_rates(x, log_score.dtype)
    s, s_ref = log_score.exp(), log_score_ref.exp()
    # s log(s / s_ref) - s + s_ref, written in d = log(s / s_ref) so that nothing cancels or
    # overflows at either end; where s = 0 it is s_ref.
    happens = (rates > 0) & (log_score > -torch.inf)
    d = log_score.masked_fill(~happens, 0) - log_score_ref.masked_fill(~happens, 0)
    excess = torch.where(d > 0, s, -s_ref) * torch.expm1(torch.where(d > 0, -d, d))
    return (rates * torch.where(happens, s * d + excess, s_ref)).sum((-2, -1))


def _leap(
    process: Process,
    x: Int[Tensor, "B L"],
    rates: Float[Tensor, "B L S"],
    size: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """onehot(x) + size (rates - onehot(x) sum rates), made a law."""
    moves = _per_sample(size, rates) * rates
    stays = 1 - moves.sum(-1, keepdim=True)
    return _normalised(moves + one_hot(x, process.n_states, moves.dtype) * stays)


def _analytic_uniform(
    process: Uniform,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    delta_noise: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """(exp(-d Q) s)_y exp(d Q)(x, y), times e^-d so that nothing overflows, in float64."""
    own = one_hot(x, process.n_states, torch.float64)
    s = (log_score.double() * (1 - own)).exp()
    noise = _per_sample(delta_noise, s)
    stays, moves = torch.exp(-noise), -torch.expm1(-noise) / process.n_states
    earlier = s - moves * s.sum(-1, keepdim=True)
    return _normalised(earlier * (stays * own + moves)).to(log_score.dtype)


def _absorbing(
    process: Absorbing,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    *,
    keep: Float[Tensor, " N"] | float,
    leave: Float[Tensor, " N"] | float,
) -> Float[Tensor, "B L S"]:
    """A step of the reverse process, in closed form: tokens stay, masks may become tokens.

    A masked token becomes y with weight ``leave`` s_y and stays with ``keep`` - ``leave`` sum_y
    s_y, at least 0; the weights sum to the larger of ``keep`` and ``leave`` sum_y s_y. In an
    analytic step keep = e^-d and leave = 1 - e^-d. Rounding costs no more than that of the scores
    themselves, so float32 will do.
    """
    log_score = states_apart(_precise(log_score))
    own = one_hot(x, process.n_states, log_score.dtype)
    masked = (x == process.mask_id).to(log_score)[..., None]
    above = (log_score - LEAST_LOG_SCORE).relu() * (masked * (1 - own))
    s = (above + LEAST_LOG_SCORE).exp() * (above > 0).to(above)  # exp(-inf) would be slow
    keep, leave = _per_sample(keep, s), _per_sample(leave, s)
    leaves = leave * s.sum(-1, keepdim=True)
    total = torch.maximum(leaves, keep) + (1 - masked)
    return s * (leave / total) + own * ((total - leaves) / total)


def _normalised(probs: Float[Tensor, "B L S"]) -> Float[Tensor, "B L S"]:
    probs = probs.clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def _per_sample(value: Float[Tensor, " B"] | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_states(n_states: int) -> None:
    if n_states < 2:
        raise ValueError(f"n_states is {n_states}, but a process needs at least two states")
