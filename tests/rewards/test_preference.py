"""Rewards from preferences: the Bradley-Terry loss, pairs in files, scores standardised."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from torch import nn

from rescore.models.fit import Fit, Labelled, fit
from rescore.models.scorer import ScorerConfig
from rescore.rewards.preference import (
    PADDING,
    Difference,
    PreferencePair,
    PreferenceReward,
    bradley_terry_loss,
    pair_accuracy,
    read_pairs,
    scores,
    write_pairs,
)

PAIRS = [
    PreferencePair(prompt="why?", chosen="becauſe\n½", rejected=""),
    PreferencePair(prompt="", chosen="yes", rejected="no"),
]


class Letters(nn.Module):
    """Scores the sum of the token values; a stand-in whose answers are known."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([0.0, 1.0, 4.0], dtype=dtype))

    def forward(self, tokens, attend):
        return (self.value[tokens] * attend).sum(1)


def encode(prompts, replies):
    """a, b, c are tokens 0, 1, 2; rows are padded on the right with 2, which must not count."""
    rows = [["abc".index(char) for char in p + r] for p, r in zip(prompts, replies, strict=True)]
    longest = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
    return tokens, torch.arange(longest) < lengths[:, None]


# The loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (1.5, 1.5, math.log(2)),  # a coin
        (3.0, 1.0, math.log(1 + math.exp(-2.0))),  # the likely choice costs little
        (1.0, 3.0, math.log(1 + math.exp(-2.0)) + 2.0),  # the unlikely one the gap more
        (-400.0, 400.0, 800.0),  # no overflow
        (400.0, -400.0, 0.0),
    ],
)
def test_the_loss_is_the_negative_log_likelihood_of_the_choice(chosen, rejected, expected):
    c, r = torch.tensor([chosen]).double(), torch.tensor([rejected]).double()
    torch.testing.assert_close(bradley_terry_loss(c, r), torch.tensor([expected]).double())


def test_the_two_choices_are_all_there_is():
    """exp(-loss) of a pair and of the pair turned round add up to 1."""
    a, b = torch.linspace(-3, 4, 8).double(), torch.linspace(2, -5, 8).double()
    total = torch.exp(-bradley_terry_loss(a, b)) + torch.exp(-bradley_terry_loss(b, a))
    torch.testing.assert_close(total, torch.ones(8).double())


