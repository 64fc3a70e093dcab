"""A small UNet for images [C H W], told the time and, if there are any, class labels.

Residual blocks of two 3 x 3 convolutions with group norm, one on the way down and one on the way up
at each resolution, and one at the lowest in between (DDPM, arXiv:2006.11239, without attention and
dropout). The sum of the embeddings of time and label shifts and scales the second norm of each
block. Convolutions run with the channels last in memory, which is faster on the CPU.
Shape suffixes: B samples, C channels, H rows, W columns, E features of time and label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rescore.models.gaussian_network import GaussianConfig
from rescore.processes.convert import Prediction
from rescore.processes.gaussian_schedules import GaussianSchedule

GROUP = 8
"""Channels that a group norm takes together."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig(GaussianConfig):
    """The shape of a ``UNet``."""

    channels: int = 1
    """C: of an image."""
    size: int = 8
    """H and W; halved from one width to the next."""
    n_labels: int = 0
    """Values of the input "label"; 0 where there is none. The value ``n_labels`` stands for no
    label, and is what images without one are given."""
    widths: tuple[int, ...] = (24, 48)
    """Channels at each resolution, the finest first; multiples of 8."""

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("size", 1), ("n_labels", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.widths or any(width < GROUP or width % GROUP for width in self.widths):
            raise ValueError(f"widths must be positive multiples of {GROUP}, got {self.widths}")
        halvings = len(self.widths) - 1
        if self.size % 2**halvings:
            raise ValueError(
                f"size={self.size} cannot be halved {halvings} times, as {len(self.widths)} widths "
                f"ask for; use fewer widths, or a multiple of {2**halvings}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def network(self, generator: torch.Generator) -> UNet:
        """A new network; ``generator`` draws its weights."""
        return UNet(self, generator=generator)


class UNet(nn.Module):
    """A ``GaussianNetwork``, unconditional or told class labels.

    Args:
        config: its shape.
        generator: a CPU generator, the only source of randomness in the initial weights, which are
            float32 on the CPU. The head starts at 0.
    """

    def __init__(self, config: UNetConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        widths, n_features = config.widths, 4 * config.widths[0]
        pairs = list(itertools.pairwise(widths))
        with torch.device("meta"):  # no memory, no draw from the global generator
            self.time = nn.Linear(n_features, n_features)
            self.label = nn.Embedding(config.n_labels + 1, n_features)
            self.into = nn.Conv2d(config.channels, widths[0], 3, padding=1)
            self.down = nn.ModuleList(Block(width, width, n_features) for width in widths[:-1])
            self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
            self.middle = Block(widths[-1], widths[-1], n_features)
            self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
            self.up = nn.ModuleList(Block(2 * width, width, n_features) for width in widths[:-1])
            self.norm = nn.GroupNorm(widths[0] // GROUP, widths[0])
            self.out = nn.Conv2d(widths[0], config.channels, 3, padding=1)
        self._initialise(generator)

    @property
    def schedule(self) -> GaussianSchedule:
        return self.config.schedule

    @property
    def prediction(self) -> Prediction:
        return self.config.prediction

    @property
    def shape(self) -> tuple[int, ...]:
        return self.config.shape

    def predict(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /
    ) -> Float[Tensor, "B C H W"]:
        """The output; "label" is the one input it looks at.

        Raises:
            ValueError: the images have another shape, or (checked on the CPU only) a label does not
                exist.
        """
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(x_t.shape[1:])}; expected {self.shape}")
        features_BE = F.silu(self._time_features(t) + self.label(self._labels(x_t, inputs)))
        h = self.into(x_t.to(self.out.weight.dtype, memory_format=torch.channels_last))
        passed = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, features_BE)
            passed.append(h)
            h = shrink(h)
        h = self.middle(h, features_BE)
        levels = list(zip(self.grow, self.up, passed, strict=True))
        for grow, block, across in reversed(levels):
            h = F.interpolate(grow(h), scale_factor=2.0)
            h = block(torch.cat([h, across], 1), features_BE)
        return self.out(F.silu(self.norm(h))).contiguous()

    def _time_features(self, t: Float[Tensor, " B"]) -> Float[Tensor, "B E"]:
        """A linear map of sines and cosines of 1000 t at geometric frequencies from 1 to 1e-4."""
        half = self.time.in_features // 2
        k = torch.arange(half, device=t.device, dtype=t.dtype)
        angle = 1000 * t[:, None] * torch.exp(-math.log(1e4) * k / (half - 1))
        return self.time(torch.cat([angle.sin(), angle.cos()], 1).to(self.time.weight.dtype))

    def _labels(self, x_t: Tensor, inputs: Mapping[str, Tensor]) -> Int[Tensor, " B"]:
        none = self.config.n_labels
        if "label" not in inputs:
            return torch.full((len(x_t),), none, device=x_t.device)
        label = inputs["label"]
        if label.device.type == "cpu" and bool(((label < 0) | (label > none)).any()):
            raise ValueError(
                f"labels from {int(label.min())} to {int(label.max())}; expected 0 to {none - 1}, "
                f"or {none} for none"
            )
        return label

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Weights of variance 1 / fan-in, biases 0; a block adds nothing yet, the head says 0."""
        self.to_empty(device="cpu")
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name == "out.weight" or name.endswith("second.weight"):
                parameter.zero_()
            else:
                std = 1.0 if name == "label.weight" else parameter[0].numel() ** -0.5
                parameter.normal_(0.0, std, generator=generator)


class Block(nn.Module):
    """h + conv(silu(scale * norm(conv(silu(norm(h)))) + shift)), with 1 x 1 where widths differ."""

    def __init__(self, width_in: int, width: int, n_features: int) -> None:
        super().__init__()
        self.norm_first = nn.GroupNorm(width_in // GROUP, width_in)
        self.first = nn.Conv2d(width_in, width, 3, padding=1)
        self.given = nn.Linear(n_features, 2 * width)
        self.norm_second = nn.GroupNorm(width // GROUP, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.across = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(
        self, h: Float[Tensor, "B C H W"], features_BE: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B D H W"]:
        scale, shift = self.given(features_BE)[..., None, None].chunk(2, 1)
        new = self.norm_second(self.first(F.silu(self.norm_first(h))))
        return self.across(h) + self.second(F.silu(new * (1 + scale) + shift))
