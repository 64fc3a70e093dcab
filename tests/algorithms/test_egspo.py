"""EGSPO: which steps it takes, what each counts for, and its loss by hand."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rescore.algorithms.egspo import Egspo
from rescore.models.tiny import MlpDenoiser
from rescore.objectives.advantages import covering_steps
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Score, Slots
from rescore.sampling.rng import SampleRng
from rescore.sampling.slots import evenly_spaced
from rescore.types import Credited, MaskedTrajectory, Prompts, Scored, Selected
from tiny import masked

V, L, T, B = 3, 6, 5, 6
REWARD = torch.tensor([1.0, 0.25, 0.4, 0.3, 0.3, 0.3], dtype=torch.float64)
RNG = SampleRng(0, torch.arange(B))
DECODER = Decoder(steps=T, temperature=0.7)
TERMS = ("zeros", "ones")


class Counting(MlpDenoiser):
    """Counts its network rows."""

    rows = 0

    def logits(self, x_t: Tensor) -> Tensor:
        self.rows += len(x_t)
        return super().logits(x_t)


def policy(seed: int) -> MaskedPolicy:
    return MaskedPolicy(Counting(V, L, generator=torch.Generator().manual_seed(seed)), DECODER)


OLD, NEW, REF = policy(0), policy(1), policy(2)
MODELS = Models(OLD, REF)


def rollout(algorithm: Egspo) -> MaskedTrajectory:
    """Two groups of three; the second prompt leaves three blanks for five steps."""
    editable = torch.arange(L)[None] >= torch.tensor([[0], [0], [0], [3], [3], [3]])
    prompts = Prompts(
        tokens=torch.where(editable, V, 1),
        editable=editable,
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        sample_id=torch.arange(B),
        info={},
    )
    return OLD.sample(prompts, algorithm.record, RNG)


def worth(x_0: Tensor) -> dict[str, Tensor]:
    """Two terms of a completion, with their weights: the share of zeros, half that of ones."""
    return {
        "zeros": (x_0 == 0).double().mean(-1),
        "ones": 0.5 * (x_0 == 1).double().mean(-1),
    }


def scored(algorithm: Egspo, reward: Tensor = REWARD) -> Scored:
    selected = algorithm.select(MODELS, rollout(algorithm))
    completion_terms = {}
    if selected.completion is not None:
        chosen = selected.step_weight != 0
        terms = worth(selected.completion)
        completion_terms = {name: torch.where(chosen, r, 0.0) for name, r in terms.items()}
    fields = {**selected.fields(), "completion": None}
    stage = Scored(**fields, reward=reward, terms={}, completion_terms=completion_terms)
    return algorithm.annotate(MODELS, stage, SampleRng(0, stage.trajectory.prompts.sample_id))


def credited(algorithm: Egspo, reward: Tensor = REWARD) -> Credited:
    return algorithm.credit(scored(algorithm, reward))


def gradient(algorithm: Egspo, stage: Credited, size: int | None = None) -> list[Tensor]:
    """Of the weighted loss of all pairs, ``size`` at a time."""
    assert isinstance(NEW.denoiser, MlpDenoiser)
    weights, pairs = list(NEW.denoiser.parameters()), stage.pairs()
    total = [torch.zeros_like(weight) for weight in weights]
    for part in pairs.split(size or len(pairs)):
        actions = stage.actions(part)
        terms = algorithm.loss(Models(NEW, REF), actions, RNG)
        parts = torch.autograd.grad((actions.weight * terms.loss).sum(), weights)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return total


# ---- selection -----------------------------------------------------------------------------------


def entropies(trajectory: MaskedTrajectory) -> Tensor:
    assert trajectory.entropy is not None
    return trajectory.entropy


@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({}, Slots(n=3, by="top")),
        ({"selection": "bottom"}, Slots(n=3, by="bottom")),
        ({"selection": "uniform"}, Slots(n=3, by="uniform")),
        ({"selection": "random", "lam": 0.5}, Slots(n=3, by="random", completions=True)),
        (
            {"selection": "importance", "delta": 0.3, "lam": math.inf},
            Slots(n=3, by="importance", delta=0.3, completions=True),
        ),
        ({"selection": "all"}, None),
        ({"selection": "all", "lam": 0.5}, Slots(n=None, by="uniform", completions=True)),
        ({"selection": "adaptive"}, None),
        ({"selection": "adaptive", "lam": 0.5}, None),
    ],
)
def test_what_the_sampler_must_save(changes, slots):
    """Entropies always; completions only where lambda asks for them and steps are known by then."""
    score = Score(form="tokens_and_selection")
    record = Egspo(n_steps=3, score=score, **changes).record
    assert record.entropy and record.score == score
    assert record.slots == slots


@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize(("selection", "sign"), [("top", -1), ("bottom", 1)])
def test_top_and_bottom_take_the_steps_of_extreme_entropy(selection, sign, lam):
    """Sorted by the entropy of each sample's own path, each with weight 1; idle steps with 0."""
    algorithm = Egspo(n_steps=4, selection=selection, lam=lam)
    trajectory = rollout(algorithm)
    selected = algorithm.select(MODELS, trajectory)
    assert masked(selected.trajectory).kept is None
    rows = zip(selected.step.tolist(), selected.step_weight.tolist(), strict=True)
    revealed, entropy = trajectory.revealed().tolist(), entropies(trajectory).tolist()
    for (row, weights), n, h in zip(rows, revealed, entropy, strict=True):
        active = [t for t in range(T) if n[t]]
        best = sorted(active, key=lambda t, h=h: (sign * h[t], t))[:4]
        assert row == best + [0] * (4 - len(best))
        assert weights == [1.0] * len(best) + [0.0] * (4 - len(best))
    assert (selected.completion is not None) == (lam > 0)


