"""p(x_0 | x_t) <-> concrete score, for the absorbing process; eps <-> x_0 <-> v <-> score <-> flow.

At total noise n a token survives with probability e^-n, so that a token v has, at a masked
position, the score p_t(v) / p_t(mask) = k p(x_0 = v | x_t) with k = e^-n / (1 - e^-n).

With Gaussian noise x_t = alpha_t x_0 + sigma_t eps, so that any one prediction and x_t give all the
others, by formulas affine in both.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.processes.layout import log_softmax, replaced, states_apart
from rescore.types import State


def score_from_log_probs(
    log_p: Float[Tensor, "B L V"],
    x_t: Int[Tensor, "B L"],
    total_noise: Float[Tensor, " B"],
    mask_id: int,
    n_states: int,
) -> Float[Tensor, "B L S"]:
    """The concrete score log s(x_t) that a denoiser log p(x_0 | x_t) implies.

    At a masked position: log p + log k for tokens, 0 for the mask: the ratios of p_t where the
    denoiser is exact. At any other one nothing depends on the denoiser: 0 for its token, -log k for
    the mask, -inf for all else. These are the ratios given that the token is the clean one (MDLM's
    "carry-over"), not those of p_t, and the reverse process never reads them.

    Source: SUBS, MDLM, arXiv:2406.07524; ``get_score`` of its code.

    Args:
        log_p: normalised log-probabilities of the clean token, over the ordinary tokens in order
            (``n_states - 1`` columns) or over all states, whose mask column is not read.
        x_t: the noised tokens.
        total_noise: above 0; without noise no token is masked and the score of the mask is 0.
        mask_id: the mask among the states.
        n_states: ordinary tokens and the mask.

    Raises:
        ValueError: ``log_p`` has neither ``n_states - 1`` nor ``n_states`` columns.
    """
    log_p = _precise(log_p)
    columns = log_p.shape[-1]
    if columns == n_states - 1:
        gap = torch.zeros_like(log_p[..., :1])
        log_p = torch.cat([log_p[..., :mask_id], gap, log_p[..., mask_id:]], -1)
    elif columns != n_states:
        raise ValueError(
            f"log_p has {columns} columns, but {n_states} states have {n_states - 1} ordinary "
            f"tokens: give {n_states - 1} columns, or {n_states} with one for the mask"
        )
    noise = total_noise.to(log_p.dtype)[:, None]
    log_k = -noise - torch.log(-torch.expm1(-noise))
    masked = x_t == mask_id
    of_tokens = states_apart(log_p) + torch.where(masked, log_k, -torch.inf)[..., None]
    of_mask = torch.where(masked, 0.0, -log_k)
    return replaced(replaced(of_tokens, torch.full_like(x_t, mask_id), of_mask), x_t, 0.0)


def log_probs_from_score(log_score: Float[Tensor, "B L S"], mask_id: int) -> Float[Tensor, "B L S"]:
    """log p(x_0 | x_t) at masked positions: the scores of the ordinary tokens, normalised.

    The mask column is -inf. The noise level cancels. At other positions the scores of SUBS give
    back the token that is there; those of a network trained on score entropy mean nothing there,
    because absorbing noise never asks for them.

    Source: p_t(v) / p_t(mask) = k p(x_0 = v | x_t), as in ``score_from_log_probs``.
    """
    is_mask = torch.arange(log_score.shape[-1], device=log_score.device) == mask_id
    return log_softmax(_precise(log_score) + torch.where(is_mask, -torch.inf, 0.0))


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


Prediction = Literal["eps", "x_0", "v", "score", "flow"]
"""What a network for Gaussian noise predicts, x_t = alpha_t x_0 + sigma_t eps.

