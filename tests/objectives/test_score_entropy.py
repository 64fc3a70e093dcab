"""SEPO's theorem, its forms that need neighbours alone, its coefficients, and its estimates.

Policies are energies: pi = softmax(phi(x)) over all N^d states, phi a small network, so
log s[x, y] = phi(y) - phi(x) and every expectation is a sum.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rescore.objectives.advantages import centre, normalise_std
from rescore.objectives.policy_gradient import LARGEST_LOG_RATIO, clipped_surrogate
from rescore.objectives.score_entropy import (
    ball_log_policy,
    coefficient,
    conditional_log_policy,
    joint_surrogate,
    masked_log_prob,
    score_entropy,
    sepo_loss,
    snis_log_prob,
)
from rescore.types import Terms

LOW, HIGH = 0.2, 0.5
"""The bounds of the clip."""


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sequences(n_tokens: int, length: int) -> Tensor:
    """All of them, [n_tokens ** length, length], in counting order."""
    return torch.cartesian_prod(*[torch.arange(n_tokens)] * length).reshape(-1, length)


def index_of(x: Tensor, n_tokens: int) -> Tensor:
    """The row of ``sequences`` that holds each sequence."""
    place = n_tokens ** torch.arange(x.shape[-1]).flip(0)
    return (x * place).sum(-1)


def neighbours(n_tokens: int, length: int) -> Tensor:
    """Entry [x, l, v]: the row of x with token l replaced by v."""
    x = sequences(n_tokens, length)
    y = x[:, None, None].expand(-1, length, n_tokens, -1).clone()
    for position, token in itertools.product(range(length), range(n_tokens)):
        y[:, position, token, position] = token
    return index_of(y, n_tokens)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Energy:
    """A policy over all sequences; ``sizes`` are the tokens and the length."""

    n_tokens: int
    length: int
    phi: Callable[[], Tensor]
    """Energies of all states, with a graph to ``parameters``."""
    parameters: list[Tensor]

    @property
    def x(self) -> Tensor:
        return sequences(self.n_tokens, self.length)

    @property
    def state(self) -> Tensor:
        """The rows, as sequences of one token out of N^d."""
        return torch.arange(len(self.x))[:, None]

    def log_pi(self) -> Tensor:
        return torch.log_softmax(self.phi(), 0)

    def pi(self) -> Tensor:
        return self.log_pi().exp().detach()

    def score(self) -> Tensor:
        """log s of the neighbours that differ in one token, [states, d, N]."""
        phi = self.phi()
        return phi[neighbours(self.n_tokens, self.length)] - phi[:, None, None]

    def full_score(self) -> Tensor:
        """log s of all states, [states, 1, states]: the state read as a single token."""
        phi = self.phi()
        return (phi[None, :] - phi[:, None])[:, None]

    def grad(self, value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, self.parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    def exact(self, reward: Tensor) -> Tensor:
        """grad E[R]."""
        return self.grad((self.log_pi().exp() * reward).sum())


def smooth(n_tokens: int, length: int, seed: int = 0) -> Energy:
    generator = torch.Generator().manual_seed(seed)
    one_hot = nn.functional.one_hot(sequences(n_tokens, length), n_tokens).double().flatten(1)

    def weight(n_out: int, n_in: int) -> Tensor:
        w = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
        return (1.5 * w / math.sqrt(n_in)).requires_grad_()

    first, second = weight(16, one_hot.shape[1]), weight(1, 16)
    return Energy(
        n_tokens,
        length,
        lambda: (torch.tanh(2 * one_hot @ first.T) @ second.T).squeeze(1),
        [first, second],
    )


def tabular(n_tokens: int, length: int, seed: int = 0) -> Energy:
    table = rand(n_tokens**length, seed=seed).requires_grad_()
    return Energy(n_tokens, length, lambda: table, [table])


def factorised(n_tokens: int, length: int) -> Energy:
    table = rand(length, n_tokens).requires_grad_()
    x = sequences(n_tokens, length)
    return Energy(n_tokens, length, lambda: table[torch.arange(length), x].sum(1), [table])


def reward_of(energy: Energy) -> Tensor:
    return rand(len(energy.x), seed=7) + 0.4


def loss_of(mode: str, energy: Energy, coefficient_of_state: Tensor) -> Tensor:
    """Minus the surrogate of each state times its coefficient, summed over states."""
    if mode == "joint":
        surrogate = joint_surrogate(energy.score(), energy.log_pi())
    elif mode == "ball":
        surrogate = ball_log_policy(energy.score(), energy.x)
    else:
        surrogate = conditional_log_policy(energy.score(), energy.x).sum(1)
    return -(coefficient_of_state * surrogate).sum()


modes = pytest.mark.parametrize("mode", ["joint", "ball", "conditional"])
sizes = pytest.mark.parametrize("size", [(5, 1), (5, 2), (4, 3)])


# ---- the theorem ---------------------------------------------------------------------------------


@modes
def test_with_one_position_every_form_is_the_exact_gradient(mode):
    """d = 1: the neighbours are all other states, so nothing is missing."""
    energy = smooth(5, 1)
    reward = reward_of(energy)
    found = -energy.grad(loss_of(mode, energy, energy.pi() * reward))
    assert_exact(found, energy.exact(reward))


@sizes
def test_the_sum_over_all_states_is_the_exact_gradient(size):
    """grad E[R] = -E[R(x) sum_{y != x} pi(y) grad log s(x)_y], the weights pi(y) constant."""
    energy = smooth(*size)
    reward = reward_of(energy)
    weight = energy.pi()[None, :] * energy.pi()[:, None] * reward[:, None]
    theorem = -energy.grad((weight * energy.full_score()[:, 0]).sum())
    assert_exact(theorem, energy.exact(reward))
    joint = joint_surrogate(energy.full_score(), energy.log_pi())
    found = energy.grad((energy.pi() * reward * joint).sum())
    assert_exact(found, theorem)


@sizes
def test_scores_of_all_states_hold_the_log_probability(size):
    """-log(1 + sum_{y != x} s_y) = log pi(x), whichever of the two forms counts the states."""
    energy = smooth(*size)
    log_pi = energy.log_pi()
    conditional = conditional_log_policy(energy.full_score(), energy.state)[:, 0]
    assert_exact(conditional, log_pi)
    assert_exact(ball_log_policy(energy.full_score(), energy.state), log_pi)


@sizes
def test_the_ratio_of_every_neighbour_is_that_of_the_state(size):
    """[pi(y) / pi_old(y)] [s_old(x)_y / s(x)_y] = pi(x) / pi_old(x) for every y; it is logged."""
    new, old = smooth(*size), smooth(*size, seed=1)
    of_y = (new.log_pi() - old.log_pi())[None, :]
    of_s = (old.full_score() - new.full_score())[:, 0]
    new_lp, old_lp = (
        conditional_log_policy(e.full_score(), e.state)[:, 0].detach() for e in (new, old)
    )
    ratio = sepo_loss(new_lp, old_lp, reward_of(new), "plain", LOW, HIGH).metrics["ratio"]
    assert_exact((of_y + of_s).exp().detach(), ratio[:, None].expand_as(of_s))
    assert_exact(ratio, new.pi() / old.pi())


@sizes
def test_states_drawn_from_the_old_policy_give_the_exact_gradient(size):
    """With the plain coefficient, E_{x ~ old}[-grad loss] = grad E_{x ~ new}[R]."""
    new, old = smooth(*size), smooth(*size, seed=1)
    reward = reward_of(new)
    log_policy = conditional_log_policy(new.full_score(), new.state)
    terms = sepo_loss(log_policy[:, 0], old.log_pi().detach(), reward, "plain", LOW, HIGH)
    found = -new.grad((old.pi() * terms.loss).sum())
    assert_exact(found, new.exact(reward))
    factor = coefficient(new.pi() / old.pi(), reward, "plain", LOW, HIGH)
    joint = joint_surrogate(new.full_score(), new.log_pi())
    assert_exact(new.grad((old.pi() * factor * joint).sum()), new.exact(reward))


# ---- neighbours alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 2), (4, 3)])
def test_joint_weights_give_the_gradient_of_the_summed_scores(size):
    """sum_{y in N(x)} pi(y) grad log s_y = pi(x) grad sum_{N(x)} s_y, in every state."""
    energy = smooth(*size)
    for state in (0, 3, 17):
        joint = joint_surrogate(energy.score(), energy.log_pi())[state]
        summed = energy.score()[state].exp().sum()
        torch.testing.assert_close(
            energy.grad(joint), -energy.pi()[state] * energy.grad(summed), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("size", [(5, 2), (4, 3)])
def test_conditional_weights_give_the_pseudo_likelihood(size):
    """log pi(x^l | x^-l); the gradient of its sum is -sum_y pi(y^l | x^-l) grad log s_y."""
    energy = smooth(*size)
    around = energy.log_pi()[neighbours(*size)]  # log pi of x with token l replaced
    conditionals = torch.log_softmax(around, -1)
    log_policy = conditional_log_policy(energy.score(), energy.x)
    own = conditionals.gather(-1, energy.x[..., None]).squeeze(-1)
    assert_exact(log_policy, own)
    of_state = rand(len(energy.x))
    weight = conditionals.exp().detach() * of_state[:, None, None]
    assert_exact(
        energy.grad((of_state[:, None] * log_policy).sum()),
        -energy.grad((weight * energy.score()).sum()),
    )


def test_ball_is_the_share_of_the_state_among_its_neighbours():
    """log pi(x) - log pi(N[x]), N[x] the state and all that differ from it in one token."""
    energy = smooth(4, 3)
    distance = (energy.x[:, None] != energy.x[None]).sum(-1)
    ball = torch.where(distance <= 1, energy.pi(), 0.0).sum(1)
    log_policy = ball_log_policy(energy.score(), energy.x)
    assert_exact(log_policy, energy.log_pi() - ball.log())


@pytest.mark.parametrize("size", [(5, 2), (4, 3)])
def test_a_baseline_changes_joint_and_conditional_not_at_all_but_ball(size):
    """R - c: pi(x) pi(y) grad log s is antisymmetric, and conditionals have scores of mean 0."""
    energy = smooth(*size)
    reward = reward_of(energy)
    c = float((energy.pi() * reward).sum()) + 3.0
    for mode in ("joint", "conditional"):
        plain, less = (
            energy.grad(loss_of(mode, energy, energy.pi() * r)) for r in (reward, reward - c)
        )
        assert_exact(less, plain)
    plain, less = (
        energy.grad(loss_of("ball", energy, energy.pi() * r)) for r in (reward, reward - c)
    )
    assert relative_error(less, plain) > 0.1


def test_the_conditional_form_is_exact_where_positions_are_independent():
    """pi(x) = prod_l pi_l(x^l): the conditionals are the factors of pi."""
    energy = factorised(4, 3)
    reward = reward_of(energy)
    log_policy = conditional_log_policy(energy.score(), energy.x)
    assert_exact(log_policy.sum(1), energy.log_pi())
    found = -energy.grad(loss_of("conditional", energy, energy.pi() * reward))
    assert_exact(found, energy.exact(reward))


@pytest.mark.parametrize("make", [smooth, tabular])
@pytest.mark.parametrize("size", [(5, 2), (4, 3)])
def test_with_more_positions_neighbours_alone_are_biased(size, make):
    """Most of the theorem's sum is missing under joint weights: far off, and far too short."""
    energy = make(*size)
    reward = reward_of(energy)
    exact = energy.exact(reward)
    found = -energy.grad(loss_of("joint", energy, energy.pi() * reward))
    assert relative_error(found, exact) > 0.1
    assert found.norm() < 0.7 * exact.norm()


