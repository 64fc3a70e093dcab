"""What holds for every rollout and every update, whatever the network.

Small canvases, the real sampler and the real ``Egspo``; formulas are written out only to compare.
The identities that need an expectation over paths are in ``test_identities.py``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from rescore.algorithms.egspo import Egspo
from rescore.models.tiny import TableDenoiser
from rescore.models.transformer import Transformer, TransformerConfig
from rescore.processes.masked import Order, blocks_of, reveal_quota
from rescore.proof.oracle import enumerate_paths
from rescore.proof.worlds import POLICY_SEED, REFERENCE_SEED, Tabled, World
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Record, Score, Slots
from rescore.sampling.rng import SampleRng
from rescore.types import Actions, Credited, MaskedTrajectory, Prompts, Scored, Terms
from tiny import masked, masked_policy

V, L, T, B = 3, 6, 4, 6
ORDERS: tuple[Order, ...] = get_args(Order)
SCORES = (
    Score(),
    Score(form="tokens_and_selection"),
    Score(form="tokens_and_selection", selection_weight=0.3),
    Score(score_temperature=1.0),
)
REWARD = torch.rand(V, V, V, V, V, V, generator=torch.Generator().manual_seed(5)).double()


def reward_of(x_0: Tensor) -> Tensor:
    """A table of independent uniforms."""
    return REWARD[x_0.unbind(-1)]


def prompts() -> Prompts:
    """Two groups of three; the second prompt gives two tokens of six."""
    editable = torch.ones(B, L, dtype=torch.bool)
    editable[3:, [1, 4]] = False
    return Prompts(
        tokens=torch.where(editable, V, torch.arange(L) % V),
        editable=editable,
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        sample_id=torch.arange(B) + 40,
        info={},
    )


def table(seed: int, dtype: torch.dtype = torch.float64) -> TableDenoiser:
    generator = torch.Generator().manual_seed(seed)
    return TableDenoiser(V, L, generator=generator, dtype=dtype)


def transformer(
    seed: int, dtype: torch.dtype, embedding: Literal["learned", "rotary"] = "learned"
) -> Transformer:
    """Longer than the canvas, so that there is room for padding; its predictions vary."""
    config = TransformerConfig(
        vocab_size=V, length=L + 3, width=16, depth=2, heads=2, position_embedding=embedding
    )
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight.mul_(50)
    return model.to(dtype)


def rollout(algorithm: Egspo, policy: MaskedPolicy, given: Prompts) -> MaskedTrajectory:
    return policy.sample(given, algorithm.record, SampleRng(0, given.sample_id))


def credited(algorithm: Egspo, models: Models, given: Prompts, reward=reward_of) -> Credited:
    """From prompts to weighted steps, as the training loop does; padding earns nothing."""
    policy = masked_policy(models.new)
    algorithm.check(policy.decoder, 3, ["reward"])
    selected = algorithm.select(models, rollout(algorithm, policy, given))
    terms = {}
    if selected.completion is not None:
        terms["reward"] = reward(selected.completion[..., :L])
    scored = Scored(
        **{**selected.fields(), "completion": None},
        reward=reward(selected.trajectory.x_0[:, :L]),
        terms={},
        completion_terms=terms,
    )
    return algorithm.credit(algorithm.annotate(models, scored, SampleRng(0, given.sample_id)))


def loss_of(algorithm: Egspo, models: Models, actions: Actions) -> Terms:
    return algorithm.loss(models, actions, SampleRng(0, actions.trajectory.prompts.sample_id))


def flat_gradient(value: Tensor, network: nn.Module) -> Tensor:
    parts = torch.autograd.grad(value, list(network.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def close(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.5), (0.1, 0.3), (0.6, 0.05), (0.0, 0.0)])
@pytest.mark.parametrize("advantage", [0.7, -1.3])
def test_t10_clip_table(low, high, advantage):
    """T10, the clip: dL/dl = -A rho, so -A at rho = 1, and 0 where the ratio gains nothing.

    That is iff A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low; each bound has its own value.
    """
    algorithm = Egspo(n_steps=T, beta=0.0, clip_low=low, clip_high=high)
    network = table(0)
    models = Models(MaskedPolicy(network, Decoder(steps=T, temperature=0.7)))
    stage = credited(algorithm, models, prompts())
    actions = stage.actions(stage.pairs())
    path = actions.trajectory
    with torch.no_grad():
        new = models.new.transition(path, actions.step, Score()).log_prob
    near = 1e-3
    for rho in (0.2, 1 - low - near, 1 - low + near, 1.0, 1 + high - near, 1 + high + near, 4.0):
        shifted = replace(
            actions,
            trajectory=replace(path, log_prob=path.log_prob - math.log(rho)),
            advantage=torch.full_like(actions.advantage, advantage),
        )
        terms = loss_of(algorithm, models, shifted)
        gains = rho <= 1 + high if advantage > 0 else rho >= 1 - low
        slope = -advantage * rho if gains else 0.0
        bound = rho if gains else (1 + high if advantage > 0 else 1 - low)
        close(terms.loss, torch.full_like(new, -advantage * bound))
        if rho == 1.0 + high == 1.0 - low:
            continue  # a kink: nothing is claimed about its slope
        new = models.new.transition(actions.trajectory, actions.step, Score()).log_prob
        close(flat_gradient(terms.loss.sum(), network), flat_gradient(slope * new.sum(), network))


def exact_divergence(
    new: Tabled, ref: Tabled, path: MaskedTrajectory, p: Tensor, *, forward: bool
) -> tuple[float, Tensor]:
    """sum_t E KL(new || ref) (``forward``: KL(ref || new)) of the tokens, and its gradient.

    By hand, over the states and positions that the paths meet, which are taken as given.
    """
    new.uses.clear()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(path.n_steps):
        x_t = path.state(torch.full((len(p),), k), new.mask_id)
        log_new = (new.predict(x_t) / 0.7).log_softmax(-1)
        with torch.no_grad():
            log_ref = (ref.predict(x_t) / 0.7).log_softmax(-1)
        a, b = (log_ref, log_new) if forward else (log_new, log_ref)
        now = path.step_of() == k
        total = total + (p[:, None] * now * (a.exp() * (a - b)).sum(-1)).sum()
    return total.item(), new.gradient(total)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_t11_values_and_gradients_of_the_kl_estimators(kl, steps):
    """T11, KL as a loss: E[k1] = E[k3] = KL(new || ref), while their gradients are others.

    E grad: k1 nothing, k2 and the exact sum that of KL(new || ref), k3 that of KL(ref || new); over
    all paths of worlds that reveal one to three tokens in a step, states taken as given.
    """
    world = World(3, 3, steps, 1, "table")
    decoder = world.decoder("random", 0.7)
    new, ref = (
        Tabled.of(world.denoiser(s), world.canvases()) for s in (POLICY_SEED, REFERENCE_SEED)
    )
    models = Models(MaskedPolicy(new, decoder), MaskedPolicy(ref, decoder))
    algorithm = Egspo(n_steps=1, selection="all", beta=1.0, kl=kl, baseline="none")
    path, p = enumerate_paths(new, decoder, world, algorithm.record)
    p = p.detach()
    selected = algorithm.select(models, path)
    nothing = torch.zeros(len(p), dtype=torch.float64)
    scored = Scored(**selected.fields(), reward=nothing, terms={})
    rng = SampleRng(0, path.prompts.sample_id)
    stage = algorithm.credit(algorithm.annotate(models, scored, rng))
    pairs = stage.pairs()
    assert len(pairs) == steps * len(p)
    value, backward = exact_divergence(new, ref, path, p, forward=False)
    _, forward = exact_divergence(new, ref, path, p, forward=True)

    new.uses.clear()
    loss = (p[pairs[:, 0]] * loss_of(algorithm, models, stage.actions(pairs)).loss).sum()
    gradient = new.gradient(loss)
    if kl == "k2":
        assert abs(loss.item() - value) > 0.01
    else:
        assert loss.item() == pytest.approx(value, rel=0, abs=1e-12)
    expected = {
        "k1": torch.zeros_like(gradient),
        "k2": backward,
        "k3": forward,
        "exact": backward,
    }[kl]
    close(gradient, expected)
    assert float((forward - backward).norm()) > 0.01


@dataclass
class Constant:
    """A network of one law, in bfloat16, whatever the canvas."""

    logits: Tensor
    mask_id: int = field(init=False)
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.vocab_size = self.mask_id = len(self.logits)

    def predict(
        self, x_t: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        rows = x_t if positions is None else positions
        return self.logits.expand(*rows.shape, -1)


def test_t12_a_diffuse_tail_is_sampled_with_its_mass():
    """T12, the sampler's noise: 10,000 rare tokens of mass 0.115 in all come up that often.

    Though the network speaks bfloat16. Gumbel noise of that precision, as argmax of
    exp(logits) / (-log u)^temperature, gives the tail nothing and the head what it lost.
    """
    head, n_tail, temperature = [0.528, 0.244, 0.113], 10_000, 0.9
    law = torch.cat([torch.tensor(head), torch.full((n_tail,), (1 - sum(head)) / n_tail)])
    denoiser = Constant((law.log() * temperature).bfloat16())
    exact = (denoiser.logits.double() / temperature).softmax(-1)
    policy = MaskedPolicy(denoiser, Decoder(steps=1, temperature=temperature))

    n_draws, drawn = 0, []
    for first in range(0, 120, 8):
        given = Prompts(
            tokens=torch.full((8, 16), denoiser.mask_id),
            editable=torch.ones(8, 16, dtype=torch.bool),
            group=torch.zeros(8, dtype=torch.long),
            sample_id=torch.arange(first, first + 8),
            info={},
        )
        path = policy.sample(given, Record(), SampleRng(3, given.sample_id))
        drawn.append(path.x_0.flatten())
        n_draws += path.x_0.numel()
    token = torch.cat(drawn)
    for which, mass in ((token > 2, exact[3:].sum()), *((token == v, exact[v]) for v in range(3))):
        spread = (mass * (1 - mass) / n_draws).sqrt()
        assert float((which.double().mean() - mass).abs() / spread) < 4
    assert token[token > 2].unique().numel() > 0.98 * int((token > 2).sum())

    generator, coarse = torch.Generator().manual_seed(0), []
    weight = denoiser.logits.exp()
    for _ in range(300):
        u = torch.rand(len(weight), generator=generator, dtype=torch.bfloat16)
        coarse.append(int((weight / (-u.log()) ** temperature).argmax()))
    assert max(coarse) <= 2


@pytest.mark.parametrize("order", ORDERS)
def test_t13_recorded_log_probabilities_are_those_of_the_replay(order):
    """T13, what is recorded: float32 log-probabilities of a bfloat16 network, replayed bit by bit.

    Rounded to bfloat16 they would be off by up to a part in 2^9 of themselves, and the ratios with
    them.
    """
    policy = MaskedPolicy(
        transformer(1, torch.bfloat16), Decoder(steps=3, order=order, temperature=0.7)
    )
    given = prompts().take(torch.tensor([0, 1, 2]))
    for score in SCORES:
        path = policy.sample(
            given, Record(score=score, entropy=True), SampleRng(0, given.sample_id)
        )
        assert path.log_prob.dtype == torch.float32
        assert path.entropy is not None
        assert path.entropy.dtype == torch.float32
        for k in range(3):
            step = torch.full((3,), k)
            replay = policy.transition(path, step, score).log_prob
            close(replay.detach(), path.log_prob[:, k], atol=0)
        rounded = path.log_prob.bfloat16().float()
        assert 2**-10 < float((rounded / path.log_prob - 1).abs().max()) <= 2**-8


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_t14_the_first_ratio_is_one(order, blocks):
    """T14, the first inner step: new = old, so every ratio is 1, bit by bit on free tables.

    For each order, form of the score and aggregation. A transformer sees other batches when it
    samples and when it trains: there float32 rounding is left.
    """
    decoder = Decoder(steps=T, blocks=blocks, order=order, temperature=0.7)
    for dtype, score, aggregation in itertools.product(
        (torch.float32, torch.float64), SCORES, get_args(Literal["sum", "mean"])
    ):
        algorithm = Egspo(n_steps=T, beta=0.0, score=score, aggregation=aggregation)
        models = Models(MaskedPolicy(table(0, dtype), decoder))
        stage = credited(algorithm, models, prompts())
        assert len(stage.pairs()) == B * T
        terms = loss_of(algorithm, models, stage.actions(stage.pairs()))
        assert torch.equal(terms.metrics["ratio"], torch.ones_like(terms.loss))
        assert bool((terms.metrics["kl_old_new"] == 0).all())
        assert bool((terms.metrics["clip_fraction"] == 0).all())
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        algorithm = Egspo(n_steps=T, beta=0.0, score=SCORES[1])
        models = Models(MaskedPolicy(transformer(0, dtype), decoder))
        stage = credited(algorithm, models, prompts())
        ratio = loss_of(algorithm, models, stage.actions(stage.pairs())).metrics["ratio"]
        close(ratio, torch.ones_like(ratio), atol=atol)


@dataclass
class Watched:
    """A network that remembers the canvases it was shown."""

    network: TableDenoiser
    seen: list[Tensor] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    def predict(
        self, x_t: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        self.seen.append(x_t.clone())
        return self.network.predict(x_t, attend=attend, positions=positions)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_a_and_b_invariants_of_a_path(order, blocks):
    """(a) Each step unmasks its quota, nothing revealed changes, blocks finish in order.

    (b) The canvases the network saw are those rebuilt from one rank per position.
    """
    watched = Watched(table(0))
    decoder = Decoder(steps=T, blocks=blocks, order=order, temperature=0.7)
    given = prompts()
    path = MaskedPolicy(watched, decoder).sample(given, Record(), SampleRng(1, given.sample_id))
    block = blocks_of(given.editable, blocks)
    quota, _ = reveal_quota(block, blocks, T)
    canvases = [*watched.seen, path.x_0]
    assert len(canvases) == T + 1
    assert torch.equal(canvases[0], given.tokens)
    for k, (before, after) in enumerate(itertools.pairwise(canvases)):
        assert torch.equal(path.state(torch.full((B,), k), V), before)
        written = (before == V) & (after != V)
        assert torch.equal(written.sum(1), quota[:, k])
        assert torch.equal(path.revealed()[:, k], quota[:, k])
        assert torch.equal(after[before != V], before[before != V])
        assert bool((block[written] == k // decoder.steps_per_block).all())
    assert bool((path.x_0 != V).all())
    assert quota[:3].tolist() == [[2, 2, 1, 1] if blocks == 1 else [2, 1, 2, 1]] * 3
    assert quota[3:].tolist() == [[1] * T] * 3


@pytest.mark.parametrize("completions", [False, True])
def test_c_columns_are_sorted_by_decreasing_entropy(completions):
    """(c) Column k of the top steps is the k-th largest entropy of that sample's own path."""
    algorithm = Egspo(n_steps=3, lam=0.5 if completions else 0.0)
    policy = MaskedPolicy(table(0), Decoder(steps=T, temperature=0.7))
    path = rollout(algorithm, policy, prompts())
    assert path.entropy is not None
    selected = algorithm.select(Models(policy), path)
    found = path.entropy.gather(1, selected.step)
    assert torch.equal(found, path.entropy.sort(dim=1, descending=True).values[:, :3])
    assert selected.step.unique(dim=0).shape[0] > 1
    assert bool((selected.step_weight == 1).all())


