"""The theory the algorithms rest on, as identities over all paths of random worlds.

Numbered as in the study of EGSPO that they come from. Formulas are written out here by hand, from
path probabilities and step scores: a second opinion on ``rescore.proof``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from rescore.algorithms.egspo import Egspo
from rescore.processes.masked import Order
from rescore.proof.cases import DRAWN, ORDERS, WORLDS, exact_score
from rescore.proof.oracle import enumerate_paths, exact_gradient, expectation
from rescore.proof.worlds import POLICY_SEED, Tabled, World, jacobian
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record, Score
from rescore.types import MaskedTrajectory

SEEDS = (0, 1, 2)
EXACT = Score(form="tokens_and_selection")


@dataclass
class Everything:
    """All paths of a world, and per step the score, the entropy and the greedy completion."""

    path: MaskedTrajectory
    p: Tensor
    r: Tensor
    score: Tensor
    """grad log pi of each step in the parameters: [path, step, parameter]."""
    entropy: Tensor
    state: Tensor
    """The canvas before each step and the final one: [path, step, position]."""
    greedy: Tensor
    """r of the argmax completion of the canvas before each step: [path, step]."""
    gradient: Tensor


def everything(world: World, order: Order, form: Score, temperature: float = 1.0) -> Everything:
    decoder = world.decoder(order, temperature)
    denoiser = Tabled.of(world.denoiser(POLICY_SEED), world.canvases())
    path, p = enumerate_paths(denoiser, decoder, world, Record(score=form, entropy=True))
    n, t = path.log_prob.shape
    sample, step = torch.arange(n).repeat_interleave(t), torch.arange(t).repeat(n)

    denoiser.uses.clear()
    log_prob = MaskedPolicy(denoiser, decoder).transition(path.take(sample), step, form).log_prob
    ((state, logits),) = denoiser.uses
    (part,) = torch.autograd.grad(log_prob.sum(), [logits])
    score = torch.einsum("nlv,nlvd->nd", part, jacobian(world)[state])

    x = path.take(sample).state(step, world.vocab_size)
    filled = torch.where(x == world.vocab_size, denoiser.table[state].argmax(-1), x)
    assert path.entropy is not None
    return Everything(
        path=path,
        p=p.detach(),
        r=world.reward(path.x_0),
        score=score.unflatten(0, (n, t)),
        entropy=path.entropy,
        state=torch.cat([x.unflatten(0, (n, t)), path.x_0[:, None]], 1),
        greedy=world.reward(filled).unflatten(0, (n, t)),
        gradient=exact_gradient(world, decoder),
    )


def world(seed: int, steps: int = 3, network: Literal["table", "mlp"] = "mlp") -> World:
    return World(3, 3, steps, 1, network, seed=seed)


def estimate(e: Everything, coefficient: Tensor) -> Tensor:
    """E[sum over steps of coefficient * grad log pi]."""
    return torch.einsum("n,nt,ntd->d", e.p, coefficient.expand(e.score.shape[:2]), e.score)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_t0_path_probabilities_sum_to_one_and_equal_the_formula(world, order, temperature):
    """T0: the law of the sampler is the product over steps of exp(tokens_and_selection)."""
    denoiser = Tabled.of(world.denoiser(POLICY_SEED), world.canvases())
    decoder = world.decoder(order, temperature)
    path, p = enumerate_paths(denoiser, decoder, world, Record(score=EXACT))
    torch.testing.assert_close(p.sum(), torch.ones_like(p.sum()), rtol=0, atol=1e-13)
    torch.testing.assert_close(path.log_prob.sum(1).exp(), p.detach(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("scale", [0, 1])
def test_t0_holds_where_confidences_tie(scale, steps):
    """T0 with identical or integer logits: sampler and formula break ties alike."""
    w = world(0, steps, "table")
    denoiser = Tabled(scale * w.denoiser(POLICY_SEED).predict(w.canvases()).detach().round())
    decoder = w.decoder("low_confidence", 0.7)
    path, p = enumerate_paths(denoiser, decoder, w, Record(score=EXACT))
    torch.testing.assert_close(path.log_prob.sum(1).exp(), p.detach(), rtol=1e-11, atol=0)


def test_t0_number_of_paths():
    """T0: 3! 3^3 paths where the order is free, 3^3 where it follows from the state."""
    counts = {order: len(everything(world(0), order, EXACT).p) for order in ORDERS}
    assert counts["random"] == counts["plackett_luce"] == 162
    assert counts["left_to_right"] == counts["max_prob"] == 27
    assert 27 < counts["low_confidence"] < 162


@pytest.mark.parametrize("order", ORDERS)
def test_t1_the_exact_gradient_is_that_of_finite_differences(order):
    """T1: autograd through the enumeration against central differences of J in the parameters."""
    w = world(0)
    gradient = exact_gradient(w, w.decoder(order, 0.7))
    denoiser = w.denoiser(POLICY_SEED)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        shifted = w.denoiser(POLICY_SEED)
        theta = torch.nn.utils.parameters_to_vector(denoiser.parameters()).detach()
        theta = theta + sign * 1e-5 * direction
        torch.nn.utils.vector_to_parameters(theta, shifted.parameters())
        table = Tabled.of(shifted, w.canvases())
        path, p = enumerate_paths(table, w.decoder(order, 0.7), w, Record())
        values.append(float((p.detach() * w.reward(path.x_0)).sum()))
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ORDERS)
def test_t2_policy_gradient_theorem(order, seed):
    """T2: E[r sum grad log pi] = grad J, and so with exact advantages V(x_s) - V(x_t)."""
    e = everything(world(seed), order, exact_score(order))
    assert off(estimate(e, e.r[:, None]), e.gradient) < 1e-12
    n, t = e.score.shape[:2]
    value = torch.empty(n, t + 1, dtype=torch.float64)
    for k in range(t + 1):
        same = (e.state[:, k][:, None] == e.state[:, k][None]).all(-1).double()
        value[:, k] = same @ (e.p * e.r) / (same @ e.p)
    assert off(estimate(e, value.diff(dim=1)), e.gradient) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_t3_the_one_step_completion_is_a_baseline(seed):
    """T3: ((1 + lambda) r - lambda r_hat) / (1 + lambda) over all steps gives grad J exactly."""
    e = everything(world(seed), "random", Score())
    r, lam = e.r[:, None], 0.5
    assert off(estimate(e, ((1 + lam) * r - lam * e.greedy) / (1 + lam)), e.gradient) < 1e-12
    assert off(estimate(e, (1 + lam) * r - lam * e.greedy), (1 + lam) * e.gradient) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_t4_a_mean_that_includes_the_sample_halves_the_gradient_of_a_pair(seed):
    """T4: with G = 2, the factor is 1 - 1/G; also for completions, column by column."""
    e = everything(world(seed), "random", Score())
    for reward in (e.r[:, None].expand_as(e.greedy), (1.5 * e.r[:, None] - 0.5 * e.greedy) / 1.5):
        other = (e.p[:, None] * reward).sum(0)  # E over an independent second sample
        assert off(estimate(e, reward - (reward + other) / 2), e.gradient / 2) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", DRAWN)
@pytest.mark.parametrize("steps", [2, 3])
def test_t5_leaving_out_the_choice_of_positions_is_biased(order, seed, steps):
    """T5: the score of the tokens alone is not the score; with the selection term it is."""
    tokens = everything(world(seed, steps), order, Score(), 0.9)
    exact = everything(world(seed, steps), order, EXACT, 0.9)
    assert off(estimate(exact, exact.r[:, None]), exact.gradient) < 1e-12
    assert off(estimate(tokens, tokens.r[:, None]), tokens.gradient) > 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_t5b_a_score_has_mean_zero(seed):
    """T5b: the tokens' score drifts under low confidence even where the reward is constant."""

    def drift(order: Order, form: Score) -> float:
        return float(estimate(everything(world(seed), order, form), torch.ones(1)).norm())

    assert drift("random", Score()) < 1e-12
    assert drift("low_confidence", EXACT) < 1e-12
    assert drift("low_confidence", Score()) > 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_t7_entropy_bounds_what_a_step_contributes(seed):
    """T7: |E[r grad log pi_t]| <= sqrt(2) max|r| Lambda E[H_t], Lambda = max |d z_l / d theta|."""
    for steps in (2, 3):
        e = everything(world(seed, steps), "random", Score())
        slope = torch.linalg.matrix_norm(jacobian(world(seed, steps)), ord=2).max()
        term = torch.einsum("n,n,ntd->td", e.p, e.r, e.score).norm(dim=1)
        bound = math.sqrt(2) * e.r.max() * slope * (e.p @ e.entropy)
        assert bool((term <= bound).all())
        assert bool((term > 0).all())


