"""Paths of processes in continuous time: replayed, enumerated, clamped, whatever the batch."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from rescore.algorithms.reinforce import Reinforce
from rescore.models.denoiser import CountedScores, ScoreNetwork, SubsScores
from rescore.models.tiny import MlpDenoiser
from rescore.objectives.advantages import Baseline
from rescore.processes import ctmc
from rescore.processes.convert import log_probs_from_score
from rescore.processes.ctmc import Absorbing, Process, Uniform
from rescore.processes.schedules import Geometric, LogLinear
from rescore.proof.oracle import EnumeratingRng
from rescore.sampling.decoder import Decoder, RateDecoder
from rescore.sampling.policy import MaskedPolicy, Models, RatePolicy, policy_of
from rescore.sampling.rates import laws_at, log_or_impossible, sample_rates
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.types import Prompts, RateTrajectory, Scored
from tiny import TableScores

L = 4
ALL = Record(moves="all")
every_process = pytest.mark.parametrize("kind", ["uniform", "masked"])
every_predictor = pytest.mark.parametrize("predictor", ["analytic", "euler"])


def network_of(kind: str, length: int = L, seed: int = 1) -> ScoreNetwork:
    """Three ordinary tokens; a free table, or the scores of a masked denoiser."""
    if kind == "uniform":
        return TableScores(Uniform(3), length, seed=seed)
    denoiser = MlpDenoiser(3, length, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        denoiser.weight_out.mul_(2)
    return SubsScores(denoiser)


def decoder_of(predictor: str, corrector_steps: int = 0, steps: int = 4) -> RateDecoder:
    return RateDecoder(
        steps=steps,
        noise=LogLinear(0.1),
        predictor=predictor,  # pyright: ignore[reportArgumentType]
        corrector_steps=corrector_steps,
        corrector_size=0.3,
    )


def boards(kind: str, length: int = L) -> Prompts:
    """Blank, prompt, completion and padding, all full."""
    editable = torch.ones(4, length, dtype=torch.bool)
    attend = torch.ones_like(editable)
    editable[1, :2] = editable[2, 2:] = editable[3, 0] = False
    attend[3, 0] = False
    given = torch.arange(4 * length).view(4, length) % 3
    return Prompts(
        tokens=torch.where(editable, 3, given) if kind == "masked" else given,
        editable=editable,
        attend=attend,
        group=torch.arange(4),
        sample_id=torch.tensor([5, 6, 7, 8]),
        info={},
    )


def draw(policy: RatePolicy, prompts: Prompts, record: Record = ALL) -> RateTrajectory:
    return policy.sample(prompts, record, SampleRng(0, prompts.sample_id))


def every(path: RateTrajectory) -> Tensor:
    """The numbers of all steps of every path."""
    return torch.arange(path.n_steps).expand(len(path.x_0), -1)


# ---- replay --------------------------------------------------------------------------------------


@every_process
@every_predictor
@pytest.mark.parametrize("corrector_steps", [0, 2])
def test_replaying_a_path_gives_its_log_probs(kind, predictor, corrector_steps):
    """Every step, the corrector's and the last included; mixed in one batch."""
    policy = RatePolicy(network_of(kind), decoder_of(predictor, corrector_steps))
    path = draw(policy, boards(kind))
    assert path.n_steps == 4 + corrector_steps
    assert path.log_prob.dtype == torch.float64 and bool((path.log_prob <= 0).all())
    replayed = policy.log_probs(path, every(path), Score())
    torch.testing.assert_close(replayed, path.log_prob, rtol=0, atol=1e-12)
    assert path.log_prob[path.log_prob != 0].unique().numel() > 8


