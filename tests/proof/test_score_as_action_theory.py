"""T7 of Score as Action's theory: increments of the value against the advantage in closed form.

Its other identities are properties of processes, in tests/processes/test_gaussian.py (T1 to T6, T8
and T9); what whole estimators are is in test_verify_gaussian.py. All moments here are exact: V is
quadratic in x and the states are normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rescore.processes.gaussian import AffineStep, mean, step_advantage
from rescore.processes.gaussian_schedules import VariancePreserving
from rescore.proof import gaussian_worlds
from rescore.proof.gaussian_oracle import N_NODES, nodes
from rescore.proof.gaussian_worlds import GaussianWorld


@dataclass(frozen=True, kw_only=True)
class PaperWorld(GaussianWorld):
    """The usual noise, down to the data."""

    solver: gaussian_worlds.Solver = "euler_maruyama"
    t_min: float = 0.0

    @property
    def schedule(self) -> VariancePreserving:
        return VariancePreserving()


def increments(n_steps: int, monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """V_{k+1} - V_k, its closed form, and probabilities, at all steps of the pretrained chain.

    V is that of the chain itself.
    """
    monkeypatch.setattr(gaussian_worlds, "POLICY", (0.0, 0.0, 0.0))
    world = PaperWorld(steps=n_steps)
    policy, critic = world.policy((0.0, 0.0, 0.0))[0], world.critic()
    z, weight = nodes()
    own, noise = (part.flatten()[:, None] for part in torch.meshgrid(z, z, indexing="ij"))
    m, v = torch.zeros(1).double(), torch.ones(1).double()
    by_value, closed = [], []
    for k in range(n_steps):
        t, s, step = policy.times[[k]], policy.times[[k + 1]], policy.steps.take(slice(k, k + 1))
        assert isinstance(step, AffineStep)
        with torch.no_grad():
            x_t = (m + v.sqrt() * own).requires_grad_()
            a = policy.network.predict(x_t, t.expand(len(x_t)), {})
            x_s = mean(step, x_t, a) + step.std * noise
            end = critic.value(x_s, s.expand(len(x_s)), {}, None)
        start = critic.value(x_t, t.expand(len(x_t)), {}, None)
        (slope,) = torch.autograd.grad(start.sum(), x_t)
        by_value.append(end - start.detach())
        closed.append(step_advantage(step, x_t.detach(), a, a, x_s, slope).reward)
        both = torch.tensor([[0.0], [1.0]]).double()
        with torch.no_grad():
            at_0, at_1 = mean(step, both, policy.network.predict(both, t.expand(2), {}))[:, 0]
        m, v = at_0 + (at_1 - at_0) * m, (at_1 - at_0) ** 2 * v + step.std**2
    probability = torch.outer(weight, weight).flatten()
    return torch.stack(by_value), torch.stack(closed), probability


def covariance(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    """Over all steps alike."""
    mean_of = [(part @ probability).mean() for part in (first, second)]
    return ((first * second) @ probability).mean() - mean_of[0] * mean_of[1]


def test_increments_of_the_value_tend_to_the_closed_form(monkeypatch):
    """T7, with the value of the chain itself: .959 and 5.4 times the variance at N = 10."""
    correlation, ratio = {}, {}
    for n_steps in (10, 20, 50, 100):
        by_value, closed, p = increments(n_steps, monkeypatch)
        for part in (by_value, closed):
            assert float((part.view(n_steps, N_NODES, N_NODES) @ nodes()[1]).abs().max()) < 1e-9
        variances = [covariance(part, part, p) for part in (by_value, closed)]
        both = covariance(by_value, closed, p)
        correlation[n_steps] = float(both / (variances[0] * variances[1]).sqrt())
        ratio[n_steps] = float(variances[0] / variances[1])
    assert correlation[10] == pytest.approx(0.959, abs=5e-4)
    assert ratio[10] == pytest.approx(5.4, abs=0.05)
    assert correlation[50] > 0.99
    missing = [1 - value for value in correlation.values()]
    assert missing == sorted(missing, reverse=True)
