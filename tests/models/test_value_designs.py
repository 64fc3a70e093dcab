"""Which design of a critic learns fastest, where the value of every noised sample is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gaussians import gaussian_path
from rescore.models.mixture import MixtureNetwork
from rescore.models.value import Design, value_critic_for
from rescore.processes.gaussian_schedules import VariancePreserving
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.sampling.values import path_values, visited
from rescore.tasks.mixture import THREE_MODES, optimum
from rescore.types import GaussianTrajectory

TASK = replace(THREE_MODES, slope=(0.0, 0.0), curvature=1.0, centre=(1.5, 0.0))
"""r = -|x - (1.5, 0)|^2 / 2: by Jensen r(hat x_0) is too high wherever x_0 is uncertain."""
TRUTH = optimum(TASK, beta=1e6)
"""V* = beta log E[exp(r / beta) | x_t], which for so large a beta is E[r | x_t] to 1e-5."""
STEPS, BATCH, SEEDS = 20, 400, 3
N_FIT, N_HELD = 50 * BATCH // STEPS, 500
"""Paths: as many as 50 batches take, so that every state is seen once."""


def rollouts(policy: GaussianPolicy, n: int, seed: int) -> GaussianTrajectory:
    prompts = TASK.prompts("train", torch.arange(n))
    rng = SampleRng(seed, prompts.sample_id)
    return gaussian_path(policy.sample(prompts, Record(moves="all", outputs=True), rng))


def squared_errors(policy: GaussianPolicy, design: Design, seed: int) -> Tensor:
    """Of V after 50 steps of Adam, the mean before every step of paths it was not fitted to."""
    path, held = rollouts(policy, N_FIT, seed), rollouts(policy, N_HELD, SEEDS + seed)
    reward = None if design == "plain" else TASK.reward.value
    critic = value_critic_for((2,), {}, n_labels=0, design=design, reward=reward, seed=seed)
    _, skip = path_values(policy, critic, path)
    sample = torch.arange(N_FIT).repeat_interleave(STEPS)
    step = torch.arange(STEPS).repeat(N_FIT)
    critic.fit(
        lambda rows: visited(policy, path, sample[rows], step[rows]),
        None if skip is None else skip.flatten(),
        TASK.judge(path.x_0, path.prompts)[sample],
        lr=3e-3,
        epochs=1,
        batch=BATCH,
    )
    value, _ = path_values(policy, critic, held)
    x_t, t = held.path[:, :-1].flatten(0, 1).double(), policy.times[:-1].repeat(N_HELD)
    expected = TRUTH.value(policy.network.schedule, x_t, t).view(N_HELD, STEPS)
    return (value - expected).square().mean(0)


@pytest.mark.parametrize("solver", ["euler_maruyama", "ddim"])
def test_designs_that_judge_what_states_stand_for_learn_faster(solver):
    """Rollouts of the pretrained model, their rewards as targets, 50 steps for each: the error is
    below that of the plain design, and in the six steps at the data end far below it."""
    network = MixtureNetwork(
        TASK.mixture,
        schedule=VariancePreserving(),
        prediction="eps",
        width=4,
        generator=torch.Generator().manual_seed(0),
    )
    policy = GaussianPolicy(network, GaussianDecoder(steps=STEPS, solver=solver))

    def errors(design: Design) -> tuple[float, float]:
        steps = torch.stack([squared_errors(policy, design, k) for k in range(SEEDS)]).mean(0)
        return float(steps.mean()), float(steps[-6:].mean())

    plain, plain_end = errors("plain")
    for design in ("cos_sin", "linear", "constant"):
        error, error_end = errors(design)
        assert error < 0.6 * plain, design
        assert error_end < 0.3 * plain_end, design
