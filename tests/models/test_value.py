from __future__ import annotations

import math

import pytest
import torch

from rescore.models.value import (
    Design,
    ValueConv,
    ValueCritic,
    ValueMlp,
    coefficients,
    time_features,
    value_critic_for,
)

DESIGNS: tuple[Design, ...] = ("cos_sin", "linear", "constant", "plain")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(outputs, given):
    return outputs.flatten(1)[:, 0]


def critic(design: Design = "plain", shape=(2,), inputs=None, n_labels=0):
    reward = None if design == "plain" else first
    inputs = {} if inputs is None else inputs
    return value_critic_for(shape, inputs, n_labels=n_labels, design=design, reward=reward, seed=3)


@pytest.mark.parametrize(
    ("design", "middle"),
    [
        ("cos_sin", (math.sqrt(0.5), math.sqrt(0.5))),
        ("linear", (0.5, 0.5)),
        ("constant", (1.0, 1 - math.sqrt(0.5))),
        ("plain", (0.0, 1.0)),
    ],
)
def test_coefficients_by_hand(design, middle):
    skip, out = coefficients(design, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert (skip[1].item(), out[1].item()) == pytest.approx(middle, abs=1e-12)
    if design != "plain":
        assert (skip[0].item(), out[0].item()) == (1.0, 0.0)
    if design in ("cos_sin", "linear", "plain"):
        assert (skip[2].item(), out[2].item()) == pytest.approx((0.0, 1.0), abs=1e-12)


@pytest.mark.parametrize("design", DESIGNS[:3])
def test_the_data_end_is_exact_whatever_was_learned(design):
    value, x = critic(design), torch.randn(5, 2, generator=generator())
    skip = torch.randn(5, generator=generator(1))
    states = by_number(x, torch.rand(5, generator=generator(2)), {})
    value.fit(states, skip, torch.full((5,), 9.0), **HOW)
    assert torch.equal(value.value(x, torch.zeros(5), {}, skip), skip)
    assert not torch.allclose(value.value(x, torch.full((5,), 0.5), {}, skip), skip)


HOW = {"lr": 0.01, "epochs": 3, "batch": 2}


def by_number(x, t, inputs):
    """What ``fit`` asks for states."""
    return lambda rows: (x[rows], t[rows], {name: given[rows] for name, given in inputs.items()})


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (2, 12, 12)])
def test_it_learns_a_function_of_state_time_and_label(shape):
    """After a fit the share of variance explained, told by the next fit, is above 0.9."""
    rows = 150
    x = torch.randn(rows, *shape, generator=generator())
    t = torch.rand(rows, generator=generator(1))
    label = torch.randint(3, (rows,), generator=generator(2))
    inputs = {"label": label, "text": torch.randn(rows, 4, 5, generator=generator(4))}
    mean = x.flatten(1).mean(1) * math.sqrt(x[0].numel())
    target = 100 + 7 * (mean + t + label + inputs["text"].mean((1, 2)) * 3)
    value = critic(shape=shape, inputs=inputs, n_labels=3)
    how = {"lr": 1e-2, "epochs": 25, "batch": 30}
    before = value.fit(by_number(x, t, inputs), None, target, **how)
    after = value.fit(by_number(x, t, inputs), None, target, **{**how, "epochs": 1})
    assert before < 0.9 < after
    assert int(value.fitted) == 2


def test_the_same_seed_and_batches_give_the_same_critic_and_it_restores():
    def fitted():
        value = critic("linear")
        x, t = torch.randn(9, 2, generator=generator()), torch.rand(9, generator=generator(1))
        target, skip = x.sum(1), x[:, 0]
        value.fit(by_number(x, t, {}), skip, target, **HOW)
        return value, (x, t, skip, target)

    one, (x, t, skip, target) = fitted()
    two, _ = fitted()
    other = critic("linear")
    other.restore({name: tensor.clone() for name, tensor in two.saved().items()})
    for value in (one, other):
        value.fit(by_number(x, t, {}), skip, target, **HOW)
    assert torch.equal(one.value(x, t, {}, skip), other.value(x, t, {}, skip))
    assert int(other.fitted) == 2