@every_process
@every_predictor
def test_log_probs_by_hand(kind, predictor):
    """T - 1 predictor steps, two corrector steps at t = 1/T, then all the noise that is left.

    Levels and lengths are those of the noise law to the digits of float32.
    """
    network, decoder = network_of(kind), decoder_of(predictor, corrector_steps=2)
    prompts = boards(kind)
    path = draw(RatePolicy(network, decoder), prompts)
    n, rate = decoder.noise.total_noise, decoder.noise.rate
    for k in range(path.n_steps):
        t = torch.tensor(max(1 - k / 4, 1 / 4), dtype=torch.float64)
        x, after = path.move(torch.full((4,), k))
        log_score = network.log_score(x, n(t).expand(4), attend=prompts.attend)
        process = network.process
        if k == 5:
            probs = ctmc.denoise_probs(process, x, log_score, float(n(t)))
        elif k >= 3:
            probs = ctmc.corrector_probs(process, x, log_score, float(0.3 * n(t)))
        elif predictor == "euler":
            probs = ctmc.euler_probs(process, x, log_score, float(rate(t) / 4))
        else:
            probs = ctmc.analytic_probs(process, x, log_score, float(n(t) - n(t - 1 / 4)))
        drawn = probs.gather(-1, after[..., None]).squeeze(-1).log()
        expected = torch.where(prompts.editable, drawn, 0.0).sum(1)
        torch.testing.assert_close(path.log_prob[:, k], expected, rtol=1e-5, atol=1e-5)


def test_the_analytic_step_of_a_masked_model_is_ancestral():
    """Reveal with probability (e^-n_s - e^-n_t) / (1 - e^-n_t), a token of the denoiser's law."""
    network, decoder = network_of("masked"), decoder_of("analytic")
    assert isinstance(network, SubsScores)
    x = torch.tensor([[3, 0, 3, 3], [3, 3, 3, 2]])
    log_p = network.network.predict(x).log_softmax(-1)
    for k in range(4):
        step = torch.full((2,), k)
        probs = RatePolicy(network, decoder).law(x, step, None)
        masked_t, masked_s = 0.9 * (1 - k / 4), 0.9 * (0.75 - k / 4) if k < 3 else 0.0
        reveal = (masked_t - masked_s) / masked_t
        law = torch.cat([reveal * log_p.exp(), torch.full_like(log_p[..., :1], 1 - reveal)], -1)
        own = torch.nn.functional.one_hot(x, 4).double()
        expected = torch.where((x == 3)[..., None], law, own)
        torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-6)


@every_process
@every_predictor
def test_the_gradient_of_a_step_does_not_depend_on_the_kinds_beside_it(kind, predictor):
    """All kinds of steps in one batch: finite gradients, those of each step alone."""
    network = network_of(kind)
    policy = RatePolicy(network, decoder_of(predictor, corrector_steps=1))
    path = draw(policy, boards(kind))
    module = network.network if isinstance(network, SubsScores) else network
    assert isinstance(module, torch.nn.Module)
    weights = list(module.parameters())
    sample, step = torch.cartesian_prod(torch.arange(4), torch.arange(path.n_steps)).unbind(1)
    factor = torch.linspace(-1, 2, len(step), dtype=torch.float64)
    together = policy.transition(path.take(sample), step, Score()).log_prob
    mixed = torch.autograd.grad((factor * together).sum(), weights, allow_unused=True)
    alone = torch.zeros(())
    for i in range(len(step)):
        one = policy.transition(path.take(sample[i : i + 1]), step[i : i + 1], Score()).log_prob
        alone = alone + factor[i] * one.sum()
    singly = torch.autograd.grad(alone, weights, allow_unused=True)
    for a, b in zip(mixed, singly, strict=True):
        assert a is not None and b is not None and bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_what_is_impossible_has_no_gradient():
    """Logarithms are -inf where a probability is 0, and their gradient is 0 there, not infinite."""
    probs = torch.tensor([0.0, 0.25, 1.0]).requires_grad_()
    log_p = log_or_impossible(probs)
    torch.testing.assert_close(log_p, probs.detach().log())
    log_p.backward(torch.ones(3))
    assert probs.grad is not None and probs.grad.tolist() == [0.0, 4.0, 1.0]


@every_process
def test_a_transition_carries_its_law(kind):
    """log_p is normalised, -inf where nothing can go, and adds up to log_prob over the editable."""
    policy = RatePolicy(network_of(kind), decoder_of("analytic", 1))
    path = draw(policy, boards(kind))
    for k in range(path.n_steps):
        seen = policy.transition(path, torch.full((4,), k), Score())
        ones = torch.ones(4, L, dtype=torch.float64)
        torch.testing.assert_close(seen.log_p.exp().sum(-1), ones)
        assert torch.equal(seen.revealed, path.prompts.editable)
        own = seen.log_p.gather(-1, path.after[:, k, :, None]).squeeze(-1)
        total = torch.where(seen.revealed, own, 0.0).sum(1)
        torch.testing.assert_close(total, seen.log_prob)


