"""Randomness per sample: a counter-based generator keyed by run seed, sample, step and position.

A draw is a pure function of its name, so results do not depend on the batch a sample sits in, on
micro-batching, on the number of processes or on a resume, and no global generator is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.processes.layout import FEW_STATES

MANY_TOKENS = 1000
"""Above this many tokens the cumulative sum of a categorical is taken in float64."""


class Stream(IntEnum):
    """What a draw is for; streams are independent of each other."""

    TOKEN = 0
    NOISE = 0
    """Of continuous samples, which have no tokens."""
    POSITION = 1
    SLOT = 2
    START = 3


STREAMS_PER_STEP = 4
"""Numbers reserved for each step, so that a new stream leaves the draws of the others alone."""


@runtime_checkable
class Rng(Protocol):
    """The kinds of draw that samplers and algorithms make.

    ``rescore.proof`` implements it a second time, to enumerate every outcome of the same code.
    """

    def categorical(
        self, probs: Float[Tensor, "B R V"], stream: Stream, step: int, where: Int[Tensor, "B R"]
    ) -> Int[Tensor, "B R"]:
        """One index per row from ``probs`` (need not be normalised); ``where`` names the rows."""
        ...

    def ordered(
        self, log_weight: Float[Tensor, "B R"], n: int, step: int, where: Int[Tensor, "B R"]
    ) -> Int[Tensor, "B n"]:
        """n rows without replacement, in the order drawn, in proportion to their weights."""
        ...

    def log_times(
        self, log_rate: Float[Tensor, "B R"], step: int, where: Int[Tensor, "B R"]
    ) -> Float[Tensor, "B R"]:
        """The logarithm of a time per row, exponential with this rate."""
        ...

    def normal(self, stream: Stream, step: int, where: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """A standard normal per row, float64."""
        ...


@dataclass(frozen=True)
class SampleRng:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    The key is the seed; the counter is (position, step and stream, sample id).
    """

    seed: int
    sample_id: Int[Tensor, " B"]

    def take(self, rows: Int[Tensor, " n"]) -> SampleRng:
        """The generators of some of the samples."""
        return SampleRng(self.seed, self.sample_id[rows])

    def uniform(self, stream: Stream, step: int, where: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Uniforms on the grid (k + 1/2) 2^-52 in (0, 1), float64: one per sample and row name."""
        sample, draw = self.sample_id[:, None], step * STREAMS_PER_STEP + stream
        counter = [where & _LOW, torch.full_like(sample, draw), sample & _LOW, sample >> 32]
        high, low = _philox(counter, self.seed & _LOW, (self.seed >> 32) & _LOW)[:2]
        bits = ((high >> 6) << 26) | (low >> 6)  # 52 bits
        return (bits.double() + 0.5) * 2.0**-52

    def categorical(
        self, probs: Float[Tensor, "B R V"], stream: Stream, step: int, where: Int[Tensor, "B R"]
    ) -> Int[Tensor, "B R"]:
        """One uniform per row and the inverse CDF; a token of probability 0 is never drawn."""
        wide = probs.shape[-1] > MANY_TOKENS or probs.dtype == torch.float64
        cdf = probs.cumsum(-1, dtype=torch.float64 if wide else torch.float32)
        u = self.uniform(stream, step, where)
        if cdf.dtype == torch.float32:  # rounded down to 24 bits, so that u stays below 1
            u = (u * 2.0**24).floor() * 2.0**-24
        threshold = (u.to(cdf.dtype) * cdf[..., -1])[..., None]
        if probs.shape[-1] <= FEW_STATES:
            token = (cdf <= threshold).to(cdf.dtype).sum(-1).long()
        else:
            token = torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
        return token.clamp(max=probs.shape[-1] - 1)  # NaN probabilities are reported by the trainer

    def ordered(
        self, log_weight: Float[Tensor, "B R"], n: int, step: int, where: Int[Tensor, "B R"]
    ) -> Int[Tensor, "B n"]:
        """The n largest of log w + Gumbel noise, largest first: a Plackett-Luce draw."""
        gumbel = -(-self.uniform(Stream.POSITION, step, where).log()).log()
        key = log_weight.double() + gumbel
        return key.argsort(dim=-1, descending=True, stable=True)[:, :n]

    def log_times(
        self, log_rate: Float[Tensor, "B R"], step: int, where: Int[Tensor, "B R"]
    ) -> Float[Tensor, "B R"]:
        """log(-log u) - log rate, in the dtype of the rates; rates may be too small for it."""
        waiting = -self.uniform(Stream.POSITION, step, where).log()
        return waiting.log().to(log_rate.dtype) - log_rate

    def normal(self, stream: Stream, step: int, where: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """The inverse CDF of one uniform per row; none is beyond 8.2."""
        return torch.special.ndtri(self.uniform(stream, step, where))


_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _philox(counter: list[Tensor], key_0: int, key_1: int) -> list[Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 (products wrap modulo 2^64).

    Words that no product reads (c_1, c_3) may carry anything above their 32 bits.
    """
    c_0, c_1, c_2, c_3 = counter
    for _ in range(10):
        product_0, product_1 = c_0 * _MULTIPLIERS[0], c_2 * _MULTIPLIERS[1]
        c_0, c_1, c_2, c_3 = (
            ((product_1 >> 32) ^ c_1 ^ key_0) & _LOW,
            product_1,
            ((product_0 >> 32) ^ c_3 ^ key_1) & _LOW,
            product_0,
        )
        key_0, key_1 = (key_0 + _WEYL[0]) & _LOW, (key_1 + _WEYL[1]) & _LOW
    return [c_0, c_1 & _LOW, c_2, c_3 & _LOW]
