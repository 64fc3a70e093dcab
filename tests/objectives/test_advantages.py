"""Baselines and step selection."""

import itertools

import pytest
import torch

from rescore.objectives.advantages import centre, entropy_proportional, top_steps, zero_variance

REWARD = torch.tensor([1.0, 0.5, 0.0, 0.25, 0.75, 0.5, -1.0], dtype=torch.float64)
GROUP = torch.tensor([2, 0, 2, 0, 2, 5, 5])
"""Groups of three, two and two samples, interleaved, with numbers left out."""


def test_no_baseline_returns_the_reward():
    """baseline="none" subtracts nothing."""
    assert torch.equal(centre(REWARD, GROUP, "none"), REWARD)


def test_baselines_by_hand():
    """The mean of the whole group, or of the others in it, whatever the order of the samples."""
    others = [(0.0 + 0.75) / 2, 0.25, (1 + 0.75) / 2, 0.5, (1 + 0.0) / 2, -1.0, 0.5]
    mean = [1.75 / 3, 0.375, 1.75 / 3, 0.375, 1.75 / 3, -0.25, -0.25]
    by_others, by_mean = (REWARD - torch.tensor(x, dtype=torch.float64) for x in (others, mean))
    torch.testing.assert_close(centre(REWARD, GROUP, "leave_one_out"), by_others)
    torch.testing.assert_close(centre(REWARD, GROUP, "group_mean"), by_mean)


def test_leave_one_out_is_the_group_mean_scaled_and_both_sum_to_zero():
    """leave_one_out = G / (G - 1) group_mean; each sums to 0 in every group."""
    group_mean, leave_one_out = (centre(REWARD, GROUP, b) for b in ("group_mean", "leave_one_out"))
    size = torch.bincount(GROUP)[GROUP].double()
    torch.testing.assert_close(leave_one_out, size / (size - 1) * group_mean)
    for advantage in (group_mean, leave_one_out):
        total = torch.zeros(7, dtype=torch.float64).index_add(0, GROUP, advantage)
        torch.testing.assert_close(total, torch.zeros_like(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_equal_rewards_have_advantage_exactly_zero(baseline, dtype):
    """Sums of equal floats round: 3 * 0.3 / 3 need not be 0.3, but the advantage must be 0."""
    for value, size in itertools.product((0.1 + 0.2, 0.1, 1 / 3, 0.7), range(2, 30)):
        reward = torch.full((size + 2,), value, dtype=dtype)
        group = torch.tensor([1, *[0] * size, 1])
        reward[-1] = 5.0
        assert not bool(centre(reward, group, baseline)[1:-1].any())
        assert zero_variance(reward, group).tolist() == [False, *[True] * size, False]


def test_the_dtype_of_the_reward_is_kept():
    """float32 rewards give float32 advantages, computed in float64."""
    advantage = centre(REWARD.float(), GROUP, "leave_one_out")
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage, centre(REWARD, GROUP, "leave_one_out").float())


def test_top_steps_are_the_largest_and_the_earlier_on_a_tie():
    """All score tables over {0, 1, 2}^4, against a sort by (-entropy, step)."""
    table = list(itertools.product((0.0, 1.0, 2.0), repeat=4))
    for n in (1, 2, 4):
        expected = [sorted(range(4), key=lambda t, h=h: (-h[t], t))[:n] for h in table]
        assert top_steps(torch.tensor(table), n).tolist() == expected


def test_entropy_proportional_is_a_law_over_the_active_steps():
    """(H + delta) / sum over the active steps, 0 elsewhere."""
    entropy = torch.tensor([[0.0, 1.0, 3.0, 0.0], [0.5, 0.5, 7.0, 0.0]], dtype=torch.float64)
    active = torch.tensor([[True, True, True, False], [True, True, False, True]])
    q = entropy_proportional(entropy, 0.5, active)
    by_hand = [[0.5 / 5.5, 1.5 / 5.5, 3.5 / 5.5, 0.0], [1 / 2.5, 1 / 2.5, 0.0, 0.5 / 2.5]]
    torch.testing.assert_close(q, torch.tensor(by_hand, dtype=torch.float64))