def test_t7_impurity_is_below_entropy():
    """T7: 1 - sum p^2 <= H / (2 ln 2); E|e_a - p| <= sqrt(2) (1 - sum p^2)."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1.5, 4000, dtype=torch.float64)[:, None]
    for n_tokens in (2, 3, 10):
        noise = torch.randn(4000, n_tokens, generator=generator, dtype=torch.float64)
        p = (scale * noise).softmax(-1)
        impurity = 1 - p.square().sum(-1)
        entropy = -torch.xlogy(p, p).sum(-1)
        assert bool((impurity <= entropy / (2 * math.log(2)) + 1e-12).all())
        distance = (torch.eye(n_tokens, dtype=torch.float64) - p[:, None]).norm(dim=-1)
        assert bool(((p * distance).sum(-1) <= math.sqrt(2) * impurity + 1e-12).all())


def top(e: Everything, n: int) -> Tensor:
    """1 for the n steps of largest entropy of each path."""
    kept = e.entropy.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(e.entropy).scatter(1, kept, 1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_t8_the_top_steps_are_biased_and_all_steps_are_not(seed):
    """T8: K < T points elsewhere and drifts under a constant reward (T8c); K = T is exact."""
    w = world(seed)
    e = everything(w, "random", Score())
    for n in (1, 2, 3):
        found = estimate(e, top(e, n) * e.r[:, None])
        drift = float(estimate(e, top(e, n)).norm())
        algorithm = Egspo(n_steps=n, baseline="none", beta=0.0)
        measured = expectation(algorithm, w, w.decoder("random", 1.0))
        assert off(measured.mean, found) < 1e-12
        if n == 3:
            assert off(found, e.gradient) < 1e-12
            assert drift < 1e-12
        else:
            assert cosine(found, e.gradient) < 0.999
            assert drift > 0.02


def test_t8_more_steps_are_closer_on_average():
    """T8: on average the centred top-2 gradient is nearer in direction and size than top-1."""
    gap, size = torch.zeros(2), torch.zeros(2)
    for seed in range(6):
        e = everything(world(seed), "random", Score())
        centred = (e.r - e.p @ e.r)[:, None]
        for n in (1, 2):
            found = estimate(e, top(e, n) * centred)
            gap[n - 1] += (1 - cosine(found, e.gradient)) / 6
            size[n - 1] += found.norm().item() / e.gradient.norm().item() / 6
    assert gap[1] < gap[0]
    assert size[0] < size[1] < 1


@pytest.mark.parametrize("n_steps", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_t9_importance_draws_are_exact(seed, n_steps):
    """T9: draws with q ~ H + delta, weighted 1 / (K q), are exact though q depends on the path."""
    w = World(3, 3, 2, 1, "mlp", seed=seed)
    algorithm = Egspo(n_steps=n_steps, selection="importance", baseline="none", beta=0.0)
    decoder = w.decoder("random", 0.7)
    found = expectation(algorithm, w, decoder)
    assert off(found.mean, exact_gradient(w, decoder)) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_t9_the_variance_of_one_draw(seed):
    """The reported variance of one draw is (E[(r / q)^2 |score|^2] - |grad J|^2) / 2."""
    w = World(3, 3, 2, 1, "mlp", seed=seed)
    e = everything(w, "random", Score(), 0.7)
    q = e.entropy + 0.01
    q = q / q.sum(1, keepdim=True)
    one = torch.einsum("n,nt,nt->", e.p, 1 / q, (e.r[:, None, None] * e.score).square().sum(-1))
    algorithm = Egspo(n_steps=1, selection="importance", baseline="none", beta=0.0)
    found = expectation(algorithm, w, w.decoder("random", 0.7))
    expected = (one - e.gradient.square().sum()) / 2
    assert found.variance == pytest.approx(float(expected), rel=1e-10)