# ---- enumeration ---------------------------------------------------------------------------------


def blank(n: int, length: int, fill: int) -> Prompts:
    row = torch.arange(n)
    return Prompts(
        tokens=torch.full((n, length), fill),
        editable=torch.ones(n, length, dtype=torch.bool),
        group=row,
        sample_id=row,
        info={},
    )


def enumerated(network: ScoreNetwork, decoder: RateDecoder) -> tuple[RateTrajectory, Tensor]:
    """Every path that has a probability, and that, with its graph."""
    fill = 0 if network.process.mask_id is None else network.process.mask_id
    dry = EnumeratingRng(torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        sample_rates(network, decoder, blank(1, 2, fill), ALL, dry)
    rng = EnumeratingRng(torch.arange(dry.n_outcomes))
    path = sample_rates(network, decoder, blank(dry.n_outcomes, 2, fill), ALL, rng)
    possible = (rng.probability > 0).nonzero()[:, 0]
    return path.map(Tensor.detach).take(possible), rng.probability[possible]


def small(process: Process) -> ScoreNetwork:
    """Two ordinary tokens, two positions."""
    if isinstance(process, Uniform):
        return TableScores(process, 2, seed=3)
    return SubsScores(MlpDenoiser(2, 2, generator=torch.Generator().manual_seed(3)))


@every_predictor
@pytest.mark.parametrize("process", [Uniform(2), Absorbing(3, 2)], ids=["uniform", "masked"])
@pytest.mark.parametrize(("steps", "corrector_steps"), [(2, 0), (2, 1), (3, 0)])
def test_the_probabilities_of_all_paths_sum_to_one(process, predictor, steps, corrector_steps):
    """And each is exp of what was recorded, times the even law of x_1 without a mask."""
    network = small(process)
    path, p = enumerated(network, decoder_of(predictor, corrector_steps, steps))
    assert path.n_steps == steps + corrector_steps
    torch.testing.assert_close(p.sum(), torch.ones(()).double(), rtol=0, atol=1e-12)
    start = 1 / 4 if process.mask_id is None else 1.0
    recorded = start * path.log_prob.sum(1).exp()
    torch.testing.assert_close(recorded, p, rtol=0, atol=1e-12)
    first = path.before[:, 0].unique(dim=0)
    expected = torch.cartesian_prod(*[torch.arange(2)] * 2) if start < 1 else torch.tensor([[2, 2]])
    assert torch.equal(first, expected)
    assert bool((path.x_0 != process.mask_id).all()) if process.mask_id is not None else True


@pytest.mark.parametrize("process", [Uniform(2), Absorbing(3, 2)], ids=["uniform", "masked"])
@pytest.mark.parametrize(
    ("predictor", "corrector_steps", "baseline"),
    [
        ("analytic", 0, "none"),
        ("euler", 0, "none"),
        ("analytic", 1, "none"),
        ("analytic", 0, "leave_one_out"),
    ],
)
def test_reinforce_in_expectation_is_the_gradient_of_the_reward(
    process, predictor, corrector_steps, baseline: Baseline
):
    """E over all groups of what the code computes, and autograd through E[r] of all paths."""
    network = small(process)
    module = network.network if isinstance(network, SubsScores) else network
    assert isinstance(module, torch.nn.Module)
    weights = list(module.parameters())
    policy = RatePolicy(network, decoder_of(predictor, corrector_steps, steps=2))
    path, p = enumerated(network, policy.decoder)
    worth = torch.tensor([[0.3, 1.1, 9.0], [-0.4, 0.7, 9.0], [9.0, 9.0, 9.0]]).double()
    reward = worth[path.x_0[:, 0], path.x_0[:, 1]]
    exact = torch.autograd.grad((p * reward).sum(), weights)

    p, size = p.detach(), 1 if baseline == "none" else 2
    member = torch.cartesian_prod(*[torch.arange(len(p))] * size).view(-1, size)
    chance = p[member].prod(1)
    paths = path.take(member.flatten())
    group = torch.arange(len(member)).repeat_interleave(size)
    paths = replace(paths, prompts=replace(paths.prompts, group=group))
    algorithm, models = Reinforce(baseline=baseline), Models(policy)
    algorithm.check(policy.decoder, max(size, 2), ["reward"])
    selected = algorithm.select(models, paths)
    scored = Scored(**selected.fields(), reward=reward[member.flatten()], terms={})
    stage = algorithm.credit(scored)
    pairs = stage.pairs()
    actions = stage.actions(pairs)
    loss = algorithm.loss(models, actions, SampleRng(0, paths.prompts.sample_id[pairs[:, 0]])).loss
    weight = actions.weight * len(paths.x_0) / size  # of one group, instead of the whole batch
    mean = (chance[group[pairs[:, 0]]] * weight * loss).sum()
    for found, gradient in zip(torch.autograd.grad(mean, weights), exact, strict=True):
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(-found, gradient, rtol=0, atol=1e-10)


# ---- what is kept --------------------------------------------------------------------------------


@every_process
@pytest.mark.parametrize("n", [1, 3, 5])
def test_kept_moves_are_those_of_the_full_record(kind, n):
    """n different ones, ascending; paths and log-probabilities do not depend on the record."""
    policy = RatePolicy(network_of(kind), decoder_of("analytic", 1))
    full, some = draw(policy, boards(kind)), draw(policy, boards(kind), Record(moves=n))
    nothing = draw(policy, boards(kind), Record())
    for path in (some, nothing):
        assert torch.equal(path.x_0, full.x_0) and torch.equal(path.log_prob, full.log_prob)
    assert nothing.step.shape == (4, 0) and nothing.before.shape == (4, 0, L)
    assert some.step.shape == (4, n) and bool((some.step.diff(dim=1) > 0).all())
    index = some.step[..., None].expand(-1, -1, L)
    assert torch.equal(some.before, full.before.gather(1, index))
    assert torch.equal(some.after, full.after.gather(1, index))
    for column in range(n):
        k = some.step[:, column]
        for one, other in zip(some.move(k), full.move(k), strict=True):
            assert torch.equal(one, other)
    replayed = policy.log_probs(some, some.step, Score())
    torch.testing.assert_close(replayed, full.log_prob.gather(1, some.step), rtol=0, atol=1e-12)
    if n == 1:
        many = replace(boards(kind), sample_id=torch.tensor([1, 2, 3, 4])).take(
            torch.arange(4).repeat(16)
        )
        many = replace(many, sample_id=torch.arange(64))
        drawn = draw(policy, many, Record(moves=1)).step
        assert drawn.unique().tolist() == [0, 1, 2, 3, 4]


@every_process
def test_a_path_is_a_chain_from_noise_to_x_0(kind):
    """Each move starts where the one before ended; ``state`` and ``move`` read them."""
    path = draw(RatePolicy(network_of(kind), decoder_of("analytic", 2)), boards(kind))
    assert torch.equal(path.step, every(path))
    assert torch.equal(path.before[:, 1:], path.after[:, :-1])
    assert torch.equal(path.after[:, -1], path.x_0)
    if kind == "masked":
        assert bool((path.before[:, 0][path.prompts.editable] == 3).all())
    k = torch.tensor([0, 3, 5, 6])
    states = path.state(k, mask_id=3)
    for b in range(3):
        assert torch.equal(states[b], path.before[b, k[b]])
    assert torch.equal(states[3], path.x_0[3])
    before, after = path.move(torch.tensor([5, 0, 2, 1]))
    assert torch.equal(before[2], path.before[2, 2]) and torch.equal(after[0], path.after[0, 5])
    assert path.acts().tolist() == [[True] * 6] * 4
    stuck = replace(path.prompts, editable=torch.zeros(4, L, dtype=torch.bool))
    assert not bool(replace(path, prompts=stuck).acts().any())


@every_process
@every_predictor
def test_what_is_given_stays_after_every_step(kind, predictor):
    """Prompts and padding, in every state; the rest does move."""
    prompts = boards(kind)
    path = draw(RatePolicy(network_of(kind), decoder_of(predictor, 2)), prompts)
    given = ~prompts.editable
    for states in (path.before, path.after, path.x_0[:, None]):
        for state in states.unbind(1):
            assert torch.equal(state[given], prompts.tokens[given])
    assert bool((path.x_0 < 3).all())
    assert bool((path.before[:, 0] != path.x_0)[prompts.editable].any())


# ---- the network ---------------------------------------------------------------------------------


@dataclass
class Noted:
    """A network that notes what it is asked."""

    network: ScoreNetwork
    asked: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def process(self) -> Process:
        return self.network.process

    def log_score(
        self, x_t: Tensor, total_noise: Tensor, *, attend: Tensor | None = None
    ) -> Tensor:
        self.asked.append((x_t, total_noise, attend))
        return self.network.log_score(x_t, total_noise, attend=attend)


@every_process
def test_the_network_sees_padding_and_noise(kind):
    """One row per step and sample, at the level of the step, with ``attend``."""
    noted, prompts = Noted(network_of(kind)), boards(kind)
    assert prompts.attend is not None
    policy = RatePolicy(noted, decoder_of("euler", 2))
    path = draw(policy, prompts)
    levels = [level for _, level, _ in policy.decoder.moves()]
    assert len(noted.asked) == 6
    for (x, noise, attend), level, before in zip(
        noted.asked, levels, path.before.unbind(1), strict=True
    ):
        assert torch.equal(x, before) and attend is not None and torch.equal(attend, prompts.attend)
        torch.testing.assert_close(noise, torch.full((4,), level, dtype=torch.float64))
    noted.asked.clear()
    policy.transition(path, torch.tensor([0, 2, 4, 5]), Score())
    (x, noise, attend) = noted.asked[0]
    assert attend is not None and torch.equal(attend, prompts.attend) and len(noted.asked) == 1
    expected = torch.tensor([levels[k] for k in (0, 2, 4, 5)], dtype=torch.float64)
    torch.testing.assert_close(noise, expected)


def test_network_rows_are_steps_and_corrector_steps_per_sample():
    """T + n_c for a path, one per step replayed; a bare network counts nothing."""
    policy = policy_of(network_of("uniform"), decoder_of("analytic", 2), 3)
    assert isinstance(policy, RatePolicy) and isinstance(policy.network, CountedScores)
    assert policy.rows == 0
    path = draw(policy, boards("uniform"))
    assert policy.rows == 4 * 6
    policy.log_probs(path, path.step[:, :5], Score())
    assert policy.rows == 4 * 6 + 4 * 5
    assert RatePolicy(policy.network.network, policy.decoder).rows == 0


@every_process
@every_predictor
@pytest.mark.parametrize("forward_rows", [1, 3])
def test_batches_and_parts_change_nothing(kind, predictor, forward_rows):
    """A sample alone, or in parts of any size: the same path, kept moves and numbers."""
    policy, record = RatePolicy(network_of(kind), decoder_of(predictor, 1)), Record(moves=2)
    whole = draw(policy, boards(kind), record)
    parts = draw(replace(policy, forward_rows=forward_rows), boards(kind), record)
    turned = torch.tensor([2, 0, 3, 1])
    shuffled = draw(policy, boards(kind).take(turned), record).take(turned.argsort())
    for other in (parts, shuffled):
        for name in ("x_0", "step", "before", "after"):
            assert torch.equal(getattr(other, name), getattr(whole, name)), name
        torch.testing.assert_close(other.log_prob, whole.log_prob, rtol=0, atol=1e-12)


def test_a_network_finds_its_policy():
    """Scores need a RateDecoder; a masked denoiser serves both kinds."""
    denoiser = MlpDenoiser(3, L, generator=torch.Generator().manual_seed(0))
    assert isinstance(policy_of(denoiser, Decoder(steps=2), 8), MaskedPolicy)
    rated = policy_of(denoiser, decoder_of("euler"), 8)
    assert isinstance(rated, RatePolicy) and rated.network.process == Absorbing(4, 3)
    assert rated.forward_rows == 8
    with pytest.raises(ValueError, match="TableScores predicts concrete scores.*RateDecoder"):
        policy_of(network_of("uniform"), Decoder(steps=2), 8)


# ---- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 1}, "steps=1, corrector_steps=0; expected at least 2 steps"),
        ({"steps": 3, "corrector_steps": -1}, "corrector_steps=-1"),
        ({"steps": 3, "corrector_size": 0.0}, r"corrector_size must lie in \(0, 1\], got 0.0"),
        ({"steps": 3, "corrector_size": 1.5}, "got 1.5"),
        ({"steps": 3, "corrector_size": math.nan}, "got nan"),
    ],
)
def test_a_wrong_decoder_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RateDecoder(**fields)


