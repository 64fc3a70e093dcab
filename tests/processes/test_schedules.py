"""Schedules: boundary values, derivative, inverse, weight; and the noise of rate processes."""

import itertools
import math

import pytest
import torch

from rescore.processes.schedules import Cosine, CosineNoise, Geometric, Linear, LogLinear

BOTH = (Linear(), Cosine())
T = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)


def test_values_by_hand():
    """At t = 1/3 a linear schedule keeps 2/3 of the tokens, the cosine one cos 30 degrees."""
    third = torch.tensor([1 / 3], dtype=torch.float64)
    torch.testing.assert_close(Linear().alpha(third), torch.tensor([2 / 3]).double())
    torch.testing.assert_close(Cosine().alpha(third), torch.tensor([math.sqrt(3) / 2]).double())
    torch.testing.assert_close(Linear().weight(third), torch.tensor([3.0]).double())


@pytest.mark.parametrize("schedule", BOTH)
def test_runs_from_data_to_all_masked(schedule):
    """alpha(0) = 1, alpha(1) = 0 and it falls in between."""
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert bool((schedule.alpha(T).diff() < 0).all())


@pytest.mark.parametrize("schedule", BOTH)
def test_d_alpha_is_the_derivative_of_alpha(schedule):
    """Central differences of alpha, to their own accuracy of h^2."""
    h = 1e-5
    difference = (schedule.alpha(T + h) - schedule.alpha(T - h)) / (2 * h)
    torch.testing.assert_close(schedule.d_alpha(T), difference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", BOTH)
def test_inverse_undoes_alpha(schedule):
    """inverse(alpha(t)) = t and alpha(inverse(a)) = a."""
    torch.testing.assert_close(schedule.inverse(schedule.alpha(T)), T)
    torch.testing.assert_close(schedule.alpha(schedule.inverse(T)), T)


@pytest.mark.parametrize("schedule", BOTH)
def test_weight_is_the_hazard_of_revealing(schedule):
    """weight = -alpha' / (1 - alpha)."""
    expected = -schedule.d_alpha(T) / (1 - schedule.alpha(T))
    torch.testing.assert_close(schedule.weight(T), expected)


@pytest.mark.parametrize("schedule", BOTH)
def test_weight_keeps_its_digits_near_the_data(schedule):
    """At t = 1e-4 float32 is right to 1e-6, where 1 - cos would have lost most of its digits."""
    t = torch.tensor([1e-4])
    torch.testing.assert_close(
        schedule.weight(t).double(), schedule.weight(t.double()), rtol=1e-6, atol=0
    )


# ---- noise of processes with rates ---------------------------------------------------------------

NOISES = (LogLinear(), LogLinear(0.3), Geometric(), Geometric(0.2, 3.0), CosineNoise())


def test_total_noise_by_hand():
    """Survival at t = 1/3: 1 - 0.9/3 = .7 and .1 + .9 cos 30; 1 * 8^(1/3) = 2 for the geometric."""
    third = torch.tensor([1 / 3], dtype=torch.float64)
    survival = torch.exp(-LogLinear(0.1).total_noise(third))
    torch.testing.assert_close(survival, torch.tensor([0.7]).double())
    survival = torch.exp(-CosineNoise(0.1).total_noise(third))
    torch.testing.assert_close(survival, torch.tensor([0.1 + 0.9 * math.sqrt(3) / 2]).double())
    torch.testing.assert_close(Geometric(1.0, 8.0).total_noise(third), torch.tensor([2.0]).double())


@pytest.mark.parametrize("noise", NOISES)
def test_total_noise_grows_from_its_low_end_to_its_high_end(noise):
    """From 0 to -log eps; the geometric one from low to high."""
    low, high = (
        (noise.low, noise.high) if isinstance(noise, Geometric) else (0, -math.log(noise.eps))
    )
    ends = noise.total_noise(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([low, high], dtype=torch.float64))
    assert bool((noise.total_noise(T).diff() > 0).all())


@pytest.mark.parametrize("noise", NOISES)
def test_rate_is_the_derivative_of_total_noise(noise):
    """Central differences, to their own accuracy of h^2; and autograd."""
    h = 1e-5
    difference = (noise.total_noise(T + h) - noise.total_noise(T - h)) / (2 * h)
    torch.testing.assert_close(noise.rate(T), difference, rtol=1e-6, atol=1e-9)
    t = T.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(noise.total_noise(t).sum(), t)
    torch.testing.assert_close(noise.rate(T), derivative)


def test_without_eps_they_are_the_masking_schedules():
    """exp(-n(t)) = eps + (1 - eps) alpha(t), for alpha linear and cosine."""
    for noise, schedule in ((LogLinear(0.01), Linear()), (CosineNoise(0.01), Cosine())):
        survival = torch.exp(-noise.total_noise(T))
        torch.testing.assert_close(survival, 0.01 + 0.99 * schedule.alpha(T))


@pytest.mark.parametrize(
    "noise", [*NOISES, LogLinear(math.exp(-20)), CosineNoise(math.exp(-20)), Geometric(1e-5, 20.0)]
)
def test_noise_keeps_its_digits_in_float32(noise):
    """The same times in float32 and float64: right to 5e-6, from noise 1e-4 to noise 20."""
    t = torch.cat([torch.tensor([1e-4, 1e-2]), torch.linspace(0.1, 1, 19)])
    for function in (noise.total_noise, noise.rate):
        assert function(t).dtype == torch.float32
        torch.testing.assert_close(function(t).double(), function(t.double()), rtol=5e-6, atol=0)
    assert noise.total_noise(t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("noise", NOISES)
def test_integer_times_are_an_error(noise):
    """x.new_full((B,), t) with tokens x makes every t a 0; better to stop."""
    tokens = torch.zeros(3, dtype=torch.long)
    for function in (noise.total_noise, noise.rate):
        with pytest.raises(TypeError, match="times have dtype torch.int64"):
            function(tokens.new_full((3,), 0.7))


def test_bounds_of_noises_are_checked():
    for kind, eps in itertools.product((LogLinear, CosineNoise), (0.0, 1.0, -0.1, math.nan)):
        with pytest.raises(ValueError, match="eps is"):
            kind(eps)
    for low, high in ((0.0, 1.0), (2.0, 2.0), (3.0, 2.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="it must grow between two positive numbers"):
            Geometric(low, high)
