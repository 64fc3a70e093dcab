"""The transformer keeps the promises of the Denoiser protocol."""

import dataclasses
from typing import Literal

import pytest
import torch

from rescore.models.denoiser import Denoiser
from rescore.models.transformer import Transformer, TransformerConfig

V, L, B = 5, 7, 3
EMBEDDINGS = ("learned", "rotary")


def build(position_embedding: Literal["learned", "rotary"] = "learned", seed=0, spread=True):
    """A float64 model; ``spread`` scales the head up, so that its predictions vary."""
    config = TransformerConfig(
        vocab_size=V, length=L, width=16, depth=2, heads=2, position_embedding=position_embedding
    )
    model = Transformer(config, generator=torch.Generator().manual_seed(seed)).double()
    if spread:
        with torch.no_grad():
            model.head.weight.mul_(50)
    return model


def canvas(seed=1):
    return torch.randint(V + 1, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_it_is_a_denoiser_of_v_columns_whose_mask_is_v(embedding):
    """The embedding knows V + 1 tokens, the logits V."""
    model = build(embedding)
    assert isinstance(model, Denoiser)
    assert (model.vocab_size, model.mask_id) == (V, V)
    assert model.token.weight.shape[0] == V + 1
    assert model.predict(torch.full((B, L), V)).shape == (B, L, V)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_every_position_sees_every_other(embedding):
    """Attention is bidirectional: each logit row moves when any one token changes."""
    model, x_t = build(embedding), canvas()
    before = model.predict(x_t)
    for position in range(L):
        changed = x_t.clone()
        changed[:, position] = (x_t[:, position] + 1) % (V + 1)
        moved = (model.predict(changed) - before).abs().amax(-1)
        assert bool((moved > 1e-6).all())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_padding_influences_no_other_position(embedding):
    """Rows of real tokens are the same whatever the padding holds, and as if it were not there."""
    model, x_t = build(embedding), canvas()
    attend = torch.ones(B, L, dtype=torch.bool)
    attend[:, -2:] = False
    padded = model.predict(x_t, attend=attend)[:, :-2]
    other = x_t.clone()
    other[:, -2:] = (x_t[:, -2:] + 1) % (V + 1)
    torch.testing.assert_close(model.predict(other, attend=attend)[:, :-2], padded, rtol=0, atol=0)
    torch.testing.assert_close(model.predict(x_t[:, :-2]), padded)
    assert not torch.allclose(model.predict(x_t)[:, :-2], padded)


def test_padding_may_differ_between_samples():
    """Each sample is masked by its own row of ``attend``."""
    model, x_t = build(), canvas()
    attend = torch.arange(L)[None, :] < torch.tensor([L, 4, 2])[:, None]
    together = model.predict(x_t, attend=attend)
    for row, length in enumerate((L, 4, 2)):
        alone = model.predict(x_t[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, :length], alone)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_rows_asked_for_are_the_rows_of_the_full_prediction(embedding):
    """predict(positions) equals gathering from predict(): any order, repeats, per sample."""
    model, x_t = build(embedding), canvas()
    positions = torch.tensor([[6, 0, 3, 3], [1, 2, 5, 4], [0, 6, 0, 1]])
    expected = model.predict(x_t)[torch.arange(B)[:, None], positions]
    torch.testing.assert_close(model.predict(x_t, positions=positions), expected)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_block_adds_to_what_it_reads(embedding):
    """With both output projections at zero every block is the identity: logits skip them."""
    model, x_t = build(embedding), canvas()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".out." in name or ".down." in name:
                parameter.zero_()
    h = model.token(x_t)
    if embedding == "learned":
        h = h + model.position.weight
    assert torch.equal(model.predict(x_t), model.head(model.norm(h)))


def test_only_rows_asked_for_go_through_norm_and_head():
    """The final norm and the vocabulary head see R rows per sample, not L."""
    model = build()
    seen = []
    for layer in (model.norm, model.head):
        layer.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
    model.predict(canvas(), positions=torch.tensor([[2], [0], [4]]))
    model.predict(canvas())
    assert seen == [1, 1, L, L]


def test_learned_positions_distinguish_and_rotary_sees_distances_only():
    """On a constant canvas all rotary rows agree; learned positions tell them apart."""
    x_t = torch.full((1, L), V)
    rotary, learned = build("rotary").predict(x_t), build("learned").predict(x_t)
    torch.testing.assert_close(rotary, rotary[:, :1].expand_as(rotary))
    assert bool((learned.std(1) > 1e-3).all())


def test_rotary_attention_depends_on_distance_and_on_order():
    """Shifting a pattern inside padding shifts its logits; reversing it changes them."""
    model = build("rotary")
    pattern = torch.tensor([[0, 1, 2, 4]])
    pad = torch.zeros(1, L - 4, dtype=torch.long)
    attend = torch.arange(L)[None] < 4
    at_start = model.predict(torch.cat([pattern, pad], 1), attend=attend)[:, :4]
    at_end = model.predict(torch.cat([pad, pattern], 1), attend=attend.flip(1))[:, -4:]
    torch.testing.assert_close(at_start, at_end)
    reversed_ = model.predict(torch.cat([pattern.flip(1), pad], 1), attend=attend)[:, :4].flip(1)
    assert not torch.allclose(at_start, reversed_)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_initial_weights_are_a_function_of_the_generator_alone(embedding):
    """Same seed, same bits; another seed, other weights; the global generator is not touched."""
    state = torch.get_rng_state()
    first = build(embedding, seed=3).state_dict()
    torch.rand(5)
    second, other = build(embedding, seed=3).state_dict(), build(embedding, seed=4).state_dict()
    torch.set_rng_state(state)
    build(embedding)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert value.ndim == 1 or not torch.equal(value, other[name])


def test_initial_predictions_are_near_uniform_but_not_equal():
    """Before training every token has probability 1 / V to within a third of it."""
    probs = build(spread=False).predict(canvas()).softmax(-1)
    assert 0 < (probs * V - 1).abs().max() < 1 / 3


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_all_parameters_get_a_gradient(embedding):
    """Nothing in the network is unused."""
    model = build(embedding)
    (model.predict(canvas()) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_float32_and_bf16_autocast_agree_with_float64(embedding):
    """The same network in each precision, to that precision."""
    exact = build(embedding)
    single = build(embedding).float()
    x_t, attend = canvas(), torch.arange(L)[None].expand(B, L) < 5
    expected = exact.predict(x_t, attend=attend)
    scale = expected.abs().max().item()
    float32 = single.predict(x_t, attend=attend)
    torch.testing.assert_close(float32.double(), expected, rtol=0, atol=1e-5 * scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = single.predict(x_t, attend=attend)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.03 * scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10, "heads": 4}, "width 10 is not a multiple of heads 4"),
        ({"width": 6, "heads": 2, "position_embedding": "rotary"}, "must be even, got 6 / 2"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    """The message names the field and what it was."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TransformerConfig(vocab_size=V, length=L), **change)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_canvas_longer_than_the_model_is_refused(embedding):
    """A position that was never trained has no embedding."""
    with pytest.raises(ValueError, match=f"canvas of {L + 1} positions; .* at most {L}"):
        build(embedding).predict(torch.zeros(1, L + 1, dtype=torch.long))