def test_the_conditional_form_is_biased_where_positions_depend_on_each_other():
    """A table of free energies: direction and length are off, though it still points uphill."""
    energy = tabular(4, 3)
    exact = energy.exact(reward_of(energy))
    found = -energy.grad(loss_of("conditional", energy, energy.pi() * reward_of(energy)))
    assert relative_error(found, exact) > 0.1
    assert torch.cosine_similarity(found, exact, 0) > 0.5


@modes
@pytest.mark.parametrize("size", [(5, 1), (5, 2), (4, 3)])
def test_a_small_step_down_the_loss_raises_the_reward(mode, size):
    """The sign, with a centred reward: neighbours of good states lose their ratios."""
    energy = smooth(*size)
    before = (energy.pi() * reward_of(energy)).sum()
    advantage = reward_of(energy) - before
    loss = loss_of(mode, energy, energy.pi() * advantage)
    for p, g in zip(energy.parameters, torch.autograd.grad(loss, energy.parameters), strict=True):
        p.data -= 1e-3 * g
    assert (energy.pi() * reward_of(energy)).sum() > before


def test_positions_that_do_not_count_are_left_out_of_every_sum():
    """As if the state had fewer positions, and whatever their scores are, NaN among them."""
    log_score, x, log_pi = rand(6, 4, 5), torch.arange(24).reshape(6, 4) % 5, -rand(6).abs()
    log_score = log_score.scatter(-1, x[..., None], 0.0)
    positions = torch.tensor([True, False, True, False]).expand(6, -1)
    junk = torch.where(positions[..., None], log_score, math.nan).requires_grad_()
    rates, ratio = rand(6, 4, 5, seed=1).square(), rand(6, 4, 5, seed=2).square()
    for call, kept in (
        (lambda s, x, p: conditional_log_policy(s, x, p).sum(1), log_score[:, ::2]),
        (ball_log_policy, log_score[:, ::2]),
        (lambda s, _, p: joint_surrogate(s, log_pi, p), log_score[:, ::2]),
    ):
        found = call(junk, x, positions)
        torch.testing.assert_close(found, call(kept, x[:, ::2], None))
        (gradient,) = torch.autograd.grad(found.sum(), junk)
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[:, 1::2].any())
    found = score_entropy(junk, ratio, rates, positions)
    torch.testing.assert_close(
        found, score_entropy(log_score[:, ::2], ratio[:, ::2], rates[:, ::2])
    )
    (gradient,) = torch.autograd.grad(found.sum(), junk)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[:, 1::2].any())
    assert not bool(conditional_log_policy(junk, x, positions)[:, 1::2].any())


