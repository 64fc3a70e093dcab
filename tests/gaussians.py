"""A continuous world that trains in milliseconds: Gaussian data, a linear network in float64.

Data are N(mean, std^2 I), so that the exact output of a network is linear in the state; free
parameters th0 + th1 x are added to it. Every law of a sampled path is Gaussian and known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from rescore.processes.convert import Prediction
from rescore.processes.gaussian import AffineStep, TwoStep
from rescore.processes.gaussian_schedules import GaussianSchedule, RectifiedFlow, VariancePreserving
from rescore.rewards.reward import Reward, RewardFunction
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import Policy
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import ContinuousTask, Split, Task
from rescore.training import checkpoint
from rescore.training.base import Base
from rescore.training.log import Console
from rescore.training.loop import train
from rescore.training.optim import Optim
from rescore.training.rollout import rollout
from rescore.training.run import Evaluate, Run
from rescore.training.world import World, load_state
from rescore.types import (
    Conditions,
    Credited,
    GaussianTrajectory,
    Given,
    Points,
    Scored,
    Trajectory,
)
from tiny import tiny_run
from tiny import tiny_world as gaussian_world

MEAN, STD = 0.5, 0.7
"""Of the data, in every coordinate."""
SPLITS = {"train": range(0, 16), "validation": range(16, 22), "test": range(22, 28)}


def level(outputs: Tensor, prompts: Conditions) -> Tensor:
    """The mean of the coordinates."""
    return outputs.flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class GaussianTask(ContinuousTask):
    """Points of N(MEAN, STD^2 I), the larger the better; prompts differ in their number only."""

    dims: int = 2
    """1: a line, 2: a plane."""
    labels: int = 0
    """Values of the input "label", each of which moves the data by 1; 0 = no such input."""
    functions: dict[str, RewardFunction] = field(default_factory=lambda: {"level": level})

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dims,)

    @property
    def n_labels(self) -> int:
        return self.labels

    @property
    def reward(self) -> Reward:
        return Reward(self.functions)

    def size(self, split: Split) -> int:
        return len(SPLITS[split])

    def prompts(self, split: Split, index: Tensor) -> Conditions:
        number, row = index + SPLITS[split][0], torch.arange(len(index))
        inputs = {"label": number % self.labels} if self.labels else {}
        return Conditions(group=row, sample_id=row, info={"number": number}, inputs=inputs)

    def clean(self, split: Split) -> Points:
        generator = torch.Generator().manual_seed(SPLITS[split][0])
        x_0 = MEAN + STD * torch.randn(64, self.dims, generator=generator, dtype=torch.float64)
        if not self.labels:
            return Points(x_0=x_0)
        label = torch.arange(64) % self.labels
        return Points(x_0=x_0 + label[:, None], inputs={"label": label})

    def read(self, texts: Sequence[str]) -> Conditions:
        raise NotImplementedError

    def show(self, sample: Tensor) -> str:
        return " ".join(f"{value:.3f}" for value in sample.tolist())

    def show_prompt(self, prompts: Given, row: int) -> str:
        return f"number {int(prompts.info['number'][row])}"


class LinearNetwork(nn.Module):
    """The exact output for N(mean, std^2 I), plus th0 + th1 x; see ``linear_network``."""

    def __init__(
        self,
        shape: tuple[int, ...],
        mean: float,
        std: float,
        schedule: GaussianSchedule,
        prediction: Prediction,
        theta: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape, self.mean, self.std = shape, mean, std
        self.schedule: GaussianSchedule = schedule
        self.prediction: Prediction = prediction
        self.th0 = nn.Parameter(torch.full(shape, theta[0], dtype=dtype))
        self.th1 = nn.Parameter(torch.full(shape, theta[1], dtype=dtype))

    def predict(self, x_t: Tensor, t: Tensor, inputs: Mapping[str, Tensor], /) -> Tensor:
        """The output at x_t, in its type; an input "label" moves the mean by its value."""
        per_sample = (-1, *(1,) * len(self.shape))
        alpha = self.schedule.alpha(t).view(per_sample)
        sigma = self.schedule.sigma(t).view(per_sample)
        mean = self.mean + (inputs["label"].view(per_sample) if "label" in inputs else 0.0)
        pull = (x_t - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        eps, x_0 = sigma * pull, mean + alpha * self.std**2 * pull
        exact = {
            "score": -pull,
            "eps": eps,
            "x_0": x_0,
            "v": alpha * eps - sigma * x_0,
            "flow": eps - x_0,
        }
        return exact[self.prediction].to(x_t) + self.th0 + self.th1 * x_t


def linear_network(
    shape: tuple[int, ...] = (2,),
    *,
    mean: float = MEAN,
    std: float = STD,
    schedule: GaussianSchedule | None = None,
    prediction: Prediction = "score",
    theta: tuple[float, float] = (0.0, 0.0),
    dtype: torch.dtype = torch.float64,
) -> LinearNetwork:
    """A ``GaussianNetwork`` that is exact for N(mean, std^2 I) at theta = 0.

    Args:
        shape: of a sample; th0 and th1 have an entry for each of its elements.
        mean: of the data.
        std: of the data.
        schedule: the noise; variance preserving unless given.
        prediction: what the output is; th0 + th1 x is added to it whatever it is.
        theta: value of all th0 and of all th1.
        dtype: of the parameters.
    """
    schedule = schedule or VariancePreserving()
    return LinearNetwork(shape, mean, std, schedule, prediction, theta, dtype)


@dataclass(frozen=True, kw_only=True)
class GaussianBase(Base):
    """The linear network of the task's shape; exact unless ``theta`` says otherwise."""

    schedule: GaussianSchedule = field(default_factory=VariancePreserving)
    prediction: Prediction = "score"
    theta: tuple[float, float] = (0.0, 0.0)

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        assert isinstance(task, ContinuousTask)
        network = linear_network(
            task.shape, schedule=self.schedule, prediction=self.prediction, theta=self.theta
        )
        return network.to(device)


