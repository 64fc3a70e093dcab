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

MANY_TOKENS = 1000
"""Above this many tokens the cumulative sum of a categorical is taken in float64."""


class Stream(IntEnum):
    """What a draw is for; streams are independent of each other."""

    TOKEN = 0
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
        sample = self.sample_id[:, None].expand_as(where)
        counter = [
            where & _LOW,
            torch.full_like(where, step * STREAMS_PER_STEP + stream),
            sample & _LOW,
            (sample >> 32) & _LOW,
        ]
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
        threshold = u.to(cdf.dtype) * cdf[..., -1]
        token = torch.searchsorted(cdf, threshold[..., None], right=True).squeeze(-1)
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


_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _philox(counter: list[Tensor], key_0: int, key_1: int) -> list[Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 (products wrap modulo 2^64)."""
    c_0, c_1, c_2, c_3 = counter
    for _ in range(10):
        product_0, product_1 = c_0 * _MULTIPLIERS[0], c_2 * _MULTIPLIERS[1]
        c_0, c_1, c_2, c_3 = (
            ((product_1 >> 32) & _LOW) ^ c_1 ^ key_0,
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ c_3 ^ key_1,
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + _WEYL[0]) & _LOW, (key_1 + _WEYL[1]) & _LOW
    return [c_0, c_1, c_2, c_3]