def test_the_entry_at_the_state_counts_as_one_whatever_it_holds():
    """conditional and ball do not read it, so it gets no gradient."""
    x = torch.arange(24).reshape(6, 4) % 5
    log_score = rand(6, 4, 5).requires_grad_()
    clean = log_score.detach().scatter(-1, x[..., None], 0.0)
    for call in (conditional_log_policy, ball_log_policy):
        torch.testing.assert_close(call(log_score, x), call(clean, x))
        (gradient,) = torch.autograd.grad(call(log_score, x).sum(), log_score)
        assert not bool(gradient.gather(-1, x[..., None]).any())
    by_hand = -(1 + clean.exp().sum((1, 2)) - 4).log()
    torch.testing.assert_close(ball_log_policy(log_score, x), by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_neighbours_count_nothing(dtype):
    """-inf is a state of probability 0: values as without it, gradient exactly 0, no NaN."""
    x = torch.tensor([[0, 2], [1, 1]])
    full = rand(2, 2, 4).to(dtype).scatter(-1, x[..., None], 0.0)
    full[:, :, 3] = -torch.inf
    full[1, 0] = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf])  # nothing but itself
    rates, ratio = torch.ones_like(full), full.exp() * 1.3
    log_score = full.clone().requires_grad_()
    log_pi = torch.tensor([-2.0, -0.5], dtype=dtype)
    for value in (
        conditional_log_policy(log_score, x),
        ball_log_policy(log_score, x),
        joint_surrogate(log_score, log_pi),
        score_entropy(log_score, ratio, rates),
    ):
        assert bool(value.isfinite().all())
        assert value.dtype == dtype
        (gradient,) = torch.autograd.grad(value.sum(), log_score)
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[full == -torch.inf].any())
    assert conditional_log_policy(log_score, x)[1, 0] == 0
    some = conditional_log_policy(log_score[:, :, :3], x)
    torch.testing.assert_close(conditional_log_policy(log_score, x), some)
    torch.testing.assert_close(
        joint_surrogate(log_score, log_pi)[0], joint_surrogate(log_score[:, :, :3], log_pi)[0]
    )


def test_scores_beyond_the_range_of_exp_have_a_log_policy():
    """e^1000 overflows; -log(1 + e^1000) is -1000."""
    log_score = torch.tensor([[[0.0, 1000.0]]], requires_grad=True)
    x = torch.zeros(1, 1, dtype=torch.long)
    for call in (conditional_log_policy, ball_log_policy):
        value = call(log_score, x)
        assert value.flatten().tolist() == [-1000.0]
        (gradient,) = torch.autograd.grad(value.sum(), log_score)
        assert gradient.flatten().tolist() == [0.0, -1.0]


# ---- gradients flow through one argument ---------------------------------------------------------


