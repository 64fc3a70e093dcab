"""Networks of text-to-image pipelines do what diffusers does, on tiny random weights."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from rescore.models.finetune import Lora, add_lora, reference
from rescore.models.gaussian_network import Decodes, GaussianNetwork
from rescore.models.images import (
    ATTENTION,
    PIPELINES,
    ImageNetwork,
    Kind,
    Texts,
    entry_of,
    load_image_network,
    schedule_of,
)
from rescore.processes import gaussian
from rescore.processes.gaussian import AffineStep, DeterministicStep
from rescore.processes.gaussian_schedules import DiscreteTable
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.types import Conditions

diffusers = pytest.importorskip("diffusers")

from rescore.models.miniature_images import (  # noqa: E402
    CHANNELS,
    SD_TABLE,
    SIDE,
    write_tiny_pipeline,
)

TEXTS = ("a cat", "a Red horse", "the sea in winter")
KINDS = get_args(Kind)
GUIDANCE = 3.0
T5 = 12
SHIFT = 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: write_tiny_pipeline(root / kind, kind, seed=3, texts=TEXTS) for kind in KINDS}


def load(folder: Path, kind: Kind, **changes: Any) -> ImageNetwork:
    settings: dict[str, Any] = {
        "shape": (CHANNELS[kind], SIDE, SIDE),
        "text": TEXTS.__getitem__,
        "guidance": GUIDANCE,
        "dtype": "float32",
        "text_tokens": T5 if kind in ("sd3", "flux") else None,
    }
    return load_image_network(kind, str(folder), **{**settings, **changes})


@pytest.fixture(scope="module")
def networks(folders: dict[Kind, Path]) -> dict[Kind, ImageNetwork]:
    return {kind: load(folders[kind], kind) for kind in KINDS}


def prompts(n: int = 3) -> Conditions:
    number = torch.arange(n) % len(TEXTS)
    row = torch.arange(n)
    return Conditions(group=row, sample_id=row, info={}, inputs={"prompt": number})


def states(network: ImageNetwork, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *network.shape, generator=torch.Generator().manual_seed(seed))


def drawn(network: ImageNetwork, decoder: GaussianDecoder, n: int = 3):
    policy = GaussianPolicy(network, decoder)
    given = prompts(n)
    rng = SampleRng(7, given.sample_id)
    return policy, policy.sample(given, Record(moves="all", outputs=True), rng)


# ---- against diffusers ---------------------------------------------------------------------------

STEPS = 4
DECODERS: dict[Kind, GaussianDecoder] = {
    "sd15": GaussianDecoder(steps=STEPS, solver="ddim_ode", spacing="leading", offset=1),
    "sdxl": GaussianDecoder(steps=STEPS, solver="ddim_ode", spacing="trailing"),
    "sd3": GaussianDecoder(steps=STEPS, solver="ddim_ode", shift=SHIFT),
    "flux": GaussianDecoder(steps=STEPS, solver="ddim_ode"),
}


def of_the_pipeline(network: ImageNetwork, kind: Kind, noise: Tensor, form: str) -> Tensor:
    """What the pipeline itself makes of the noise; it knows no batches of different texts less."""
    pipeline = network.pipeline
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "latents": noise,
        "output_type": form,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "height": network.pixels[0],
        "width": network.pixels[1],
    }
    if kind in ("sd15", "sdxl"):
        spacing = DECODERS[kind].spacing
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing=spacing
        )
    else:
        settings["sigmas"] = torch.linspace(1, 1 / STEPS, STEPS).tolist()
        settings["max_sequence_length"] = T5
    if kind == "flux":
        settings["latents"] = pipeline._pack_latents(noise, *noise.shape)
    images = pipeline(list(TEXTS), **settings).images
    if kind == "flux" and form == "latent":
        images = pipeline._unpack_latents(images, *network.pixels, pipeline.vae_scale_factor)
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_the_deterministic_chain_is_the_pipelines_own(networks, kind):
    """Prompts, guidance, times, sizes, packing, decoding: the same noise gives the same images."""
    network, decoder = networks[kind], DECODERS[kind]
    if kind == "flux":  # its shift follows from the number of patches, 16
        shift = math.exp(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256))
        decoder = GaussianDecoder(steps=STEPS, solver="ddim_ode", shift=shift)
    policy, paths = drawn(network, decoder)
    latents = of_the_pipeline(network, kind, paths.path[:, 0], "latent")
    torch.testing.assert_close(paths.x_0, latents, rtol=0, atol=2e-5 * float(latents.abs().max()))
    images = of_the_pipeline(network, kind, paths.path[:, 0], "pt")
    ours = policy.finished(paths.x_0)
    assert ours.dtype == torch.float32 and ours.shape == (3, 3, *network.pixels)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-4)


class Widened:
    """torch, but for float32, which is float64."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == theirs.dtype == dtype
    size = max(1.0, float(theirs.abs().max()))
    atol = (1e-5 if dtype == torch.float32 else 1e-10) * size
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("leading", 0), ("trailing", 0)])
def test_every_step_of_the_policy_is_ddims(networks, prediction, to_one, spacing, offset, dtype):
    """Times and steps with eta = 1 from the policy's states with its outputs, the last included."""
    network = copy.deepcopy(networks["sd15"]).to(dtype)
    config = {**SD_TABLE, "prediction_type": prediction, "set_alpha_to_one": to_one}
    network.schedule, network.prediction = schedule_of({**config, "_class_name": "DDIMScheduler"})
    scheduler = diffusers.DDIMScheduler.from_config(
        config, timestep_spacing=spacing, steps_offset=offset
    )
    assert not scheduler.config.clip_sample
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(dtype)
    scheduler.set_timesteps(5)
    policy, paths = drawn(
        network, GaussianDecoder(steps=5, solver="ddim", spacing=spacing, offset=offset)
    )
    assert torch.equal(
        entry_of(network.schedule, policy.times[:-1].float()), scheduler.timesteps.float()
    )
    for k, n in enumerate(scheduler.timesteps):
        with torch.no_grad():
            at = policy.at(paths, torch.full((3,), k))
        assert isinstance(at.step, AffineStep)
        z = states(network, 3, seed=k).to(dtype)
        theirs = scheduler.step(
            at.a.to(dtype), int(n), at.x_t, eta=1.0, variance_noise=z
        ).prev_sample
        close(gaussian.draw(at.step, at.x_t, at.a, z), theirs, dtype)
    at_the_first_entry = (spacing, offset) == ("leading", 0)  # which is as clean as time 0 then
    assert bool(paths.random[:, -1].all()) == (not to_one and not at_the_first_entry)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_every_step_of_the_policy_is_that_of_flow_matching(networks, kind, dtype, monkeypatch):
    """Times and steps of the ordinary equation, from the policy's states with its outputs."""
    if dtype == torch.float64:  # the scheduler computes in float32 whatever it is given
        name = "diffusers.schedulers.scheduling_flow_match_euler_discrete"
        monkeypatch.setattr(importlib.import_module(name), "torch", Widened())
    network = copy.deepcopy(networks[kind]).to(dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.2, 5).tolist())
    policy, paths = drawn(network, GaussianDecoder(steps=5, solver="ddim_ode", shift=SHIFT))
    torch.testing.assert_close(policy.times.float(), scheduler.sigmas.float(), rtol=0, atol=1e-6)
    scheduler.sigmas = policy.times  # whose rounding to float32 would show
    for k in range(5):
        with torch.no_grad():
            at = policy.at(paths, torch.full((3,), k))
        assert isinstance(at.step, DeterministicStep)
        theirs = scheduler.step(at.a.to(dtype), scheduler.timesteps[k], at.x_t).prev_sample
        close(gaussian.mean(at.step, at.x_t, at.a), theirs, dtype)


