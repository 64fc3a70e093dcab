"""Solvers for Gaussian noise: identities, order of convergence, and the gradient of two-step ones.

Data are N(1, 1/4), for which the score, the flow of the probability-flow equation and the law of
any linear chain are known in closed form.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rescore.processes import gaussian, solvers
from rescore.processes.convert import Prediction
from rescore.processes.gaussian import (
    AffineStep,
    DeterministicStep,
    DeterministicTwoStep,
    HeunStep,
    TwoStep,
)
from rescore.processes.gaussian_schedules import (
    DiscreteTable,
    GaussianSchedule,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)

VP, VE, FLOW = VariancePreserving(), VarianceExploding(), RectifiedFlow()
TABLE = DiscreteTable((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
SCHEDULES = (VP, VE, FLOW, TABLE)
PREDICTIONS: tuple[Prediction, ...] = ("eps", "x_0", "v", "score", "flow")
M_0, V_0 = 1.0, 0.25
T = torch.tensor([0.8, 0.5, 0.05], dtype=torch.float64)
S = torch.tensor([0.7, 0.2, 0.01], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def output(schedule: GaussianSchedule, t: Tensor, x: Tensor, prediction: Prediction) -> Tensor:
    """What a perfect network says about x [N, D] at t [N] or [1], by definition."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    spread = alpha**2 * V_0 + sigma**2
    x_0 = M_0 + alpha * V_0 * (x - alpha * M_0) / spread
    eps = sigma * (x - alpha * M_0) / spread
    forms: dict[Prediction, Tensor] = {
        "eps": eps,
        "x_0": x_0,
        "v": alpha * eps - sigma * x_0,
        "score": -(x - alpha * M_0) / spread,
        "flow": eps - x_0,
    }
    return forms[prediction]


def all_steps(schedule: GaussianSchedule, prediction: Prediction) -> dict[str, Any]:
    how: dict = {"prediction": prediction}
    return {
        "ddim": solvers.ddim(schedule, T, S, eta=0.6, **how),
        "ancestral": solvers.euler_ancestral(schedule, T, S, **how),
        "flow_match": solvers.flow_match_stochastic(schedule, T, S, **how),
        "euler_maruyama": solvers.euler_maruyama(schedule, T, S, eta=0.6, **how),
        "flow_sde": solvers.flow_sde(FLOW, T, S, noise_level=0.7, **how),
        "2m_sde": solvers.dpm_solver_2m_sde(schedule, T + 0.1, T, S, **how),
        "ddim_ode": solvers.ddim_ode(schedule, T, S, **how),
        "probability_flow": solvers.probability_flow(schedule, T, S, **how),
        "2m": solvers.dpm_solver_2m(schedule, T + 0.1, T, S, **how),
        "heun": solvers.heun(schedule, T, S, **how),
    }


# ---- the coefficients ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_do_not_depend_on_what_the_network_predicts(schedule, prediction):
    """The conversion is in the coefficients: all outputs for one belief give one next state."""
    x_t, x_before = normal(3, 2), normal(3, 2, seed=1)
    reference = all_steps(schedule, "eps")
    for name, step in all_steps(schedule, prediction).items():
        where = FLOW if name == "flow_sde" else schedule
        moved = []
        both: tuple[tuple[Any, Prediction], ...] = (
            (step, prediction),
            (reference[name], "eps"),
        )
        for made, form in both:
            a, a_before = output(where, T, x_t, form), output(where, T + 0.1, x_before, form)
            if isinstance(made, HeunStep):
                guess = gaussian.mean(made.guess, x_t, a)
                moved.append(made.corrected(x_t, a, guess, output(where, S, guess, form)))
            elif isinstance(made, TwoStep | DeterministicTwoStep):
                moved.append(gaussian.mean(made, x_t, a, x_before=x_before, a_before=a_before))
            else:
                moved.append(gaussian.mean(made, x_t, a))
            if isinstance(made, AffineStep | TwoStep):
                torch.testing.assert_close(made.std, reference[name].std)
        torch.testing.assert_close(moved[0], moved[1], msg=lambda m, name=name: f"{name}: {m}")