@pytest.mark.parametrize("baseline", ["none", "group_mean", "leave_one_out"])
@pytest.mark.parametrize("selection", ["top", "importance", "random", "all"])
def test_d_without_lambda_all_columns_are_equal(selection, baseline):
    """(d) With lambda = 0 every step of a sample has the advantage r - baseline."""
    algorithm = Egspo(n_steps=3, selection=selection, baseline=baseline, beta=0.1)
    policy = MaskedPolicy(table(0), Decoder(steps=T, temperature=0.7))
    stage = credited(algorithm, Models(policy, policy), prompts())
    assert torch.equal(stage.advantage, stage.advantage[:, :1].expand_as(stage.advantage))
    r = stage.reward.view(2, 3)
    mean = r.mean(1, keepdim=True)
    others = (r.sum(1, keepdim=True) - r) / 2
    subtracted = {"none": 0 * r, "group_mean": mean, "leave_one_out": others}[baseline]
    close(stage.advantage[:, 0], (r - subtracted).flatten())
    stepwise = credited(replace(algorithm, lam=0.5), Models(policy, policy), prompts())
    assert not torch.equal(stepwise.advantage[:, 0], stepwise.advantage[:, 1])


@pytest.mark.parametrize("order", ORDERS)
def test_e_the_completion_before_the_last_step(order):
    """(e) It is the argmax of the last network call; at temperature 0 it is the sample itself.

    Computed on the way down or afterwards, the same for every step; r_hat is its reward.
    """
    network, given = table(0), prompts()
    everything = Record(slots=Slots(n=T, by="uniform", completions=True))
    for temperature in (0.7, 0.0):
        policy = MaskedPolicy(network, Decoder(steps=T, order=order, temperature=temperature))
        path = policy.sample(given, everything, SampleRng(2, given.sample_id))
        assert path.kept is not None
        assert path.kept.completion is not None
        assert torch.equal(path.kept.step, torch.arange(T).expand(B, -1))
        for k in range(T):
            step = torch.full((B,), k)
            x_t = path.state(step, V)
            guess = torch.where(x_t == V, network.predict(x_t).argmax(-1), x_t)
            assert torch.equal(path.kept.completion[:, k], guess)
            assert torch.equal(policy.completions(path, step), guess)
        same = (path.kept.completion[:, -1] == path.x_0).all()
        assert bool(same) == (temperature == 0)
    algorithm = Egspo(n_steps=1, selection="uniform", lam=math.inf, baseline="none", beta=0.0)
    policy = MaskedPolicy(network, Decoder(steps=T, order=order, temperature=0.7))
    stage = credited(algorithm, Models(policy), given)
    assert isinstance(stage.trajectory, MaskedTrajectory)
    x_t = stage.trajectory.state(stage.step[:, 0], V)
    guess = torch.where(x_t == V, network.predict(x_t).argmax(-1), x_t)
    close(stage.advantage[:, 0], reward_of(stage.trajectory.x_0) - reward_of(guess))


