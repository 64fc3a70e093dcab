"""What the library adds to the bare network: an RL step beside the same network calls alone.

Every network call of a real step is recorded with its inputs and made again on a copy of the
network, with nothing around it: forwards without gradients, forwards with a backward pass,
optimiser steps; those of the policy, of the reference and of a critic of noised samples, not those
of the reward. Steps and replays alternate in one run; the figures are medians of CPU-seconds, so a
busy machine disturbs both alike. ``overhead`` = step / bare.
"""

from __future__ import annotations

import copy
import dataclasses
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rescore.models.denoiser import CountedScores, SubsScores
from rescore.models.finetune import reference
from rescore.models.gaussian_network import CountedOutputs
from rescore.models.value import ValueCritic
from rescore.processes.ctmc import Process
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import MaskedPolicy, Policy, RatePolicy
from rescore.training.pretrained import Published
from rescore.training.rollout import rollout
from rescore.training.run import Run
from rescore.training.session import build_base
from rescore.training.update import update
from rescore.training.world import World, accelerator_for, build
from rescore.types import State

WARM_UP = 2
"""Steps made before measuring."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the repeats; seconds are CPU-seconds of an RL step."""

    recipe: str
    overhead: float
    """RL step / bare network calls."""
    rollout_s: float
    reward_s: float
    credit_s: float
    """Credit, and whatever ``annotate`` asks of the models."""
    update_s: float
    other_s: float
    """Prompts, gathering and bookkeeping."""
    bare_s: float
    rows: float
    """Network rows (canvases or states through the network, not the critic) per update."""
    batch: int
    """Samples per rollout."""
    threads: int
    peak_mb: float
    """Largest resident memory of the process so far."""


class Call(NamedTuple):
    """One call of a network, with its inputs."""

    method: Literal["predict", "log_score"]
    grad: bool
    inputs: tuple[Any, ...]
    """The first is a row per canvas or state."""
    options: dict[str, Tensor | None]
    of_reference: bool


@dataclass
class Recorder:
    """A network that notes every call of the one it wraps."""

    network: Any
    calls: list[Call] = field(default_factory=list)
    of_reference: bool = False

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    @property
    def process(self) -> Process:
        return self.network.process

    def predict(self, x_t: Tensor, **options: Tensor | None) -> Tensor:
        """Pass the call on and note it."""
        return self._call("predict", (x_t,), options)

    def log_score(self, x_t: Tensor, total_noise: Tensor, **options: Tensor | None) -> Tensor:
        """Pass the call on and note it."""
        return self._call("log_score", (x_t, total_noise), options)

    def _call(
        self,
        method: Literal["predict", "log_score"],
        inputs: tuple[Tensor, ...],
        options: dict[str, Tensor | None],
    ) -> Tensor:
        grad = torch.is_grad_enabled()
        self.calls.append(Call(method, grad, inputs, options, self.of_reference))
        return getattr(self.network, method)(*inputs, **options)


@dataclass
class RecordedOutputs(CountedOutputs):
    """``Recorder`` for networks for Gaussian noise, which policies look at under their counter."""

    calls: list[Call] = field(default_factory=list)
    of_reference: bool = False

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        """Pass the call on, count and note it."""
        given = (x_t.detach().requires_grad_(x_t.requires_grad), t, inputs)
        self.calls.append(Call("predict", torch.is_grad_enabled(), given, {}, self.of_reference))
        return super().predict(x_t, t, inputs)


def recorded(policy: Policy, calls: list[Call], *, of_reference: bool = False) -> Policy:
    """The policy with its network, the bare one inside all wrappers, noting its calls."""
    if isinstance(policy, MaskedPolicy):
        return replace(policy, denoiser=Recorder(policy.denoiser, calls, of_reference))
    if isinstance(policy, GaussianPolicy):
        assert isinstance(policy.network, CountedOutputs)
        network = RecordedOutputs(policy.network.network, 0, calls, of_reference)
        return replace(policy, network=network)
    assert isinstance(policy, RatePolicy)
    assert isinstance(policy.network, CountedScores)
    scores = policy.network.network
    if isinstance(scores, SubsScores):
        scores = SubsScores(Recorder(scores.network, calls, of_reference))
    else:
        scores = Recorder(scores, calls, of_reference)
    return replace(policy, network=CountedScores(scores))


class CriticCall(NamedTuple):
    """One call of the network of a critic."""

    grad: bool
    inputs: tuple[State, Float[Tensor, " N"], Mapping[str, Tensor]]


def note_critic(critic: ValueCritic, calls: list[CriticCall]) -> None:
    """Have the network of a critic note its calls."""

    def note(module: nn.Module, given: Any) -> None:
        x_t, t, inputs = given
        kept = x_t.detach().requires_grad_(x_t.requires_grad)
        calls.append(CriticCall(torch.is_grad_enabled(), (kept, t, inputs)))

    critic.body.register_forward_pre_hook(note)


