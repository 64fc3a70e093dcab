"""Runs on text-to-image pipelines, from tiny random weights to files that diffusers reads."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from torch import Tensor

from rescore import cli
from rescore.models import images as images_module
from rescore.models.finetune import Lora, add_lora
from rescore.models.images import ATTENTION, PIPELINES, Kind, denoiser_of
from rescore.sampling.decoder import GaussianDecoder
from rescore.tasks.image_prompts import ImagePrompts
from rescore.tasks.sudoku import Sudoku
from rescore.training.log import read
from rescore.training.optim import Optim, TrainingError
from rescore.training.pretrained_images import PretrainedPipeline
from rescore.training.recipes import run_of
from rescore.training.rollout import probe, rollout
from rescore.training.world import build as training_world
from rescore.types import Conditions, GaussianTrajectory

diffusers = pytest.importorskip("diffusers")

THINGS = ("cat", "dog", "sea", "owl", "ant", "bee")
TEXTS = tuple(f"{size} {thing}" for size in ("big", "small") for thing in THINGS)
RECIPES = [
    "sd15_ddpo",
    "sd3_flow_grpo",
    pytest.param("sd15_score_as_action", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is looked up on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"{step:08d}" / "model.safetensors")


def images(pipeline: Any, **settings: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "an owl", num_inference_steps=2, generator=generator, output_type="pt", height=16, width=16,
        **settings,
    ).images  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_trains_saves_resumes_and_exports(recipe, tmp_path, capsys):
    """At least two rollouts that train, another after a resume, pictures, samples of typed prompts,
    and adapters and a whole pipeline of which diffusers makes the same images."""
    out, exported = tmp_path / "run", tmp_path / "adapter"
    run = run_of(recipe)
    assert isinstance(run.base, PretrainedPipeline) and run.lora is not None
    cli.main(["train", recipe, "--dry-run", "--out", str(out)])
    first = 2 if run.algorithm.uses_critic else 1
    rows = read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, first + 2))
    assert all(row["gradient_norm"] > 0 for row in rows[first - 1 :])
    before, after = weights(out, first), weights(out, first + 1)
    layers = {name.partition(".lora_")[0] for name in before}
    for target in run.lora.targets:
        assert any(layer.endswith(f".{target}") for layer in layers)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (out / "samples" / "after.png").stat().st_size > 0

    cli.main(["train", "--resume", str(out), "--steps", str(first + 2)])
    assert [row["step"] for row in read(out / "metrics.jsonl")] == list(range(1, first + 3))
    capsys.readouterr()
    cli.main(["sample", str(out), "--prompts", "two owls in love", "a cat"])
    said = capsys.readouterr().out
    assert re.match(r"two owls in love\njpeg_kb [.\d]+:\nan image of 16 x 16 pixels", said)
    assert said.endswith(f"pictures: {out / 'samples' / 'sampled.png'}\n")
    picture = torch.from_numpy(imread(out / "samples" / "sampled.png"))
    assert picture.shape[:2] == (66, 132)  # two of 16 x 16, enlarged four times, with frames
    assert not torch.equal(picture[:, :66], picture[:, 66:])

    whole = tmp_path / "whole"
    cli.main(["export", str(out), "--out", str(exported)])
    cli.main(["export", str(out), "--out", str(whole), "--merged"])
    kind = getattr(diffusers, PIPELINES[run.base.kind])
    pipeline = kind.from_pretrained(tmp_path / "run-weights", dtype=torch.float32)
    settings = {"max_sequence_length": 16} if run.base.kind == "sd3" else {}
    pipeline.load_lora_weights(exported)
    assert len(pipeline.get_active_adapters()) == 1
    tuned = images(pipeline, **settings)
    merged = kind.from_pretrained(whole, dtype=torch.float32, use_safetensors=True)
    torch.testing.assert_close(images(merged, **settings), tuned, rtol=0, atol=0.02)  # bfloat16


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The base of a kind in miniature and its task, written once."""
    made: dict[Kind, tuple[PretrainedPipeline, ImagePrompts]] = {}

    def make(kind: Kind) -> tuple[PretrainedPipeline, ImagePrompts]:
        if kind not in made:
            base = PretrainedPipeline(kind=kind, weights="none", guidance=2.0, dtype="float32")
            folder = tmp_path_factory.mktemp(kind) / "weights"
            made[kind] = base.in_miniature(ImagePrompts(source=TEXTS), folder, seed=1, device="cpu")
        return made[kind]

    return make


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m_sde"])
@pytest.mark.parametrize("mistake", ["none", "guidance", "entry", "stored", "prompt"])
def test_the_probe_finds_mistakes_that_are_smaller_than_bfloat16(
    miniature, mistake, solver, monkeypatch
):
    """A guidance that is wrong by 1 percent, a timestep by one of 1000, states that lose digits,
    another prompt; between sampling and training, which looks at other numbers of rows."""
    base, task = miniature("sd15")
    run = dataclasses.replace(
        run_of("sd15_ddpo"),
        **{"base": base, "task": task, "device": "cpu", "optim": Optim(micro_batch=3)},
        **{"batch_size": 10, "group_size": 2, "forward_rows": 4},
        decoder=GaussianDecoder(steps=4, solver=solver, eta=1.0, t_max=0.95),
    )
    assert run.precision == "bfloat16"
    network = build(base, task)
    world = training_world(run, network, Accelerator(cpu=True))
    credited = run.algorithm.credit(rollout(world, 0)[0])
    path = credited.trajectory
    assert isinstance(path, GaussianTrajectory) and isinstance(path.prompts, Conditions)
    if mistake == "guidance":
        network.guidance *= 1.01
    if mistake == "entry":
        right = images_module.entry_of
        monkeypatch.setattr(images_module, "entry_of", lambda table, t: right(table, t) - 1)
    if mistake == "stored":
        path = dataclasses.replace(path, path=path.path.bfloat16().float())
    if mistake == "prompt":
        number = path.prompts.inputs["prompt"].roll(2)
        prompts = dataclasses.replace(path.prompts, inputs={"prompt": number})
        path = dataclasses.replace(path, prompts=prompts)
    weight = path.acts().to(credited.weight)
    credited = dataclasses.replace(credited, trajectory=path, weight=weight)
    if mistake == "none":
        gap = probe(world, credited)
        assert gap is not None and gap <= 1e-5
    else:
        with pytest.raises(TrainingError, match="replayed log-probabilities differ"):
            probe(world, credited)


