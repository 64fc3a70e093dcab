"""Parts of a batch: all rows once and in order, fewer at a time when memory ends."""

import pytest
import torch
from torch import Tensor

from rescore.sampling.chunks import over_rows


def summer(room: int, seen: list[int]):
    """A function of rows that fits ``room`` of them into memory."""

    def function(rows: Tensor) -> list[int]:
        seen.append(len(rows))
        if len(rows) > room:
            raise torch.OutOfMemoryError("full")
        return rows.tolist()

    return function


@pytest.mark.parametrize("n_rows", [0, 1, 6, 7])
@pytest.mark.parametrize("at_most", [1, 3, 10])
def test_every_row_once_and_in_order(n_rows, at_most):
    """The parts are the rows in order, none longer than allowed."""
    seen = []
    parts = over_rows(summer(10, seen), n_rows, at_most=at_most)
    assert [row for part in parts for row in part] == list(range(n_rows))
    assert max(seen, default=0) <= at_most


def test_parts_are_halved_until_they_fit():
    """8 do not fit, 4 do not, 2 do; larger ones are not tried again."""
    seen = []
    parts = over_rows(summer(3, seen), 9, at_most=8)
    assert [row for part in parts for row in part] == list(range(9))
    assert seen == [8, 4, 2, 2, 2, 2, 1]


def test_a_single_row_that_does_not_fit_is_an_error():
    """There is nothing left to halve."""
    with pytest.raises(torch.OutOfMemoryError):
        over_rows(summer(0, []), 2, at_most=2)
