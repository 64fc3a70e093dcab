"""Our steps are those of diffusers' schedulers: the same noise, the same chain, every step.

A small nonlinear network is run through both, each on its own states. In float64 the schedulers
are run with their casts to float32 widened, since some of them compute in float32 whatever they
are given.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rescore.processes import gaussian, solvers
from rescore.processes.convert import Prediction
from rescore.processes.gaussian_schedules import DiscreteTable, GaussianSchedule, RectifiedFlow

diffusers = pytest.importorskip("diffusers")

SHAPE = (4, 3, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FORMS: dict[Prediction, str] = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


class Widened:
    """torch, but for float32, which is float64."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == torch.float64:
        for name in (
            "euler_ancestral_discrete",
            "flow_match_euler_discrete",
            "dpmsolver_multistep",
        ):
            module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
            monkeypatch.setattr(module, "torch", Widened())
    return request.param


def network(schedule: GaussianSchedule, prediction: Prediction) -> Callable[..., Tensor]:
    """What is right for data of unit variance, and a smooth error that mixes neighbours.

    So that states stay of order 1, as with a trained network.
    """

    def output(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t).to(x), schedule.sigma(t).to(x)
        error = 0.1 * torch.tanh(x + 0.5 * x.roll(1, -1))
        power = alpha**2 + sigma**2
        right = {"eps": sigma, "x_0": alpha, "v": 0 * sigma, "flow": sigma - alpha}[prediction]
        return right / power * x + error

    return output


def noise(k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=generator(k), dtype=dtype)


def generator(k: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + k)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == theirs.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def table_in(scheduler, dtype: torch.dtype) -> Tensor:
    """The scheduler's table; made again in float64 from its betas where that is wanted."""
    if dtype == torch.float64:
        scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    return scheduler.alphas_cumprod


def entries_of(scheduler) -> Tensor:
    return scheduler.timesteps.long()


@pytest.mark.parametrize("prediction", FORMS)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim(prediction: Prediction, set_alpha_to_one: bool, eta: float, dtype: torch.dtype):
    scheduler = diffusers.DDIMScheduler(
        **SD,
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        prediction_type=FORMS[prediction],
    )
    alphas = table_in(scheduler, dtype)
    if not set_alpha_to_one:
        scheduler.final_alpha_cumprod = alphas[0]
    table = DiscreteTable(alphas, final=1.0 if set_alpha_to_one else float(alphas[0]))
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10
    model = network(table, prediction)
    ours = theirs = noise(0, dtype)
    for k, n in enumerate(entries_of(scheduler)):
        t, s = table.time_of(n[None]), table.time_of((n - 100).clamp(min=-1)[None])
        z = noise(k + 1, dtype)
        out = model(theirs, t)
        theirs = scheduler.step(
            out, int(n), theirs, eta=eta, variance_noise=z if eta > 0 else None
        ).prev_sample
        if eta > 0:
            step = solvers.ddim(table, t, s, prediction=prediction, eta=eta)
            ours = gaussian.draw(step, ours, model(ours, t), z)
            assert bool(step.is_random.all()) == (n > 100 or not set_alpha_to_one)
        else:
            step = solvers.ddim_ode(table, t, s, prediction=prediction)
            ours = gaussian.mean(step, ours, model(ours, t))
        close(ours, theirs, dtype)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_euler_ancestral(prediction: Prediction, dtype: torch.dtype):
    """Its state is x / alpha, its network is given x."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **SD, timestep_spacing="leading", steps_offset=1, prediction_type=FORMS[prediction]
    )
    table = DiscreteTable(table_in(scheduler, dtype))
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10
    levels = ((1 - table.alphas_cumprod) / table.alphas_cumprod).sqrt()
    scheduler.sigmas = torch.cat([levels[entries_of(scheduler)], levels.new_zeros(1)])
    times = torch.cat([table.time_of(entries_of(scheduler)), torch.zeros(1).double()])
    model = network(table, prediction)
    ours = noise(0, dtype)
    theirs = ours / table.alpha(times[:1]).to(ours)
    for k, n in enumerate(scheduler.timesteps):
        t, s = times[k : k + 1], times[k + 1 : k + 2]
        out = model(scheduler.scale_model_input(theirs, n), t)
        theirs = scheduler.step(out, n, theirs, generator=generator(k + 1)).prev_sample
        step = solvers.euler_ancestral(table, t, s, prediction=prediction)
        ours = gaussian.draw(step, ours, model(ours, t), noise(k + 1, dtype))
        close(ours / table.alpha(s).to(ours), theirs, dtype)
        assert bool(step.is_random.all()) == (k < 9)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(stochastic: bool, shift: float, dtype: torch.dtype):
    """Its times are our times: stochastic sampling, and the plain Euler step, which is DDIM's."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift, stochastic_sampling=stochastic
    )
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10
    scheduler.sigmas = scheduler.sigmas.to(dtype)
    assert float(scheduler.sigmas[0]) == 1 and float(scheduler.sigmas[-1]) == 0
    ours = theirs = noise(0, dtype)
    flow = RectifiedFlow()
    model = network(flow, "flow")
    for k, n in enumerate(scheduler.timesteps):
        t, s = scheduler.sigmas[k : k + 1], scheduler.sigmas[k + 1 : k + 2]
        out = model(theirs, t)
        theirs = scheduler.step(out, n, theirs, generator=generator(k + 1)).prev_sample
        if stochastic:
            step = solvers.flow_match_stochastic(flow, t, s, prediction="flow")
            ours = gaussian.draw(step, ours, model(ours, t), noise(k + 1, dtype))
        else:
            step = solvers.ddim_ode(flow, t, s, prediction="flow")
            ours = gaussian.mean(step, ours, model(ours, t))
        close(ours, theirs, dtype)


