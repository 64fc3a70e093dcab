"""Your own reward: one function. This file is also a recipe.

    python examples/your_own_reward.py
    rescore train examples/your_own_reward.py --steps 100 --seed 1

Every field of the run is an option of the command line.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from rescore import (
    Decoder,
    Evaluate,
    Optim,
    Pretrain,
    Prompts,
    Reinforce,
    Reward,
    Run,
    Sudoku,
    TransformerConfig,
)


# --8<-- [start:reward]
def row_validity(outputs: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """Fraction of rows in which no digit repeats: needs no solution, only the rules."""
    grid = outputs.unflatten(1, (4, 4)).sort(-1).values
    return (grid.diff(dim=-1) != 0).all(-1).float().mean(1)


@dataclass(frozen=True, kw_only=True)
class Rows(Sudoku):
    """Sudoku judged by its rows alone; the usual terms are reported, but count for nothing."""

    @property
    def reward(self) -> Reward:
        usual = super().reward
        functions = {**usual.functions, "row_validity": row_validity}
        return Reward(functions, {"row_validity": 1.0, "cell_accuracy": 0.0, "solve_rate": 0.0})


# --8<-- [end:reward]


def recipe() -> Run:
    """REINFORCE on the fraction of valid rows."""
    task = Rows(side=4, blanks=(6, 6), pool=512)
    shape = TransformerConfig(vocab_size=task.vocab_size, length=task.length, width=32, depth=2)
    return Run(
        task=task,
        base=Pretrain(model=shape, steps=150, warmup=10, lr=3e-3),
        decoder=Decoder(steps=3),
        algorithm=Reinforce(),
        steps=30,
        batch_size=128,
        optim=Optim(lr=1e-3, warmup=2),
        evaluate=Evaluate(by="row_validity", n=64, n_test=256),
    )


if __name__ == "__main__":
    from rescore.cli import main

    main(["train", __file__, *sys.argv[1:]])