def test_the_order_of_states_is_that_of_seed_and_fit():
    """Every state once per pass; another seed, pass or fit has another order."""

    def orders(seed, n_fits):
        value, seen = ValueCritic(critic().body, "plain", seed=seed), []
        x, t = torch.randn(8, 2, generator=generator()), torch.zeros(8)

        def look(rows):
            seen.append(rows.tolist())
            return x[rows], t[rows], {}

        for _ in range(n_fits):
            value.fit(look, None, x[:, 0], lr=1e-2, epochs=2, batch=8)
        return seen

    first, other = orders(0, 2), orders(1, 1)
    assert first == orders(0, 2)
    assert all(sorted(order) == list(range(8)) for order in first)
    assert len({tuple(order) for order in [*first, *other]}) == 6


def test_values_are_float32_also_where_states_are_not_and_under_autocast():
    value, x = critic(), torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    t = torch.full((3,), 0.3, dtype=torch.float64)
    plain = value.value(x, t, {}, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value.value(x, t, {}, None), plain)
    assert plain.dtype == torch.float32


def test_the_gradient_reaches_the_state_through_both_parts():
    value, x = critic("linear"), torch.randn(4, 2, generator=generator()).requires_grad_()
    t = torch.full((4,), 0.5)
    (slope,) = torch.autograd.grad(value.value(x, t, {}, first(x, None)).sum(), x)
    (learned,) = torch.autograd.grad(value.value(x, t, {}, torch.zeros(4)).sum(), x)
    torch.testing.assert_close(slope - learned, torch.tensor([[0.5, 0.0]]).expand(4, -1))


def test_a_reward_goes_with_every_design_but_plain():
    body = ValueMlp(2, {}, n_labels=0, generator=generator())
    with pytest.raises(ValueError, match="'plain' was given a reward"):
        ValueCritic(body, "plain", first)
    with pytest.raises(ValueError, match="'linear' was given no reward"):
        ValueCritic(body, "linear")


def test_convolutions_serve_images_and_perceptrons_the_rest():
    assert isinstance(critic(shape=(1, 8, 8)).body, ValueConv)
    assert isinstance(critic(shape=(3,)).body, ValueMlp)


def test_time_features_tell_times_apart():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    features = time_features(t)
    assert features.shape == (101, 9)
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 0.01


def test_a_first_batch_of_equal_targets_leaves_the_scale_open():
    """Sparse rewards: all 0 at first, then 0 and 1."""
    value, rows = critic(), 64
    x, t = torch.randn(rows, 2, generator=generator()), torch.rand(rows, generator=generator(1))
    how = {"lr": 1e-2, "epochs": 20, "batch": 16}
    value.fit(by_number(x, t, {}), None, torch.zeros(rows), **how)
    assert not value.scaled and float(value.spread) == 1
    target = (x[:, 0] > 0).float()
    value.fit(by_number(x, t, {}), None, target, **how)
    assert value.scaled and float(value.spread) == pytest.approx(0.5, abs=0.02)
    assert value.fit(by_number(x, t, {}), None, target, **how) > 0.5
    one = critic()
    one.fit(by_number(x[:1], t[:1], {}), None, target[:1], **how)
    assert one.value(x, t, {}, None).isfinite().all()


def test_a_critic_that_diverges_is_named():
    value, x = critic(), torch.randn(64, 2, generator=generator())
    states = by_number(x, torch.full((64,), 0.5), {})
    with pytest.raises(ValueError, match=r"lower its learning rate \(critic_lr=1e\+30\)"):
        value.fit(states, None, x[:, 0], lr=1e30, epochs=4, batch=16)
    with pytest.raises(ValueError, match="rewards that are not finite"):
        critic().fit(states, None, torch.full((64,), math.nan), lr=1e-3, epochs=1, batch=16)
