"""Gaussian mixtures under noise, and the network that starts from their score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rescore.models.gaussian_network import GaussianNetwork
from rescore.models.mixture import GaussianMixture, MixtureNetwork
from rescore.processes.convert import Prediction, convert_prediction
from rescore.processes.gaussian_schedules import (
    GaussianSchedule,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)

SCHEDULES: tuple[GaussianSchedule, ...] = (
    VariancePreserving(),
    VarianceExploding(sigma_max=5.0),
    RectifiedFlow(),
)
PLANE = GaussianMixture(
    weights=(0.5, 0.3, 0.2), means=((-1.5, 0.0), (1.5, 0.0), (0.0, 2.0)), std=0.3
)
LINE = GaussianMixture(weights=(0.25, 0.75), means=((-0.8,), (1.1,)), std=0.4)


def points(mixture: GaussianMixture, n: int = 6) -> tuple[Tensor, Tensor]:
    """States and times that are no round numbers, float64."""
    generator = torch.Generator().manual_seed(5)
    x = 1.3 * torch.randn(n, mixture.n_dims, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.03, 0.97, n, dtype=torch.float64)


def network(prediction: Prediction = "score", schedule: GaussianSchedule = SCHEDULES[0]):
    generator = torch.Generator().manual_seed(0)
    return MixtureNetwork(
        PLANE, schedule=schedule, prediction=prediction, width=16, generator=generator
    ).double()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("mixture", [PLANE, LINE], ids=["plane", "line"])
def test_the_score_is_the_gradient_of_the_density(schedule, mixture):
    """To 1e-12, at every noise."""
    x, t = points(mixture)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(mixture.log_density(schedule, x, t).sum(), x)
    score = mixture.score(schedule, x, t)
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_noised_density_is_a_convolution(schedule):
    """p_t(x) is the integral of p_0(x_0) N(x; alpha_t x_0, sigma_t^2), by the trapezium rule."""
    x, t = points(LINE)
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    clean = LINE.log_density(VariancePreserving(), grid[:, None], torch.zeros_like(grid)).exp()
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    kernel = torch.distributions.Normal(alpha * grid, sigma).log_prob(x).exp()
    integral = torch.trapezoid(kernel * clean, grid)
    torch.testing.assert_close(LINE.log_density(schedule, x, t).exp(), integral, rtol=1e-9, atol=0)


def test_the_density_in_the_plane_sums_to_one():
    """At two noises, over a grid that covers it."""
    line = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    for time in (0.1, 0.9):
        t = torch.full((len(grid),), time, dtype=torch.float64)
        mass = PLANE.log_density(SCHEDULES[0], grid, t).exp().sum() * (line[1] - line[0]) ** 2
        assert float(mass) == pytest.approx(1, abs=1e-6)


def test_drawn_samples_have_the_moments_of_the_mixture():
    """Mean and covariance within 5 standard errors; the same samples for the same seed."""
    n = 40_000
    x = PLANE.draw(n, torch.Generator().manual_seed(0)).double()
    weights = torch.tensor(PLANE.weights, dtype=torch.float64)
    means = torch.tensor(PLANE.means, dtype=torch.float64)
    mean = weights @ means
    spread = (weights[:, None] * (means - mean)).T @ (means - mean)
    spread = spread + PLANE.std**2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=5 * 1.3 / n**0.5)
    torch.testing.assert_close(x.T.cov(), spread, rtol=0, atol=5 * 2.2 / n**0.5)
    assert torch.equal(x.float(), PLANE.draw(n, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("prediction", ["score", "eps", "x_0", "v", "flow"])
def test_an_untrained_network_is_exact(prediction):
    """Whatever it predicts, it stands for the score of the mixture."""
    made, (x, t) = network(prediction), points(PLANE)
    assert isinstance(made, GaussianNetwork) and made.shape == (2,)
    alpha, sigma = made.schedule.alpha(t), made.schedule.sigma(t)
    said = convert_prediction(
        made.predict(x, t, {}), x, alpha, sigma, source=prediction, target="score"
    )
    torch.testing.assert_close(said, PLANE.score(made.schedule, x, t))


def test_the_correction_moves_what_a_state_stands_for_by_sigma_squared():
    """hat x_0 moves by sigma_t^2 F, where F is what the layers say: here their last bias."""
    made, (x, t) = network("x_0"), points(PLANE)
    before = made.predict(x, t, {})
    torch.nn.init.constant_(made.out.bias, 0.7)
    moved = made.predict(x, t, {}) - before
    expected = 0.7 * made.schedule.sigma(t)[:, None] ** 2
    torch.testing.assert_close(moved, expected.expand_as(moved))


def test_the_correction_can_learn_from_its_first_gradient():
    """The last layer gets one at once, the others after it; all depend on state and time."""
    made, (x, t) = network(), points(PLANE)
    made.predict(x, t, {}).square().sum().backward()
    assert made.out.weight.grad is not None and bool((made.out.weight.grad != 0).all())
    torch.nn.init.ones_(made.out.weight)
    said = made.predict(x, t, {}) - PLANE.score(made.schedule, x, t)
    shifted = made.predict(x, t / 2, {}) - PLANE.score(made.schedule, x, t / 2)
    per_alpha = said / made.schedule.alpha(t)[:, None]
    other = shifted / made.schedule.alpha(t / 2)[:, None]
    assert bool(((per_alpha - other).abs() > 1e-6).all())
    assert bool((per_alpha.std(0) > 1e-3).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (0.5, 0.3, 0.1)}, "sum to 1"),
        ({"weights": (0.8, 0.4, -0.2)}, "positive"),
        ({"weights": (0.5, 0.5)}, "one for each"),
        ({"means": ((0.0,), (1.0, 1.0), (2.0, 0.0))}, "same dimension"),
        ({"std": 0.0}, "std is 0.0"),
    ],
)
def test_what_is_no_mixture_is_refused(change, message):
    """With what was got and what was expected."""
    given = {"weights": PLANE.weights, "means": PLANE.means, "std": PLANE.std, **change}
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**given)
