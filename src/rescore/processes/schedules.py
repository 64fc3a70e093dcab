"""Schedules of the masked process, and of processes with rates.

A masking schedule gives the probability alpha_t that a token has survived until time t, which runs
from 0 (data, alpha = 1) to 1 (everything masked, alpha = 0). The likelihood bound of MDLM
(arXiv:2406.07524) does not depend on the schedule, only the variance of its estimate does.

A noise of SEDD (arXiv:2310.16834) gives the total noise n(t) of a process with rates: the law of
x_t is exp(n(t) Q) applied to that of x_0. With absorbing noise alpha_t = exp(-n(t)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
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


@dataclass(frozen=True)
class LogLinear:
    """n(t) = -log(1 - (1 - eps) t): absorbing noise then masks (1 - eps) t of the tokens.

    Source: ``LogLinearNoise`` of the code of SEDD and MDLM, with their eps.

    Raises:
        ValueError: eps outside (0, 1).
        TypeError: a time of an integer dtype.
    """

    eps: float = 1e-3
    """The fraction exp(-n(1)) of tokens that survives all the noise."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def total_noise(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """n(t), in float32 or better."""
        t = _time(t)
        return _minus_log((1 - t) + self.eps * t, (1 - self.eps) * t)

    def rate(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """n'(t) = (1 - eps) / (1 - (1 - eps) t)."""
        t = _time(t)
        return (1 - self.eps) / ((1 - t) + self.eps * t)


@dataclass(frozen=True)
class Geometric:
    """n(t) = low^(1 - t) high^t: the noise grows by the same factor in equal times.

    There is noise at t = 0 already. The usual choice with ``Uniform`` replacement.

    Source: ``GeometricNoise`` of SEDD's code; the defaults are those of its configuration.

    Raises:
        ValueError: not 0 < low < high.
        TypeError: a time of an integer dtype.
    """

    low: float = 1e-4
    """n(0)."""
    high: float = 20.0
    """n(1)."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"the noise runs from low = {self.low} to high = {self.high}, but it must grow "
                "between two positive numbers"
            )

    def total_noise(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """n(t), in float32 or better."""
        t = _time(t)
        return self.low ** (1 - t) * self.high**t

    def rate(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """n'(t) = n(t) log(high / low)."""
        return self.total_noise(t) * math.log(self.high / self.low)


@dataclass(frozen=True)
class CosineNoise:
    """n(t) = -log(eps + (1 - eps) cos(pi t / 2)): the ``Cosine`` schedule as noise, but for eps.

    Source: ``CosineNoise`` of MDLM's code, with its eps.

    Raises:
        ValueError: eps outside (0, 1).
        TypeError: a time of an integer dtype.
    """

    eps: float = 1e-3
    """The fraction exp(-n(1)) of tokens that survives all the noise."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def total_noise(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """n(t), in float32 or better."""
        t = _time(t)
        masked = (1 - self.eps) * 2 * torch.sin(math.pi / 4 * t) ** 2
        return _minus_log(self._survival(t), masked)

    def rate(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """n'(t) = (pi / 2) (1 - eps) sin(pi t / 2) / (eps + (1 - eps) cos(pi t / 2))."""
        t = _time(t)
        return math.pi / 2 * (1 - self.eps) * torch.sin(math.pi / 2 * t) / self._survival(t)

    def _survival(self, t: Tensor) -> Tensor:
        # sin(pi (1 - t) / 2) = cos(pi t / 2), exactly 0 at t = 1
        return self.eps + (1 - self.eps) * torch.sin(math.pi / 2 * (1 - t))


Noise = LogLinear | Geometric | CosineNoise
"""Any of the noises of a process with rates."""


def _minus_log(kept: Tensor, masked: Tensor) -> Tensor:
    """-log(kept), from ``masked`` = 1 - kept where that one has the digits."""
    return torch.where(masked < 0.5, -torch.log1p(-masked), -torch.log(kept))


def _time(t: Tensor) -> Tensor:
    """``t`` in float32 or better; times of an integer dtype have lost their fractions already."""
    if not t.is_floating_point():
        raise TypeError(
            f"times have dtype {t.dtype}, in which every t below 1 is 0: "
            "pass a float tensor (beware of x.new_full with tokens x)"
        )
    return t if t.dtype == torch.float64 else t.float()


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(
            f"eps is {eps}, but it is the fraction of tokens that survives all the noise: "
            "it must lie between 0 and 1"
        )