def test_log_policies_are_differentiable_in_the_scores():
    """gradcheck, with some positions left out."""
    x = torch.tensor([[0, 2, 1], [1, 1, 0]])
    positions = torch.tensor([[True, True, False], [True, False, True]])
    log_score = rand(2, 3, 4).requires_grad_()
    for call in (conditional_log_policy, ball_log_policy):
        assert torch.autograd.gradcheck(lambda s, f=call: f(s, x, positions), (log_score,))
        assert torch.autograd.gradcheck(lambda s, f=call: f(s, x), (log_score,))


def test_the_weights_of_the_joint_form_are_constants():
    """By hand: value -sum w log s, gradient -w, with w = pi(x) s; log pi gets no gradient."""
    log_score, log_pi = rand(2, 3, 4).requires_grad_(), (-rand(2).abs()).requires_grad_()
    weight = log_pi.exp()[:, None, None] * log_score.exp()
    value = joint_surrogate(log_score, log_pi)
    torch.testing.assert_close(value, -(weight * log_score).sum((1, 2)))
    gradient, other = torch.autograd.grad(value.sum(), (log_score, log_pi), allow_unused=True)
    torch.testing.assert_close(gradient, -weight)
    assert other is None


def test_score_entropy_is_differentiable_in_the_scores_only():
    """gradcheck in log s; ratio and rates get no gradient."""
    log_score, ratio, rates = (
        rand(2, 3, 4, seed=0).requires_grad_(),
        rand(2, 3, 4, seed=1).exp().requires_grad_(),
        rand(2, 3, 4, seed=2).exp().requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda s: score_entropy(s, ratio, rates), (log_score,))
    others = torch.autograd.grad(
        score_entropy(log_score, ratio, rates).sum(), (ratio, rates), allow_unused=True
    )
    assert others == (None, None)


