"""The convolutional DNA networks keep the promises of their protocols; DRAKES' layout loads."""

import dataclasses
import math
import pickle
import sys
from typing import Any, Literal

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from rescore.models.convert_checkpoint import convert_checkpoint, main
from rescore.models.denoiser import Denoiser, ScoreNetwork
from rescore.models.dna import ConvConfig, Convolution
from rescore.models.importers import DRAKES_DILATIONS, load_drakes
from rescore.processes.ctmc import Uniform

V, L, B = 4, 23, 3
Process = Literal["absorbing", "uniform"]
PROCESSES = ("absorbing", "uniform")
NOISE = torch.tensor([0.05, 0.7, 3.0], dtype=torch.float64)


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for users: the functions' own messages come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def build(process: Process = "absorbing", seed=0, spread=True) -> Any:
    """A float64 model; ``spread`` draws its vectors too and scales the head up."""
    config = ConvConfig(length=L, width=8, dilations=(1, 4), stacks=2, kernel=5, process=process)
    model: Any = config.network(torch.Generator().manual_seed(seed)).double()
    if spread:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(
                        torch.randn(parameter.shape, generator=generator).double(), alpha=0.3
                    )
            model.final_conv[2].weight.mul_(50)
    return model


def canvas(n_states=V, seed=1):
    return torch.randint(n_states, (B, L), generator=torch.Generator().manual_seed(seed))


def answer(model, x_t, attend=None):
    """Logits or log-scores."""
    if isinstance(model, Denoiser):
        return model.predict(x_t, attend=attend)
    return model.log_score(x_t, NOISE.to(model.linear.weight.dtype)[: len(x_t)], attend=attend)


def test_each_process_makes_its_kind_of_network():
    """Masked: a denoiser of V columns; uniform: a score network of V states."""
    denoiser, score = build("absorbing"), build("uniform")
    assert isinstance(denoiser, Denoiser)
    assert not isinstance(denoiser, ScoreNetwork)
    assert (denoiser.vocab_size, denoiser.mask_id) == (V, V)
    assert denoiser.predict(canvas(V + 1)).shape == (B, L, V)
    assert isinstance(score, ScoreNetwork)
    assert not isinstance(score, Denoiser)
    assert score.process == Uniform(V)
    assert score.log_score(canvas(), NOISE).shape == (B, L, V)


@pytest.mark.parametrize(("dilation", "kernel"), [(1, 9), (4, 9), (64, 9), (3, 1)])
def test_the_convolution_is_torchs_on_the_usual_order_of_axes(dilation, kernel):
    """Values and gradients, also where the outer taps lie beyond both ends."""
    ours = Convolution(6, 5, kernel, dilation=dilation).double()
    theirs = nn.Conv1d(6, 5, kernel, dilation=dilation, padding="same").double()
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, L, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    y = x.detach().transpose(1, 2).requires_grad_()
    out, expected = ours(x), theirs(y).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad.transpose(1, 2))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_position_sees_as_far_as_the_dilations_reach(process):
    """Radius: 2 for the first layer and 2 x dilation for every other; no further."""
    config = dataclasses.replace(build(process).config, dilations=(1, 3), stacks=1)
    assert config.layers() == (1, 3)
    model = config.network(torch.Generator().manual_seed(0)).double()
    x_t = canvas()
    changed = x_t.clone()
    changed[:, 11] = (x_t[:, 11] + 1) % V
    moved = (answer(model, changed) - answer(model, x_t)).abs().amax((0, 2)) > 0
    reach = 2 + 2 * 1 + 2 * 3
    assert moved.nonzero().flatten().tolist() == list(range(11 - reach, 11 + reach + 1))


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("end", ["right", "left"])
def test_padding_influences_no_other_position(process, end):
    """Rows of real tokens are the same whatever the padding holds, and as if it were not there."""
    model, x_t = build(process), canvas()
    lengths = torch.tensor([L, 9, 4])[:, None]
    attend = torch.arange(L)[None] < lengths
    if end == "left":
        attend = attend.flip(1)
    padded = answer(model, x_t, attend)
    again = answer(model, torch.where(attend, x_t, (x_t + 1) % V), attend)
    assert torch.equal(again[attend], padded[attend])
    for row in range(B):
        real = attend[row]
        alone = x_t[row : row + 1, real].expand(B, -1)
        torch.testing.assert_close(padded[row, real], answer(model, alone)[row])


