from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gaussians import (
    GaussianBase,
    GaussianTask,
    gaussian_path,
    gaussian_policy,
    gaussian_run,
    gaussian_world,
)
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.models.value import ValueCritic
from rescore.processes.gaussian import AffineStep, continuous_kl
from rescore.processes.gaussian_schedules import RectifiedFlow
from rescore.rewards.reward import RewardError
from rescore.sampling.decoder import Decoder, GaussianDecoder
from rescore.sampling.record import Score
from rescore.sampling.rng import SampleRng
from rescore.sampling.values import visited
from rescore.training.directory import Origin
from rescore.training.optim import Optim, TrainingError
from rescore.training.rollout import probe, rollout
from rescore.training.session import Evaluation, evaluate_run, start
from rescore.training.update import update
from rescore.types import Credited, Scored

EULER = GaussianDecoder(steps=5, solver="euler_maruyama")
RANDOM = (
    GaussianDecoder(steps=5),
    EULER,
    GaussianDecoder(steps=5, solver="dpm_solver_2m_sde"),
)


def saa(**changes) -> ScoreAsAction:
    return ScoreAsAction(**{"beta": 0.3, "critic_epochs": 1, **changes})


def world_of(decoder=EULER, task=None, theta=(0.2, -0.1), precision="float64", **changes):
    """A policy that differs from its reference, which is exact; one rollout was already seen."""
    run = gaussian_run(
        algorithm=saa(**changes),
        decoder=decoder,
        task=task or GaussianTask(),
        batch_size=64,
        optim=Optim(lr=0.02, warmup=2, micro_batch=4096, epochs=1),
        precision=precision,
    )
    run.check()
    world = gaussian_world(run)
    if theta != (0.0, 0.0):
        with torch.no_grad():
            for parameter, value in zip(world.module.parameters(), theta, strict=True):
                parameter.fill_(value)
    return world


def scored_and_credited(world) -> tuple[Scored, Credited]:
    first, _ = rollout(world, 0)
    algorithm = world.run.algorithm
    algorithm.fit(world.models, algorithm.credit(first))
    scored, _ = rollout(world, 1)
    return scored, algorithm.credit(scored)


def critic_of(world) -> ValueCritic:
    assert isinstance(world.models.critic, ValueCritic)
    return world.models.critic


def step_kls(world, path) -> Tensor:
    """Exact KL of every step, asked of the two policies directly."""
    columns, sample = [], torch.arange(len(path.x_0))
    for k in range(path.n_steps):
        step = torch.full((len(path.x_0),), k)
        with torch.no_grad():
            new, ref = (
                policy.transition(path.around(sample, step), step, Score())
                for policy in (world.models.new, world.models.ref)
            )
        columns.append(new.kl(ref))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("decoder", RANDOM, ids=str)
def test_increments_telescope_to_the_return_less_the_first_value(decoder):
    """sum_k A_k = r - V_0 - beta sum_k KL_k, with the KL of the steps as the policies tell it."""
    world = world_of(decoder)
    scored, credited = scored_and_credited(world)
    path = gaussian_path(scored.trajectory)
    kl = step_kls(world, path)
    assert kl[:, :-1].min() > 0
    policy, first = gaussian_policy(world.models.new), torch.zeros(len(path.x_0), dtype=torch.long)
    with torch.no_grad():
        skip = torch.zeros(len(first))  # cos_sin judges nothing at t = 1
        x, t, inputs = visited(policy, path, torch.arange(64), first)
        value = critic_of(world).value(x, t, inputs, skip)
    expected = scored.reward - value - 0.3 * kl.sum(1)
    assert credited.step.tolist() == [list(range(5))] * 64
    torch.testing.assert_close(scored.notes["kl"], kl)
    torch.testing.assert_close(credited.advantage.sum(1), expected, atol=1e-5, rtol=1e-5)


