"""Worlds small enough to enumerate: few positions and tokens, a random reward, a seeded policy.

On an enumerable world every denoiser is a table of logits, so all mathematics is done on the table
and carried to the parameters once, by the Jacobian of the table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.tiny import MlpDenoiser, TableDenoiser, TinyDenoiser
from rescore.processes.masked import Order, blocks_of, reveal_quota
from rescore.sampling.decoder import Decoder
from rescore.types import Prompts

POLICY_SEED, REFERENCE_SEED, REWARD_SEED = 1, 2, 3
HIDDEN = 4
"""Units of the MLP: fewer parameters than table entries, so that states share them."""


@dataclass(frozen=True)
class TokenWorld:
    """V tokens, L positions, all of them to be written; a reward uniform in [0, 1] per sample."""

    vocab_size: int
    length: int
    seed: int = field(default=0, kw_only=True)
    """Draws another reward and other networks."""

    def prompts(self, n: int) -> Prompts:
        """n samples of the one prompt there is, all masked; each its own group."""
        shape = (n, self.length)
        return Prompts(
            tokens=torch.full(shape, self.vocab_size),
            editable=torch.ones(shape, dtype=torch.bool),
            group=torch.arange(n),
            sample_id=torch.arange(n),
            info={},
        )

    def reward(self, x_0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """r(x_0), a table of independent uniforms."""
        shape = (self.vocab_size,) * self.length
        table = torch.rand(shape, generator=self.generator(REWARD_SEED), dtype=torch.float64)
        return table[x_0.unbind(1)]

    def generator(self, seed: int) -> torch.Generator:
        """What draws the rewards or the weights of a network."""
        return torch.Generator().manual_seed(1000 * self.seed + seed)


@dataclass(frozen=True)
class World(TokenWorld):
    """A masked process in T steps and the policy's network; seeded, in float64."""

    steps: int
    blocks: int
    network: Literal["table", "mlp"]
    """``table``: free logits for every state. ``mlp``: states share parameters."""

    def __str__(self) -> str:
        """Size, tokens per step (``|`` between blocks) and network, e.g. "V3L3 2+1 mlp"."""
        block = blocks_of(self.prompts(1).editable, self.blocks)
        quota = reveal_quota(block, self.blocks, self.steps)[0].view(self.blocks, -1).tolist()
        pattern = "|".join("+".join(map(str, steps)) for steps in quota)
        return f"V{self.vocab_size}L{self.length} {pattern} {self.network}"

    def decoder(self, order: Order, temperature: float) -> Decoder:
        """The protocol of this world with the given order and temperature."""
        return Decoder(steps=self.steps, blocks=self.blocks, order=order, temperature=temperature)

    def denoiser(self, seed: int) -> TinyDenoiser:
        """The network drawn with ``POLICY_SEED`` or ``REFERENCE_SEED``."""
        generator = self.generator(seed)
        if self.network == "table":
            return TableDenoiser(self.vocab_size, self.length, generator=generator)
        return MlpDenoiser(self.vocab_size, self.length, generator=generator, hidden=HIDDEN)

    def canvases(self) -> Int[Tensor, "S L"]:
        """Every canvas of tokens and masks; row s is the number s in base V + 1."""
        digits = torch.arange(self.vocab_size + 1)
        return torch.cartesian_prod(*[digits] * self.length)


class Tabled:
    """A denoiser as its table of logits, which keeps account of its use.

    Where gradients are enabled, each forward hands out a fresh leaf, so that the gradient of any
    scalar is had per network row; ``gradient`` sums the rows of a state.
    """

    def __init__(self, table: Float[Tensor, "S L V"]) -> None:
        self.table = table
        self.vocab_size = table.shape[-1]
        self.mask_id = self.vocab_size
        self.rows = 0
        """Network rows asked for so far."""
        self.uses: list[tuple[Int[Tensor, " N"], Float[Tensor, "N L V"]]] = []
        """State and logits of every row handed out with gradients, call by call."""

    @classmethod
    @torch.no_grad()
    def of(cls, denoiser: TinyDenoiser, canvases: Int[Tensor, "S L"]) -> Tabled:
        """The table of a denoiser: its logits on every canvas."""
        return cls(denoiser.predict(canvases))

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Look the canvases up. Nothing is padded in these worlds, so ``attend`` is not needed."""
        place = torch.arange(x_t.shape[1] - 1, -1, -1)
        state = (x_t * (self.vocab_size + 1) ** place).sum(-1)
        logits = self.table[state]
        self.rows += len(x_t)
        if torch.is_grad_enabled():
            logits.requires_grad_()
            self.uses.append((state, logits))
        return logits if positions is None else logits.take_along_dim(positions[..., None], dim=1)

    def gradient(self, value: Float[Tensor, ""]) -> Float[Tensor, "S L V"]:
        """d value / d table."""
        total = torch.zeros_like(self.table)
        leaves = [logits for _, logits in self.uses]
        for (state, _), part in zip(self.uses, torch.autograd.grad(value, leaves), strict=True):
            total.index_add_(0, state, part)
        return total


@functools.cache
def jacobian(world: World) -> Float[Tensor, "S L V D"]:
    """d table / d parameters of the policy, at masked positions (elsewhere logits play no part).

    D counts the parameters that matter; for the free table this is a part of the identity.
    """
    denoiser, canvases = world.denoiser(POLICY_SEED), world.canvases()
    logits = denoiser.predict(canvases)
    rows = torch.eye(logits.numel(), dtype=logits.dtype).unflatten(1, logits.shape)
    parts = torch.autograd.grad(
        logits, list(denoiser.parameters()), grad_outputs=rows, is_grads_batched=True
    )
    full = torch.cat([part.flatten(1) for part in parts], 1).unflatten(0, logits.shape)
    full = full * (canvases == world.vocab_size)[..., None, None]
    return full[..., full.abs().sum((0, 1, 2)) > 0]
