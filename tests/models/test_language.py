"""Pretrained language models: logits of plain formulas, padding, guidance, adapters and files."""

import json
import shutil
import sys

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rescore.models.denoiser import Denoiser
from rescore.models.finetune import Lora, add_lora, reference, trainable_state
from rescore.models.language import ALL_LINEARS, LanguageModel, load_language_model
from rescore.models.language_files import load_adapter, save_adapter, save_merged
from rescore.models.layouts import layout_of
from rescore.models.miniature import write_miniature
from tiny import denoiser

FAMILIES = ("llada", "dream", "masked_lm")
LORA = Lora(rank=3, alpha=12, targets=ALL_LINEARS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniatures")
    return {name: str(write_miniature(root / name, name, seed=5)) for name in FAMILIES}


@pytest.fixture
def copied(folders, tmp_path):
    """A LLaDA miniature that a test may damage."""
    return shutil.copytree(folders["llada"], tmp_path / "copy")


def load(folder, **options):
    return load_language_model(folder, **{"dtype": "float32", **options})


def canvas(rows=3, length=11, seed=0):
    return torch.randint(250, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights(folder):
    """All tensors of a checkpoint by the names in its files."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


def finite(module, logits):
    """The columns other than the mask token's, which is -inf."""
    assert (logits[..., module.mask_id] == -torch.inf).all()
    return logits[..., torch.arange(module.vocab_size) != module.mask_id]


def assert_same(module, logits, expected):
    torch.testing.assert_close(finite(module, logits), finite(module, expected))


# ---- the networks, written out ----


def rms_norm(h, weight, eps):
    return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(h, theta):
    """Rotary embedding of (B, L, H, E): the first half of the features pairs with the second."""
    length, width = h.shape[1], h.shape[-1]
    angle = torch.outer(torch.arange(length), theta ** -(torch.arange(0, width, 2) / width))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = h[..., : width // 2], h[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def block(h, w, names, *, heads, kv_heads, eps, theta):
    """Pre-norm attention to every position, then SwiGLU, in plain torch."""

    def linear(name, x):
        return F.linear(x, w[f"{names[name]}.weight"], w.get(f"{names[name]}.bias"))

    n = rms_norm(h, w[f"{names['norm1']}.weight"], eps)
    q, k, v = (linear(name, n) for name in "qkv")
    q = rotated(q.unflatten(-1, (heads, -1)), theta)
    k = rotated(k.unflatten(-1, (kv_heads, -1)), theta)
    v = v.unflatten(-1, (kv_heads, -1))
    k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    score = torch.einsum("blhe,bmhe->bhlm", q, k) / q.shape[-1] ** 0.5
    read = torch.einsum("bhlm,bmhe->blhe", score.softmax(-1), v)
    h = h + linear("out", read.flatten(2))
    n = rms_norm(h, w[f"{names['norm2']}.weight"], eps)
    return h + linear("down", F.silu(linear("gate", n)) * linear("up", n))


def llada_by_hand(folder, x):
    config, w = config_of(folder), weights(folder)
    h = w["model.transformer.wte.weight"][x]
    for i in range(config["n_layers"]):
        names = {
            "norm1": "attn_norm",
            "q": "q_proj",
            "k": "k_proj",
            "v": "v_proj",
            "out": "attn_out",
            "norm2": "ff_norm",
            "gate": "ff_proj",
            "up": "up_proj",
            "down": "ff_out",
        }
        names = {k: f"model.transformer.blocks.{i}.{v}" for k, v in names.items()}
        h = block(
            h,
            w,
            names,
            heads=config["n_heads"],
            kv_heads=config["n_kv_heads"],
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
        )
    h = rms_norm(h, w["model.transformer.ln_f.weight"], config["rms_norm_eps"])
    return h @ w["model.transformer.ff_out.weight"].T


def dream_by_hand(folder, x):
    config, w = config_of(folder), weights(folder)
    h = w["model.embed_tokens.weight"][x]
    for i in range(config["num_hidden_layers"]):
        names = {
            "norm1": "input_layernorm",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "out": "self_attn.o_proj",
            "norm2": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
        names = {k: f"model.layers.{i}.{v}" for k, v in names.items()}
        assert f"{names['q']}.bias" in w
        h = block(
            h,
            w,
            names,
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
        )
    h = rms_norm(h, w["model.norm.weight"], config["rms_norm_eps"])
    raw = h @ w["lm_head.weight"].T
    return torch.cat([raw[:, :1], raw[:, :-1]], 1)


@pytest.mark.parametrize(
    ("family", "by_hand"), [("llada", llada_by_hand), ("dream", dream_by_hand)]
)
def test_logits_are_those_of_the_architecture_written_out(folders, tmp_path, family, by_hand):
    """From the names in the files: full attention, rotary halves, SwiGLU; Dream's rows shifted."""
    module = load(folders[family])
    assert isinstance(module, Denoiser)
    x = canvas()
    logits = module.predict(x)
    expected = by_hand(shutil.copytree(folders[family], tmp_path / "c"), x)
    assert expected.std() > 0.5
    expected[..., module.mask_id] = -torch.inf
    assert_same(module, logits, expected)


def test_a_masked_language_model_is_the_library_s(folders):
    """ModernBERT through AutoModelForMaskedLM; only its tokenizer names the mask token."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    module, x = load(folders["masked_lm"]), canvas()
    assert module.mask_id == AutoTokenizer.from_pretrained(folders["masked_lm"]).mask_token_id
    expected = AutoModelForMaskedLM.from_pretrained(folders["masked_lm"])(x).logits
    expected[..., module.mask_id] = -torch.inf
    assert_same(module, module.predict(x), expected)


def small_masked_lm(kind):
    """A BERT or RoBERTa whose padding token is 1."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=0.3,
        pad_token_id=1,
    )
    network = AutoModelForMaskedLM.from_config(config)
    return LanguageModel(network, layout=layout_of(config.to_dict(), kind), mask_id=255)


@pytest.mark.parametrize("family", [*FAMILIES, "bert", "roberta", "xlm-roberta"])
def test_padding_on_the_left_influences_nothing(folders, family):
    """Logits at real positions: the same without the padding and with any tokens in its place."""
    module = load(folders[family]) if family in FAMILIES else small_masked_lm(family)
    x = canvas()
    attend = torch.ones_like(x, dtype=torch.bool)
    attend[0, :4] = False
    attend[1, :1] = False
    other = torch.where(attend, x, 1)  # the padding token of BERT and RoBERTa
    logits, again = module.predict(x, attend=attend), module.predict(other, attend=attend)
    for row, start in enumerate((4, 1, 0)):
        alone = module.predict(x[row : row + 1, start:])
        assert_same(module, logits[row : row + 1, start:], alone)
        assert_same(module, again[row : row + 1, start:], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_choose_rows(folders, family):
    """In any order and with repeats, with padding too; all rows in order are what None gives."""
    module, x = load(folders[family]), canvas()
    attend = torch.arange(x.shape[1]) >= torch.tensor([[0], [3], [1]])
    positions = torch.tensor([[0, 10, 5], [3, 9, 3], [2, 1, 8]])
    every = module.predict(x, attend=attend)
    chosen = module.predict(x, attend=attend, positions=positions)
    assert_same(module, chosen, every.take_along_dim(positions[..., None], 1))
    rows = torch.arange(x.shape[1]).expand_as(x)
    assert_same(module, module.predict(x, attend=attend, positions=rows), every)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_only_wanted_rows_reach_the_vocabulary_head(folders, family):
    """The head sees (B, R) rows, not (B, L)."""
    module, seen = load(folders[family]), []
    head = module.network.get_submodule("lm_head")
    head.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[:2]))
    module.predict(canvas(), positions=torch.tensor([[1, 2]] * 3))
    assert seen == [(3, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_canvas_must_fit(folders, family):
    """The window of the config is the longest canvas."""
    module = load(folders[family])
    module.predict(canvas(rows=1, length=160))
    with pytest.raises(ValueError, match="canvas of 161 positions; this model takes at most 160"):
        module.predict(canvas(rows=1, length=161))


def test_roberta_s_window_leaves_out_its_padding_positions():
    """Positions count from padding_idx + 1 = 2, so 40 embeddings serve 38 positions."""
    module = small_masked_lm("roberta")
    module.predict(canvas(rows=1, length=38))
    with pytest.raises(ValueError, match="at most 38"):
        module.predict(canvas(rows=1, length=39))


# ---- guidance ----


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_guidance_is_its_formula(folders, family):
    """u + (1 + w) (c - u), u from a canvas whose attended prompt columns hold the mask token."""
    w, prompt = 0.75, 4
    plain, module = load(folders[family]), load(folders[family], prompt_length=prompt, guidance=w)
    x = canvas()
    attend = torch.arange(x.shape[1]) >= torch.tensor([[0], [2], [0]])
    positions = torch.tensor([[7, 4]] * 3)
    for options in ({}, {"attend": attend}, {"attend": attend, "positions": positions}):
        question = (torch.arange(x.shape[1]) < prompt) & options.get("attend", torch.tensor(True))
        hidden = torch.where(question, plain.mask_id, x)
        c, u = (finite(plain, plain.predict(t, **options)) for t in (x, hidden))
        logits = finite(module, module.predict(x, **options))
        torch.testing.assert_close(logits, u + (1 + w) * (c - u))
        assert not torch.allclose(logits, c, atol=1e-2)


def test_guidance_costs_one_batch_of_twice_the_size(folders):
    """One call of the network, and none of the prompt's columns is hidden where padded."""
    module, seen = load(folders["llada"], prompt_length=3, guidance=1.0), []
    embed = module.network.get_submodule("model.embed_tokens")
    embed.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    x = canvas(rows=2, length=5)
    attend = torch.arange(5) >= torch.tensor([[0], [2]])
    module.predict(x, attend=attend)
    mask = module.mask_id
    assert len(seen) == 1
    expected = x.clone()
    expected[0, :3] = mask
    expected[1, 2] = mask
    assert torch.equal(seen[0], torch.cat([x, expected]))


def test_gradients_flow_through_both_branches(folders):
    """d/dtheta of the guided logits is the same combination of the two gradients."""
    w = 2.0
    x, row = canvas(rows=1), torch.tensor([[6]])

    def gradient(module, canvas):
        module.zero_grad()
        module.predict(canvas, positions=row)[0, 0, 7].backward()
        return module.network.get_parameter("model.layers.0.mlp.up_proj.weight").grad.clone()

    plain = load(folders["llada"])
    hidden = torch.where(torch.arange(11) < 4, plain.mask_id, x)
    c, u = gradient(plain, x), gradient(plain, hidden)
    guided = gradient(load(folders["llada"], prompt_length=4, guidance=w), x)
    torch.testing.assert_close(guided, u + (1 + w) * (c - u))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -0.5}, "guidance must be finite and not negative, got -0.5"),
        ({"guidance": 1.0}, "guidance hides the prompt, but prompt_length is 0"),
    ],
)
def test_impossible_guidance_is_refused(folders, options, message):
    """The message says what to change."""
    with pytest.raises(ValueError, match=message):
        load(folders["llada"], **options)


