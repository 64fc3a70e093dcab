"""What a critic makes of the states of given paths."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.value import ValueCritic, coefficients
from rescore.processes.convert import convert_prediction
from rescore.sampling.chunks import over_rows
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.reference import path_outputs
from rescore.types import GaussianTrajectory, State

GRAPH = 8
"""A forward with a graph takes about this many times the memory of one without."""


def visited(
    policy: GaussianPolicy,
    path: GaussianTrajectory,
    sample: Int[Tensor, " n"],
    step: Int[Tensor, " n"],
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, " n"], Mapping[str, Tensor]]:
    """What a critic is told of some paths before some steps: state, time and inputs.

    After the last step the time is 0: whatever the solver ends at, that is what rewards judge.
    """
    x = _with_past(policy, path, sample, step, path.path[sample, step])
    return x, *_beside(policy, path, sample, step)


@torch.no_grad()
def path_values(
    policy: GaussianPolicy, critic: ValueCritic, path: GaussianTrajectory
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
    """V before every step, and r(hat x_0) there unless the critic has no use for it.

    Where c_skip is 0, at the noise end, nothing is judged.

    Args:
        policy: says what states stand for, unless the path has its outputs.
        critic: of that reward.
        path: recorded with its states.
    """
    n_steps, times = path.n_steps, policy.times.to(path.path.device)
    judged = coefficients(critic.design, times)[0][:n_steps] > 1e-6
    said = path.output
    if said is None and critic.reward is not None:
        said = path_outputs(policy, path)

    def part(rows: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        sample, k = _split(rows, n_steps, times)
        x, t, inputs = visited(policy, path, sample, k)
        skip = None
        if critic.reward is not None:
            assert said is not None
            some, skip = judged[k].nonzero()[:, 0], torch.zeros_like(t).to(x)
            if len(some):
                x_t = path.path[sample[some], k[some]]
                hat = _stands_for(policy, said[sample[some], k[some]], x_t, t[some])
                seen = critic.reward(policy.finished(hat), path.prompts.take(sample[some]))
                skip = skip.index_copy(0, some, seen.to(x))
        value = critic.value(x, t, inputs, skip)
        return value, value if skip is None else skip

    parts = over_rows(part, len(path.x_0) * n_steps, at_most=policy.forward_rows)
    value, skip = (torch.cat(column).view(-1, n_steps) for column in zip(*parts, strict=True))
    return value, None if critic.reward is None else skip


def path_slopes(
    policy: GaussianPolicy,
    critic: ValueCritic,
    path: GaussianTrajectory,
    step: Int[Tensor, "B K"],
    *,
    after: bool,
    through_network: bool,
) -> Float[Tensor, "B K *shape"]:
    """grad V in x, at the state before given steps or after them; the state before that is held.

    Args:
        policy: a part of its ``forward_rows`` at a time, fewer for the graph.
        critic: of a reward that is differentiable, or of design ``plain``.
        path: recorded with its states and outputs.
        step: of each path.
        after: at the state that the step reaches.
        through_network: also of what the network says there; otherwise that is held, and hat x_0
            changes by 1 / alpha_t per x.

    Raises:
        ValueError: the reward of a sample has no gradient.
    """
    assert path.output is not None
    n_steps, said, times = path.n_steps, path.output, policy.times.to(path.path.device)

    def part(rows: Int[Tensor, " n"]) -> Tensor:
        sample, column = _split(rows, step.shape[1], times)
        k = step[sample, column] + int(after)
        t, inputs = _beside(policy, path, sample, k)
        x, skip = path.path[sample, k].requires_grad_(), None
        if critic.reward is not None:
            output = said[sample, k.clamp(max=n_steps - 1)]
            if through_network:
                output = policy.network.predict(x, t.to(x), inputs)
            noisy = torch.where(k < n_steps, t, times[0])  # any time with noise, at the end
            end = (k == n_steps).view(-1, *(1,) * (x.ndim - 1))
            hat = torch.where(end, x, _stands_for(policy, output, x, noisy))
            skip = critic.reward(policy.finished(hat), path.prompts.take(sample))
            if not skip.requires_grad:
                raise ValueError(
                    f"the gradient of the value with design='{critic.design}' is that of the "
                    f"reward, which does not reach the sample (a black box, or a decoder in "
                    f"between); use design='plain'"
                )
        value = critic.value(_with_past(policy, path, sample, k, x), t, inputs, skip)
        (slope,) = torch.autograd.grad(value.sum(), x)
        return slope

    with torch.enable_grad():
        parts = over_rows(part, step.numel(), at_most=max(1, policy.forward_rows // GRAPH))
    return torch.cat(parts).view(*step.shape, *path.x_0.shape[1:])


def _split(rows: Int[Tensor, " n"], n_columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and column of numbers that run over columns first."""
    return (rows // n_columns).to(like.device), (rows % n_columns).to(like.device)


def _beside(
    policy: GaussianPolicy,
    path: GaussianTrajectory,
    sample: Int[Tensor, " n"],
    step: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Mapping[str, Tensor]]:
    """Time and inputs of some paths before some steps."""
    times = policy.times.to(step.device)
    t = torch.where(step < path.n_steps, times[step], 0.0)
    return t, {name: value[sample] for name, value in path.prompts.inputs.items()}


def _with_past(
    policy: GaussianPolicy,
    path: GaussianTrajectory,
    sample: Int[Tensor, " n"],
    step: Int[Tensor, " n"],
    x: State,
) -> Float[Tensor, "B ..."]:
    """x before some steps; of two-step solvers with the state before, in the first dimension."""
    if not policy.decoder.two_step:
        return x
    return torch.cat([x, path.path[sample, (step - 1).clamp(min=0)]], 1)


def _stands_for(policy: GaussianPolicy, a: State, x: State, t: Float[Tensor, " N"]) -> State:
    """hat x_0, what the network takes each state for."""
    schedule = policy.network.schedule
    return convert_prediction(
        a, x, schedule.alpha(t), schedule.sigma(t), source=policy.network.prediction, target="x_0"
    )