def test_ddim_and_euler_by_their_formulas_in_the_score():
    """VP, a the score: A, B and S of Euler(eta) and DDIM(eta) as the literature writes them."""
    eta = 0.6
    a_t, a_s, beta, h = VP.alpha(T) ** 2, VP.alpha(S) ** 2, VP.beta(T), T - S
    euler = solvers.euler_maruyama(VP, T, S, prediction="score", eta=eta)
    torch.testing.assert_close(euler.on_x, 1 + beta * h / 2)
    torch.testing.assert_close(euler.on_a, (1 + eta**2) / 2 * beta * h)
    torch.testing.assert_close(euler.std, eta * torch.sqrt(beta * h))
    ddim = solvers.ddim(VP, T, S, prediction="score", eta=eta)
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    on_eps = torch.sqrt(1 - a_s - variance) - torch.sqrt((1 - a_t) * a_s / a_t)
    torch.testing.assert_close(ddim.on_x, torch.sqrt(a_s / a_t))
    torch.testing.assert_close(ddim.on_a, -on_eps * torch.sqrt(1 - a_t))
    torch.testing.assert_close(ddim.std, torch.sqrt(variance))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_the_posterior_of_the_process(schedule):
    """q(x_s | x_t, x_0): mean and std by Gaussian conditioning on x_t = (a_t / a_s) x_s + noise."""
    step = solvers.ddim(schedule, T, S, prediction="x_0", eta=1.0)
    gain = schedule.alpha(T) / schedule.alpha(S)
    added = schedule.sigma(T) ** 2 - gain**2 * schedule.sigma(S) ** 2
    variance = 1 / (1 / schedule.sigma(S) ** 2 + gain**2 / added)
    torch.testing.assert_close(step.std**2, variance)
    torch.testing.assert_close(step.on_x, variance * gain / added)
    torch.testing.assert_close(step.on_a, variance * schedule.alpha(S) / schedule.sigma(S) ** 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_ancestral_in_its_own_coordinates(schedule):
    """x / alpha moves by (sigma_down - u_t) eps and noise sigma_up, u = sigma / alpha."""
    step = solvers.euler_ancestral(schedule, T, S, prediction="eps")
    u_t, u_s = schedule.sigma(T) / schedule.alpha(T), schedule.sigma(S) / schedule.alpha(S)
    up = torch.sqrt(u_s**2 * (u_t**2 - u_s**2) / u_t**2)
    down = torch.sqrt(u_s**2 - up**2)
    torch.testing.assert_close(
        step.on_x * schedule.alpha(T) / schedule.alpha(S), torch.ones(3).double()
    )
    torch.testing.assert_close(step.on_a / schedule.alpha(S), down - u_t)
    torch.testing.assert_close(step.std / schedule.alpha(S), up)


def test_flow_sde_is_euler_maruyama_but_for_pure_noise():
    """eta = noise_level / sqrt(2); at t = 1 s stands in for t in the noise, where g is infinite."""
    step = solvers.flow_sde(FLOW, T, S, prediction="flow", noise_level=0.7)
    same = solvers.euler_maruyama(FLOW, T, S, prediction="flow", eta=0.7 / math.sqrt(2))
    for name in ("on_x", "on_a", "std"):
        torch.testing.assert_close(getattr(step, name), getattr(same, name))
    first = solvers.flow_sde(FLOW, 1.0, 0.9, prediction="flow", noise_level=0.7)
    diffusion2 = 0.49 * 0.9 / 0.1
    torch.testing.assert_close(first.on_x, torch.tensor([1 - 0.1 * diffusion2 / 2]).double())
    torch.testing.assert_close(first.on_a, torch.tensor([-0.1]).double())
    torch.testing.assert_close(first.std**2, torch.tensor([0.1 * diffusion2]).double())
    with pytest.raises(ValueError, match="infinite at some t"):
        solvers.euler_maruyama(FLOW, 1.0, 0.9, prediction="flow", eta=0.5)


def test_flow_sde_is_flow_grpos_step():
    """x (1 + c^2 / (2 t) dt) + v (1 + c^2 (1 - t) / (2 t)) dt + c sqrt(-dt) z, dt = s - t."""
    step = solvers.flow_sde(FLOW, T, S, prediction="flow", noise_level=0.7)
    dt, c = S - T, 0.7 * torch.sqrt(T / (1 - T))
    torch.testing.assert_close(step.on_x, 1 + c**2 / (2 * T) * dt)
    torch.testing.assert_close(step.on_a, (1 + c**2 * (1 - T) / (2 * T)) * dt)
    torch.testing.assert_close(step.std, c * torch.sqrt(-dt))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_first_two_step_is_of_first_order(schedule):
    """t_before = t: 2M SDE is DDIM(1), 2M is DDIM(0), and the state before is not used."""
    pairs: tuple[tuple[Callable, Callable], ...] = (
        (solvers.dpm_solver_2m_sde, solvers.euler_ancestral),
        (solvers.dpm_solver_2m, solvers.ddim_ode),
    )
    for two, one in pairs:
        for prediction in PREDICTIONS:
            step: Any = two(schedule, T, T, S, prediction=prediction)
            expected: Any = one(schedule, T, S, prediction=prediction)
            for name in ("on_x", "on_a"):
                torch.testing.assert_close(getattr(step, name), getattr(expected, name))
            assert bool((step.on_x_before == 0).all() and (step.on_a_before == 0).all())
            if isinstance(step, TwoStep):
                torch.testing.assert_close(step.std, expected.std)


@pytest.mark.parametrize("schedule", [VP, FLOW, TABLE])
def test_last_steps_end_in_x_0(schedule):
    """To s = 0, where no noise is left, every solver but Euler-Maruyama gives hat x_0, without S.

    A table with another ``final`` ends with the noise of that.
    """
    t = torch.tensor([0.1], dtype=torch.float64)
    for prediction in PREDICTIONS:
        made = (
            solvers.ddim(schedule, t, 0.0, prediction=prediction, eta=0.5),
            solvers.euler_ancestral(schedule, t, 0.0, prediction=prediction),
            solvers.flow_match_stochastic(schedule, t, 0.0, prediction=prediction),
            solvers.dpm_solver_2m_sde(schedule, t + 0.1, t, 0.0, prediction=prediction),
            solvers.ddim_ode(schedule, t, 0.0, prediction=prediction),
            solvers.dpm_solver_2m(schedule, t + 0.1, t, 0.0, prediction=prediction),
        )
        x = normal(4, 2)
        a, x_0 = output(schedule, t, x, prediction), output(schedule, t, x, "x_0")
        for step in made:
            two = isinstance(step, TwoStep | DeterministicTwoStep)
            past = {"x_before": 1e3 * x, "a_before": 1e3 * x} if two else {}
            torch.testing.assert_close(gaussian.mean(step, x, a, **past), x_0)
            if isinstance(step, AffineStep | TwoStep):
                assert not bool(step.is_random.any())
        heun = solvers.heun(schedule, t, 0.0, prediction=prediction)
        guess = gaussian.mean(heun.guess, x, a)
        torch.testing.assert_close(heun.corrected(x, a, guess, 1e3 * x), x_0)
    other = DiscreteTable(TABLE.alphas_cumprod, final=float(TABLE.alphas_cumprod[0]))
    assert bool(solvers.ddim(other, t, 0.0, prediction="eps", eta=1.0).is_random.all())
    assert bool(solvers.euler_maruyama(schedule, t, 0.0, prediction="eps", eta=1.0).is_random.all())


def test_chains_can_start_at_pure_noise():
    """t = 1 of a flow, where alpha = 0: finite for v, flow and x_0, an error for eps and score."""
    for prediction in ("x_0", "v", "flow"):
        made = (
            solvers.ddim(FLOW, 1.0, 0.9, prediction=prediction, eta=1.0),
            solvers.dpm_solver_2m_sde(FLOW, 1.0, 1.0, 0.9, prediction=prediction),
            solvers.dpm_solver_2m_sde(FLOW, 1.0, 0.9, 0.8, prediction=prediction),
            solvers.dpm_solver_2m(FLOW, 1.0, 0.9, 0.8, prediction=prediction),
            solvers.heun(FLOW, 1.0, 0.9, prediction=prediction).guess,
        )
        for step in made:
            assert bool(step.on_x.isfinite().all() and step.on_a.isfinite().all())
            if isinstance(step, TwoStep | DeterministicTwoStep):
                assert bool(step.on_x_before.isfinite().all() and step.on_a_before.isfinite().all())
    with pytest.raises(ValueError, match="'eps' says nothing about x_0"):
        solvers.ddim(FLOW, 1.0, 0.9, prediction="eps", eta=1.0)


def test_types_say_what_has_a_density():
    """Random solvers give random types, deterministic ones never do."""
    made = all_steps(VP, "eps")
    for name in ("ddim", "ancestral", "flow_match", "euler_maruyama", "flow_sde"):
        assert isinstance(made[name], AffineStep)
    assert isinstance(made["2m_sde"], TwoStep)
    assert isinstance(made["ddim_ode"], DeterministicStep)
    assert isinstance(made["probability_flow"], DeterministicStep)
    assert isinstance(made["2m"], DeterministicTwoStep)
    assert isinstance(made["heun"], HeunStep)


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="given by ddim_ode"):
        solvers.ddim(VP, 0.5, 0.4, prediction="eps", eta=0.0)
    with pytest.raises(ValueError, match="given by probability_flow"):
        solvers.euler_maruyama(VP, 0.5, 0.4, prediction="eps", eta=0.0)
    with pytest.raises(ValueError, match="given by ddim_ode"):
        solvers.flow_sde(FLOW, 0.5, 0.4, prediction="flow", noise_level=0.0)
    with pytest.raises(ValueError, match="more than there is at s"):
        solvers.ddim(VP, 0.9, 0.4, prediction="eps", eta=1.5)
    for t, s in ((0.4, 0.5), (0.4, 0.4), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="0 <= s < t <= 1"):
            solvers.ddim(VP, t, s, prediction="eps", eta=1.0)
    with pytest.raises(ValueError, match="t_before must lie between t and 1"):
        solvers.dpm_solver_2m_sde(VP, 0.4, 0.5, 0.3, prediction="eps")
    with pytest.raises(ValueError, match="in one step"):
        solvers.flow_sde(FLOW, 1.0, 0.0, prediction="flow", noise_level=0.7)