def test_moves_by_hand():
    """Log-linear noise, four steps: exp(-n) is 0.001, 0.25075, 0.5005, 0.75025 at the starts.

    A corrector step is as long as a fraction of the noise that is left.
    """
    decoder = RateDecoder(steps=4, corrector_steps=2, corrector_size=0.2)
    n = [-math.log(kept) for kept in (0.001, 0.25075, 0.5005, 0.75025)]
    expected = [
        ("predictor", n[0], n[0] - n[1]),
        ("predictor", n[1], n[1] - n[2]),
        ("predictor", n[2], n[2] - n[3]),
        ("corrector", n[3], 0.2 * n[3]),
        ("corrector", n[3], 0.2 * n[3]),
        ("denoise", n[3], n[3]),
    ]
    moves = decoder.moves()
    assert len(moves) == decoder.n_moves == 6
    assert decoder.t_0 == 0.25
    for (kind, level, length), (kind_, level_, length_) in zip(moves, expected, strict=True):
        assert kind == kind_
        assert (level, length) == pytest.approx((level_, length_), rel=1e-12)


def test_euler_steps_are_rate_times_time():
    """0.999 / exp(-n) over four; the last step removes all there is."""
    lengths = [length for _, _, length in RateDecoder(steps=4, predictor="euler").moves()]
    expected = [0.999 / kept / 4 for kept in (0.001, 0.25075, 0.5005)]
    assert lengths == pytest.approx([*expected, -math.log(0.75025)], rel=1e-12)


