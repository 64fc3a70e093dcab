"""SEDD keeps the promises of the ScoreNetwork protocol and computes what its checkpoints mean."""

import dataclasses
import json
import math
import shutil
from typing import Literal

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rescore.models.denoiser import Denoiser, ScoreNetwork
from rescore.models.finetune import Lora, add_lora
from rescore.models.importers import load_sedd
from rescore.models.inputs import check_tokens
from rescore.models.miniature_sedd import HEADS, WIDTH, write_tiny_sedd
from rescore.models.sedd import Sedd, SeddConfig, log_expm1
from rescore.processes.ctmc import Absorbing, Uniform

V, L, B = 5, 7, 3


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for users: the functions' own messages come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PROCESSES = ("absorbing", "uniform")


def build(process: Literal["absorbing", "uniform"] = "absorbing", seed=0, spread=True):
    """A float64 model; ``spread`` also draws the weights that start at zero."""
    config = SeddConfig(
        vocab_size=V, length=L, width=16, depth=2, heads=2, cond_width=6, process=process
    )
    model = config.network(torch.Generator().manual_seed(seed)).double()
    if spread:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adaLN" in name or "output_layer.linear" in name:
                    parameter.normal_(0, 0.5, generator=generator)
    return model


def state(n_states=V, seed=1):
    return torch.randint(n_states, (B, L), generator=torch.Generator().manual_seed(seed))


