"""Dilated convolutions over DNA: a masked denoiser and a score network of one body.

The body is the one of the published DRAKES model (Wang et al. 2024, arXiv:2410.13643): a first
convolution, then residual layers h + relu(conv(norm(h + shift))), wider and wider apart, and a
head that sees one position at a time. The published masked model is not told the time: its time
embedding is that of time 0, the same for every canvas, so here each layer's ``shift`` is a free
vector (``rescore.models.importers.load_drakes`` computes it from the published layers). The score
network makes it from Gaussian Fourier features of the noise.

Convolutions run with the features last in memory, which is several times faster on the CPU than
the default order. Shape suffixes: B samples, L positions, R rows asked for, D width, V tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.denoiser import TokenConfig
from rescore.models.inputs import check_canvas, check_total_noise
from rescore.processes.ctmc import Uniform


@dataclass(frozen=True, kw_only=True)
class ConvConfig(TokenConfig):
    """The shape of a ``ConvDenoiser`` or ``ConvScore``."""

    vocab_size: int = 4
    """V: ordinary tokens 0 ... V - 1; the mask of the absorbing process is V."""
    length: int = 200
    """The longest canvas."""
    width: int = 32
    """D: features per position; even."""
    dilations: tuple[int, ...] = (1, 1, 4, 16, 64)
    """Distance between the positions that a layer looks at, in the order of the layers."""
    stacks: int = 1
    """Layers of each dilation, one after the other; the published model has 4 and width 128."""
    kernel: int = 9
    """Positions that a layer looks at; odd."""
    process: Literal["absorbing", "uniform"] = "absorbing"
    """The forward process of one token: ``absorbing`` makes a ``ConvDenoiser``, ``uniform`` a
    ``ConvScore``."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length", "width", "stacks", "kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations must be positive numbers, got {self.dilations}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it has a middle; got {self.kernel}")
        if self.width % 2:
            raise ValueError(f"width must be even (sines and cosines), got {self.width}")
        if self.process not in ("absorbing", "uniform"):
            raise ValueError(f"process is '{self.process}'; choose 'absorbing' or 'uniform'")

    def layers(self) -> tuple[int, ...]:
        """The dilation of every layer."""
        return tuple(d for d in self.dilations for _ in range(self.stacks))

    @property
    def uniform(self) -> bool:
        return self.process == "uniform"

    def network(self, generator: torch.Generator) -> ConvDenoiser | ConvScore:
        """A new network; ``generator`` draws its weights."""
        if self.process == "absorbing":
            return ConvDenoiser(self, generator=generator)
        return ConvScore(self, generator=generator)


