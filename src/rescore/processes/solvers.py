r"""Reverse steps of the usual solvers for Gaussian noise, from t to a cleaner s < t.

Every function takes times [N] (or floats) and what the network predicts, and gives the coefficients
of ``rescore.processes.gaussian``: the conversion to the network's output is part of them. With
hat x_0 and hat eps what the network says about x_t, and e^-2h = SNR_t / SNR_s, three families:

    x_s = alpha_s hat x_0 + sqrt(sigma_s^2 - S^2) hat eps + S z     DDIM, Euler ancestral, ...
    x_s = x_t - h [f x_t - (1 + eta^2) / 2 g^2 score] + eta g sqrt(h) z     Euler-Maruyama, ...
    DPM-Solver++, which integrates the linear part of the equation exactly.

Random ones give ``AffineStep`` or ``TwoStep``; deterministic ones, which no likelihood loss can
use, are functions of their own and give ``Deterministic...`` types.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.processes.convert import Prediction, eps_coefficients, x_0_coefficients
from rescore.processes.gaussian import (
    AffineStep,
    DeterministicStep,
    DeterministicTwoStep,
    HeunStep,
    TwoStep,
)
from rescore.processes.gaussian_schedules import GaussianSchedule, RectifiedFlow

Times = Float[Tensor, " N"] | float


# ---- random solvers ------------------------------------------------------------------------------


def ddim(
    schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction, eta: float
) -> AffineStep:
    """DDIM(eta): S^2 = eta^2 sigma_s^2 (1 - e^-2h). eta = 1 is the ancestral (DDPM) step.

    To s = 0, where sigma_s is 0, S is 0 and x_s = hat x_0; a ``DiscreteTable`` with another
    ``final`` ends with noise.

    Source: Song, Meng & Ermon 2021, arXiv:2010.02502, eqs. (12) and (16); for schedules that do not
    preserve variance by the same posterior. Equal to diffusers' ``DDIMScheduler`` without clipping.

    Raises:
        ValueError: eta is not above 0 (see ``ddim_ode``), or so large that S exceeds sigma_s; not
            0 <= s < t <= 1; a prediction that does not determine x_0 at t.
    """
    _check_eta(eta, "ddim_ode")
    t, s = _times(t, s)
    return _renoised(schedule, t, s, prediction, eta * schedule.sigma(s) * _fresh(schedule, t, s))


def euler_ancestral(
    schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction
) -> AffineStep:
    """The Euler step to sigma_down, then noise sigma_up, in k-diffusion's coordinates x / alpha.

    With u = sigma / alpha: sigma_up^2 = u_s^2 (u_t^2 - u_s^2) / u_t^2 and sigma_down = u_s^2 / u_t.
    For every schedule this is DDIM with eta = 1. Mind that diffusers'
    ``EulerAncestralDiscreteScheduler``, to which it is equal, keeps x / alpha as its state.
    """
    return ddim(schedule, t, s, prediction=prediction, eta=1.0)


def flow_match_stochastic(
    schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction
) -> AffineStep:
    """x_s = alpha_s hat x_0 + sigma_s z: all noise is drawn anew.

    diffusers' ``FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)``, on ``RectifiedFlow``.
    S does not shrink with the step: there is no equation behind it and no rate of KL, and the KL of
    a path grows with the number of steps. Nor does the law of many steps tend to that of the data:
    of Gaussian data about half the variance is left.

    Raises:
        ValueError: not 0 <= s < t <= 1; a prediction that does not determine x_0 at t.
    """
    t, s = _times(t, s)
    return _renoised(schedule, t, s, prediction, schedule.sigma(s))


def euler_maruyama(
    schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction, eta: float
) -> AffineStep:
    """A step of length h = t - s of the reverse equation with noise eta g.

    x_s = x_t - h [f x_t - (1 + eta^2) / 2 g^2 score] + eta g sqrt(h) z. All eta share the marginals
    of the process when the score is exact. The last step adds noise like the others.

    Source: Song et al. 2021, arXiv:2011.13456, for eta = 1; the family of eta keeps the marginals
    by the Fokker-Planck equation.

    Raises:
        ValueError: eta is not above 0 (see ``probability_flow``); a t where g^2 is infinite, as
            t = 1 of ``RectifiedFlow`` (see ``flow_sde``); not 0 <= s < t <= 1.
    """
    _check_eta(eta, "probability_flow")
    t, s = _times(t, s)
    on_x, on_a = _euler(schedule, t, s, prediction, eta)
    return AffineStep(on_x, on_a, eta * torch.sqrt(schedule.g2(t) * (t - s)))


def flow_sde(
    schedule: RectifiedFlow, t: Times, s: Times, *, prediction: Prediction, noise_level: float
) -> AffineStep:
    """Flow-GRPO's step: Euler-Maruyama with noise c = noise_level sqrt(t / (1 - t)).

    x_s = x_t - h [flow + c^2 / (2 t) hat eps] + c sqrt(h) z: ``euler_maruyama`` with
    eta = noise_level / sqrt(2), but for t = 1, where c is infinite and s takes the place of t in
    it. A chain that starts at t = 1 therefore depends on its first step.

    Source: Flow-GRPO, arXiv:2505.05470, and its code (sd3_sde_with_logprob.py, 54809b5), whose
    ``sigma_max`` is the s of a first step from t = 1.

    Raises:
        ValueError: noise_level is not above 0 (see ``ddim_ode``); not 0 <= s < t <= 1, or t = 1 and
            s = 0 in one step; a prediction that does not determine x_0 and eps at t.
    """
    _check_eta(noise_level, "ddim_ode")
    t, s = _times(t, s)
    if bool(((t == 1) & (s == 0)).any()):
        raise ValueError("a flow SDE from t = 1 to s = 0 in one step has no noise: use more steps")
    level = torch.where(t == 1, s, t)
    diffusion = noise_level * torch.sqrt(level / (1 - level))
    h = t - s
    on_x, on_a = _combined(
        schedule, t, prediction, on_x=1.0, on_x_0=h, on_eps=-h - h * diffusion**2 / (2 * t)
    )
    return AffineStep(on_x, on_a, diffusion * torch.sqrt(h))


def dpm_solver_2m_sde(
    schedule: GaussianSchedule, t_before: Times, t: Times, s: Times, *, prediction: Prediction
) -> TwoStep:
    """SDE-DPM-Solver++(2M), the midpoint form: second order in hat x_0, from two states in a row.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t, h_0 = lambda_t - lambda_before:

        x_s = (sigma_s / sigma_t) e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z
        D   = hat x_0(x_t) + h / (2 h_0) (hat x_0(x_t) - hat x_0(x_before)).

    Rows with t_before = t (a first step, whatever is given as x_before) and rows without noise at s
    (a last one) are of first order, D = hat x_0(x_t), which is ``ddim`` with eta = 1.

    Source: Lu et al. 2022, arXiv:2211.01095, in the form of diffusers' ``sde-dpmsolver++``, whose
    last step is such a one with ``final_sigmas_type="zero"``.

    Raises:
        ValueError: not 0 <= s < t <= t_before <= 1; a prediction that does not determine x_0.
    """
    t_before, t, s = _three_times(t_before, t, s)
    fresh = _fresh(schedule, t, s)
    kept = (schedule.alpha(t) / schedule.alpha(s)) * (schedule.sigma(s) / schedule.sigma(t)) ** 2
    coefficients = _two_step(
        schedule, (t_before, t, s), prediction, kept, schedule.alpha(s) * fresh**2
    )
    return TwoStep(*coefficients, schedule.sigma(s) * fresh)


# ---- deterministic solvers -----------------------------------------------------------------------


def ddim_ode(
    schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction
) -> DeterministicStep:
    """DDIM with eta = 0: x_s = alpha_s hat x_0 + sigma_s hat eps.

    Euler's method for the probability-flow equation in x / alpha over sigma / alpha, and for
    ``RectifiedFlow`` in t: diffusers' ``FlowMatchEulerDiscreteScheduler``.

    Raises:
        ValueError: not 0 <= s < t <= 1; a prediction that does not determine x_0 at t.
    """
    t, s = _times(t, s)
    step = _renoised(schedule, t, s, prediction, torch.zeros_like(t))
    return DeterministicStep(step.on_x, step.on_a)


def probability_flow(
    schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction
) -> DeterministicStep:
    """Euler's method in t for dx / dt = f x - g^2 score / 2: ``euler_maruyama`` without noise.

    Source: Song et al. 2021, arXiv:2011.13456.

    Raises:
        ValueError: as ``euler_maruyama``.
    """
    t, s = _times(t, s)
    return DeterministicStep(*_euler(schedule, t, s, prediction, 0.0))


def heun(schedule: GaussianSchedule, t: Times, s: Times, *, prediction: Prediction) -> HeunStep:
    """Heun's method for the probability-flow equation, second order, two outputs a step.

    In the coordinates in which every schedule is a rectified flow, y = x / (alpha + sigma) over
    r = sigma / (alpha + sigma), where dy / dr = hat eps - hat x_0: the guess is ``ddim_ode``, the
    correction takes the mean of the slopes at both ends. To a time without noise there is none.

    Source: Karras et al. 2022, arXiv:2206.00364, in other coordinates.

    Raises:
        ValueError: not 0 <= s < t <= 1; a prediction that does not determine x_0 at t.
    """
    t, s = _times(t, s)
    guess = ddim_ode(schedule, t, s, prediction=prediction)
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    length = sigma_t / (alpha_t + sigma_t) - sigma_s / (alpha_s + sigma_s)
    half = torch.where(sigma_s > 0, (alpha_s + sigma_s) * length / 2, 0.0)
    noisy = torch.where(sigma_s > 0, s, t)  # any time with noise, where there is no correction
    start = _combined(schedule, t, prediction, on_x=0.0, on_x_0=-half, on_eps=half)
    end = _combined(schedule, noisy, prediction, on_x=0.0, on_x_0=half, on_eps=-half)
    return HeunStep(guess, guess.on_x + start[0], guess.on_a + start[1], *end)


def dpm_solver_2m(
    schedule: GaussianSchedule, t_before: Times, t: Times, s: Times, *, prediction: Prediction
) -> DeterministicTwoStep:
    """DPM-Solver++(2M), the midpoint form: x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) D.

    D, the rows of first order (here ``ddim_ode``) and errors as in ``dpm_solver_2m_sde``.

    Source: Lu et al. 2022, arXiv:2211.01095; diffusers' ``dpmsolver++``.
    """
    t_before, t, s = _three_times(t_before, t, s)
    kept = schedule.sigma(s) / schedule.sigma(t)
    share = -torch.expm1((schedule.log_snr(t) - schedule.log_snr(s)) / 2)
    return DeterministicTwoStep(
        *_two_step(schedule, (t_before, t, s), prediction, kept, schedule.alpha(s) * share)
    )


# ---- parts ---------------------------------------------------------------------------------------


def _renoised(
    schedule: GaussianSchedule, t: Tensor, s: Tensor, prediction: Prediction, std: Tensor
) -> AffineStep:
    """x_s = alpha_s hat x_0 + sqrt(sigma_s^2 - std^2) hat eps + std z."""
    sigma_s = schedule.sigma(s)
    if bool((std > sigma_s * (1 + 1e-9)).any()):
        raise ValueError(
            f"noise of std {std.tolist()} was to be drawn, more than there is at s, "
            f"{sigma_s.tolist()}: take a smaller eta"
        )
    on_eps = torch.sqrt((sigma_s**2 - std**2).clamp(min=0))
    on_x, on_a = _combined(
        schedule, t, prediction, on_x=0.0, on_x_0=schedule.alpha(s), on_eps=on_eps
    )
    return AffineStep(on_x, on_a, std)


def _euler(
    schedule: GaussianSchedule, t: Tensor, s: Tensor, prediction: Prediction, eta: float
) -> tuple[Tensor, Tensor]:
    g2 = schedule.g2(t)
    if not bool(g2.isfinite().all()):
        raise ValueError(
            f"g^2 of {schedule} is infinite at some t (pure noise): start below t = 1, or use a "
            "solver that can start there (ddim, flow_sde)"
        )
    h = t - s
    on_eps = -h * (1 + eta**2) / 2 * g2 / schedule.sigma(t)
    on_x = 1 - h * schedule.drift(t)
    return _combined(schedule, t, prediction, on_x=on_x, on_eps=on_eps)


def _two_step(
    schedule: GaussianSchedule,
    times: tuple[Tensor, Tensor, Tensor],
    prediction: Prediction,
    kept: Tensor,
    share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kept x_t + share (hat x_0 + weight (hat x_0 - hat x_0 before))."""
    t_before, t, s = times
    h = schedule.log_snr(s) - schedule.log_snr(t)
    h_0 = schedule.log_snr(t) - schedule.log_snr(t_before)
    first_order = (t_before == t) | (schedule.sigma(s) == 0)
    weight = torch.where(first_order, 0.0, h / (2 * h_0))
    now = x_0_coefficients(prediction, schedule.alpha(t), schedule.sigma(t))
    then = x_0_coefficients(prediction, schedule.alpha(t_before), schedule.sigma(t_before))
    with_weight, minus = share * (1 + weight), -share * weight
    return kept + with_weight * now[0], with_weight * now[1], minus * then[0], minus * then[1]


