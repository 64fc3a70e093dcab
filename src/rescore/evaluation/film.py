"""One prompt being denoised, step by step, as data for the report."""

from __future__ import annotations

from typing import Any

import torch

from rescore.sampling.policy import Policy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import Split, TokenTask


def film_strip(
    policy: Policy,
    task: TokenTask,
    split: Split,
    number: int,
    *,
    seed: int,
    label: str,
    device: torch.device | str,
) -> dict[str, Any]:
    """The canvas of prompt ``number`` before every step and at the end, as text cells.

    The task must have a gold output for it.

    Returns:
        ``label``, ``frames`` (each ``step`` and ``cells``; masks are empty), ``given`` and
        ``solution`` per cell, and ``note``: the reward terms of the result.
    """
    index = torch.tensor([number])
    prompts = task.prompts(split, index).to(device)
    trajectory = policy.sample(prompts, Record(moves="all"), SampleRng(seed, index.to(device)))
    steps = torch.arange(trajectory.n_steps + 1, device=device)
    frames = [
        {"step": k, "cells": cells(task, trajectory.state(steps[k : k + 1], task.mask_id)[0])}
        for k in range(trajectory.n_steps + 1)
    ]
    terms, gold = task.reward.terms(trajectory.x_0, prompts), task.gold(prompts)
    assert gold is not None
    return {
        "label": label,
        "frames": frames,
        "given": (~prompts.editable[0]).tolist(),
        "solution": cells(task, gold[0]),
        "note": ", ".join(f"{name} {value.item():.2f}" for name, value in terms.items()),
    }


def cells(task: TokenTask, tokens: torch.Tensor) -> list[str]:
    """Each token as text; the mask as an empty cell."""
    mask_id = task.mask_id
    return ["" if token == mask_id else task.symbol(token) for token in tokens.tolist()]
