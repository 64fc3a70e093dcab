"""Large batches in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

Result = TypeVar("Result")


def over_rows(
    function: Callable[[Int[Tensor, " n"]], Result], n_rows: int, *, at_most: int
) -> list[Result]:
    """Apply ``function`` to consecutive row numbers, ``at_most`` at a time, fewer if memory ends.

    A part that does not fit into the memory of the device is halved and tried again, so
    ``function`` must not have changed anything when it fails.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    waiting = list(torch.arange(n_rows).split(at_most))[::-1] if n_rows else []
    results = []
    while waiting:
        part = waiting.pop()
        try:
            results.append(function(part))
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        at_most = (len(part) + 1) // 2
        torch.cuda.empty_cache()  # now that the failed part is forgotten; nothing without CUDA
        waiting = list(torch.cat([part, *waiting[::-1]]).split(at_most))[::-1]
    return results
