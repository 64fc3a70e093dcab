"""Score as Action on mixtures, held against the optimum: the settings T11 and T12 of the paper's
specification here. J = E[r] - beta KL of whole paths, exact for every step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import pytest
import torch

from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.evaluation.path_kl import path_kl
from rescore.processes.gaussian import AffineStep
from rescore.processes.gaussian_schedules import VariancePreserving
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.mixture import GAUSSIAN, Mixture, chain_optimum, optimum
from rescore.training.rollout import rollout
from rescore.training.run import Run
from rescore.training.session import build_base
from rescore.training.update import update
from rescore.training.world import World, accelerator_for, as_network, build, policy_with
from rescore_recipes.mixture import gaussian_score_as_action, mixture_score_as_action

Form = Literal["ppo", "score_gradient"]


class Outcome(NamedTuple):
    """Of a policy, on paths of a number of steps."""

    objective: float
    error: float
    """Standard error of J."""
    mean: float
    """Of the first coordinate."""
    modes: list[float]
    """Share of the samples in each mode."""


def made_of(run: Run, seed: int, form: Form) -> World:
    """A world with the form of the loss."""
    assert isinstance(run.algorithm, ScoreAsAction)
    run = replace(run, seed=seed, algorithm=replace(run.algorithm, form=form))
    accelerator = accelerator_for(run)
    return build(run, build_base(run, accelerator, lambda line: None), accelerator)


def train(world: World, first: int, after_last: int) -> None:
    """Rollouts and updates as in the loop."""
    for step in range(first, after_last):
        credited = world.run.algorithm.credit(rollout(world, step)[0])
        world.run.algorithm.fit(world.models, credited)
        update(world, credited, step)


@torch.no_grad()
def outcome(world: World, n_steps: int, n: int) -> Outcome:
    """Judge the present policy on n paths of as many steps."""
    run = replace(world.run, decoder=replace(world.run.decoder, steps=n_steps), forward_rows=n)
    base = as_network(build_base(run, world.accelerator, lambda line: None), run)
    reference, policy = policy_with(base, run), policy_with(as_network(world.module, run), run)
    assert isinstance(reference, GaussianPolicy) and isinstance(run.task, Mixture)
    assert isinstance(run.algorithm, ScoreAsAction)
    index = torch.arange(n)
    prompts = run.task.prompts("test", index)
    path = policy.sample(prompts, Record(moves="all", outputs=True), SampleRng(77, index))
    terms = run.task.reward.terms(path.x_0, prompts)
    j = (terms["quadratic"] - run.algorithm.beta * path_kl(reference, path)).double()
    return Outcome(
        objective=float(j.mean()),
        error=float(j.std()) / n**0.5,
        mean=float(path.x_0[:, 0].mean()),
        modes=[float(value.mean()) for name, value in terms.items() if name.startswith("mode")],
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ppo", "score_gradient"])
def test_one_gaussian_reaches_the_optimum_of_its_chain(form):
    """T11: J at 40 steps within 0.02 of the best there is at 40 steps, the mean within 0.05.

    At 400 steps, which it has not seen, the figures are printed.
    """
    world = made_of(gaussian_score_as_action(), 0, form)
    train(world, 0, world.run.steps)
    schedule, decoder = VariancePreserving(), world.run.decoder
    assert isinstance(decoder, GaussianDecoder)
    for n_steps, n in ((40, 30_000), (400, 3_000)):
        longer = replace(decoder, steps=n_steps)
        step, t = longer.solve(schedule, "score"), longer.times(schedule)[:-1]
        assert isinstance(step, AffineStep)
        best = chain_optimum(GAUSSIAN, schedule, step, t, beta=0.5)
        got = outcome(world, n_steps, n)
        print(f"{form}, {n_steps} steps: {got}; the best is {best}")
        if n_steps == 40:
            assert abs(got.objective - best.objective) < 0.02
            assert abs(got.mean - best.mean) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ppo", "score_gradient"])
@pytest.mark.parametrize("seed", [0, 1])
def test_three_modes_are_weighted_as_in_the_optimum(seed, form):
    """T12: J at 25 steps is 0.25 or more after 150 rollouts; modes within 0.10 after 300."""
    world = made_of(mixture_score_as_action(), seed, form)
    train(world, 0, 150)
    half = outcome(world, 25, 40_000)
    print(f"seed {seed}, {form}, after 150: {half}")
    assert half.objective >= 0.25
    train(world, 150, 300)
    end = outcome(world, 25, 40_000)
    print(f"seed {seed}, {form}, after 300: {end}")
    assert isinstance(world.run.task, Mixture)
    best = optimum(world.run.task, beta=1.0).mixture.weights
    assert max(abs(a - b) for a, b in zip(end.modes, best, strict=True)) < 0.10
