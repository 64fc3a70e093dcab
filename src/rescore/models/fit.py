"""One supervised fit for the small networks that judge: oracles, classifiers, reward models.

A network maps inputs to one number per row. ``squared`` fits a regressor and ``logistic`` a
classifier, whose number is the log-odds; preferences in the manner of Bradley and Terry are the
``logistic`` fit of a network that returns the difference of two scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

SCORING_ROWS = 256
"""Rows of one forward pass when a network is only asked."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a network is fitted to targets."""

    loss: Literal["squared", "logistic"] = "squared"
    """``(y - f)^2``, or ``-y log s(f) - (1 - y) log(1 - s(f))`` with the logistic function s."""
    epochs: int = 10
    """Passes over the data."""
    batch: int = 64
    """Rows per step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW; falls to 0 along a half cosine."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    warmup: int = 20
    """Steps over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Inputs and what a network should say of them."""

    inputs: Tensor
    """Leading axis n; the rest is the network's business."""
    targets: Float[Tensor, " n"]
    """A number per row; for ``logistic`` a label or a probability in [0, 1]."""

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise ValueError(
                f"{len(self.inputs)} inputs and {len(self.targets)} targets; expected as many of "
                f"both, and at least one"
            )
        wrong = ~torch.isfinite(self.targets)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"target {row} is {self.targets[row].item()}; expected finite numbers")


def fit(
    module: nn.Module,
    data: Labelled,
    held_out: Labelled,
    config: Fit,
    generator: torch.Generator,
) -> float:
    """Train a network in place; returns how well it does on rows it has not seen.

    Args:
        module: inputs (B, ...) to (B,); or to (B, M), M members of an ensemble, each fitted to the
            target by itself and their mean being the prediction.
        data: what to learn from; moved to the network's device in batches.
        held_out: what to be judged on.
        config: how.
        generator: draws the order of the rows, on the CPU.

    Returns:
        ``squared``: the coefficient of determination ``1 - sum (y - f)^2 / sum (y - mean y)^2``.
        ``logistic``: the fraction of rows on whose label (target above 1/2) log-odds above 0 agree.

    Raises:
        ValueError: logistic targets outside [0, 1].
        RuntimeError: the loss is not finite.
    """
    if config.loss == "logistic":
        for part in (data, held_out):
            _check_labels(part.targets)
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    n = len(data.inputs)
    total = config.epochs * math.ceil(n / config.batch)
    step = 0
    for _ in range(config.epochs):
        for rows in torch.randperm(n, generator=generator).split(config.batch):
            optimizer.param_groups[0]["lr"] = config.lr * _rate(step, total, config.warmup)
            optimizer.zero_grad()
            prediction = module(data.inputs[rows].to(device))
            loss = _loss(prediction, data.targets[rows].to(prediction), config)
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(
                    f"the loss is {loss.item()} at step {step}; lower lr={config.lr}"
                )
            loss.backward()
            optimizer.step()
            step += 1
    return score(module, held_out, config)


def score(module: nn.Module, held_out: Labelled, config: Fit) -> float:
    """What ``fit`` returns, of a network as it is."""
    prediction, target = predict(module, held_out.inputs), held_out.targets.double()
    if config.loss == "logistic":
        return ((prediction > 0) == (target > 0.5)).double().mean().item()
    left = (target - prediction).square().sum()
    return (1 - left / (target - target.mean()).square().sum()).item()


@torch.no_grad()
def predict(module: nn.Module, inputs: Tensor) -> Float[Tensor, " n"]:
    """The prediction of every row, the mean over members where there are any; float64, CPU."""
    device = next(module.parameters()).device
    parts = [module(part.to(device)).double().cpu() for part in inputs.split(SCORING_ROWS)]
    return torch.cat([part.reshape(len(part), -1).mean(1) for part in parts])


def _loss(prediction: Tensor, target: Float[Tensor, " B"], config: Fit) -> Float[Tensor, ""]:
    """Mean over rows, sum over members: a member learns as it would alone."""
    prediction = prediction.reshape(len(target), -1)
    target = target[:, None].expand_as(prediction)
    if config.loss == "logistic":
        each = nn.functional.binary_cross_entropy_with_logits(prediction, target, reduction="none")
    else:
        each = (target - prediction).square()
    return each.mean(0).sum()


def _rate(step: int, total: int, warmup: int) -> float:
    """Fraction of the peak learning rate: linear warm-up times a half cosine down to 0."""
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / total))


def _check_labels(targets: Float[Tensor, " n"]) -> None:
    outside = (targets < 0) | (targets > 1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"target {row} is {targets[row].item()}; the logistic loss takes labels or "
            f"probabilities in [0, 1]"
        )