# ---- what the network says -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_guidance_is_between_the_output_for_the_prompt_and_for_none(folders, networks, kind):
    """u + w (c - u); for SDXL "none" is zeros, for the others the empty text."""
    plain = load(folders[kind], kind, guidance=1.0, text=(*TEXTS, "").__getitem__)
    x_t, t = states(plain, 3), torch.tensor([0.9, 0.5, 0.101])
    given, none = torch.arange(3), torch.full((3,), 3)
    with torch.no_grad():
        told, _ = (plain.predict(x_t, t, {"prompt": number}) for number in (given, none))
        if kind == "sdxl":
            zeros = (torch.zeros_like(part) for part in plain._frozen.texts._known[""])
            plain._frozen.texts._known[""] = tuple(zeros)
        without = plain.predict(x_t, t, {"prompt": none})
        guided = networks[kind].predict(x_t, t, {"prompt": given})
    assert float((told - without).abs().max()) > 1e-3
    torch.testing.assert_close(guided, without + GUIDANCE * (told - without))


def test_the_guidance_of_flux_is_an_input(folders, networks):
    """It changes the output, of one row for each sample; a network that is not told it refuses."""
    x_t, t = states(networks["flux"], 2), torch.tensor([0.9, 0.3])
    other = load(folders["flux"], "flux", guidance=9.0)
    with torch.no_grad():
        here, there = (
            n.predict(x_t, t, {"prompt": torch.tensor([0, 1])}) for n in (networks["flux"], other)
        )
    assert float((here - there).abs().max()) > 1e-4
    pipeline = other.pipeline
    pipeline.transformer.register_to_config(guidance_embeds=False)
    with pytest.raises(ValueError, match="set it to 1"):
        type(other)(pipeline, other.network, shape=other.shape, text=str, guidance=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(networks, kind):
    """Of texts, times and states, whichever are in the batch."""
    network = networks[kind]
    x_t, t, number = states(network, 3), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([2, 0, 2])
    with torch.no_grad():
        whole = network.predict(x_t, t, {"prompt": number})
        alone = [
            network.predict(x_t[i : i + 1], t[i : i + 1], {"prompt": number[i : i + 1]})
            for i in range(3)
        ]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert float((whole[0] - whole[2]).abs().max()) > 1e-3


def test_texts_are_encoded_once_and_the_oldest_are_forgotten():
    """Every different text of a call is encoded alone; what is used stays."""
    asked: list[str | None] = []

    def encode(text: str | None) -> tuple[Tensor, ...]:
        asked.append(text)
        return (torch.full((2,), float(len(text or ""))),)

    texts = Texts(encode, limit=3 * 8)

    def rows(*names: str | None) -> list[float]:
        (table,) = texts(names, torch.device("cpu"), torch.float64)
        assert table.dtype == torch.float64
        return table[:, 0].tolist()

    assert rows("a", "bb", "a", None) == [1, 2, 1, 0]
    assert asked == ["a", "bb", None]
    assert rows("a") == [1] and rows("cccc") == [4]  # the oldest now is "bb"
    assert rows("a", None, "cccc") == [1, 0, 4] and len(asked) == 4
    assert rows("bb", "a") == [2, 1] and asked[4:] == ["bb", "a"]
    assert rows("1", "22", "333", "4444", "55555") == [1, 2, 3, 4, 5]  # more than may be kept


def test_times_between_entries_are_fractions_of_a_timestep():
    schedule = DiscreteTable(torch.linspace(0.99, 0.01, 1000))
    times = torch.tensor([1.0, 0.5, 0.0005, 0.50025])
    torch.testing.assert_close(entry_of(schedule, times), torch.tensor([999.0, 499.0, 0.0, 499.25]))


# ---- adapters, types, memory ---------------------------------------------------------------------


def adapted(network: ImageNetwork) -> ImageNetwork:
    """With adapters that change the output, on the denoising network only."""
    generator = torch.Generator().manual_seed(5)
    add_lora(network, Lora(rank=2, alpha=6, targets=ATTENTION), generator=generator)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_sit_on_the_denoiser_alone_and_all_of_them_learn(folders, networks, kind):
    """The reference is the network as it was, with the same guidance; every adapter has a gradient,
    with and without checkpoints the same."""
    x_t, t, inputs = states(networks[kind], 2), torch.tensor([0.9, 0.4]), prompts(2).inputs
    gradients = []
    checkpointed = load(folders[kind], kind, gradient_checkpointing=True)
    for network in (adapted(copy.deepcopy(networks[kind])), adapted(checkpointed)):
        frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
        assert frozen and not any(".lora_" in name for name in frozen)
        assert all(".lora_" in n for n, p in network.named_parameters() if p.requires_grad)
        output = network.predict(x_t, t, inputs)
        output.square().sum().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.requires_grad})
        with torch.no_grad():
            view = reference(network)
            assert isinstance(view, GaussianNetwork) and isinstance(view, Decodes)
            before = view.predict(x_t, t, inputs)
            torch.testing.assert_close(before, networks[kind].predict(x_t, t, inputs))
            assert torch.equal(view.decode(x_t), network.decode(x_t))
        assert float((before - output.detach()).abs().max()) > 1e-3
    parts = [p for p in checkpointed.pipeline.components.values() if isinstance(p, nn.Module)]
    assert checkpointed.network in parts and checkpointed.pipeline.vae.use_slicing
    assert getattr(checkpointed.network, "is_gradient_checkpointing") is True  # noqa: B009
    others = [part for part in parts if part is not checkpointed.network]
    assert len(others) >= 2
    for name, parameter in (pair for part in others for pair in part.named_parameters()):
        assert ".lora_" not in name and not parameter.requires_grad
    once, twice = gradients
    assert all(g is not None and float(g.abs().max()) > 0 for g in once.values())
    torch.testing.assert_close(once, twice)