def test_a_critic_is_shown_what_its_solver_looks_at():
    """One state, or of two-step solvers that before it too; time 0 after the last step."""
    sample, step = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 5])
    for solver in ("ddim", "dpm_solver_2m_sde"):
        world = world_of(GaussianDecoder(steps=5, solver=solver))
        scored, _ = scored_and_credited(world)
        path, policy = gaussian_path(scored.trajectory), gaussian_policy(world.models.new)
        x, t, _ = visited(policy, path, sample, step)
        expected = [path.path[[0, 1, 2], [0, 3, 5]], path.path[[0, 1, 2], [0, 2, 4]]]
        assert torch.equal(x, torch.cat(expected[: 1 + (solver != "ddim")], 1))
        assert torch.equal(t, torch.stack([policy.times[0], policy.times[3], torch.zeros(())]))


@pytest.mark.parametrize("form", ["ppo", "score_gradient"])
@pytest.mark.parametrize("design", ["cos_sin", "plain"])
def test_with_a_constant_reward_only_the_kl_pulls(form, design):
    """With r = 3 and a critic that knows it, at the reference nothing changes."""
    task = GaussianTask(functions={"three": lambda x, given: 3 + 0 * x.sum(1)})
    world = world_of(task=task, theta=(0.0, 0.0), form=form, design=design)
    critic = critic_of(world)
    out = critic.body.get_submodule("out")
    assert isinstance(out, torch.nn.Linear)
    torch.nn.init.zeros_(out.weight)
    critic.level.fill_(3.0)
    critic.fitted.fill_(1)
    if design == "cos_sin":  # c_skip + c_out is 1 at the ends only
        world.run = replace(world.run, algorithm=saa(form=form, design="linear"))
        critic.design = "linear"
    scored, _ = rollout(world, 0)
    credited = world.run.algorithm.credit(scored)
    update_gradient = gradient(world, credited)
    assert credited.pairs().numel() > 0
    assert max(g.abs().max().item() for g in update_gradient) < 1e-6


def gradient(world, credited, pairs=None) -> list[Tensor]:
    """Of the weighted loss, by parameter."""
    actions = credited.actions(credited.pairs() if pairs is None else pairs)
    rng = SampleRng(0, actions.trajectory.prompts.sample_id)
    terms = world.run.algorithm.loss(world.models, actions, rng)
    parameters = list(world.module.parameters())
    return list(torch.autograd.grad((terms.loss * actions.weight).sum(), parameters))


def test_a_constant_added_to_the_reward_changes_no_advantage():
    def advantages(extra: float) -> Tensor:
        task = GaussianTask(functions={"level": lambda x, given: x.mean(1) + extra})
        return scored_and_credited(world_of(task=task, design="plain"))[1].advantage

    torch.testing.assert_close(advantages(5.0), advantages(0.0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_targets_are_lambda_returns_with_the_running_cost(td_lambda):
    world = world_of(td_lambda=td_lambda)
    scored, _ = scored_and_credited(world)
    kl, advantage = scored.notes["kl"], scored.notes["advantage"]
    # V_k = r - beta sum KL - sum of the increments from k on
    value = scored.reward[:, None] - (advantage + 0.3 * kl).flip(1).cumsum(1).flip(1)
    value = torch.cat([value, scored.reward[:, None]], 1)
    for k in range(5):
        expected, weight = torch.zeros(64, dtype=torch.float64), 1.0
        for j in range(k, 5):
            share = 1.0 if j == 4 else 1 - td_lambda
            cost = 0.3 * kl[:, k : j + 1].sum(1)
            expected = expected + weight * share * (value[:, j + 1] - cost)
            weight *= td_lambda
        torch.testing.assert_close(
            scored.notes["target"][:, k], expected, atol=1e-5, rtol=1e-5, check_dtype=False
        )


def test_whitening_divides_the_kl_too():
    plain = scored_and_credited(world_of(whitening="none"))[1]
    whole = scored_and_credited(world_of(whitening="global"))[1]
    each = scored_and_credited(world_of(whitening="per_step"))[1]
    a = plain.advantage
    std = (a - a.mean()).square().mean().sqrt()
    torch.testing.assert_close(whole.advantage, (a - a.mean()) / std)
    torch.testing.assert_close(whole.notes["scale"], std.expand_as(a))
    torch.testing.assert_close(
        each.advantage, (a - a.mean(0)) / a.std(0, unbiased=False), atol=1e-9, rtol=1e-6
    )
    assert torch.equal(plain.notes["scale"], torch.ones_like(a))
    only_kl = replace(whole, advantage=torch.zeros_like(a))
    world = world_of(whitening="global")
    scaled = gradient(world, only_kl)
    bare = gradient(world, replace(plain, advantage=torch.zeros_like(a)))
    for one, other in zip(scaled, bare, strict=True):
        torch.testing.assert_close(one * std, other)


def test_where_no_advantage_varies_the_kl_keeps_its_weight():
    world = world_of(whitening="per_step")
    scored, _ = scored_and_credited(world)
    advantage = scored.notes["advantage"].clone()
    advantage[:, 2] = 7.0
    flat = replace(scored, notes={**scored.notes, "advantage": advantage})
    credited = world.run.algorithm.credit(flat)
    assert (credited.notes["scale"][:, 2] == 1).all() and (credited.advantage[:, 2] == 0).all()


def test_steps_without_noise_are_neither_trained_nor_whitened():
    world = world_of(GaussianDecoder(steps=5), whitening="per_step")
    _, credited = scored_and_credited(world)
    assert (credited.weight[:, :4] == 1 / 64).all() and (credited.weight[:, 4] == 0).all()


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"kl": "continuous"}, 5),
        ({"beta": 0.0}, 5),
        ({}, 4),
        ({"beta": 0.0, "proximal": 0.1}, 4),
        ({"beta": 0.0, "beta_end": 0.1}, 4),
    ],
    ids=str,
)
def test_a_step_without_noise_is_trained_unless_it_should_cost_and_cannot(options, trained):
    """It has no KL, so that with beta it would earn without paying."""
    world = world_of(GaussianDecoder(steps=5), form="score_gradient", **options)
    weight = scored_and_credited(world)[1].weight
    assert (weight[:, :trained] == 1 / 64).all() and (weight[:, trained:] == 0).all()


