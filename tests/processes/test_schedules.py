"""Masking schedules: boundary values, derivative, inverse, weight."""

import math

import pytest
import torch

from rescore.processes.schedules import Cosine, Linear

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
