"""What a policy says along given paths, and its KL there to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.processes.gaussian import HeunStep, TwoStep, continuous_kl
from rescore.sampling.base import Policy
from rescore.sampling.chunks import over_rows
from rescore.sampling.gaussian_policy import At, GaussianPolicy, GaussianTransition
from rescore.types import GaussianTrajectory, Scored, State

Kl = Literal["step", "continuous"]
"""What the KL of a step is: exact for the step that is simulated, or the rate of Girsanov's theorem
held over it."""


@torch.no_grad()
def path_outputs(
    policy: GaussianPolicy, path: GaussianTrajectory, asked: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B T *shape"]:
    """What a policy says of the states before every step, one network row each.

    Args:
        policy: a part of its ``forward_rows`` at a time.
        path: recorded with its states.
        asked: of which states; None = all. Elsewhere there are zeros.
    """
    where = torch.ones_like(path.random) if asked is None else asked
    sample, step = where.nonzero().unbind(1)
    times = policy.times.to(step.device)

    def part(rows: Int[Tensor, " n"]) -> Tensor:
        b, k = sample[rows.to(step.device)], step[rows.to(step.device)]
        x_t = path.path[b, k]
        inputs = {name: value[b] for name, value in path.prompts.inputs.items()}
        return policy.network.predict(x_t, times[k].to(x_t), inputs).to(x_t.dtype)

    said = torch.zeros_like(path.path[:, :-1])
    parts = over_rows(part, len(step), at_most=policy.forward_rows)
    if parts:
        said[sample, step] = torch.cat(parts)
    return said


@torch.no_grad()
def reference_outputs(ref: Policy, scored: Scored) -> dict[str, Tensor]:
    """What the reference says where the scored steps with noise start, and before for two steps.

    Asked once per rollout and kept for every update: one network row per state, none for steps of
    weight 0; as many numbers as the states themselves. Where nothing was asked there are zeros.

    Returns:
        Notes [B K *shape]: ``ref`` at the state before each step, and for two-step solvers
        ``ref_before`` at the state before that.
    """
    path = scored.trajectory
    assert isinstance(ref, GaussianPolicy) and isinstance(path, GaussianTrajectory)
    two_steps = isinstance(ref.steps, TwoStep)
    counted = torch.zeros_like(path.random, dtype=torch.long)
    asked = (counted.scatter_add(1, scored.step, (scored.step_weight > 0).long()) > 0) & path.random
    if two_steps:
        asked = asked | torch.nn.functional.pad(asked[:, 1:], (0, 1))
    said = path_outputs(ref, path, asked)
    row = torch.arange(len(said), device=said.device)[:, None]
    notes = {"ref": said[row, scored.step]}
    if two_steps:
        notes["ref_before"] = said[row, (scored.step - 1).clamp(min=0)]
    return notes


def kl_to_reference(new: GaussianTransition, notes: Mapping[str, Tensor]) -> Float[Tensor, " N"]:
    """KL(new || reference) of each step, exact, nats, from the notes of ``reference_outputs``."""
    return new.at.kl(notes["ref"], notes.get("ref_before"))


def kl_at(
    policy: GaussianPolicy, at: At, other: State, other_before: State | None, kl: Kl
) -> Float[Tensor, " N"]:
    """KL(policy || who says ``other``) of each step, nats.

    Args:
        policy: whose steps these are.
        at: the policy there.
        other: output at the same states.
        other_before: at the states before them, for two-step solvers.
        kl: which; of solvers without noise ``continuous`` is what it would be with noise.

    Raises:
        ValueError: ``step`` and a solver without noise.
    """
    if kl == "step":
        return at.kl(other, other_before)
    return continuous_kl(
        policy.network.schedule,
        at.t,
        at.s,
        at.a,
        other,
        prediction=policy.network.prediction,
        eta=policy.decoder.noise_eta,
    )


def path_kls(
    policy: GaussianPolicy,
    path: GaussianTrajectory,
    said: Float[Tensor, "B T *shape"],
    other: Float[Tensor, "B T *shape"],
    kl: Kl,
) -> Float[Tensor, "B T"]:
    """``kl_at`` of every step of every path, from outputs at all states before a step."""
    columns = []
    times, table = policy.times.to(said.device), policy.steps
    for k in range(path.n_steps):
        rows = slice(k, k + 1)
        step = None if isinstance(table, HeunStep) else table.take(rows).to(said.device)
        at = At(step, times[rows], times[k + 1 : k + 2], path.path[:, k], said[:, k])
        other_before = None
        if isinstance(step, TwoStep):
            before = max(k - 1, 0)  # the first has no past, and no use for one
            at = replace(at, x_before=path.path[:, before], a_before=said[:, before])
            other_before = other[:, before]
        columns.append(kl_at(policy, at, other[:, k], other_before, kl))
    return torch.stack(columns, 1).to(path.log_prob)
