"""Policy-gradient objectives: cases by hand, gradients by finite differences."""

import math

import pytest
import torch
from torch import Tensor

from rescore.objectives.policy_gradient import clipped_surrogate, ratio_metrics, score_function

CLIP = {"clip_low": 0.2, "clip_high": 0.5}
OLD = torch.tensor([-1.2, -0.7, -2.5, -0.1, -3.0], dtype=torch.float64)
RATIO = torch.tensor([0.5, 0.9, 1.3, 1.7, 3.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([-0.6, 1.4, 0.3, -2.0, 0.8], dtype=torch.float64)


def surrogate(log_prob: Tensor, old: Tensor = OLD, advantage: Tensor = ADVANTAGE) -> Tensor:
    return clipped_surrogate(log_prob, old, advantage, **CLIP).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (100.0, 1.0, -1.5, 0.0),
        (1000.0, 1.0, -1.5, 0.0),
        (100.0, 0.0, 0.0, 0.0),
        (1000.0, 0.0, 0.0, 0.0),
        (-100.0, 1.0, 0.0, 0.0),
        (-1000.0, -1.0, 0.8, 0.0),
    ],
)
def test_ratios_far_from_one_have_a_finite_loss_and_gradient(
    log_ratio, advantage, loss, slope, dtype
):
    """Where the gain is capped or vanishes the gradient is 0, also where exp would overflow."""
    log_prob = torch.tensor([log_ratio], dtype=dtype, requires_grad=True)
    terms = clipped_surrogate(
        log_prob, torch.zeros(1, dtype=dtype), torch.tensor([advantage], dtype=dtype), **CLIP
    )
    assert terms.loss.item() == pytest.approx(loss, abs=1e-6)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    assert gradient.item() == pytest.approx(slope, abs=1e-6)
    assert all(value.isfinite().all() for value in terms.metrics.values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "reason"),
    [
        (1.8, 2.0, -3.0, 0.0, "good and already 1.5 times likelier: nothing more to gain, 1.5 A"),
        (0.6, 2.0, -1.2, -1.2, "good but less likely than before: pulled back, unclipped"),
        (1.8, -2.0, 3.6, 3.6, "bad and likelier than before: pushed down, unclipped"),
        (0.6, -2.0, 1.6, 0.0, "bad and already 0.8 times as likely: nothing more to gain, 0.8 A"),
        (1.3, 2.0, -2.6, -2.6, "good, above 1 + clip_low but below 1 + clip_high: not clipped"),
        (0.7, -2.0, 1.6, 0.0, "bad, below 1 - clip_low though above 1 - clip_high: clipped"),
        (1.0, 2.0, -2.0, -2.0, "the first update: the policy gradient itself"),
        (1.0, -2.0, 2.0, 2.0, "the first update: the policy gradient itself"),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope, reason):
    """-min(rho A, clip(rho, 0.8, 1.5) A) and its derivative in log pi, which is rho A or 0."""
    log_prob = torch.tensor([math.log(ratio) - 1.3], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.3], dtype=torch.float64)
    terms = clipped_surrogate(log_prob, old, torch.tensor([advantage], dtype=torch.float64), **CLIP)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-13), reason
    (gradient,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    assert gradient.item() == pytest.approx(slope, rel=1e-13), reason


def test_the_surrogate_is_differentiable_in_the_new_log_probability_only():
    """gradcheck in log pi; the advantage and the old log-probability get no gradient."""
    log_prob, old, advantage = (
        x.clone().requires_grad_() for x in (OLD + RATIO.log(), OLD, ADVANTAGE)
    )
    assert torch.autograd.gradcheck(surrogate, (log_prob,))
    for x in torch.autograd.grad(
        surrogate(log_prob, old, advantage).sum(), (old, advantage), allow_unused=True
    ):
        assert x is None or not bool(x.any())


def test_the_score_function_is_differentiable_in_the_log_probability_only():
    """loss = -A log pi; nothing else gets a gradient."""
    log_prob, old, advantage = (x.clone().requires_grad_() for x in (OLD - 0.3, OLD, ADVANTAGE))
    loss = score_function(log_prob, old, advantage).loss
    torch.testing.assert_close(loss, -advantage * log_prob)
    gradient, *others = torch.autograd.grad(
        loss.sum(), (log_prob, old, advantage), allow_unused=True
    )
    torch.testing.assert_close(gradient, -advantage)
    assert all(x is None or not bool(x.any()) for x in others)


@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("objective", ["score_function", "clipped_surrogate"])
def test_an_impossible_action_has_no_gradient_and_is_counted(objective, advantage):
    """log pi = -inf: ratio 0, gradient 0 through whatever made it, no NaN, one count."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_prob = torch.where(torch.tensor([True, False]), -torch.inf, x - 0.5) + x
    old = torch.tensor([-1.0, -0.5], dtype=torch.float64)
    a = torch.full((2,), advantage, dtype=torch.float64)
    terms = (
        score_function(log_prob, old, a)
        if objective == "score_function"
        else clipped_surrogate(log_prob, old, a, **CLIP)
    )
    assert bool(terms.loss.isfinite().all())
    assert terms.metrics["impossible"].tolist() == [1.0, 0.0]
    assert terms.metrics["ratio"].tolist() == [0.0, 1.0]
    assert terms.metrics["kl_old_new"].tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(terms.loss.sum(), x)
    assert gradient.tolist() == [0.0, -2 * advantage]


def test_metrics_by_hand():
    """The ratio, k3 = ratio - 1 - log ratio, and who left [0.8, 1.5]; none carries a gradient."""
    log_prob = (OLD + RATIO.log()).requires_grad_()
    metrics = clipped_surrogate(log_prob, OLD, ADVANTAGE, **CLIP).metrics
    torch.testing.assert_close(metrics["ratio"], RATIO)
    torch.testing.assert_close(metrics["kl_old_new"], RATIO - 1 - RATIO.log())
    assert metrics["clip_fraction"].tolist() == [1, 0, 0, 1, 1]
    assert metrics["impossible"].tolist() == [0] * 5
    assert not any(value.requires_grad for value in metrics.values())


def test_kl_old_new_estimates_the_divergence_in_that_direction():
    """E_old[k3] = KL(old || new), by enumeration of a categorical."""
    old = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    new = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    k3 = ratio_metrics(new.log(), old.log())["kl_old_new"]
    torch.testing.assert_close((old * k3).sum(), (old * (old / new).log()).sum())
