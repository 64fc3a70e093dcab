"""One type per stage of the pipeline; data flows down through them, once.

    Given -> Trajectory -> Selected -> Scored -> Credited -> Actions -> Terms

Axes: ``B`` paths (samples), ``L`` positions, ``T`` denoising steps of the sampler, ``K`` steps an
algorithm selected, ``N`` flat (sample, step) pairs, ``V`` tokens, ``*shape`` a continuous sample.
Steps are counted noise first: step 0 starts from the fully masked canvas, or from pure noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

S = TypeVar("S", bound="Stage")
P = TypeVar("P", bound="Trajectory")
State = Float[Tensor, "B *shape"]
"""Continuous samples of any shape, in a batch."""
Outputs = Shaped[Tensor, "B *shape"]
"""Finished samples: tokens or continuous."""


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor inside a stage, a mapping or a tensor; leave the rest."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Stage):
        return value.map(function)
    if isinstance(value, Mapping):
        return {name: _map(item, function) for name, item in value.items()}
    return value


def joined(stages: Sequence[S]) -> S:
    """The rows of all stages, one after the other; of plain numbers the largest."""
    return _joined(stages)


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Stage):
        fields = {
            name: _joined([value.fields()[name] for value in values]) for name in first.fields()
        }
        return type(first)(**fields)
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values]) for name in first}
    return first if first is None else max(values)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A frozen bundle of tensors that share their first axis."""

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same stage with ``function`` applied to every tensor in it."""
        fields = {f.name: _map(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **fields)

    def take(self: S, index: Tensor) -> S:
        """The rows ``index`` of every tensor: integers (repeats allowed) or a boolean mask."""
        return self.map(lambda tensor: tensor[index])

    def to(self: S, device: torch.device | str) -> S:
        """The same stage on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def fields(self) -> dict[str, Any]:
        """Field name to value, one level deep: what the next stage is built from."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Given(Stage):
    """What is given: the identity of every sample, and what it is judged by."""

    group: Int[Tensor, " B"]
    """Samples of the same prompt share a number in [0, B)."""
    sample_id: Int[Tensor, " B"]
    """Names the random stream of each sample; unique within a run."""
    info: Mapping[str, Tensor]
    """What rewards need to judge an output (leading axis B), by name."""

    @property
    def n_samples(self) -> int:
        return self.sample_id.shape[0]


@dataclass(frozen=True, kw_only=True)
class Prompts(Given):
    """A canvas of tokens to fill."""

    tokens: Int[Tensor, "B L"]
    """The canvas x_T: given tokens where clamped, the mask token where editable."""
    editable: Bool[Tensor, "B L"]
    """True where the model writes; False at given tokens and padding."""
    attend: Bool[Tensor, "B L"] | None = None
    """False at padding, which no position may attend to; None where nothing is padded."""


@dataclass(frozen=True, kw_only=True)
class Conditions(Given):
    """What a continuous sample is made under."""

    inputs: Mapping[str, Tensor]
    """What the network is told besides x_t and t (leading axis B), by name: a class label, the
    embedding of a text. Empty for an unconditional model."""


@dataclass(frozen=True, kw_only=True)
class Clean(Stage):
    """Finished samples to learn from."""

    x_0: Outputs


@dataclass(frozen=True, kw_only=True)
class Points(Clean):
    """Continuous samples: images, points in a plane."""

    x_0: State
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """As in ``Conditions``."""


@dataclass(frozen=True, kw_only=True)
class Examples(Clean):
    """Finished sequences."""

    x_0: Int[Tensor, "n L"]
    editable: Bool[Tensor, "n L"]
    """True where the model writes, so where noise may go; False at prompts and padding."""
    attend: Bool[Tensor, "n L"] | None = None
    """False at padding; None where nothing is padded."""


@dataclass(frozen=True, kw_only=True)
class Kept(Stage):
    """Steps chosen while sampling, in K slots."""

    step: Int[Tensor, "B K"]
    """-1 in a slot that stayed empty."""
    step_weight: Float[Tensor, "B K"]
    """As in ``Selected``; 0 in a slot that stayed empty."""
    completion: Int[Tensor, "B K L"] | None = None
    """x_hat_0: every position still masked before the step filled with its most probable token;
    None where no completions were asked for."""


@dataclass(frozen=True, kw_only=True)
class Trajectory(Stage):
    """A sampled path, in the form its process is stored in."""

    prompts: Given
    x_0: Outputs
    log_prob: Float[Tensor, "B T"]
    """Log-probability of each step under the sampling policy, in the recorded score (nats)."""

    @property
    def n_steps(self) -> int:
        return self.log_prob.shape[1]

    def acts(self) -> Bool[Tensor, "B T"]:
        """Steps in which something is drawn."""
        raise NotImplementedError

    def around(self: P, sample: Int[Tensor, " N"], step: Int[Tensor, " N"]) -> P:
        """The paths ``sample``, of which only what concerns ``step`` will be asked."""
        return self.take(sample)


@dataclass(frozen=True, kw_only=True)
class TokenTrajectory(Trajectory):
    """A path whose states are canvases of tokens."""

    prompts: Prompts
    x_0: Int[Tensor, "B L"]

    def state(self, step: Int[Tensor, " B"], mask_id: int) -> Int[Tensor, "B L"]:
        """The canvas before ``step``; after the last one where ``step`` is the number of steps."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GaussianTrajectory(Trajectory):
    """A path of a process with Gaussian noise: its states."""

    prompts: Conditions
    x_0: State
    path: Float[Tensor, "B M *shape"]
    """The states x before step 0, 1, ..., and after the last one: M = T + 1; M = 0 where they were
    not asked for. The part around a step has fewer, see ``first``."""
    first: Int[Tensor, " B"]
    """Number of the step that the first state in ``path`` is before."""
    output: Float[Tensor, "B T *shape"] | None = None
    """What the network said at every state but the last, if it was asked for."""
    random: Bool[Tensor, "B T"]
    """Steps that draw noise, so that they have a density."""

    def state(self, step: Int[Tensor, " B"]) -> State:
        """The state before ``step``; x_0 where ``step`` is the number of steps."""
        row = torch.arange(len(step), device=step.device)
        return self.path[row, step - self.first]

    def acts(self) -> Bool[Tensor, "B T"]:
        """Steps that draw noise."""
        return self.random

    def around(self, sample: Int[Tensor, " N"], step: Int[Tensor, " N"]) -> GaussianTrajectory:
        """The states before ``step``, before the one before it, and after it; no outputs."""
        n_states, start = min(3, self.path.shape[1]), self.first[sample]
        first = (step - 1 - start).clamp(min=0, max=self.path.shape[1] - n_states)
        columns = first[:, None] + torch.arange(n_states, device=step.device)
        return GaussianTrajectory(
            prompts=self.prompts.take(sample),
            x_0=self.x_0[sample],
            log_prob=self.log_prob[sample],
            path=self.path[sample[:, None], columns],
            first=start + first,
            random=self.random[sample],
        )


