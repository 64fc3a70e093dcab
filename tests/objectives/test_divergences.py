"""KL estimators: values and expected gradients by enumeration of a categorical."""

import pytest
import torch
from torch import Tensor

from rescore.objectives.divergences import KlEstimator, categorical_kl, kl_estimate

GENERATOR = torch.Generator().manual_seed(11)
LOGITS = torch.randn(5, generator=GENERATOR, dtype=torch.float64)
LOG_REF = torch.log_softmax(torch.randn(5, generator=GENERATOR, dtype=torch.float64), -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize(
    ("estimator", "by_hand"), [("k1", -0.4), ("k2", 0.08), ("k3", 0.09182469764127035)]
)
def test_values_by_hand(estimator: KlEstimator, by_hand: float):
    """log pi_new = -1.5, log pi_ref = -1.1, d = 0.4: -d, d^2 / 2, e^d - 1 - d."""
    new, ref = (torch.tensor([x], dtype=torch.float64) for x in (-1.5, -1.1))
    assert kl_estimate(new, ref, estimator).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_estimates_of_kl_new_ref(estimator: KlEstimator):
    """E_new[k] = KL(new || ref)."""
    log_new = torch.log_softmax(LOGITS, -1)
    mean = (log_new.exp() * kl_estimate(log_new, LOG_REF, estimator)).sum()
    torch.testing.assert_close(mean, kl(log_new, LOG_REF))


def test_k2_is_a_biased_estimate():
    """E_new[k2] differs from KL(new || ref), as the docstring says."""
    log_new = torch.log_softmax(LOGITS, -1)
    mean = (log_new.exp() * kl_estimate(log_new, LOG_REF, "k2")).sum()
    assert abs(float(mean / kl(log_new, LOG_REF)) - 1) > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradients(estimator: KlEstimator):
    """E_new[grad k]: 0 for k1, grad KL(new || ref) for k2, grad KL(ref || new) for k3."""
    logits = LOGITS.clone().requires_grad_()
    log_new = torch.log_softmax(logits, -1)
    frozen = log_new.detach().exp()
    (mean,) = torch.autograd.grad(
        (frozen * kl_estimate(log_new, LOG_REF, estimator)).sum(), logits, retain_graph=True
    )
    target = {
        "k1": 0 * kl(log_new, LOG_REF),
        "k2": kl(log_new, LOG_REF),
        "k3": kl(LOG_REF, log_new),
    }[estimator]
    (exact,) = torch.autograd.grad(target, logits)
    torch.testing.assert_close(mean, exact)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_no_gradient_to_the_reference(estimator: KlEstimator):
    """gradcheck in log pi_new; log pi_ref gets none."""
    new, ref = LOGITS.clone().requires_grad_(), LOG_REF.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, LOG_REF, estimator), (new,))
    (gradient,) = torch.autograd.grad(
        kl_estimate(new, ref, estimator).sum(), ref, allow_unused=True, materialize_grads=True
    )
    assert not bool(gradient.any())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_impossible_step_contributes_nothing(estimator: KlEstimator):
    """log pi_new = -inf: estimate 0, gradient 0."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_new = torch.where(torch.tensor([True, False]), -torch.inf, x - 0.4) + x
    estimate = kl_estimate(log_new, torch.full_like(x, -1.0), estimator)
    assert estimate[0].item() == 0
    (gradient,) = torch.autograd.grad(estimate.sum(), x)
    assert gradient[0].item() == 0
    assert bool(gradient.isfinite().all())


def test_categorical_kl_sums_the_chosen_rows():
    """Exact KL(p || q), summed (not averaged) over tokens and over the rows marked."""
    logits = torch.randn(2, 2, 3, 4, generator=GENERATOR, dtype=torch.float64)
    log_p, log_q = torch.log_softmax(logits, -1)
    rows = torch.tensor([[True, False, True], [False, False, False]])
    both = kl(log_p[0, 0], log_q[0, 0]) + kl(log_p[0, 2], log_q[0, 2])
    expected = torch.stack([both, torch.zeros_like(both)])
    torch.testing.assert_close(categorical_kl(log_p, log_q, rows), expected)


def test_categorical_kl_gradient_is_that_of_the_divergence():
    """In the logits of p, an impossible token among them; nothing flows to q."""
    impossible = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    q_logits = torch.randn(1, 2, 4, generator=GENERATOR, dtype=torch.float64).requires_grad_()
    logits = torch.randn(1, 2, 4, generator=GENERATOR, dtype=torch.float64).requires_grad_()
    rows = torch.tensor([[True, False]])

    def divergence(z: Tensor) -> Tensor:
        log_p = torch.log_softmax(z + impossible, -1)
        return categorical_kl(log_p, torch.log_softmax(q_logits + impossible, -1), rows)

    assert torch.autograd.gradcheck(divergence, (logits,))
    (to_q,) = torch.autograd.grad(
        divergence(logits).sum(), q_logits, allow_unused=True, materialize_grads=True
    )
    assert not bool(to_q.any())
    assert divergence(q_logits.detach()).item() == 0
