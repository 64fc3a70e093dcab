"""What is the expected gradient of an algorithm? On a small enough world it can be enumerated.

    python examples/enumerate_the_gradient.py

`rescore verify` does this for every algorithm, option and reveal order.
"""

from __future__ import annotations

import itertools

import torch

from rescore import Decoder, Egspo, MaskedPolicy, MaskedTrajectory, Prompts, Reinforce, Score
from rescore.models.tiny import MlpDenoiser
from rescore.proof.oracle import exact_gradient, expectation
from rescore.proof.worlds import World

# 1. By hand. Two positions, three tokens, left to right, one token per step: nine outputs, and one
#    path to each. Any reward will do.
V, L = 3, 2
network = MlpDenoiser(V, L, generator=torch.Generator().manual_seed(0))
policy = MaskedPolicy(network, Decoder(steps=2, order="left_to_right", temperature=0.7))
x_0 = torch.tensor(list(itertools.product(range(V), repeat=L)))
reward = torch.rand(len(x_0), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

# 2. A path is its output and one reveal rank per position: step * L + place within the step.
number = torch.arange(len(x_0))
paths = MaskedTrajectory(
    prompts=Prompts(
        tokens=torch.full_like(x_0, network.mask_id),
        editable=torch.ones_like(x_0, dtype=torch.bool),
        group=number,
        sample_id=number,
        info={},
    ),
    x_0=x_0,
    rank=torch.tensor([[0, L]]).expand(len(x_0), -1),
    log_prob=torch.zeros(len(x_0), 2, dtype=torch.float64),
    max_revealed=1,
    max_candidates=2,
)

# 3. Both steps of every path, scored by the code that trains; their sum is log p(path).
steps = [policy.transition(paths, torch.full((len(x_0),), k), Score()).log_prob for k in range(2)]
log_prob = torch.stack(steps).sum(0)
probability = log_prob.exp()
print(f"the probabilities of the {len(x_0)} paths sum to {probability.sum():.12f}")


def gradient(value: torch.Tensor) -> torch.Tensor:
    """With respect to all parameters, as one vector."""
    parts = torch.autograd.grad(value, list(network.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


# 4. The exact gradient of E[reward], and what REINFORCE steps along on average.
exact = gradient((probability * reward).sum())
reinforce = gradient((probability.detach() * reward * log_prob).sum())
print(f"REINFORCE differs from the exact gradient by {(reinforce - exact).norm():.1e}\n")

# 5. The same for whole algorithms. `expectation` runs their own select, credit and loss on every
#    group of two paths and every selection of steps; no formula is written twice.
world = World(vocab_size=3, length=3, steps=2, blocks=1, network="mlp")
candidates = {
    "REINFORCE, no baseline": Reinforce(baseline="none"),
    "REINFORCE, leave-one-out": Reinforce(baseline="leave_one_out"),
    "REINFORCE, group mean": Reinforce(baseline="group_mean"),
    "EGSPO, best of 2 steps": Egspo(n_steps=1, baseline="leave_one_out", beta=0),
    "EGSPO, 1 step by importance": Egspo(
        n_steps=1, selection="importance", baseline="leave_one_out", beta=0
    ),
}
for order in ("random", "low_confidence"):
    decoder = world.decoder(order, 1.0)
    exact = exact_gradient(world, decoder)
    print(f"{world}, {order} order     bias   length   cosine")
    for label, algorithm in candidates.items():
        mean = expectation(algorithm, world, decoder).mean
        bias = (mean - exact).norm() / exact.norm()
        cosine = torch.cosine_similarity(mean, exact, dim=0)
        length = mean.norm() / exact.norm()
        print(f"  {label:28} {bias:9.1e} {length:8.3f} {cosine:8.3f}")
print(
    "\nA group mean that contains the sample halves the gradient in groups of two. With"
    "\nlow_confidence, which positions are revealed depends on the network, and a score that counts"
    "\nonly the tokens is biased; Score(form='tokens_and_selection') is not."
)
