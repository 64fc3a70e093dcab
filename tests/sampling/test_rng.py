"""The counter-based generator: known answers, independence, and draws that follow their law."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rescore.processes import masked
from rescore.sampling.rng import MANY_TOKENS, STREAMS_PER_STEP, SampleRng, Stream, _philox


@dataclass(frozen=True)
class FixedUniform(SampleRng):
    """The same generator with its uniforms given."""

    u: Tensor

    def uniform(self, stream: Stream, step: int, where: Tensor) -> Tensor:
        return self.u


def rng_of(u: Tensor) -> FixedUniform:
    return FixedUniform(seed=0, sample_id=torch.arange(len(u)), u=u)


def chi_square(count: Tensor, expected: Tensor) -> float:
    return float(((count - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    """Philox4x32-10 gives the published words (Random123, kat_vectors)."""
    words = _philox([torch.tensor([c]) for c in counter], *key)
    assert tuple(int(word) for word in words) == answer


def test_the_uniform_is_made_of_the_first_two_words_of_its_counter():
    """u = (k + 1/2) 2^-52; k = 26 high bits of each word at (position, step and stream, sample)."""
    seed, sample, step, where = (7 << 32) + 5, (3 << 32) + 11, 6, 9
    rng = SampleRng(seed, torch.tensor([sample]))
    counter = [torch.tensor([c]) for c in (where, step * STREAMS_PER_STEP + Stream.SLOT, 11, 3)]
    high, low = (int(word) for word in _philox(counter, 5, 7)[:2])
    expected = (((high >> 6) << 26 | (low >> 6)) + 0.5) / 2**52
    assert rng.uniform(Stream.SLOT, step, torch.tensor([[where]])).item() == expected


def test_every_name_has_its_own_draw():
    """Draws differ whenever seed, sample, step, stream or position differ, beyond 32 bits too."""
    names = (0, 1, 2, 1 << 32, (1 << 32) + 1)
    where = torch.arange(6)
    draws = [
        SampleRng(seed, torch.tensor(names)).uniform(stream, step, where.expand(len(names), -1))
        for seed, step, stream in itertools.product(names, (0, 1, 2, 40), Stream)
    ]
    values = torch.stack(draws)
    assert values.dtype == torch.float64
    assert values.unique().numel() == values.numel()


def test_draws_do_not_depend_on_the_batch():
    """A draw is the same whatever samples and positions are drawn beside it."""
    sample_id = torch.tensor([40, 3, 17, 99])
    where = torch.arange(12).expand(4, -1)
    probs = torch.tensor([0.2, 0.3, 0.5]).expand(4, 12, 3)
    whole = SampleRng(5, sample_id).categorical(probs, Stream.TOKEN, 2, where)
    rows, columns = torch.tensor([2, 0]), torch.tensor([7, 1, 10])
    part = SampleRng(5, sample_id[rows]).categorical(
        probs[:2, :3], Stream.TOKEN, 2, where[:2, columns]
    )
    assert torch.equal(part, whole[rows][:, columns])


def test_uniforms_are_uniform_and_neighbours_are_independent():
    """Chi-square of the values, and of pairs of neighbouring names on an 8 x 8 grid."""
    n_samples, n_where = 400, 160
    where = torch.arange(n_where).expand(n_samples, -1)
    rng = SampleRng(1, torch.arange(n_samples))
    u = rng.uniform(Stream.TOKEN, 0, where)
    assert bool(((u > 0) & (u < 1)).all())
    count = torch.histc(u, 64, 0, 1)
    assert 30 < chi_square(count, torch.full_like(count, u.numel() / 64)) < 110
    neighbours = {
        "position": (u[:, :-1], u[:, 1:]),
        "sample": (u[:-1], u[1:]),
        "step": (u, rng.uniform(Stream.TOKEN, 1, where)),
        "stream": (u, rng.uniform(Stream.POSITION, 0, where)),
        "seed": (u, SampleRng(2, rng.sample_id).uniform(Stream.TOKEN, 0, where)),
    }
    for name, (a, b) in neighbours.items():
        cell = ((a * 8).long() * 8 + (b * 8).long()).flatten()
        count = torch.bincount(cell, minlength=64).double()
        assert 30 < chi_square(count, torch.full_like(count, cell.numel() / 64)) < 110, name


@pytest.mark.parametrize("scale", [1.0, 1e-12, 3e7])
@pytest.mark.parametrize(
    ("dtype", "n_tokens"),
    [
        (torch.float32, 9),
        (torch.float64, 9),
        (torch.bfloat16, 200),
        (torch.float32, 2 * MANY_TOKENS),
    ],
)
def test_a_token_of_probability_zero_is_never_drawn(dtype, n_tokens, scale):
    """Zeros first, last and in between; the extreme uniforms; probabilities of any total."""
    generator = torch.Generator().manual_seed(3)
    extreme = torch.tensor([2.0**-53, 2.0**-52, 2.0**-25], dtype=torch.float64)
    extreme = torch.cat([extreme, 1 - extreme])
    u = torch.cat([extreme, torch.rand(494, generator=generator, dtype=torch.float64)])
    for pattern in ("edges", "random", "single"):
        probs = torch.rand(n_tokens, generator=generator)
        if pattern == "edges":
            probs[:3] = probs[-3:] = 0
        elif pattern == "random":
            probs[torch.rand(n_tokens, generator=generator) < 0.6] = 0
        else:
            probs[torch.arange(n_tokens) != n_tokens // 2] = 0
        probs = (probs * scale).to(dtype)
        token = rng_of(u[None]).categorical(
            probs.expand(1, len(u), -1), Stream.TOKEN, 0, torch.arange(len(u))[None]
        )
        assert int(token.max()) < n_tokens
        assert bool((probs[token] > 0).all()), pattern


def test_categorical_is_the_inverse_cdf():
    """Token i is drawn exactly where u lies between its cumulative probabilities."""
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25])
    u = torch.tensor([[0.01, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.99]], dtype=torch.float64)
    token = rng_of(u).categorical(
        3 * probs.expand(1, 7, -1), Stream.TOKEN, 0, torch.arange(7)[None]
    )
    assert token.tolist() == [[0, 0, 2, 2, 2, 3, 3]]


def test_large_vocabularies_are_drawn_in_float64():
    """u just above i / V draws token i of V equal ones; 24 bits would fall to the token before."""
    n_tokens = 100_000
    token = torch.tensor([[1, 12_345, 77_777, 99_998, 99_999]])
    u = (token.double() + 1e-4) / n_tokens
    probs = torch.full((1, 5, n_tokens), 2.0**-10)
    drawn = rng_of(u).categorical(probs, Stream.TOKEN, 0, token)
    assert torch.equal(drawn, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_diffuse_tail_is_drawn_with_its_mass(dtype):
    """T12 of the EGSPO notes: half-precision Gumbel noise never draws this tail of mass 0.115."""
    n_tokens, n_draws = 50_000, 2_000
    head = torch.tensor([0.528, 0.244, 0.113])
    tail = torch.full((n_tokens - 3,), 0.115 / (n_tokens - 3))
    logits = (torch.cat([head, tail]).log() * 0.9).to(dtype)
    law = masked.token_log_probs(logits, temperature=0.9).exp()
    rng, drawn = SampleRng(0, torch.arange(1)), []
    for where in torch.arange(n_draws)[None].split(250, dim=1):
        probs = law.expand(1, where.shape[1], -1)
        drawn.append(rng.categorical(probs, Stream.TOKEN, 0, where))
    token = torch.cat(drawn, 1)
    for chosen, mass in (
        (token >= 3, law[3:].sum()),
        (token == 0, law[0]),
        (token >= 3 + (n_tokens - 3) // 2, law[3 + (n_tokens - 3) // 2 :].sum()),
    ):
        p = float(mass)
        assert abs(float(chosen.double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n_draws)
    from_tail = token[token >= 3]
    assert from_tail.unique().numel() > 0.98 * from_tail.numel()  # not a few of them over and over


def test_ordered_draws_follow_plackett_luce():
    """Ordered pairs out of four rows appear as often as prod w / (weights not yet drawn) says."""
    n, weight = 20_000, torch.tensor([1.0, 2.0, 4.0, 0.5])
    log_weight = torch.cat([weight.log(), torch.tensor([masked.FAR_BELOW])])
    rng = SampleRng(4, torch.arange(n))
    drawn = rng.ordered(log_weight.expand(n, -1), 2, 3, torch.arange(5).expand(n, -1))
    pairs = list(itertools.permutations(range(4), 2))
    count = torch.tensor([float(((drawn == torch.tensor(p)).all(1)).sum()) for p in pairs])
    expected = torch.tensor(
        [weight[a] / weight.sum() * weight[b] / (weight.sum() - weight[a]) for a, b in pairs]
    )
    assert count.sum() == n
    assert chi_square(count, n * expected) < 33  # 11 degrees of freedom, p = 0.0005


def test_ordered_takes_vanishing_rows_last():
    """Rows of weight 0 come only after every other row is drawn."""
    log_weight = torch.tensor([masked.FAR_BELOW, 0.0, masked.FAR_BELOW, -50.0]).expand(50, -1)
    drawn = SampleRng(4, torch.arange(50)).ordered(log_weight, 4, 0, torch.arange(4).expand(50, -1))
    assert drawn[:, :2].sort(1).values.tolist() == [[1, 3]] * 50


def test_no_global_generator_is_touched():
    """Drawing leaves the generator of torch where it was."""
    before = torch.get_rng_state()
    rng, where = SampleRng(0, torch.arange(3)), torch.arange(4).expand(3, -1)
    rng.categorical(torch.ones(3, 4, 5), Stream.SLOT, 0, where)
    rng.ordered(torch.zeros(3, 4), 2, 0, where)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.25, 1.0, 30.0])
def test_times_are_exponential_with_their_rate(rate):
    """Mean 1 / rate, and the largest distance of the empirical law from 1 - exp(-rate t)."""
    n = 20_000
    rng, where = SampleRng(11, torch.arange(n // 10)), torch.arange(10).expand(n // 10, -1)
    log_rate = torch.full((n // 10, 10), math.log(rate), dtype=torch.float64)
    times = rng.log_times(log_rate, 3, where).exp().flatten()
    assert abs(float(times.mean()) - 1 / rate) < 4 / rate / math.sqrt(n)
    law = 1 - (-rate * times.sort().values).exp()
    distance = (law - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) < 1.95 / math.sqrt(n)  # Kolmogorov: p = 0.001


def test_times_of_each_row_have_the_rate_of_that_row_in_its_dtype():
    """A time is one draw over the rate; half as fast is twice as late; float32 only rounds."""
    rng, where = SampleRng(11, torch.arange(50)), torch.arange(4).expand(50, -1)
    rate = torch.tensor([0.5, 1.0, 2.0, 1e-60], dtype=torch.float64).expand(50, -1)
    times = rng.log_times(rate.log(), 3, where)
    assert times.dtype == torch.float64
    torch.testing.assert_close(times + rate.log(), rng.log_times(torch.zeros_like(rate), 3, where))
    narrow = rng.log_times(rate.log().float(), 3, where)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), times, rtol=1e-6, atol=1e-6)
    assert times.unique().numel() == 200
    assert not bool((rng.log_times(rate.log(), 4, where) == times).any())
    part = rng.log_times(rate[:, 2:].log(), 3, where[:, 2:])
    assert torch.equal(part, times[:, 2:])
