"""The reference along given paths: asked once per state and rollout, and kept for every update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.processes.gaussian import TwoStep
from rescore.sampling.base import Policy
from rescore.sampling.chunks import over_rows
from rescore.sampling.gaussian_policy import GaussianPolicy, GaussianTransition
from rescore.types import GaussianTrajectory, Scored


@torch.no_grad()
def reference_outputs(ref: Policy, scored: Scored) -> dict[str, Tensor]:
    """What the reference says where the scored steps with noise start, and before for two steps.

    One network row per state, none for steps of weight 0; as many numbers as the states themselves.
    Where nothing was asked there are zeros.

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
    sample, step = asked.nonzero().unbind(1)
    times = ref.times.to(step.device)

    def part(rows: Int[Tensor, " n"]) -> Tensor:
        b, k = sample[rows.to(step.device)], step[rows.to(step.device)]
        x_t = path.path[b, k]
        inputs = {name: value[b] for name, value in path.prompts.inputs.items()}
        return ref.network.predict(x_t, times[k].to(x_t), inputs).to(x_t.dtype)

    said = torch.zeros_like(path.path[:, :-1])
    parts = over_rows(part, len(step), at_most=ref.forward_rows)
    if parts:
        said[sample, step] = torch.cat(parts)
    row = torch.arange(len(said), device=step.device)[:, None]
    notes = {"ref": said[row, scored.step]}
    if two_steps:
        notes["ref_before"] = said[row, (scored.step - 1).clamp(min=0)]
    return notes


def kl_to_reference(new: GaussianTransition, notes: Mapping[str, Tensor]) -> Float[Tensor, " N"]:
    """KL(new || reference) of each step, exact, nats, from the notes of ``reference_outputs``."""
    at = replace(new.at, a=notes["ref"], a_before=notes.get("ref_before"))
    return new.kl(GaussianTransition(new.log_prob, at))