@pytest.mark.parametrize("form", ["ppo", "score_gradient"])
def test_some_steps_at_random_count_for_all(form):
    world = world_of(GaussianDecoder(steps=5), form=form, n_steps=2)
    whole = world_of(GaussianDecoder(steps=5), form=form)
    few, all_of_them = scored_and_credited(world)[1], None
    assert few.step.shape == (64, 2) and set(few.step.flatten().tolist()) == {0, 1, 2, 3}
    assert (few.step[:, 0] != few.step[:, 1]).all()
    torch.testing.assert_close(few.weight, torch.full_like(few.weight, 4 / 2 / 64))
    critic_of(whole).restore(critic_of(world).saved())
    all_of_them = whole.run.algorithm.credit(rollout(whole, 1)[0])
    rows = torch.arange(64)[:, None]
    again = world.run.algorithm.credit(rollout(world, 1)[0])
    for name in set(again.notes) & {"advantage", "target", "kl", "skip", "old", "slope"}:
        expected = all_of_them.notes[name][rows, again.step]
        torch.testing.assert_close(again.notes[name], expected, atol=1e-6, rtol=1e-5)


def test_as_many_steps_as_there_are_is_all_of_them():
    """DDIM's last step draws no noise: four of five count, each once."""
    _, credited = scored_and_credited(world_of(GaussianDecoder(steps=5), n_steps=5))
    assert (credited.weight.sort(1).values == torch.tensor([0, 1, 1, 1, 1]) / 64).all()


@pytest.mark.parametrize("decoder", RANDOM, ids=str)
@pytest.mark.parametrize("form", ["ppo", "score_gradient"])
@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-9), ("float32", 5e-5)])
def test_the_ratio_starts_at_1_and_several_steps_make_one_forward(decoder, form, precision, bound):
    world = world_of(decoder, form=form, proximal=0.5, design="plain", precision=precision)
    _, credited = scored_and_credited(world)
    assert probe(world, credited) == pytest.approx(0, abs=1e-3 * bound)
    together = gradient(world, credited)
    apart = [torch.zeros_like(g) for g in together]
    for column in range(5):
        pairs = credited.pairs()
        pairs = pairs[pairs[:, 1] == column]
        if len(pairs):
            apart = [a + g for a, g in zip(apart, gradient(world, credited, pairs), strict=True)]
    for one, other in zip(together, apart, strict=True):
        assert one.dtype == getattr(torch, precision)
        torch.testing.assert_close(one, other, rtol=bound, atol=1e-3 * bound)