def test_the_last_step_removes_the_noise_of_time_0_too():
    """Geometric noise begins at ``low``: the last length is n(1/T), not n(1/T) - low."""
    moves = RateDecoder(steps=2, noise=Geometric(0.01, 4.0)).moves()
    assert moves[0][1:] == pytest.approx((4.0, 3.8))
    assert moves[1][1:] == pytest.approx((0.2, 0.2))


def test_shorter_protocols():
    """Fewer steps, the fewest first, and one corrector step if there are any."""
    decoder = RateDecoder(steps=4, corrector_steps=3, predictor="euler")
    shorter = [replace(decoder, steps=steps, corrector_steps=1) for steps in (2, 3)]
    assert list(decoder.shorter()) == shorter
    assert list(RateDecoder(steps=2).shorter()) == []
    assert [d.corrector_steps for d in RateDecoder(steps=3).shorter()] == [0]
    assert str(decoder) == "4 + 3 corrector steps, euler predictor"
    assert str(RateDecoder(steps=4)) == "4 steps, analytic predictor"


@pytest.mark.parametrize("law", ["analytic", "euler", "corrector"])
@pytest.mark.parametrize("length", [0.01, 0.4, 3.0, math.inf])
def test_laws_of_a_masked_denoiser_are_those_of_its_scores(law, length):
    """Values and gradients, per-sample noise, steps that overshoot and the one that denoises."""
    if law != "analytic" and length == math.inf:
        return
    network = network_of("masked")
    assert isinstance(network, SubsScores) and isinstance(network.network, MlpDenoiser)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, (6, L), generator=generator)
    noise = torch.rand(6, generator=generator, dtype=torch.float64) * 3 + 0.01
    weight = torch.rand(6, L, 4, generator=generator, dtype=torch.float64)
    direct = laws_at(CountedScores(network), x, noise, None)(law, length)
    by_scores = laws_at(network, x, noise, None)(law, length)
    torch.testing.assert_close(direct, by_scores, atol=1e-13, rtol=1e-10)
    parameters = list(network.network.parameters())
    one, other = (torch.autograd.grad((p * weight).sum(), parameters) for p in (direct, by_scores))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-9)
    assert (x == 3).any() and (x != 3).any()


def test_clean_log_probs_are_those_of_the_scores_and_count_a_row():
    network = network_of("masked")
    counted = CountedScores(network)
    x = torch.full((2, L), 3)
    noise = torch.tensor([0.3, 2.0], dtype=torch.float64)
    direct = counted.clean_log_probs(x, noise)
    assert counted.rows == 2
    by_scores = log_probs_from_score(network.log_score(x, noise), 3)
    torch.testing.assert_close(direct, by_scores)
    torch.testing.assert_close(counted.clean_probs(x), direct.exp())
    assert counted.rows == 4
