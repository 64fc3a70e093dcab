"""Your own algorithm: one dataclass; then ask by enumeration what its gradient is. Also a recipe.

    python examples/your_own_algorithm.py
    rescore train examples/your_own_algorithm.py --algorithm.keep 1

The fields of the dataclass are options of the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rescore import (
    Actions,
    Algorithm,
    Credited,
    Decoder,
    Evaluate,
    Models,
    Optim,
    Pretrain,
    Record,
    Run,
    Scored,
    Sudoku,
    Terms,
    TransformerConfig,
)
from rescore.algorithms.base import check_group
from rescore.objectives.advantages import centre
from rescore.objectives.policy_gradient import score_function
from rescore.proof.oracle import exact_gradient, expectation
from rescore.proof.worlds import World
from rescore.sampling.rng import Rng


# --8<-- [start:algorithm]
@dataclass(frozen=True, kw_only=True)
class Winners(Algorithm):
    """Learn from the samples that beat the others of their group, and ignore the rest."""

    keep: float = 0.0
    """Weight of the samples that did not: 0 ignores them, 1 is REINFORCE with leave-one-out."""

    citation: ClassVar[str] = "@misc{winners, title = {An example of rescore}}"

    @property
    def record(self) -> Record:
        """What the sampler must save besides paths and log-probabilities: nothing."""
        return Record()

    @property
    def on_policy(self) -> bool:
        """The loss has no ratio, so a rollout serves one update."""
        return True

    def check(self, decoder: Decoder, group_size: int, terms: Sequence[str]) -> None:
        """Refuse what cannot work, before anything is loaded."""
        super().check(decoder, group_size, terms)
        check_group("leave-one-out", group_size, "another baseline")

    def credit(self, scored: Scored) -> Credited:
        """From rewards to advantages and weights: sees the whole batch, but no model."""
        returns = scored.reward[:, None].expand_as(scored.step_weight)
        advantage = centre(returns, scored.trajectory.prompts.group, "leave_one_out")
        advantage = torch.where(advantage > 0, advantage, self.keep * advantage)
        active = (advantage != 0) & (scored.trajectory.revealed() > 0)
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        return Credited(**scored.fields(), advantage=advantage, weight=weight)

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        """From actions to an unreduced loss: sees the models, but not the batch."""
        new = models.new.transition(actions.trajectory, actions.step, self.record.score)
        return score_function(new.log_prob, actions.log_prob_old, actions.advantage)


# --8<-- [end:algorithm]


def recipe() -> Run:
    """Winners on 4x4 Sudoku."""
    task = Sudoku(side=4, blanks=(6, 6), pool=512)
    shape = TransformerConfig(vocab_size=task.vocab_size, length=task.length, width=32, depth=2)
    return Run(
        task=task,
        base=Pretrain(model=shape, steps=150, warmup=10, lr=3e-3),
        decoder=Decoder(steps=3),
        algorithm=Winners(),
        steps=30,
        batch_size=128,
        optim=Optim(lr=1e-3, warmup=2),
        evaluate=Evaluate(n=64, n_test=256),
    )


if __name__ == "__main__":
    # --8<-- [start:proof]
    world = World(vocab_size=3, length=3, steps=3, blocks=1, network="mlp")
    decoder = world.decoder("random", 1.0)
    exact = exact_gradient(world, decoder)
    for keep in (0.0, 0.5, 1.0):
        mean = expectation(Winners(keep=keep), world, decoder).mean
        bias = (mean - exact).norm() / exact.norm()
        cosine = torch.cosine_similarity(mean, exact, dim=0)
        print(f"keep = {keep:3}: bias {bias:.1e}, cosine with the exact gradient {cosine:.3f}")
    # --8<-- [end:proof]

    from rescore.cli import main

    main(["train", __file__, *sys.argv[1:]])