def test_rows_asked_for_are_the_rows_of_the_full_prediction():
    """predict(positions) equals gathering from predict(), and only they reach the head."""
    model, x_t = build(), canvas(V + 1)
    positions = torch.tensor([[6, 0, 22, 3], [1, 2, 5, 4], [0, 6, 0, 1]])
    expected = model.predict(x_t)[torch.arange(B)[:, None], positions]
    seen = []
    model.final_conv.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    torch.testing.assert_close(model.predict(x_t, positions=positions), expected)
    assert seen == [4]


def test_the_score_of_staying_is_one():
    """The entry at the token itself is exactly 0, and it alone in general."""
    x_t = canvas()
    log_score = build("uniform").log_score(x_t, NOISE)
    own = F.one_hot(x_t, V).bool()
    assert bool((log_score[own] == 0).all())
    assert bool((log_score[~own] != 0).all())


def test_the_score_is_the_ratio_of_the_noised_law():
    """e^-n q + (1 - e^-n) / V, by hand from the head's softmax."""
    model, x_t = build("uniform"), canvas()
    heads = []
    model.final_conv.register_forward_hook(lambda _m, _a, out: heads.append(out))
    score = model.log_score(x_t, NOISE).exp()
    keep = (-NOISE).exp()[:, None, None]
    noised = keep * heads[0].softmax(-1) + (1 - keep) / V
    own = noised.gather(-1, x_t[..., None])
    torch.testing.assert_close(score, noised / own)


