"""Tables of few and of many states: the same numbers, whatever their place in memory."""

import pytest
import torch

from rescore.processes.layout import (
    FEW_STATES,
    gather,
    log_softmax,
    one_hot,
    replaced,
    states_apart,
)


@pytest.mark.parametrize("n_states", [FEW_STATES, FEW_STATES + 1])
def test_tables_are_those_of_torch_and_so_are_their_gradients(n_states):
    """Only where they lie differs: few states outermost, also in what is computed from them."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 3, n_states, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 3, n_states, generator=generator, dtype=torch.float64)
    x = torch.randint(0, n_states, (2, 3), generator=generator)
    value = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    index, table = x[..., None], table.requires_grad_()
    cases = [
        (states_apart(table), table),
        (log_softmax(table), table.log_softmax(-1)),
        (replaced(table, x, value), table.scatter(-1, index, value[..., None])),
        (replaced(table, x, 7.0), table.scatter(-1, index, 7.0)),
        (gather(table, x)[..., None], table.gather(-1, index)),
    ]
    for found, expected in cases:
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad((weight * y).sum(), table)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)
    hot = one_hot(x, n_states, torch.float32)
    assert torch.equal(hot, torch.nn.functional.one_hot(x, n_states).float())
    outermost = n_states == FEW_STATES
    for laid in (*(found for found, _ in cases[:4]), hot):
        assert (laid.stride(-1) > 1) == outermost
