"""One-step completions kept while sampling: the same steps as a choice made afterwards."""

import itertools

import pytest
import torch
from torch import Tensor

from rescore.models.tiny import MlpDenoiser
from rescore.objectives.advantages import entropy_proportional, top_steps
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record, Slots
from rescore.sampling.rng import SampleRng
from rescore.sampling.slots import CompletionSlots
from rescore.types import Completions, MaskedTrajectory, Prompts

V, L, T = 3, 6, 6


def draw(slots: Slots, n: int = 40) -> tuple[MaskedTrajectory, MaskedPolicy]:
    """Canvases of 1 to 6 blanks in 6 steps and two blocks: many steps reveal nothing."""
    editable = torch.arange(L)[None] >= (torch.arange(n) % L)[:, None]
    prompts = Prompts(
        tokens=torch.where(editable, V, torch.arange(L) % V),
        editable=editable,
        group=torch.arange(n),
        sample_id=torch.arange(n),
        info={},
    )
    denoiser = MlpDenoiser(V, L, generator=torch.Generator().manual_seed(4))
    policy = MaskedPolicy(
        denoiser, Decoder(steps=T, blocks=2, order="low_confidence", temperature=0.8)
    )
    record = Record(entropy=True, slots=slots)
    return policy.sample(prompts, record, SampleRng(0, prompts.sample_id)), policy


def offered(plan: Slots, entropy: Tensor, active: Tensor, seed: int = 0) -> Completions:
    """Offer the columns of ``entropy`` one after the other; completion of step t = t everywhere."""
    n = len(entropy)
    slots = CompletionSlots(plan, torch.full((n, 2), -7))
    rng = SampleRng(seed, torch.arange(n))
    for t in range(entropy.shape[1]):
        slots.offer(t, torch.full((n, 2), t), entropy[:, t], active[:, t], rng)
    return slots.completions()


@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_top_entropy_is_the_offline_choice(n_slots):
    """The active steps among the K of largest entropy, each once, -1 in the slots left over."""
    trajectory, _ = draw(Slots(n=n_slots, by="top_entropy"))
    assert trajectory.entropy is not None and trajectory.completions is not None
    active = trajectory.revealed() > 0
    entropy = trajectory.entropy.masked_fill(~active, -1.0)
    offline = top_steps(entropy, n_slots).tolist()
    for row, chosen, is_active in zip(
        trajectory.completions.step.tolist(), offline, active, strict=True
    ):
        kept = [t for t in chosen if bool(is_active[t])]
        assert sorted(row) == sorted(kept + [-1] * (n_slots - len(kept)))


@pytest.mark.parametrize("by", ["top_entropy", "reservoir"])
def test_completions_are_the_argmax_of_the_state_before_the_step(by):
    """x_hat_0 fills every mask of state(step), in all blocks, with its most probable token."""
    trajectory, policy = draw(Slots(n=3, by=by))
    assert trajectory.completions is not None
    for column in range(3):
        step = trajectory.completions.step[:, column]
        x_t = trajectory.state(step, V)
        filled = torch.where(x_t == V, policy.denoiser.predict(x_t).argmax(-1), x_t)
        untaken = (step < 0)[:, None]
        expected = torch.where(untaken, trajectory.prompts.tokens, filled)
        assert torch.equal(trajectory.completions.tokens[:, column], expected)


@pytest.mark.parametrize("n_slots", [1, 2, 3, 5])
def test_ties_go_to_the_earlier_step(n_slots):
    """All entropy tables over {0, 1, 2}^5 against a stable sort."""
    table = torch.tensor(list(itertools.product((0.0, 1.0, 2.0), repeat=5)))
    kept = offered(Slots(n=n_slots, by="top_entropy"), table, torch.ones_like(table).bool())
    assert torch.equal(kept.step.sort(1).values, top_steps(table, n_slots).sort(1).values)
    assert torch.equal(kept.tokens, kept.step[..., None].expand(-1, -1, 2))


@pytest.mark.parametrize("by", ["top_entropy", "reservoir"])
def test_inactive_steps_are_never_taken(by):
    """Every pattern of active steps, the inactive ones with the largest entropies."""
    active = torch.tensor(list(itertools.product((False, True), repeat=4)))
    entropy = torch.where(active, torch.tensor([0.3, 0.0, 0.7, 0.1]), 9.0)
    kept = offered(Slots(n=5, by=by), entropy, active)
    for row, is_active in zip(kept.step.tolist(), active.tolist(), strict=True):
        allowed = {t for t in range(4) if is_active[t]}
        if by == "top_entropy":
            assert set(row) == allowed | {-1}
        elif allowed:
            assert set(row) <= allowed
        else:
            assert set(row) == {-1}
    assert bool((kept.tokens[kept.step < 0] == -7).all())


def test_a_reservoir_draws_with_probability_proportional_to_entropy_plus_delta():
    """Each slot by itself, and two slots independently (with replacement): chi-square."""
    n, delta = 20_000, 0.5
    entropy = torch.tensor([1.0, 0.0, 4.0, 9.0, 2.0], dtype=torch.float64)
    active = torch.tensor([True, True, True, False, True])
    q = entropy_proportional(entropy[None], delta, active[None])[0]
    torch.testing.assert_close(q.sum(), torch.ones((), dtype=torch.float64))
    kept = offered(
        Slots(n=2, by="reservoir", delta=delta), entropy.expand(n, -1), active.expand(n, -1)
    )
    joint = torch.bincount(kept.step[:, 0] * 5 + kept.step[:, 1], minlength=25).double()
    expected = n * torch.outer(q, q).flatten()
    assert not bool(joint[expected == 0].any())
    used = expected > 0
    statistic = ((joint - expected)[used] ** 2 / expected[used]).sum()
    assert float(statistic) < 40  # 15 degrees of freedom