# ---- the limit of short steps --------------------------------------------------------------------


RANDOM: dict[str, Callable[..., AffineStep | TwoStep]] = {
    "euler_maruyama": lambda schedule, t, s, eta: solvers.euler_maruyama(
        schedule, t, s, prediction="eps", eta=eta
    ),
    "ddim": lambda schedule, t, s, eta: solvers.ddim(schedule, t, s, prediction="eps", eta=eta),
}


@pytest.mark.parametrize("schedule", [VP, VE, FLOW])
@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_step_kl_tends_to_the_girsanov_rate(schedule, name, eta):
    """KL of a step / h = rate + O(h), and S^2 / h = eta^2 g^2 + O(h)."""
    t = torch.tensor([0.5], dtype=torch.float64)
    a, a_ref = normal(1, 3), normal(1, 3, seed=1)
    rate = gaussian.girsanov_rate(schedule, t, a, a_ref, prediction="eps", eta=eta)
    errors = []
    sizes = [1e-3, 1e-4]
    for h in sizes:
        step = RANDOM[name](schedule, t, t - h, eta)
        errors.append(abs(float(gaussian.step_kl(step, a, a_ref) / h / rate) - 1))
        noise = float(step.std**2 / h / (eta**2 * schedule.g2(t)))
        assert noise == pytest.approx(1, abs=30 * h)
    if name == "euler_maruyama":  # exact for any step
        assert max(errors) < 1e-12
    else:
        assert errors[-1] < 2e-2
        assert errors[-1] < 0.11 * errors[0]