def test_the_gradient_is_the_probability_of_the_other_choice():
    """d loss / d r_chosen = -sigma(r_rejected - r_chosen), and the opposite for the rejected."""
    c = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([1.5, -3.0], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(c, r).sum().backward()
    torch.testing.assert_close(c.grad, -torch.sigmoid(r - c).detach())
    torch.testing.assert_close(r.grad, torch.sigmoid(r - c).detach())


def test_half_precision_scores_are_compared_in_float32():
    loss = bradley_terry_loss(torch.tensor([257.0]).bfloat16(), torch.tensor([256.0]).bfloat16())
    assert loss.dtype == torch.float32


def test_a_logistic_fit_of_differences_is_the_bradley_terry_fit():
    """Its loss with every target 1 is the mean of ``bradley_terry_loss``, to the gradient."""
    module, pairs = Letters(torch.float64), torch.tensor([[[1, 2], [0, 1]], [[0, 0], [2, PADDING]]])
    difference = Difference(module)(pairs)
    torch.testing.assert_close(difference, torch.tensor([4.0, -4.0]).double())
    logistic = nn.functional.binary_cross_entropy_with_logits(
        difference, torch.ones(2).double(), reduction="none"
    )
    expected = bradley_terry_loss(torch.tensor([5.0, 0.0]).double(), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(logistic, expected)


def test_a_tie_counts_one_half():
    chosen, rejected = torch.tensor([2.0, 1.0, 5.0, 0.0]), torch.tensor([1.0, 1.0, 6.0, -1.0])
    assert pair_accuracy(chosen, rejected) == 2.5 / 4


# Files


def test_pairs_come_back_as_they_were_written(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    assert read_pairs(tmp_path / "pairs.jsonl") == PAIRS
    fields = [f.name for f in dataclasses.fields(PreferencePair)]
    first = (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()[0]
    assert sorted(json.loads(first)) == sorted(fields)


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c", "source": 7}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'prompt'", "is no JSON"),
        ("[1, 2]", "is a list; expected an object"),
        ('{"prompt": "a", "chosen": "b"}', "'rejected' is None; expected a text"),
        ('{"prompt": 3, "chosen": "b", "rejected": "c"}', "'prompt' is 3; expected a text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "are both 'b'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, complaint):
    """By file and line, counted from 1, blank lines included; other fields do not matter."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3") + ".*" + re.escape(complaint)):
        read_pairs(path)
    path.write_text(f"{GOOD}\n\n")
    assert read_pairs(path) == [PreferencePair(prompt="a", chosen="b", rejected="c")]


def test_a_file_without_pairs_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match="does not exist"):
        read_pairs(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no preference pairs"):
        read_pairs(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_pairs(path)


# The reward


def test_scores_do_not_depend_on_the_batch():
    """Rows of different lengths, scored together or one by one."""
    prompts, replies = ["ab", "c", "", "bb"], ["c", "", "b", "abc"]
    expected = torch.tensor([5.0, 4.0, 1.0, 7.0])
    for batch in (1, 3, 256):
        found = scores(Letters(), encode, prompts, replies, batch=batch)
        torch.testing.assert_close(found, expected)
    assert scores(Letters(), encode, [], []).shape == (0,)


def test_a_reward_is_standardised_and_its_choices_are_not():
    """(r - mean) / std for rewards; the margins of pairs are those of the Bradley-Terry model."""
    reward = PreferenceReward(module=Letters(), encode=encode, mean=3.0, std=0.5)
    value = reward(["c", "b"], [{"prompt": "ab"}, {"prompt": "a"}])
    torch.testing.assert_close(value, torch.tensor([4.0, -4.0]))
    pairs = [
        PreferencePair(prompt="a", chosen="c", rejected="b"),
        PreferencePair(prompt="b", chosen="b", rejected="c"),
        PreferencePair(prompt="c", chosen="bb", rejected="b"),
    ]
    assert reward.accuracy(pairs) == pytest.approx(2 / 3)
    gaps = torch.tensor([3.0, -3.0, 1.0])
    expected = torch.log1p(torch.exp(-gaps)).mean().item()
    assert reward.loss(pairs) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match="expected a positive number"):
        PreferenceReward(module=Letters(), encode=encode, std=std)


# The small scorer

CONFIG = ScorerConfig(n_tokens=5, separator=4, length=9, width=8, heads=2)


def sequences():
    """Two rows of prompt, 4, reply, of which the second is padded."""
    tokens = torch.tensor([[0, 1, 4, 1, 2, 3], [3, 4, 2, 0, 0, 0]])
    attend = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    return tokens, attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_does_not_change_a_score(dtype):
    """Nor does what stands there, a separator included, nor how much of it there is."""
    scorer = CONFIG.network(torch.Generator().manual_seed(3)).to(dtype)
    tokens, attend = sequences()
    expected = scorer(tokens, attend)
    assert expected.dtype == dtype
    alone = scorer(tokens[1:, :3], attend[1:, :3])
    torch.testing.assert_close(alone, expected[1:])
    longer = torch.cat([tokens, torch.full((2, 3), 4)], 1)
    padded = torch.cat([attend, torch.zeros(2, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(scorer(longer, padded), expected)
    assert (scorer(tokens, torch.ones_like(attend))[1] - expected[1]).abs() > 1e-4


def test_the_generator_alone_decides_the_weights():
    before = torch.get_rng_state()
    tokens, attend = sequences()
    a, b, c = (CONFIG.network(torch.Generator().manual_seed(s))(tokens, attend) for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_prompt_and_reply_are_compared():
    """Each side reads the other: what is common to both shows in the comparison, at once."""
    scorer = CONFIG.network(torch.Generator().manual_seed(3)).double()
    h = torch.eye(8).double()[None, [0, 1, 2, 0]] * 8
    reply = torch.tensor([[False, False, True, True]])
    found = []
    scorer.compare.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][..., 8:]))
    scorer._compared(h, reply, torch.ones_like(reply))
    products = found[0].sum(-1)[0]
    assert products[0] > 60  # its double is on the other side
    assert products[3] > 60
    torch.testing.assert_close(products[1:3], torch.zeros(2).double())


def test_what_a_scorer_cannot_read_is_refused():
    scorer = CONFIG.network(torch.Generator())
    with pytest.raises(ValueError, match="at most 9"):
        scorer(torch.full((1, 10), 4), torch.ones(1, 10, dtype=torch.bool))
    tokens = torch.tensor([[0, 4], [1, 2]])
    with pytest.raises(ValueError, match="sequence 1 has no separator 4"):
        scorer(tokens, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="sequence 0 has no separator"):
        scorer(tokens, torch.tensor([[True, False]] * 2))  # what stands in padding is none
    for wrong in ({"kernel": 4}, {"width": 7}, {"separator": 5}, {"depth": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(CONFIG, **wrong)


def test_a_scorer_learns_from_choices_what_decides_them():
    """More of token 1 in the reply is chosen: a rule that no single position shows."""
    generator = torch.Generator().manual_seed(6)
    replies = torch.randint(4, (400, 2, 6), generator=generator)
    count = (replies == 1).sum(-1)
    replies = replies[count[:, 0] != count[:, 1]]
    count = (replies == 1).sum(-1)
    first = torch.where(count[:, 0] > count[:, 1], 0, 1)
    ordered = torch.stack([first, 1 - first], 1)
    replies = replies.take_along_dim(ordered[..., None], 1)
    rows = torch.cat([torch.full((*replies.shape[:2], 1), 4), replies], -1)
    data = Labelled(inputs=rows[:200], targets=torch.ones(200))
    held_out = Labelled(inputs=rows[200:], targets=torch.ones(len(rows) - 200))
    network = Difference(CONFIG.network(generator))
    right = fit(
        network, data, held_out, Fit(loss="logistic", epochs=4, batch=20, lr=1e-2), generator
    )
    assert right > 0.9