def test_a_reference_without_adapters_is_a_copy_that_shares_what_never_trains(networks):
    network = copy.deepcopy(networks["sd15"])
    before = reference(network)
    assert isinstance(before, ImageNetwork)
    assert before.pipeline is network.pipeline
    x_t, t, inputs = states(network, 2), torch.tensor([0.9, 0.4]), prompts(2).inputs
    with torch.no_grad():
        was = network.predict(x_t, t, inputs)
        for parameter in network.parameters():
            parameter.mul_(1.5)
        assert float((network.predict(x_t, t, inputs) - was).abs().max()) > 1e-3
        torch.testing.assert_close(before.predict(x_t, t, inputs), was)


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_sixteen_bits_of_weights_and_32_of_likelihood(folders, kind):
    """States, outputs, log-probabilities and images are float32; a replay agrees with a record."""
    network = adapted(load(folders[kind], kind, dtype="bfloat16"))
    plain = {p.dtype for n, p in network.named_parameters() if ".lora_" not in n}
    assert plain == {torch.bfloat16} and network.pipeline.vae.dtype == torch.float32
    decoder = GaussianDecoder(steps=3, solver="ddim", t_max=0.9)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            policy, paths = drawn(network, decoder)
            again = policy.transition(paths, torch.full((3,), 1), Score()).log_prob
        assert paths.x_0.dtype == torch.float32
        assert paths.log_prob.dtype == again.dtype == torch.float64
        assert paths.output is not None and paths.output.dtype == torch.float32
        torch.testing.assert_close(again, paths.log_prob[:, 1], rtol=1e-4, atol=1e-2)
        assert policy.finished(paths.x_0).dtype == torch.float32
    with torch.no_grad():
        said = network.predict(paths.x_0, torch.full((3,), 0.5), paths.prompts.inputs)
    assert said.dtype == torch.float32


