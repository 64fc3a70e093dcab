"""Gaussian noise: conversions, and the likelihoods, KLs and advantages of affine steps.

The world of the closed forms: data N(1, 1/4) in one dimension under VP noise, a reward
-(x - 2)^2 and a KL weight of 1/2, so that the optimum is p* = N(1.5, 1/8).
"""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rescore.processes import gaussian, solvers
from rescore.processes.convert import Prediction, convert_prediction
from rescore.processes.gaussian import AffineStep, DeterministicStep, TwoStep
from rescore.processes.gaussian_schedules import (
    DiscreteTable,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)

VP = VariancePreserving()
SD_TABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
SD = DiscreteTable(SD_TABLE, final=float(SD_TABLE[0]))
"""Stable Diffusion's noise."""
SCHEDULES = (VP, VarianceExploding(), RectifiedFlow(), SD)
PREDICTIONS: tuple[Prediction, ...] = ("eps", "x_0", "v", "score", "flow")
M_0, V_0 = 1.0, 0.25
KL_WEIGHT, CURVATURE, GOAL = 0.5, 2.0, 2.0
M_STAR, V_STAR = 1.5, 0.125


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def at(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(z), exact for polynomials of degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def legendre(low: float, high: float, n: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    half = (high - low) / 2
    return torch.tensor(low + half * (nodes + 1)), torch.tensor(half * weights)


# ---- conversions ---------------------------------------------------------------------------------


def beliefs(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> dict[Prediction, Tensor]:
    """Every prediction by its definition."""
    return {
        "eps": eps,
        "x_0": x_0,
        "v": alpha * eps - sigma * x_0,
        "score": -eps / sigma,
        "flow": eps - x_0,
    }


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_conversions_follow_the_definitions(source: Prediction, target: Prediction):
    """From any prediction to any other, for amplitudes with alpha^2 + sigma^2 = 1 or not."""
    alpha, sigma = torch.tensor([[0.8, 1.0, 0.3], [0.6, 7.0, 0.7]], dtype=torch.float64)
    x_0, eps = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    a, s = alpha[:, None, None], sigma[:, None, None]
    x_t, known = a * x_0 + s * eps, beliefs(x_0, eps, a, s)
    there = convert_prediction(known[source], x_t, alpha, sigma, source=source, target=target)
    torch.testing.assert_close(there, known[target])
    back = convert_prediction(there, x_t, alpha, sigma, source=target, target=source)
    torch.testing.assert_close(back, known[source])
    one = convert_prediction(
        known[source][:1], x_t[:1], alpha[:1], sigma[:1], source=source, target=target
    )
    torch.testing.assert_close(one, known[target][:1])


def test_conversion_of_wrong_predictions_is_exact_too():
    """There and back gives any output, not only those of a true x_0, and narrow ones widened."""
    alpha, sigma = at(0.8), at(0.6)
    a, x_t = normal(5, 3), normal(5, 3, seed=1)
    for source in PREDICTIONS:
        for target in PREDICTIONS:
            there = convert_prediction(a, x_t, alpha, sigma, source=source, target=target)
            back = convert_prediction(there, x_t, alpha, sigma, source=target, target=source)
            torch.testing.assert_close(back, a)
    narrow = convert_prediction(
        a.bfloat16(), x_t.bfloat16(), alpha, sigma, source="eps", target="v"
    )
    assert narrow.dtype == torch.float32


def test_conversions_that_cannot_be_made_are_errors():
    """Pure noise hides x_0 from eps, but not from v or flow; data hides eps from x_0."""
    x, one, zero = normal(1, 2), at(1.0), at(0.0)
    for source in ("eps", "score"):
        with pytest.raises(ValueError, match=f"{source}.*says nothing about x_0"):
            convert_prediction(x, x, zero, one, source=source, target="x_0")
    from_v = convert_prediction(x + 1, x, zero, one, source="v", target="x_0")
    torch.testing.assert_close(from_v, -(x + 1))
    from_flow = convert_prediction(x + 1, x, zero, one, source="flow", target="x_0")
    torch.testing.assert_close(from_flow, x - (x + 1))
    with pytest.raises(ValueError, match="'x_0' says nothing about eps"):
        convert_prediction(x, x, one, zero, source="x_0", target="flow")
    with pytest.raises(ValueError, match="3 amplitudes for 1 samples"):
        convert_prediction(x, x, one.expand(3), one.expand(3), source="eps", target="v")
    with pytest.raises(ValueError, match="no score"):
        convert_prediction(x, x, one, zero, source="eps", target="score")


# ---- likelihoods ---------------------------------------------------------------------------------


def steps() -> tuple[AffineStep, TwoStep]:
    """Three rows of arbitrary coefficients."""
    c = normal(4, 3, seed=5)
    std = torch.tensor([0.3, 1.1, 0.02], dtype=torch.float64)
    return AffineStep(c[0], c[1], std), TwoStep(c[0], c[1], c[2], c[3], std)


def inputs() -> dict[str, Tensor]:
    names = ("x_t", "a", "a_old", "x_before", "a_before", "a_before_old", "z")
    return {name: normal(3, 2, 4, seed=seed) for seed, name in enumerate(names)}


def laws(step: AffineStep | TwoStep, i: dict[str, Tensor]) -> tuple[dict, dict, dict]:
    """Keywords for the present and the old policy, and what both know of the past."""
    if isinstance(step, AffineStep):
        return {"a": i["a"]}, {"a": i["a_old"]}, {}
    new = {"a": i["a"], "a_before": i["a_before"]}
    return new, {"a": i["a_old"], "a_before": i["a_before_old"]}, {"x_before": i["x_before"]}


def by_distribution(step: AffineStep | TwoStep, i: dict[str, Tensor], suffix: str = ""):
    def per_row(c: Tensor) -> Tensor:
        return c[:, None, None]

    loc = per_row(step.on_x) * i["x_t"] + per_row(step.on_a) * i["a" + suffix]
    if isinstance(step, TwoStep):
        loc = loc + per_row(step.on_x_before) * i["x_before"]
        loc = loc + per_row(step.on_a_before) * i["a_before" + suffix]
    return torch.distributions.Normal(loc, per_row(step.std))


@pytest.mark.parametrize("step", steps())
def test_density_ratio_and_kl_are_those_of_the_gaussian(step):
    """All against torch.distributions, summed over dimensions: constants included."""
    i = inputs()
    new, old, past = laws(step, i)
    law, law_old = by_distribution(step, i), by_distribution(step, i, "_old")
    x_s = gaussian.draw(step, i["x_t"], z=i["z"], **new, **past)
    torch.testing.assert_close(x_s, law.loc + law.scale * i["z"])
    torch.testing.assert_close(gaussian.mean(step, i["x_t"], **new, **past), law.loc)
    log_prob = gaussian.step_log_prob(step, i["x_t"], x_s=x_s, **new, **past)
    torch.testing.assert_close(log_prob, law.log_prob(x_s).sum((1, 2)))
    both = {**new, **{f"{name}_old": value for name, value in old.items()}}
    ratio = gaussian.log_ratio(step, i["x_t"], x_s=x_s, **both, **past)
    torch.testing.assert_close(ratio, (law.log_prob(x_s) - law_old.log_prob(x_s)).sum((1, 2)))
    both = {**new, **{f"{name}_ref": value for name, value in old.items()}}
    kl = gaussian.step_kl(step, **both)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(law, law_old).sum((1, 2)))


@pytest.mark.parametrize("step", steps())
def test_ratio_of_equal_outputs_is_one_with_the_gradient_of_the_density(step):
    """log ratio and KL are exactly 0; d ratio = d log_prob and d KL = 0."""
    i = {name: value.requires_grad_() for name, value in inputs().items()}
    new, _, past = laws(step, i)
    x_s = gaussian.draw(step, i["x_t"], z=i["z"], **new, **past).detach()
    held = {f"{name}_old": value.detach() for name, value in new.items()}
    ratio = gaussian.log_ratio(step, i["x_t"], x_s=x_s, **new, **held, **past)
    log_prob = gaussian.step_log_prob(step, i["x_t"], x_s=x_s, **new, **past)
    assert bool((ratio == 0).all())
    for name in new:
        (got,) = torch.autograd.grad(ratio.sum(), i[name], retain_graph=True)
        (expected,) = torch.autograd.grad(log_prob.sum(), i[name], retain_graph=True)
        torch.testing.assert_close(got, expected)
        assert float(expected.abs().min()) > 0
    held = {f"{name}_ref": value.detach() for name, value in new.items()}
    kl = gaussian.step_kl(step, **new, **held)
    assert bool((kl == 0).all())
    assert bool((torch.autograd.grad(kl.sum(), i["a"])[0] == 0).all())


@pytest.mark.parametrize("step", steps())
def test_gradients_by_finite_differences(step):
    i = inputs()
    new, old, past = laws(step, i)
    x_s = normal(3, 2, 4, seed=9)
    names = tuple(new)
    refs = {f"{name}_ref": value for name, value in old.items()}

    def log_prob(*values: Tensor) -> Tensor:
        outputs = dict(zip(names, values, strict=True))
        return gaussian.step_log_prob(step, i["x_t"], x_s=x_s, **outputs, **past)

    def kl(*values: Tensor) -> Tensor:
        return gaussian.step_kl(step, **dict(zip(names, values, strict=True)), **refs)

    values = tuple(value.requires_grad_() for value in new.values())
    assert torch.autograd.gradcheck(log_prob, values)
    assert torch.autograd.gradcheck(kl, values)


def test_one_step_for_all_samples_or_one_each():
    step, _ = steps()
    i = inputs()
    for row in range(3):
        single = step.take(torch.tensor([row]))
        for_all = gaussian.step_log_prob(single, i["x_t"], i["a"], i["z"])
        alone = gaussian.step_log_prob(single, *(i[n][row : row + 1] for n in ("x_t", "a", "z")))
        torch.testing.assert_close(for_all[row : row + 1], alone)
        each = gaussian.step_log_prob(step, i["x_t"], i["a"], i["z"])
        torch.testing.assert_close(for_all[row], each[row])
    with pytest.raises(ValueError, match="3 steps for 1 samples"):
        gaussian.mean(step, i["x_t"][:1], i["a"][:1])


def test_states_before_are_asked_for_and_refused():
    one, two = steps()
    i = inputs()
    with pytest.raises(ValueError, match="TwoStep needs a_before"):
        gaussian.mean(two, i["x_t"], i["a"], x_before=i["x_before"])
    with pytest.raises(ValueError, match="TwoStep needs x_before"):
        gaussian.mean(two, i["x_t"], i["a"], a_before=i["a_before"])
    with pytest.raises(ValueError, match="a_before was given, but a AffineStep"):
        gaussian.mean(one, i["x_t"], i["a"], a_before=i["a_before"])
    with pytest.raises(ValueError, match="x_before was given, but a AffineStep"):
        gaussian.mean(one, i["x_t"], i["a"], x_before=i["x_before"])
    with pytest.raises(ValueError, match="both policies or for none"):
        gaussian.step_kl(two, i["a"], i["a_old"], a_before=i["a_before"])


def test_deterministic_steps_have_no_likelihood():
    """Refused by type, and by a ValueError with the reason where types are not checked."""
    i = inputs()
    step = solvers.ddim_ode(VP, 0.5, 0.4, prediction="eps")
    two = solvers.dpm_solver_2m(VP, 0.6, 0.5, 0.4, prediction="eps")
    calls: list[tuple[Callable, tuple]] = [
        (gaussian.step_log_prob, (i["x_t"], i["a"], i["z"])),
        (gaussian.log_ratio, (i["x_t"], i["a"], i["a_old"], i["z"])),
        (gaussian.step_kl, (i["a"], i["a_old"])),
        (gaussian.draw, (i["x_t"], i["a"], i["z"])),
    ]
    for function, arguments in calls:
        for refused in (step, two):
            with pytest.raises(ValueError, match=f"{type(refused).__name__} is deterministic"):
                inspect.unwrap(function)(refused, *arguments)
    for refused in (step, two, steps()[1]):
        with pytest.raises(ValueError, match="no closed-form advantage"):
            inspect.unwrap(gaussian.step_advantage)(
                refused, i["x_t"], i["a"], i["a_old"], i["z"], i["z"]
            )
    assert not isinstance(step, AffineStep) and isinstance(step, DeterministicStep)


def test_rows_without_noise_have_no_likelihood():
    """They can be drawn; the others can be taken out and scored."""
    i = inputs()
    t, s = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.5, 0.1, 0.0]).double()
    step = solvers.ddim(VP, t, s, prediction="eps", eta=1.0)
    assert step.is_random.tolist() == [True, True, False]
    x_s = gaussian.draw(step, i["x_t"], i["a"], i["z"])
    torch.testing.assert_close(x_s[2], gaussian.mean(step, i["x_t"], i["a"])[2])
    with pytest.raises(ValueError, match=r"rows \[2\] of the steps have std = 0"):
        gaussian.step_log_prob(step, i["x_t"], i["a"], x_s)
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        gaussian.step_kl(step, i["a"], i["a_old"])
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        gaussian.log_ratio(step, i["x_t"], i["a"], i["a_old"], x_s)
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        gaussian.step_advantage(step, i["x_t"], i["a"], i["a_old"], x_s, i["z"])
    kept = step.take(step.is_random)
    assert bool(gaussian.step_log_prob(kept, i["x_t"][:2], i["a"][:2], x_s[:2]).isfinite().all())
    two = solvers.dpm_solver_2m_sde(VP, t, t, s, prediction="eps")
    assert len(two.take(two.is_random).std) == 2