def test_kl_of_a_2m_sde_step_tends_to_the_rate():
    """The outputs at both states moved alike: what remains of the extrapolation is O(h)."""
    t = torch.tensor([0.5], dtype=torch.float64)
    a, a_ref = normal(1, 3), normal(1, 3, seed=1)
    rate = gaussian.girsanov_rate(VP, t, a, a_ref, prediction="eps")
    errors = []
    for h in (1e-3, 1e-4):
        step = solvers.dpm_solver_2m_sde(VP, t + h, t, t - h, prediction="eps")
        kl = gaussian.step_kl(step, a, a_ref, a_before=a, a_before_ref=a_ref)
        errors.append(abs(float(kl / h / rate) - 1))
    assert errors[-1] < 2e-2 and errors[-1] < 0.11 * errors[0]


def test_noise_drawn_anew_has_no_rate():
    """flow_match_stochastic: KL of a step does not shrink with it."""
    t = torch.tensor([0.5], dtype=torch.float64)
    a, a_ref = normal(1, 3), normal(1, 3, seed=1)
    kls = [
        float(
            gaussian.step_kl(
                solvers.flow_match_stochastic(FLOW, t, t - h, prediction="flow"), a, a_ref
            )
        )
        for h in (1e-2, 1e-3, 1e-4)
    ]
    assert kls[2] == pytest.approx(kls[1], rel=0.01) and kls[2] > 0.1