def build(base: PretrainedPipeline, task: ImagePrompts):
    base.check(task, "cpu")
    return base.build(task, seed=0, cache=Path(), device="cpu", note=print)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_diffusers_computes_with_exported_adapters_what_we_do(miniature, kind, tmp_path):
    """Also where alpha is not the rank; merged weights too, from a new process's point of view."""
    base, task = miniature(kind)
    network, lora = build(base, task), Lora(rank=2, alpha=7, targets=ATTENTION)
    generator = torch.Generator().manual_seed(5)
    add_lora(network, lora, generator=generator)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=generator)
    x_t = torch.randn(2, *task.latents, generator=generator)
    t, inputs = torch.tensor([0.8, 0.3]), {"prompt": torch.tensor([4, 1])}

    def says(network: Any) -> Tensor:
        with torch.no_grad():
            return network.predict(x_t, t, inputs)

    ours = says(network)
    base.export(network, tmp_path / "lora", task, lora)
    fresh = build(base, task)
    assert float((says(fresh) - ours).abs().max()) > 1e-2
    fresh.pipeline.load_lora_weights(tmp_path / "lora")
    assert fresh.network is denoiser_of(fresh.pipeline, kind)
    torch.testing.assert_close(says(fresh), ours, rtol=1e-4, atol=1e-5)

    base.export(network, tmp_path / "whole", task, None)
    moved = dataclasses.replace(base, weights=str(tmp_path / "whole"))
    torch.testing.assert_close(says(build(moved, task)), ours, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="choose a new folder"):
        base.export(network, tmp_path / "whole", task, None)