class ConvBody(nn.Module):
    """What the two have in common. The names of the modules are those of the published model.

    Args:
        config: its shape.
        n_states: rows of the one-hot canvas; the head has a column per ordinary token.
    """

    def __init__(self, config: ConvConfig, n_states: int) -> None:
        super().__init__()
        self.config = config
        self.n_states = n_states
        width, kernel, layers = config.width, config.kernel, config.layers()
        with torch.device("meta"):  # no memory, no draw from the global generator
            self.linear = Convolution(n_states, width, kernel)
            self.convs = nn.ModuleList(
                Convolution(width, width, kernel, dilation=d) for d in layers
            )
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
            self.final_conv = nn.Sequential(
                Convolution(width, width, 1), nn.ReLU(), Convolution(width, config.vocab_size, 1)
            )

    def logits(
        self,
        x_t: Int[Tensor, "B L"],
        shifts: list[Tensor],
        attend: Bool[Tensor, "B L"] | None,
        positions: Int[Tensor, "B R"] | None,
    ) -> Float[Tensor, "B R V"]:
        """The head's columns; a shift is [D] or [B, 1, D]. Padding reads as beyond the end: 0."""
        seen = None if attend is None else attend[..., None].to(self.linear.weight.dtype)
        canvas = F.one_hot(x_t, self.n_states).to(self.linear.weight.dtype)
        h_BLD = self.linear(canvas, seen).relu()
        for conv, norm, shift in zip(self.convs, self.norms, shifts, strict=True):
            h_BLD = h_BLD + conv(norm(h_BLD + shift), seen).relu()
        h_BRD = h_BLD if positions is None else h_BLD.take_along_dim(positions[..., None], dim=1)
        return self.final_conv(h_BRD)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in; predictions near uniform."""
        self.to_empty(device="cpu")
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norms." in name and name.endswith("weight") else 0.0)
                continue
            std = parameter[0].numel() ** -0.5
            if name == "final_conv.2.weight":
                std = 0.02
            parameter.normal_(0.0, std, generator=generator)


class ConvDenoiser(ConvBody):
    """A ``Denoiser`` that the masks on the canvas tell the time: logits over V tokens.

    Args:
        config: its shape.
        generator: a CPU generator, the only source of randomness in the initial weights, which
            are float32 on the CPU; move them with ``.to``. None leaves the weights without memory,
            for ``load_state_dict(..., assign=True)``.
    """

    def __init__(self, config: ConvConfig, *, generator: torch.Generator | None) -> None:
        super().__init__(config, config.vocab_size + 1)
        with torch.device("meta"):
            self.shifts = nn.ParameterList(torch.empty(config.width) for _ in config.layers())
        if generator is not None:
            self._initialise(generator)

    @property
    def vocab_size(self) -> int:
        """V: columns of the logits."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int:
        """V: it has no logit."""
        return self.config.vocab_size

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Logits at ``positions`` (all when None); only those rows go through the head.

        Raises:
            ValueError: the canvas is too long or, checked on the CPU only, a token is no state.
        """
        check_canvas(x_t, length=self.config.length, n_states=self.n_states)
        return self.logits(x_t, list(self.shifts), attend, positions)


class ConvScore(ConvBody):
    r"""A ``ScoreNetwork`` for uniform noise, told the noise through Fourier features.

    The head gives, at each position, a law $q$ of the clean token; the score is the ratio of what
    uniform noise makes of it, $m = e^{-n} q + (1 - e^{-n}) / V$:

    $$\log s_{l, v} = \log m_l(v) - \log m_l(x^l)$$

    If $q_l$ is the law of $x_0^l$ given the other positions of $x_t$, this is the concrete score
    exactly, because tokens are noised independently; and whatever $q$ is, the score is between
    $k$ and $1/k$, $k = (1 - e^{-n}) / (1 - e^{-n} + V e^{-n})$, as a true one must be.

    Args:
        config: its shape.
        generator: see ``ConvDenoiser``; never None.
    """

    def __init__(self, config: ConvConfig, *, generator: torch.Generator) -> None:
        super().__init__(config, config.vocab_size)
        self.process = Uniform(config.vocab_size)
        with torch.device("meta"):
            self.time_embedder = FourierEmbedding(config.width)
            self.time_layers = nn.ModuleList(
                nn.Linear(config.width, config.width) for _ in config.layers()
            )
        self._initialise(generator)
        self.time_embedder.frequency.normal_(0.0, 1.0, generator=generator)

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """Log-scores in float32 or better; 0 at the token itself.

        Args:
            x_t: the state.
            total_noise: n, not negative.
            attend: False at padding, which influences no other position.

        Raises:
            TypeError: ``total_noise`` is of an integer type.
            ValueError: the canvas is too long, ``total_noise`` is not [B], or (checked on the CPU
                only, see ``inputs.check_tokens``) a token is no state.
        """
        check_canvas(x_t, length=self.config.length, n_states=self.n_states)
        check_total_noise(total_noise, x_t)
        features = self.time_embedder(total_noise)
        shifts = [layer(features)[:, None] for layer in self.time_layers]
        logits = self.logits(x_t, shifts, attend, None)
        log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        n = total_noise.to(torch.promote_types(total_noise.dtype, log_q.dtype))[:, None, None]
        fresh = (-torch.expm1(-n)).log() - math.log(self.config.vocab_size)
        log_m = torch.logaddexp(log_q - n.to(log_q.dtype), fresh.to(log_q.dtype))
        return log_m - log_m.take_along_dim(x_t[..., None], dim=-1)


class FourierEmbedding(nn.Module):
    r"""Sines and cosines of $2 \pi f (1 - e^{-n})$ at fixed frequencies $f$, then a linear layer.

    The argument is the probability that a token was drawn anew, so it lies in [0, 1).
    """

    frequency: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.empty(width // 2))
        self.linear = nn.Linear(width, width)

    def forward(self, total_noise: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """relu(W features + b)."""
        exact = torch.promote_types(total_noise.dtype, self.frequency.dtype)
        angle = 2 * math.pi * -torch.expm1(-total_noise.to(exact))[:, None] * self.frequency
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.linear(features.to(self.linear.weight.dtype)).relu()


class Convolution(nn.Conv1d):
    """A convolution along L that keeps the features last and the length, with zeros outside.

    [B, L, C] in memory is what a 2-d convolution calls channels-last, with one row of L pixels.
    """

    def forward(
        self, input: Float[Tensor, "B L C"], seen: Float[Tensor, "B L 1"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """The convolution of ``input``, times ``seen`` if given."""
        h_BLC = input if seen is None else input * seen
        image = h_BLC.transpose(1, 2).unsqueeze(2)
        kernel = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        dilation = self.dilation[0]
        padding = dilation * (self.kernel_size[0] - 1) // 2
        out = F.conv2d(image, kernel, self.bias, padding=(0, padding), dilation=(1, dilation))
        return out.squeeze(2).transpose(1, 2)
