"""Your own model: any object with `vocab_size`, `mask_id` and `predict`. Also a recipe.

    python examples/your_own_model.py
    rescore train examples/your_own_model.py --optim.lr 5e-4
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
        logits = self.layers(canvas.to(self.layers[0].weight.dtype))
        logits = logits.unflatten(1, (x_t.shape[1], self.vocab_size))
        return logits if positions is None else logits.take_along_dim(positions[..., None], 1)


@dataclass(frozen=True, kw_only=True)
class ReaderBase(Base):
    """Where the weights come from: here a short training; yours may load a file."""

    width: int = 256
    """Units of each hidden layer."""
    steps: int = 300
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
        data = task.clean("train")
        for step in range(self.steps):
            x_0 = data[torch.randint(len(data), (128,), generator=generator)]
            t = torch.rand(len(x_0), generator=generator).clamp(min=0.05)
            masked = torch.rand(x_0.shape, generator=generator) < t[:, None]
            logits = model.predict(torch.where(masked, model.mask_id, x_0))
            loss = masked_cross_entropy(logits, x_0, masked, 1 / t).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        note(f"base: {loss.item():.2f} nats per sequence after {step + 1} steps")
        return model.to(device)


# --8<-- [end:model]


def recipe() -> Run:
    """EGSPO on the 2 steps of highest entropy out of 4, with a model of our own."""
    return Run(
        task=Sudoku(side=4, blanks=(6, 8), pool=512),
        base=ReaderBase(),
        decoder=Decoder(steps=4),
        algorithm=Egspo(n_steps=2, beta=0.0),
        steps=20,
        batch_size=128,
        optim=Optim(lr=5e-4),
        evaluate=Evaluate(n=64, n_test=256),
    )


if __name__ == "__main__":
    from rescore.cli import main

    main(["train", __file__, *sys.argv[1:]])