@dataclass(frozen=True, kw_only=True)
class MaskedTrajectory(TokenTrajectory):
    """A path of the masked process: the final tokens and one reveal rank per position.

    ``rank = step * L + place within the step`` where a token was revealed, -1 where it was given,
    so storage does not grow with the number of steps and any state is rebuilt by a comparison.
    """

    rank: Int[Tensor, "B L"]
    max_revealed: int
    """The most tokens a step reveals in any sample; how wide a table of revealed rows must be."""
    max_candidates: int
    """The most positions a step chooses from in any sample."""
    entropy: Float[Tensor, "B T"] | None = None
    """Sum over the positions revealed in the step of the entropy of the sampling law (nats)."""
    log_time: Float[Tensor, "B L"] | None = None
    """Logarithm of when each position was revealed within its step; only ``soft_low_confidence``
    has times."""
    kept: Kept | None = None
    """What was kept on the way down; None where nothing was asked for."""

    def step_of(self) -> Int[Tensor, "B L"]:
        """The step in which each position was revealed; -1 where it was given."""
        return torch.div(self.rank, self.x_0.shape[1], rounding_mode="floor")

    def state(self, step: Int[Tensor, " B"], mask_id: int) -> Int[Tensor, "B L"]:
        """The canvas before ``step``: revealed in an earlier step or given, else the mask token."""
        return torch.where(self.step_of() < step[:, None], self.x_0, mask_id)

    def acts(self) -> Bool[Tensor, "B T"]:
        """Steps that reveal at least one token."""
        return self.revealed() > 0

    def revealed(self) -> Int[Tensor, "B T"]:
        """Number of tokens revealed in each step."""
        steps = torch.arange(self.n_steps, device=self.rank.device)
        return (self.step_of()[:, None, :] == steps[None, :, None]).sum(-1)