# ---- memory ----


def gradients(module, seen):
    add_lora(module, LORA, generator=torch.Generator().manual_seed(1))
    module.eval()
    for parameter in trainable_state(module).values():
        parameter.add_(0.02)  # B = 0 would hide the gradient of A
    up = module.network.get_submodule("model.layers.1.mlp.up_proj")
    up.register_forward_hook(lambda *_: seen.append("forward"))
    module.predict(canvas())[..., :9].logsumexp(-1).sum().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(folders, family):
    """In evaluation mode each block runs a second time in the backward pass, to equal gradients."""
    once, twice = [], []
    module = load(folders[family], gradient_checkpointing=True)
    kept, recomputed = gradients(load(folders[family]), once), gradients(module, twice)
    assert (len(once), len(twice)) == (1, 2)
    assert kept.keys() == recomputed.keys() == trainable_state(module).keys()
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(recomputed[name], gradient)


def test_only_the_layers_themselves_stay_in_training_mode(folders):
    """Nothing below them does, so dropout stays off; without checkpointing nothing does at all."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    module = load(folders["llada"], gradient_checkpointing=True).train().eval()
    training = {type(m) for m in module.modules() if m.training}
    assert training == {LlamaDecoderLayer}
    assert not any(m.training for m in load(folders["llada"]).modules())


def test_bfloat16_weights_give_bfloat16_logits_near_those_of_float32(folders):
    """The dtype is the argument's, not the file's."""
    narrow, wide = load(folders["llada"], dtype="bfloat16"), load(folders["llada"])
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    logits = narrow.predict(canvas())
    assert logits.dtype == torch.bfloat16
    difference = finite(narrow, logits).float() - finite(wide, wide.predict(canvas()))
    assert difference.abs().mean() < 0.02


# ---- adapters ----


def adapted(folder, seed=1, **options):
    """A model with adapters that do something."""
    module = add_lora(load(folder, **options), LORA, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    for tensor in trainable_state(module).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_adapters_on_all_linears_and_the_reference_without_them(folders, family):
    """7 layers of 2 blocks adapt; the reference is the base, bit for bit."""
    base, module = load(folders[family]), adapted(folders[family])
    assert len(trainable_state(module)) == 2 * 7 * 2
    x = canvas()
    with torch.no_grad():
        assert torch.equal(denoiser(reference(module)).predict(x), base.predict(x))
        change = finite(base, module.predict(x)) - finite(base, base.predict(x))
    assert change.abs().max() > 0.1


def test_adapters_on_a_bfloat16_base_are_float32(folders):
    """Small updates would be lost in 8 bits of mantissa; the base stays as it is."""
    module = load(folders["llada"], dtype="bfloat16")
    add_lora(module, LORA, generator=torch.Generator())
    dtypes = {(p.requires_grad, p.dtype) for p in module.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert module.predict(canvas()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_peft_loads_a_saved_adapter(folders, tmp_path, family):
    """On the native class of transformers, with the same logits."""
    from peft import PeftModel

    module, x = adapted(folders[family]), canvas()
    save_adapter(module, LORA, tmp_path / "adapter", base=folders[family])
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    native = PeftModel.from_pretrained(load(folders[family]).network, str(tmp_path / "adapter"))
    logits = native.eval()(x).logits
    if family == "dream":
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    logits[..., module.mask_id] = -torch.inf
    assert_same(module, module.predict(x), logits)


def test_a_saved_adapter_comes_back(folders, tmp_path):
    """Rank, scale, targets and every bit."""
    module = adapted(folders["llada"])
    save_adapter(module, LORA, tmp_path / "adapter", base="somewhere")
    again = load(folders["llada"])
    lora = load_adapter(again, tmp_path / "adapter")
    assert (lora.rank, lora.alpha, set(lora.targets)) == (LORA.rank, LORA.alpha, set(LORA.targets))
    assert torch.equal(again.predict(canvas()), module.predict(canvas()))


def test_adapters_named_after_llada_s_own_modules_load(folders, tmp_path):
    """Adapters trained with the published code: attn_out, ff_proj and ff_out by those names."""
    module = adapted(folders["llada"])
    save_adapter(module, LORA, tmp_path / "adapter", base="somewhere")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    start = "base_model.model."
    original = {
        start + module.layout.to_original(name.removeprefix(start)): tensor
        for name, tensor in load_file(file).items()
    }
    assert f"{start}model.transformer.blocks.1.ff_out.lora_A.weight" in original
    save_file(original, file)
    again = load(folders["llada"])
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.predict(canvas()), module.predict(canvas()))


def test_an_adapter_of_another_base_is_refused(folders, copied, tmp_path):
    """Another width, another depth, or another family; the model is left as it was."""
    save_adapter(adapted(folders["llada"]), LORA, tmp_path / "adapter", base="somewhere")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = load_file(file)
    module = load(folders["llada"])
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    wrong = (
        {**good, name: good[name][:-1].clone()},
        {n: t for n, t in good.items() if n != name},
        {**good, name.replace("layers.0", "layers.2"): good[name].clone()},
    )
    for tensors in wrong:
        save_file(tensors, file)
        with pytest.raises(ValueError, match="belongs to another base: 'base_model.model.model.la"):
            load_adapter(module, tmp_path / "adapter")
    with pytest.raises(ValueError, match="belongs to another base"):
        load_adapter(load(folders["masked_lm"]), tmp_path / "adapter")
    assert not trainable_state(module).keys() - dict(load(folders["llada"]).named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_rslora": True}, "uses use_rslora, which is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern"),
        ({"peft_type": "LOHA"}, "of type .*LOHA; expected LORA"),
        ({"peft_type": "no such"}, "is damaged"),
    ],
)
def test_adapters_of_other_kinds_are_refused(folders, tmp_path, fields, message):
    """They would load and compute something else."""
    save_adapter(adapted(folders["llada"]), LORA, tmp_path / "adapter", base="somewhere")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        load_adapter(load(folders["llada"]), tmp_path / "adapter")


def test_missing_and_damaged_adapters_are_refused(folders, tmp_path, monkeypatch):
    """The message names what is missing."""
    module = load(folders["llada"])
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(adapted(folders["llada"]), tmp_path)
    with (
        monkeypatch.context() as without,
        pytest.raises(ValueError, match=r"'rescore\[language\]'"),
    ):
        without.setitem(sys.modules, "peft", None)
        load_adapter(module, tmp_path)
    with pytest.raises(
        ValueError, match=r"no adapter_config.json and no adapter_model.safetensors"
    ):
        load_adapter(module, tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(module, LORA, tmp_path / "adapter", base="somewhere")
    save_adapter(adapted(folders["llada"]), LORA, tmp_path / "adapter", base="somewhere")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(module, tmp_path / "adapter")


# ---- merged weights ----


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_take_the_place_of_the_original(folders, tmp_path, family):
    """The same names, shapes, config and tokenizer; the logits of the adapted model."""
    targets = ALL_LINEARS if family != "masked_lm" else ("Wqkv", "Wi", "Wo")
    lora = Lora(rank=2, alpha=6, targets=targets)
    module = add_lora(load(folders[family]), lora, generator=torch.Generator().manual_seed(3))
    for tensor in trainable_state(module).values():
        tensor.add_(0.03)
    before, x = {n: p.clone() for n, p in module.named_parameters()}, canvas()
    save_merged(module, tmp_path / "merged", folders[family])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])

    source = shutil.copytree(folders[family], tmp_path / "source")
    old, new = weights(source), weights(tmp_path / "merged")
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and "index" not in file.name:
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
    logits = load(str(tmp_path / "merged")).predict(x)
    assert_same(module, logits, module.predict(x))
    change = finite(module, logits) - finite(module, load(folders[family]).predict(x))
    assert change.abs().max() > 0.1


def test_bfloat16_weights_are_merged_in_float32_and_rounded_once(folders, tmp_path):
    """round(W + s B A), not round(W + round(s B A))."""
    module = adapted(folders["llada"], dtype="bfloat16")
    layer = module.network.get_submodule("model.layers.0.mlp.up_proj")
    state = trainable_state(layer)
    exact = layer.get_parameter("base_layer.weight").float() + LORA.alpha / LORA.rank * (
        state["lora_B.default.weight"].float() @ state["lora_A.default.weight"].float()
    )
    save_merged(module, tmp_path / "merged", folders["llada"])
    saved = weights(tmp_path / "merged")["model.transformer.blocks.0.up_proj.weight"]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved, exact.bfloat16())


def test_folders_are_written_whole_or_not_at_all(folders, copied, tmp_path):
    """A taken name is refused; a failure leaves nothing behind."""
    module = load(folders["llada"])
    (copied / "config.json").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        save_merged(module, copied, folders["llada"])
    with pytest.raises(ValueError, match="has no config.json"):
        save_merged(module, tmp_path / "merged", str(copied))
    assert sorted(tmp_path.iterdir()) == before


# ---- what cannot be loaded ----


def test_missing_files_are_named(copied, tmp_path):
    """A shard of the index, the config, or everything; pickled weights do not count."""
    (copied / "model-00002-of-00002.safetensors").unlink()
    (copied / "config.json").unlink()
    message = "copy is not a complete checkpoint: it has no config.json, model-00002-of-00002"
    with pytest.raises(ValueError, match=message):
        load(str(copied))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="it has no model.safetensors; expected are config.json"):
        load(str(tmp_path / "pickled"))
    with pytest.raises(ValueError, match="there is no folder /no/such/place; expected one with"):
        load("/no/such/place")


def test_an_unreachable_name_is_refused(monkeypatch):
    """Offline, the message says what to check."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'some/model' is no folder here and .* from the hub"):
        load("some/model")


