"""A small bidirectional transformer that fills in masked tokens.

Pre-norm blocks (Xiong et al. 2020, arXiv:2002.04745), full attention through PyTorch's
``scaled_dot_product_attention``, no dropout and no input for the time: the masks on the canvas say
how far the process is, as in MDLM without time conditioning (arXiv:2406.07524) and LLaDA
(arXiv:2502.09992).

Shape suffixes: B samples, L positions, R rows asked for, D width, H heads, E = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.denoiser import TokenConfig


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TokenConfig):
    """The shape of a ``Transformer``; ordinary tokens are 0 ... V - 1, the mask token is V."""

    width: int = 64
    """D: features per position."""
    depth: int = 4
    """Number of blocks."""
    heads: int = 4
    """H: attention heads, a divisor of the width."""
    position_embedding: Literal["learned", "rotary"] = "learned"
    """``learned``: one free vector per position. ``rotary``: queries and keys are rotated by angles
    proportional to the position (arXiv:2104.09864)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "length", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; change one of them"
            )
        if self.position_embedding == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(
                f"rotary positions rotate pairs of features: width / heads must be even, got "
                f"{self.width} / {self.heads}"
            )

    def network(self, generator: torch.Generator) -> Transformer:
        return Transformer(self, generator=generator)


class Transformer(nn.Module):
    """The denoiser: token and position embeddings, ``depth`` blocks, a norm and a vocabulary head.

    Args:
        config: its shape.
        generator: a CPU generator, the only source of randomness in the initial weights, which
            are float32 on the CPU; move them with ``.to``.
    """

    def __init__(self, config: TransformerConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # no memory, no draw from the global generator
            self.token = nn.Embedding(config.vocab_size + 1, config.width)
            if config.position_embedding == "learned":
                self.position = nn.Embedding(config.length, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.width)
            self.head = nn.Linear(config.width, config.vocab_size)
        self.to_empty(device="cpu")
        self._initialise(generator)

    @property
    def vocab_size(self) -> int:
        """V: columns of the logits."""
        return self.config.vocab_size

    @property
    def mask_id(self) -> int:
        """V: the last row of the token embedding; it has no logit."""
        return self.config.vocab_size

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Logits at ``positions`` (all when None); only those rows go through norm and head.

        Raises:
            ValueError: the canvas is longer than ``config.length``.
        """
        length = x_t.shape[1]
        if length > self.config.length:
            raise ValueError(
                f"canvas of {length} positions; this model takes at most {self.config.length}"
            )
        h_BLD = self.token(x_t)
        rotation = None
        if self.config.position_embedding == "learned":
            h_BLD = h_BLD + self.position.weight[:length]
        else:
            rotation = rotary_angles(length, self.config.width // self.config.heads, h_BLD)
        mask = None if attend is None else attend[:, None, None, :]
        for block in self.blocks:
            h_BLD = block(h_BLD, mask, rotation)
        h_BRD = h_BLD if positions is None else h_BLD.take_along_dim(positions[..., None], dim=1)
        return self.head(self.norm(h_BRD))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in; blocks start small, predictions near uniform."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            std = parameter.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std /= (2 * self.config.depth) ** 0.5
            if name == "head.weight":
                std = 0.02
            parameter.normal_(0.0, std, generator=generator)


class Block(nn.Module):
    """Attention, then a GELU network four times as wide, each added to what it read."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(
        self,
        h_BLD: Float[Tensor, "B L D"],
        mask: Bool[Tensor, "B 1 1 L"] | None,
        rotation: tuple[Float[Tensor, "L E"], Float[Tensor, "L E"]] | None,
    ) -> Float[Tensor, "B L D"]:
        """One block; ``mask`` is True at keys that may be attended to."""
        qkv = self.qkv(self.attention_norm(h_BLD)).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            q_BHLE, k_BHLE = rotate(q_BHLE, *rotation), rotate(k_BHLE, *rotation)
        a_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask)
        h_BLD = h_BLD + self.out(a_BHLE.transpose(1, 2).flatten(2))
        return h_BLD + self.down(F.gelu(self.up(self.mlp_norm(h_BLD))))


def rotary_angles(
    length: int, width: int, like: Tensor
) -> tuple[Float[Tensor, "L E"], Float[Tensor, "L E"]]:
    """Cosine and sine of ``l * 10000^(-2 i / width)``, the two halves of the features alike.

    Source: RoFormer, arXiv:2104.09864, section 3.2. In float32 or better, where ``like`` is.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    pair = torch.arange(0, width, 2, device=like.device, dtype=dtype)
    place = torch.arange(length, device=like.device, dtype=dtype)
    angle = torch.outer(place, 10000.0 ** (-pair / width)).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(
    x_BHLE: Float[Tensor, "B H L E"], cos: Float[Tensor, "L E"], sin: Float[Tensor, "L E"]
) -> Float[Tensor, "B H L E"]:
    """Rotate the pair (x_i, x_{i + E/2}) at each position by its angle; keeps the dtype."""
    first, second = x_BHLE.chunk(2, dim=-1)
    return (x_BHLE * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BHLE.dtype)
