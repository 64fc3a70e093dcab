"""Adapters, the frozen reference and averaged weights."""

import sys

import pytest
import torch
from torch import nn

from rescore.models.denoiser import Denoiser
from rescore.models.finetune import (
    Ema,
    Lora,
    WithoutAdapters,
    add_lora,
    has_adapters,
    reference,
    trainable_state,
)
from rescore.models.tiny import MlpDenoiser
from rescore.models.transformer import Transformer, TransformerConfig
from tiny import denoiser

V, L = 4, 5
LORA = Lora(rank=3, alpha=12, targets=("qkv", "down"))


def build(dtype=torch.float32):
    config = TransformerConfig(vocab_size=V, length=L, width=16, depth=2, heads=2)
    return Transformer(config, generator=torch.Generator().manual_seed(0)).to(dtype)


def adapted(seed=1, dtype=torch.float32):
    return add_lora(build(dtype), LORA, generator=torch.Generator().manual_seed(seed))


def canvas():
    return torch.randint(V + 1, (6, L), generator=torch.Generator().manual_seed(2))


def train(module, steps=3):
    """A few large optimiser steps on an arbitrary loss."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        module.predict(canvas())[..., 0].sum().backward()
        optimizer.step()


def test_adapters_start_as_the_identity_and_keep_the_class():
    """B = 0: predictions are those of the base bit for bit, and predict is still there."""
    module = adapted()
    assert isinstance(module, Transformer)
    assert has_adapters(module)
    assert not has_adapters(build())
    assert torch.equal(module.predict(canvas()), build().predict(canvas()))


def test_only_adapters_train_and_only_on_the_targets():
    """Two matrices per target and block; everything else is frozen."""
    state = trainable_state(adapted())
    assert len(state) == 2 * 2 * len(LORA.targets)
    for name, value in state.items():
        assert ("lora_A" in name and value.shape[0] == 3) or (
            "lora_B" in name and value.shape[1] == 3
        )
        assert any(f".{target}." in name for target in LORA.targets)


def test_an_adapted_layer_is_w_plus_alpha_over_r_b_a():
    """The forward pass of the layer, written out in float64."""
    layer = adapted(dtype=torch.float64).blocks[0].get_submodule("qkv")
    a = layer.get_parameter("lora_A.default.weight")
    b = layer.get_parameter("lora_B.default.weight")
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(3))
    x = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weight = layer.get_parameter("base_layer.weight") + LORA.alpha / LORA.rank * b @ a
    expected = x @ weight.T + layer.get_parameter("base_layer.bias")
    torch.testing.assert_close(layer(x), expected)


def test_adapter_weights_are_a_function_of_the_generator_alone():
    """Same seed, same bits; another seed, other A; the global generator is not touched."""
    state = torch.get_rng_state()
    first = trainable_state(adapted(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    second, other = trainable_state(adapted(1)), trainable_state(adapted(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert ("lora_B" in name) == torch.equal(value, other[name])
        if "lora_A" in name:
            assert value.abs().max() <= value.shape[1] ** -0.5
            assert value.abs().max() > 0.5 * value.shape[1] ** -0.5
            assert bool((value < 0).any()) and bool((value > 0).any())


def test_reference_is_the_base_bit_for_bit_while_the_adapted_network_moves():
    """Training the adapters changes the policy and never its reference."""
    module = adapted()
    ref = reference(module)
    base = build().predict(canvas())
    train(module)
    assert isinstance(ref, WithoutAdapters)
    assert isinstance(ref, Denoiser)
    assert (ref.vocab_size, ref.mask_id) == (V, V)
    assert torch.equal(ref.predict(canvas()), base)
    assert not torch.allclose(module.predict(canvas()), base, atol=1e-2)


def test_reference_passes_padding_and_rows_on():
    """attend and positions mean the same as on the network itself."""
    attend = torch.arange(L)[None].expand(6, L) < 3
    positions = torch.tensor([[2, 0]]).expand(6, 2)
    expected = build().predict(canvas(), attend=attend, positions=positions)
    module = adapted()
    train(module)
    got = denoiser(reference(module)).predict(canvas(), attend=attend, positions=positions)
    assert torch.equal(got, expected)


def test_asking_the_reference_between_forward_and_backward_leaves_the_gradient_alone():
    """A KL term evaluates the reference inside the loss; adapters still get their gradient."""
    module, plain = adapted(), adapted()
    train(module)
    train(plain)
    ref = denoiser(reference(module))
    loss = module.predict(canvas())[..., 0].sum()
    logits_ref = ref.predict(canvas())
    assert not logits_ref.requires_grad
    module.zero_grad()
    loss.backward()
    plain.zero_grad()
    plain.predict(canvas())[..., 0].sum().backward()
    assert trainable_state(module).keys() == trainable_state(plain).keys()
    for parameter, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if expected.grad is not None and parameter.grad is not None:
            assert torch.equal(parameter.grad, expected.grad)
            assert bool((parameter.grad != 0).any())


def test_adapters_come_back_on_when_the_reference_raises():
    """A failed prediction must not leave the policy without its adapters."""
    module = adapted()
    train(module)
    before = module.predict(canvas())
    with pytest.raises(ValueError, match="canvas of"):
        denoiser(reference(module)).predict(torch.zeros(1, L + 1, dtype=torch.long))
    assert torch.equal(module.predict(canvas()), before)


def test_without_adapters_the_reference_is_a_frozen_copy():
    """It shares no memory, has no trainable parameter and stays while the network trains."""
    module = build()
    ref = reference(module)
    before = module.predict(canvas()).detach()
    train(module)
    assert isinstance(ref, Transformer)
    assert trainable_state(ref) == {}
    assert torch.equal(ref.predict(canvas()), before)
    assert not torch.allclose(module.predict(canvas()), before, atol=1e-2)
    assert len(trainable_state(module)) == len(list(module.parameters()))


def test_trainable_state_shares_memory_with_the_module():
    """It is a view for saving, not a copy, and carries no graph."""
    module = build()
    state = trainable_state(module)
    with torch.no_grad():
        module.head.bias.fill_(2.5)
    assert bool((state["head.bias"] == 2.5).all())
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_impossible_adapters_are_refused(fields, message):
    """The message names the field."""
    with pytest.raises(ValueError, match=message):
        Lora(**fields)


def test_each_target_must_name_a_layer():
    """A misspelt target is refused even beside a good one, and the real names are listed."""
    generator = torch.Generator()
    with pytest.raises(ValueError, match="'qvk' names no linear layer; there are .*'qkv'"):
        add_lora(build(), Lora(targets=("down", "qvk")), generator=generator)


def test_adapters_are_added_once():
    """A second set would train on top of the first, and the reference would lose both."""
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(adapted(), LORA, generator=torch.Generator())


def test_missing_peft_says_what_to_install(monkeypatch):
    """Without the extra the message is the pip command."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'pip install "rescore\[language\]"'):
        adapted()