def gaussian_run(**changes: Any) -> Run:
    """Four steps of REINFORCE in well under a second; the last of five moves draws no noise."""
    run = tiny_run(
        task=GaussianTask(),
        base=GaussianBase(),
        decoder=GaussianDecoder(steps=5),
        optim=Optim(lr=0.02, warmup=2, micro_batch=64),
    )
    return replace(run, **changes)


SOLVERS: dict[str, dict[str, Any]] = {
    "ddim": {"decoder": GaussianDecoder(steps=5)},
    "window": {"decoder": GaussianDecoder(steps=5, window=(1, 3))},
    "two_steps": {"decoder": GaussianDecoder(steps=5, solver="dpm_solver_2m_sde", t_max=0.95)},
    "flow_sde": {
        "decoder": GaussianDecoder(steps=5, solver="flow_sde", eta=0.7, t_max=0.95),
        "base": GaussianBase(schedule=RectifiedFlow(), prediction="flow"),
    },
}
"""Kinds of random solvers, as changes of a run. All but ``window`` end in a step without noise."""


def gaussian_rollout(run: Run, step: int = 0) -> tuple[World, Scored]:
    """The world of ``run`` and one of its rollouts, sampled, judged and annotated."""
    world = gaussian_world(run)
    return world, rollout(world, step)[0]


def second_rollout(run: Run) -> tuple[World, Scored]:
    """The world of ``run`` and its second rollout: a critic has learned from the first."""
    world, first = gaussian_rollout(run)
    run.algorithm.fit(world.models, run.algorithm.credit(first))
    return world, rollout(world, 1)[0]


def move(world: World, by: float) -> None:
    """Add a number to every parameter, so that old, new and reference differ."""
    with torch.no_grad():
        for parameter in world.module.parameters():
            parameter += by


def losses_by_hand(
    world: World, path: GaussianTrajectory, advantage: Tensor, *, clip: float, beta: float
) -> Tensor:
    """-min(ratio A, clipped ratio A) + beta KL of every step with noise, [B T], 0 elsewhere.

    Step by step, from the coefficients of the solver and the laws of ``torch.distributions``; the
    old log-probabilities are those on the path.
    """
    policy = gaussian_policy(world.models.new)
    steps, times = policy.steps, policy.times
    assert isinstance(steps, AffineStep | TwoStep)

    def law(of: GaussianPolicy, k: int) -> Normal:
        def said(j: int) -> Tensor:
            t = times[j].to(path.path).expand(len(path.x_0))
            return of.network.predict(path.path[:, j], t, path.prompts.inputs)

        mean = steps.on_x[k] * path.path[:, k] + steps.on_a[k] * said(k)
        if isinstance(steps, TwoStep) and k > 0:
            mean = mean + steps.on_x_before[k] * path.path[:, k - 1]
            mean = mean + steps.on_a_before[k] * said(k - 1)
        return Normal(mean, steps.std[k].to(mean).expand_as(mean))

    columns = []
    for k in range(path.n_steps):
        if not bool(steps.is_random[k]):
            columns.append(torch.zeros_like(advantage[:, k]))
            continue
        new = law(policy, k)
        log_prob = new.log_prob(path.path[:, k + 1]).flatten(1).sum(1)
        ratio = (log_prob - path.log_prob[:, k]).exp()
        low, high = torch.tensor([-clip, clip], dtype=torch.float64).exp().tolist()
        gain = ratio * advantage[:, k]
        loss = -torch.minimum(gain, ratio.clamp(low, high) * advantage[:, k])
        if beta:
            with torch.no_grad():
                ref = law(gaussian_policy(world.models.ref), k)
            loss = loss + beta * kl_divergence(new, ref).flatten(1).sum(1)
        columns.append(loss)
    return torch.stack(columns, 1)


def gradient(world: World, credited: Credited, pairs: Tensor | None = None) -> list[Tensor]:
    """Gradient of the weighted loss of an algorithm, of all pairs unless some are given."""
    actions = credited.actions(credited.pairs() if pairs is None else pairs)
    rng = SampleRng(0, actions.trajectory.prompts.sample_id)
    loss = world.run.algorithm.loss(world.models, actions, rng).loss
    return list(torch.autograd.grad((actions.weight * loss).sum(), list(world.module.parameters())))


def resumed(run: Run, folder: Path) -> tuple[Path, Path]:
    """Directories of ``run`` made in one go, and in two worlds, the second for the last step."""
    run = replace(run, evaluate=Evaluate(every=1, n=6, n_test=6), save_every=1)
    straight, halted = folder / "straight", folder / "halted"
    for out, steps in ((straight, run.steps), (halted, run.steps - 1), (halted, run.steps)):
        world = gaussian_world(replace(run, steps=steps))
        done = checkpoint.steps(out / "checkpoints")
        if done:
            load_state(world, out / "checkpoints", done[-1])
        out.mkdir(exist_ok=True)
        train(world, out, Console("", steps, enabled=False))
    return straight, halted


def gaussian_policy(policy: Policy | None) -> GaussianPolicy:
    """The policy of a network for Gaussian noise that it is."""
    assert isinstance(policy, GaussianPolicy)
    return policy


def gaussian_path(path: Trajectory) -> GaussianTrajectory:
    """The path of a process with Gaussian noise that it is."""
    assert isinstance(path, GaussianTrajectory)
    return path