def test_the_score_gradient_is_that_of_the_value_of_the_next_state():
    """Against autograd through E[V(x_{k+1}) - beta KL_k] with the noise held."""
    world = world_of(form="score_gradient", design="plain")
    scored, credited = scored_and_credited(world)
    path, policy = gaussian_path(scored.trajectory), gaussian_policy(world.models.new)
    critic, steps = critic_of(world), policy.steps
    total = torch.zeros((), dtype=torch.float64)
    sample = torch.arange(64)
    for k in range(5):
        step = torch.full((64,), k)
        new = policy.transition(path.around(sample, step), step, Score())
        moved = steps.on_x[k] * path.state(step) + steps.on_a[k] * new.at.a
        noise = path.state(step + 1) - moved.detach()
        t = torch.full((64,), float(policy.times[k + 1] if k < 4 else 0.0))
        value = critic.value(moved + noise, t, {}, None)
        with torch.no_grad():
            ref = gaussian_policy(world.models.ref).transition(
                path.around(sample, step), step, Score()
            )
        total = total + (value.double() - 0.3 * new.kl(ref)).sum() / 64
    expected = torch.autograd.grad(total, list(world.module.parameters()))
    for one, other in zip(gradient(world, credited), expected, strict=True):
        torch.testing.assert_close(-one, other, rtol=1e-5, atol=1e-7)


def test_the_continuous_weighting_is_the_integral_of_g2_times_score_and_slope():
    world = world_of(
        form="score_gradient", weighting="continuous", kl="continuous", design="linear", beta=0.0
    )
    scored, credited = scored_and_credited(world)
    path, policy = gaussian_path(scored.trajectory), gaussian_policy(world.models.new)
    times, schedule = policy.times, policy.network.schedule
    area = schedule.g2_integral(times[1:], times[:-1])
    score = policy.network.predict  # the network predicts the score
    total = torch.zeros((), dtype=torch.float64)
    for k in range(5):
        x = path.path[:, k]
        slope = credited.notes["slope"][:, k]
        total = total + (area[k] * (score(x, times[k].expand(64), {}) * slope).sum(1)).mean()
    expected = torch.autograd.grad(total, list(world.module.parameters()))
    for one, other in zip(gradient(world, credited), expected, strict=True):
        torch.testing.assert_close(-one, other)


def test_the_slope_is_that_of_the_value_through_what_the_state_stands_for():
    """By central differences of c_skip r(hat x_0(x)) + c_out F(x)."""
    world = world_of(form="score_gradient", weighting="continuous", design="linear", beta=0.0)
    scored, _ = scored_and_credited(world)
    path, policy, critic = (
        gaussian_path(scored.trajectory),
        gaussian_policy(world.models.new),
        critic_of(world),
    )
    k, schedule = 2, policy.network.schedule
    t = policy.times[k].expand(64)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]

    def value(x: Tensor) -> Tensor:
        hat = (x + sigma**2 * policy.network.predict(x, t, {})) / alpha
        return critic.value(x, t, {}, hat.mean(1))

    step = torch.tensor([[1e-2, 0.0]])
    with torch.no_grad():
        x = path.path[:, k]
        numeric = (value(x + step) - value(x - step)) / 2e-2
    slope = scored.notes["slope"][:, k, 0]
    torch.testing.assert_close(slope, numeric.to(slope), atol=2e-3, rtol=2e-3)


def test_the_continuous_kl_is_girsanovs():
    world = world_of(kl="continuous")
    scored, _ = scored_and_credited(world)
    path, policy = gaussian_path(scored.trajectory), gaussian_policy(world.models.new)
    ref = gaussian_policy(world.models.ref)
    for k in range(5):
        t, x = policy.times[k].expand(64), path.path[:, k]
        expected = continuous_kl(
            policy.network.schedule,
            t,
            policy.times[k + 1].expand(64),
            policy.network.predict(x, t, {}),
            ref.network.predict(x, t, {}),
            prediction="score",
        )
        torch.testing.assert_close(scored.notes["kl"][:, k], expected)
    assert not torch.allclose(scored.notes["kl"], step_kls(world, path), rtol=0.01)