def test_uniform_and_random_do_not_look_at_the_entropy():
    """Evenly spaced active steps; distinct active steps; each with weight 1."""
    algorithm = Egspo(n_steps=3, selection="uniform")
    trajectory = rollout(algorithm)
    selected = algorithm.select(MODELS, trajectory)
    assert torch.equal(selected.step, evenly_spaced(trajectory.revealed() > 0, 3))
    assert bool((selected.step_weight == 1).all())
    algorithm = Egspo(n_steps=3, selection="random")
    selected = algorithm.select(MODELS, rollout(algorithm))
    assert bool((selected.step_weight == 1).all())
    for row, n in zip(selected.step.tolist(), trajectory.revealed().tolist(), strict=True):
        assert len(set(row)) == 3 and all(n[t] for t in row)
    assert len({tuple(sorted(row)) for row in selected.step[:3].tolist()}) > 1


def test_all_takes_every_step_that_reveals_something():
    """Columns 0 ... T - 1, with weight 0 where nothing is revealed; n_steps plays no part."""
    algorithm = Egspo(n_steps=1, selection="all")
    selected = algorithm.select(MODELS, rollout(algorithm))
    assert selected.step.tolist() == [list(range(T))] * B
    active = masked(selected.trajectory).revealed() > 0
    assert torch.equal(selected.step_weight, active.double())
    assert selected.completion is None


@pytest.mark.parametrize("mass", [0.3, 0.7, 1.0])
def test_adaptive_takes_the_fewest_steps_that_cover_the_entropy(mass):
    """Each path has its own number of them."""
    algorithm = Egspo(selection="adaptive", mass=mass)
    selected = algorithm.select(MODELS, rollout(algorithm))
    covered = covering_steps(entropies(masked(selected.trajectory)), mass)
    assert torch.equal(selected.step_weight, covered.double())
    assert selected.step.tolist() == [list(range(T))] * B
    if mass == 1:
        assert torch.equal(covered, masked(selected.trajectory).revealed() > 0)
    else:
        assert 0 < int(covered.sum()) < int((masked(selected.trajectory).revealed() > 0).sum())


def test_importance_draws_are_weighted_by_one_over_k_q():
    """q = (H + delta) / sum over the steps that reveal something; a draw weighs 1 / (K q)."""
    algorithm = Egspo(n_steps=4, selection="importance", delta=0.3)
    selected = algorithm.select(MODELS, rollout(algorithm))
    active = masked(selected.trajectory).revealed() > 0
    q = torch.where(active, entropies(masked(selected.trajectory)) + 0.3, 0.0)
    q = q / q.sum(1, keepdim=True)
    drawn = q.gather(1, selected.step)
    assert bool((drawn > 0).all())
    torch.testing.assert_close(selected.step_weight, 1 / (4 * drawn))


