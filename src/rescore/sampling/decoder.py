"""How a masked model is decoded: steps, blocks, order and temperatures. Part of the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rescore.processes.masked import Order


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoding protocol; two policies with the same network and different decoders differ."""

    steps: int
    """T: denoising steps, in all blocks together."""
    blocks: int = 1
    """Blocks finished in turn, left to right (semi-autoregressive); 1 = whole sequence."""
    order: Order = "random"
    """Which positions a step reveals."""
    temperature: float = 1.0
    """Of the law that tokens are drawn from; 0 takes the most probable token (evaluation only)."""
    position_temperature: float = 0.5
    """Of the position weights of ``plackett_luce`` and ``soft_low_confidence``."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.blocks < 1 or self.steps % self.blocks:
            raise ValueError(
                f"decoder: steps={self.steps} does not split into blocks={self.blocks}; "
                f"steps must be a positive multiple of blocks"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"decoder: temperature must not be negative, got {self.temperature}")
        if not 0 < self.position_temperature < math.inf:
            raise ValueError(
                f"decoder: position_temperature must be positive, got {self.position_temperature}"
            )

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.blocks

    def __str__(self) -> str:
        blocks = "" if self.blocks == 1 else f", {self.blocks} blocks"
        order = self.order.replace("_", " ")
        return f"{self.steps} steps{blocks}, {order} order, temperature {self.temperature:g}"