def test_the_first_rollouts_are_the_critics():
    world = world_of(critic_rollouts=2)
    algorithm = world.run.algorithm
    for expected in (0, 0, 64 * 5):
        scored, _ = rollout(world, 0)
        credited = algorithm.credit(scored)
        assert len(credited.pairs()) == expected
        algorithm.fit(world.models, credited)


def test_a_plain_critic_is_told_the_end_too():
    world = world_of(design="plain", critic_epochs=60, critic_lr=5e-3)
    scored, credited = scored_and_credited(world)
    world.run.algorithm.fit(world.models, credited)
    path = gaussian_path(scored.trajectory)
    with torch.no_grad():
        value = critic_of(world).value(path.x_0, torch.zeros(64), {}, None)
    assert torch.corrcoef(torch.stack([value.double(), scored.reward.double()]))[0, 1] > 0.95


@pytest.mark.parametrize(
    ("decoder", "changes"),
    [
        (EULER, {}),
        (EULER, {"form": "score_gradient"}),
        (
            GaussianDecoder(steps=5, solver="dpm_solver_2m_sde"),
            {"design": "plain", "critic_epochs": 8},
        ),
        (
            GaussianDecoder(steps=5, solver="heun"),
            {"form": "score_gradient", "weighting": "continuous", "kl": "continuous"},
        ),
        (
            GaussianDecoder(steps=5, solver="dpm_solver_2m"),
            {"form": "score_gradient", "kl": "continuous"},
        ),
    ],
    ids=lambda value: str(value),
)
def test_reward_rises(decoder, changes):
    world = world_of(decoder, theta=(0.0, 0.0), **{"beta": 0.02, **changes})
    rewards = []
    for step in range(25):
        scored, _ = rollout(world, step)
        credited = world.run.algorithm.credit(scored)
        world.run.algorithm.fit(world.models, credited)
        update(world, credited, step)
        rewards.append(scored.reward.mean().item())
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.15


def test_labels_reach_network_and_critic():
    world = world_of(task=GaussianTask(labels=3), design="linear")
    scored, credited = scored_and_credited(world)
    assert critic_of(world).body.get_submodule("given.maps.label") is not None
    assert gradient(world, credited)[0].isfinite().all()
    assert scored.notes["skip"].shape == (64, 5)


def test_a_run_resumes_to_the_same_bits(tmp_path):
    def run(out, steps, resume=False):
        described = gaussian_run(algorithm=saa(), decoder=EULER, steps=steps, save_every=2)
        start(described, Origin(recipe="here", arguments=()), out, resume=resume)

    run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    run(tmp_path / "parts", 4, resume=True)
    for name in ("model", "critic", "optimizer"):
        files = [
            tmp_path / where / f"checkpoints/00000004/{name}.safetensors"
            for where in ("whole", "parts")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("decoder", "changes", "message"),
    [
        (Decoder(steps=3), {}, "continuous samples; got a Decoder"),
        (
            GaussianDecoder(steps=5, solver="heun"),
            {},
            "heun draws no noise.*form='score_gradient'",
        ),
        (EULER, {"beta": -0.1}, "beta=-0.1 must be 0 or more"),
        (EULER, {"proximal": -1.0}, "proximal=-1.0 must be 0 or more"),
        (EULER, {"clip_low": 0.0}, "clip_low=0.0; expected more than 0 and at most 1"),
        (EULER, {"clip_low": 1.5}, "clip_low=1.5; expected more than 0 and at most 1"),
        (EULER, {"critic_lr": math.inf}, "critic_lr=inf must be positive, and finite"),
        (EULER, {"critic_epochs": 0}, "critic_epochs=0 must be at least 1"),
        (EULER, {"td_lambda": 1.5}, r"td_lambda=1.5 must lie in \[0, 1\]"),
        (EULER, {"n_steps": 6}, "n_steps=6, but paths have 5 steps"),
        (
            GaussianDecoder(steps=5, solver="ddim_ode"),
            {"form": "score_gradient"},
            "ddim_ode have no KL; use kl='continuous'",
        ),
        (
            GaussianDecoder(steps=5, solver="flow_match_stochastic"),
            {"kl": "continuous"},
            "solves no equation",
        ),
        (
            GaussianDecoder(steps=5, solver="heun"),
            {"form": "score_gradient", "kl": "continuous"},
            "a state in between; use weighting='continuous'",
        ),
        (
            EULER,
            {"form": "score_gradient", "weighting": "continuous"},
            "no KL of steps; use kl='continuous'",
        ),
    ],
)
def test_what_cannot_work_is_refused(decoder, changes, message):
    with pytest.raises(ValueError, match=message):
        saa(**changes).check(decoder, 4, ("reward",))


