"""Rewards: named, weighted and checked, whatever the user's function does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rescore.rewards.reward import Reward, RewardError
from rescore.types import Prompts

OUTPUTS = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 1, 1], [0, 0, 2]])
PROMPTS = Prompts(
    tokens=torch.full((4, 3), 3),
    editable=torch.ones(4, 3, dtype=torch.bool),
    group=torch.tensor([0, 0, 2, 2]),
    sample_id=torch.tensor([40, 41, 52, 53]),
    info={"wanted": torch.tensor([2, 2, 1, 0])},
)


def total_of_digits(outputs, prompts):
    return outputs.sum(1)


def ends_as_wanted(outputs, prompts):
    return outputs[:, -1] == prompts.info["wanted"]


def test_terms_are_named_and_unweighted():
    """Every function is called on the outputs and prompts; weights do not touch its term."""
    reward = Reward({"sum": total_of_digits, "end": ends_as_wanted}, {"sum": 5.0, "end": 0.0})
    terms = reward.terms(OUTPUTS, PROMPTS)
    assert list(terms) == ["sum", "end"]
    assert terms["sum"].tolist() == [3, 4, 3, 2]
    assert terms["end"].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [4, 4, 4, 2]),  # both weigh 1
        ({"sum": 0.5}, [2.5, 2, 2.5, 1]),  # the other still weighs 1
        ({"sum": 0.0}, [1, 0, 1, 0]),  # reported, not used
        ({"sum": -1.0, "end": 10.0}, [7, -4, 7, -2]),
    ],
)
def test_the_total_is_the_weighted_sum(weights, expected):
    """By hand: sums 3, 4, 3, 2 and ends 1, 0, 1, 0."""
    reward = Reward({"sum": total_of_digits, "end": ends_as_wanted}, weights)
    assert reward.total(reward.terms(OUTPUTS, PROMPTS)).tolist() == expected


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([1, 0, 1, 1], torch.float32),
        (np.array([1.0, 0.0, 1.0, 1.0], dtype=np.float16), torch.float32),
        (torch.tensor([True, False, True, True]), torch.float32),
        (torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.bfloat16), torch.float32),
        (torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64), torch.float64),
    ],
)
def test_anything_torch_reads_is_a_reward(value, dtype):
    """Lists, arrays, booleans and half precision become float32; float64 is kept."""
    term = Reward({"given": lambda outputs, prompts: value}).terms(OUTPUTS, PROMPTS)["given"]
    assert term.dtype == dtype
    assert term.tolist() == [1, 0, 1, 1]


def test_weights_of_unknown_terms_are_refused():
    """The message names the stranger and the terms there are."""
    with pytest.raises(ValueError, match=r"\['speed'\].*\['end', 'sum'\]"):
        Reward({"sum": total_of_digits, "end": ends_as_wanted}, {"sum": 1.0, "speed": 1.0})


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (torch.zeros(4, 1), r"\(4, 1\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(5), r"\(5,\)"),
        (0.5, r"\(\)"),
    ],
)
def test_a_wrong_shape_is_refused(value, shape):
    """One number per sample: neither broadcast nor cut."""
    reward = Reward({"sum": total_of_digits, "odd": lambda outputs, prompts: value})
    with pytest.raises(RewardError, match=rf"'odd' returned shape {shape}; expected \(4,\)"):
        reward.terms(OUTPUTS, PROMPTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(bad):
    """The message names the term and the first offending sample, its id and its output."""
    values = [0.0, 1.0, bad, bad]
    reward = Reward({"log": lambda outputs, prompts: values})
    with pytest.raises(RewardError, match=r"'log' returned .*sample 2 .*sample_id 52") as caught:
        reward.terms(OUTPUTS, PROMPTS)
    assert str(bad) in str(caught.value)
    assert "output [1, 1, 1]" in str(caught.value)


def test_a_function_that_raises_is_reported_with_the_sample_that_did_it():
    """The cause is kept; the sample is found by calling the function on one at a time."""

    def picky(outputs, prompts):
        if bool((prompts.info["wanted"] == 1).any()):
            raise KeyError("no such puzzle")
        return outputs.sum(1)

    with pytest.raises(RewardError, match=r"'picky' raised KeyError.*no such puzzle") as caught:
        Reward({"picky": picky}).terms(OUTPUTS, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "first failing sample 2, sample_id 52, output [1, 1, 1]" in str(caught.value)


def test_a_function_that_only_fails_on_a_batch_is_said_to():
    """Every sample alone works: the message says so rather than blame one."""

    def lonely(outputs, prompts):
        if len(outputs) > 1:
            raise RuntimeError("one at a time")
        return outputs.sum(1)

    with pytest.raises(RewardError, match=r"one at a time.*the whole batch at once"):
        Reward({"lonely": lonely}).terms(OUTPUTS, PROMPTS)


def test_something_that_is_not_numbers_is_refused():
    """A reward of strings is the function's failure."""
    reward = Reward({"words": lambda outputs, prompts: ["good", "bad", "bad", "good"]})
    with pytest.raises(RewardError, match="'words' raised"):
        reward.terms(OUTPUTS, PROMPTS)


def test_no_samples_have_no_reward():
    """An empty batch gives empty terms and an empty total."""
    none = torch.zeros(0, dtype=torch.int64)
    reward = Reward({"sum": total_of_digits, "end": ends_as_wanted})
    terms = reward.terms(OUTPUTS[none], PROMPTS.take(none))
    assert reward.total(terms).shape == (0,)
