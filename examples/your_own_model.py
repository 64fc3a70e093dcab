"""Your own model: any object with `vocab_size`, `mask_id` and `predict`. Also a recipe.

    python examples/your_own_model.py
    rescore train examples/your_own_model.py --base.width 512

The fields of the base are options of the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rescore import Base, Decoder, Egspo, Evaluate, Optim, Run, Sudoku, Task
from rescore.objectives.denoising import masked_cross_entropy


# --8<-- [start:model]
class Reader(nn.Module):
    """Two hidden layers that read the whole canvas at once. Nothing of rescore is subclassed."""

    def __init__(self, vocab_size: int, length: int, width: int) -> None:
        super().__init__()
        self.vocab_size, self.mask_id = vocab_size, vocab_size
        inputs, outputs = length * (vocab_size + 1), length * vocab_size
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, outputs),
        )

    def predict(
        self, x_t: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits of the clean token at `positions`, or everywhere. Sudokus have no padding."""
        canvas = nn.functional.one_hot(x_t, self.vocab_size + 1).flatten(1)
        logits = self.layers(canvas.to(next(self.parameters())))
        logits = logits.unflatten(1, (x_t.shape[1], self.vocab_size))
        return logits if positions is None else logits.take_along_dim(positions[..., None], 1)


@dataclass(frozen=True, kw_only=True)
class ReaderBase(Base):
    """Where the weights come from: here a short training; yours may load a file."""

    width: int = 256
    """Units of each hidden layer."""
    steps: int = 150
    """Optimiser steps."""

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> Reader:
        """The same weights for the same arguments: runs are resumed and compared."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Reader(task.vocab_size, task.length, self.width)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        data = task.clean("train").x_0
        for _ in range(self.steps):
            x_0 = data[torch.randint(len(data), (128,), generator=generator)]
            t = torch.rand(len(x_0), generator=generator).clamp(min=0.05)
            masked = torch.rand(x_0.shape, generator=generator) < t[:, None]
            logits = model.predict(torch.where(masked, model.mask_id, x_0))
            loss = masked_cross_entropy(logits, x_0, masked, 1 / t).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        note(f"trained the base for {self.steps} steps")
        return model.to(device)


# --8<-- [end:model]


def recipe() -> Run:
    """EGSPO with a model of our own: two steps, three cells in each."""
    return Run(
        task=Sudoku(side=4, blanks=(6, 6), pool=512),
        base=ReaderBase(),
        decoder=Decoder(steps=2),
        algorithm=Egspo(n_steps=2, beta=0.0),
        steps=40,
        batch_size=128,
        optim=Optim(lr=1e-4, warmup=2),
        evaluate=Evaluate(n=64, n_test=256),
    )


if __name__ == "__main__":
    from rescore.cli import main

    main(["train", __file__, *sys.argv[1:]])