def test_a_run_that_would_train_its_critic_alone_is_refused():
    with pytest.raises(ValueError, match="steps=4, but the first 4 of them train a critic"):
        gaussian_run(algorithm=saa(critic_rollouts=4), steps=4).check()
    gaussian_run(algorithm=saa(critic_rollouts=3), steps=4).check()


def test_a_black_box_reward_is_refused_where_it_must_be_differentiated():
    task = GaussianTask(functions={"box": lambda x, given: x.mean(1).tolist()})
    world = world_of(task=task, form="score_gradient")
    with pytest.raises(ValueError, match="a black box.*design='plain'"):
        rollout(world, 0)
    rollout(world_of(task=task, form="score_gradient", design="plain"), 0)


GRADIENT = {"form": "score_gradient", "weighting": "continuous", "design": "plain"}


@pytest.mark.parametrize(
    ("changes", "asked", "instead"),
    [
        ({"kl": "continuous"}, "kl='continuous'", "kl='step'"),
        ({**GRADIENT, "beta": 0.0}, "weighting='continuous'", "weighting='solver'"),
        (
            {**GRADIENT, "beta": 0.0, "proximal": 0.1, "kl": "continuous"},
            "kl='continuous' and weighting='continuous'",
            "kl='step' and weighting='solver'",
        ),
    ],
)
def test_infinite_g2_is_refused_before_the_first_rollout(changes, asked, instead):
    """A rectified flow from t = 1; below it, and where no rate is looked at, it serves."""
    run = gaussian_run(
        algorithm=saa(**changes),
        decoder=GaussianDecoder(steps=5),
        base=GaussianBase(schedule=RectifiedFlow(), prediction="flow"),
    )
    message = f"action: {asked} needs.*RectifiedFlow is infinite at t=1.*t_max.*or use {instead}$"
    with pytest.raises(ValueError, match=message):
        gaussian_world(run)
    gaussian_world(replace(run, decoder=GaussianDecoder(steps=5, t_max=0.95)))
    gaussian_world(replace(run, base=GaussianBase()))
    gaussian_world(replace(run, algorithm=saa(weighting="continuous")))
    gaussian_world(replace(run, algorithm=saa(kl="continuous", beta=0.0)))


def test_a_start_that_a_loss_refuses_serves_evaluation(tmp_path):
    run = gaussian_run(
        algorithm=saa(kl="continuous"),
        decoder=GaussianDecoder(steps=5, t_max=0.95),
        base=GaussianBase(schedule=RectifiedFlow(), prediction="flow"),
        steps=2,
    )
    start(run, Origin(recipe="here", arguments=()), tmp_path, resume=False)
    rewards = []
    for t_max in (0.95, 1.0):
        options = Evaluation(
            decoder=GaussianDecoder(steps=5, t_max=t_max), seed=0, device="cpu", precision="float64"
        )
        rewards.append(evaluate_run(run, tmp_path, options)["metrics"]["reward"]["mean"])
    assert rewards[0] != rewards[1]