def test_scores_lie_between_the_bounds_of_uniform_noise():
    """k and 1 / k, k = (1 - e^-n) / (1 - e^-n + V e^-n), however sure the head is; never NaN."""
    model, x_t = build("uniform"), canvas()
    with torch.no_grad():
        model.final_conv[2].weight.mul_(1e4)
    noise = torch.tensor([1e-6, 1e-2, 60.0], dtype=torch.float64)
    log_score = model.log_score(x_t, noise)
    k = 1 - (-noise).exp()
    bound = -(k / (k + V * (-noise).exp())).log()
    assert bool((log_score.abs().amax((1, 2)) <= bound * (1 + 1e-9) + 1e-12).all())
    assert log_score[0].abs().max() > 0.9 * bound[0]
    log_score.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_network_itself_is_told_the_noise():
    """Another noise for sample 1 changes the head's law of sample 1, and of no other."""
    model, x_t = build("uniform"), canvas()
    heads = []
    model.final_conv.register_forward_hook(lambda _m, _a, out: heads.append(out))
    other = NOISE.clone()
    other[1] = 0.75
    model.log_score(x_t, NOISE)
    model.log_score(x_t, other)
    assert torch.equal(heads[0][[0, 2]], heads[1][[0, 2]])
    assert (heads[0][1] - heads[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_all_parameters_get_a_gradient(process):
    """Nothing in the network is unused."""
    model = build(process)
    (answer(model, canvas(model.n_states)) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("process", PROCESSES)
def test_initial_weights_are_a_function_of_the_generator_alone(process):
    """Same seed, same bits; another seed, other weights; the global generator is not touched."""
    rng = torch.get_rng_state()
    first = build(process, seed=3, spread=False).state_dict()
    torch.rand(5)
    second = build(process, seed=3, spread=False).state_dict()
    other = build(process, seed=4, spread=False).state_dict()
    torch.set_rng_state(rng)
    build(process)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, other[name]) is (value.ndim == 1 and "frequency" not in name)


@pytest.mark.parametrize("process", PROCESSES)
def test_initial_predictions_are_near_uniform_but_not_equal(process):
    """Before training every token has nearly the same probability."""
    outcome = answer(build(process, spread=False), canvas())
    probs = outcome.softmax(-1)
    assert 0 < (probs * V - 1).abs().max() < 1 / 3


@pytest.mark.parametrize("process", PROCESSES)
def test_float32_and_bf16_autocast_agree_with_float64(process):
    """The same network in each precision, to that precision."""
    exact, single = build(process), build(process).float()
    x_t = canvas()
    expected = answer(exact, x_t)
    scale = expected.abs().max().item()
    float32 = answer(single, x_t)
    assert (float32.dtype, expected.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(float32.double(), expected, rtol=0, atol=1e-5 * scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = answer(single, x_t)
    assert half.dtype == (torch.bfloat16 if process == "absorbing" else torch.float32)
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.05 * scale)


WIDTH, STACKS = 6, 2


def drakes_weights(seed=0, width=WIDTH, stacks=STACKS):
    """Random weights under the names of the published model."""
    generator = torch.Generator().manual_seed(seed)
    n_layers = stacks * len(DRAKES_DILATIONS)
    modules = {
        "linear": (width, V + 1, 9),
        "time_embedder.1": (width, width),
        "final_conv.0": (width, width, 1),
        "final_conv.2": (V + 1, width, 1),
    }
    for layer in range(n_layers):
        modules[f"convs.{layer}"] = (width, width, 9)
        modules[f"time_layers.{layer}.dense"] = (width, width)
        modules[f"norms.{layer}"] = (width,)
    weights = {"time_embedder.0.W": 30 * torch.randn(width // 2, generator=generator)}
    for name, shape in modules.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator)
        weights[f"{name}.bias"] = torch.randn(shape[:1], generator=generator)
    return weights


def drakes_reference(weights, x_t, t):
    """The published forward pass, written out once more from its description; 0 dropout."""
    weights = {name: weight.double() for name, weight in weights.items()}

    def part(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    angle = 2 * math.pi * t[:, None] * weights["time_embedder.0.W"]
    time = F.linear(torch.cat([angle.sin(), angle.cos()], -1), *part("time_embedder.1")).relu()
    h = F.one_hot(x_t, V + 1).double().transpose(1, 2)
    h = F.conv1d(h, *part("linear"), padding=4).relu()
    dilations = [d for d in (1, 1, 4, 16, 64) for _ in range(STACKS)]
    for i, d in enumerate(dilations):
        y = h + F.linear(time, *part(f"time_layers.{i}.dense"))[:, :, None]
        y = F.layer_norm(y.transpose(1, 2), (WIDTH,), *part(f"norms.{i}")).transpose(1, 2)
        h = h + F.conv1d(y, *part(f"convs.{i}"), padding=4 * d, dilation=d).relu()
    y = F.conv1d(h, *part("final_conv.0")).relu()
    return F.conv1d(y, *part("final_conv.2")).transpose(1, 2)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_checkpoint_in_the_published_layout_computes_the_published_function(tmp_path, prefix):
    """Time 0 folded into the shifts, the mask's column dropped: log-softmax over ACGT agrees."""
    weights = drakes_weights()
    stored = {f"{prefix}{name}": weight for name, weight in weights.items()}
    if prefix:
        stored["valid_metrics.total"] = torch.zeros(1)
    save_file(stored, tmp_path / "drakes.safetensors")
    model = load_drakes(tmp_path / "drakes.safetensors", length=L)
    assert model.config == ConvConfig(length=L, width=WIDTH, stacks=STACKS)
    assert all(parameter.requires_grad for parameter in model.parameters())
    x_t = canvas(V + 1)
    expected = drakes_reference(weights, x_t, torch.zeros(B, dtype=torch.float64))[..., :V]
    torch.testing.assert_close(model.double().predict(x_t), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norms.3.bias"), r"'norms.3.bias' has shape none, expected \(6,\)"),
        (lambda w: w.pop("convs.9.weight"), "and a multiple of 5 layers .*and 9"),
        (lambda w: w.pop("linear.weight"), "expected 'linear.weight' of shape .*got none"),
        (
            lambda w: w.update({"linear.weight": torch.zeros(5, WIDTH)}),
            r"expected 'linear.weight' of shape \[width, states, kernel\]",
        ),
        (
            lambda w: w.update({"cls_embedder.weight": torch.zeros(4, WIDTH)}),
            r"'cls_embedder.weight' has shape \(4, 6\), expected none",
        ),
        (
            lambda w: w.update({"convs.0.bias": torch.zeros(WIDTH, dtype=torch.long)}),
            "'convs.0.bias' in .* has dtype torch.int64",
        ),
    ],
)
def test_odd_weights_are_refused_by_name(tmp_path, change, message):
    """Missing, of another kind of model (one told a class), of another shape or type."""
    weights = drakes_weights()
    change(weights)
    save_file(weights, tmp_path / "drakes.safetensors")
    with pytest.raises(ValueError, match=message):
        load_drakes(tmp_path / "drakes.safetensors")


def test_pickles_and_missing_files_are_refused(tmp_path):
    """With the command that converts, or the name of what is not there."""
    with pytest.raises(ValueError, match=r"convert_checkpoint .*a.ckpt .*a.safetensors"):
        load_drakes(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="there is no file"):
        load_drakes(tmp_path / "a.safetensors")


class Trap:
    """An object whose pickle calls a function of ours when it is read without care."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


class Settings:
    """An object of a training program, with a state."""

    def __init__(self):
        self.lr = 3e-4


def lightning(weights, *objects):
    return {
        "epoch": 1,
        "state_dict": {f"backbone.{name}": weight for name, weight in weights.items()},
        "hyper_parameters": {"objects": list(objects)},
        "ema": {"shadow_params": [torch.zeros(3)]},
    }


def test_a_lightning_checkpoint_is_converted_without_running_what_it_holds(tmp_path):
    """Weights arrive bit by bit; a pickle that would create a file does not."""
    weights, trace = drakes_weights(), tmp_path / "trace"
    torch.save(lightning(weights, Settings(), Trap(trace)), tmp_path / "a.ckpt")
    n_tensors = convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert not trace.exists()
    assert n_tensors == len(weights)
    stored = load_file(tmp_path / "a.safetensors")
    assert stored.keys() == {f"backbone.{name}" for name in weights}
    assert all(torch.equal(stored[f"backbone.{n}"], weight) for n, weight in weights.items())
    assert load_drakes(tmp_path / "a.safetensors").config.stacks == STACKS
    torch.load(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]["objects"][1].close()
    assert trace.exists()  # the trap works where nothing guards against it


def test_plain_and_sedd_checkpoints_are_converted(tmp_path):
    """The weights at the top, or under 'model'; tensors that share memory are written apart."""
    tensor = torch.arange(6.0)
    for content in (
        {"a": tensor, "b": tensor[:3], "n": 3},
        {"model": {"a": tensor, "b": tensor[:3]}},
    ):
        torch.save(content, tmp_path / "in.pth")
        target = tmp_path / f"{len(content)}.safetensors"
        assert convert_checkpoint(tmp_path / "in.pth", target) == 2
        assert torch.equal(load_file(target)["b"], tensor[:3])


def test_what_cannot_be_converted_is_refused(tmp_path):
    """No file, no tensors, no checkpoint, a target that exists or has another ending."""
    source, target = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="there is no file"):
        convert_checkpoint(source, target)
    source.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of weights"):
        convert_checkpoint(source, target)
    torch.save({"lr": 3e-4}, source)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        convert_checkpoint(source, target)
    with pytest.raises(ValueError, match=r"must be a new file that ends in .safetensors"):
        convert_checkpoint(source, tmp_path / "a.bin")
    target.touch()
    with pytest.raises(ValueError, match="must be a new file"):
        convert_checkpoint(source, target)


def test_the_command_converts_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    """python -m rescore.models.convert_checkpoint SOURCE TARGET."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    target = str(tmp_path / "a.safetensors")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "a.bin"), target])
    main()
    assert capsys.readouterr().out == f"{target}: 1 tensors\n"
    with pytest.raises(SystemExit, match="error: .* must be a new file"):
        main()


@pytest.mark.usefixtures("unchecked")
def test_bad_noise_is_refused():
    """An integer type, or not one number per sample."""
    model = build("uniform")
    with pytest.raises(TypeError, match="total_noise has dtype torch.int64"):
        model.log_score(canvas(), torch.ones(B, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"has shape \(1,\); expected one number per sample"):
        model.log_score(canvas(), torch.ones(1))


@pytest.mark.parametrize("process", PROCESSES)
def test_bad_canvases_are_refused(process):
    """Too long, or with a token that is no state."""
    model = build(process)
    with pytest.raises(ValueError, match=f"canvas of {L + 1} positions; .* at most {L}"):
        answer(model, torch.zeros(B, L + 1, dtype=torch.long))
    for token in (-1, model.n_states):
        x_t = canvas()
        x_t[1, 2] = token
        with pytest.raises(ValueError, match=f"are 0 to {model.n_states - 1}"):
            answer(model, x_t)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 7}, r"width must be even .* got 7"),
        ({"kernel": 4}, "kernel must be odd, .* got 4"),
        ({"stacks": 0}, "stacks must be at least 1, got 0"),
        ({"dilations": (1, 0)}, r"dilations must be positive numbers, got \(1, 0\)"),
        ({"dilations": ()}, "dilations must be positive numbers"),
        ({"process": "absorb"}, "process is 'absorb'"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    """The message names the field and what it was."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ConvConfig(), **change)