def test_a_checkpoint_that_does_not_fit_is_refused(miniature, tmp_path):
    base, task = miniature("sd15")

    def refused(match: str, base: PretrainedPipeline = base, task: Any = task) -> None:
        with pytest.raises(ValueError, match=match):
            base.check(task, "cpu")

    base.check(task, "cpu")
    refused("use ImagePrompts", task=Sudoku(pool=8))
    refused("text_device='gpu' is no device", dataclasses.replace(base, text_device="gpu"))
    refused("expects a FluxPipeline", dataclasses.replace(base, kind="flux"))
    refused("there is no folder", dataclasses.replace(base, weights=str(tmp_path / "nothing")))
    refused("cannot be had from the hub", dataclasses.replace(base, weights="nobody/nothing-here"))
    refused("has no model_index.json", dataclasses.replace(base, weights=str(tmp_path)))
    refused("multiples of 2", task=dataclasses.replace(task, latents=(4, 8, 7)))
    refused("takes 4 channels", task=dataclasses.replace(task, latents=(16, 8, 8)))
    small, large = miniature("sd3"), (16, 32, 8)
    refused("at most 16 rows", small[0], dataclasses.replace(small[1], latents=large))
    refused("takes 16 channels", miniature("flux")[0])

    copy = tmp_path / "copy"
    shutil.copytree(base.weights, copy)
    other = dataclasses.replace(base, weights=str(copy))
    edited(copy / "unet/config.json", time_cond_proj_dim=256)
    refused("distilled", other)
    edited(copy / "scheduler/scheduler_config.json", clip_sample=True)
    refused("clip_sample=True", other)
    (copy / "scheduler/scheduler_config.json").write_text("{")
    refused("is not JSON", other)


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_weights_come_from_safetensors_only(miniature, tmp_path):
    """A folder with pickles in their place is refused when it is loaded."""
    base, task = miniature("sd15")
    copy = tmp_path / "copy"
    shutil.copytree(base.weights, copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ValueError, match="cannot be loaded as a StableDiffusionPipeline"):
        build(dataclasses.replace(base, weights=str(copy)), task)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("wrong", ["missing", "cut", "another shape"])
def test_a_damaged_file_is_named(miniature, tmp_path, part, wrong):
    """Its folder, and the weight that it lacks: none is drawn in its place."""
    base, task = miniature("sd15")
    copy = tmp_path / "copy"
    shutil.copytree(base.weights, copy)
    (file,) = (copy / part).glob("*.safetensors")
    state = load_file(file)
    key = next(name for name in sorted(state) if name.endswith("norm1.weight"))
    if wrong == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(1, 2, 3)
    save_file(state, file, metadata={"format": "pt"})
    if wrong == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    expected = rf"folder {part} lacks 1 weights, of them '{key}'" if wrong == "missing" else ""
    with pytest.raises(ValueError, match=f"cannot be loaded as.*{expected}") as caught:
        build(dataclasses.replace(base, weights=str(copy)), task)
    named = key if wrong == "another shape" and part != "text_encoder" else part
    assert named in str(caught.value)


def test_settings_that_cannot_be_trained_are_refused(miniature, tmp_path):
    base, task = miniature("sd15")
    far = dataclasses.replace(base, text_device="cuda")
    small = far.in_miniature(task, Path(base.weights), seed=0, device="cpu")[0]
    assert small.text_device is None
    with pytest.raises(ValueError, match="guidance must be finite"):
        dataclasses.replace(base, guidance=0.5)
    narrow = dataclasses.replace(base, dtype="bfloat16")
    with pytest.raises(ValueError, match="loses small updates"):
        narrow.check_training(adapters=False, precision="bfloat16")
    narrow.check_training(adapters=True, precision="bfloat16")
    base.check_training(adapters=False, precision="bfloat16")
    other = dataclasses.replace(base, kind="sdxl")
    with pytest.raises(ValueError, match="another pipeline"):
        other.in_miniature(ImagePrompts(source=TEXTS), Path(base.weights), seed=0, device="cpu")
    with pytest.raises(ValueError, match="no prompts for a text-to-image model"):
        base.in_miniature(Sudoku(pool=8), tmp_path, seed=0, device="cpu")