def test_the_masked_log_probability_is_differentiable_in_log_p_only():
    """gradcheck in log p; the weight gets no gradient, positions not hidden neither."""
    x = torch.tensor([[0, 2, 1], [1, 1, 0]])
    hidden = torch.tensor([[True, True, False], [False, False, True]])
    log_p = rand(2, 3, 4).log_softmax(-1).requires_grad_()
    weight = torch.tensor([1.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: masked_log_prob(p, x, hidden, weight), (log_p,))
    value = masked_log_prob(log_p, x, hidden, weight).sum()
    gradient, other = torch.autograd.grad(value, (log_p, weight), allow_unused=True)
    assert other is None
    by_hand = nn.functional.one_hot(x, 4) * hidden[..., None] * weight.detach()[:, None, None]
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("kind", ["plain", "ppo_min", "capped"])
def test_no_gradient_flows_through_the_coefficient(kind):
    """d loss / d log pi_l = -f(r_l, A), clipped or not; nothing else gets one."""
    new, old = rand(40, 3).requires_grad_(), rand(40, 3, seed=1).requires_grad_()
    advantage = rand(40, seed=2).requires_grad_()
    ratio = (new - old).exp().detach()
    factor = coefficient(ratio, advantage[:, None].detach().expand(-1, 3), kind, LOW, HIGH)
    loss = sepo_loss(new, old, advantage, kind, LOW, HIGH).loss
    torch.testing.assert_close(loss, -(factor * new).sum(1))
    gradient, *others = torch.autograd.grad(loss.sum(), (new, old, advantage), allow_unused=True)
    torch.testing.assert_close(gradient, -factor)
    assert others == [None, None]
    assert not coefficient(
        new.exp(), advantage[:, None].expand(-1, 3), kind, LOW, HIGH
    ).requires_grad


def test_the_coefficient_carries_no_gradient_to_the_parameters():
    """grad loss = -sum_x pi_old(x) sum_l f_l grad log pi_l, f a table of constants."""
    new, old = smooth(4, 3), smooth(4, 3, seed=1)
    lp, lp_old = (conditional_log_policy(e.score(), e.x) for e in (new, old))
    advantage = reward_of(new)
    terms = sepo_loss(lp, lp_old, advantage, "ppo_min", LOW, HIGH)
    assert 0.05 < float(terms.metrics["clip_fraction"].mean()) < 0.95
    factor = coefficient(
        (lp - lp_old).exp(), advantage[:, None].expand(-1, 3), "ppo_min", LOW, HIGH
    ).detach()
    expected = -new.grad(((old.pi()[:, None] * factor) * lp).sum())
    assert_exact(new.grad((old.pi() * terms.loss).sum()), expected)


# ---- coefficients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ratio", "advantage", "value", "clipped", "reason"),
    [
        ("plain", 1.8, 2.0, 3.6, 0, "good and likelier than before: its full weight"),
        ("plain", 0.6, 2.0, 1.2, 0, "good but less likely than before: less weight"),
        ("plain", 1.8, -2.0, -3.6, 0, "bad and likelier than before: its full weight"),
        ("plain", 0.6, -2.0, -1.2, 0, "bad and less likely than before: less weight"),
        ("ppo_min", 1.8, 2.0, 3.0, 1, "good and over 1.5 times likelier: 1.5 A and no more"),
        ("ppo_min", 0.6, 2.0, 1.2, 1, "good but less likely: r A, the lower of the two"),
        ("ppo_min", 1.8, -2.0, -3.6, 1, "bad and likelier: r A, the lower, without a cap"),
        ("ppo_min", 0.6, -2.0, -1.6, 1, "bad and less than 0.8 as likely: 0.8 A, not less"),
        ("ppo_min", 1.3, 2.0, 2.6, 0, "good, above 1 + clip_low but below 1 + clip_high: r A"),
        ("ppo_min", 0.7, -2.0, -1.6, 1, "bad, below 1 - clip_low, above 1 - clip_high: 0.8 A"),
        ("capped", 1.8, 2.0, 3.0, 1, "good and over 1.5 times likelier: the ratio stops at 1.5"),
        ("capped", 0.6, 2.0, 1.2, 0, "good but less likely: small ratios are kept"),
        ("capped", 1.8, -2.0, -3.0, 1, "bad and over 1.5 times likelier: stops at 1.5, too"),
        ("capped", 0.6, -2.0, -1.2, 0, "bad and less likely: small ratios are kept"),
        ("capped", 1.3, -2.0, -2.6, 0, "below 1 + clip_high though above 1 + clip_low: r A"),
    ],
)
def test_coefficients_by_hand(kind, ratio, advantage, value, clipped, reason):
    """f(r, A) with clip_low 0.2 and clip_high 0.5, alone and as the slope of the loss."""
    r, a = (torch.tensor([number], dtype=torch.float64) for number in (ratio, advantage))
    assert coefficient(r, a, kind, LOW, HIGH).item() == pytest.approx(value, rel=1e-13), reason
    old = torch.tensor([-1.3], dtype=torch.float64)
    log_prob = (old + r.log()).requires_grad_()
    terms = sepo_loss(log_prob, old, a, kind, LOW, HIGH)
    (slope,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    assert slope.item() == pytest.approx(-value, rel=1e-13), reason
    assert terms.loss.item() == pytest.approx(-value * log_prob.item(), rel=1e-13), reason
    assert terms.metrics["clip_fraction"].item() == clipped, reason


def test_unclipped_the_gradient_is_that_of_the_surrogate_of_ppo():
    """d(r A) / d log pi = r A: stopping the gradient of r changes the value of the loss alone."""
    new, old = rand(40).requires_grad_(), rand(40, seed=1)
    advantage = rand(40, seed=2)
    ppo = clipped_surrogate(new, old, advantage, clip_low=1.0, clip_high=1e6).loss.sum()
    (expected,) = torch.autograd.grad(ppo, new)
    for kind in ("plain", "ppo_min", "capped"):
        loss = sepo_loss(new, old, advantage, kind, 1.0, 1e6).loss.sum()
        torch.testing.assert_close(torch.autograd.grad(loss, new)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [(), (7,)])
def test_equal_policies_have_ratio_exactly_one(axes, dtype):
    """Then no kind clips: all are the plain policy gradient, bit for bit."""
    log_policy = (100 * rand(500, *axes)).to(dtype)
    advantage = rand(500, seed=1).to(dtype)
    losses = [
        sepo_loss(log_policy, log_policy.clone(), advantage, kind, 1e-12, 1e-12)
        for kind in ("plain", "ppo_min", "capped")
    ]
    for terms in losses:
        assert torch.equal(terms.metrics["ratio"], torch.ones(500, dtype=dtype))
        for name in ("kl_old_new", "clip_fraction", "impossible"):
            assert not bool(terms.metrics[name].any())
        assert torch.equal(terms.loss, losses[0].loss)
    per_position = log_policy.reshape(500, -1)
    torch.testing.assert_close(losses[0].loss, -(advantage[:, None] * per_position).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ppo_min", "capped"])
@pytest.mark.parametrize("advantage", [1.5, 0.0, -1.5])
def test_ratios_far_from_one_are_finite(advantage, kind, dtype):
    """exp(1000) is infinite, and times an advantage of 0 it would be NaN: ratios stop before."""
    log_policy = torch.tensor([1000.0, 100.0, -1000.0, -torch.inf], dtype=dtype).requires_grad_()
    a = torch.full((4,), advantage, dtype=dtype)
    terms = sepo_loss(log_policy, torch.zeros(4, dtype=dtype), a, kind, LOW, HIGH)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), log_policy)
    for value in (terms.loss, gradient, *terms.metrics.values()):
        assert bool(value.isfinite().all())
    limit = math.exp(LARGEST_LOG_RATIO)
    largest = {"plain": limit, "ppo_min": 1.5 if advantage > 0 else limit, "capped": 1.5}[kind]
    smallest = 0.8 if kind == "ppo_min" and advantage < 0 else 0.0
    expected = -advantage * torch.tensor([largest, largest, smallest, 0.0], dtype=dtype)
    torch.testing.assert_close(gradient, expected)
    assert terms.loss[3] == 0
    assert terms.metrics["impossible"].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_metrics_of_positions_are_averaged_over_those_that_count():
    """By hand: ratios 2 and 1/2 count, 10 and what is impossible do not."""
    log_ratio = torch.tensor([[math.log(2), math.log(0.5), math.log(10)]] * 2, dtype=torch.float64)
    log_ratio[1, 2] = -torch.inf
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    new = (old + log_ratio).requires_grad_()
    positions = torch.tensor([[True, True, False], [True, True, True]])
    advantage = torch.tensor([1.5, -1.5], dtype=torch.float64)
    terms = sepo_loss(new, old, advantage, "ppo_min", LOW, HIGH, positions=positions)
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 - math.log(0.5))
    expected = {
        "ratio": [1.25, 2.5 / 3],
        "kl_old_new": [k3 / 2, k3 / 3],
        "impossible": [0.0, 1 / 3],
        "clip_fraction": [1.0, 1.0],
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            terms.metrics[name], torch.tensor(value, dtype=torch.float64), msg=name
        )
    assert all(not value.requires_grad for value in terms.metrics.values())
    lp = (-2 + math.log(2), -2 - math.log(2))
    by_hand = [-1.5 * (1.5 * lp[0] + 0.5 * lp[1]), 1.5 * (2 * lp[0] + 0.8 * lp[1])]
    torch.testing.assert_close(terms.loss, torch.tensor(by_hand, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(terms.loss.sum(), new)
    assert gradient[:, 2].tolist() == [0.0, 0.0]
    junk = torch.where(positions, new, math.nan)
    again = sepo_loss(junk, old, advantage, "ppo_min", LOW, HIGH, positions=positions)
    assert torch.equal(again.loss, terms.loss)


def test_an_action_without_positions_has_no_loss():
    """Nothing editable: 0, not 0 / 0."""
    none = torch.zeros(2, 3, dtype=torch.bool)
    terms = sepo_loss(rand(2, 3), rand(2, 3, seed=1), rand(2), "plain", LOW, HIGH, positions=none)
    for value in (terms.loss, *terms.metrics.values()):
        assert value.tolist() == [0.0, 0.0]


def test_shapes_that_would_broadcast_are_refused():
    """One number per position against one per action; fewer positions than numbers."""
    per_position, per_action = torch.zeros(3, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"log_policy of shape \(3, 3\), log_policy_old \(3,\)"):
        sepo_loss(per_position, per_action, per_action, "plain", LOW, HIGH)
    with pytest.raises(ValueError, match=r"positions \(3, 2\), expected one shape"):
        positions = torch.ones(3, 2, dtype=torch.bool)
        sepo_loss(per_position, per_position, per_action, "plain", LOW, HIGH, positions=positions)


# ---- estimates from samples ----------------------------------------------------------------------


def test_the_error_of_a_mean_of_samples_falls_as_one_over_the_root_of_their_number():
    """sqrt(n) times the rms error is the standard deviation of one sample, at every n."""
    energy = smooth(5, 1)
    reward = reward_of(energy)
    log_policy = conditional_log_policy(energy.score(), energy.x)
    terms = sepo_loss(log_policy, log_policy.detach(), reward, "plain", LOW, HIGH)
    per_state = torch.stack([-energy.grad(terms.loss[i]) for i in range(5)])
    pi, exact = energy.pi(), energy.exact(reward)
    assert_exact(pi @ per_state, exact)
    deviation = float((pi @ (per_state - exact).square().sum(1)).sqrt())
    generator = torch.Generator().manual_seed(0)
    for n in (100, 1000, 10_000):
        draws = torch.multinomial(pi, n * 400, replacement=True, generator=generator)
        counts = nn.functional.one_hot(draws.reshape(400, n), 5).sum(1).double()
        rms = float((counts / n @ per_state - exact).square().sum(1).mean().sqrt())
        assert math.sqrt(n) * rms == pytest.approx(deviation, rel=0.12)


def groups(energy: Energy, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """All groups of samples: states [n, size], probability of each [n], group numbers."""
    state = sequences(len(energy.x), size)
    number = torch.arange(len(state)).repeat_interleave(size)
    return state, energy.pi()[state].prod(1), number


def group_gradient(
    energy: Energy, size: int, advantages: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """E[-grad of the mean loss of a group], by enumeration of all groups."""
    state, probability, number = groups(energy, size)
    advantage = advantages(reward_of(energy)[state].flatten()[:, None], number)[:, 0]
    log_policy = conditional_log_policy(energy.score(), energy.x)[state.flatten(), 0]
    loss = sepo_loss(log_policy, log_policy.detach(), advantage, "plain", LOW, HIGH).loss
    return -energy.grad((probability * loss.reshape(-1, size).mean(1)).sum())


@pytest.mark.parametrize("size", [2, 3])
def test_the_group_mean_scales_the_gradient(size):
    """E[1/G sum (r_i - mean) grad log pi(x_i)] = (G - 1) / G grad E[R]; leave-one-out does not."""
    energy = smooth(5, 1)
    exact = energy.exact(reward_of(energy))
    mean = group_gradient(energy, size, lambda r, g: centre(r, g, "group_mean"))
    assert_exact(mean, (size - 1) / size * exact)
    others = group_gradient(energy, size, lambda r, g: centre(r, g, "leave_one_out"))
    assert_exact(others, exact)


def test_the_standard_deviation_changes_the_direction():
    """At G = 2 every pair counts the same however far apart its rewards: uphill, but biased."""
    energy = smooth(5, 1)
    exact = energy.exact(reward_of(energy))
    found = group_gradient(energy, 2, lambda r, g: normalise_std(centre(r, g, "group_mean"), g))
    cosine = float(torch.cosine_similarity(found, exact, 0))
    assert 0.5 < cosine < 0.999


def uniform_rates(n_tokens: int, length: int) -> Tensor:
    """Q[y, x] over all sequences: each token is redrawn at rate 1."""
    x = sequences(n_tokens, length)
    rates = torch.where((x[:, None] != x[None]).sum(-1) == 1, 1.0 / n_tokens, 0.0).double()
    return rates - torch.diag(rates.sum(0))


def snis_bias(log_pi: Tensor, kernel: Tensor, proposal: Tensor, y: int, n_draws: int) -> float:
    """|E[estimate] - pi(y)| / pi(y), over every multiset of draws from the proposal."""
    support = proposal.nonzero()[:, 0]
    draws = torch.tensor(list(itertools.combinations_with_replacement(support.tolist(), n_draws)))
    counts = nn.functional.one_hot(draws, len(proposal)).sum(1)
    log_ways = math.lgamma(n_draws + 1) - torch.lgamma(counts.double() + 1).sum(1)
    probability = (log_ways + proposal.log()[draws].sum(1)).exp()
    torch.testing.assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
    # unnormalised policy: SNIS knows pi only up to a constant
    log_weight = log_pi[draws] + 3.0 - proposal.log()[draws]
    estimate = snis_log_prob(log_weight, kernel[y].log()[draws]).exp()
    return abs(float((probability * estimate).sum() / log_pi[y].exp()) - 1)


def test_snis_is_consistent_with_full_support_and_not_from_neighbours():
    """With a kernel that keeps pi the bias falls as 1/M; from neighbours of y it stays."""
    energy = smooth(2, 3)
    log_pi = energy.log_pi().detach()
    rates = uniform_rates(2, 3)
    jumps = rates + rates.T * (log_pi[:, None] - log_pi[None]).exp()  # Q(y, x) + s_y Q(x, y)
    jumps = jumps - torch.diag(jumps.sum(0))
    kernel = torch.linalg.matrix_exp(0.5 * jumps)
    torch.testing.assert_close(kernel @ log_pi.exp(), log_pi.exp())
    y = 5
    full = kernel[:, y]
    bias = {m: snis_bias(log_pi, kernel, full, y, m) for m in (4, 8, 12)}
    for m in (8, 12):
        assert m * bias[m] == pytest.approx(4 * bias[4], rel=0.15)
    assert bias[12] < 0.05
    near = (energy.x != energy.x[y]).sum(1) <= 1
    local = torch.where(near, full, 0.0) / full[near].sum()
    limit = float((log_pi.exp() * kernel[y])[near].sum() / log_pi.exp()[near].sum())
    missed = abs(limit / float(log_pi[y].exp()) - 1)
    assert missed > 0.1
    for m in (4, 8, 12):
        assert snis_bias(log_pi, kernel, local, y, m) > 0.5 * missed


def test_snis_by_hand():
    """(1 * 0.2 + 3 * 0.4) / 4 = 0.35; impossible draws weigh nothing; no gradient."""
    log_weight = torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64).log() + 500
    log_kernel = torch.tensor([[0.2, 0.4, 0.9]], dtype=torch.float64).log()
    log_weight, log_kernel = log_weight.requires_grad_(), log_kernel.requires_grad_()
    value = snis_log_prob(log_weight, log_kernel)
    assert value.exp().item() == pytest.approx(0.35, rel=1e-13)
    assert not value.requires_grad
    assert snis_log_prob(log_weight, torch.full_like(log_kernel, -torch.inf)).item() == -torch.inf
    with pytest.raises(ValueError, match="only impossible states"):
        snis_log_prob(torch.full_like(log_weight, -torch.inf), log_kernel)


# ---- score entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "r", "value", "reason"),
    [
        (2.0, 3.0, 2 - 3 * math.log(2) + 3 * (math.log(3) - 1), "the formula"),
        (3.0, 3.0, 0.0, "the true ratio costs nothing"),
        (2.0, 0.0, 2.0, "r log s and r log r vanish with r: s is left"),
        (0.0, 0.0, 0.0, "impossible and known to be"),
        (0.0, 0.5, math.inf, "possible but held impossible"),
    ],
)
def test_score_entropy_by_hand(s, r, value, reason):
    """Q [s - r log s + r (log r - 1)] with Q = 0.7; jumps of rate 0 do not count."""
    log_score = torch.tensor([[[s, 5.0]]], dtype=torch.float64).log().requires_grad_()
    ratio = torch.tensor([[[r, 2.0]]], dtype=torch.float64)
    rates = torch.tensor([[[0.7, 0.0]]], dtype=torch.float64)
    found = score_entropy(log_score, ratio, rates)
    assert found.item() == pytest.approx(0.7 * value, rel=1e-13, abs=1e-15), reason
    (gradient,) = torch.autograd.grad(found.sum(), log_score)
    assert gradient.flatten().tolist() == pytest.approx([0.7 * (s - r), 0.0], abs=1e-13), reason


def test_score_entropy_does_not_read_where_the_rate_is_zero():
    """NaN and infinities there change neither value nor gradient."""
    log_score = torch.tensor([[[0.3, math.nan, -torch.inf, torch.inf]]], requires_grad=True)
    ratio = torch.tensor([[[1.2, math.inf, 1.0, math.nan]]])
    rates = torch.tensor([[[0.5, 0.0, 0.0, 0.0]]])
    found = score_entropy(log_score, ratio, rates)
    torch.testing.assert_close(
        found, score_entropy(log_score[..., :1], ratio[..., :1], rates[..., :1])
    )
    (gradient,) = torch.autograd.grad(found.sum(), log_score)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[..., 1:].any())


N, LENGTH, TOTAL_NOISE = 3, 2, 0.6


def noised(kind: str) -> tuple[Tensor, Tensor, int]:
    """Of one token: p(x_t | x_0) [x_0, x_t], Q [y, x], and the number of states."""
    stay = math.exp(-TOTAL_NOISE)
    if kind == "uniform":
        law = torch.eye(N).double() * stay + (1 - stay) / N
        return law, torch.ones(N, N).double() / N - torch.eye(N), N
    law = torch.cat([torch.eye(N).double() * stay, torch.full((N, 1), 1 - stay)], 1)
    rates = torch.zeros(N + 1, N + 1).double()
    rates[N, :N] = 1.0
    return law, rates - torch.diag(rates.sum(0)), N + 1


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
def test_denoising_score_entropy_is_minimised_by_the_true_score(kind):
    """Its mean has gradient zero there, and is the explicit score entropy plus a constant."""
    law, rates, n_states = noised(kind)
    torch.testing.assert_close(torch.linalg.matrix_exp(TOTAL_NOISE * rates)[:, :N].T, law)
    x_0, x_t = sequences(N, LENGTH), sequences(n_states, LENGTH)
    p_0 = rand(len(x_0)).softmax(0)
    given = law[x_0[:, None], x_t[None]].prod(-1)  # p(x_t | x_0), [x_0, x_t]
    p_t = p_0 @ given
    around = neighbours(n_states, LENGTH)
    true_score = p_t[around] / p_t[:, None, None]
    backward = rates[x_t].clone()  # Q(x_t, y): row x_t
    backward.scatter_(-1, x_t[..., None], 0.0)

    def mean_loss(log_score: Tensor) -> Tensor:
        i, j = (given > 0).nonzero().unbind(1)
        ratio = given[i[:, None, None], around[j]] / given[i, j][:, None, None]
        loss = score_entropy(log_score[j], ratio, backward[j])
        assert bool((loss > -1e-12).all())
        return (p_0[i] * given[i, j] * loss).sum()

    def explicit(log_score: Tensor) -> Tensor:
        return (p_t * score_entropy(log_score, true_score, backward)).sum()

    truth = true_score.log().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(truth), truth)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    assert explicit(truth).item() == pytest.approx(0.0, abs=1e-14)
    constant = mean_loss(truth) - explicit(truth)
    assert constant > 0.01
    for seed in (3, 4):
        other = (truth.detach() + 0.5 * rand(*truth.shape, seed=seed)).requires_grad_()
        assert mean_loss(other) > mean_loss(truth) + 1e-3
        assert_exact(mean_loss(other) - explicit(other), constant)
        slopes = [torch.autograd.grad(f(other), other)[0] for f in (mean_loss, explicit)]
        assert_exact(*slopes)