@pytest.mark.parametrize("step", steps())
def test_no_value_is_read_off_the_cpu(step):
    """A read of data on an accelerator waits for it; the meta device has no data to read."""
    step = step.to("meta")
    i = {name: value.to("meta") for name, value in inputs().items()}
    new, old, past = laws(step, i)
    x_s = gaussian.draw(step, i["x_t"], z=i["z"], **new, **past)
    both = {**new, **{f"{name}_old": value for name, value in old.items()}}
    refs = {**new, **{f"{name}_ref": value for name, value in old.items()}}
    for answer in (
        gaussian.step_log_prob(step, i["x_t"], x_s=x_s, **new, **past),
        gaussian.log_ratio(step, i["x_t"], x_s=x_s, **both, **past),
        gaussian.step_kl(step, **refs),
    ):
        assert answer.device.type == "meta" and answer.shape == (3,)
    for schedule in SCHEDULES:
        t = torch.full((3,), 0.5, device="meta")
        rate = gaussian.continuous_kl(
            schedule, t, t / 2, i["a"], i["a_old"], prediction="score", eta=0.5
        )
        assert rate.device.type == "meta" and rate.shape == (3,)


# ---- rounding (T9) -------------------------------------------------------------------------------


def test_log_probs_are_computed_in_float32_or_better():
    """bfloat16 in, float64 out: the numbers are those of the upcast inputs."""
    step, two = steps()
    i = {name: value.bfloat16() for name, value in inputs().items()}
    for s in (step, two):
        new, old, past = laws(s, i)
        wide = {name: value.float() for name, value in i.items()}
        new_w, _, past_w = laws(s, wide)
        got = gaussian.step_log_prob(s, i["x_t"], x_s=i["z"], **new, **past)
        expected = gaussian.step_log_prob(s, wide["x_t"], x_s=wide["z"], **new_w, **past_w)
        assert got.dtype == torch.float64
        assert bool((got == expected).all())
        refs = {f"{name}_ref": value for name, value in old.items()}
        assert gaussian.step_kl(s, **new, **refs).dtype == torch.float64


