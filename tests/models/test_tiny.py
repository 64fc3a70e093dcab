"""The enumerable denoisers: every state has its own logits, or shares them smoothly."""

import itertools

import pytest
import torch

from rescore.models.denoiser import Denoiser
from rescore.models.tiny import MlpDenoiser, TableDenoiser

V, L = 2, 3
BOTH = (TableDenoiser, MlpDenoiser)


def build(kind, seed=0):
    return kind(V, L, generator=torch.Generator().manual_seed(seed))


def states():
    """All (V + 1)^L canvases, in the order of their numbers."""
    return torch.tensor(list(itertools.product(range(V + 1), repeat=L)))


@pytest.mark.parametrize("kind", BOTH)
def test_it_is_a_float64_denoiser(kind):
    """Mask token V, no logit for it, double precision."""
    model = build(kind)
    logits = model.predict(states())
    assert isinstance(model, Denoiser)
    assert (model.vocab_size, model.mask_id) == (V, V)
    assert logits.shape == ((V + 1) ** L, L, V)
    assert logits.dtype == torch.float64


def test_the_table_gives_each_state_its_own_row():
    """Enumerated in base V + 1, the predictions are the table itself."""
    model = build(TableDenoiser)
    assert model.table.shape == ((V + 1) ** L, L, V)
    assert torch.equal(model.predict(states()), model.table)


def test_the_gradient_of_a_table_entry_touches_no_other_state():
    """d logits[state] / d table is the identity on that state's entries and 0 elsewhere."""
    model = build(TableDenoiser)
    model.predict(states()[11:12])[0, 1, 0].backward()
    expected = torch.zeros_like(model.table)
    expected[11, 1, 0] = 1
    assert model.table.grad is not None
    assert torch.equal(model.table.grad, expected)


def test_the_mlp_is_the_formula_written_out():
    """W_out tanh(W_in onehot + b_in) + b_out, one state and one output at a time."""
    model = build(MlpDenoiser)
    with torch.no_grad():
        model.bias_in.normal_(generator=torch.Generator().manual_seed(1))
        model.bias_out.normal_(generator=torch.Generator().manual_seed(2))
    x_t = [2, 0, 1]
    columns = [position * (V + 1) + token for position, token in enumerate(x_t)]
    units = (model.weight_in[:, columns].sum(1) + model.bias_in).tanh()
    got = model.predict(torch.tensor([x_t]))[0]
    for position, token in itertools.product(range(L), range(V)):
        row = position * V + token
        expected = model.weight_out[row].dot(units) + model.bias_out[row]
        torch.testing.assert_close(got[position, token], expected)


@pytest.mark.parametrize("kind", BOTH)
def test_every_logit_depends_on_every_token(kind):
    """A denoiser that ignores part of the canvas would make enumeration tests too easy."""
    model = build(kind)
    grid = model.predict(states()).unflatten(0, (V + 1,) * L)
    for position in range(L):
        for a, b in itertools.pairwise(grid.unbind(position)):
            assert bool(((a - b).abs() > 1e-6).all())


@pytest.mark.parametrize("kind", BOTH)
def test_rows_asked_for_are_the_rows_of_the_full_prediction(kind):
    """predict(positions) equals gathering from predict()."""
    model = build(kind)
    positions = torch.tensor([[2, 0], [1, 1]])
    expected = model.predict(states()[3:5])[torch.arange(2)[:, None], positions]
    assert torch.equal(model.predict(states()[3:5], positions=positions), expected)


@pytest.mark.parametrize("kind", BOTH)
def test_padding_influences_nothing(kind):
    """Logits are the same whatever a padded position holds; attending to all changes nothing."""
    model, x_t = build(kind), states()
    attend = torch.ones_like(x_t, dtype=torch.bool)
    assert torch.equal(model.predict(x_t, attend=attend), model.predict(x_t))
    attend[:, 1] = False
    grid = model.predict(x_t, attend=attend).unflatten(0, (V + 1,) * L)
    assert torch.equal(grid, grid[:, :1].expand_as(grid))
    assert bool((grid[0] != grid[1]).any())


@pytest.mark.parametrize("kind", BOTH)
def test_weights_are_a_function_of_the_generator_alone(kind):
    """Same seed, same bits; another seed, other weights; the global generator is not touched."""
    state = torch.get_rng_state()
    logits = build(kind, seed=3).predict(states())
    assert torch.equal(logits, build(kind, seed=3).predict(states()))
    assert not torch.equal(logits, build(kind, seed=4).predict(states()))
    assert torch.equal(torch.get_rng_state(), state)


def test_scale_zero_makes_every_prediction_uniform():
    """The table's scale multiplies its logits."""
    model = TableDenoiser(V, L, generator=torch.Generator(), scale=0.0)
    assert torch.equal(model.predict(states()), torch.zeros((V + 1) ** L, L, V).double())


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("length", [L - 1, L + 1])
def test_a_canvas_of_another_length_is_refused(kind, length):
    """There is no table row for it."""
    with pytest.raises(ValueError, match=f"canvas of {length} positions; .* exactly {L}"):
        build(kind).predict(torch.zeros(1, length, dtype=torch.long))