def test_reference_needs_a_denoiser():
    """A plain module has no predict."""
    with pytest.raises(
        ValueError, match="Linear is no Denoiser .*predict.* no ScoreNetwork .* GaussianNetwork"
    ):
        reference(nn.Linear(2, 2))


def tiny():
    return MlpDenoiser(2, 2, generator=torch.Generator().manual_seed(0))


def test_ema_follows_its_formula():
    """a_n = d_n a_{n-1} + (1 - d_n) theta_n with d_n = min(decay, (1 + n) / (10 + n)), n from 0."""
    module = tiny()
    ema = Ema(module, decay=0.15)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for n, decay in enumerate([0.1, 0.15, 0.15]):  # 1/10, then 2/11 = 0.18 and 3/12 are capped
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.5 + n)
        ema.update()
        for name, p in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    with ema.swap():
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name])


def test_ema_warm_up_without_a_cap():
    """With decay near 1 the second update weighs the old average 2/11."""
    module = tiny()
    ema = Ema(module, decay=0.9999)
    with torch.no_grad():
        module.bias_out.fill_(3.0)
    ema.update()
    with torch.no_grad():
        module.bias_out.fill_(0.0)
    ema.update()
    with ema.swap():
        expected = torch.full_like(module.bias_out, 3.0 * (1 - 1 / 10) * 2 / 11)
        torch.testing.assert_close(module.bias_out.detach(), expected.detach())


def test_swap_gives_the_own_weights_back_bit_for_bit_even_after_an_error():
    """Evaluating the average leaves no trace."""
    module = tiny()
    ema = Ema(module, decay=0.9)
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        module.bias_in.add_(1.0)
    own["bias_in"] += 1.0
    with pytest.raises(KeyError), ema.swap():
        assert bool((module.bias_in == 0).all())
        raise KeyError
    for name, p in module.named_parameters():
        assert torch.equal(p.detach(), own[name])


def test_ema_averages_what_trains_only():
    """With LoRA, the adapters; the frozen base is neither copied nor written."""
    module = adapted()
    ema = Ema(module, decay=0.9)
    assert ema.state_dict().keys() == trainable_state(module).keys() | {"n_updates"}


def test_ema_continues_from_its_state_bitwise():
    """Save, load into a new one, update both: the same averages, warm-up included."""
    module = tiny()
    first, second = Ema(module, decay=0.9), Ema(module, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            module.weight_out.mul_(1.1)
        first.update()
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(saved)
    with torch.no_grad():
        module.weight_out.mul_(1.3)
    first.update()
    second.update()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert saved[name] is not second.state_dict()[name]


def test_bf16_parameters_are_averaged_in_float32():
    """A step smaller than bf16 can hold still moves the average."""
    module = tiny().bfloat16()
    ema = Ema(module, decay=0.999)
    with torch.no_grad():
        module.bias_in.fill_(1.0)
    for _ in range(4):
        ema.update()
    average = ema.state_dict()["bias_in"]
    product = 1 / 10 * 2 / 11 * 3 / 12 * 4 / 13
    torch.testing.assert_close(average, torch.full_like(average, 1 - product))
    assert average.dtype == torch.float32


def test_a_foreign_ema_state_is_refused():
    """Other names or other shapes: nothing is loaded."""
    ema = Ema(tiny(), decay=0.9)
    other = Ema(MlpDenoiser(2, 3, generator=torch.Generator()), decay=0.9).state_dict()
    with pytest.raises(
        ValueError, match="weight_in is missing on one side or differs in shape|bias_out"
    ):
        ema.load_state_dict(other)
    with pytest.raises(ValueError, match="n_updates"):
        ema.load_state_dict({k: v for k, v in ema.state_dict().items() if k != "n_updates"})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_lies_in_zero_to_one(decay):
    """decay = 1 would never move."""
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got"):
        Ema(tiny(), decay=decay)
