"""Masking schedules: the probability alpha_t that a token has survived until time t.

Time t runs from 0 (data, alpha = 1) to 1 (everything masked, alpha = 0). The likelihood bound of
MDLM (arXiv:2406.07524) does not depend on the schedule, only the variance of its estimate does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """alpha_t = 1 - t: a fraction t of the tokens is masked at time t.

    MDLM's "log-linear" noise, total noise -log(1 - t), is this schedule: alpha = exp(-total noise).
    Source: MDLM, arXiv:2406.07524, appendix on noise schedules; LLaDA, arXiv:2502.09992.
    """

    def alpha(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Probability that a token survives until time t."""
        return 1 - t

    def d_alpha(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Derivative of alpha in t."""
        return -torch.ones_like(t)

    def inverse(self, alpha: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """The time at which tokens survive with probability ``alpha``."""
        return 1 - alpha

    def weight(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """-alpha' / (1 - alpha) = 1 / t: MDLM's weight of the cross-entropy; infinite at t = 0."""
        return 1 / t


@dataclass(frozen=True)
class Cosine:
    """alpha_t = cos(pi t / 2): fewer masks than the linear schedule at every time.

    Source: the cosine noise of MDLM's code (kuleshov-group/mdlm, noise_schedule.py), without its
    offset of 1e-3. MaskGIT's cosine (arXiv:2202.04200) is the mirror image: there the *masked*
    fraction is cos(pi r / 2) at decoding progress r = 1 - t.
    """

    def alpha(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Probability that a token survives until time t."""
        return torch.cos(math.pi / 2 * t)

    def d_alpha(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Derivative of alpha in t."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def inverse(self, alpha: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """The time at which tokens survive with probability ``alpha``."""
        return 2 / math.pi * torch.acos(alpha)

    def weight(self, t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """-alpha' / (1 - alpha) = (pi / 2) / tan(pi t / 4), without cancellation near t = 0."""
        return math.pi / 2 / torch.tan(math.pi / 4 * t)


Schedule = Linear | Cosine
"""Any of the masking schedules."""
