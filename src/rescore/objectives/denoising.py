"""Pre-training losses: bounds on the negative log-likelihood of clean data."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def masked_cross_entropy(
    logits: Float[Tensor, "B L V"],
    x_0: Int[Tensor, "B L"],
    masked: Bool[Tensor, "B L"],
    weight: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    r"""The integrand of MDLM's bound, $w_t \sum_{l \text{ masked}} -\log p_\theta(x_0^l \mid x_t)$.

    With $w_t = -\alpha'_t / (1 - \alpha_t)$, its mean over t uniform in [0, 1] and over
    $x_t \sim q(x_t \mid x_0)$ is at least $-\log p_\theta(x_0)$. In nats per sequence, to be
    minimised.

    Source: Sahoo et al. 2024 (MDLM), arXiv:2406.07524, the continuous-time bound of section 3.4.

    Args:
        logits: unnormalised log p(x_0 | x_t); upcast to float32 if narrower.
        x_0: clean tokens; ignored where nothing is masked.
        masked: True where x_t is the mask token.
        weight: w_t of each sample.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token = torch.where(masked, x_0, 0)
    nll = -torch.log_softmax(logits, -1).gather(-1, token[..., None]).squeeze(-1)
    return weight * torch.where(masked, nll, 0.0).sum(-1)