eps: the noise. x_0: the data. v = alpha_t eps - sigma_t x_0 (Salimans & Ho 2022, arXiv:2202.00512).
score: grad log p_t(x_t) = -eps / sigma_t. flow = eps - x_0, the velocity dx_t / dt of the rectified
flow x_t = (1 - t) x_0 + t eps (the sign of SD3 and FLUX: from data to noise).
"""


def convert_prediction(
    a: State,
    x_t: State,
    alpha_t: Float[Tensor, " N"],
    sigma_t: Float[Tensor, " N"],
    *,
    source: Prediction,
    target: Prediction,
) -> State:
    """The same belief about x_t in another form, in float32 or better.

    Args:
        a: output of the network, of the form ``source``.
        x_t: its input.
        alpha_t: amplitude of the signal, one for each sample or one for all (N = 1).
        sigma_t: standard deviation of the noise.
        source: what ``a`` is.
        target: what is wanted.

    Raises:
        ValueError: ``source`` does not determine ``target`` at this noise: without signal
            (alpha_t = 0) eps and score say nothing about x_0; without noise (sigma_t = 0) x_0 says
            nothing about eps, and there is no score. Another number of amplitudes than 1 or B.
    """
    a, x_t = _precise(a), _precise(x_t)
    if source == target:
        return a
    alpha_t, sigma_t = alpha_t.double(), sigma_t.double()
    if len(alpha_t) not in (1, len(a)):
        raise ValueError(
            f"{len(alpha_t)} amplitudes for {len(a)} samples: give one for each, or one"
        )
    on_x, on_a = _coefficients(source, target, alpha_t, sigma_t)
    shape = (-1,) + (1,) * (a.ndim - 1)
    return on_x.to(a.dtype).reshape(shape) * x_t + on_a.to(a.dtype).reshape(shape) * a


def x_0_coefficients(
    prediction: Prediction, alpha_t: Float[Tensor, " N"], sigma_t: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(p, q) of x_0 = p x_t + q a, where the network's output a is a ``prediction``.

    Raises:
        ValueError: eps or score, and alpha_t = 0.
    """
    if prediction == "x_0":
        return torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
    if prediction == "v":
        power = alpha_t**2 + sigma_t**2
        return alpha_t / power, -sigma_t / power
    if prediction == "flow":
        total = alpha_t + sigma_t
        return 1 / total, -sigma_t / total
    if bool((alpha_t == 0).any()):
        raise ValueError(
            f"a network that predicts {prediction!r} says nothing about x_0 where alpha_t is 0 "
            "(t = 1 of this schedule): start below t = 1, or predict 'x_0', 'v' or 'flow'"
        )
    return 1 / alpha_t, (-sigma_t if prediction == "eps" else sigma_t**2) / alpha_t


def eps_coefficients(
    prediction: Prediction, alpha_t: Float[Tensor, " N"], sigma_t: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(p, q) of eps = p x_t + q a, where the network's output a is a ``prediction``.

    Raises:
        ValueError: x_0, and sigma_t = 0.
    """
    if prediction == "eps":
        return torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
    if prediction == "score":
        return torch.zeros_like(alpha_t), -sigma_t
    if prediction == "v":
        power = alpha_t**2 + sigma_t**2
        return sigma_t / power, alpha_t / power
    if prediction == "flow":
        total = alpha_t + sigma_t
        return 1 / total, alpha_t / total
    if bool((sigma_t == 0).any()):
        raise ValueError(
            "a network that predicts 'x_0' says nothing about eps where sigma_t is 0 (data): "
            "ask at a time with noise"
        )
    return 1 / sigma_t, -alpha_t / sigma_t


def score_coefficients(
    prediction: Prediction, alpha_t: Float[Tensor, " N"], sigma_t: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(p, q) of score = p x_t + q a, where the network's output a is a ``prediction``.

    Raises:
        ValueError: sigma_t = 0, where there is no score.
    """
    if prediction == "score":
        return torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
    if bool((sigma_t == 0).any()):
        raise ValueError("there is no score where sigma_t is 0 (data): ask at a time with noise")
    on_x, on_a = eps_coefficients(prediction, alpha_t, sigma_t)
    return -on_x / sigma_t, -on_a / sigma_t


def _coefficients(
    source: Prediction,
    target: Prediction,
    alpha_t: Float[Tensor, " N"],
    sigma_t: Float[Tensor, " N"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(p, q) of target = p x_t + q source."""
    if target == "score":
        return score_coefficients(source, alpha_t, sigma_t)
    if target == "x_0":
        return x_0_coefficients(source, alpha_t, sigma_t)
    if target == "eps":
        return eps_coefficients(source, alpha_t, sigma_t)
    (x_0_x, x_0_a), (eps_x, eps_a) = (
        x_0_coefficients(source, alpha_t, sigma_t),
        eps_coefficients(source, alpha_t, sigma_t),
    )
    if target == "v":
        return alpha_t * eps_x - sigma_t * x_0_x, alpha_t * eps_a - sigma_t * x_0_a
    return eps_x - x_0_x, eps_a - x_0_a