def _combined(
    schedule: GaussianSchedule,
    t: Tensor,
    prediction: Prediction,
    *,
    on_x: Tensor | float,
    on_eps: Tensor,
    on_x_0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(A, B) of on_x x_t + on_x_0 hat x_0 + on_eps hat eps = A x_t + B a."""
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    eps_x, eps_a = eps_coefficients(prediction, alpha_t, sigma_t)
    a_x, a_a = on_x + on_eps * eps_x, on_eps * eps_a
    if on_x_0 is None:
        return a_x, a_a
    x_0_x, x_0_a = x_0_coefficients(prediction, alpha_t, sigma_t)
    return a_x + on_x_0 * x_0_x, a_a + on_x_0 * x_0_a


def _fresh(schedule: GaussianSchedule, t: Tensor, s: Tensor) -> Tensor:
    """sqrt(1 - e^-2h): the share of the noise at s that an ancestral step draws anew."""
    return torch.sqrt(-torch.expm1(schedule.log_snr(t) - schedule.log_snr(s)))


def _times(t: Times, s: Times) -> tuple[Tensor, Tensor]:
    """Both as float64 [N]."""
    start, end = torch.broadcast_tensors(_time(t), _time(s))
    if not bool(((end >= 0) & (end < start) & (start <= 1)).all()):
        raise ValueError(
            f"a step goes from t to s with 0 <= s < t <= 1, not from {start.tolist()} to "
            f"{end.tolist()}"
        )
    return start, end


def _three_times(t_before: Times, t: Times, s: Times) -> tuple[Tensor, Tensor, Tensor]:
    before, start, end = torch.broadcast_tensors(_time(t_before), *_times(t, s))
    if not bool(((before >= start) & (before <= 1)).all()):
        raise ValueError(
            f"t_before must lie between t and 1, but is {before.tolist()} with t = "
            f"{start.tolist()}; a first step has t_before = t"
        )
    return before, start, end


def _time(t: Times) -> Tensor:
    time = torch.as_tensor(t)
    if not time.is_floating_point():
        raise TypeError(f"times have dtype {time.dtype}: pass floats between 0 and 1")
    return time.double().reshape(-1)


def _check_eta(eta: float, without_noise: str) -> None:
    if not eta > 0:
        raise ValueError(
            f"the noise is {eta}: a step without noise has no likelihood and another type, given "
            f"by {without_noise}"
        )