def test_damaged_weights_are_refused(copied):
    """Not JSON, not safetensors, a weight too few, one too many, one of another shape."""
    shard = copied / "model-00001-of-00002.safetensors"
    good = load_file(shard)
    name = next(n for n in good if n.endswith("ff_proj.weight"))
    without = {n: t for n, t in good.items() if n != name}
    for tensors, message in (
        (without, "do not match its config.json: 1 missing keys, such as model.layers.0.mlp.gate"),
        ({**good, "strange": torch.ones(2)}, "1 unexpected keys, such as strange"),
        ({**good, name: good[name][:-1].clone()}, "cannot load the weights|mismatched"),
    ):
        save_file(tensors, shard)
        with pytest.raises(ValueError, match=message):
            load(str(copied))
    shard.write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot load the weights of"):
        load(str(copied))
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(str(copied))


def test_other_heads_of_a_masked_language_model_are_left_alone(folders, tmp_path):
    """BERT's checkpoints hold the head of next-sentence prediction too."""
    folder = shutil.copytree(folders["masked_lm"], tmp_path / "copy")
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "cls.seq_relationship.bias": torch.ones(2)}, shard)
    x = canvas()
    assert torch.equal(load(str(folder)).predict(x), load(folders["masked_lm"]).predict(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, r"of type 'gpt2'; supported are 'llada', 'Dream' and .*'roberta'"),
        ({"block_type": "sequential"}, "block_type='sequential' .* only 'llama' is supported"),
        ({"alibi": True}, "alibi=True .* only False is supported"),
    ],
)
def test_other_models_are_refused(copied, fields, message):
    """The type is listed, and a LLaDA that is no Llama is not taken for one."""
    rewrite(copied, **fields)
    with pytest.raises(ValueError, match=message):
        load(str(copied))