# ---- masked log-probabilities --------------------------------------------------------------------


def hidden_sets(length: int, size: int) -> Tensor:
    """All sets of this size, [n, length]."""
    sets = [torch.tensor(c) for c in itertools.combinations(range(length), size)]
    return torch.stack([nn.functional.one_hot(c, length).sum(0).bool() for c in sets])


def exact_conditionals(log_pi: Tensor, n_tokens: int, x: Tensor, hidden: Tensor) -> Tensor:
    """log p(x^l = v | tokens of x that are not hidden), [L, N], by enumeration."""
    states = sequences(n_tokens, len(x))
    fits = ((states == x) | hidden).all(1)
    p = torch.where(fits, log_pi.exp(), 0.0)
    table = torch.stack(
        [torch.stack([p[states[:, i] == v].sum() for v in range(n_tokens)]) for i in range(len(x))]
    )
    return (table / p.sum()).log()


def test_the_mean_over_masks_is_the_log_probability():
    """m uniform in 1..L, a uniform set of that size, weight L / m: the chain rule, averaged."""
    energy = smooth(3, 3)
    log_pi = energy.log_pi().detach()
    for state in (0, 11, 26):
        x = energy.x[state]
        total = torch.zeros((), dtype=torch.float64)
        for m in (1, 2, 3):
            hidden = hidden_sets(3, m)
            log_p = torch.stack([exact_conditionals(log_pi, 3, x, h) for h in hidden])
            weight = torch.full((len(hidden),), 3 / m, dtype=torch.float64)
            value = masked_log_prob(log_p, x.expand(len(hidden), -1), hidden, weight)
            total = total + value.mean() / 3
        assert_exact(total, log_pi[state])


