"""Schedules of Gaussian noise: values by hand, their equation, their integrals, their errors."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rescore.processes.gaussian_schedules import (
    DiscreteTable,
    GaussianSchedule,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)

VP = VariancePreserving()
SD_TABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
SD = DiscreteTable(SD_TABLE, final=float(SD_TABLE[0]))
"""Stable Diffusion's noise."""
SCHEDULES = (VP, VarianceExploding(), RectifiedFlow(), SD)
T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def at(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_values_by_hand():
    """VP: n(1) = .1 + 19.9 / 2; VE: sqrt(.01 50); a flow at 1/4; a table of .9, .5 from 1."""
    assert float(VP.alpha(at(1.0))) == pytest.approx(math.exp(-10.05 / 2))
    assert float(VP.beta(at(0.5))) == pytest.approx(10.05)
    assert float(VarianceExploding(0.01, 50.0).sigma(at(0.5))) == pytest.approx(math.sqrt(0.5))
    assert float(RectifiedFlow().alpha(at(0.25))) == 0.75
    assert float(RectifiedFlow().g2(at(0.25))) == pytest.approx(2 / 3)
    table = DiscreteTable(torch.tensor([0.9, 0.5], dtype=torch.float64))
    torch.testing.assert_close(
        table.alpha(torch.tensor([0, 0.5, 1.0], dtype=torch.float64)) ** 2,
        torch.tensor([1, 0.9, 0.5], dtype=torch.float64),
    )
    assert float(table.beta(at(0.5))) == pytest.approx(-2 * math.log(0.9))  # the interval below
    assert float(table.beta(at(0.51))) == pytest.approx(-2 * math.log(0.5 / 0.9))
    assert float(table.alpha(at(0.75))) ** 2 == pytest.approx(math.sqrt(0.9 * 0.5))


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_equation_and_amplitudes_agree(schedule: GaussianSchedule):
    """f = (log alpha)', g^2 = (sigma^2)' - 2 f sigma^2 = -sigma^2 (log SNR)', by autograd."""
    t = T.clone().requires_grad_()
    (d_log_alpha,) = torch.autograd.grad(schedule.alpha(t).log().sum() + 0 * t.sum(), t)
    (d_variance,) = torch.autograd.grad((schedule.sigma(t) ** 2).sum(), t)
    (d_log_snr,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(schedule.drift(T), d_log_alpha)
    variance = schedule.sigma(T) ** 2
    torch.testing.assert_close(schedule.g2(T), d_variance - 2 * schedule.drift(T) * variance)
    torch.testing.assert_close(schedule.g2(T), -variance * d_log_snr)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_g2_integral_is_the_integral(schedule: GaussianSchedule):
    """By quadrature; over the table entry by entry, where g^2 is constant in between."""
    low, high = 0.2, 0.25
    if schedule is SD:
        t = SD.time_of(torch.arange(200, 250))
        expected = SD.g2(t).sum() / 1000
    else:
        nodes, weights = np.polynomial.legendre.leggauss(20)
        half = (high - low) / 2
        rate = schedule.g2(low + half * (torch.tensor(nodes) + 1))
        expected = (half * torch.tensor(weights) * rate).sum()
    torch.testing.assert_close(schedule.g2_integral(at(low), at(high))[0], expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr(schedule: GaussianSchedule):
    """log(alpha^2 / sigma^2), falling."""
    log_snr = schedule.log_snr(T)
    expected = 2 * torch.log(schedule.alpha(T) / schedule.sigma(T))
    torch.testing.assert_close(log_snr, expected)
    assert bool((log_snr.diff() < 0).all())


def test_table_has_its_entries():
    """time_of names them, also in float32; the last time is pure data or the first entry."""
    entries = torch.tensor([0, 1, 500, 998, 999])
    for t in (SD.time_of(entries), SD.time_of(entries).float()):
        torch.testing.assert_close(SD.alpha(t) ** 2, SD_TABLE[entries], rtol=1e-12, atol=0)
        slope = -1000 * torch.log(SD_TABLE[entries[1:]] / SD_TABLE[entries[1:] - 1])
        torch.testing.assert_close(SD.beta(t)[1:], slope)
    assert float(SD.time_of(torch.tensor(-1))) == 0
    assert float(SD.sigma(at(0.0))) == pytest.approx(math.sqrt(1 - float(SD_TABLE[0])))
    clean = DiscreteTable(SD_TABLE)
    assert float(clean.sigma(at(0.0))) == 0 and float(clean.log_snr(at(0.0))) == math.inf
    blind = DiscreteTable(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    assert float(blind.alpha(at(1.0))) == 0
    assert float(blind.alpha(at(2 / 3))) ** 2 == pytest.approx(0.5)


def test_bad_schedules_and_times_are_errors():
    with pytest.raises(ValueError, match=r"beta runs from 3\.0 to 2\.0"):
        VariancePreserving(3.0, 2.0)
    with pytest.raises(ValueError, match=r"sigma runs from 0\.0 to 2\.0"):
        VarianceExploding(0.0, 2.0)
    with pytest.raises(ValueError, match="alphas_cumprod must fall"):
        DiscreteTable(torch.tensor([0.5, 0.9]))
    with pytest.raises(ValueError, match="alphas_cumprod must fall"):
        DiscreteTable(torch.tensor([1.0, 0.9]))
    with pytest.raises(ValueError, match=r"final is 0\.8.*alphas_cumprod\[0\] = 0\.899"):
        DiscreteTable(torch.tensor([0.9, 0.5]), final=0.8)
    for schedule in SCHEDULES:
        with pytest.raises(TypeError, match=r"dtype torch\.int64"):
            schedule.alpha(torch.tensor([1]))
