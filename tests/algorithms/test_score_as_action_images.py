"""Score as Action on a tiny Stable Diffusion of random weights, with adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gaussians import gaussian_path, gaussian_policy
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.models.images import ImageNetwork
from rescore.models.value import ValueCritic, value_critic_for
from rescore.processes.convert import Prediction
from rescore.processes.gaussian_schedules import GaussianSchedule
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.sampling.values import path_slopes, visited
from rescore.tasks.image_prompts import ImagePrompts
from rescore.training.optim import Optim
from rescore.training.pretrained_images import PretrainedPipeline
from rescore.training.recipes import run_of
from rescore.training.rollout import rollout
from rescore.training.world import World
from rescore.training.world import build as training_world
from rescore.types import Conditions, Given

pytest.importorskip("diffusers")

STEPS = 4
DECODER = GaussianDecoder(steps=STEPS)


def brightness(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> tuple[PretrainedPipeline, ImagePrompts]:
    base = PretrainedPipeline(kind="sd15", weights="none", guidance=2.0, dtype="float32")
    task = ImagePrompts(source=("a cat", "two owls"), judges={"brightness": brightness})
    folder = tmp_path_factory.mktemp("sd15") / "weights"
    return base.in_miniature(task, folder, seed=1, device="cpu")


def world_of(
    miniature: tuple[PretrainedPipeline, ImagePrompts],
    decoder: GaussianDecoder = DECODER,
    **changes: Any,
) -> World:
    """A policy with adapters that are not those of the start, and no KL beside its loss."""
    base, task = miniature
    run = dataclasses.replace(
        run_of("sd15_score_as_action"),
        **{"base": base, "task": task, "device": "cpu", "precision": "float32"},
        **{"batch_size": 8, "group_size": 4, "optim": Optim()},
        decoder=decoder,
        algorithm=ScoreAsAction(beta=0.0, **changes),
    )
    run.check()
    network = base.build(task, seed=0, cache=Path(), device="cpu", note=print)
    world = training_world(run, network, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in world.module.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return world


class Latents(nn.Module):
    """A network of latents that are samples themselves, so that rewards can be differentiated."""

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network
        self.schedule: GaussianSchedule = network.schedule
        self.prediction: Prediction = network.prediction
        self.shape = network.shape

    def predict(self, x_t: Tensor, t: Tensor, inputs: Mapping[str, Tensor], /) -> Tensor:
        return self.network.predict(x_t, t, inputs)


def waves(latents: Tensor, prompts: Given) -> Tensor:
    """Not linear, and differentiable."""
    return latents.sin().flatten(1).sum(1)


def test_the_slope_through_the_unet_points_where_that_with_the_output_held_does(miniature):
    """Of V = r(hat x_0), in float64: the whole is what central differences say along it, and a
    weak UNet turns it little; at the data end, where the UNet has no say, both are equal."""
    world = world_of(miniature)
    network = world.module.double()
    assert isinstance(network, ImageNetwork)
    policy = GaussianPolicy(Latents(network), DECODER)
    prompts = world.run.task.prompts("train", torch.tensor([0, 1, 0]))
    assert isinstance(prompts, Conditions)
    rng = SampleRng(3, prompts.sample_id)
    path = gaussian_path(policy.sample(prompts, Record(moves="all", outputs=True), rng))
    critic = value_critic_for(
        policy.network.shape, prompts.inputs, n_labels=2, design="constant", reward=waves, seed=0
    )
    out = critic.body.get_submodule("out")
    assert isinstance(out, nn.Linear)
    nn.init.zeros_(out.weight)
    step = torch.arange(STEPS).expand(3, -1)
    whole, held = (
        path_slopes(policy, critic, path, step, after=True, through_network=through)
        for through in (True, False)
    )
    assert whole.shape == held.shape == (3, STEPS, *policy.network.shape)
    assert whole.isfinite().all() and held.isfinite().all()
    cosine = torch.cosine_similarity(whole.flatten(2), held.flatten(2), dim=2)
    assert cosine.min() > 0.98
    assert (whole - held).flatten(2).norm(dim=2)[:, :-1].min() > 1e-3 * held[0, 0].norm()
    assert torch.equal(whole[:, -1], held[:, -1])

    t, schedule = policy.times[1].expand(3), policy.network.schedule
    alpha, sigma = (of(t)[:, None, None, None] for of in (schedule.alpha, schedule.sigma))

    def value(x: Tensor) -> Tensor:
        eps = policy.network.predict(x, t, path.prompts.inputs)
        return waves((x - sigma * eps) / alpha, path.prompts)

    length = whole[:, 0].flatten(1).norm(dim=1)
    by = 1e-4 * whole[:, 0] / length[:, None, None, None]
    with torch.no_grad():
        numeric = (value(path.path[:, 1] + by) - value(path.path[:, 1] - by)) / 2e-4
    torch.testing.assert_close(length, numeric, rtol=1e-4, atol=0)


def test_at_the_data_end_the_value_is_the_reward_of_the_decoded_latents(miniature):
    """To the bit after a fit, by decoder and judge of the run; a step earlier it is not."""
    world = world_of(miniature, design="cos_sin", critic_lr=0.1)
    scored, _ = rollout(world, 0)
    world.run.algorithm.fit(world.models, world.run.algorithm.credit(scored))
    path, policy = gaussian_path(scored.trajectory), gaussian_policy(world.models.new)
    critic, sample = world.models.critic, torch.arange(8)
    assert isinstance(critic, ValueCritic) and critic.reward is not None
    with torch.no_grad():
        skip = critic.reward(policy.finished(path.x_0), path.prompts)
        for step in (STEPS - 1, STEPS):
            value = critic.value(*visited(policy, path, sample, torch.full((8,), step)), skip)
            assert torch.equal(value, scored.reward.float()) == (step == STEPS)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m_sde"])
@pytest.mark.parametrize(("form", "design"), [("ppo", "cos_sin"), ("score_gradient", "plain")])
def test_every_adapter_learns_and_several_steps_make_one_forward(miniature, form, design, solver):
    """Both matrices of each, nothing else of the pipeline; to float32 the sum over the steps."""
    decoder = GaussianDecoder(steps=STEPS, solver=solver)
    world = world_of(miniature, decoder, form=form, design=design)
    algorithm = world.run.algorithm
    algorithm.fit(world.models, algorithm.credit(rollout(world, 0)[0]))
    credited = algorithm.credit(rollout(world, 1)[0])
    pairs, adapters = credited.pairs(), [p for p in world.module.parameters() if p.requires_grad]
    assert len(adapters) == 64  # A and B of four layers of eight attentions

    def gradient(pairs: Tensor) -> tuple[Tensor, ...]:
        actions = credited.actions(pairs)
        rng = SampleRng(0, actions.trajectory.prompts.sample_id)
        loss = algorithm.loss(world.models, actions, rng).loss
        return torch.autograd.grad((actions.weight * loss).sum(), adapters)

    each = [gradient(pairs[pairs[:, 1] == column]) for column in range(STEPS)]
    for together, *apart in zip(gradient(pairs), *each, strict=True):
        assert together.isfinite().all() and together.abs().max() > 0
        assert (together - sum(apart)).norm() <= 5e-5 * together.norm()


def test_a_reward_behind_the_decoder_of_latents_has_no_slope(miniature):
    world = world_of(miniature, form="score_gradient", design="linear")
    with pytest.raises(ValueError, match="a decoder in between.*design='plain'"):
        rollout(world, 0)
