"""What a network for Gaussian noise is: the protocol, and what wraps one."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rescore.models.denoiser import NetworkConfig
from rescore.processes.convert import Prediction
from rescore.processes.gaussian_schedules import GaussianSchedule, VariancePreserving
from rescore.types import State


@runtime_checkable
class GaussianNetwork(Protocol):
    """What every part of rescore asks of a continuous diffusion model.

    Any object with these four members serves; nothing has to be subclassed.
    """

    @property
    def schedule(self) -> GaussianSchedule:
        """The noise it was trained under."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What its output is."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        ...

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        """The output at x_t and time t in [0, 1], of the shape of x_t, in any floating type.

        Args:
            x_t: noised samples.
            t: one time per sample.
            inputs: of ``Conditions``, what else the network is told.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class GaussianConfig(NetworkConfig):
    """The shape of a ``GaussianNetwork`` that the project can train from nothing."""

    schedule: GaussianSchedule = field(default_factory=VariancePreserving)
    """The noise."""
    prediction: Prediction = "eps"
    """What the network says."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""


@runtime_checkable
class Decodes(Protocol):
    """A network whose samples are codes of something else, as latent diffusion models' are."""

    def decode(self, x_0: State) -> Float[Tensor, "B ..."]:
        """What rewards judge, such as images [B 3 H W] in [0, 1]; no gradients needed."""
        ...


@dataclass
class CountedOutputs:
    """A network that counts its rows: states that went through it."""

    network: GaussianNetwork
    rows: int = 0

    @property
    def schedule(self) -> GaussianSchedule:
        return self.network.schedule

    @property
    def prediction(self) -> Prediction:
        return self.network.prediction

    @property
    def shape(self) -> tuple[int, ...]:
        return self.network.shape

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        """Pass the call on and count its rows."""
        output = self.network.predict(x_t, t, inputs)
        self.rows += len(x_t)
        return output


def state_dtype(network: object) -> torch.dtype:
    """float64 for a network with weights in float64, else float32, however narrow its weights.

    Of a view of a module, such as one without its adapters, that of the ``module``.
    """
    network = getattr(network, "module", network)
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
