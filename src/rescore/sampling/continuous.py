"""Samples a path of a process with Gaussian noise: any solver, random or not, one loop."""

from __future__ import annotations

import torch

from rescore.models.gaussian_network import GaussianNetwork
from rescore.processes.gaussian import (
    AffineStep,
    DeterministicTwoStep,
    HeunStep,
    TwoStep,
    mean,
    step_log_prob,
)
from rescore.processes.gaussian_schedules import VarianceExploding
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.record import Record
from rescore.sampling.rng import Rng, Stream
from rescore.types import Conditions, GaussianTrajectory, State


def start_of(network: GaussianNetwork, decoder: GaussianDecoder) -> float:
    """Standard deviation of the noise a path starts from: 1, or sigma of an exploding schedule."""
    schedule = network.schedule
    if not isinstance(schedule, VarianceExploding):
        return 1.0
    return float(schedule.sigma(decoder.times(schedule)[0]))


def sample_gaussian(
    network: GaussianNetwork,
    decoder: GaussianDecoder,
    prompts: Conditions,
    record: Record,
    rng: Rng,
    dtype: torch.dtype,
) -> GaussianTrajectory:
    """Run the solver from noise to a sample.

    Network rows: T forwards of B states, 2 T - 1 with ``heun``. Memory: two states, scalars per
    step, and the states and outputs that ``record`` keeps. The caller decides about gradients.

    Args:
        network: says what a state stands for.
        decoder: solver and times.
        prompts: what the samples are made under.
        record: ``moves`` other than 0 keeps the states, ``outputs`` what the network said of them.
        rng: of the samples.
        dtype: of the states.
    """
    n_samples, device = prompts.n_samples, prompts.sample_id.device
    where = torch.arange(torch.Size(network.shape).numel(), device=device).expand(n_samples, -1)

    def normal(stream: Stream, step: int) -> State:
        return rng.normal(stream, step, where).to(dtype).view(n_samples, *network.shape)

    def predict(x: State, k: int) -> State:
        return network.predict(x, t[k].to(dtype).expand(n_samples), prompts.inputs)

    t = decoder.times(network.schedule).to(device)
    steps = decoder.solve(network.schedule, network.prediction).to(device)
    is_random = [False] * decoder.steps
    if isinstance(steps, AffineStep | TwoStep):
        is_random = steps.is_random.tolist()
    x = start_of(network, decoder) * normal(Stream.START, 0)
    x_before, a_before = x, None
    path, outputs = [x], []
    log_prob = torch.zeros((n_samples, decoder.steps), dtype=torch.float64, device=device)
    for k in range(decoder.steps):
        step, a = steps.take(slice(k, k + 1)), predict(x, k)
        if isinstance(step, HeunStep):
            moved = mean(step.guess, x, a)
            if bool(step.on_a_guess.any()):  # not where the guess is final
                moved = step.corrected(x, a, moved, predict(moved, k + 1))
        else:
            past = {}
            if isinstance(step, TwoStep | DeterministicTwoStep):  # a first step ignores its past
                past = {"x_before": x_before, "a_before": a if a_before is None else a_before}
            moved = mean(step, x, a, **past)
            if is_random[k]:
                assert isinstance(step, AffineStep | TwoStep)
                moved = (moved + step.std.to(dtype) * normal(Stream.NOISE, k)).to(dtype)
                log_prob[:, k] = step_log_prob(step, x, a, moved, **past)
        x_before, a_before, x = x, a, moved.to(dtype)
        path += [x] if record.moves else []
        outputs += [a] if record.outputs else []
    return GaussianTrajectory(
        prompts=prompts,
        x_0=x,
        log_prob=log_prob,
        path=torch.stack(path, 1) if record.moves else x[:, None][:, :0],
        first=torch.zeros_like(prompts.sample_id),
        output=torch.stack(outputs, 1).to(dtype) if record.outputs else None,
        random=torch.tensor(is_random, device=device).expand(n_samples, -1),
    )