SOLVERS: dict[str, Callable] = {
    "sde-dpmsolver++": solvers.dpm_solver_2m_sde,
    "dpmsolver++": solvers.dpm_solver_2m,
}


@pytest.mark.parametrize("n_steps", [10, 20])
@pytest.mark.parametrize("prediction", FORMS)
@pytest.mark.parametrize("algorithm", SOLVERS)
def test_dpm_solver_2m(algorithm: str, prediction: Prediction, n_steps: int, dtype: torch.dtype):
    """Order 2, few and many steps (where diffusers differs in its last ones), with both states."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD, algorithm_type=algorithm, solver_order=2, prediction_type=FORMS[prediction]
    )
    table = DiscreteTable(table_in(scheduler, dtype))
    scheduler.set_timesteps(n_steps)
    assert len(scheduler.timesteps) == n_steps
    levels = ((1 - table.alphas_cumprod) / table.alphas_cumprod).sqrt()
    scheduler.sigmas = torch.cat([levels[entries_of(scheduler)], levels.new_zeros(1)])
    times = torch.cat([table.time_of(entries_of(scheduler)), torch.zeros(1).double()])
    model = network(table, prediction)
    ours = theirs = x_before = noise(0, dtype)
    for k, n in enumerate(scheduler.timesteps):
        t_before, t, s = (times[max(k + j, 0)][None] for j in (-1, 0, 1))
        z = noise(k + 1, dtype)
        theirs = scheduler.step(model(theirs, t), n, theirs, variance_noise=z).prev_sample
        step = SOLVERS[algorithm](table, t_before, t, s, prediction=prediction)
        past = {"x_before": x_before, "a_before": model(x_before, t_before)}
        x_before, a = ours, model(ours, t)
        if algorithm == "dpmsolver++":
            ours = gaussian.mean(step, ours, a, **past)
        else:
            ours = gaussian.draw(step, ours, a, z, **past)
        close(ours, theirs, dtype)


def test_flow_sigmas_through_dpm_solver(dtype: torch.dtype):
    """2M SDE on a rectified flow, as SD3-like models use it, with the flow as prediction."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10
    scheduler.sigmas = scheduler.sigmas.to(dtype)
    flow = RectifiedFlow()
    model = network(flow, "flow")
    ours = theirs = x_before = noise(0, dtype)
    for k, n in enumerate(scheduler.timesteps):
        t_before, t, s = (scheduler.sigmas[max(k + j, 0)][None] for j in (-1, 0, 1))
        z = noise(k + 1, dtype)
        theirs = scheduler.step(model(theirs, t), n, theirs, variance_noise=z).prev_sample
        step = solvers.dpm_solver_2m_sde(flow, t_before, t, s, prediction="flow")
        past = {"x_before": x_before, "a_before": model(x_before, t_before)}
        x_before, ours = ours, gaussian.draw(step, ours, model(ours, t), z, **past)
        close(ours, theirs, dtype)
