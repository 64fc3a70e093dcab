"""The transformer that SEDD and MDLM share: every block is told the noise level.

A diffusion transformer (DiT, Peebles and Xie 2023, arXiv:2212.09748): an embedding of the total
noise sets the scale, shift and gate of each block (adaLN-zero: at first all are 0 and every block
passes on what it reads). Positions are rotary (arXiv:2104.09864), attention is full, there is no
dropout. Modules bear the names of the published SEDD and MDLM checkpoints.

Shape suffixes: B samples, L positions, R rows asked for, D width, C width of the condition,
H heads, E = D / H, S states. N is B, or 1 where all samples have the same noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.denoiser import TokenConfig
from rescore.models.transformer import rotary_angles, rotate

FREQUENCIES = 128
"""Cosines, and as many sines, in the embedding of the noise."""
LONGEST_PERIOD = 10000.0
"""The slowest of them has this period, up to the factor 2 pi."""


@dataclass(frozen=True, kw_only=True)
class DiffusionTransformerConfig(TokenConfig):
    """The shape of a ``DiffusionTransformer``.

    Ordinary tokens are 0 ... V - 1; the mask, if there is one, is V.
    """

    width: int = 64
    """D: features per position."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """H: attention heads; twice their number divides the width."""
    cond_width: int = 128
    """C: features of the noise level."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length", "width", "depth", "heads", "cond_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"rotary positions rotate pairs of features: width must be a multiple of "
                f"2 * heads, got width {self.width} and heads {self.heads}"
            )


class DiffusionTransformer(nn.Module):
    """Token embedding, blocks and output layer; what the outputs mean is for subclasses to say.

    Args:
        config: its shape.
        n_states: S, rows of the token embedding and columns of the output.
        generator: a CPU generator, the only source of randomness in the initial weights, which
            are float32 on the CPU. None leaves them without memory, for
            ``load_state_dict(..., assign=True)``.
    """

    def __init__(
        self,
        config: DiffusionTransformerConfig,
        n_states: int,
        *,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        with torch.device("meta"):  # no memory, no draw from the global generator
            self.vocab_embed = TokenEmbedding(n_states, config.width)
            self.sigma_map = NoiseEmbedding(config.cond_width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.output_layer = OutputLayer(config, n_states)
        if generator is not None:
            self.to_empty(device="cpu")
            self._initialise(generator)

    def outputs(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " N"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R S"]:
        """What the output layer says at ``positions`` (everywhere when None)."""
        h_BLD = self.vocab_embed(x_t)
        c_NC = F.silu(self.sigma_map(total_noise, h_BLD.dtype))
        rotation = rotary_angles(x_t.shape[1], self.head_width, h_BLD)
        mask = None if attend is None else attend[:, None, None, :]
        for block in self.blocks:
            h_BLD = block(h_BLD, c_NC, mask, rotation)
        h_BRD = h_BLD if positions is None else h_BLD.take_along_dim(positions[..., None], dim=1)
        return self.output_layer(h_BRD, c_NC)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in; adaLN and the output are 0, as in DiT."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
            elif "adaLN_modulation" in name or name == "output_layer.linear.weight":
                parameter.zero_()
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


class TokenEmbedding(nn.Module):
    """One vector per state."""

    def __init__(self, n_states: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(n_states, width))

    def forward(self, x_t: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The vectors of the tokens."""
        return F.embedding(x_t, self.embedding)


class NoiseEmbedding(nn.Module):
    """Cosines and sines of the total noise, through a small network."""

    def __init__(self, cond_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, cond_width), nn.SiLU(), nn.Linear(cond_width, cond_width)
        )

    def forward(self, total_noise: Float[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N C"]:
        """The embedding; angles are computed in float32 or better, whatever ``dtype``."""
        exact = torch.promote_types(torch.promote_types(total_noise.dtype, dtype), torch.float32)
        index = torch.arange(FREQUENCIES, device=total_noise.device, dtype=exact)
        frequency = (-math.log(LONGEST_PERIOD) / FREQUENCIES * index).exp()
        angle = total_noise.to(exact)[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))


class Block(nn.Module):
    """Attention, then a GELU network four times as wide, each scaled, shifted and gated."""

    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )
        self.adaLN_modulation = nn.Linear(config.cond_width, 6 * width)

    def forward(
        self,
        h_BLD: Float[Tensor, "B L D"],
        c_NC: Float[Tensor, "N C"],
        mask: Bool[Tensor, "B 1 1 L"] | None,
        rotation: tuple[Float[Tensor, "L E"], Float[Tensor, "L E"]],
    ) -> Float[Tensor, "B L D"]:
        """One block; ``mask`` is True at keys that may be attended to."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_NC)[:, None].chunk(
            6, dim=-1
        )
        a_BLD = self.norm1(h_BLD) * (1 + scale1) + shift1
        h_BLD = h_BLD + gate1 * self.attn_out(self._attention(a_BLD, mask, rotation))
        return h_BLD + gate2 * self.mlp(self.norm2(h_BLD) * (1 + scale2) + shift2)

    def _attention(
        self,
        a_BLD: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "B 1 1 L"] | None,
        rotation: tuple[Float[Tensor, "L E"], Float[Tensor, "L E"]],
    ) -> Float[Tensor, "B L D"]:
        qkv = self.attn_qkv(a_BLD).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHLE, k_BHLE = rotate(q_BHLE, *rotation), rotate(k_BHLE, *rotation)
        o_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask)
        return o_BHLE.transpose(1, 2).flatten(2)


class OutputLayer(nn.Module):
    """A norm, scaled and shifted, and one column per state."""

    def __init__(self, config: DiffusionTransformerConfig, n_states: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, bias=False)
        self.linear = nn.Linear(config.width, n_states)
        self.adaLN_modulation = nn.Linear(config.cond_width, 2 * config.width)

    def forward(
        self, h_BRD: Float[Tensor, "B R D"], c_NC: Float[Tensor, "N C"]
    ) -> Float[Tensor, "B R S"]:
        """The columns at every row."""
        shift, scale = self.adaLN_modulation(c_NC)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(h_BRD) * (1 + scale) + shift)
