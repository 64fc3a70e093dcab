"""Gaussian mixtures: densities and scores known at every noise, and a network that starts there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rescore.models.value import N_TIMES, draw_weights, time_features
from rescore.processes.convert import Prediction, convert_prediction
from rescore.processes.gaussian_schedules import GaussianSchedule
from rescore.types import State


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """sum_k weight_k N(mean_k, std^2 I) in D dimensions.

    Noised to x_t = alpha_t x_0 + sigma_t eps it is sum_k weight_k N(alpha_t mean_k, D_t I) with
    D_t = alpha_t^2 std^2 + sigma_t^2. All results have the dtype of x_t.

    Raises:
        ValueError: weights that are not positive or do not sum to 1, another number of means, means
            of different dimensions, or a std that is not positive.
    """

    weights: tuple[float, ...]
    """Of the components; their sum is 1."""
    means: tuple[tuple[float, ...], ...]
    """Of each component, D numbers."""
    std: float
    """Of every component, the same in every direction."""

    def __post_init__(self) -> None:
        if not all(weight > 0 for weight in self.weights) or abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError(
                f"weights {self.weights} sum to {sum(self.weights)}; expected positive ones that "
                f"sum to 1"
            )
        if len(self.means) != len(self.weights) or {len(m) for m in self.means} != {self.n_dims}:
            raise ValueError(
                f"means {self.means} for {len(self.weights)} weights; expected one for each, all "
                f"of the same dimension"
            )
        if not 0 < self.std < math.inf:
            raise ValueError(f"std is {self.std}; expected a positive number")

    @property
    def n_dims(self) -> int:
        """D."""
        return len(self.means[0])

    def log_density(
        self, schedule: GaussianSchedule, x_t: Float[Tensor, "B D"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """log p_t(x_t), all constants included; t = 0 asks for the mixture itself."""
        log_joint, variance, _ = self._components(schedule, x_t, t)
        constant = self.n_dims / 2 * torch.log(2 * math.pi * variance)
        return log_joint.logsumexp(1) - constant

    def score(
        self, schedule: GaussianSchedule, x_t: Float[Tensor, "B D"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B D"]:
        """grad log p_t(x_t): (alpha_t E[mean_k | x_t] - x_t) / D_t."""
        log_joint, variance, means = self._components(schedule, x_t, t)
        centre = (log_joint.softmax(1)[:, :, None] * means).sum(1)
        return (centre - x_t) / variance[:, None]

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n D"]:
        """Independent samples, float32, from a CPU generator."""
        weights, means = torch.tensor(self.weights), torch.tensor(self.means)
        component = weights.multinomial(n, replacement=True, generator=generator)
        return means[component] + self.std * torch.randn(n, self.n_dims, generator=generator)

    def _components(
        self, schedule: GaussianSchedule, x_t: Float[Tensor, "B D"], t: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B k"], Float[Tensor, " B"], Float[Tensor, "B k D"]]:
        """log weight_k - |x_t - alpha_t mean_k|^2 / 2 D_t; D_t; alpha_t mean_k."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = (alpha**2 * self.std**2 + sigma**2).to(x_t)
        means = x_t.new_tensor(self.means) * alpha.to(x_t)[:, None, None]
        apart = (x_t[:, None] - means).square().sum(2)
        log_joint = x_t.new_tensor(self.weights).log() - apart / (2 * variance[:, None])
        return log_joint, variance, means


class MixtureNetwork(nn.Module):
    """The exact score of a mixture plus alpha_t F(x_t, t), where F has two layers and starts at 0.

    What the network takes x_t for, hat x_0, is moved by sigma_t^2 F: as much as F says at any
    noise, though alpha_t be small. The best correction grad V* / beta is of that size too.

    Args:
        mixture: what it generates before it is trained, up to the solver's error.
        schedule: the noise.
        prediction: what it says.
        width: of the hidden layers.
        generator: a CPU generator; draws the weights.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        *,
        schedule: GaussianSchedule,
        prediction: Prediction,
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.schedule: GaussianSchedule = schedule
        self.prediction: Prediction = prediction
        self.into = nn.Linear(mixture.n_dims + N_TIMES, width)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, mixture.n_dims)
        draw_weights(self, generator)
        nn.init.zeros_(self.out.weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.mixture.n_dims,)

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        """The output at x_t and t; ``inputs`` play no part."""
        weight = self.into.weight
        h = torch.cat([x_t.to(weight), time_features(t.to(weight))], 1)
        h = nn.functional.silu(self.hidden(nn.functional.silu(self.into(h))))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        correction = alpha.to(x_t)[:, None] * self.out(h).to(x_t)
        score = self.mixture.score(self.schedule, x_t, t) + correction
        return convert_prediction(score, x_t, alpha, sigma, source="score", target=self.prediction)