def test_every_single_position_hidden_is_the_pseudo_likelihood():
    """One row per position, weight 1: the sum of the conditionals that the scores hold, too."""
    energy = smooth(3, 3)
    log_pi = energy.log_pi().detach()
    from_scores = conditional_log_policy(energy.score(), energy.x).detach()
    for state in (0, 11, 26):
        x, hidden = energy.x[state], torch.eye(3, dtype=torch.bool)
        log_p = torch.stack([exact_conditionals(log_pi, 3, x, h) for h in hidden])
        ones = torch.ones(3, dtype=torch.float64)
        value = masked_log_prob(log_p, x.expand(3, -1), hidden, ones)
        assert_exact(value, from_scores[state])


def test_masked_log_probabilities_read_hidden_positions_alone():
    """Tokens out of range, NaN and -inf elsewhere do no harm; a hidden -inf makes the row -inf."""
    log_p = rand(2, 3, 4).log_softmax(-1)
    x = torch.tensor([[1, -100, 3], [99, 0, 1]])
    hidden = torch.tensor([[True, False, True], [False, True, False]])
    by_hand = torch.stack([2.5 * (log_p[0, 0, 1] + log_p[0, 2, 3]), 3.0 * log_p[1, 1, 0]])
    log_p[0, 1], log_p[1, 0], log_p[1, 2] = math.nan, -math.inf, math.nan
    log_p.requires_grad_()
    weight = torch.tensor([2.5, 3.0])
    value = masked_log_prob(log_p, x, hidden, weight)
    torch.testing.assert_close(value, by_hand)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert bool(gradient.isfinite().all())
    impossible = log_p.detach().clone()
    impossible[1, 1, 0] = -math.inf
    assert masked_log_prob(impossible, x, hidden, weight)[1] == -math.inf