def test_latents_that_are_not_finite_are_named(networks):
    x_0 = states(networks["sd15"], 3)
    x_0[1, 2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"1 of 3 samples are not finite \(rows \[1\]\)"):
        networks["sd15"].decode(x_0)
    x_0[1] *= 1e3
    images = networks["sd15"].decode(1e3 * states(networks["sd15"], 2))
    assert float(images.min()) >= 0 and float(images.max()) <= 1


# ---- noise ---------------------------------------------------------------------------------------

REFUSED = {
    "another noise": ({"_class_name": "EDMEulerScheduler"}, "neither a table"),
    "an older way": ({"_class_name": "LCMScheduler"}, "neither a table"),
    "clipping": ({"_class_name": "DDIMScheduler", "clip_sample": True}, "not affine"),
    "clipping by default": ({"_class_name": "DDPMScheduler"}, "not affine"),
    "thresholds": (
        {"_class_name": "DPMSolverMultistepScheduler", "thresholding": True},
        "not affine",
    ),
    "a flow in a table": (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "noise of a flow",
    ),
    "noise as a timestep": (
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        "told the noise",
    ),
    "an unknown form": (
        {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "flow"},
        "prediction_type is 'flow'",
    ),
    "time upside down": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        "from data to noise",
    ),
    "no class": ({}, "a None cannot be replayed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_scheduler_that_cannot_be_replayed_is_refused(case):
    config, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        schedule_of(config)


def test_the_table_is_that_of_the_checkpoint(folders):
    """SD 1.5's published numbers: alpha^2 ends at 0.00466, and time 0 is the first entry."""
    for kind in ("sd15", "sdxl"):
        config = json.loads((folders[kind] / "scheduler/scheduler_config.json").read_text())
        schedule, prediction = schedule_of(config)
        assert isinstance(schedule, DiscreteTable) and prediction == "eps"
        assert len(schedule.alphas_cumprod) == 1000
        assert float(schedule.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)
        assert schedule.final == float(schedule.alphas_cumprod[0]) == pytest.approx(0.99915)


def test_what_a_configuration_leaves_out_is_as_in_its_class():
    """Heun's table is not DDIM's: its betas go from 0.00085 to 0.012, evenly."""
    schedule, prediction = schedule_of({"_class_name": "HeunDiscreteScheduler"})
    assert isinstance(schedule, DiscreteTable) and prediction == "eps"
    survival = (1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(schedule.alphas_cumprod.double(), survival, rtol=1e-5, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="it is there")
def test_a_package_that_a_scheduler_needs_is_named():
    with pytest.raises(ValueError, match="torchsde"):
        schedule_of({"_class_name": "DPMSolverSDEScheduler"})


def test_miniatures_are_of_the_published_classes_and_layout(folders):
    for kind, folder in folders.items():
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == PIPELINES[kind]
        assert (folder / "tokenizer" / "merges.txt").exists()
        assert not list(folder.rglob("*.bin"))
    file = "unet/diffusion_pytorch_model.safetensors"
    for seed, same in ((3, True), (4, False)):
        folder, before = folders["sd15"].parent / f"again-{seed}", torch.rand(1)
        again = write_tiny_pipeline(folder, "sd15", seed=seed, texts=TEXTS)
        assert ((again / file).read_bytes() == (folders["sd15"] / file).read_bytes()) == same
        assert torch.rand(1) != before
