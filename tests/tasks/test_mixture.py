"""Mixtures with a known optimum: of all laws, and of a chain of few steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rescore.processes.gaussian import AffineStep
from rescore.processes.gaussian_schedules import RectifiedFlow, VariancePreserving
from rescore.rewards.reward import Reward
from rescore.sampling.decoder import GaussianDecoder, Solver
from rescore.tasks.mixture import GAUSSIAN, THREE_MODES, Mixture, chain_optimum, optimum

VP = VariancePreserving()
CURVED = replace(THREE_MODES, curvature=0.8, centre=(0.4, -0.3))
LINE = Mixture(weights=(0.25, 0.75), means=((-0.8,), (1.1,)), std=0.4, slope=(0.7,), curvature=0.5)


def steps_of(solver: Solver, n: int) -> tuple[AffineStep, Tensor]:
    """The steps of a solver, and where each starts."""
    decoder = GaussianDecoder(steps=n, solver=solver)
    steps = decoder.solve(VP, "score")
    assert isinstance(steps, AffineStep)
    return steps, decoder.times(VP)[:-1]


def points(n_dims: int, n: int = 6) -> tuple[Tensor, Tensor]:
    """States and times that are no round numbers, float64."""
    generator = torch.Generator().manual_seed(5)
    x = 1.3 * torch.randn(n, n_dims, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.03, 0.97, n, dtype=torch.float64)


def test_the_figures_of_the_presets():
    """p* and J* of the two settings, by hand: N(1.5, 1/8); weights .147, .532, .321, J* .350."""
    one = optimum(GAUSSIAN, beta=0.5)
    assert one.mixture.means == ((1.5,),)
    assert one.mixture.std**2 == pytest.approx(1 / 8)
    assert one.reward == pytest.approx(-(0.5**2 + 1 / 8))
    kl = 0.5 * (0.125 / 0.25 + 0.5**2 / 0.25 - 1 - math.log(0.125 / 0.25))
    assert one.kl == pytest.approx(kl)
    assert one.objective == pytest.approx(-0.375 - 0.5 * kl)
    three = optimum(THREE_MODES, beta=1.0)
    assert [round(weight, 3) for weight in three.mixture.weights] == [0.147, 0.532, 0.321]
    assert round(three.objective, 3) == 0.350


@pytest.mark.parametrize("task", [THREE_MODES, CURVED, LINE, GAUSSIAN])
@pytest.mark.parametrize("beta", [0.4, 1.3])
def test_p_star_is_the_tilted_density(task, beta):
    """log p*(x) - log p_pre(x) - r(x) / beta is -log Z = -J* / beta at every x."""
    best = optimum(task, beta=beta)
    x, _ = points(*task.shape)
    t = torch.zeros(len(x), dtype=torch.float64)
    gap = best.mixture.log_density(VP, x, t) - task.mixture.log_density(VP, x, t)
    reward = task.judge(x, task.prompts("train", torch.arange(len(x))))
    expected = torch.full_like(gap, -best.objective / beta)
    torch.testing.assert_close(gap - reward / beta, expected, rtol=1e-10, atol=1e-10)


def test_reward_and_kl_of_p_star_are_its_integrals():
    """In one dimension, by the trapezium rule."""
    best = optimum(LINE, beta=0.4)
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)[:, None]
    zero = torch.zeros(len(x), dtype=torch.float64)
    log_best, log_given = (m.log_density(VP, x, zero) for m in (best.mixture, LINE.mixture))
    density, grid = log_best.exp(), x[:, 0]
    judged = LINE.judge(x, LINE.prompts("train", torch.arange(0)))
    assert best.reward == pytest.approx(float(torch.trapezoid(density * judged, grid)), rel=1e-9)
    kl = float(torch.trapezoid(density * (log_best - log_given), grid))
    assert best.kl == pytest.approx(kl, rel=1e-9)


def test_the_optimal_value_is_its_definition():
    """beta log E_pre[exp(r / beta) | x_t], by the trapezium rule."""
    best, (x, t) = optimum(LINE, beta=0.4), points(1)
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    zero = torch.zeros_like(grid)
    clean = LINE.mixture.log_density(VP, grid[:, None], zero)
    seen = torch.distributions.Normal(VP.alpha(t)[:, None] * grid, VP.sigma(t)[:, None])
    posterior = (seen.log_prob(x) + clean).exp()
    judged = LINE.judge(grid[:, None], LINE.prompts("train", torch.arange(0)))
    above = torch.trapezoid(posterior * (judged / 0.4).exp(), grid)
    value = 0.4 * torch.log(above / torch.trapezoid(posterior, grid))
    torch.testing.assert_close(best.value(VP, x, t), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("task", [THREE_MODES, CURVED, GAUSSIAN])
@pytest.mark.parametrize("schedule", [VP, RectifiedFlow()])
def test_the_optimal_control(task, schedule):
    """s_pre + grad V* / beta is the score of noised p* (T1), and V* is r without noise."""
    best, (x, t) = optimum(task, beta=0.7), points(*task.shape)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(best.value(schedule, x, t).sum(), x)
    steered = task.mixture.score(schedule, x, t) + slope / 0.7
    torch.testing.assert_close(best.mixture.score(schedule, x, t), steered, rtol=1e-9, atol=1e-9)
    end = best.value(schedule, x, torch.zeros_like(t))
    judged = task.judge(x, task.prompts("train", torch.arange(0)))
    torch.testing.assert_close(end, judged, rtol=1e-9, atol=1e-9)


def law(
    policy: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor], noise: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J of the policies m = gain x + shift from N(0, 1), with r = -(x - 2)^2, by moments."""
    mean, kl, variance = torch.zeros(()).double(), torch.zeros(()).double(), torch.ones(()).double()
    for a, b, f, g, s2 in zip(*policy, *given, noise, strict=True):
        apart = ((a - f) * mean + b - g) ** 2 + (a - f) ** 2 * variance
        kl = kl + apart / (2 * s2)
        mean, variance = a * mean + b, a**2 * variance + s2
    return -((mean - 2) ** 2 + variance) - beta * kl, mean, variance, kl