# ---- order of convergence ------------------------------------------------------------------------


def order(errors: list[float]) -> float:
    """Between the two finest of a series of doublings."""
    return math.log2(errors[-2] / errors[-1])


def linear_chain(
    make: Callable, schedule: GaussianSchedule, times: Tensor
) -> list[tuple[float, float, float, float]]:
    """Every step with a perfect network, affine in x: (gain, gain of x_before, shift, std)."""
    t, s = times[:-1], times[1:]
    before = torch.cat([times[:1], times[:-2]])
    step = make(schedule, before, t, s)

    def affine(u: Tensor) -> tuple[Tensor, Tensor]:
        zero, one = torch.zeros(len(u), 1).double(), torch.ones(len(u), 1).double()
        shift = output(schedule, u, zero, "v")[:, 0]
        return output(schedule, u, one, "v")[:, 0] - shift, shift

    gain, shift = affine(t)
    now, past, fixed = step.on_x + step.on_a * gain, torch.zeros_like(t), step.on_a * shift
    if isinstance(step, TwoStep | DeterministicTwoStep):
        gain_before, shift_before = affine(before)
        past = step.on_x_before + step.on_a_before * gain_before
        fixed = fixed + step.on_a_before * shift_before
    if isinstance(step, HeunStep):
        guess = step.guess.on_x + step.guess.on_a * gain
        guess_shift = step.guess.on_a * shift
        gain_s, shift_s = affine(s)
        now = now + (step.on_x_guess + step.on_a_guess * gain_s) * guess
        at_guess = step.on_a_guess * (shift_s + gain_s * guess_shift)
        fixed = fixed + step.on_x_guess * guess_shift + at_guess
    std = step.std if isinstance(step, AffineStep | TwoStep) else torch.zeros_like(t)
    return list(zip(*(c.tolist() for c in (now, past, fixed, std)), strict=True))


