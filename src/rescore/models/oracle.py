"""A small convolutional ensemble that reads sequences and predicts a number: an activity oracle."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class ConvolutionalEnsemble(nn.Module):
    """M networks of two convolutions side by side, each with weights of its own.

    A member is: one-hot sequence, convolution over ``width`` positions, ReLU, maximum over
    neighbouring positions, convolution over 5 of those, ReLU, mean and maximum over the sequence,
    a linear read-out. Members see no more of each other than their common input. Filters may start
    from known patterns instead of noise, which takes a tenth of the training; all are trained.

    Args:
        vocab_size: V; a token is an index below it.
        generator: draws the weights, normal of variance 2 / fan-in; the read-out starts at 0.
        members: M.
        channels: of both convolutions, per member.
        width: positions that a first-layer filter sees.
        pool: neighbouring positions of which only the maximum goes on.
        filters: patterns (F, V, width) from which the first F channels of each member start, scaled
            so that a match scores 2; they answer from 1 on. None = all from noise.
        offset: what every member says before it is trained: the mean of the targets.
        dtype: of the weights.

    Raises:
        ValueError: the filters do not fit V, ``channels`` or ``width``.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        generator: torch.Generator,
        members: int = 3,
        channels: int = 16,
        width: int = 12,
        pool: int = 4,
        filters: Float[Tensor, "F V w"] | None = None,
        offset: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.vocab_size, self.members, self.pool = vocab_size, members, pool

        def weight(*shape: int) -> nn.Parameter:
            draw = torch.randn(shape, generator=generator, dtype=dtype)
            return nn.Parameter(draw * (2 / (shape[1] * shape[2])) ** 0.5)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype))

        units = members * channels
        self.weight_1, self.bias_1 = weight(units, vocab_size, width), zeros(units)
        self.weight_2, self.bias_2 = weight(units, channels, 5), zeros(units)
        self.weight_out, self.bias_out = zeros(members, 2 * channels), zeros(members)
        with torch.no_grad():
            self.bias_out.fill_(offset)
        if filters is not None:
            self._start_from(filters, channels)

    def _start_from(self, filters: Float[Tensor, "F V w"], channels: int) -> None:
        n, shape = len(filters), tuple(self.weight_1.shape[1:])
        if n > channels or tuple(filters.shape[1:]) != shape:
            raise ValueError(
                f"filters of shape {tuple(filters.shape)}; expected at most {channels} of {shape}"
            )
        with torch.no_grad():
            self.weight_1.unflatten(0, (self.members, channels))[:, :n] = filters.to(self.weight_1)
            self.bias_1.unflatten(0, (self.members, channels))[:, :n] = -1.0

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B M"]:
        """What each member says.

        Raises:
            ValueError: a token is none of the vocabulary, such as a mask.
        """
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if bool(outside.any()):
            row, place = outside.nonzero()[0].tolist()
            raise ValueError(
                f"token {tokens[row, place].item()} at position {place} of sequence {row} is not "
                f"in the vocabulary; expected 0 to {self.vocab_size - 1}, with no mask left"
            )
        x = functional.one_hot(tokens, self.vocab_size).transpose(1, 2).to(self.weight_1)
        x = functional.conv1d(x, self.weight_1, self.bias_1, padding=self.weight_1.shape[2] // 2)
        x = functional.max_pool1d(functional.relu(x), self.pool)
        x = functional.conv1d(x, self.weight_2, self.bias_2, padding=2, groups=self.members)
        x = functional.relu(x).unflatten(1, (self.members, -1))
        pooled = torch.cat([x.mean(-1), x.amax(-1)], dim=-1)
        return (pooled * self.weight_out).sum(-1) + self.bias_out