def serves(run: Run) -> bool:
    """Whether a run is measured if none is named: on the CPU, a base of its own, able to work."""
    if torch.device(run.device).type != "cpu" or isinstance(run.base, Published):
        return False
    try:
        run.check()
    except ValueError:  # such as a package that is not installed
        return False
    return True


def check_measurable(run: Run, *, repeats: int) -> None:
    """Before any run is measured.

    Raises:
        ValueError: fewer than 5 repeats, another device than the CPU, or a run that cannot work.
    """
    if repeats < 5:
        raise ValueError(f"repeats={repeats}; the median needs at least 5")
    if torch.device(run.device).type != "cpu":
        raise ValueError(f"bench counts CPU-seconds; got device '{run.device}', use --device cpu")
    run.check()


def measure(recipe: str, run: Run, *, repeats: int = 7) -> Row:
    """Measure ``repeats`` RL steps of a recipe, each beside its bare network calls.

    Raises:
        ValueError: as ``check_measurable``.
    """
    check_measurable(run, repeats=repeats)
    accelerator = accelerator_for(run)
    world = build(run, build_base(run, accelerator, print), accelerator)
    bare = copy.deepcopy(world.module)
    optimizer = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad])
    calls: list[Call] = []
    critic_calls: list[CriticCall] = []
    models = world.models
    bare_critic = None
    if isinstance(models.critic, ValueCritic):
        bare_critic = copy.deepcopy(models.critic)
        note_critic(models.critic, critic_calls)
    ref = None if models.ref is None else recorded(models.ref, calls, of_reference=True)
    world.models = replace(models, new=recorded(models.new, calls), ref=ref)

    steps: list[dict[str, float]] = []
    for step in range(WARM_UP + repeats):
        calls.clear()
        critic_calls.clear()
        clock = time.process_time()
        scored, spent = rollout(world, step)
        before_credit = time.process_time()
        credited = run.algorithm.credit(scored)
        before_update = time.process_time()
        run.algorithm.fit(world.models, credited)
        update(world, credited, step)
        end = time.process_time()
        figures = {
            "rollout_s": spent["cpu/rollout_s"],
            "reward_s": spent["cpu/reward_s"],
            "credit_s": spent["cpu/annotate_s"] + before_update - before_credit,
            "update_s": end - before_update,
            "total_s": end - clock,
            "rows": sum(len(call.inputs[0]) for call in calls) / run.optim.updates_per_rollout,
        }
        figures["bare_s"] = replay(world, bare, optimizer, calls)
        if bare_critic is not None:
            figures["bare_s"] += replay_critic(bare_critic, critic_calls)
        if step >= WARM_UP:
            steps.append(figures)
    middle = {name: statistics.median(figures[name] for figures in steps) for name in steps[0]}
    parts = sum(middle[name] for name in ("rollout_s", "reward_s", "credit_s", "update_s"))
    return Row(
        recipe=recipe,
        overhead=middle["total_s"] / middle["bare_s"],
        other_s=max(0.0, middle.pop("total_s") - parts),
        batch=run.batch_size,
        threads=torch.get_num_threads(),
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        **middle,
    )


def replay(
    world: World, module: nn.Module, optimizer: torch.optim.Optimizer, calls: list[Call]
) -> float:
    """Make the recorded calls on ``module`` with nothing around them; returns CPU-seconds."""
    networks: dict[bool, Any] = {False: module}
    if world.models.ref is not None:
        networks[True] = reference(module)
    clock = time.process_time()
    for method, grad, inputs, options, of_reference in calls:
        with torch.set_grad_enabled(grad), world.autocast():
            output = getattr(networks[of_reference], method)(*inputs, **options)
        if grad:
            total = torch.where(output.isfinite(), output, 0.0).sum()
            backward(total, inputs[0])
    for _ in range(world.run.optim.updates_per_rollout):
        optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - clock


def replay_critic(critic: ValueCritic, calls: list[CriticCall]) -> float:
    """Make the recorded calls of its network again; returns CPU-seconds."""
    clock = time.process_time()
    for grad, inputs in calls:
        with torch.set_grad_enabled(grad):
            output = critic.body(*inputs)
        if grad:
            backward(output.sum(), inputs[0])
            if not inputs[0].requires_grad:
                critic.optimizer.step()
                critic.optimizer.zero_grad()
    return time.process_time() - clock


def backward(total: Float[Tensor, ""], x_t: Tensor) -> None:
    """To the state where its gradient was asked for, otherwise to the weights."""
    if x_t.requires_grad:
        torch.autograd.grad(total, x_t)
    else:
        total.backward()


def print_rows(rows: list[Row]) -> None:
    """The rows as a table."""
    table = Table(title="CPU-seconds of an RL step (medians)")
    for name in (f.name for f in dataclasses.fields(Row)):
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in dataclasses.astuple(row)))
    Console(width=140).print(table)


def _cell(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
