"""KL of whole paths from what was recorded."""

from __future__ import annotations

import pytest
import torch

from rescore.evaluation.path_kl import path_kl
from rescore.models.mixture import MixtureNetwork
from rescore.processes.gaussian_schedules import VariancePreserving
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.tasks.mixture import THREE_MODES

N = 5


def policies(decoder: GaussianDecoder) -> tuple[GaussianPolicy, GaussianPolicy]:
    """One whose correction is not 0, and the pretrained one."""
    made = []
    for weight in (0.3, 0.0):
        network = MixtureNetwork(
            THREE_MODES.mixture,
            schedule=VariancePreserving(),
            prediction="eps",
            width=8,
            generator=torch.Generator().manual_seed(0),
        ).double()
        torch.nn.init.constant_(network.out.weight, weight)
        made.append(GaussianPolicy(network, decoder))
    return made[0], made[1]


@pytest.mark.parametrize(
    "decoder",
    [
        GaussianDecoder(steps=4),
        GaussianDecoder(steps=4, solver="euler_maruyama", t_min=0.1),
        GaussianDecoder(steps=4, solver="dpm_solver_2m_sde"),
        GaussianDecoder(steps=4, window=(1, 3)),
    ],
    ids=lambda decoder: decoder.solver,
)
def test_it_is_the_sum_of_the_kls_of_the_steps(decoder):
    """As every transition gives it, outputs of both policies computed anew; 0 to oneself."""
    policy, reference = policies(decoder)
    index = torch.arange(N)
    prompts = THREE_MODES.prompts("test", index)
    path = policy.sample(prompts, Record(moves="all", outputs=True), SampleRng(3, index))
    total = torch.zeros(N, dtype=torch.float64)
    with torch.no_grad():
        for k in range(decoder.steps):
            step = torch.full((N,), k)
            seen = [p.transition(path, step, Score()) for p in (policy, reference)]
            total += seen[0].kl(seen[1])
    assert bool((total > 1e-3).all())
    torch.testing.assert_close(path_kl(reference, path), total)
    assert float(path_kl(policy, path).max()) < 1e-20


@pytest.mark.parametrize("solver", ["dpm_solver_2m_sde", "heun"])
def test_the_continuous_kl_is_the_rate_held_over_every_step(solver):
    """Of a solver without noise too; |a - a_ref|^2 / sigma^2 = |score - score_ref|^2 for eps."""
    policy, reference = policies(GaussianDecoder(steps=3, solver=solver))
    index = torch.arange(N)
    prompts = THREE_MODES.prompts("test", index)
    path = policy.sample(prompts, Record(moves="all", outputs=True), SampleRng(3, index))
    schedule, total = policy.network.schedule, torch.zeros(N, dtype=torch.float64)
    with torch.no_grad():
        for k in range(3):
            t, s = policy.times[k], policy.times[k + 1]
            said = [
                p.network.predict(path.path[:, k], t.expand(N), {}) / schedule.sigma(t)
                for p in (policy, reference)
            ]
            gap = (said[0] - said[1]).square().sum(1)
            total += 0.5 * schedule.g2_integral(s, t) * gap
    torch.testing.assert_close(path_kl(reference, path, "continuous"), total)


def test_paths_without_a_kl_are_refused():
    """A solver without noise, and a path that kept no outputs."""
    _, reference = policies(GaussianDecoder(steps=2))
    index = torch.arange(N)
    prompts = THREE_MODES.prompts("test", index)
    path = reference.sample(prompts, Record(moves="all"), SampleRng(3, index))
    with pytest.raises(ValueError, match="no outputs"):
        path_kl(reference, path)
    _, quiet = policies(GaussianDecoder(steps=2, solver="heun"))
    path = quiet.sample(prompts, Record(moves="all", outputs=True), SampleRng(3, index))
    with pytest.raises(ValueError, match="heun draw no noise"):
        path_kl(quiet, path)