def test_a_config_without_a_field_is_refused(copied):
    """The message names the field."""
    config = config_of(copied)
    del config["rope_theta"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no field 'rope_theta'"):
        load(str(copied))


def test_four_bits_need_a_gpu_and_bitsandbytes(folders, monkeypatch):
    """Said before anything is loaded."""
    with pytest.raises(ValueError, match="quantize='nf4' needs a CUDA device, got 'cpu'"):
        load(folders["llada"], quantize="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'rescore\[quantized\]'"):
        load(folders["llada"], quantize="nf4", device="cuda")


def test_missing_transformers_says_what_to_install(folders, monkeypatch):
    """Without the extra the message is the pip command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'rescore\[language\]'"):
        load(folders["llada"])


# ---- miniatures ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_miniature_is_two_shards_that_depend_on_the_seed_alone(folders, tmp_path, family):
    """Equal seeds give equal bytes; the index names every weight of the shards."""
    torch.manual_seed(9)
    same = write_miniature(tmp_path / "same", family, seed=5)
    other = write_miniature(tmp_path / "other", family, seed=6)
    source = shutil.copytree(folders[family], tmp_path / "first")
    for file in source.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes()
    assert all((tensor != weights(other)[name]).any() for name, tensor in weights(source).items())
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 2
    assert set(index) == set(weights(source))