@pytest.mark.parametrize("solver", ["euler_maruyama", "ddim"])
def test_no_linear_policy_beats_the_optimum_of_a_chain(solver):
    """LBFGS over the gains and shifts of all steps with noise ends at J, mean, variance and KL.

    The last step of ddim has no noise: it stays as it is.
    """
    steps, t = steps_of(solver, 4)
    best = chain_optimum(GAUSSIAN, VP, steps, t, beta=0.5)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    total = alpha**2 / 4 + sigma**2
    given = (steps.on_x - steps.on_a / total, steps.on_a * alpha / total)
    noise, random = steps.std**2, steps.is_random
    gain, shift = (value.clone().requires_grad_() for value in given)
    search = torch.optim.LBFGS(
        [gain, shift], max_iter=300, tolerance_grad=1e-11, line_search_fn="strong_wolfe"
    )

    def chain():
        held = torch.where(random, gain, given[0]), torch.where(random, shift, given[1])
        return law(held, given, torch.where(random, noise, 1e-30), 0.5)

    def closure():
        search.zero_grad()
        (-chain()[0]).backward()
        return -chain()[0]

    search.step(closure)
    found = [float(value.detach()) for value in chain()]
    assert found[0] == pytest.approx(best.objective, abs=1e-7)
    got = [best.mean, best.variance, best.kl]
    assert found[1:] == pytest.approx(got, abs=1e-4)
    assert best.objective == pytest.approx(best.reward - 0.5 * best.kl, abs=1e-12)


@pytest.mark.parametrize("solver", ["euler_maruyama", "ddim"])
def test_the_optimum_of_many_steps_is_that_of_all_laws(solver):
    """Its distance falls like 1 / N; a linear reward is a special case."""
    for task in (GAUSSIAN, replace(GAUSSIAN, slope=(0.8,), curvature=0.0, centre=(0.3,))):
        gaps = []
        for n in (1000, 2000):
            best = chain_optimum(task, VP, *steps_of(solver, n), beta=0.5)
            gaps.append(abs(best.objective - optimum(task, beta=0.5).objective))
        assert gaps[1] < 0.003
        assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.15)


def test_the_task_is_a_task():
    """Splits differ, prompts give nothing, rewards say how far samples are and in which mode."""
    train, test = THREE_MODES.clean("train").x_0, THREE_MODES.clean("test").x_0
    assert train.shape == test.shape == (4096, 2) and not torch.equal(train, test)
    assert torch.equal(train, THREE_MODES.clean("train").x_0)
    assert len(THREE_MODES.clean("validation").x_0) == THREE_MODES.size("validation") == 1024
    prompts = THREE_MODES.prompts("test", torch.tensor([7, 3]))
    assert prompts.n_samples == 2 and not prompts.inputs and not prompts.info
    x = torch.tensor([[-1.4, 0.1], [0.1, 1.7]])
    reward: Reward = THREE_MODES.reward
    terms = reward.terms(x, prompts)
    assert {name: value.tolist() for name, value in terms.items() if name != "quadratic"} == {
        "mode_0": [1.0, 0.0],
        "mode_1": [0.0, 0.0],
        "mode_2": [0.0, 1.0],
    }
    torch.testing.assert_close(reward.total(terms), torch.tensor([-0.8, 0.74]))
    assert list(GAUSSIAN.reward.functions) == ["quadratic"]
    curved = GAUSSIAN.reward.terms(torch.tensor([[0.5]]), prompts)["quadratic"]
    assert curved.tolist() == [-2.25]
    assert THREE_MODES.show(x[0]) == "(-1.400, 0.100)"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: replace(THREE_MODES, slope=(1.0,)), r"slope is \(1.0,\); expected 2"),
        (lambda: replace(THREE_MODES, centre=(1.0,)), "centre is"),
        (lambda: replace(THREE_MODES, curvature=-1.0), "curvature is -1.0"),
        (lambda: replace(THREE_MODES, std=-1.0), "std is -1.0"),
        (lambda: optimum(THREE_MODES, beta=0.0), "beta is 0.0"),
        (lambda: THREE_MODES.read(["left"]), "left"),
        (
            lambda: chain_optimum(THREE_MODES, VP, *steps_of("ddim", 2), beta=1.0),
            "3 components, 2 dimensions",
        ),
    ],
)
def test_what_cannot_be_is_refused(refused, message):
    """With what was got and what was expected."""
    with pytest.raises(ValueError, match=message):
        refused()