def test_importance_draws_follow_q_and_stand_for_the_sum_over_all_steps():
    """Frequencies of 6 x 4000 draws; the mean of sum_k weight f(step) is sum_t f(t)."""
    algorithm = Egspo(n_steps=4000, selection="importance", delta=0.3)
    selected = algorithm.select(MODELS, rollout(algorithm))
    f = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    active = masked(selected.trajectory).revealed() > 0
    q = torch.where(active, entropies(masked(selected.trajectory)) + 0.3, 0.0)
    q = q / q.sum(1, keepdim=True)
    for b in range(B):
        count = torch.bincount(selected.step[b], minlength=T)
        p = q[b][active[b]]
        assert float(((count[active[b]] - 4000 * p) ** 2 / (4000 * p)).sum()) < 25
        estimate = float((selected.step_weight[b] * f[selected.step[b]]).sum())
        exact = float(f[active[b]].sum())
        spread = math.sqrt(float((f[active[b]] ** 2 / p).sum() - exact**2) / 4000)
        assert abs(estimate - exact) < 4 * spread
    assert not torch.equal(selected.step[0], selected.step[1])


# ---- completions ---------------------------------------------------------------------------------


def selected_at_a_cost(algorithm: Egspo) -> tuple[Selected, int, int]:
    """The selection, and the network rows of sampling and of selecting."""
    denoiser = OLD.denoiser
    assert isinstance(denoiser, Counting)
    before = denoiser.rows
    trajectory = rollout(algorithm)
    sampled = denoiser.rows - before
    selected = algorithm.select(MODELS, trajectory)
    return selected, sampled, denoiser.rows - before - sampled


@pytest.mark.parametrize(
    "selection", ["top", "bottom", "uniform", "random", "importance", "all", "adaptive"]
)
def test_what_completions_cost(selection):
    """Those kept on the way down are free; ``adaptive`` pays one network row for each."""
    algorithm = Egspo(n_steps=3, selection=selection, lam=0.5)
    selected, sampled, extra = selected_at_a_cost(algorithm)
    assert sampled == T * B
    chosen = selected.step_weight != 0
    assert extra == (int(chosen.sum()) if selection == "adaptive" else 0)
    assert selected.completion is not None
    sample, column = chosen.nonzero().unbind(1)
    paths = masked(selected.trajectory).take(sample)
    asked = OLD.completions(paths, selected.step[sample, column])
    assert torch.equal(selected.completion[sample, column], asked)
    assert not torch.equal(asked, selected.trajectory.x_0[sample])
    assert selected_at_a_cost(replace(algorithm, lam=0.0))[2] == 0