@pytest.mark.parametrize("lam", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("selection", ["top", "importance", "all"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_f_advantages_sum_to_zero_in_each_group_and_column(lam, selection, baseline):
    """(f) Group by group and column by column the advantages sum to 0, and are not all 0."""
    algorithm = Egspo(n_steps=3, selection=selection, lam=lam, baseline=baseline, beta=0.0)
    policy = MaskedPolicy(table(0), Decoder(steps=T, temperature=0.7))
    advantage = credited(algorithm, Models(policy), prompts()).advantage
    for group in advantage.split(3):
        assert float(group.sum(0).abs().max()) < 1e-15
        assert float(group.abs().amax(0)[0]) > 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_g_equal_rewards_train_nothing(lam, baseline):
    """(g) Where all rewards and all r_hat are equal, no step is trained; with a KL only that is."""
    algorithm = Egspo(n_steps=3, lam=lam, baseline=baseline, beta=0.0)
    network = table(0)
    decoder = Decoder(steps=T, temperature=0.7)
    models = Models(MaskedPolicy(network, decoder), MaskedPolicy(table(1), decoder))

    def constant(x_0: Tensor) -> Tensor:
        return torch.full(x_0.shape[:-1], 0.1 + 0.2, dtype=torch.float64)

    stage = credited(algorithm, models, prompts(), constant)
    assert bool((stage.advantage == 0).all())
    assert len(stage.pairs()) == 0
    pulled = credited(replace(algorithm, beta=0.3), models, prompts(), constant)
    actions = pulled.actions(pulled.pairs())
    terms = loss_of(replace(algorithm, beta=0.3), models, actions)
    close(terms.loss, 0.3 * terms.metrics["kl_new_ref"])
    without = loss_of(algorithm, models, actions)
    assert float(flat_gradient(without.loss.sum(), network).abs().max()) == 0
    assert float(flat_gradient(terms.loss.sum(), network).abs().max()) > 1e-3


def test_g_equal_completions_change_nothing():
    """(g) r_hat that is constant in a group leaves the advantages of lambda = 0, if normalised.

    And lambda = infinity is the limit of large ones: r - r_hat, centred.
    """
    policy = MaskedPolicy(table(0), Decoder(steps=T, temperature=0.7))
    plain = Egspo(n_steps=3, beta=0.0)
    stage = credited(replace(plain, lam=0.5), Models(policy), prompts())
    level = torch.tensor([0.3, 0.3, 0.3, 0.9, 0.9, 0.9], dtype=torch.float64)[:, None]
    equal = replace(stage, completion_terms={"reward": level.expand(-1, 3)})
    fields = {name: equal.fields()[name] for name in Scored.__dataclass_fields__}
    found = replace(plain, lam=0.5).credit(Scored(**fields)).advantage
    close(found, credited(plain, Models(policy), prompts()).advantage)

    returns = (stage.reward[:, None] - stage.completion_terms["reward"]).unflatten(0, (2, 3))
    limit = (returns - returns.mean(1, keepdim=True)).flatten(0, 1)
    for lam, atol in ((math.inf, 1e-15), (1e6, 1e-5)):
        close(credited(replace(plain, lam=lam), Models(policy), prompts()).advantage, limit, atol)


def padded(given: Prompts, left: int, right: int) -> Prompts:
    """The same prompts on wider canvases, with arbitrary tokens in the padding."""
    tokens = nn.functional.pad(given.tokens, (left, right), value=1)
    tokens[:, :left] = 2
    editable = nn.functional.pad(given.editable, (left, right))
    attend = nn.functional.pad(torch.ones_like(given.editable), (left, right))
    return replace(given, tokens=tokens, editable=editable, attend=attend)


STEPWISE = Egspo(n_steps=3, lam=0.5, beta=0.1, score=SCORES[1])


def transformers(
    order: Order, embedding: Literal["learned", "rotary"]
) -> tuple[Transformer, Models]:
    decoder = Decoder(steps=T, blocks=2, order=order, temperature=0.7)
    network = transformer(1, torch.float64, embedding)
    new = MaskedPolicy(network, decoder)
    ref = MaskedPolicy(transformer(2, torch.float64, embedding), decoder)
    return network, Models(new, ref)


@pytest.mark.parametrize("order", ORDERS)
def test_h_padding_changes_nothing(order):
    """(h) Padding on the right: the same draws, steps, completions, loss and gradient.

    A learned embedding numbers positions from the left, so the real ones keep their names.
    """
    network, models = transformers(order, "learned")
    found = []
    for given in (prompts(), padded(prompts(), 0, 3)):
        stage = credited(STEPWISE, models, given)
        terms = loss_of(STEPWISE, models, stage.actions(stage.pairs()))
        gradient = flat_gradient((terms.loss * stage.weight[stage.weight != 0]).sum(), network)
        found.append((stage, terms, gradient))
    (bare, bare_terms, bare_gradient), (wide, wide_terms, wide_gradient) = found
    assert torch.equal(wide.trajectory.x_0[:, :L], bare.trajectory.x_0)
    assert torch.equal(wide.trajectory.step_of()[:, :L], bare.trajectory.step_of())
    assert bool((wide.trajectory.rank[:, L:] == -1).all())
    assert torch.equal(wide.step, bare.step)
    close(wide.trajectory.log_prob, bare.trajectory.log_prob)
    close(wide.advantage, bare.advantage)
    close(wide_terms.loss, bare_terms.loss)
    close(wide_gradient, bare_gradient)


@pytest.mark.parametrize("order", ORDERS)
def test_h_padding_on_the_left_changes_nothing_where_positions_are_relative(order):
    """(h) The same paths moved to the right on a wider canvas: the loss stays, if rotary."""
    network, models = transformers(order, "rotary")
    given = prompts()
    tokens, editable = given.tokens.clone(), given.editable.clone()
    tokens[:3, 2], editable[:3, 2] = 1, False  # all positions of a blank canvas would tie
    stage = credited(STEPWISE, models, replace(given, tokens=tokens, editable=editable))
    path, left, right = masked(stage.trajectory), 2, 1
    width = L + left + right
    rank = torch.where(path.rank >= 0, path.step_of() * width + path.rank % L, -1)
    log_time = path.log_time
    moved = replace(
        path,
        prompts=padded(path.prompts, left, right),
        x_0=nn.functional.pad(path.x_0, (left, right), value=1),
        rank=nn.functional.pad(rank, (left, right), value=-1),
        log_time=None if log_time is None else nn.functional.pad(log_time, (left, right)),
    )
    losses, gradients = [], []
    for here in (stage, replace(stage, trajectory=moved)):
        loss = loss_of(STEPWISE, models, here.actions(here.pairs())).loss
        losses.append(loss.detach())
        gradients.append(flat_gradient((loss * stage.weight[stage.weight != 0]).sum(), network))
    close(losses[1], losses[0])
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("order", ORDERS)
def test_h_the_rest_of_the_batch_changes_nothing(order):
    """(h) A group alone, or with its samples in another order, has the same paths and losses."""
    _, models = transformers(order, "learned")
    whole = credited(STEPWISE, models, prompts())
    loss = loss_of(STEPWISE, models, whole.actions(whole.pairs())).loss
    table_of = torch.zeros_like(whole.weight).masked_scatter(whole.weight != 0, loss.detach())
    for rows in ([0, 1, 2], [5, 3, 4], [4, 1, 0, 5, 2, 3]):
        row = torch.tensor(rows)
        given = prompts().take(row)
        given = replace(given, group=given.group - given.group.min())
        part = credited(STEPWISE, models, given)
        assert torch.equal(part.trajectory.x_0, whole.trajectory.x_0[row])
        assert torch.equal(part.step, whole.step[row])
        close(part.advantage, whole.advantage[row])
        close(part.weight * len(rows), whole.weight[row] * B)
        alone = loss_of(STEPWISE, models, part.actions(part.pairs())).loss
        close(alone, table_of[row][part.weight != 0])


@pytest.mark.parametrize("selection", ["top", "importance", "all"])
def test_i_one_by_one_or_in_one_batch(selection):
    """(i) The loss is the same in one batch, column by column (a mean of each), or in any chunks.

    So is its gradient, and the order of the pairs plays no part.
    """
    network, models = transformers("random", "learned")
    algorithm = replace(STEPWISE, selection=selection)
    stage = credited(algorithm, models, prompts())
    pairs = stage.pairs()

    def total(*parts: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.zeros((), dtype=torch.float64)
        for part in parts:
            actions = stage.actions(part)
            value = value + (actions.weight * loss_of(algorithm, models, actions).loss).sum()
        return value.detach(), flat_gradient(value, network)

    value, gradient = total(pairs)
    columns = [pairs[pairs[:, 1] == k] for k in range(stage.step.shape[1])]
    shuffled = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    for parts in (columns, pairs.split(1), shuffled.split(5)):
        other_value, other_gradient = total(*parts)
        close(other_value, value)
        close(other_gradient, gradient)
    means = [
        (
            stage.step_weight[part[:, 0], part[:, 1]]
            * loss_of(algorithm, models, stage.actions(part)).loss
        ).sum()
        / B
        for part in columns
    ]
    close(torch.stack(means).sum().detach(), value)


def test_k_equal_to_t_is_every_step():
    """K = T: the top steps are all steps in another order, so loss and gradient are the same."""
    network = table(0)
    decoder = Decoder(steps=T, temperature=0.7)
    models = Models(MaskedPolicy(network, decoder), MaskedPolicy(table(1), decoder))
    found = []
    for algorithm in (Egspo(n_steps=T, beta=0.1), Egspo(n_steps=1, selection="all", beta=0.1)):
        stage = credited(algorithm, models, prompts())
        actions = stage.actions(stage.pairs())
        loss = (actions.weight * loss_of(algorithm, models, actions).loss).sum()
        found.append((loss.detach(), flat_gradient(loss, network)))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])
