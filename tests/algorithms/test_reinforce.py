"""REINFORCE: every step of every sample, weighted by what its group says."""

import pytest
import torch

from rescore.algorithms.reinforce import Reinforce
from rescore.models.tiny import MlpDenoiser
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy, Models
from rescore.sampling.record import Score
from rescore.sampling.rng import SampleRng
from rescore.types import MaskedTrajectory, Prompts, Scored

V, L, T = 3, 5, 4
REWARD = torch.tensor([1.0, 0.25, 0.5, 0.5], dtype=torch.float64)
RNG = SampleRng(0, torch.arange(4))
TERMS = ("reward",)


def world(algorithm: Reinforce) -> tuple[MaskedPolicy, MaskedTrajectory]:
    """Two groups of two: one prompt leaves five blanks, the other two, so some steps are empty."""
    editable = torch.arange(L)[None] >= torch.tensor([[0], [0], [3], [3]])
    prompts = Prompts(
        tokens=torch.where(editable, V, 1),
        editable=editable,
        group=torch.tensor([0, 0, 1, 1]),
        sample_id=torch.arange(4),
        info={},
    )
    denoiser = MlpDenoiser(V, L, generator=torch.Generator().manual_seed(0))
    policy = MaskedPolicy(denoiser, Decoder(steps=T, temperature=0.7))
    return policy, policy.sample(prompts, algorithm.record, RNG)


def scored(
    algorithm: Reinforce, policy: MaskedPolicy, trajectory: MaskedTrajectory, reward: torch.Tensor
) -> Scored:
    selected = algorithm.select(Models(policy), trajectory)
    return Scored(**selected.fields(), reward=reward, terms={"reward": reward})


def test_every_step_is_selected_once():
    """Steps 0 ... T-1 of each sample, each with weight 1."""
    algorithm = Reinforce()
    policy, trajectory = world(algorithm)
    selected = algorithm.select(Models(policy), trajectory)
    assert selected.step.tolist() == [list(range(T))] * 4
    assert bool((selected.step_weight == 1).all())


@pytest.mark.parametrize(
    ("baseline", "advantage"),
    [
        ("none", [1.0, 0.25, 0.5, 0.5]),
        ("group_mean", [0.375, -0.375, 0.0, 0.0]),
        ("leave_one_out", [0.75, -0.75, 0.0, 0.0]),
    ],
)
def test_credit_by_hand(baseline, advantage):
    """A = r - baseline at every step; weight 1 / B where something was revealed and A is not 0."""
    algorithm = Reinforce(baseline=baseline)
    policy, trajectory = world(algorithm)
    credited = algorithm.credit(scored(algorithm, policy, trajectory, REWARD))
    assert credited.advantage.tolist() == [[a] * T for a in advantage]
    active = torch.tensor([[True] * T] * 2 + [[True, True, False, False]] * 2)
    active &= credited.advantage != 0
    assert torch.equal(credited.weight, torch.where(active, 1 / 4, 0.0).double())


@pytest.mark.parametrize("form", ["tokens", "tokens_and_selection"])
def test_the_gradient_is_the_mean_of_reward_times_score(form):
    """The sum of weight * loss has gradient -1/B sum_b A_b sum_k grad log pi, path by path."""
    algorithm = Reinforce(baseline="none", score=Score(form=form))
    policy, trajectory = world(algorithm)
    assert algorithm.record.score.form == form
    credited = algorithm.credit(scored(algorithm, policy, trajectory, REWARD))
    actions = credited.actions(credited.pairs())
    assert isinstance(policy.denoiser, MlpDenoiser)
    weights = list(policy.denoiser.parameters())
    terms = algorithm.loss(Models(policy), actions, RNG)
    measured = torch.autograd.grad((actions.weight * terms.loss).sum(), weights)
    score = torch.zeros(())
    for b in range(4):
        one = trajectory.take(torch.full((T,), b))
        score = score + REWARD[b] * policy.transition(one, torch.arange(T), Score()).log_prob.sum()
    for a, b in zip(measured, torch.autograd.grad(-score / 4, weights), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(terms.metrics["ratio"], torch.ones_like(terms.loss))


def test_equal_rewards_train_nothing():
    """A group that agrees has no pairs."""
    algorithm = Reinforce()
    policy, trajectory = world(algorithm)
    equal = torch.full((4,), 0.1 + 0.2, dtype=torch.float64)
    assert len(algorithm.credit(scored(algorithm, policy, trajectory, equal)).pairs()) == 0


def test_one_update_per_rollout_and_no_reference():
    """The score function has no ratio to correct a second one."""
    assert Reinforce().on_policy
    assert not Reinforce().uses_reference


def test_refusals():
    """A greedy decoder, and a baseline of a group of one."""
    with pytest.raises(ValueError, match="temperature=0 makes the policy deterministic"):
        Reinforce().check(Decoder(steps=4, temperature=0.0), 4, TERMS)
    with pytest.raises(ValueError, match="group_size=1"):
        Reinforce().check(Decoder(steps=4), 1, TERMS)
    Reinforce(baseline="none").check(Decoder(steps=4), 1, TERMS)
