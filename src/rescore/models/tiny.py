"""Denoisers for worlds small enough to enumerate (V <= 3, L <= 4): a free table and a small MLP.

Both read the whole canvas and are float64 by default, so that exact statements can be tested.
Padding (``attend`` False) is read as the mask token, so its content influences nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class TinyDenoiser(nn.Module):
    """What the two have in common: a canvas of ``length`` positions, logits for all of them."""

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.length = length

    @property
    def mask_id(self) -> int:
        """V: it has no logit."""
        return self.vocab_size

    def logits(self, x_t: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Logits at every position."""
        raise NotImplementedError

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Logits at ``positions`` (all when None).

        Raises:
            ValueError: the canvas has not exactly ``length`` positions.
        """
        if x_t.shape[1] != self.length:
            raise ValueError(
                f"canvas of {x_t.shape[1]} positions; this model takes exactly {self.length}"
            )
        logits = self.logits(x_t if attend is None else torch.where(attend, x_t, self.mask_id))
        return logits if positions is None else logits.take_along_dim(positions[..., None], dim=1)


class TableDenoiser(TinyDenoiser):
    """Free logits for every state: ``table[state, position, token]``, state read in base V + 1.

    Position 0 is the most significant digit. Any conditional law of every masked position can be
    represented, so an optimum over tables is an optimum over all denoisers.

    Args:
        vocab_size: V.
        length: L.
        generator: draws the table, normal of standard deviation ``scale``.
        scale: 0 makes every prediction uniform.
        dtype: of the table.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        generator: torch.Generator,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(vocab_size, length)
        shape = ((vocab_size + 1) ** length, length, vocab_size)
        self.table = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=dtype))

    def logits(self, x_t: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """The rows of the table that the canvases name."""
        place = torch.arange(self.length - 1, -1, -1, device=x_t.device)
        return self.table[(x_t * (self.vocab_size + 1) ** place).sum(-1)]


class MlpDenoiser(TinyDenoiser):
    """One hidden layer of tanh units on the one-hot canvas; states share parameters.

    Args:
        vocab_size: V.
        length: L.
        generator: draws the weights, normal of variance 1 / fan-in.
        hidden: number of units.
        dtype: of the weights.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        generator: torch.Generator,
        hidden: int = 8,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(vocab_size, length)
        inputs, outputs = length * (vocab_size + 1), length * vocab_size

        def weight(n_out: int, n_in: int) -> nn.Parameter:
            draw = torch.randn(n_out, n_in, generator=generator, dtype=dtype)
            return nn.Parameter(draw * n_in**-0.5)

        self.weight_in = weight(hidden, inputs)
        self.bias_in = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.weight_out = weight(outputs, hidden)
        self.bias_out = nn.Parameter(torch.zeros(outputs, dtype=dtype))

    def logits(self, x_t: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """``W_out tanh(W_in onehot(x_t) + b_in) + b_out``."""
        canvas = nn.functional.one_hot(x_t, self.vocab_size + 1).flatten(1).to(self.weight_in)
        units = torch.tanh(canvas @ self.weight_in.T + self.bias_in)
        out = units @ self.weight_out.T + self.bias_out
        return out.unflatten(-1, (self.length, self.vocab_size))
