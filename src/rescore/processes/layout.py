"""Tables over the states of tokens, [..., S], and how they lie in memory.

Where the states are few, sums over the last axis and comparisons with it are many times slower
than the same work on S long rows. Such a table is kept as S rows and shown with its states last;
whatever is computed from it, element by element, lies in the same way.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

FEW_STATES = 16
"""Up to this many states a table lies as a row per state."""


def states_apart(table: Float[Tensor, "*B S"]) -> Float[Tensor, "*B S"]:
    """The same table, a row per state if these are few."""
    if table.shape[-1] > FEW_STATES:
        return table
    return table.movedim(-1, 0).contiguous().movedim(0, -1)


def log_softmax(table: Float[Tensor, "*B S"]) -> Float[Tensor, "*B S"]:
    """log softmax over the states, a row per state if these are few."""
    if table.shape[-1] > FEW_STATES:
        return table.log_softmax(-1)
    return table.movedim(-1, 0).log_softmax(0).movedim(0, -1)


def softmax(table: Float[Tensor, "*B S"]) -> Float[Tensor, "*B S"]:
    """softmax over the states, a row per state if these are few."""
    if table.shape[-1] > FEW_STATES:
        return table.softmax(-1)
    return table.movedim(-1, 0).softmax(0).movedim(0, -1)


def one_hot(x: Int[Tensor, "*B"], n_states: int, dtype: torch.dtype) -> Shaped[Tensor, "*B S"]:
    """1 at the state of every token and 0 elsewhere, a row per state if these are few."""
    state = torch.arange(n_states, device=x.device)
    if n_states > FEW_STATES:
        return (x[..., None] == state).to(dtype)
    return (x == state.view(-1, *(1,) * x.ndim)).to(dtype).movedim(0, -1)


def gather(table: Float[Tensor, "*B S"], state: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The entry at one state each; the gradient lies as the table does."""
    if table.shape[-1] > FEW_STATES:
        return table.gather(-1, state[..., None]).squeeze(-1)
    return table.movedim(-1, 0).gather(0, state[None]).squeeze(0)


def replaced(
    table: Float[Tensor, "*B S"], state: Int[Tensor, "*B"], value: Float[Tensor, "*B"] | float
) -> Float[Tensor, "*B S"]:
    """The table with another entry at one state each; the gradient lies as the table does."""
    if not isinstance(value, Tensor):
        value = table.new_full((), value).expand(state.shape)
    if table.shape[-1] > FEW_STATES:
        return table.scatter(-1, state[..., None], value[..., None])
    return table.movedim(-1, 0).scatter(0, state[None], value[None]).movedim(0, -1)