def test_beta_and_eta_follow_their_schedules_in_rollouts_only():
    run = gaussian_run(
        algorithm=saa(beta=0.4, beta_end=0.0),
        decoder=replace(EULER, eta_end=0.5),
        steps=5,
    )
    world = gaussian_world(run)
    whole = gaussian_policy(world.models.new)
    for step, beta, eta in ((0, 0.4, 1.0), (2, 0.2, 0.75), (4, 0.0, 0.5)):
        with world.at(step):
            algorithm, policy = world.run.algorithm, gaussian_policy(world.models.new)
            assert isinstance(algorithm, ScoreAsAction) and algorithm.beta == pytest.approx(beta)
            assert isinstance(policy.steps, AffineStep) and isinstance(whole.steps, AffineStep)
            torch.testing.assert_close(policy.steps.std, eta * whole.steps.std)
            assert gaussian_policy(world.models.ref).decoder == policy.decoder
            assert policy.network is whole.network
            assert probe(world, scored_and_credited(world)[1]) == pytest.approx(0, abs=1e-12)
        assert world.models.new is whole and world.run is run


def test_a_last_step_without_noise_is_not_trained_even_when_beta_has_reached_0():
    """Or the last rollout would open the hole that all others kept shut."""
    run = gaussian_run(algorithm=saa(form="score_gradient", beta=0.4, beta_end=0.0), steps=3)
    world = gaussian_world(run)
    scored_and_credited(world)
    for step in (1, 2):
        with world.at(step):
            _, credited = scored_and_credited(world)
        assert (credited.weight[:, :-1] > 0).all() and (credited.weight[:, -1] == 0).all()


@pytest.mark.parametrize("decoder", [GaussianDecoder(steps=1), GaussianDecoder(steps=3)], ids=str)
def test_a_reward_is_never_asked_about_nothing(decoder):
    """cos_sin judges no state at t = 1: alone in a forward, that is nothing to judge."""
    sizes = []

    def first(x, given):
        sizes.append(len(x))
        return x[:, 0]

    task = GaussianTask(functions={"first": first})
    run = gaussian_run(
        task=task,
        algorithm=saa(form="score_gradient", beta=0.0),
        decoder=decoder,
        forward_rows=1,
        batch_size=4,
        group_size=1,
    )
    rollout(gaussian_world(run), 0)
    assert sizes and min(sizes) > 0


def test_slopes_are_made_for_the_drawn_steps_only():
    """Rows of the network: the path, and one for each slope; T of them would be 5."""
    world = world_of(GaussianDecoder(steps=5), form="score_gradient", n_steps=2, beta=0.0)
    before = world.network_rows()
    rollout(world, 0)
    assert world.network_rows() - before == 64 * (5 + 2)


@pytest.mark.parametrize("eta_end", [0.0, -1.0])
def test_eta_must_not_end_without_noise(eta_end):
    with pytest.raises(ValueError, match="eta_end"):
        replace(EULER, eta_end=eta_end)


@pytest.mark.parametrize("changes", [{}, {"form": "score_gradient", "weighting": "continuous"}])
def test_a_window_goes_with_steps_only(changes):
    algorithm = saa(**{"kl": "continuous", **changes})
    with pytest.raises(ValueError, match="outside the window"):
        algorithm.check(GaussianDecoder(steps=5, window=(1, 3)), 4, ("reward",))


def test_a_run_with_a_schedule_keeps_its_length(tmp_path):
    run = gaussian_run(algorithm=saa(beta_end=0.0), decoder=EULER, steps=2, save_every=2)
    start(run, Origin(recipe="here", arguments=()), tmp_path / "run", resume=False)
    longer = replace(run, steps=4)
    with pytest.raises(ValueError, match="steps: 2 in the run, 4 now"):
        start(longer, Origin(recipe="here", arguments=()), tmp_path / "run", resume=True)


def test_samples_that_are_not_finite_stop_the_run_before_the_reward_is_blamed():
    world = world_of()
    with torch.no_grad():
        next(iter(world.module.parameters())).fill_(torch.nan)
    with pytest.raises(TrainingError, match="samples that are not finite"):
        rollout(world, 3)


def test_a_reward_that_fails_on_the_way_is_a_reward_error():
    def picky(x, given):
        if len(x) != 64:  # states on the way come in other numbers
            raise OSError("no")
        return x.mean(1)

    world = world_of(task=GaussianTask(functions={"picky": picky}))
    with pytest.raises(RewardError, match="picky"):
        rollout(world, 0)
