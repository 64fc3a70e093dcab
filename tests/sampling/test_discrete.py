"""The sampling loop: invariants of a trajectory, laws of every order, and what the loop costs."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rescore.models.tiny import MlpDenoiser, TableDenoiser, TinyDenoiser
from rescore.processes import masked
from rescore.sampling.decoder import Decoder
from rescore.sampling.discrete import sample_masked
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record, Score, Slots
from rescore.sampling.rng import SampleRng
from rescore.types import MaskedTrajectory, Prompts

V, L, T, TAU = 3, 7, 4, 0.7
COUNTABLE = ("random", "left_to_right", "max_prob", "low_confidence", "plackett_luce")
"""Orders of which a step has finitely many outcomes."""
ORDERS = (*COUNTABLE, "soft_low_confidence")
EXACT = Score(form="tokens_and_selection")
EVERYTHING = Record(score=EXACT, entropy=True)
OUTSIDE = 9
"""The content of padding: no token of the vocabulary."""


def boards() -> Prompts:
    """Five canvases: blank, a prompt and its completion, a lattice, one blank, and a padded one."""
    editable = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1],
            [0, 0, 1, 1, 1, 1, 1],
            [1, 0, 1, 0, 1, 0, 1],
            [0, 0, 0, 1, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0],
        ]
    ).bool()
    attend = torch.ones_like(editable)
    attend[4, 5:] = False
    tokens = torch.where(editable, V, torch.arange(L) % V)
    tokens[4, 5:] = OUTSIDE
    return Prompts(
        tokens=tokens,
        editable=editable,
        attend=attend,
        group=torch.arange(5),
        sample_id=torch.arange(5) * 7 + 3,
        info={},
    )


def network(seed: int = 1) -> MlpDenoiser:
    denoiser = MlpDenoiser(V, L, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        denoiser.weight_out.mul_(2)
    return denoiser


def decoder(order: str = "random", blocks: int = 1, temperature: float = TAU) -> Decoder:
    return Decoder(steps=T, blocks=blocks, order=order, temperature=temperature)  # pyright: ignore[reportArgumentType]


def draw(
    policy: MaskedPolicy, prompts: Prompts, record: Record = EVERYTHING, seed: int = 0
) -> MaskedTrajectory:
    return policy.sample(prompts, record, SampleRng(seed, prompts.sample_id))


@dataclass
class Recording:
    """A denoiser that remembers what it was asked."""

    inner: TinyDenoiser
    canvas: list[Tensor] = field(default_factory=list)
    rows: list[int | None] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def mask_id(self) -> int:
        return self.inner.mask_id

    def predict(
        self, x_t: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        self.canvas.append(x_t.clone())
        self.rows.append(None if positions is None else positions.shape[1])
        return self.inner.predict(x_t, attend=attend, positions=positions)


every_order = pytest.mark.parametrize("order", ORDERS)
every_blocks = pytest.mark.parametrize("blocks", [1, 2])


# ---- the path ------------------------------------------------------------------------------------


@every_order
@every_blocks
def test_invariants_of_a_trajectory(order, blocks):
    """Each step reveals its quota, blocks in order; given tokens and padding never change."""
    prompts = boards()
    trajectory = draw(MaskedPolicy(network(), decoder(order, blocks)), prompts)
    block = masked.blocks_of(prompts.editable, blocks)
    quota, candidates = masked.reveal_quota(block, blocks, T)
    assert torch.equal(trajectory.revealed(), quota)
    assert trajectory.max_revealed == int(quota.max())
    assert trajectory.max_candidates == int(candidates.max())
    assert torch.equal(trajectory.rank >= 0, prompts.editable)
    assert torch.equal(trajectory.x_0[~prompts.editable], prompts.tokens[~prompts.editable])
    assert bool((trajectory.x_0[prompts.editable] < V).all())
    step_of = trajectory.step_of()
    assert torch.equal(step_of[prompts.editable] // (T // blocks), block[prompts.editable])
    for row, quotas in zip(trajectory.rank.tolist(), quota.tolist(), strict=True):
        expected = [k * L + place for k in range(T) for place in range(quotas[k])]
        assert sorted(r for r in row if r >= 0) == expected


@every_order
@every_blocks
@pytest.mark.parametrize("slots", [None, Slots(n=2, by="top", completions=True)])
def test_every_canvas_is_rebuilt_from_ranks(order, blocks, slots):
    """state(k) is the canvas the network was shown in step k."""
    recording = Recording(network())
    prompts = boards()
    trajectory = draw(MaskedPolicy(recording, decoder(order, blocks)), prompts, Record(slots=slots))
    assert len(recording.canvas) == T
    for k, canvas in enumerate(recording.canvas):
        assert torch.equal(trajectory.state(torch.full((5,), k), V), canvas)
    assert torch.equal(recording.canvas[0], prompts.tokens)


@every_order
def test_a_sample_does_not_depend_on_its_batch(order):
    """Any order of the samples, alone or together: the same path and log-probabilities."""
    prompts = boards()
    policy = MaskedPolicy(network(), decoder(order))
    whole = draw(policy, prompts)
    for index in ([4, 2, 0, 3, 1], [1], [3], [0, 4]):
        rows = torch.tensor(index)
        part, same = draw(policy, prompts.take(rows)), whole.take(rows)
        assert torch.equal(part.x_0, same.x_0)
        assert torch.equal(part.rank, same.rank)
        if order == "soft_low_confidence":
            assert part.log_time is not None and same.log_time is not None
            torch.testing.assert_close(part.log_time, same.log_time, rtol=0, atol=1e-12)
        else:
            assert part.log_time is None
        assert part.entropy is not None and same.entropy is not None
        torch.testing.assert_close(part.log_prob, same.log_prob, rtol=0, atol=1e-12)
        torch.testing.assert_close(part.entropy, same.entropy, rtol=0, atol=1e-12)
    other = draw(policy, prompts, seed=1)
    assert not torch.equal(other.x_0, whole.x_0)


@every_order
def test_the_content_of_padding_is_ignored(order):
    """Other tokens under ``attend`` False change nothing; without ``attend`` they would."""
    prompts = boards().take(torch.tensor([4]))
    tokens = prompts.tokens.clone()
    tokens[0, 5:] = torch.tensor([0, 2])
    policy = MaskedPolicy(network(), decoder(order))
    other = Prompts(**{**prompts.fields(), "tokens": tokens})
    assert torch.equal(draw(policy, prompts).log_prob, draw(policy, other).log_prob)
    assert torch.equal(draw(policy, prompts).rank, draw(policy, other).rank)
    read = Prompts(**{**other.fields(), "attend": None})
    assert not torch.equal(draw(policy, prompts).log_prob, draw(policy, read).log_prob)


@pytest.mark.parametrize("order", ["left_to_right", "max_prob", "low_confidence"])
def test_greedy_decoding(order):
    """At temperature 0 every revealed token is the argmax of its state, whatever the seed."""
    prompts, denoiser = boards(), network()
    policy = MaskedPolicy(denoiser, decoder(order, temperature=0.0))
    trajectory = draw(policy, prompts)
    assert torch.equal(draw(policy, prompts, seed=8).x_0, trajectory.x_0)
    assert bool((trajectory.log_prob == 0).all())
    for k in range(T):
        x_t = trajectory.state(torch.full((5,), k), V)
        top = denoiser.predict(x_t, attend=prompts.attend).argmax(-1)
        now = trajectory.step_of() == k
        assert torch.equal(trajectory.x_0[now], top[now])


# ---- the law of a path ---------------------------------------------------------------------------


@torch.no_grad()
def by_hand(trajectory: MaskedTrajectory, denoiser: TinyDenoiser, order: str, i: int, k: int):
    """(tokens, selection, entropy) of step k of path i, with Python loops over the full logits."""
    one = trajectory.take(torch.tensor([i]))
    x_t = one.state(torch.tensor([k]), V)
    logits = denoiser.predict(x_t, attend=one.prompts.attend)[0]
    law, p = (logits / TAU).softmax(-1), logits.softmax(-1)
    step_of = one.step_of()[0].tolist()
    drawn = sorted((j for j in range(L) if step_of[j] == k), key=lambda j: int(one.rank[0, j]))
    left = [j for j in range(L) if step_of[j] >= k]
    token = one.x_0[0].tolist()
    tokens = sum(math.log(float(law[j, token[j]])) for j in drawn)
    entropy = sum(-float(law[j] @ law[j].log()) for j in drawn)
    selection = 0.0
    if order == "random":
        selection = -math.log(math.perm(len(left), len(drawn)))
    elif order == "plackett_luce":
        weight = {j: float(p[j].max()) ** (1 / 0.5) for j in left}
        for j in drawn:
            selection += math.log(weight[j] / sum(weight.values()))
            del weight[j]
    elif order == "low_confidence" and drawn:
        last = drawn[-1]
        bar = (float(p[last, token[last]]), -last)
        for j in set(left) - set(drawn):
            mass = sum(float(law[j, w]) for w in range(V) if (float(p[j, w]), -j) < bar)
            selection += math.log(mass)
    elif order == "soft_low_confidence" and drawn:
        assert one.log_time is not None
        rate, time = p ** (1 / 0.5), one.log_time[0].exp().tolist()
        assert [time[j] for j in drawn] == sorted(time[j] for j in drawn)
        for j in drawn:
            w = float(rate[j, token[j]])
            selection += math.log(w) - w * time[j]
        for j in set(left) - set(drawn):
            selection += math.log(float(law[j] @ (-rate[j] * time[drawn[-1]]).exp()))
    return tokens, selection, entropy


@every_order
@pytest.mark.parametrize("form", ["tokens", "tokens_and_selection"])
def test_recorded_log_probabilities_and_entropies_by_hand(order, form):
    """Tempered tokens, the choice of positions, and the entropy, summed over the revealed rows."""
    prompts, denoiser = boards(), network()
    policy = MaskedPolicy(denoiser, decoder(order))
    trajectory = draw(policy, prompts, Record(score=Score(form=form), entropy=True))
    assert trajectory.entropy is not None
    for i, k in itertools.product(range(5), range(T)):
        tokens, selection, entropy = by_hand(trajectory, denoiser, order, i, k)
        expected = tokens + (selection if form == "tokens_and_selection" else 0.0)
        assert float(trajectory.log_prob[i, k]) == pytest.approx(expected, abs=1e-12)
        assert float(trajectory.entropy[i, k]) == pytest.approx(entropy, abs=1e-12)


@dataclass(frozen=True)
class Proposals(SampleRng):
    """A generator whose first categorical draws are given, and all later ones 0."""

    proposal: Tensor

    def categorical(self, probs: Tensor, stream, step: int, where: Tensor) -> Tensor:
        return self.proposal if step == 0 else torch.zeros_like(where)


@pytest.mark.parametrize("scale", [1.5, 0.0])
@pytest.mark.parametrize("n_steps", [1, 2, 4])
def test_low_confidence_probabilities_are_those_of_the_samplers_own_rule(n_steps, scale):
    """All 81 proposals of a step, weighted by p~, against exp(log_prob); scale 0: all tied."""
    n_rows = 4
    generator = torch.Generator().manual_seed(3)
    denoiser = TableDenoiser(V, n_rows, generator=generator, scale=scale)
    proposal = torch.tensor(list(itertools.product(range(V), repeat=n_rows)))
    n = len(proposal)
    prompts = Prompts(
        tokens=torch.full((n, n_rows), V),
        editable=torch.ones(n, n_rows, dtype=torch.bool),
        group=torch.arange(n),
        sample_id=torch.arange(n),
        info={},
    )
    decoder = Decoder(steps=n_steps, order="low_confidence", temperature=TAU)
    rng = Proposals(seed=0, sample_id=prompts.sample_id, proposal=proposal)
    trajectory = sample_masked(denoiser, decoder, prompts, Record(score=EXACT), rng)
    law = (denoiser.predict(prompts.tokens[:1])[0] / TAU).softmax(-1)
    mass = law[torch.arange(n_rows), proposal].prod(-1)
    kept = torch.where(trajectory.step_of() == 0, trajectory.x_0, -1)
    outcomes: dict[tuple[int, ...], list[float]] = {}
    for key, p, log_prob in zip(
        kept.tolist(), mass.tolist(), trajectory.log_prob[:, 0].tolist(), strict=True
    ):
        outcomes.setdefault(tuple(key), [0.0, math.exp(log_prob)])[0] += p
    for enumerated, recorded in outcomes.values():
        assert recorded == pytest.approx(enumerated, rel=1e-12)
    assert sum(recorded for _, recorded in outcomes.values()) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("order", COUNTABLE)
def test_paths_appear_as_often_as_their_log_probability_says(order):
    """Frequencies of the 54 or fewer two-step paths of a world of two positions."""
    n, denoiser = 20_000, TableDenoiser(V, 2, generator=torch.Generator().manual_seed(2))
    prompts = Prompts(
        tokens=torch.full((n, 2), V),
        editable=torch.ones(n, 2, dtype=torch.bool),
        group=torch.arange(n),
        sample_id=torch.arange(n),
        info={},
    )
    two_steps = Decoder(steps=2, order=order, temperature=TAU)
    trajectory = draw(MaskedPolicy(denoiser, two_steps), prompts)
    key = torch.cat([trajectory.x_0, trajectory.rank], 1)
    _, inverse, count = key.unique(dim=0, return_inverse=True, return_counts=True)
    p = torch.zeros(len(count), dtype=torch.float64)
    p[inverse] = trajectory.log_prob.sum(1).exp()
    assert float(p.sum()) == pytest.approx(1, abs=0.01)
    z = (count - n * p) / (n * p).sqrt()
    assert float(z[n * p > 5].abs().max()) < 4


def two_positions(n: int) -> Prompts:
    """n samples of a world of two blanks."""
    return Prompts(
        tokens=torch.full((n, 2), 2),
        editable=torch.ones(n, 2, dtype=torch.bool),
        group=torch.arange(n),
        sample_id=torch.arange(n),
        info={},
    )


SOFT = Decoder(steps=2, order="soft_low_confidence", temperature=TAU, position_temperature=0.4)


def soft_world() -> MaskedPolicy:
    """Two tokens at two positions, one revealed in each step."""
    return MaskedPolicy(TableDenoiser(2, 2, generator=torch.Generator().manual_seed(6)), SOFT)


def soft_outcomes(policy: MaskedPolicy) -> dict[tuple[int, int], Tensor]:
    """P(position l first, with token a) = sum_b p~_l(a) p~_j(b) w_l(a) / (w_l(a) + w_j(b))."""
    logits = policy.denoiser.predict(torch.full((1, 2), 2))[0]
    law, rate = (logits / TAU).softmax(-1), logits.softmax(-1) ** (1 / 0.4)
    return {
        (i, a): law[i, a] * (law[1 - i] * rate[i, a] / (rate[i, a] + rate[1 - i])).sum()
        for i, a in itertools.product(range(2), range(2))
    }


def test_soft_low_confidence_is_a_density_and_its_score_the_gradient_of_the_path_law():
    """Integrated over the time on a fine grid, everything summed over tokens and positions.

    The densities give each outcome its closed-form probability, and reward times density times
    score integrates to the gradient of the expected reward.
    """
    policy, outcomes = soft_world(), soft_outcomes(soft_world())
    assert sum(float(p.detach()) for p in outcomes.values()) == pytest.approx(1, abs=1e-14)
    log_t = torch.linspace(-36.0, 9.0, 1500, dtype=torch.float64)
    volume = log_t.exp() * (log_t[1] - log_t[0])  # dt = t d log t
    reward = torch.tensor([[0.3, -1.0], [0.75, 0.5]], dtype=torch.float64)
    n, expected, found = len(log_t), torch.zeros(()), torch.zeros(())
    assert isinstance(policy.denoiser, TableDenoiser)
    weights = list(policy.denoiser.parameters())
    for (i, a), probability in soft_outcomes(policy).items():
        first = torch.arange(2) == i
        paths = MaskedTrajectory(
            prompts=two_positions(n),
            x_0=torch.where(first, a, 0).expand(n, -1),
            rank=torch.where(first, 0, 2).expand(n, -1),
            log_prob=torch.zeros(n, 2, dtype=torch.float64),
            max_revealed=1,
            max_candidates=2,
            log_time=torch.where(first, log_t[:, None], 0.0),
        )
        log_prob = policy.transition(paths, torch.zeros(n, dtype=torch.long), EXACT).log_prob
        mass = log_prob.detach().exp() * volume
        assert float(mass.sum()) == pytest.approx(float(outcomes[i, a].detach()), abs=1e-9)
        expected = expected + reward[i, a] * probability
        found = found + reward[i, a] * (mass * log_prob).sum()
    exact, measured = (torch.autograd.grad(value, weights)[0] for value in (expected, found))
    assert float(exact.norm()) > 0.01
    torch.testing.assert_close(measured, exact, rtol=0, atol=1e-9)


def test_soft_low_confidence_reveals_each_position_as_often_as_its_law_says():
    """Frequencies of the first reveal over 20,000 samples, and the mean of its time."""
    n, policy = 20_000, soft_world()
    trajectory = draw(policy, two_positions(n))
    assert trajectory.log_time is not None
    early = trajectory.step_of() == 0
    assert bool((early.sum(1) == 1).all())
    logits = policy.denoiser.predict(torch.full((1, 2), 2)).detach()[0]
    law, rate = (logits / TAU).softmax(-1), logits.softmax(-1) ** (1 / 0.4)
    for (i, a), probability in soft_outcomes(policy).items():
        hit = early[:, i] & (trajectory.x_0[:, i] == a)
        p = float(probability.detach())
        assert abs(float(hit.sum()) - n * p) < 4 * math.sqrt(n * p * (1 - p))
    # of two exponentials the first comes after a time of mean 1 / (the sum of their rates)
    pair = law[0][:, None] * law[1]
    mean = float((pair / (rate[0][:, None] + rate[1])).sum())
    times = trajectory.log_time[early].exp()
    assert abs(float(times.mean()) - mean) < 4 * float(times.std()) / math.sqrt(n)


def test_a_cold_race_is_low_confidence_remasking():
    """As position_temperature falls the order of the times is that of the confidences."""
    prompts = boards()
    cold = Decoder(steps=T, order="soft_low_confidence", temperature=TAU, position_temperature=5e-3)
    race = draw(MaskedPolicy(network(), cold), prompts, Record())
    hard = draw(MaskedPolicy(network(), decoder("low_confidence")), prompts, Record())
    assert torch.equal(race.x_0, hard.x_0)
    assert torch.equal(race.rank, hard.rank)


@torch.no_grad()
def test_orders_choose_what_they_say():
    """Leftmost; largest max_v p(v); the random order uses no logits."""
    prompts, denoiser = boards(), network()
    for order in ("left_to_right", "max_prob"):
        trajectory = draw(MaskedPolicy(denoiser, decoder(order)), prompts)
        for i, k in itertools.product(range(5), range(T)):
            one = trajectory.take(torch.tensor([i]))
            x_t = one.state(torch.tensor([k]), V)
            top = denoiser.predict(x_t, attend=one.prompts.attend)[0].softmax(-1).amax(-1)
            step_of = one.step_of()[0]
            now, later = step_of == k, step_of > k
            if bool(now.any() and later.any()):
                if order == "left_to_right":
                    assert int(now.nonzero().max()) < int(later.nonzero().min())
                else:
                    assert float(top[now].min()) > float(top[later].max())
    one_network, another = (
        draw(MaskedPolicy(network(s), decoder("random")), prompts) for s in (1, 2)
    )
    assert torch.equal(one_network.rank, another.rank)


# ---- what the loop costs -------------------------------------------------------------------------


@every_order
def test_only_candidate_rows_go_through_the_vocabulary_head(order):
    """Rows asked for: those revealed where the order needs no logits, else the candidates."""
    recording = Recording(network())
    draw(MaskedPolicy(recording, decoder(order, blocks=2)), boards(), EVERYTHING)
    block = masked.blocks_of(boards().editable, 2)
    quota, candidates = masked.reveal_quota(block, 2, T)
    needed = quota if order in ("random", "left_to_right") else candidates
    assert recording.rows == needed.amax(0).tolist()


def stored_bytes(trajectory: MaskedTrajectory) -> int:
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    trajectory.map(count)
    return sum(sizes)


def test_storage_grows_by_scalars_per_step():
    """log_prob and entropy: two float64 per sample and step; nothing else knows the step count."""
    prompts = boards()
    record = Record(entropy=True, slots=Slots(n=2, by="importance", completions=True))
    size = {
        steps: stored_bytes(draw(MaskedPolicy(network(), Decoder(steps=steps)), prompts, record))
        for steps in (2, 4, 16)
    }
    assert size[4] - size[2] == 2 * 5 * 2 * 8
    assert size[16] - size[4] == 12 * 5 * 2 * 8


class HostReads(TorchFunctionMode):
    """Counts Python-level reads of tensor values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_order
