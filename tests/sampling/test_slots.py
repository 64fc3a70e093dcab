"""Steps kept while sampling: the same ones as a choice made afterwards, by the law it names."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rescore.models.tiny import MlpDenoiser
from rescore.proof.oracle import EnumeratingRng
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record, Slots
from rescore.sampling.rng import Rng, SampleRng
from rescore.sampling.slots import StepSlots, evenly_spaced, random_steps, some_steps
from rescore.types import Kept, MaskedTrajectory, Prompts

V, L, T = 3, 6, 6
every_choice = pytest.mark.parametrize("by", ["top", "bottom", "uniform", "random", "importance"])


def draw(
    slots: Slots, n: int = 40, temperature: float = 0.8
) -> tuple[MaskedTrajectory, MaskedPolicy]:
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
    decoder = Decoder(steps=T, blocks=2, order="low_confidence", temperature=temperature)
    policy = MaskedPolicy(denoiser, decoder)
    record = Record(entropy=True, slots=slots)
    return policy.sample(prompts, record, SampleRng(0, prompts.sample_id)), policy


def offered(plan: Slots, entropy: Tensor, active: Tensor, rng: Rng | None = None) -> Kept:
    """Offer the columns of ``entropy`` one after the other; completion of step t = t everywhere."""
    n = len(entropy)
    rng = SampleRng(0, torch.arange(n)) if rng is None else rng
    slots = StepSlots(plan, torch.full((n, 2), -7), active, rng)
    for t in range(entropy.shape[1]):
        completion = torch.full((n, 2), t) if plan.completions else None
        slots.offer(t, completion, entropy[:, t])
    return slots.kept(entropy.dtype)


def best(entropy: Sequence[float], active: Sequence[bool], n: int, sign: int) -> list[int]:
    """The n active steps of largest ``sign * entropy``, the earlier on a tie, then -1."""
    order = sorted(range(len(entropy)), key=lambda t: (-sign * entropy[t], t))
    chosen = [t for t in order if active[t]][:n]
    return chosen + [-1] * (n - len(chosen))


# ---- which steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "sign"), [("top", 1), ("bottom", -1)])
@pytest.mark.parametrize("n_slots", [1, 2, 3, 6, None])
def test_top_and_bottom_are_the_choice_of_hindsight(by, sign, n_slots):
    """The sampler keeps what sorting the recorded entropies afterwards gives, in that order."""
    trajectory, _ = draw(Slots(n=n_slots, by=by))
    assert trajectory.entropy is not None and trajectory.kept is not None
    active = (trajectory.revealed() > 0).tolist()
    rows = zip(trajectory.kept.step.tolist(), trajectory.entropy.tolist(), active, strict=True)
    for row, entropy, is_active in rows:
        assert row == best(entropy, is_active, n_slots or T, sign)
    filled = trajectory.kept.step >= 0
    assert torch.equal(trajectory.kept.step_weight, filled.double())
    assert trajectory.kept.completion is None


@pytest.mark.parametrize(("by", "sign"), [("top", 1), ("bottom", -1)])
@pytest.mark.parametrize("n_slots", [1, 2, 3, 4])
def test_ties_go_to_the_earlier_step(by, sign, n_slots):
    """All entropy tables over {0, 1, 2}^4 and all patterns of active steps, against a sort."""
    patterns = itertools.product(
        itertools.product((0.0, 1.0, 2.0), repeat=4), itertools.product((False, True), repeat=4)
    )
    table = list(patterns)
    entropy = torch.tensor([h for h, _ in table], dtype=torch.float64)
    active = torch.tensor([a for _, a in table])
    kept = offered(Slots(n=n_slots, by=by, completions=True), entropy, active)
    assert kept.step.tolist() == [best(h, a, n_slots, sign) for h, a in table]
    assert kept.completion is not None
    filled = kept.step >= 0
    assert torch.equal(kept.completion[filled], kept.step[filled][:, None].expand(-1, 2))
    assert bool((kept.completion[~filled] == -7).all())


@every_choice
def test_inactive_steps_are_never_kept(by):
    """Every pattern of active steps, the inactive ones with extreme entropies; empty is -1, 0."""
    active = torch.tensor(list(itertools.product((False, True), repeat=4)))
    for extreme in (0.0, 9.0):
        entropy = torch.where(active, torch.tensor([0.3, 0.125, 0.7, 0.2]), extreme)
        kept = offered(Slots(n=4, by=by, completions=True), entropy, active)
        assert kept.completion is not None
        rows = zip(kept.step.tolist(), kept.step_weight.tolist(), active.tolist(), strict=True)
        for row, weights, is_active in rows:
            allowed = {t for t in range(4) if is_active[t]}
            if by == "importance":
                assert set(row) <= allowed if allowed else set(row) == {-1}
            else:
                assert sorted(row) == [-1] * (4 - len(allowed)) + sorted(allowed)
            assert all((weight > 0) == (t >= 0) for t, weight in zip(row, weights, strict=True))
        assert bool((kept.completion[kept.step < 0] == -7).all())


@pytest.mark.parametrize(
    ("active", "n", "expected"),
    [
        ("11111", 1, [4]),
        ("11111", 2, [0, 4]),
        ("11111", 3, [0, 2, 4]),
        ("11111", 4, [0, 1, 3, 4]),
        ("11111", 5, [0, 1, 2, 3, 4]),
        ("01011", 1, [4]),
        ("11010", 1, [3]),
        ("1011011", 3, [0, 3, 6]),
        ("01110", 2, [1, 3]),
        ("01010", 4, [1, 3, -1, -1]),
        ("00000", 1, [-1]),
        ("00000", 2, [-1, -1]),
    ],
)
def test_evenly_spaced_by_hand(active, n, expected):
    """The first and the last active step and equal distances between; one slot takes the last."""
    pattern = torch.tensor([[digit == "1" for digit in active]])
    assert evenly_spaced(pattern, n).tolist() == [expected]


@pytest.mark.parametrize("n_steps", [7, 12])
def test_evenly_spaced_has_gaps_that_differ_by_at_most_one(n_steps):
    """For every number of slots, ends included and no step twice."""
    for n in range(2, n_steps + 1):
        steps = evenly_spaced(torch.ones(1, n_steps, dtype=torch.bool), n)[0]
        gaps = steps.diff()
        assert (int(steps[0]), int(steps[-1])) == (0, n_steps - 1)
        assert int(gaps.min()) >= 1 and int(gaps.max() - gaps.min()) <= 1


def test_uniform_keeps_the_evenly_spaced_steps_whatever_the_entropy():
    """In a trajectory: those of the steps that reveal something, in order, each with weight 1."""
    for n_slots in (1, 2, 4, None):
        trajectory, _ = draw(Slots(n=n_slots, by="uniform"))
        assert trajectory.kept is not None
        planned = evenly_spaced(trajectory.revealed() > 0, n_slots or T)
        assert torch.equal(trajectory.kept.step, planned)
        assert torch.equal(trajectory.kept.step_weight, (planned >= 0).double())


@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_random_draws_every_set_of_active_steps_equally_often(n_slots):
    """Enumerated: each set of n distinct active steps has probability 1 / C(4, n)."""
    active = torch.tensor([True, False, True, True, True, False])
    n_outcomes = math.perm(4, n_slots)
    rng = EnumeratingRng(torch.arange(n_outcomes))
    step = random_steps(active.expand(n_outcomes, -1), n_slots, rng)
    assert rng.n_outcomes == n_outcomes
    mass: dict[tuple[int, ...], float] = {}
    for row, p in zip(step.sort(1).values.tolist(), rng.probability.tolist(), strict=True):
        mass[tuple(row)] = mass.get(tuple(row), 0.0) + p
    assert set(mass) == set(itertools.combinations((0, 2, 3, 4), n_slots))
    assert list(mass.values()) == pytest.approx([1 / math.comb(4, n_slots)] * len(mass))


def test_weights_of_some_steps_stand_for_all_of_them():
    """They sum to the number of active steps, also where there are fewer than asked for."""
    active = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    rng, again = (SampleRng(3, torch.arange(3)) for _ in range(2))
    step, weight = some_steps(active, 3, rng)
    assert torch.equal(step, random_steps(active, 3, again).clamp(min=0))
    expected = torch.tensor([[5 / 3] * 3, [1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    assert torch.equal(weight, expected)


def test_random_steps_of_real_draws_are_distinct_and_change_from_sample_to_sample():
    """Pairs of four active steps: chi-square of 6 sets over 6000 samples."""
    n = 6000
    active = torch.tensor([True, True, False, True, True]).expand(n, -1)
    step = random_steps(active, 2, SampleRng(7, torch.arange(n))).sort(1).values
    count = torch.bincount(step[:, 0] * 5 + step[:, 1], minlength=25).double()
    sets = [a * 5 + b for a, b in itertools.combinations((0, 1, 3, 4), 2)]
    assert float(count[sets].sum()) == n
    assert float(((count[sets] - n / 6) ** 2 / (n / 6)).sum()) < 20.5  # 5 degrees, p = 0.001


# ---- importance ----------------------------------------------------------------------------------

ENTROPY = torch.tensor([1.0, 0.0, 4.0, 9.0, 2.0], dtype=torch.float64)
ACTIVE = torch.tensor([True, True, True, False, True])
DELTA = 0.5
Q = torch.tensor([1.5, 0.5, 4.5, 0.0, 2.5], dtype=torch.float64) / 9.0
"""(entropy + delta) over the sum of it, by hand; the inactive step has none."""


@pytest.mark.parametrize("n_slots", [1, 2])
def test_importance_draws_with_replacement_in_proportion_to_entropy_plus_delta(n_slots):
    """Enumerated to the last exchange: P(kept steps) = prod q, and each weighs 1 / (n q)."""
    n_outcomes = 2 ** (5 * n_slots)
    rng = EnumeratingRng(torch.arange(n_outcomes))
    plan = Slots(n=n_slots, by="importance", delta=DELTA)
    many = (n_outcomes, -1)
    kept = offered(plan, ENTROPY.expand(many), ACTIVE.expand(many), rng)
    assert rng.n_outcomes == n_outcomes
    possible = rng.probability > 0
    mass: dict[tuple[int, ...], float] = {}
    for row, p in zip(
        kept.step[possible].tolist(), rng.probability[possible].tolist(), strict=True
    ):
        mass[tuple(row)] = mass.get(tuple(row), 0.0) + p
    assert set(mass) == set(itertools.product((0, 1, 2, 4), repeat=n_slots))
    for row, p in mass.items():
        assert p == pytest.approx(math.prod(Q[list(row)].tolist()), rel=1e-13)
    step, weight = kept.step[possible], kept.step_weight[possible]
    torch.testing.assert_close(weight, 1 / (n_slots * Q[step]), rtol=1e-14, atol=0)


def test_importance_draws_of_the_generator_follow_the_law():
    """Two slots of 20,000 samples, independent of each other: chi-square."""
    n = 20_000
    plan = Slots(n=2, by="importance", delta=DELTA)
    kept = offered(plan, ENTROPY.expand(n, -1), ACTIVE.expand(n, -1))
    joint = torch.bincount(kept.step[:, 0] * 5 + kept.step[:, 1], minlength=25).double()
    expected = n * torch.outer(Q, Q).flatten()
    assert not bool(joint[expected == 0].any())
    used = expected > 0
    statistic = ((joint - expected)[used] ** 2 / expected[used]).sum()
    assert float(statistic) < 40  # 15 degrees of freedom


def test_importance_in_a_trajectory_weighs_by_its_own_entropies():
    """q is that of the recorded entropies of the path, over the steps that reveal something."""
    trajectory, _ = draw(Slots(n=3, by="importance", delta=0.25))
    assert trajectory.entropy is not None and trajectory.kept is not None
    w = torch.where(trajectory.revealed() > 0, trajectory.entropy + 0.25, 0.0)
    drawn = (w / w.sum(1, keepdim=True)).gather(1, trajectory.kept.step)
    torch.testing.assert_close(trajectory.kept.step_weight, 1 / (3 * drawn))
    assert trajectory.kept.step.unique().numel() > 3


# ---- completions ---------------------------------------------------------------------------------


@every_choice
def test_completions_are_those_of_the_policy_at_the_kept_steps(by):
    """For nothing beside the rollout: what ``MaskedPolicy.completions`` gives for a row each."""
    trajectory, policy = draw(Slots(n=3, by=by, completions=True))
    kept = trajectory.kept
    assert kept is not None and kept.completion is not None
    for column in range(3):
        step = kept.step[:, column]
        filled = step >= 0
        asked = policy.completions(trajectory.take(filled), step[filled])
        assert torch.equal(kept.completion[filled, column], asked)
        assert torch.equal(kept.completion[~filled, column], trajectory.prompts.tokens[~filled])


def test_completions_are_the_argmax_of_the_state_before_the_step():
    """x_hat_0 fills every mask of state(step), in all blocks, with its most probable token."""
    trajectory, policy = draw(Slots(n=None, by="uniform", completions=True))
    kept = trajectory.kept
    assert kept is not None and kept.completion is not None
    for column in range(T):
        step = kept.step[:, column]
        x_t = trajectory.state(step, V)
        filled = torch.where(x_t == V, policy.denoiser.predict(x_t).argmax(-1), x_t)
        expected = torch.where((step < 0)[:, None], trajectory.prompts.tokens, filled)
        assert torch.equal(kept.completion[:, column], expected)


def test_the_completion_before_a_greedy_last_step_is_the_output():
    """At temperature 0 all that is left is revealed as its argmax, so r_hat is r there."""
    trajectory, _ = draw(Slots(n=1, by="uniform", completions=True), temperature=0.0)
    kept = trajectory.kept
    assert kept is not None and kept.completion is not None
    assert torch.equal(kept.completion[:, 0], trajectory.x_0)
    warm, _ = draw(Slots(n=1, by="uniform", completions=True), temperature=3.0)
    assert warm.kept is not None and warm.kept.completion is not None
    assert not torch.equal(warm.kept.completion[:, 0], warm.x_0)


def token_bytes(trajectory: MaskedTrajectory) -> int:
    """Memory of all that is not a number per step: everything but log_prob and entropy."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    trajectory.map(note)
    scalars = [trajectory.log_prob, trajectory.entropy]
    return sum(sizes) - sum(x.untyped_storage().nbytes() for x in scalars if x is not None)