def test_narrow_scores_are_summed_in_float32():
    """bfloat16 comes out as float32, computed as the upcast scores."""
    x = torch.tensor([[0, 2, 1], [1, 1, 0]])
    narrow = rand(2, 3, 4).scatter(-1, x[..., None], 0.0).bfloat16()
    everywhere, ones = torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    log_pi = torch.tensor([-1.0, -2.0])
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda s: conditional_log_policy(s, x),
        lambda s: ball_log_policy(s, x),
        lambda s: joint_surrogate(s, log_pi),
        lambda s: score_entropy(s, torch.full((2, 3, 4), 1.3), torch.ones(2, 3, 4)),
        lambda s: masked_log_prob(s, x, everywhere, ones),
    ]
    for call in calls:
        assert call(narrow).dtype == torch.float32
        assert torch.equal(call(narrow), call(narrow.float()))


def test_the_loss_is_one_stage_of_actions():
    """One loss and one number of each metric per action, so micro-batches may be cut anywhere."""
    new, old, advantage = rand(6, 3), rand(6, 3, seed=1), rand(6, seed=2)
    whole = sepo_loss(new, old, advantage, "ppo_min", LOW, HIGH)
    assert isinstance(whole, Terms)
    part = sepo_loss(new[4:], old[4:], advantage[4:], "ppo_min", LOW, HIGH)
    torch.testing.assert_close(whole.take(torch.tensor([4, 5])).loss, part.loss)
    for name, value in part.metrics.items():
        torch.testing.assert_close(whole.metrics[name][4:], value)
