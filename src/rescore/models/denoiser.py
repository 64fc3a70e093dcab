"""The contract between a network and everything above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts clean tokens from a partly masked canvas.

    It is time-agnostic: the number of masks on the canvas already tells the time of the absorbing
    process. Any object with these three members serves; nothing has to be subclassed.
    """

    @property
    def vocab_size(self) -> int:
        """V: columns of the logits."""
        ...

    @property
    def mask_id(self) -> int:
        """The token that means "not yet revealed"; never predicted."""
        ...

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Unnormalised log p(x_0 | x_t) at ``positions`` (all positions when None).

        Args:
            x_t: canvas, the mask token at unrevealed positions.
            attend: False at padding, which must not influence any other position.
            positions: rows wanted. A model that can, sends only these through its vocabulary head.

        Returns:
            Logits; the column of ``mask_id``, if there is one, is -inf.
        """
        ...


@dataclass
class Counted:
    """A denoiser that counts its network rows: canvases that went through the network."""

    network: Denoiser
    rows: int = 0

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Pass the call on and count its rows."""
        logits = self.network.predict(x_t, attend=attend, positions=positions)
        self.rows += len(x_t)
        return logits