# ---- credit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_credit_by_hand(beta):
    """A = r - group mean in every column; weight step_weight / B where tokens were revealed."""
    algorithm = Egspo(n_steps=T, beta=beta)
    stage = credited(algorithm)
    by_hand = torch.tensor([0.45, -0.3, -0.15, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(stage.advantage, by_hand[:, None].expand(-1, T))
    weighed = stage.step_weight != 0
    assert weighed.sum(1).tolist() == [5, 5, 5, 3, 3, 3]
    if beta == 0:
        weighed &= stage.advantage != 0  # without a reference a zero advantage has no gradient
    assert torch.equal(stage.weight, weighed.double() / B)
    drawn = credited(Egspo(n_steps=3, selection="importance", beta=0.1))
    torch.testing.assert_close(drawn.weight, drawn.step_weight / B)


def by_hand(algorithm: Egspo, stage: Scored, names: tuple[str, ...] = TERMS) -> Tensor:
    """The stepwise advantage with a group mean, by loops over the entries."""
    group = stage.trajectory.prompts.group.tolist()
    n_columns = stage.step.shape[1]
    returns, improvement, plain = (torch.zeros(B, n_columns).double() for _ in range(3))
    for b in range(B):
        for k in range(n_columns):
            r = float(stage.reward[b])
            r_hat = sum(float(stage.completion_terms[name][b, k]) for name in names)
            lam = algorithm.lam
            if algorithm.lam_schedule == "rising":
                lam = lam * (int(stage.step[b, k]) + 1) / T
            scale = 1 / (1 + lam) if algorithm.normalise else 1.0
            returns[b, k] = scale * (r + lam * (r - r_hat))
            improvement[b, k] = scale * lam * (r - r_hat)
            plain[b, k] = scale * r
    if not algorithm.centre_completions:
        means = [REWARD[[i for i in range(B) if group[i] == group[b]]].mean() for b in range(B)]
        scale = (plain / stage.reward[:, None]).double()
        return scale * (stage.reward - torch.stack(means))[:, None] + improvement
    total = torch.zeros_like(returns).index_add(0, torch.tensor(group), returns)
    return returns - total[group] / 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalise": False},
        {"lam": 2.0},
        {"lam_schedule": "rising"},
        {"lam_schedule": "rising", "normalise": False},
        {"centre_completions": False},
        {"centre_completions": False, "normalise": False, "lam_schedule": "rising"},
        {"completion_term": "zeros"},
        {"completion_term": "ones"},
        {"selection": "top"},
        {"selection": "bottom", "lam_schedule": "rising"},
        {"selection": "importance", "lam_schedule": "rising", "normalise": False},
        {"selection": "random", "centre_completions": False},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "default",
)
def test_stepwise_advantages_by_hand(changes):
    """(r + lambda_t (r - r_hat)) / (1 + lambda_t), centred in its group and column."""
    settings = {"n_steps": 3, "selection": "uniform", "lam": 0.5, **changes}
    algorithm = Egspo(**settings)
    algorithm.check(DECODER, 3, TERMS)
    stage = scored(algorithm)
    term = algorithm.completion_term
    expected = by_hand(algorithm, stage, TERMS if term is None else (term,))
    found = algorithm.credit(stage)
    assert bool((found.step_weight > 0).all())
    torch.testing.assert_close(found.advantage, expected)
    plain = credited(replace(algorithm, lam=0.0, completion_term=None))
    assert not torch.allclose(found.advantage, plain.advantage)


def test_lambda_rises_with_the_step():
    """lambda (t + 1) / T: of step 0 a fifth of it, of the last step all."""
    algorithm = Egspo(selection="all", lam=0.75, lam_schedule="rising", baseline="none")
    stage = scored(algorithm)
    r_hat = torch.stack(list(stage.completion_terms.values())).sum(0)
    lam = torch.tensor([0.15, 0.3, 0.45, 0.6, 0.75], dtype=torch.float64)
    expected = (REWARD[:, None] * (1 + lam) - lam * r_hat) / (1 + lam)
    known = stage.step_weight != 0
    torch.testing.assert_close(algorithm.credit(stage).advantage[known], expected[known])


@pytest.mark.parametrize("selection", ["top", "all", "adaptive"])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_columns_without_a_step_weigh_nothing(selection, lam):
    """Also with a KL; their completions do not move the baseline of the others."""
    algorithm = Egspo(n_steps=T, selection=selection, lam=lam, beta=0.1, kl="k2")
    stage = credited(algorithm)
    empty = stage.step_weight == 0
    assert int(empty.sum()) >= 6
    assert bool((stage.weight[empty] == 0).all()) and bool((stage.weight[~empty] > 0).all())
    if lam:
        disturbed = replace(
            stage,
            completion_terms={
                name: value.masked_fill(empty, 7.0)
                for name, value in stage.completion_terms.items()
            },
        )
        names = Scored.__dataclass_fields__
        again = Scored(**{n: v for n, v in disturbed.fields().items() if n in names})
        found = algorithm.credit(again).advantage
        assert torch.equal(found[~empty], stage.advantage[~empty])


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("selection", ["top", "all", "importance", "adaptive"])
def test_credit_of_completions_does_not_depend_on_the_order_of_the_samples(selection, baseline):
    """Permuting the batch, within groups and across, permutes the credit."""
    algorithm = Egspo(n_steps=3, selection=selection, lam=0.5, baseline=baseline)
    stage = scored(algorithm)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted, whole = algorithm.credit(stage.take(order)), algorithm.credit(stage)
    torch.testing.assert_close(permuted.advantage, whole.advantage[order])
    torch.testing.assert_close(permuted.weight, whole.weight[order])


# ---- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_loss_by_hand(kl, aggregation):
    """Clipped surrogate of the step ratio plus beta KL(new || ref), from each step's own logits.

    With ``mean`` the ratio is the geometric mean over the revealed tokens and the KL is per token.
    """
    algorithm = Egspo(n_steps=3, beta=0.1, kl=kl, baseline="leave_one_out", aggregation=aggregation)
    stage = credited(algorithm)
    actions = stage.actions(stage.pairs())
    with torch.no_grad():
        terms = algorithm.loss(Models(NEW, REF), actions, RNG)
        now = masked(actions.trajectory).step_of() == actions.step[:, None]
        assert isinstance(actions.trajectory, MaskedTrajectory)
        x_t = actions.trajectory.state(actions.step, V)
        log_new, log_old, log_ref = (
            (p.denoiser.predict(x_t) / 0.7).log_softmax(-1) for p in (NEW, OLD, REF)
        )
    n = now.sum(1)
    assert n.unique().tolist() == [1, 2]
    share = 1 / n if aggregation == "mean" else torch.ones(())
    token = torch.where(now, actions.trajectory.x_0, 0)[..., None]
    new, old, ref = (
        share * (x.gather(-1, token).squeeze(-1) * now).sum(1) for x in (log_new, log_old, log_ref)
    )
    ratio, a, d = (new - old).exp(), actions.advantage, ref - new
    divergence = {
        "k1": -d,
        "k2": d**2 / 2,
        "k3": d.exp() - 1 - d,
        "exact": share * ((log_new.exp() * (log_new - log_ref)).sum(-1) * now).sum(1),
    }[kl]
    expected = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.5) * a) + 0.1 * divergence
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.metrics["kl_new_ref"], divergence)
    assert bool(((ratio < 0.8) | (ratio > 1.5)).any())


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_the_first_update_is_the_policy_gradient(aggregation):
    """At the sampling weights every ratio is 1: the gradient of REINFORCE on those steps."""
    algorithm = Egspo(n_steps=3, beta=0.0, aggregation=aggregation)
    stage = credited(algorithm)
    actions = stage.actions(stage.pairs())
    assert isinstance(OLD.denoiser, MlpDenoiser)
    weights = list(OLD.denoiser.parameters())
    terms = algorithm.loss(Models(OLD), actions, RNG)
    torch.testing.assert_close(terms.metrics["ratio"], torch.ones_like(terms.loss))
    measured = torch.autograd.grad((actions.weight * terms.loss).sum(), weights)
    log_prob = OLD.transition(actions.trajectory, actions.step, Score()).log_prob
    if aggregation == "mean":
        log_prob = log_prob / (masked(actions.trajectory).step_of() == actions.step[:, None]).sum(1)
    exact = torch.autograd.grad(-(actions.weight * actions.advantage * log_prob).sum(), weights)
    for a, b in zip(measured, exact, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_all_steps_by_entropy_are_all_steps(lam):
    """``top`` with K = T is ``all`` in another order: the same gradient."""
    by_entropy = Egspo(n_steps=T, baseline="none", lam=lam)
    every = replace(by_entropy, selection="all")
    one, other = gradient(by_entropy, credited(by_entropy)), gradient(every, credited(every))
    assert any(bool(g.abs().max() > 1e-3) for g in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_gradient_does_not_depend_on_the_parts(size):
    """With stepwise advantages, a geometric mean and a KL: any split of the pairs adds up."""
    algorithm = Egspo(n_steps=4, lam=0.5, aggregation="mean", beta=0.1, kl="exact")
    stage = credited(algorithm)
    for a, b in zip(gradient(algorithm, stage, size), gradient(algorithm, stage), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_nothing_to_learn_trains_nothing():
    """Equal rewards, with lambda also equal completions: without a KL no pair has a gradient."""
    equal = torch.full((B,), 0.1 + 0.2, dtype=torch.float64)
    assert len(credited(Egspo(n_steps=3, beta=0.0), equal).pairs()) == 0
    algorithm = Egspo(n_steps=3, beta=0.0, lam=0.3)
    stage = scored(algorithm, equal)
    assert len(algorithm.credit(stage).pairs()) > 0  # completions differ: some steps were better
    agreeing = {name: torch.full_like(r, 0.7) for name, r in stage.completion_terms.items()}
    stage = replace(stage, completion_terms=agreeing)
    assert len(algorithm.credit(stage).pairs()) == 0


def test_no_reference_without_beta():
    """beta = 0 asks for no reference."""
    free = Egspo(n_steps=3, beta=0.0)
    assert not free.uses_reference
    assert Egspo(n_steps=3).uses_reference
    assert credited(free).notes == {}


def test_the_reference_is_asked_once_per_rollout_for_sampled_estimators():
    """``annotate`` notes log pi_ref of the selected steps; the exact KL asks in the loss."""
    stage = credited(Egspo(n_steps=3))
    for column, noted in enumerate(stage.notes["log_prob_ref"].unbind(1)):
        asked = REF.transition(stage.trajectory, stage.step[:, column], Score()).log_prob
        torch.testing.assert_close(noted, asked)
    assert not stage.notes["log_prob_ref"].requires_grad
    assert credited(Egspo(n_steps=3, kl="exact")).notes == {}


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 5}, "use 1 to 4"),
        ({"n_steps": 0}, "use 1 to 4"),
        ({"n_steps": 5, "selection": "bottom"}, "use 1 to 4"),
        ({"n_steps": 5, "selection": "uniform"}, "use 1 to 4"),
        ({"n_steps": 5, "selection": "random"}, "use 1 to 4"),
        ({"n_steps": 0, "selection": "importance"}, "n_steps=0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.5}, "clip_high=-0.5"),
        ({"delta": 0.0}, "delta=0.0 must be positive"),
        ({"mass": 0.0}, "mass=0.0"),
        ({"mass": 1.5}, "mass=1.5"),
        ({"lam": -0.5}, "lam=-0.5"),
        ({"lam": math.nan}, "lam=nan"),
        ({"lam": math.inf, "normalise": False}, "lam=inf"),
        ({"lam": math.inf, "centre_completions": False}, "lam=inf"),
        ({"lam": math.inf, "lam_schedule": "rising"}, "lam=inf"),
        ({"completion_term": "twos"}, r"'twos' is no reward term.*'zeros', 'ones'"),
    ],
    ids=lambda value: (
        " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_settings_that_cannot_work_are_refused(changes, message):
    """The message names the setting and what to use."""
    with pytest.raises(ValueError, match=message):
        Egspo(**{"n_steps": 2, **changes}).check(Decoder(steps=4), 4, TERMS)


@pytest.mark.parametrize(
    ("name", "value", "need"),
    [
        ("delta", 0.3, {"selection": "importance"}),
        ("mass", 0.5, {"selection": "adaptive"}),
        ("lam_schedule", "rising", {"lam": 0.5}),
        ("normalise", False, {"lam": 0.5}),
        ("completion_term", "ones", {"lam": 0.5}),
        ("centre_completions", False, {"lam": 0.5}),
    ],
)
def test_settings_without_effect_are_refused(name, value, need):
    """The message names the setting and what would give it one; defaults are never refused."""
    decoder, default = Decoder(steps=4), getattr(Egspo, name)
    wanted = "lam above 0" if "lam" in need else f"selection='{need['selection']}'"
    message = (
        f"egspo: {name}={value!r} has no effect without {wanted}; set that, or leave {name} at "
        f"{default!r}"
    )
    for selection in ("top", "uniform", "all"):
        idle = Egspo(n_steps=2, selection=selection, **{name: value})
        with pytest.raises(ValueError, match=re.escape(message)):
            idle.check(decoder, 4, TERMS)
        replace(idle, **need).check(decoder, 4, TERMS)
        replace(idle, **{name: default}).check(decoder, 4, TERMS)


def test_refusals_of_what_does_not_fit():
    """A group of one, a greedy decoder; what needs no distinct steps may ask for more."""
    decoder = Decoder(steps=4)
    with pytest.raises(ValueError, match="group_size=1"):
        Egspo(n_steps=2).check(decoder, 1, TERMS)
    with pytest.raises(ValueError, match="temperature"):
        Egspo(n_steps=2).check(Decoder(steps=4, temperature=0.0), 4, TERMS)
    for selection in ("importance", "all", "adaptive"):
        Egspo(n_steps=9, selection=selection, lam=0.5).check(decoder, 2, TERMS)
    Egspo(n_steps=4, lam=math.inf, completion_term="ones").check(decoder, 2, TERMS)
    Egspo(n_steps=4, baseline="none").check(decoder, 1, TERMS)
