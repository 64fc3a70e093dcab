"""EGSPO: which steps it takes, what each counts for, and its loss by hand."""

import math

import pytest
import torch

from rescore.algorithms.egspo import Egspo
from rescore.models.tiny import MlpDenoiser
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Score
from rescore.sampling.rng import SampleRng
from rescore.types import Credited, MaskedTrajectory, Prompts, Scored

V, L, T, B = 3, 6, 5, 6
REWARD = torch.tensor([1.0, 0.25, 0.4, 0.3, 0.3, 0.3], dtype=torch.float64)
RNG = SampleRng(0, torch.arange(B))
DECODER = Decoder(steps=T, temperature=0.7)


def policy(seed: int) -> MaskedPolicy:
    return MaskedPolicy(MlpDenoiser(V, L, generator=torch.Generator().manual_seed(seed)), DECODER)


OLD, NEW, REF = policy(0), policy(1), policy(2)


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


def credited(algorithm: Egspo, reward: torch.Tensor = REWARD) -> Credited:
    selected = algorithm.select(rollout(algorithm), RNG)
    scored = Scored(**selected.fields(), reward=reward, terms={"reward": reward})
    return algorithm.credit(algorithm.annotate(Models(OLD, REF), scored))


def test_top_takes_the_steps_of_largest_entropy():
    """Sorted by decreasing entropy of each sample's own path, each with weight 1."""
    algorithm = Egspo(n_steps=3)
    trajectory = rollout(algorithm)
    selected = algorithm.select(trajectory, RNG)
    assert trajectory.entropy is not None
    for row, entropy in zip(selected.step.tolist(), trajectory.entropy.tolist(), strict=True):
        assert row == sorted(range(T), key=lambda t, h=entropy: -h[t])[:3]
    assert bool((selected.step_weight == 1).all())


def test_importance_draws_are_weighted_by_one_over_k_q():
    """q = (H + delta) / sum over the steps that reveal something; a draw weighs 1 / (K q)."""
    algorithm = Egspo(n_steps=4, selection="importance", delta=0.3)
    trajectory = rollout(algorithm)
    assert trajectory.entropy is not None
    selected = algorithm.select(trajectory, RNG)
    active = trajectory.revealed() > 0
    q = torch.where(active, trajectory.entropy + 0.3, 0.0)
    q = q / q.sum(1, keepdim=True)
    drawn = q.gather(1, selected.step)
    assert bool((drawn > 0).all())
    torch.testing.assert_close(selected.step_weight, 1 / (4 * drawn))


def test_importance_draws_follow_q_and_stand_for_the_sum_over_all_steps():
    """Frequencies of 6 x 4000 draws; the mean of sum_k weight f(step) is sum_t f(t)."""
    algorithm = Egspo(n_steps=4000, selection="importance", delta=0.3)
    trajectory = rollout(algorithm)
    assert trajectory.entropy is not None
    selected = algorithm.select(trajectory, RNG)
    f = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    active = trajectory.revealed() > 0
    q = torch.where(active, trajectory.entropy + 0.3, 0.0)
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


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_credit_by_hand(beta):
    """A = r - group mean in every column; weight step_weight / B where tokens were revealed."""
    algorithm = Egspo(n_steps=T, beta=beta)
    stage = credited(algorithm)
    by_hand = torch.tensor([0.45, -0.3, -0.15, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(stage.advantage, by_hand[:, None].expand(-1, T))
    weighed = stage.trajectory.revealed().gather(1, stage.step) > 0
    if beta == 0:
        weighed &= stage.advantage != 0  # without a reference a zero advantage has no gradient
    assert torch.equal(stage.weight, weighed.double() / B)
    drawn = credited(Egspo(n_steps=3, selection="importance", beta=0.1))
    torch.testing.assert_close(drawn.weight, drawn.step_weight / B)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_loss_by_hand(kl):
    """Clipped surrogate of the step ratio plus beta KL(new || ref), from each step's own logits."""
    algorithm = Egspo(n_steps=3, beta=0.1, kl=kl, baseline="leave_one_out")
    stage = credited(algorithm)
    actions = stage.actions(stage.pairs())
    with torch.no_grad():
        terms = algorithm.loss(Models(NEW, REF), actions, RNG)
        now = actions.trajectory.step_of() == actions.step[:, None]
        x_t = actions.trajectory.state(actions.step, V)
        log_new, log_old, log_ref = (
            (p.denoiser.predict(x_t) / 0.7).log_softmax(-1) for p in (NEW, OLD, REF)
        )
    token = torch.where(now, actions.trajectory.x_0, 0)[..., None]
    new, old, ref = (
        (x.gather(-1, token).squeeze(-1) * now).sum(1) for x in (log_new, log_old, log_ref)
    )
    ratio, a, d = (new - old).exp(), actions.advantage, ref - new
    divergence = {
        "k1": -d,
        "k2": d**2 / 2,
        "k3": d.exp() - 1 - d,
        "exact": ((log_new.exp() * (log_new - log_ref)).sum(-1) * now).sum(1),
    }[kl]
    expected = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.5) * a) + 0.1 * divergence
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.metrics["kl_new_ref"], divergence)
    assert bool(((ratio < 0.8) | (ratio > 1.5)).any())


