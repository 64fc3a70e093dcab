"""The masked process: noising, blocks, quotas, and log-probabilities that sum to one."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rescore.processes import masked

INF = torch.inf


def normal(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- noising -------------------------------------------------------------------------------------


def test_tokens_survive_with_probability_alpha():
    """Over a grid of uniforms exactly the fraction 1 - alpha of the editable tokens is masked."""
    n = 100
    u = ((torch.arange(n) + 0.5) / n).expand(3, -1)
    editable = torch.ones(3, n, dtype=torch.bool)
    alpha = torch.tensor([0.0, 0.3, 1.0])
    x_t = masked.mask_tokens(torch.zeros(3, n, dtype=torch.long), editable, alpha, u, 7)
    assert (x_t == 7).sum(1).tolist() == [100, 70, 0]
    assert bool((x_t[1, :30] == 0).all())


def test_given_tokens_are_never_masked():
    """At alpha = 0 the editable positions, and only they, become the mask token."""
    editable = torch.tensor([[True, False, True, False]])
    x_0 = torch.tensor([[1, 2, 3, 4]])
    x_t = masked.mask_tokens(x_0, editable, torch.zeros(1), torch.zeros(1, 4), 9)
    assert x_t.tolist() == [[9, 2, 9, 4]]


# ---- blocks and quotas ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5])
def test_blocks_cut_the_editable_positions_evenly(n_blocks):
    """Left to right, sizes differing by at most one, -1 elsewhere; samples do not interact."""
    generator = torch.Generator().manual_seed(1)
    editable = torch.rand(40, 13, generator=generator) < torch.linspace(0, 1, 40)[:, None]
    for row, block in zip(editable, masked.blocks_of(editable, n_blocks), strict=True):
        assert bool(((block == -1) == ~row).all())
        inside = block[row]
        assert bool((inside.diff() >= 0).all())
        size = torch.bincount(inside, minlength=n_blocks)
        assert len(size) == n_blocks
        assert int(size.max() - size.min()) <= 1


def test_blocks_of_a_completion_are_those_of_semi_autoregressive_decoding():
    """A prompt of 3 and a completion of 8 in 4 blocks: two positions each."""
    editable = torch.arange(11)[None] >= 3
    assert masked.blocks_of(editable, 4).tolist() == [[-1] * 3 + [0, 0, 1, 1, 2, 2, 3, 3]]


def test_quota_by_hand():
    """Blocks of 5 and 4 tokens in two steps each reveal 3, 2 and 2, 2; one token: 1, 0."""
    editable = torch.tensor([[True] * 9, [True] + [False] * 8])
    block = torch.tensor([[0] * 5 + [1] * 4, [0] + [-1] * 8])
    assert bool(((block >= 0) == editable).all())
    quota, candidates = masked.reveal_quota(block, n_blocks=2, n_steps=4)
    assert quota.tolist() == [[3, 2, 2, 2], [1, 0, 0, 0]]
    assert candidates.tolist() == [[5, 2, 4, 2], [1, 0, 0, 0]]


@pytest.mark.parametrize(("n_blocks", "n_steps"), [(1, 1), (1, 5), (2, 4), (3, 9), (4, 4)])
def test_quotas_empty_every_block(n_blocks, n_steps):
    """Each block is emptied by its own steps, by counts that differ by one, larger ones first."""
    editable = torch.arange(14)[None] < torch.arange(15)[:, None]
    block = masked.blocks_of(editable, n_blocks)
    quota, candidates = masked.reveal_quota(block, n_blocks, n_steps)
    assert quota.shape == candidates.shape == (15, n_steps)
    for b in range(n_blocks):
        steps = slice(b * n_steps // n_blocks, (b + 1) * n_steps // n_blocks)
        size = (block == b).sum(1)
        assert torch.equal(quota[:, steps].sum(1), size)
        assert bool((quota[:, steps].diff() <= 0).all())
        assert bool((quota[:, steps][:, 0] - quota[:, steps][:, -1] <= 1).all())
        left = size[:, None] - quota[:, steps].cumsum(1) + quota[:, steps]
        assert torch.equal(candidates[:, steps], left)


# ---- laws ----------------------------------------------------------------------------------------


def test_the_sampling_law_is_the_tempered_softmax():
    """exp(token_log_probs(z, tau)) is proportional to exp(z / tau)."""
    z = normal(4, 5)
    weight = (z / 0.7).exp()
    torch.testing.assert_close(
        masked.token_log_probs(z, 0.7).exp(), weight / weight.sum(-1, keepdim=True)
    )


def test_temperature_zero_puts_all_mass_on_the_largest():
    """One-hot, in log: 0 at the argmax and -inf elsewhere."""
    z = torch.tensor([[1.0, 3.0, 2.0], [0.0, -INF, -1.0]])
    assert masked.token_log_probs(z, 0.0).tolist() == [[-INF, 0.0, -INF], [0.0, -INF, -INF]]


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_log_probabilities_are_float32_or_better(given, computed):
    """Half-precision logits are widened before anything is computed from them."""
    z = normal(3, 50).to(given)
    log_p = masked.token_log_probs(z, 0.9)
    assert log_p.dtype == masked.confidence_log_probs(z).dtype == computed
    exact = torch.log_softmax(z.double() / 0.9, -1)
    tolerance = 1e-14 if computed == torch.float64 else 2e-6
    torch.testing.assert_close(log_p.double(), exact, rtol=0, atol=tolerance)


def test_confidences_are_the_log_softmax():
    """In float64 and away from saturation the two agree, an impossible token included."""
    z = torch.cat([normal(6, 5), torch.full((6, 1), -INF, dtype=torch.float64)], -1)
    torch.testing.assert_close(masked.confidence_log_probs(z), torch.log_softmax(z, -1))


def test_confidences_stay_ordered_where_the_probability_rounds_to_one():
    """p = 1 - 2 exp(-gap) for gaps 20 to 60: one number to a float32 softmax, five to this."""
    gap = torch.tensor([20.0, 30.0, 40.0, 50.0, 60.0])
    z = torch.stack([gap, torch.zeros(5), torch.zeros(5)], -1)
    assert torch.log_softmax(z, -1)[:, 0].unique().numel() == 1
    top = masked.confidence_log_probs(z)[:, 0]
    assert bool((top.diff() > 0).all())
    torch.testing.assert_close(top.double(), -torch.log1p(2 * (-gap.double()).exp()))


def test_confidences_can_be_differentiated():
    """The weights of Plackett-Luce are made of them."""
    z = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(masked.confidence_log_probs, (z,))


def test_entropy():
    """log V for the uniform law, 0 for a certain token; impossible tokens contribute nothing."""
    p = torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64)
    by_hand = -sum(q * math.log(q) for q in (0.5, 0.2, 0.3))
    certain = torch.tensor([-INF, 0.0, -INF, -INF], dtype=torch.float64)
    uniform = torch.full((4,), -math.log(4), dtype=torch.float64)
    measured = masked.entropy(torch.stack([p.log(), certain, uniform]))
    torch.testing.assert_close(
        measured, torch.tensor([by_hand, 0.0, math.log(4)], dtype=torch.float64)
    )


# ---- the score of a step -------------------------------------------------------------------------


def test_tokens_log_prob_sums_the_revealed_rows():
    """A sum (not a mean) over the rows marked as revealed; the others do not count."""
    log_p = masked.token_log_probs(normal(2, 3, 4))
    token = torch.tensor([[1, 0, 3], [2, 2, 0]])
    revealed = torch.tensor([[True, False, True], [False, False, False]])
    expected = torch.stack([log_p[0, 0, 1] + log_p[0, 2, 3], torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(masked.tokens_log_prob(log_p, token, revealed), expected)


def test_random_order_counts_ordered_draws():
    """exp(-log_prob) is the number of ordered draws of n out of m."""
    m, n = torch.tensor([3, 5, 5, 4, 0]), torch.tensor([2, 5, 1, 0, 0])
    draws = [math.perm(int(a), int(b)) for a, b in zip(m, n, strict=True)]
    torch.testing.assert_close(
        masked.random_order_log_prob(m, n).neg().exp(), torch.tensor(draws, dtype=torch.float64)
    )


def ordered_draws(n_rows: int, n: int) -> Tensor:
    """``place`` of every ordered draw of n out of the first ``n_rows`` of n_rows + 1 rows."""
    places = []
    for draw in itertools.permutations(range(n_rows), n):
        place = torch.full((n_rows + 1,), -1)
        place[list(draw)] = torch.arange(n)
        places.append(place)
    return torch.stack(places)


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_plackett_luce_is_a_law_over_ordered_draws(n):
    """Sums to one over all of them; each is the product of its successive choices."""
    place = ordered_draws(4, n)
    log_weight = normal(5)
    weight = log_weight.exp().tolist()
    candidate = (torch.arange(5) < 4).expand(len(place), -1)
    log_prob = masked.plackett_luce_log_prob(log_weight.expand(len(place), -1), place, candidate)
    assert abs(float(log_prob.exp().sum()) - 1) < 1e-14
    for row, value in zip(place.tolist(), log_prob.tolist(), strict=True):
        left, product = sum(weight[:4]), 1.0
        for i in range(n):
            chosen = weight[row.index(i)]
            product, left = product * chosen / left, left - chosen
        assert abs(value - math.log(product)) < 1e-12


def test_plackett_luce_gradient():
    """Correct with rows that are not candidates, and in a step that draws nothing."""
    place = torch.tensor([[1, -1, 0, -1, -1], [-1, 0, 1, 2, -1], [-1, -1, -1, -1, -1]])
    candidate = torch.arange(5) < torch.tensor([[5], [4], [3]])
    log_weight = normal(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: masked.plackett_luce_log_prob(w, place, candidate), (log_weight,)
    )
    (gradient,) = torch.autograd.grad(
        masked.plackett_luce_log_prob(log_weight, place, candidate).sum(), log_weight
    )
    assert bool((gradient[~candidate] == 0).all())


# ---- low-confidence remasking --------------------------------------------------------------------


def low_confidence_outcomes(
    logits: Tensor, temperature: float, n: int
) -> dict[tuple[tuple[int, ...], ...], float]:
    """Enumerate all proposals: keep the n of largest (confidence, -row); outcome -> probability."""
    law = masked.token_log_probs(logits, temperature).exp()
    confidence = masked.confidence_log_probs(logits)
    n_rows, n_tokens = logits.shape
    outcomes: dict[tuple[tuple[int, ...], ...], float] = {}
    for proposal in itertools.product(range(n_tokens), repeat=n_rows):
        ranked = sorted(range(n_rows), key=lambda j: (-float(confidence[j, proposal[j]]), j))
        kept = tuple(sorted((j, proposal[j]) for j in ranked[:n]))
        p = math.prod(float(law[j, proposal[j]]) for j in range(n_rows))
        outcomes[kept] = outcomes.get(kept, 0.0) + p
    return outcomes


def low_confidence_score(
    logits: Tensor, temperature: float, outcome: tuple[tuple[int, ...], ...]
) -> Tensor:
    """log P(tokens and positions) of an outcome; two more rows that are not candidates."""
    n_rows, n_tokens = logits.shape
    padded = torch.cat([logits, torch.zeros(2, n_tokens, dtype=logits.dtype)])[None]
    token, place = torch.zeros(1, n_rows + 2, dtype=torch.long), torch.full((1, n_rows + 2), -1)
    for i, (row, value) in enumerate(outcome):
        token[0, row], place[0, row] = value, i
    log_p = masked.token_log_probs(padded, temperature)
    candidate = (torch.arange(n_rows + 2) < n_rows)[None]
    score = masked.tokens_log_prob(log_p, token, place >= 0)
    return score + masked.low_confidence_log_prob(padded, log_p, token, place, candidate)


LOGITS = {
    "generic": normal(3, 3, seed=5),
    "tempering reorders rows": torch.tensor(
        [[0.0, 0.01, -9.0], [0.6, 0.0, 0.02], [0.3, -0.4, 0.5]], dtype=torch.float64
    ),
    "identical": torch.zeros(3, 3, dtype=torch.float64),
    "same law in every row": normal(1, 3, seed=6).expand(3, -1),
    "two rows tied": normal(3, 3, seed=7)[torch.tensor([0, 1, 0])],
    "impossible token": torch.cat([normal(3, 2), torch.full((3, 1), -INF, dtype=torch.float64)], 1),
    "saturated float32": torch.tensor([[40.0, 0.0, 0.0], [50.0, 0.0, 0.0], [40.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", LOGITS)
def test_low_confidence_is_the_law_of_the_remasking_rule(name, n):
    """Each outcome has the probability that enumeration of all proposals gives; ties included."""
    logits, temperature = LOGITS[name], 0.7
    total = 0.0
    for outcome, p in low_confidence_outcomes(logits, temperature, n).items():
        measured = float(low_confidence_score(logits, temperature, outcome).exp())
        assert measured == pytest.approx(p, rel=1e-12 if logits.dtype == torch.float64 else 1e-5)
        total += measured
    assert total == pytest.approx(1, abs=1e-13 if logits.dtype == torch.float64 else 1e-6)


def test_low_confidence_gradient():
    """The a.e. gradient, the losing sets held fixed, at a temperature that differs from 1."""
    outcome = ((1, 2),)  # probability 0.055
    logits = LOGITS["generic"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: low_confidence_score(z, 0.7, outcome), (logits,))
    (selection,) = torch.autograd.grad(low_confidence_score(logits, 0.7, outcome), logits)
    assert float(selection[2].abs().sum()) > 0.1  # a row that lost has a gradient too


@pytest.mark.parametrize("mask_column", [False, True])
def test_an_impossible_selection_has_no_gradient(mask_column):
    """A row with no token below c* makes the step impossible: -inf, and gradient 0, never NaN."""
    logits = torch.tensor([[2.0, 0.0, -3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    if mask_column:
        logits = torch.cat([logits, torch.full((2, 1), -INF, dtype=torch.float64)], 1)
    logits = logits[None].requires_grad_()
    log_p = masked.token_log_probs(logits, 0.7)
    score = masked.low_confidence_log_prob(
        logits,
        log_p,
        torch.tensor([[2, 0]]),
        torch.tensor([[0, -1]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    assert score.tolist() == [-INF]
    (gradient,) = torch.autograd.grad(score.exp().sum() + 0 * logits[..., :3].sum(), logits)
    assert bool((gradient == 0).all())


def race_score(logits: Tensor, time: Tensor, place: Tensor, candidate: Tensor) -> Tensor:
    """The race of tokens 0, 1, 2, 0, ... at sampling temperature 0.7, position temperature 0.4."""
    log_p = masked.token_log_probs(logits, 0.7)
    token = torch.arange(place.shape[1]).expand_as(place) % 3
    return masked.race_log_prob(logits, log_p, token, time.log(), place, candidate, 0.4)


def test_the_race_by_hand():
    """Two of four rows in time, one late, one no candidate; times of the others do not matter."""
    logits = normal(1, 4, 3, seed=8)
    place = torch.tensor([[1, -1, 0, -1]])
    candidate = torch.tensor([[True, True, True, False]])
    law, rate = (logits[0] / 0.7).softmax(-1), logits[0].softmax(-1) ** (1 / 0.4)
    on_time = sum(math.log(rate[j, j]) - float(rate[j, j]) * t for j, t in ((0, 0.75), (2, 0.5)))
    late = math.log(sum(float(law[1, v]) * math.exp(-float(rate[1, v]) * 0.75) for v in range(3)))
    for others in (0.0, 9.0):
        time = torch.tensor([[0.75, others, 0.5, others]], dtype=torch.float64)
        score = race_score(logits, time, place, candidate)
        assert float(score) == pytest.approx(on_time + late, abs=1e-12)


@pytest.mark.parametrize("mask_column", [False, True])
def test_the_gradient_of_the_race(mask_column):
    """gradcheck in the logits: those in time and those that are late; finite with a mask token."""
    place = torch.tensor([[1, -1, 0, -1], [-1, 0, -1, -1]])
    candidate = torch.tensor([[True, True, True, False], [True, True, False, False]])
    time = torch.tensor([[0.75, 0.0, 0.5, 0.0], [0.0, 0.25, 0.0, 0.0]], dtype=torch.float64)

    def score(logits: Tensor) -> Tensor:
        if mask_column:
            never = torch.full_like(logits[..., :1], -INF)
            logits = torch.cat([logits, never], -1)
        return race_score(logits, time, place, candidate)

    logits = normal(2, 4, 3, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(score, (logits,))
    (gradient,) = torch.autograd.grad(score(logits).sum(), logits)
    moved = gradient.abs().sum(-1) > 1e-3
    assert torch.equal(moved, candidate)


def test_the_race_of_a_step_that_reveals_nothing():
    """log 1 = 0, with candidates left over and with no rows at all."""
    logits, nothing = normal(2, 3, 4), torch.full((2, 3), -1)
    candidate, time = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.float64)
    for rows in (slice(0, 3), slice(0, 0)):
        score = race_score(logits[:, rows], time[:, rows], nothing[:, rows], candidate[:, rows])
        assert score.tolist() == [0.0, 0.0]


def test_low_confidence_of_a_step_that_reveals_nothing():
    """log 1 = 0, with candidates left over and with no rows at all."""
    logits = normal(2, 3, 4)
    log_p = masked.token_log_probs(logits)
    nothing, candidate = torch.full((2, 3), -1), torch.ones(2, 3, dtype=torch.bool)
    token = torch.zeros(2, 3, dtype=torch.long)
    for rows in (slice(0, 3), slice(0, 0)):
        score = masked.low_confidence_log_prob(
            logits[:, rows], log_p[:, rows], token[:, rows], nothing[:, rows], candidate[:, rows]
        )
        assert score.tolist() == [0.0, 0.0]
