"""What an update costs: network rows as the page of EGSPO says, and memory that may end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.models.denoiser import Denoiser
from rescore.sampling.policy import MaskedPolicy, Models, Policy
from rescore.training.optim import Optim
from rescore.training.rollout import rollout
from rescore.training.run import Run
from rescore.training.update import update
from rescore.training.world import World
from tiny import masked_policy, tiny_run, tiny_world

B, T, K = 16, 3, 2
SA = {"lam": 0.5}


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(
    ("changes", "annotated", "per_pair"),
    [
        ({"beta": 0.0}, 0, 1),
        ({"beta": 0.0, **SA}, 0, 1),  # completions are read off the rollout
        ({"beta": 0.1}, B * K, 1),
        ({"beta": 0.1, "kl": "exact"}, 0, 2),
        ({"beta": 0.0, "selection": "importance", **SA}, 0, 1),
        ({"beta": 0.0, "selection": "all", **SA}, 0, 1),
        ({"beta": 0.1, "selection": "all", **SA}, B * T, 1),
        ({"beta": 0.0, "selection": "adaptive"}, 0, 1),
    ],
)
def test_network_rows_of_a_step(changes, annotated, per_pair, epochs):
    """B T for the rollout, B K once for a sampled KL, then one row per pair and epoch, or two."""
    run = tiny_run(algorithm=Egspo(n_steps=K, **changes), optim=Optim(epochs=epochs))
    world = tiny_world(run)
    scored, _ = rollout(world, 0)
    assert world.network_rows() == B * T + annotated
    credited = run.algorithm.credit(scored)
    update(world, credited, 0)
    n_pairs = len(credited.pairs())
    assert 0 < n_pairs <= credited.weight.numel()
    assert world.network_rows() == B * T + annotated + epochs * per_pair * n_pairs


def test_adaptive_completions_cost_a_row_each():
    """Their states are rebuilt after the rollout: one row for every step selected."""
    run = tiny_run(algorithm=Egspo(selection="adaptive", beta=0.0, lam=0.5))
    world = tiny_world(run)
    scored, _ = rollout(world, 0)
    selected = int((scored.step_weight != 0).sum())
    assert B < selected < B * T
    assert world.network_rows() == B * T + selected


@dataclass
class Cramped:
    """A denoiser on a device with room for a few rows."""

    network: Denoiser
    room: int
    largest: int = 0

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        if len(x_t) > self.room:
            raise torch.OutOfMemoryError("full")
        self.largest = max(self.largest, len(x_t))
        return self.network.predict(x_t, attend=attend, positions=positions)


def cramped(policy: Policy, room: int) -> MaskedPolicy:
    """The policy on such a device."""
    own = masked_policy(policy)
    return replace(own, denoiser=Cramped(own.denoiser, room))


def weights_after(run: Run, room: int | None) -> tuple[Tensor, dict[str, float]]:
    """Parameters and metrics after one step with room for so many rows."""
    world: World = tiny_world(run)
    if room is not None:
        new = cramped(world.models.new, room)
        ref = world.models.ref
        world.models = Models(new=new, ref=None if ref is None else cramped(ref, room))
    scored, _ = rollout(world, 0)
    metrics = update(world, run.algorithm.credit(scored), 0)
    return torch.cat([p.detach().flatten() for p in world.module.parameters()]), metrics


@pytest.mark.parametrize("algorithm", [Reinforce(), Egspo(n_steps=2, beta=0.1, lam=0.5)])
@pytest.mark.parametrize("room", [5, 1])
def test_a_batch_that_does_not_fit_is_cut_and_gives_the_same(algorithm, room):
    """Weights and metrics to 1e-12, however little fits; nothing of a failed part is left."""
    run = tiny_run(algorithm=algorithm)
    whole, whole_metrics = weights_after(run, None)
    cut, metrics = weights_after(run, room)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
    assert metrics == pytest.approx(whole_metrics, abs=1e-12)


def test_memory_for_not_even_one_row_is_an_error():
    """There is nothing left to cut."""
    with pytest.raises(torch.OutOfMemoryError):
        weights_after(tiny_run(), 0)