def test_the_first_update_is_the_policy_gradient():
    """At the sampling weights every ratio is 1: the gradient of REINFORCE on those steps."""
    algorithm = Egspo(n_steps=3, beta=0.0)
    stage = credited(algorithm)
    actions = stage.actions(stage.pairs())
    assert isinstance(OLD.denoiser, MlpDenoiser)
    weights = list(OLD.denoiser.parameters())
    terms = algorithm.loss(Models(OLD), actions, RNG)
    torch.testing.assert_close(terms.metrics["ratio"], torch.ones_like(terms.loss))
    measured = torch.autograd.grad((actions.weight * terms.loss).sum(), weights)
    log_prob = OLD.transition(actions.trajectory, actions.step, Score()).log_prob
    exact = torch.autograd.grad(-(actions.weight * actions.advantage * log_prob).sum(), weights)
    for a, b in zip(measured, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_no_reference_without_beta():
    """beta = 0 asks for no reference, and equal rewards then train nothing."""
    free = Egspo(n_steps=3, beta=0.0)
    assert not free.uses_reference
    assert Egspo(n_steps=3).uses_reference
    stage = credited(free, torch.full((B,), 0.1 + 0.2, dtype=torch.float64))
    assert stage.notes == {}
    assert len(stage.pairs()) == 0


def test_the_reference_is_asked_once_per_rollout_for_sampled_estimators():
    """``annotate`` notes log pi_ref of the selected steps; the exact KL asks in the loss."""
    stage = credited(Egspo(n_steps=3))
    for column, noted in enumerate(stage.notes["log_prob_ref"].unbind(1)):
        asked = REF.transition(stage.trajectory, stage.step[:, column], Score()).log_prob
        torch.testing.assert_close(noted, asked)
    assert not stage.notes["log_prob_ref"].requires_grad
    assert credited(Egspo(n_steps=3, kl="exact")).notes == {}


def test_refusals():
    """More steps than there are, none, a group of one, a greedy decoder."""
    decoder = Decoder(steps=4)
    for algorithm in (Egspo(n_steps=5), Egspo(n_steps=0)):
        with pytest.raises(ValueError, match="use 1 to 4"):
            algorithm.check(decoder, 4)
    with pytest.raises(ValueError, match="group_size=1"):
        Egspo(n_steps=2).check(decoder, 1)
    with pytest.raises(ValueError, match="temperature"):
        Egspo(n_steps=2).check(Decoder(steps=4, temperature=0.0), 4)
    Egspo(n_steps=4).check(decoder, 2)
    Egspo(n_steps=9, selection="importance").check(decoder, 2)