NOISE = torch.tensor([0.05, 0.7, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("process", "expected"), [("absorbing", Absorbing(V + 1, mask_id=V)), ("uniform", Uniform(V))]
)
def test_it_is_a_score_network_of_its_process(process, expected):
    """The mask is the last state of the absorbing process; uniform noise has none."""
    model = build(process)
    assert isinstance(model, ScoreNetwork)
    assert not isinstance(model, Denoiser)
    assert model.process == expected
    assert model.log_score(state(), NOISE).shape == (B, L, expected.n_states)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_score_of_staying_is_one(process):
    """The entry at the token itself is exactly 0, and it alone in general."""
    model = build(process)
    x_t = state(model.process.n_states)
    log_score = model.log_score(x_t, NOISE)
    own = F.one_hot(x_t, model.process.n_states).bool()
    assert bool((log_score[own] == 0).all())
    assert bool((log_score[~own] != 0).all())


def test_an_untrained_absorbing_model_guesses_uniformly():
    """Outputs start at 0, so a masked position has score k / V for every token."""
    model = build(spread=False)
    x_t = torch.full((B, L), V)
    k = (-NOISE).exp() / (1 - (-NOISE).exp())
    score = model.log_score(x_t, NOISE).exp()[..., :V]
    torch.testing.assert_close(score, (k / V)[:, None, None].expand(B, L, V))


def test_scaling_subtracts_the_same_number_from_every_entry_but_the_own():
    """log(e^n - 1) + log V, by hand; off for uniform noise unless refused."""
    scaled, plain = build(), build()
    plain.scaled = False
    x_t = state(V + 1)
    gap = plain.log_score(x_t, NOISE) - scaled.log_score(x_t, NOISE)
    by_hand = torch.tensor([math.log(math.expm1(n)) + math.log(V) for n in NOISE.tolist()])
    expected = by_hand.double()[:, None, None] * (1 - F.one_hot(x_t, V + 1))
    torch.testing.assert_close(gap, expected)
    assert (build("absorbing").scaled, build("uniform").scaled) == (True, False)


def test_log_expm1_neither_overflows_nor_loses_small_noise():
    """Against exact values where e^x would overflow in float32 and where it rounds to 1."""
    x = torch.tensor([1e-12, 1e-3, 1.0, 200.0])
    expected = torch.tensor(
        [math.log(1e-12), math.log(math.expm1(1e-3)), math.log(math.e - 1), 200]
    )
    torch.testing.assert_close(log_expm1(x), expected)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_noise_level_counts_and_only_for_its_own_sample(process):
    """Another noise for sample 1 changes sample 1 beyond a common offset, and no other."""
    model, x_t = build(process), state()
    other = NOISE.clone()
    other[1] = 0.71
    moved = model.log_score(x_t, other) - model.log_score(x_t, NOISE)
    assert bool((moved[[0, 2]] == 0).all())
    assert moved[1].std() > 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_every_position_sees_every_other(process):
    """Attention is full: each row moves when any one token changes."""
    model, x_t = build(process), state()
    before = model.log_score(x_t, NOISE)
    for position in range(L):
        changed = x_t.clone()
        changed[:, position] = (x_t[:, position] + 1) % V
        moved = (model.log_score(changed, NOISE) - before).abs().amax(-1)
        assert bool((moved > 1e-7).all())


@pytest.mark.parametrize("process", PROCESSES)
def test_padding_influences_no_other_position(process):
    """Rows of real tokens are the same whatever the padding holds, and as if it were not there."""
    model, x_t = build(process), state()
    attend = torch.arange(L)[None] < torch.tensor([L, 4, 2])[:, None]
    padded = model.log_score(x_t, NOISE, attend=attend)
    other = torch.where(attend, x_t, (x_t + 1) % V)
    again = model.log_score(other, NOISE, attend=attend)
    assert torch.equal(again[attend], padded[attend])
    for row, length in enumerate((L, 4, 2)):
        alone = model.log_score(x_t[row : row + 1, :length], NOISE[row : row + 1])
        torch.testing.assert_close(padded[row : row + 1, :length], alone)


def test_blocks_start_as_the_identity():
    """adaLN-zero: before training the gates are shut, so the blocks change nothing."""
    model = build(spread=False)
    h = model.vocab_embed(state())
    c = torch.ones(1, 6, dtype=torch.float64)
    angle = torch.zeros(L, 8, dtype=torch.float64)
    assert torch.equal(model.blocks[0](h, c, None, (angle.cos(), angle.sin())), h)


@pytest.mark.parametrize("process", PROCESSES)
def test_initial_weights_are_a_function_of_the_generator_alone(process):
    """Same seed, same bits; another seed, other weights; the global generator is not touched."""
    rng = torch.get_rng_state()
    first = build(process, seed=3, spread=False).state_dict()
    torch.rand(5)
    second = build(process, seed=3, spread=False).state_dict()
    torch.set_rng_state(rng)
    other = build(process, seed=4, spread=False).state_dict()
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        drawn = value.ndim > 1 and "adaLN" not in name and name != "output_layer.linear.weight"
        assert torch.equal(value, other[name]) is not drawn, name


@pytest.mark.parametrize("process", PROCESSES)
def test_all_parameters_get_a_gradient(process):
    """Nothing in the network is unused."""
    model = build(process)
    (model.log_score(state(), NOISE) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("process", PROCESSES)
def test_float32_and_bf16_autocast_agree_with_float64_and_return_float32(process):
    """The same network in each precision, to that precision."""
    exact, single = build(process), build(process).float()
    x_t = state()
    expected = exact.log_score(x_t, NOISE)
    assert expected.dtype == torch.float64
    scale = expected.abs().max().item()
    float32 = single.log_score(x_t, NOISE.float())
    assert float32.dtype == torch.float32
    torch.testing.assert_close(float32.double(), expected, rtol=0, atol=1e-5 * scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = single.log_score(x_t, NOISE.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.03 * scale)


def test_adapters_fit_its_linear_layers():
    """LoRA on attention and MLP: unchanged at first, and only the adapters train."""
    model, x_t = build(), state()
    before = model.log_score(x_t, NOISE)
    lora = Lora(rank=2, alpha=4, targets=("attn_qkv", "attn_out", "mlp.0", "mlp.2"))
    add_lora(model, lora, generator=torch.Generator().manual_seed(0))
    after = model.log_score(x_t, NOISE)
    torch.testing.assert_close(after, before)
    after.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(".lora_" in name for name in trained)
    for part in ("blocks.1.attn_qkv", "blocks.1.attn_out", "blocks.1.mlp.0", "blocks.1.mlp.2"):
        assert f"{part}.lora_B.default.weight" in trained


def reference_log_score(weights, config, x_t, total_noise):
    """The published forward pass, written out once more from its description, block by block."""
    heads, depth = config["model"]["n_heads"], config["model"]["n_blocks"]

    def linear(name, x):
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def spin(x):
        """x: [B, L, H, E]; features i and i + E/2 turn by l * 10000^(-2i/E)."""
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:])
        turn = torch.polar(torch.ones_like(angle), angle).to(z.dtype)
        z = z * turn[None, :, None]
        return torch.cat([z.real, z.imag], -1)

    angle = total_noise[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = torch.cat([angle.cos(), angle.sin()], -1)
    c = F.silu(linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", c))))
    x = weights["vocab_embed.embedding"][x_t]
    for block in (f"blocks.{i}" for i in range(depth)):
        a1, b1, g1, a2, b2, g2 = linear(f"{block}.adaLN_modulation", c)[:, None].chunk(6, -1)
        h = norm(f"{block}.norm1.weight", x) * (1 + b1) + a1
        q, k, v = linear(f"{block}.attn_qkv", h).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
        q, k = spin(q), spin(k)
        weight = torch.einsum("blhe,bmhe->bhlm", q, k) / q.shape[-1] ** 0.5
        h = torch.einsum("bhlm,bmhe->blhe", weight.softmax(-1), v).flatten(2)
        x = x + g1 * linear(f"{block}.attn_out", h)
        h = norm(f"{block}.norm2.weight", x) * (1 + b2) + a2
        h = F.gelu(linear(f"{block}.mlp.0", h), approximate="tanh")
        x = x + g2 * linear(f"{block}.mlp.2", h)
    a, b = linear("output_layer.adaLN_modulation", c)[:, None].chunk(2, -1)
    out = linear("output_layer.linear", norm("output_layer.norm_final.weight", x) * (1 + b) + a)
    if config["model"]["scale_by_sigma"]:
        out = out - total_noise.expm1().log()[:, None, None] - math.log(out.shape[-1] - 1)
    out[F.one_hot(x_t, out.shape[-1]).bool()] = 0
    return out


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_a_checkpoint_in_the_published_layout_computes_the_published_function(tmp_path, graph):
    """Names, order of chunks, rotary convention, embedding, offset: against a second writing."""
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5, graph=graph)
    model = load_sedd(folder).double()
    weights = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    x_t = state(model.process.n_states)
    expected = reference_log_score(weights, config, x_t, NOISE)
    torch.testing.assert_close(model.log_score(x_t, NOISE), expected)
    assert {n for n in weights if n != "rotary_emb.inv_freq"} == set(model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_lone_safetensors_file_and_a_nested_config_load_too(tmp_path):
    """The config lies beside the file; newer hub versions put it under 'config'."""
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5)
    expected = load_sedd(folder).log_score(state(), NOISE.float())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"config": config}))
    again = load_sedd(folder / "model.safetensors").log_score(state(), NOISE.float())
    assert torch.equal(again, expected)


