"""The masked cross-entropy is MDLM's bound on -log p(x_0), checked by enumeration."""

import itertools
import math

import pytest
import torch

from rescore.models.tiny import TableDenoiser
from rescore.objectives.denoising import masked_cross_entropy
from rescore.processes.schedules import Cosine, Linear

V, L = 3, 3
MASK = V
MASKS = torch.tensor(list(itertools.product([False, True], repeat=L)))


def all_x_0():
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def quadrature(n=40):
    """Gauss-Legendre nodes and weights on [0, 1] (Golub and Welsch 1969)."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    beta = i[:-1] / (4 * i[:-1] ** 2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


def bound(logits_of, x_0, schedule):
    """The loss averaged over all masks (enumerated) and all times (Gauss-Legendre quadrature)."""
    total = torch.zeros(len(x_0), dtype=torch.float64)
    nodes, weights = quadrature()
    for mask in MASKS:
        masked = mask.expand_as(x_0)
        logits = logits_of(torch.where(masked, MASK, x_0))
        for t, w in zip(nodes, weights, strict=True):
            alpha = schedule.alpha(t[None])
            n = int(mask.sum())
            probability = (1 - alpha) ** n * alpha ** (L - n)
            loss = masked_cross_entropy(
                logits, x_0, masked, schedule.weight(t[None]).expand(len(x_0))
            )
            total += w * probability * loss
    return total


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_bound_is_exact_for_independent_tokens(schedule):
    """If the true law is a product and the denoiser knows it, the bound equals -log p(x_0)."""
    log_p = torch.randn(L, V, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    x_0 = all_x_0()
    exact = -log_p[torch.arange(L), x_0].sum(-1)
    got = bound(lambda x_t: log_p.expand(len(x_t), L, V) + 1.7, x_0, schedule)
    torch.testing.assert_close(got, exact)


def order_averaged(model, x_0):
    """Minus the mean over all orders of log p(x_0 revealed one token at a time in that order)."""
    total = torch.zeros(len(x_0), dtype=torch.float64)
    for order in itertools.permutations(range(L)):
        x_t = torch.full_like(x_0, MASK)
        for position in order:
            log_p = model.predict(x_t)[:, position].log_softmax(-1)
            total -= log_p.gather(1, x_0[:, position, None])[:, 0]
            x_t = x_t.clone()
            x_t[:, position] = x_0[:, position]
    return total / math.factorial(L)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_bound_is_the_order_averaged_likelihood_whatever_the_schedule(schedule):
    """For any denoiser the bound is the mean of -log p over random reveal orders."""
    model = TableDenoiser(V, L, generator=torch.Generator().manual_seed(1))
    x_0 = all_x_0()
    torch.testing.assert_close(bound(model.predict, x_0, schedule), order_averaged(model, x_0))


def test_bound_exceeds_the_negative_log_likelihood_of_the_random_order_model():
    """Jensen: -log of the mean over orders is at most the mean of -log, and strictly less here."""
    model = TableDenoiser(V, L, generator=torch.Generator().manual_seed(1))
    x_0 = all_x_0()
    p = torch.zeros(len(x_0), dtype=torch.float64)
    for order in itertools.permutations(range(L)):
        x_t, log_p = torch.full_like(x_0, MASK), torch.zeros(len(x_0), dtype=torch.float64)
        for position in order:
            row = model.predict(x_t)[:, position].log_softmax(-1)
            log_p = log_p + row.gather(1, x_0[:, position, None])[:, 0]
            x_t = x_t.clone()
            x_t[:, position] = x_0[:, position]
        p += log_p.exp() / math.factorial(L)
    torch.testing.assert_close(p.sum(), torch.ones_like(p.sum()))
    assert bool((bound(model.predict, x_0, Linear()) > -p.log()).all())


def test_only_masked_positions_count_and_their_gradient_is_softmax_minus_one_hot():
    """d loss / d logits = weight * (p - onehot(x_0)) where masked, 0 elsewhere."""
    logits = torch.randn(2, L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    x_0, weight = torch.tensor([[0, 2, 1], [1, 1, 0]]), torch.tensor([0.3, 1.9]).double()
    masked = torch.tensor([[True, False, True], [False, False, True]])
    masked_cross_entropy(logits, x_0, masked, weight).sum().backward()
    residual = logits.detach().softmax(-1) - torch.nn.functional.one_hot(x_0, V)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, weight[:, None, None] * masked[..., None] * residual)


def test_what_lies_under_unmasked_positions_is_ignored():
    """Padding may hold any number there, and its logits may be -inf."""
    x_0 = torch.tensor([[1, 999, 2]])
    masked = torch.tensor([[True, False, True]])
    logits = torch.zeros(1, L, V)
    logits[0, 1, 0] = -torch.inf
    loss = masked_cross_entropy(logits, x_0, masked, torch.tensor([0.5]))
    torch.testing.assert_close(loss, torch.tensor([0.5 * 2 * math.log(V)]))


def test_narrow_logits_are_scored_in_float32():
    """bf16 logits are exact numbers; their log-softmax must not be rounded to bf16."""
    logits = torch.tensor([[[1.0, 2.0, -3.0]]]).bfloat16()
    loss = masked_cross_entropy(logits, torch.tensor([[0]]), torch.tensor([[True]]), torch.ones(1))
    torch.testing.assert_close(loss, -logits[0, 0].float().log_softmax(-1)[:1])