@every_choice
def test_memory_does_not_grow_with_the_steps(by):
    """T and 8 T steps of a longer canvas: the same bytes, with K completions each."""
    length, n_slots, size = 32, 3, []
    editable = torch.ones(4, length, dtype=torch.bool)
    prompts = Prompts(
        tokens=torch.full((4, length), V),
        editable=editable,
        group=torch.arange(4),
        sample_id=torch.arange(4),
        info={},
    )
    denoiser = MlpDenoiser(V, length, generator=torch.Generator().manual_seed(0))
    record = Record(entropy=True, slots=Slots(n=n_slots, by=by, completions=True))
    for steps in (4, 32):
        policy = MaskedPolicy(denoiser, Decoder(steps=steps))
        trajectory = policy.sample(prompts, record, SampleRng(0, prompts.sample_id))
        assert trajectory.kept is not None and trajectory.kept.completion is not None
        assert trajectory.kept.completion.shape == (4, n_slots, length)
        size.append(token_bytes(trajectory))
    assert size[0] == size[1]


@pytest.mark.parametrize("by", ["top", "bottom", "uniform", "random"])
def test_more_distinct_steps_than_there_are_is_refused(by):
    """Draws with replacement may be more than the steps, distinct steps may not."""
    with pytest.raises(ValueError, match="7 distinct steps cannot be kept of 6"):
        draw(Slots(n=7, by=by))
    trajectory, _ = draw(Slots(n=7, by="importance"))
    assert trajectory.kept is not None and trajectory.kept.step.shape == (40, 7)
