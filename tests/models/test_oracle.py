"""The convolutional ensemble that oracles are made of."""

from __future__ import annotations

import pytest
import torch

from rescore.models.oracle import ConvolutionalEnsemble


def ensemble(members: int = 3, **options) -> ConvolutionalEnsemble:
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    made = ConvolutionalEnsemble(
        4, generator=generator, members=members, channels=5, width=6, dtype=torch.float64, **options
    )
    made.weight_out.data = torch.randn(made.weight_out.shape, generator=generator).double()
    return made


def sequences(n: int = 7, length: int = 40) -> torch.Tensor:
    return torch.randint(4, (n, length), generator=torch.Generator().manual_seed(1))


def test_members_do_not_see_each_other():
    """What a member says is what a network of its weights alone says."""
    whole, tokens = ensemble(), sequences()
    said = whole(tokens)
    assert said.shape == (7, 3)
    for member in range(3):
        alone, rows = ensemble(members=1), slice(5 * member, 5 * member + 5)
        for name in ("weight_1", "bias_1", "weight_2", "bias_2"):
            getattr(alone, name).data = getattr(whole, name).data[rows]
        for name in ("weight_out", "bias_out"):
            getattr(alone, name).data = getattr(whole, name).data[member : member + 1]
        torch.testing.assert_close(alone(tokens)[:, 0], said[:, member])


def test_rows_do_not_see_each_other():
    whole, tokens = ensemble(), sequences()
    torch.testing.assert_close(whole(tokens)[2:3], whole(tokens[2:3]))


def test_untrained_it_says_the_offset():
    """The read-out starts at 0."""
    made = ConvolutionalEnsemble(4, generator=torch.Generator().manual_seed(0), offset=1.5)
    assert (made(sequences()) == 1.5).all()


def test_filters_start_from_patterns():
    """The first channels of a member are the patterns, answering from 1 on; the rest is noise."""
    patterns = torch.arange(48.0).reshape(2, 4, 6)
    made, free = ensemble(filters=patterns), ensemble()
    for member in range(3):
        start = 5 * member
        assert torch.equal(made.weight_1[start : start + 2], patterns.double())
        assert (made.bias_1[start : start + 2] == -1).all()
        assert torch.equal(
            made.weight_1[start + 2 : start + 5], free.weight_1[start + 2 : start + 5]
        )
        assert (made.bias_1[start + 2 : start + 5] == 0).all()


@pytest.mark.parametrize("shape", [(6, 4, 6), (2, 4, 7), (2, 3, 6)])
def test_filters_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"at most 5 of \(4, 6\)"):
        ensemble(filters=torch.zeros(shape))


@pytest.mark.parametrize("token", [4, -1])
def test_a_token_outside_the_vocabulary_is_named(token):
    tokens = sequences()
    tokens[3, 17] = token
    with pytest.raises(ValueError, match=f"token {token} at position 17 of sequence 3"):
        ensemble()(tokens)


def test_the_weights_come_from_the_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(ensemble(seed=4).weight_1, ensemble(seed=4).weight_1)
    assert not torch.equal(ensemble(seed=4).weight_1, ensemble(seed=5).weight_1)
    assert torch.equal(torch.get_rng_state(), before)
