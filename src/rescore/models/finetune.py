"""What fine-tuning adds to a network: low-rank adapters, the frozen reference, averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.denoiser import Denoiser, ScoreNetwork
from rescore.models.gaussian_network import Decodes, GaussianNetwork
from rescore.processes.convert import Prediction
from rescore.processes.ctmc import Process
from rescore.processes.gaussian_schedules import GaussianSchedule
from rescore.types import State

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Lora:
    r"""Low-rank adaptation: $W + (\alpha / r) B A$ with $W$ frozen (arXiv:2106.09685)."""

    rank: int = 8
    """r: rows of A and columns of B."""
    alpha: int = 16
    """Scale of the update, divided by the rank."""
    targets: tuple[str, ...] = ("qkv", "out", "up", "down")
    """Last parts of the names of the linear layers to adapt."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear layer to adapt")


def add_lora(module: M, lora: Lora, *, generator: torch.Generator) -> M:
    """Freeze ``module`` and give it trainable adapters, in place, through peft; its class stays.

    A is uniform within 1 / sqrt(fan-in) and B zero, so the network computes what it did before.

    Args:
        module: a network whose linear layers bear the names in ``lora.targets``.
        lora: rank, scale and targets.
        generator: a CPU generator; draws every A. The global generator is left alone.

    Raises:
        ValueError: peft is not installed, a target names no linear layer, or the module has
            adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            'LoRA needs peft: pip install "rescore[language]" or "rescore[images]"'
        ) from error
    if has_adapters(module):
        raise ValueError("this module has LoRA adapters already; add them once, to a plain module")
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"LoRA target '{target}' names no linear layer; there are {known}")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    with torch.random.fork_rng(devices=[]):  # peft draws weights of its own; they are replaced
        inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:  # in 16 bits small updates would be lost
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(draw)
    return module


def has_adapters(module: nn.Module) -> bool:
    """Whether ``add_lora`` was applied to the module."""
    return any(".lora_A." in name for name, _ in module.named_parameters())


def reference(module: nn.Module) -> Denoiser | ScoreNetwork | GaussianNetwork:
    """The policy before fine-tuning, frozen: call it before the first update.

    With adapters it is the same network with the adapters off, which costs no memory; without
    them, a copy.

    Raises:
        ValueError: the module is no ``Denoiser``, ``ScoreNetwork`` or ``GaussianNetwork``.
    """
    if not isinstance(module, Denoiser | ScoreNetwork | GaussianNetwork):
        raise ValueError(
            f"{type(module).__name__} is no Denoiser (vocab_size, mask_id and predict()), no "
            f"ScoreNetwork (process and log_score()) and no GaussianNetwork (schedule, prediction, "
            f"shape and predict())"
        )
    if not has_adapters(module):
        return frozen_copy(module)
    if isinstance(module, GaussianNetwork):
        view = CodesWithoutAdapters if isinstance(module, Decodes) else OutputsWithoutAdapters
        return view(module)
    if isinstance(module, ScoreNetwork):
        return ScoresWithoutAdapters(module)
    return WithoutAdapters(module)


def frozen_copy(module: M) -> M:
    """A copy that shares nothing with ``module`` and never trains."""
    return copy.deepcopy(module).requires_grad_(False)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside the block the network is as it was before ``add_lora``; for one thread at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class WithoutAdapters:
    """A view of a network with LoRA as it was before ``add_lora``: a ``Denoiser`` without weights.

    No gradient flows through its logits.
    """

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, Denoiser)
        self._network = module

    @property
    def vocab_size(self) -> int:
        """V of the network."""
        return self._network.vocab_size

    @property
    def mask_id(self) -> int:
        """The mask token of the network."""
        return self._network.mask_id

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Logits of the network without its adapters."""
        with adapters_off(self._network):
            return self._network.predict(x_t, attend=attend, positions=positions)


class ScoresWithoutAdapters:
    """The same view of a ``ScoreNetwork``."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, ScoreNetwork)
        self._network = module

    @property
    def process(self) -> Process:
        """Of the network."""
        return self._network.process

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """Log-scores of the network without its adapters."""
        with adapters_off(self._network):
            return self._network.log_score(x_t, total_noise, attend=attend)


class OutputsWithoutAdapters:
    """The same view of a ``GaussianNetwork``."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, GaussianNetwork)
        self.module = module

    @property
    def schedule(self) -> GaussianSchedule:
        """Of the network."""
        return self.module.schedule

    @property
    def prediction(self) -> Prediction:
        """Of the network."""
        return self.module.prediction

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the network's samples."""
        return self.module.shape

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        """Output of the network without its adapters."""
        with adapters_off(self.module):
            return self.module.predict(x_t, t, inputs)


class CodesWithoutAdapters(OutputsWithoutAdapters):
    """The same view of a ``GaussianNetwork`` that ``Decodes``."""

    def decode(self, x_0: State) -> Float[Tensor, "B ..."]:
        """As the network decodes, which adapters have no part in."""
        assert isinstance(self.module, Decodes)
        return self.module.decode(x_0)


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, detached but sharing memory: what a checkpoint holds."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


class Ema:
    r"""Moving average $a \leftarrow d\,a + (1 - d)\,\theta$ of the trainable parameters.

    The decay warms up, $d = \min(\mathrm{decay}, (1 + n) / (10 + n))$ after n updates, so that the
    first weights are soon forgotten (as in TensorFlow's ExponentialMovingAverage). Averages are
    kept in float32 or better.

    Args:
        module: averaged from its present weights on.
        decay: the limit of d, in [0, 1).
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.n_updates = 0
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call it after each optimiser step."""
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        for name, average in self._average.items():
            average.lerp_(self._parameters[name].to(average.dtype), 1 - decay)
        self.n_updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Inside the block the module holds the average; afterwards its own weights again."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and ``n_updates``."""
        return {**self._average, "n_updates": torch.tensor(self.n_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state_dict()`` of an average over the same parameters.

        Raises:
            ValueError: the names or shapes differ.
        """
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(state)) or sorted(
            name for name in own if own[name].shape != state[name].shape
        )
        if wrong:
            raise ValueError(
                f"this EMA state belongs to other parameters: {wrong[0]} is missing on one side or "
                f"differs in shape; load the one saved with this model"
            )
        self.n_updates = int(state["n_updates"])
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
