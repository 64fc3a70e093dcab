"""Rewards: any function of outputs and prompts, weighted, named and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.types import Given, Outputs


class RewardError(RuntimeError):
    """A reward term failed or returned something that is not a reward."""


@runtime_checkable
class RewardFunction(Protocol):
    """What a user writes: one number per sample, higher is better."""

    def __call__(self, outputs: Any, prompts: Any, /) -> Any:
        """Anything ``torch.as_tensor`` turns into B finite numbers.

        ``outputs`` are the tokens [B L] of ``prompts`` (``Prompts``), or continuous samples
        [B *shape] made under them (``Conditions``).
        """
        ...


@dataclass(frozen=True)
class Reward:
    """A weighted sum of named reward functions: ``sum_i weight_i * term_i(outputs, prompts)``."""

    functions: Mapping[str, RewardFunction]
    """Term name to function."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Term name to its weight in the sum; 1 where not named. 0 reports a term without using it."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(self.functions))
        if unknown:
            raise ValueError(
                f"reward weights name unknown terms {unknown}; there are {sorted(self.functions)}"
            )

    def terms(self, outputs: Outputs, prompts: Given) -> dict[str, Float[Tensor, " B"]]:
        """Every term, unweighted, as float32 on the device of the outputs.

        Raises:
            RewardError: a function raised, or returned a wrong shape or a non-finite value; the
                message names the term and the first offending sample.
        """
        with torch.autocast(outputs.device.type, enabled=False):  # rewards choose their precision
            return {
                name: _checked(name, function, outputs, prompts)
                for name, function in self.functions.items()
            }

    def value(self, outputs: Outputs, prompts: Given) -> Float[Tensor, " B"]:
        """The weighted sum, of which only terms that count are asked for; errors as ``terms``."""
        counted = {n: f for n, f in self.functions.items() if self.weights.get(n, 1.0) != 0}
        return self.total(Reward(counted).terms(outputs, prompts))

    def total(self, terms: Mapping[str, Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
        """The weighted sum of ``terms``."""
        return torch.stack(
            [self.weights.get(name, 1.0) * value for name, value in terms.items()]
        ).sum(0)


def _checked(
    name: str, function: RewardFunction, outputs: Outputs, prompts: Given
) -> Float[Tensor, " B"]:
    n = outputs.shape[0]
    try:
        value = torch.as_tensor(function(outputs, prompts), device=outputs.device)
        value = value.to(torch.float32) if value.dtype != torch.float64 else value
    except RewardError as error:  # it says all there is to say
        raise RewardError(f"reward term '{name}': {error}") from error
    except Exception as error:  # the user's function may raise anything; we say where and stop
        where = _first_failure(function, outputs, prompts)
        raise RewardError(
            f"reward term '{name}' raised {type(error).__name__}: {error} ({where})"
        ) from error
    if value.shape != (n,):
        raise RewardError(
            f"reward term '{name}' returned shape {tuple(value.shape)}; expected ({n},), "
            f"one number per sample"
        )
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        sample = int((~finite).nonzero()[0])
        raise RewardError(
            f"reward term '{name}' returned {value[sample].item()} for sample {sample} "
            f"(sample_id {int(prompts.sample_id[sample])}, output {_written(outputs[sample])}); "
            f"a reward must be finite"
        )
    return value


def _first_failure(function: RewardFunction, outputs: Outputs, prompts: Given) -> str:
    """Which sample makes the function raise, found by calling it on one at a time."""
    for sample in range(outputs.shape[0]):
        row = torch.tensor([sample], device=outputs.device)
        try:
            function(outputs[row], prompts.take(row))
        except Exception:
            return (
                f"first failing sample {sample}, sample_id {int(prompts.sample_id[sample])}, "
                f"output {_written(outputs[sample])}"
            )
    return "the whole batch at once; every sample alone works"


def _written(output: Tensor) -> str:
    """An output in a message; only its shape where its numbers would fill a page."""
    return str(output.tolist()) if output.numel() <= 1024 else f"of shape {tuple(output.shape)}"