@pytest.mark.parametrize("by", [None, "top", "bottom", "uniform", "random", "importance"])
def test_the_step_loop_never_waits_for_the_device(order, by):
    """One read before the loop, none in it; no operator whose output shape depends on values."""
    slots = None if by is None else Slots(n=2, by=by, completions=True)
    record = Record(score=EXACT, entropy=True, slots=slots)
    table = TableDenoiser(V, L, generator=torch.Generator().manual_seed(0))
    policy, prompts = MaskedPolicy(table, decoder(order, blocks=2)), boards()
    with HostReads() as reads, Operators() as operators:
        draw(policy, prompts, record)
    assert reads.names == ["tolist"]
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}
    assert not operators.names & waiting
    assert "scatter" in operators.names  # the mode does see the loop


def test_the_global_generator_is_untouched():
    """Sampling neither reads nor moves torch's generator."""
    policy, prompts = MaskedPolicy(network(), decoder("plackett_luce")), boards()
    torch.manual_seed(5)
    before, first = torch.get_rng_state(), draw(policy, prompts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(draw(policy, prompts).x_0, first.x_0)


@every_order
@every_blocks
def test_more_steps_than_blanks(order, blocks):
    """Steps that have nothing to reveal record 0 and change nothing, in all samples or in some."""
    for n_blank in (0, 1, 2):
        editable = (torch.arange(L) < n_blank).expand(2, -1)
        prompts = Prompts(
            tokens=torch.where(editable, V, 1),
            editable=editable,
            group=torch.arange(2),
            sample_id=torch.arange(2),
            info={},
        )
        trajectory = draw(MaskedPolicy(network(), decoder(order, blocks)), prompts)
        assert bool((trajectory.x_0 < V).all())
        idle = trajectory.revealed() == 0
        assert trajectory.entropy is not None
        assert bool((trajectory.log_prob[idle] == 0).all())
        assert bool((trajectory.entropy[idle] == 0).all())


def test_gradients_are_the_callers_choice():
    """The policy samples without gradients; the loop keeps those of the log-probabilities only."""
    prompts, denoiser = boards(), network()
    rng = SampleRng(0, prompts.sample_id)
    quiet = MaskedPolicy(denoiser, decoder()).sample(prompts, EVERYTHING, rng)
    loud = sample_masked(denoiser, decoder(), prompts, EVERYTHING, rng)
    assert not quiet.log_prob.requires_grad
    assert loud.log_prob.requires_grad
    assert loud.entropy is not None and not loud.entropy.requires_grad