def test_a_small_difference_of_log_probs_survives_16384_dimensions():
    """Of float32 states: log pi is near -10^4, and what matters is its 10^-4."""
    generator = torch.Generator().manual_seed(0)
    x, z, a = (torch.randn(4, 16384, generator=generator) for _ in range(3))
    step = gaussian.AffineStep(*(torch.tensor([v], dtype=torch.float64) for v in (0.9, -0.3, 0.2)))
    x_s = gaussian.draw(step, x, a, z)
    moved = a + 1e-6 * torch.randn(a.shape, generator=generator)
    narrow, wide = (
        gaussian.step_log_prob(step, x.to(t), moved.to(t), x_s.to(t))
        - gaussian.step_log_prob(step, x.to(t), a.to(t), x_s.to(t))
        for t in (torch.float32, torch.float64)
    )
    assert wide.abs().min() > 1e-6
    torch.testing.assert_close(narrow, wide, atol=2e-4, rtol=0)


def test_rounding_of_eps_moves_the_ratio_but_float32_does_not():
    """T9: 16,384 dimensions, 50 DDIM steps of Stable Diffusion's noise.

    Rounding eps to bfloat16 alone moves the log-ratio, averaged over dimensions, by more than 1e-5
    at some step; computing in float32 instead of float64 moves it by less than 1e-9 at every one.
    """
    entries = torch.arange(981, -1, -20)
    t, s = SD.time_of(entries), SD.time_of((entries - 20).clamp(min=-1))
    step = solvers.ddim(SD, t, s, prediction="eps", eta=1.0)
    d = 16384
    x, eps, z = (normal(len(t), d, seed=seed) for seed in range(3))
    x_s = gaussian.draw(step, x, eps, z)
    moved = {
        dtype: (gaussian.log_ratio(step, x, eps.to(dtype).double(), eps, x_s) / d).abs()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert 1e-6 < float(moved[torch.bfloat16].mean()) < 1e-4
    assert float(moved[torch.bfloat16].max()) > 1e-5
    assert 1e-8 < float(moved[torch.float16].mean()) < 1e-5
    given = [value.float() for value in (x, eps + 0.01 * normal(len(t), d, seed=3), eps, x_s)]
    narrow = gaussian.log_ratio(step, *given)
    wide = gaussian.log_ratio(step, *(value.double() for value in given))
    assert narrow.dtype == torch.float64
    assert float(((narrow - wide) / d).abs().max()) < 1e-9
    same = gaussian.log_ratio(step, x.float(), eps.float(), eps.float(), x_s.float())
    assert bool((same == 0).all())


# ---- advantages ----------------------------------------------------------------------------------


def test_advantage_by_its_action():
    """With a_k = a + (S / B) z: the reward part is B <grad V, a_k - a>, and the penalty
    -(B^2 / 2 S^2) (|a_k - a_ref|^2 - |a - a_ref|^2) + d / 2.
    """
    step, _ = steps()
    i = inputs()
    gradient = normal(3, 2, 4, seed=8)
    x_s = gaussian.draw(step, i["x_t"], i["a"], i["z"])
    got = gaussian.step_advantage(step, i["x_t"], i["a"], i["a_old"], x_s, gradient)
    b, s = step.on_a[:, None, None], step.std[:, None, None]
    action = i["a"] + s / b * i["z"]
    torch.testing.assert_close(got.reward, (b * gradient * (action - i["a"])).sum((1, 2)))
    squares = (action - i["a_old"]) ** 2 - (i["a"] - i["a_old"]) ** 2
    torch.testing.assert_close(got.penalty, 8 / 2 - (b**2 / (2 * s**2) * squares).sum((1, 2)))


def test_advantage_is_centred_and_its_score_function_gradient_is_exact():
    """By Gauss-Hermite quadrature over z, in one dimension.

    E reward = E penalty = 0; E[reward d log pi] = B grad V da; E[penalty d log pi] = -d KL: so the
    gradient of the KL must not be subtracted once more.
    """
    z, weight = hermite(6)
    step = solvers.ddim(VP, 0.6, 0.5, prediction="eps", eta=0.7)
    a, a_ref, x_t = (normal(1, 1, seed=seed).expand(len(z), 1) for seed in range(3))
    a = a.clone().requires_grad_()
    x_s = gaussian.draw(step, x_t, a.detach(), z[:, None])
    slope = torch.full_like(x_t, 1.7)
    advantage = gaussian.step_advantage(step, x_t, a.detach(), a_ref, x_s, slope)
    assert abs(float((weight * advantage.reward).sum())) < 1e-12
    assert abs(float((weight * advantage.penalty).sum())) < 1e-12
    log_prob = gaussian.step_log_prob(step, x_t, a, x_s)
    expected_kl = torch.autograd.grad(gaussian.step_kl(step, a, a_ref)[0], a)[0][0, 0]
    for part, expected in (
        (advantage.reward, step.on_a[0] * 1.7),
        (advantage.penalty, -expected_kl),
    ):
        (gradient,) = torch.autograd.grad((weight * part * log_prob).sum(), a, retain_graph=True)
        torch.testing.assert_close(gradient.sum(), expected)
    assert abs(float(expected_kl)) > 0.1


@pytest.mark.parametrize("eta", [0.0, -1.0])
def test_rates_need_noise(eta):
    x = normal(1, 2)
    with pytest.raises(ValueError, match=f"eta is {eta}"):
        gaussian.girsanov_rate(VP, at(0.5), x, x, prediction="eps", eta=eta)
    with pytest.raises(ValueError, match="infinite at some t"):
        gaussian.continuous_kl(RectifiedFlow(), at(1.0), at(0.5), x, x, prediction="flow")
    with pytest.raises(ValueError, match="infinite at some t"):
        gaussian.advantage_rate(RectifiedFlow(), at(1.0), x, x, x, x, prediction="flow")


def test_rates_by_hand_for_every_prediction():
    """eta = 1/2: G = 5/8 g^2; KL rate G^2 / (2 eta^2 g^2) |ds|^2; reward G <u - v, grad V>."""
    t, x_t = torch.tensor([0.3, 0.7], dtype=torch.float64), normal(2, 3)
    scores = [normal(2, 3, seed=seed) for seed in (1, 2, 3)]
    slope = normal(2, 3, seed=4)
    for schedule in SCHEDULES:
        g2 = schedule.g2(t)
        u, v, w = scores
        rate = 0.5 * 1.25**2 * g2 * ((v - w) ** 2).sum(1)
        reward = 0.625 * g2 * ((u - v) * slope).sum(1)
        penalty = -0.5 * 1.25**2 * g2 * ((u - w) ** 2 - (v - w) ** 2).sum(1)
        for form in PREDICTIONS:
            a_u, a_v, a_w = (
                convert_prediction(
                    score, x_t, schedule.alpha(t), schedule.sigma(t), source="score", target=form
                )
                for score in scores
            )
            how: dict = {"prediction": form, "eta": 0.5}
            torch.testing.assert_close(gaussian.girsanov_rate(schedule, t, a_v, a_w, **how), rate)
            over = gaussian.continuous_kl(schedule, t, t - 0.1, a_v, a_w, **how)
            torch.testing.assert_close(over, rate / g2 * schedule.g2_integral(t - 0.1, t))
            got = gaussian.advantage_rate(schedule, t, a_u, a_v, a_w, slope, **how)
            torch.testing.assert_close(got.reward, reward)
            torch.testing.assert_close(got.penalty, penalty)


# ---- the optimum in closed form (T1 to T4) -------------------------------------------------------


def variance(t: Tensor, v_0: float = V_0) -> Tensor:
    return VP.alpha(t) ** 2 * v_0 + VP.sigma(t) ** 2


def score(t: Tensor, x: Tensor, m_0: float = M_0, v_0: float = V_0) -> Tensor:
    """Of noised N(m_0, v_0)."""
    return -(x - VP.alpha(t) * m_0) / variance(t, v_0)


def best_value(t: Tensor, x: Tensor) -> Tensor:
    """V* = kl_weight log E[exp(reward / kl_weight) | x_t = x], closed form."""
    k = CURVATURE / KL_WEIGHT
    d, noise = variance(t), VP.sigma(t) ** 2
    mean_0 = (M_0 * noise + VP.alpha(t) * V_0 * x) / d
    variance_0 = V_0 * noise / d
    square = k * (mean_0 - GOAL) ** 2 / (1 + k * variance_0)
    return -KL_WEIGHT / 2 * (torch.log1p(k * variance_0) + square)


def grid() -> tuple[Tensor, Tensor]:
    t, x = torch.meshgrid(
        torch.linspace(0.01, 1, 23, dtype=torch.float64),
        torch.linspace(-3, 3, 13, dtype=torch.float64),
        indexing="ij",
    )
    return t.flatten().requires_grad_(), x.flatten().requires_grad_()


def test_optimal_score_is_the_score_of_the_tilted_law():
    """T1: s_pre + grad V* / kl_weight is the score of noised p*."""
    t, x = grid()
    (slope,) = torch.autograd.grad(best_value(t, x).sum(), x)
    tilted = score(t, x) + slope / KL_WEIGHT
    assert float((tilted - score(t, x, M_STAR, V_STAR)).detach().abs().max()) < 1e-10


def test_optimal_value_solves_its_equation():
    """T2: dV/dt + (-f x + g^2 s) V' + g^2 V'' / 2 + g^2 V'^2 / (2 kl_weight) = 0, t to data."""
    t, x = grid()
    value = best_value(t, x)
    in_t, slope = torch.autograd.grad(value.sum(), (t, x), create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    g2 = VP.g2(t)
    along = (-VP.drift(t) * x + g2 * score(t, x)) * slope
    residual = -in_t + along + g2 * curvature / 2 + g2 * slope**2 / (2 * KL_WEIGHT)
    assert float(residual.detach().abs().max()) < 1e-9


def kl_normal(m: float, v: float, m_ref: float, v_ref: float) -> float:
    return 0.5 * (v / v_ref + (m - m_ref) ** 2 / v_ref - 1 + math.log(v_ref / v))


def test_girsanov_rate_integrates_to_the_kl_of_the_data():
    """T3: the integral of E girsanov_rate is KL(p* || p) less what is there at t = 1 already."""
    t, weight = legendre(0, 1, 80)
    z, probability = hermite(3)
    m, v = VP.alpha(t) * M_STAR, variance(t, V_STAR)
    x = m[:, None] + v.sqrt()[:, None] * z
    rate = torch.stack(
        [
            gaussian.girsanov_rate(
                VP, t, score(t, column, M_STAR, V_STAR)[:, None], score(t, column)[:, None],
                prediction="score",
            )
            for column in x.T
        ],
        1,
    )  # fmt: skip
    total = float((weight[:, None] * probability * rate).sum())
    end = kl_normal(M_STAR, V_STAR, M_0, V_0)
    one = at(1.0)
    a, d_star, d = float(VP.alpha(one)), float(variance(one, V_STAR)), float(variance(one))
    assert total == pytest.approx(end - kl_normal(a * M_STAR, d_star, a * M_0, d), abs=1e-10)
    assert total == pytest.approx(0.59656819, abs=1e-8)
    assert end == pytest.approx(0.59657359, abs=1e-8)


def chain(make_step: Callable, times: Tensor) -> tuple[float, float, float]:
    """Mean and variance at the end, and path KL to the pretrained chain, of the optimal policy.

    By exact recursion: with a = c x + d a step maps N(m, v) to N((A + B c) m + B d, (A + B c)^2 v +
    S^2), and E of the step KL is a quadratic form.
    """
    t = times[:-1]
    step = make_step(t, times[1:])
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    offset = score(t, zero, M_STAR, V_STAR)
    slope = score(t, one, M_STAR, V_STAR) - offset
    gain, shift = step.on_x + step.on_a * slope, step.on_a * offset
    moments = [(0.0, 1.0)]
    for g, b, s in zip(gain.tolist(), shift.tolist(), step.std.tolist(), strict=True):
        m, v = moments[-1]
        moments.append((g * m + b, g**2 * v + s**2))
    m, v = torch.tensor(moments[:-1], dtype=torch.float64).T
    kl = 0.0
    for z, probability in zip(*hermite(3), strict=True):
        x = m + v.sqrt() * z
        a, a_pre = score(t, x, M_STAR, V_STAR), score(t, x)
        kl += float(probability * gaussian.step_kl(step, a[:, None], a_pre[:, None]).sum())
    return *moments[-1], kl


def test_optimal_policy_reaches_the_optimum():
    """T4: Euler from N(0, 1) tends to N(1.5, 1/8) at path KL .597, and each doubling is closer."""
    results = {}
    for n in (10, 20, 50, 100, 400):
        times = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        results[n] = chain(
            lambda t, s: solvers.euler_maruyama(VP, t, s, prediction="score", eta=1.0), times
        )
    simulated = {10: (1.575, 0.217), 20: (1.536, 0.143), 50: (1.514, 0.130), 100: (1.508, 0.127)}
    for n, (m, v) in simulated.items():
        assert results[n][0] == pytest.approx(m, abs=2e-3)
        assert results[n][1] == pytest.approx(v, abs=2e-3)
    errors = [(abs(m - M_STAR), abs(v - V_STAR)) for m, v, _ in results.values()]
    assert errors == sorted(errors, reverse=True)
    m, v, kl = results[400]
    assert m == pytest.approx(M_STAR, rel=0.01) and v == pytest.approx(V_STAR, rel=0.01)
    assert kl == pytest.approx(0.5966, abs=2e-3)


def test_optimal_policy_by_ddim():
    """T4: DDIM keeps the mean and approaches the variance from below; its KL from above."""
    results = []
    for n in (10, 50, 400, 3200):
        times = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        times[-1] = 1e-4
        results.append(
            chain(lambda t, s: solvers.ddim(VP, t, s, prediction="score", eta=1.0), times)
        )
    means, variances, kls = zip(*results, strict=True)
    assert all(m == pytest.approx(M_STAR, abs=2e-3) for m in means[1:])
    assert list(variances) == sorted(variances) and variances[-1] < V_STAR
    assert variances[-1] == pytest.approx(V_STAR, rel=0.01)
    assert list(kls) == sorted(kls, reverse=True)
    assert kls[-1] == pytest.approx(0.5966, rel=0.01)


# ---- policy gradient and performance difference (T5, T6) -----------------------------------------


Policy = tuple[float, float] | tuple[Tensor, Tensor]
"""(theta_0, theta_1): the score is s_pre + theta_0 + theta_1 x."""
N_STEPS = 200
TIMES = torch.linspace(1, 0, N_STEPS + 1, dtype=torch.float64)
HALVES = torch.linspace(1, 0, 2 * N_STEPS + 1, dtype=torch.float64)
"""The times of a Runge-Kutta step, its middle included."""


def rates(theta: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """k, b and g^2 of dx = (k x + b) dt + g dw, t towards data, at HALVES."""
    g2, d = VP.g2(HALVES), variance(HALVES)
    k = -VP.drift(HALVES) + g2 * (theta[1] - 1 / d)
    return k, g2 * (VP.alpha(HALVES) * M_0 / d + theta[0]), g2


def runge_kutta(field: Callable[[int, Tensor], Tensor], y: Tensor) -> Tensor:
    """dy/dt = field(number of the half step, y) by the classical method; the states at TIMES."""
    states, h = [y], 1 / N_STEPS
    for i in range(0, 2 * N_STEPS, 2):
        k1 = field(i, y)
        k2 = field(i + 1, y + h / 2 * k1)
        k3 = field(i + 1, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(i + 2, y + h * k3))
        states.append(y)
    return torch.stack(states)


def moments(theta: Policy) -> Tensor:
    """Mean, variance and path KL so far along the policy's path from N(0, 1), at TIMES."""
    k, b, g2 = rates(theta)

    def field(i: int, y: Tensor) -> Tensor:
        squares = (theta[0] + theta[1] * y[0]) ** 2 + theta[1] ** 2 * y[1]
        return torch.stack([k[i] * y[0] + b[i], 2 * k[i] * y[1] + g2[i], g2[i] * squares / 2])

    return runge_kutta(field, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def objective(theta: Policy) -> Tensor:
    """J = E reward - kl_weight KL."""
    m, v, kl = moments(theta)[-1]
    return -CURVATURE / 2 * ((m - GOAL) ** 2 + v) - KL_WEIGHT * kl


def value_slopes(theta: Policy) -> Tensor:
    """(P, Q) of V' = P x + Q, V the policy's value, at TIMES; backwards from the reward's."""
    k, b, g2 = (rate.flip(0) for rate in rates(theta))

    def field(i: int, y: Tensor) -> Tensor:
        p = 2 * k[i] * y[0] - KL_WEIGHT * g2[i] * theta[1] ** 2
        q = k[i] * y[1] + b[i] * y[0] - KL_WEIGHT * g2[i] * theta[0] * theta[1]
        return torch.stack([p, q])

    end = torch.tensor([-CURVATURE, CURVATURE * GOAL], dtype=torch.float64)
    return runge_kutta(field, end).flip(0)


def simpson(values: Tensor) -> Tensor:
    """Integral over [0, 1] of values on an even number of equal intervals."""
    weight = torch.full((len(values),), 2.0, dtype=torch.float64)
    weight[1::2] = 4
    weight[0] = weight[-1] = 1
    return torch.tensordot(weight / (3 * (len(values) - 1)), values, 1)


def expected_advantage_rate(actor: Policy, policy: Policy, occupancy: Policy) -> Tensor:
    """E of advantage_rate(actor's score, policy's score) over time and the paths of a third."""
    m, v, _ = moments(occupancy).T
    p, q = value_slopes(policy).T
    total = torch.zeros(len(TIMES), dtype=torch.float64)
    for z, probability in zip(*hermite(3), strict=True):
        x = m + v.sqrt() * z
        pre = score(TIMES, x)
        action, a = (pre + theta[0] + theta[1] * x for theta in (actor, policy))
        advantage = gaussian.advantage_rate(
            VP, TIMES, action[:, None], a[:, None], pre[:, None], (p * x + q)[:, None],
            prediction="score",
        )  # fmt: skip
        total = total + probability * (advantage.reward + KL_WEIGHT * advantage.penalty)
    return simpson(total)


THETA = (0.2, -0.3)
OTHER = (0.5, 0.1)


def test_policy_gradient_is_the_gradient_of_the_advantage_rate():
    """T5: d/d theta' of the integral of E advantage_rate at theta' = theta is dJ / d theta.

    J by the moments of the process, with gradients; the rate at the policy's own paths and value.
    """
    theta = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in THETA]
    exact = torch.stack(torch.autograd.grad(objective((theta[0], theta[1])), theta))
    surrogate = expected_advantage_rate((theta[0], theta[1]), THETA, THETA)
    got = torch.stack(torch.autograd.grad(surrogate, theta))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0)
    assert float(exact.abs().min()) > 0.01


def test_performance_difference():
    """T6: J(new) - J(old) is the integral of E advantage_rate of the new over its own paths."""
    exact = float(objective(OTHER) - objective(THETA))
    got = float(expected_advantage_rate(OTHER, THETA, OTHER))
    assert abs(exact) > 0.1
    assert got == pytest.approx(exact, rel=1e-5)


def test_surrogate_on_old_paths_is_right_to_first_order():
    """T6: over the old policy's paths the error is of second order in the change."""
    gaps = []
    for size in (0.5, 0.25, 0.125, 0.0625):
        near = (
            THETA[0] + size * (OTHER[0] - THETA[0]),
            THETA[1] + size * (OTHER[1] - THETA[1]),
        )
        exact = float(objective(near) - objective(THETA))
        gaps.append(abs(float(expected_advantage_rate(near, THETA, THETA)) - exact))
    order = math.log2(gaps[-2] / gaps[-1])
    assert gaps[-1] > 1e-6
    assert 1.8 < order < 2.2


# ---- the KL of a step and the rate (T8) ----------------------------------------------------------


def ddim_kls(n: int) -> tuple[float, float]:
    """Exact and continuous path KL of DDIM(1) on SD's noise, |change of eps| = 1 at every step.

    diffusers' "leading" times with an offset of 1, as Stable Diffusion has them; the 1000th is cut
    off at the last entry.
    """
    entry = (torch.arange(n - 1, -1, -1) * (1000 // n) + 1).clamp(max=999)
    below = (entry - 1000 // n).clamp(min=-1)
    moves = entry > below
    t, s = SD.time_of(entry[moves]), SD.time_of(below[moves])
    step = solvers.ddim(SD, t, s, prediction="eps", eta=1.0)
    a, zero = torch.ones(len(t), 1).double(), torch.zeros(len(t), 1).double()
    rate = gaussian.continuous_kl(SD, t, s, a, zero, prediction="eps")
    return float(gaussian.step_kl(step, a, zero).sum()), float(rate.sum())


@pytest.mark.parametrize(
    ("n", "exact", "continuous"), [(50, 11.0, 4.97), (25, 16.9, 4.48), (10, 40.1, 3.59)]
)
def test_kl_of_few_ddim_steps_is_much_larger_than_the_rate_says(n, exact, continuous):
    """T8: two definitions, further apart the fewer the steps."""
    step, rate = ddim_kls(n)
    assert step == pytest.approx(exact, abs=0.05)
    assert rate == pytest.approx(continuous, abs=0.005)


def test_kl_of_many_ddim_steps_is_what_the_rate_says():
    """T8: within 10 % at 1000 steps."""
    step, rate = ddim_kls(1000)
    assert step == pytest.approx(6.53, abs=0.01) and rate == pytest.approx(6.00, abs=0.01)
    assert abs(step / rate - 1) < 0.1
