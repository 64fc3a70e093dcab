"""MDLM keeps the promises of the Denoiser protocol; its published layout loads."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rescore.models.denoiser import Denoiser, ScoreNetwork
from rescore.models.importers import load_mdlm, load_sedd
from rescore.models.mdlm import MdlmConfig
from rescore.models.miniature_sedd import write_tiny_sedd

V, L, B = 5, 7, 3


def build(seed=0, spread=True):
    """A float64 model; ``spread`` also draws the weights that start at zero."""
    config = MdlmConfig(vocab_size=V, length=L, width=16, depth=2, heads=2, cond_width=6)
    model = config.network(torch.Generator().manual_seed(seed)).double()
    if spread:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "adaLN" in name or "output_layer.linear" in name:
                    parameter.normal_(0, 0.5, generator=generator)
    return model


def canvas(seed=1):
    return torch.randint(V + 1, (B, L), generator=torch.Generator().manual_seed(seed))


def test_it_is_a_denoiser_whose_mask_is_a_column_of_minus_infinity():
    """SUBS: the mask is never predicted; all other logits are finite."""
    model = build()
    assert isinstance(model, Denoiser)
    assert not isinstance(model, ScoreNetwork)
    logits = model.predict(canvas())
    assert logits.shape == (B, L, model.vocab_size)
    assert (model.vocab_size, model.mask_id) == (V + 1, V)
    assert bool((logits[..., V] == -torch.inf).all())
    assert bool(logits[..., :V].isfinite().all())


def test_untrained_predictions_are_uniform():
    """The output layer starts at 0."""
    probs = build(spread=False).predict(canvas()).softmax(-1)
    expected = torch.full((V + 1,), 1 / V, dtype=torch.float64)
    expected[V] = 0
    torch.testing.assert_close(probs, expected.expand(B, L, V + 1))


def test_padding_influences_no_other_position():
    """Rows of real tokens are the same whatever the padding holds, and as if it were not there."""
    model, x_t = build(), canvas()
    attend = torch.arange(L)[None] < torch.tensor([L, 4, 2])[:, None]
    padded = model.predict(x_t, attend=attend)
    other = torch.where(attend, x_t, (x_t + 1) % (V + 1))
    assert torch.equal(model.predict(other, attend=attend)[attend], padded[attend])
    for row, length in enumerate((L, 4, 2)):
        alone = model.predict(x_t[row : row + 1, :length])
        torch.testing.assert_close(padded[row : row + 1, :length], alone)


def test_rows_asked_for_are_the_rows_of_the_full_prediction():
    """predict(positions) equals gathering from predict(), and only they reach the output layer."""
    model, x_t = build(), canvas()
    positions = torch.tensor([[6, 0, 3, 3], [1, 2, 5, 4], [0, 6, 0, 1]])
    expected = model.predict(x_t)[torch.arange(B)[:, None], positions]
    seen = []
    model.output_layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    torch.testing.assert_close(model.predict(x_t, positions=positions), expected)
    assert seen == [4]


def test_all_parameters_get_a_gradient():
    """Nothing is unused, and the masked column sends no NaN."""
    model = build()
    x_t = torch.full((B, L), V)
    F.cross_entropy(model.predict(x_t).flatten(0, 1), (torch.arange(B * L) % V)).backward()
    x_t = canvas()
    F.cross_entropy(model.predict(x_t).flatten(0, 1), (torch.arange(B * L) % V)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


def test_initial_weights_are_a_function_of_the_generator_alone():
    """Same seed, same bits; another seed, other weights; the global generator is not touched."""
    rng = torch.get_rng_state()
    first = build(seed=3, spread=False).state_dict()
    torch.rand(5)
    second = build(seed=3, spread=False).state_dict()
    other = build(seed=4, spread=False).state_dict()
    torch.set_rng_state(rng)
    build()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert not torch.equal(first["blocks.0.attn_qkv.weight"], other["blocks.0.attn_qkv.weight"])


def test_float32_agrees_with_float64():
    """The same network in each precision."""
    x_t = canvas()
    expected = build().predict(x_t)[..., :V]
    single = build().float().predict(x_t)[..., :V]
    assert (single.dtype, expected.dtype) == (torch.float32, torch.float64)
    scale = expected.abs().max().item()
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5 * scale)


def write_tiny_mdlm(folder, **changes):
    """The published layout, made from a tiny SEDD; returns the SEDD that has the same weights."""
    sedd = load_sedd(write_tiny_sedd(folder, vocab_size=V, length=L, seed=2))
    tensors = load_file(folder / "model.safetensors")
    save_file({f"backbone.{n}": t for n, t in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "mdlm",
        "vocab_size": V + 1,
        "model_length": L,
        "hidden_dim": 32,
        "cond_dim": 16,
        "n_blocks": 2,
        "n_heads": 2,
        "dropout": 0.1,
        "time_conditioning": False,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    return sedd


def test_a_checkpoint_in_the_published_layout_is_read_at_zero_noise(tmp_path):
    """The network of SEDD (checked in test_sedd.py), told that the total noise is 0."""
    sedd = write_tiny_mdlm(tmp_path / "tiny").double()
    model, x_t = load_mdlm(tmp_path / "tiny").double(), canvas()
    expected = sedd.outputs(x_t, torch.zeros(B, dtype=torch.float64))
    torch.testing.assert_close(model.predict(x_t)[..., :V], expected[..., :V])
    elsewhere = sedd.outputs(x_t, torch.full((B,), 0.1, dtype=torch.float64))
    assert not torch.allclose(elsewhere, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_conditioning": True}, "has time_conditioning=true"),
        ({"vocab_size": V}, r"'output_layer.linear.bias' has shape \(6,\), expected \(5,\), and 2"),
        ({"n_blocks": 3}, r"'blocks.2.adaLN_modulation.bias' has shape none, expected \(192,\)"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, changes, message):
    """Told the time, another vocabulary, another depth."""
    write_tiny_mdlm(tmp_path / "tiny", **changes)
    with pytest.raises(ValueError, match=message):
        load_mdlm(tmp_path / "tiny")


def test_a_config_without_a_field_is_refused(tmp_path):
    """SEDD's own config is of another layout."""
    write_tiny_sedd(tmp_path / "tiny", vocab_size=V, length=L, seed=2)
    with pytest.raises(ValueError, match="has no field 'vocab_size'"):
        load_mdlm(tmp_path / "tiny")


@pytest.mark.parametrize("token", [-1, V + 1])
def test_bad_canvases_are_refused(token):
    """Too long, or with a token that is no state."""
    with pytest.raises(ValueError, match=f"canvas of {L + 1} positions"):
        build().predict(torch.zeros(B, L + 1, dtype=torch.long))
    x_t = canvas()
    x_t[0, 0] = token
    with pytest.raises(ValueError, match=f"are 0 to {V}"):
        build().predict(x_t)
