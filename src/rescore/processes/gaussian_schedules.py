r"""The noise schedules of continuous samples: amplitudes, and the equation that they stand for.

Data x_0 are seen through x_t = alpha_t x_0 + sigma_t eps, the law at time t of

    dx = f(t) x dt + g(t) dw,    f = (log alpha)',    g^2 = (sigma^2)' - 2 f sigma^2.

f, g^2 and their integrals are per unit of t; all values are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class _Preserving:
    """alpha^2 + sigma^2 = 1: all follows from beta and its integral n, alpha^2 = exp(-n)."""

    def beta(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        raise NotImplementedError

    def beta_integral(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        raise NotImplementedError

    def alpha(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Amplitude of the signal, float64."""
        return torch.exp(-self.beta_integral(t) / 2)

    def sigma(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Standard deviation of the noise, float64."""
        return torch.sqrt(-torch.expm1(-self.beta_integral(t)))

    def log_snr(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log(alpha^2 / sigma^2)."""
        return -torch.log(torch.expm1(self.beta_integral(t)))

    def drift(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """f = -beta / 2."""
        return -self.beta(t) / 2

    def g2(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """g^2 = beta."""
        return self.beta(t)

    def g2_integral(self, s: Shaped[Tensor, "*B"], t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of g^2 from s to t: log(alpha_s^2 / alpha_t^2)."""
        return self.beta_integral(t) - self.beta_integral(s)


@dataclass(frozen=True)
class VariancePreserving(_Preserving):
    """dx = -beta x / 2 dt + sqrt(beta) dw with beta linear in t, from beta_min to beta_max.

    Source: the VP SDE of Song et al. 2021, arXiv:2011.13456, with its usual constants.

    Raises:
        ValueError: not 0 <= beta_min <= beta_max with beta_max > 0.
        TypeError: a time of an integer dtype.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max < math.inf or self.beta_max == 0:
            raise ValueError(
                f"beta runs from {self.beta_min} to {self.beta_max}, but it must start at 0 or "
                "more, not fall, and end above 0"
            )

    def beta(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Rate of the noise at t."""
        return self.beta_min + (self.beta_max - self.beta_min) * _time(t)

    def beta_integral(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of beta from 0 to t."""
        t = _time(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2


@dataclass(frozen=True, eq=False)
class DiscreteTable(_Preserving):
    """The table of alpha^2 that a model was trained with, as diffusers' ``alphas_cumprod``.

    Entry n of M stands at time (n + 1) / M (``time_of``); time 0 is what comes after entry 0. In
    between log alpha^2 is linear, so that beta is constant over each interval; at an entry it is
    that of the interval below, which a step down from there runs through.

    Raises:
        ValueError: entries not in [0, 1) or not falling, or ``final`` out of place.
        TypeError: a time of an integer dtype.
    """

    alphas_cumprod: Float[Tensor, " M"]
    """alpha^2 of every entry, clean to noisy."""
    final: float = 1.0
    """alpha^2 at time 0: 1 (diffusers' ``set_alpha_to_one=True``), or the first entry (False)."""

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.double()
        if len(table) == 0 or bool(
            (table.diff() >= 0).any() | (table < 0).any() | (table >= 1).any()
        ):
            raise ValueError(
                "alphas_cumprod must fall from entry to entry and lie in [0, 1), "
                f"but its ends are {table[:1].tolist()} and {table[-1:].tolist()}"
            )
        if not float(table[0]) <= self.final <= 1:
            raise ValueError(
                f"final is {self.final}, but time 0 has less noise than the first entry: give 1.0 "
                f"or alphas_cumprod[0] = {float(table[0])}"
            )

    def time_of(self, entry: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """(n + 1) / M, the time of entry n; the entry -1 is time 0."""
        return (entry.double() + 1) / len(self.alphas_cumprod)

    def beta(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Slope of -log alpha^2 in the interval that ends at t."""
        noise, below, _ = self._locate(t)
        return (noise[below + 1] - noise[below]) * len(self.alphas_cumprod)

    def beta_integral(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """-log alpha^2, which starts at -log final."""
        noise, below, part = self._locate(t)
        return noise[below] + part * (noise[below + 1] - noise[below])

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log alpha^2 at 0, 1/M, ..., 1; the interval (below, below + 1] of t; the place in it."""
        t = _time(t)
        table = self.alphas_cumprod.double()
        noise = -torch.cat([table.new_tensor([self.final]), table]).log()
        noise = noise.to(t.device, non_blocking=True)
        place = t * len(table)
        entry = place.round()
        place = torch.where((place - entry).abs() < 1e-4, entry, place)  # times from float32
        below = (place.ceil().long() - 1).clamp(min=0)
        return noise, below, place - below


@dataclass(frozen=True)
class VarianceExploding:
    """dx = g dw, sigma_t = sigma_min (sigma_max / sigma_min)^t. At t = 0 some noise is left.

    Source: the VE SDE of Song et al. 2021, arXiv:2011.13456, with its usual constants.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
        TypeError: a time of an integer dtype.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma runs from {self.sigma_min} to {self.sigma_max}, but it must grow between "
                "two positive numbers"
            )

    def alpha(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Amplitude of the signal: 1."""
        return torch.ones_like(_time(t))

    def sigma(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Standard deviation of the noise, float64."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** _time(t)

    def log_snr(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log(alpha^2 / sigma^2)."""
        return -2 * torch.log(self.sigma(t))

    def drift(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """f = 0."""
        return torch.zeros_like(_time(t))

    def g2(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """g^2 = (sigma^2)'."""
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.sigma(t) ** 2

    def g2_integral(self, s: Shaped[Tensor, "*B"], t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of g^2 from s to t: sigma_t^2 - sigma_s^2."""
        return self.sigma(t) ** 2 - self.sigma(s) ** 2


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x_0 + t eps. A shift of the noise levels is a choice of times.

    Source: Liu et al. 2022, arXiv:2209.03003, with data at t = 0 as in SD3, arXiv:2403.03206.

    Raises:
        TypeError: a time of an integer dtype.
    """

    def alpha(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """1 - t, float64."""
        return 1 - _time(t)

    def sigma(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """t, float64."""
        return _time(t)

    def log_snr(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log(alpha^2 / sigma^2)."""
        return 2 * (torch.log1p(-_time(t)) - torch.log(_time(t)))

    def drift(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """f = -1 / (1 - t)."""
        return -1 / (1 - _time(t))

    def g2(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """g^2 = 2 t / (1 - t), infinite at t = 1."""
        return 2 * _time(t) / (1 - _time(t))

    def g2_integral(self, s: Shaped[Tensor, "*B"], t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of g^2 from s to t: 2 (s - t) + 2 log((1 - s) / (1 - t)); infinite at t = 1."""
        s, t = _time(s), _time(t)
        return 2 * (s - t + torch.log1p(-s) - torch.log1p(-t))


GaussianSchedule = VariancePreserving | VarianceExploding | RectifiedFlow | DiscreteTable
"""Any of the schedules."""


def _time(t: Tensor) -> Tensor:
    """``t`` in float64; times of an integer dtype have lost their fractions already."""
    if not t.is_floating_point():
        raise TypeError(
            f"times have dtype {t.dtype}, in which every t below 1 is 0: pass a float tensor "
            "(of entries of a DiscreteTable, time_of makes times)"
        )
    return t.double()