def test_shards_load_like_one_file(tmp_path):
    """An index that names two files."""
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5)
    expected = load_sedd(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_sedd(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.mlp.0.bias"), r"'blocks.1.mlp.0.bias' has shape none, expected"),
        (lambda t: t.update(extra=torch.zeros(2)), r"'extra' has shape \(2,\), expected none"),
        (
            lambda t: t.update({"vocab_embed.embedding": torch.zeros(V, WIDTH)}),
            rf"'vocab_embed.embedding' has shape \({V}, {WIDTH}\), expected \({V + 1}, {WIDTH}\)",
        ),
        (
            lambda t: t.update({"rotary_emb.inv_freq": torch.ones(WIDTH // HEADS // 2)}),
            "rotary positions of another base",
        ),
        (
            lambda t: t.update({"blocks.0.norm1.weight": torch.ones(WIDTH, dtype=torch.int64)}),
            "'blocks.0.norm1.weight' in .* has dtype torch.int64",
        ),
    ],
)
def test_odd_weights_are_refused_by_name(tmp_path, change, message):
    """Missing, unknown, of another shape, of another rotary base, not real."""
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_sedd(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "n_heads"), None, "has no field 'model.n_heads'"),
        (("graph", "type"), "mask", "graph.type 'mask'; expected one of"),
        (("tokens",), None, "has no field 'tokens'"),
        (("model", "n_heads"), 3, "width must be a multiple of 2"),
    ],
)
def test_odd_configs_are_refused_by_field(tmp_path, path, value, message):
    """A field that is missing or has no meaning here."""
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5)
    config = json.loads((folder / "config.json").read_text())
    *outer, last = path
    inner = config
    for part in outer:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_sedd(folder)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    """Alone or in a folder without safetensors; the file is never opened."""
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5)
    pickled = folder / "pytorch_model.bin"
    pickled.write_bytes(b"not even a pickle")
    (folder / "model.safetensors").unlink()
    for source in (pickled, folder):
        with pytest.raises(ValueError, match=r"convert_checkpoint .*pytorch_model.bin .*safetens"):
            load_sedd(source)


