"""Concrete scores and log p(x_0 | x_t): the two descriptions of a masked model."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rescore.processes.convert import log_probs_from_score, score_from_log_probs
from rescore.processes.ctmc import Absorbing

INF = torch.inf
V, L = 3, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_scores_by_hand():
    """n = log 3: k = 1/3 / (2/3) = 1/2. The mask is state 1 of 3."""
    log_p = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]], dtype=torch.float64).log()
    noise = torch.tensor([3.0], dtype=torch.float64).log()
    log_score = score_from_log_probs(log_p, torch.tensor([[1, 2]]), noise, 1, 3)
    expected = torch.tensor([[[0.125, 1, 0.375], [0, 2, 1]]], dtype=torch.float64)
    torch.testing.assert_close(log_score.exp(), expected)


@pytest.mark.parametrize("mask_id", [0, 1, V])
@pytest.mark.parametrize("noise", [0.05, 0.8, 4.0])
def test_exact_denoiser_gives_exact_ratios(mask_id, noise):
    """With p(x_0 | x_t) by Bayes, s is p_t(y) / p_t(x) wherever y differs at one masked token.

    By enumeration, for a data law that is no product over positions.
    """
    process = Absorbing(V + 1, mask_id)
    tokens = [v for v in range(V + 1) if v != mask_id]
    clean = torch.tensor(list(itertools.product(tokens, repeat=L)))
    x_t = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
    p_0 = normal(V**L).softmax(0)
    law = process.noised_probs(clean, torch.full((len(clean),), noise, dtype=torch.float64))
    likelihood = torch.stack([law[:, place, x_t[:, place]] for place in range(L)]).prod(0)
    p_t = p_0 @ likelihood
    posterior = p_0[:, None] * likelihood / p_t
    at = (clean[:, :, None] == torch.tensor(tokens)).double()
    log_p = torch.einsum("ct,clv->tlv", posterior, at).log()
    level = torch.full((len(x_t),), noise, dtype=torch.float64)
    s = score_from_log_probs(log_p, x_t, level, mask_id, V + 1).exp()
    index = {tuple(row): i for i, row in enumerate(x_t.tolist())}
    for i, place, v in itertools.product(range(len(x_t)), range(L), range(V + 1)):
        if x_t[i, place] == mask_id:
            y = x_t[i].tolist()
            y[place] = v
            torch.testing.assert_close(s[i, place, v], p_t[index[tuple(y)]] / p_t[i])


def test_all_columns_or_the_tokens_columns_are_the_same():
    """Tables with a column for the mask are read without it, whatever stands there."""
    log_p = normal(4, L, V).log_softmax(-1)
    x_t = torch.tensor([[0, 1], [1, 1], [3, 1], [1, 2]])
    noise = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    short = score_from_log_probs(log_p, x_t, noise, 1, V + 1)
    for filler in (-INF, 0.0, 5.0):
        column = torch.full((4, L, 1), filler, dtype=torch.float64)
        wide = torch.cat([log_p[..., :1], column, log_p[..., 1:]], -1)
        torch.testing.assert_close(score_from_log_probs(wide, x_t, noise, 1, V + 1), short)
    assert bool((short.gather(-1, x_t[..., None]) == 0).all())


def test_wrong_number_of_columns_is_an_error():
    with pytest.raises(ValueError, match="log_p has 5 columns, but 4 states have 3 ordinary"):
        score_from_log_probs(torch.zeros(1, 1, 5), torch.zeros(1, 1).long(), torch.ones(1), 3, 4)
    with pytest.raises(ValueError, match="log_p has 2 columns"):
        score_from_log_probs(torch.zeros(1, 1, 2), torch.zeros(1, 1).long(), torch.ones(1), 3, 4)


@pytest.mark.parametrize("mask_id", [0, 2, V])
def test_there_and_back(mask_id):
    """log_probs_from_score undoes it at masked positions and copies what is seen; mask: -inf."""
    log_p = normal(5, L, V).log_softmax(-1)
    x_t = torch.tensor([[0, 1], [2, 3], [3, 3], [0, 0], [2, 2]])
    noise = torch.tensor([1e-4, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    score = score_from_log_probs(log_p, x_t, noise, mask_id, V + 1)
    back = log_probs_from_score(score, mask_id)
    masked = x_t == mask_id
    tokens = torch.arange(V + 1) != mask_id
    torch.testing.assert_close(back[masked][:, tokens], log_p[masked])
    copied = torch.nn.functional.one_hot(x_t[~masked], V + 1).double()
    torch.testing.assert_close(back[~masked].exp(), copied)
    assert bool((back[..., mask_id] == -INF).all())


def test_any_scores_are_normalised():
    """A network on score entropy has its own normaliser; only ratios of its scores are used."""
    log_score = normal(2, L, V + 1)
    log_p = log_probs_from_score(log_score + 1.7, 1)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, L).double())
    torch.testing.assert_close(log_p[..., 3] - log_p[..., 0], log_score[..., 3] - log_score[..., 0])


def test_gradients_go_through_masked_positions_only():
    """With impossible tokens in the table: finite, and none from positions that are seen."""
    log_p = normal(1, 3, V).log_softmax(-1)
    log_p[0, 0, 1] = -INF
    log_p.requires_grad_()
    x_t = torch.tensor([[3, 0, 3]])
    score = score_from_log_probs(log_p, x_t, torch.tensor([0.3], dtype=torch.float64), 3, V + 1)
    (gradient,) = torch.autograd.grad(score.exp().sum(), log_p)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(gradient[0, 0], score[0, 0, :V].exp())
    assert bool((gradient[0, 1] == 0).all())
    log_score = score.detach().requires_grad_()
    back = log_probs_from_score(log_score, 3)
    (gradient,) = torch.autograd.grad(back[..., 0].masked_fill(x_t == 0, 0).sum(), log_score)
    assert bool(gradient.isfinite().all()) and bool((gradient[..., 3] == 0).all())
    inside = torch.autograd.gradcheck(
        lambda log_p: score_from_log_probs(log_p, x_t[:, 2:], torch.ones(1).double(), 3, V + 1),
        (normal(1, 1, V).requires_grad_(),),
    )
    assert inside


@pytest.mark.parametrize("noise", [1e-4, 20.0])
def test_scores_keep_their_digits_in_float32(noise):
    """log k is right to 1e-6 of itself at both ends; 1 - e^-n alone would lose 4 digits."""
    log_p = torch.zeros(1, 2, V, dtype=torch.float32).log_softmax(-1)
    x_t, level = torch.tensor([[3, 0]]), torch.tensor([noise])
    score = score_from_log_probs(log_p, x_t, level, 3, V + 1)
    assert score.dtype == torch.float32
    exact = score_from_log_probs(log_p.double(), x_t, level.double(), 3, V + 1)
    torch.testing.assert_close(score.double(), exact, rtol=1e-6, atol=0)
    n = float(level)
    by_hand = -n - math.log(-math.expm1(-n)) - math.log(3)
    assert float(exact[0, 0, 0]) == pytest.approx(by_hand, rel=1e-6)


def test_narrow_input_is_widened():
    """bfloat16 in, float32 out, in both directions."""
    log_p = torch.zeros(1, 1, V, dtype=torch.bfloat16)
    score = score_from_log_probs(log_p, torch.tensor([[3]]), torch.tensor([0.3]), 3, V + 1)
    assert score.dtype == torch.float32
    assert log_probs_from_score(score.bfloat16(), 3).dtype == torch.float32