@dataclass(frozen=True, kw_only=True)
class RateTrajectory(TokenTrajectory):
    """A path of a process in continuous time: the final tokens, and the moves that were kept."""

    step: Int[Tensor, "B M"]
    """Numbers of the kept moves, ascending."""
    before: Int[Tensor, "B M L"]
    """The state before each kept move."""
    after: Int[Tensor, "B M L"]
    """The state after it."""

    def state(self, step: Int[Tensor, " B"], mask_id: int) -> Int[Tensor, "B L"]:
        """The state before a kept move, or x_0; ``mask_id`` plays no part."""
        return torch.where(step[:, None] == self.n_steps, self.x_0, self._at(self.before, step))

    def move(self, step: Int[Tensor, " B"]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
        """The states before and after a kept move."""
        return self._at(self.before, step), self._at(self.after, step)

    def around(self, sample: Int[Tensor, " N"], step: Int[Tensor, " N"]) -> RateTrajectory:
        """Each path with the one move asked for; with all that it has if a sample is finished."""
        if not self.step.shape[1] or bool((step == self.n_steps).any()):
            return self.take(sample)
        column = (self.step[sample] == step[:, None]).to(torch.uint8).argmax(1)
        return RateTrajectory(
            prompts=self.prompts.take(sample),
            x_0=self.x_0[sample],
            log_prob=self.log_prob[sample],
            step=step[:, None],
            before=self.before[sample, column][:, None],
            after=self.after[sample, column][:, None],
        )

    def acts(self) -> Bool[Tensor, "B T"]:
        """Every step draws every editable token."""
        editable = self.prompts.editable.any(1, keepdim=True)
        return editable.expand(self.log_prob.shape)

    def _at(self, states: Int[Tensor, "B M L"], step: Int[Tensor, " B"]) -> Int[Tensor, "B L"]:
        column = (self.step == step[:, None]).to(torch.uint8).argmax(1)
        return states[torch.arange(len(step), device=step.device), column]


@dataclass(frozen=True, kw_only=True)
class Selected(Stage):
    """The steps an algorithm trains on, and what each counts for."""

    trajectory: Trajectory
    step: Int[Tensor, "B K"]
    """Numbers of steps; the number of steps itself stands for the finished sample."""
    step_weight: Float[Tensor, "B K"]
    """Makes a sum over the K columns stand for a sum over all steps: 1, or 1 / (K q) for draws; 0
    in a column without a step."""
    completion: Int[Tensor, "B K L"] | None = None
    """The one-step completion from the state before each step, to be scored; None for methods that
    use none."""


@dataclass(frozen=True, kw_only=True)
class Scored(Selected):
    """Selected steps with the reward of each sample."""

    reward: Float[Tensor, " B"]
    terms: Mapping[str, Float[Tensor, " B"]]
    """The unweighted terms of the reward, by name."""
    completion_terms: Mapping[str, Float[Tensor, "B K"]] = dataclasses.field(default_factory=dict)
    """The terms of the reward of each completion, by name, times their weights in the reward; empty
    without completions. 0 in columns of weight 0, which are not scored."""
    notes: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """What ``Algorithm.annotate`` added, by name; leading axes ``B K``."""


@dataclass(frozen=True, kw_only=True)
class Credited(Scored):
    """Scored steps with the coefficient of each in the gradient."""

    advantage: Float[Tensor, "B K"]
    weight: Float[Tensor, "B K"]
    """Coefficient of each term of the loss, fixed from the whole batch; 0 = not trained on."""

    def pairs(self) -> Int[Tensor, "N 2"]:
        """The (sample, column) pairs that are trained on, in order."""
        return self.weight.nonzero()

    def actions(self, pairs: Int[Tensor, "N 2"]) -> Actions:
        """The chosen (sample, column) pairs as a flat batch."""
        sample, column = pairs.unbind(1)
        step = self.step[sample, column]
        return Actions(
            trajectory=self.trajectory.around(sample, step),
            step=step,
            advantage=self.advantage[sample, column],
            weight=self.weight[sample, column],
            notes={name: note[sample, column] for name, note in self.notes.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Actions(Stage):
    """A micro-batch: flat (sample, step) pairs."""

    trajectory: Trajectory
    step: Int[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    weight: Float[Tensor, " N"]
    notes: Mapping[str, Tensor]

    @property
    def log_prob_old(self) -> Float[Tensor, " N"]:
        """Log-probability of each step under the sampling policy, as recorded (nats)."""
        return self.trajectory.log_prob.gather(1, self.step[:, None]).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Terms(Stage):
    """An unreduced loss (to be minimised) and its metrics, one entry per action."""

    loss: Float[Tensor, " N"]
    metrics: Mapping[str, Float[Tensor, " N"]]