def test_missing_and_damaged_files_are_named(tmp_path):
    """No folder, no config, a truncated file, a config that is not JSON."""
    with pytest.raises(ValueError, match="no folder .*expected one with config.json"):
        load_sedd(tmp_path / "nowhere" / "tiny")
    folder = write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=5)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*config.json"):
        load_sedd(bare)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_sedd(folder)
    (folder / "model.safetensors").write_bytes(b"12345678910")
    with pytest.raises(ValueError, match="is damaged"):
        load_sedd(folder)


@pytest.mark.usefixtures("unchecked")
def test_integer_noise_is_a_type_error():
    """A noise level of 0.008 in an integer tensor is 0: it must not pass silently."""
    with pytest.raises(TypeError, match=r"total_noise has dtype torch.int64"):
        build().log_score(state(), torch.zeros(B, dtype=torch.int64))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(1,), (B, 1), ()])
def test_noise_is_one_number_per_sample(shape):
    """Nothing is broadcast."""
    with pytest.raises(ValueError, match=r"expected one number per sample, \(3,\)"):
        build().log_score(state(), torch.ones(shape))


@pytest.mark.parametrize(
    ("token", "process"), [(-1, "absorbing"), (V + 1, "absorbing"), (V, "uniform")]
)
def test_tokens_that_are_no_state_are_refused(token, process):
    """A negative index would read the last row silently; V is a state of one process only."""
    x_t = state()
    x_t[1, 2] = token
    with pytest.raises(ValueError, match=rf"tokens from {min(token, 0)} to .* are 0 to"):
        build(process).log_score(x_t, NOISE)


def test_the_check_of_tokens_can_be_called_alone():
    """Valid tokens and an empty canvas pass."""
    check_tokens(state(), V)
    check_tokens(torch.zeros(0, L, dtype=torch.long), V)
    with pytest.raises(ValueError, match=f"0 to {V - 2}"):
        check_tokens(torch.full((1, 1), V - 1), V - 1)


def test_a_canvas_longer_than_the_model_is_refused():
    """It was never trained on those positions."""
    with pytest.raises(ValueError, match=f"canvas of {L + 1} positions; .* at most {L}"):
        build().log_score(torch.zeros(B, L + 1, dtype=torch.long), NOISE)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 12, "heads": 4}, "multiple of 2 . heads, got width 12 and heads 4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"cond_width": 0}, "cond_width must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"process": "masked"}, "process is 'masked'"),
        ({"process": "uniform", "scale_by_sigma": True}, "scale_by_sigma is for the absorbing"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    """The message names the field and what it was."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SeddConfig(vocab_size=V, length=L), **change)


def test_without_a_generator_there_are_no_weights_yet():
    """For loading: no memory is taken for weights that a file will bring."""
    model = Sedd(SeddConfig(vocab_size=V, length=L), generator=None)
    assert all(parameter.is_meta for parameter in model.parameters())
