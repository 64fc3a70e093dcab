"""The whole pipeline in one loop, without the trainer: a model learns Sudoku by REINFORCE.

    python examples/loop_by_hand.py

`rescore train sudoku_reinforce` does the same with checkpoints, several processes and a report.
"""

from __future__ import annotations

import dataclasses

import torch

from rescore import (
    Credited,
    Decoder,
    MaskedPolicy,
    Models,
    Pretrain,
    Prompts,
    Reinforce,
    SampleRng,
    Scored,
    Sudoku,
    TransformerConfig,
)
from rescore.training.pretrain import pretrain

STEPS, PROMPTS, GROUP = 30, 16, 8
torch.set_num_threads(1)  # tiny networks are slower on several

# 1. A task: puzzles with one solution, split by solution grid. The reward is the fraction of blank
#    cells that are right.
task = Sudoku(side=4, blanks=(6, 6), pool=512)

# 2. A base model: a small bidirectional transformer that learned to fill in masked cells.
shape = TransformerConfig(vocab_size=task.vocab_size, length=task.length, width=32, depth=2)
network = pretrain(Pretrain(model=shape, steps=150, warmup=10, lr=3e-3), task).eval()

# 3. A policy is a network and the way it is decoded: here 3 steps, two cells in each, so that cells
#    revealed together cannot see each other. This is what RL has to learn to live with.
policy = MaskedPolicy(network, Decoder(steps=3, order="random", temperature=1.0))
models = Models(new=policy)

# 4. A method. The instance is its own configuration.
algorithm = Reinforce(baseline="leave_one_out")
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)


def prompts_of(step: int) -> Prompts:
    """Sixteen puzzles, eight samples of each; every sample has a number that names its noise."""
    number = (torch.arange(PROMPTS) + step * PROMPTS) % task.pool
    prompts = task.prompts("train", number.repeat_interleave(GROUP))
    n = PROMPTS * GROUP
    return dataclasses.replace(
        prompts,
        group=torch.arange(PROMPTS).repeat_interleave(GROUP),
        sample_id=torch.arange(n) + step * n,
    )


def reward_on_test() -> float:
    """Mean reward on puzzles whose solutions were never seen in training."""
    prompts = task.prompts("test", torch.arange(256))
    outputs = policy.sample(prompts, algorithm.record, SampleRng(1, prompts.sample_id)).x_0
    return task.reward.total(task.reward.terms(outputs, prompts)).mean().item()


print(f"before: {reward_on_test():.3f} of the blank cells of unseen puzzles are right")
for step in range(STEPS):
    # 5. Prompts -> trajectory: sampled without gradients; every step's log-probability is recorded.
    prompts = prompts_of(step)
    rng = SampleRng(0, prompts.sample_id)
    trajectory = policy.sample(prompts, algorithm.record, rng)

    # 6. -> selected -> scored: which steps count (here all), and what the outputs are worth.
    selected = algorithm.select(models, trajectory)
    terms = task.reward.terms(trajectory.x_0, prompts)
    scored = Scored(**selected.fields(), reward=task.reward.total(terms), terms=terms)

    # 7. -> credited: reward minus the mean of the others in the group, and the weight of each step.
    credited: Credited = algorithm.credit(scored)

    # 8. -> terms: the (sample, step) pairs that count, one network row each; the only gradients.
    actions = credited.actions(credited.pairs())
    terms = algorithm.loss(models, actions, rng)
    optimizer.zero_grad()
    (terms.loss * actions.weight).sum().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: training reward {scored.reward.mean():.3f}")
print(f"after:  {reward_on_test():.3f}")