def law(schedule: GaussianSchedule, t: Tensor) -> tuple[float, float]:
    """Mean and variance of x_t."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return alpha * M_0, alpha**2 * V_0 + sigma**2


def flow_error(make: Callable, schedule: GaussianSchedule, times: Tensor) -> float:
    """Largest error against the exact flow, which keeps (x - mean) / std of x_t."""
    (m, v), (m_end, v_end) = law(schedule, times[0]), law(schedule, times[-1])
    steps, errors = linear_chain(make, schedule, times), []
    for start in (-2.0, 0.3, 1.7):
        x = x_before = start
        for gain, gain_before, shift, _ in steps:
            x, x_before = gain * x + gain_before * x_before + shift, x
        errors.append(abs(x - m_end - math.sqrt(v_end / v) * (start - m)))
    return max(errors)


def law_errors(make: Callable, schedule: GaussianSchedule, times: Tensor) -> tuple[float, float]:
    """Errors of mean and variance at the end of a chain that starts from the law of x_t.

    By exact recursion of the moments of (x_t, x_before): no sampling error.
    """
    m, v = law(schedule, times[0])
    m_before, v_before, both = m, v, v
    for gain, gain_before, shift, std in linear_chain(make, schedule, times):
        m, m_before = gain * m + gain_before * m_before + shift, m
        with_now = gain * v + gain_before * both
        with_before = gain * both + gain_before * v_before
        v_before, both, v = v, with_now, gain * with_now + gain_before * with_before + std**2
    m_end, v_end = law(schedule, times[-1])
    return abs(m - m_end), abs(v - v_end)


def grid(n: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


def ddim_ode(schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor) -> DeterministicStep:
    return solvers.ddim_ode(schedule, t, s, prediction="v")


def probability_flow(
    schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor
) -> DeterministicStep:
    return solvers.probability_flow(schedule, t, s, prediction="v")


def heun(schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor) -> HeunStep:
    return solvers.heun(schedule, t, s, prediction="v")


def two_m(schedule: GaussianSchedule, before: Tensor, t: Tensor, s: Tensor) -> DeterministicTwoStep:
    return solvers.dpm_solver_2m(schedule, before, t, s, prediction="v")


def two_m_sde(schedule: GaussianSchedule, before: Tensor, t: Tensor, s: Tensor) -> TwoStep:
    return solvers.dpm_solver_2m_sde(schedule, before, t, s, prediction="v")


def ancestral(schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor) -> AffineStep:
    return solvers.euler_ancestral(schedule, t, s, prediction="v")


def ddim(schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor) -> AffineStep:
    return solvers.ddim(schedule, t, s, prediction="v", eta=0.7)


def euler_maruyama(schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor) -> AffineStep:
    return solvers.euler_maruyama(schedule, t, s, prediction="v", eta=0.7)


def flow_sde(schedule: RectifiedFlow, _: Tensor, t: Tensor, s: Tensor) -> AffineStep:
    return solvers.flow_sde(schedule, t, s, prediction="v", noise_level=0.7)


def renoised(schedule: GaussianSchedule, _: Tensor, t: Tensor, s: Tensor) -> AffineStep:
    return solvers.flow_match_stochastic(schedule, t, s, prediction="v")


@pytest.mark.parametrize("schedule", [VP, VE, FLOW])
@pytest.mark.parametrize(
    ("make", "expected"), [(ddim_ode, 1), (probability_flow, 1), (heun, 2), (two_m, 2)]
)
def test_strong_order_of_deterministic_solvers(schedule, make, expected):
    """Against the exact flow, steps equal in t."""
    errors = [flow_error(make, schedule, grid(n, 0.7, 0.2)) for n in (160, 320, 640)]

    assert errors[-1] > 1e-9
    assert abs(order(errors) - expected) < 0.1


@pytest.mark.parametrize("schedule", [VP, VE, FLOW])
@pytest.mark.parametrize(
    ("make", "expected"), [(euler_maruyama, 1), (ddim, 1), (ancestral, 1), (two_m_sde, 2)]
)
def test_weak_order_of_random_solvers(schedule, make, expected):
    """Error of the variance at the end; that of the mean is no larger."""
    errors = [law_errors(make, schedule, grid(n, 0.9, 0.1)) for n in (400, 800, 1600)]
    variances = [v for _, v in errors]

    assert abs(order(variances) - expected) < 0.1
    assert all(m <= v for m, v in errors)


def test_flow_sde_converges_to_the_data():
    """Weak order 1 as well."""
    errors = [law_errors(flow_sde, FLOW, grid(n, 0.9, 0.1))[1] for n in (400, 800, 1600)]
    assert abs(order(errors) - 1) < 0.1


def test_table_takes_the_solvers_to_the_data():
    """Noise in a table of 1000: the errors of 100 steps are below those of 25 by their order."""
    for make, factor in ((ddim_ode, 3), (two_m, 10)):
        coarse, fine = (flow_error(make, TABLE, grid(n, 0.7, 0.1)) for n in (25, 100))
        assert fine < coarse / factor
    for make, factor in ((ancestral, 3), (euler_maruyama, 3), (two_m_sde, 10)):
        coarse, fine = (law_errors(make, TABLE, grid(n, 0.7, 0.1))[1] for n in (25, 100))
        assert fine < coarse / factor


def test_noise_drawn_anew_does_not_converge():
    """flow_match_stochastic: the variance of many steps is D / (2 - sigma^2 / D), not D.

    D = alpha^2 / 4 + sigma^2: the fixed point of v -> (1 - sigma^2 / D)^2 v + sigma^2.
    """
    error = law_errors(renoised, FLOW, grid(4000, 0.9, 0.1))[1]
    _, d = law(FLOW, torch.tensor(0.1, dtype=torch.float64))
    assert error == pytest.approx(d - d / (2 - 0.01 / d), rel=1e-2)


# ---- the gradient of two-step chains -------------------------------------------------------------


def two_step_chain(theta: Tensor, n: int) -> tuple[list[TwoStep], Callable[[int, Tensor], Tensor]]:
    """n - 1 random 2M SDE steps from t = .95, and a linear policy eps(k, x)."""
    times = torch.linspace(0.95, 0.15, n, dtype=torch.float64)
    before = torch.cat([times[:1], times[:-1]])
    made = [
        solvers.dpm_solver_2m_sde(
            VP, before[k : k + 1], times[k : k + 1], times[k + 1 : k + 2], prediction="eps"
        )
        for k in range(n - 1)
    ]

    def policy(k: int, x: Tensor) -> Tensor:
        return output(VP, times[k : k + 1], x, "eps") + theta[0] + theta[1] * x

    return made, policy


def run_chain(theta: Tensor, start: Tensor, z: Tensor) -> list[Tensor]:
    """x_0, ..., x_K [P, 1] of the chain, for noise z [P, K]."""
    made, policy = two_step_chain(theta, z.shape[1] + 1)
    path = [start]
    for k, step in enumerate(made):
        last = max(k - 1, 0)
        past = {"x_before": path[last], "a_before": policy(last, path[last])}
        path.append(gaussian.draw(step, path[k], policy(k, path[k]), z[:, k : k + 1], **past))
    return path


def path_log_prob(theta: Tensor, path: list[Tensor], stored: bool) -> Tensor:
    """Sum of step log-probs; ``stored`` takes the output at the state before as a constant."""
    made, policy = two_step_chain(theta, len(path))
    total = torch.zeros(len(path[0]), dtype=torch.float64)
    for k, step in enumerate(made):
        last = max(k - 1, 0)
        a_before = policy(last, path[last])
        total = total + gaussian.step_log_prob(
            step,
            path[k],
            policy(k, path[k]),
            path[k + 1],
            x_before=path[last],
            a_before=a_before.detach() if stored else a_before,
        )
    return total


def test_two_step_log_prob_is_the_density_of_the_path():
    """With both outputs recomputed: value and gradient of N(path; b, M M^T), M = dpath / dz."""
    n_steps = 4
    theta = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    start, z = torch.tensor([[0.7]]).double(), normal(1, n_steps)
    path = [x.detach() for x in run_chain(theta, start, z)]

    def flat(z: Tensor) -> Tensor:
        return torch.cat(run_chain(theta, start, z)[1:], 1)[0]

    origin = torch.zeros(1, n_steps, dtype=torch.float64)
    spread = torch.autograd.functional.jacobian(flat, origin, create_graph=True)
    assert isinstance(spread, Tensor)
    law = torch.distributions.MultivariateNormal(flat(origin), scale_tril=spread[:, 0])
    exact = law.log_prob(torch.cat(path[1:], 1)[0])
    got = path_log_prob(theta, path, stored=False)[0]
    torch.testing.assert_close(got, exact)
    (expected,) = torch.autograd.grad(exact, theta)
    torch.testing.assert_close(torch.autograd.grad(got, theta)[0], expected)
    held = path_log_prob(theta, path, stored=True)[0]
    assert float(held.detach()) == float(got.detach()), (
        "at the policy that sampled, the ratio is 1 all the same"
    )
    (shortcut,) = torch.autograd.grad(held, theta)
    assert float((shortcut - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("n_steps", [3, 5])
def test_stored_outputs_bias_the_policy_gradient(n_steps):
    """E[x_K d log p(path)] by quadrature is dE[x_K] only if both outputs are recomputed."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    z = torch.tensor(list(itertools.product(nodes, repeat=n_steps)))
    weight = torch.tensor(list(itertools.product(weights / weights.sum(), repeat=n_steps))).prod(1)
    theta = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    start = torch.full((len(z), 1), 0.7, dtype=torch.float64)
    path = run_chain(theta, start, z)
    reward = path[-1][:, 0]
    (exact,) = torch.autograd.grad((weight * reward).sum(), theta, retain_graph=True)
    fixed = [x.detach() for x in path]
    error = {}
    for stored in (False, True):
        objective = (weight * reward.detach() * path_log_prob(theta, fixed, stored)).sum()
        (gradient,) = torch.autograd.grad(objective, theta)
        error[stored] = float((gradient - exact).norm() / exact.norm())

    assert error[False] < 1e-12
    assert error[True] > 0.1
