"""Rewards on text: facts travel as bytes, and a batch is decoded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rescore.rewards.reward import Reward, RewardError
from rescore.rewards.text import FACTS, on_text, pack, unpack
from rescore.types import Prompts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)

AWKWARD = [
    {},
    {"answer": "½ · naïve · 数学 · \N{GRINNING FACE}", "lines": "a\nb\0c\0"},
    {"numbers": [1, 2.5, -3], "nested": {"tests": ["f(1) == 2"], "none": None, "flag": True}},
]


def prompts(facts):
    n = len(facts)
    return Prompts(
        tokens=torch.zeros(n, 2, dtype=torch.int64),
        editable=torch.ones(n, 2, dtype=torch.bool),
        group=torch.arange(n),
        sample_id=torch.arange(n),
        info={FACTS: pack(facts)},
    )


def letters(outputs):
    return ["".join("abc"[token] for token in row) for row in outputs.tolist()]


OUTPUTS = torch.tensor([[0, 1], [2, 2], [1, 0]])


# Facts


def test_facts_come_back_as_they_were():
    """Unicode, zero bytes, numbers and nesting included, whatever the width of the batch."""
    table = pack(AWKWARD)
    assert table.dtype == torch.uint8
    assert table.shape[0] == 3
    assert unpack(table) == AWKWARD


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON), min_size=1, max_size=4))
def test_any_facts_come_back(facts):
    """For any JSON objects."""
    assert unpack(pack(facts)) == facts


def test_packed_facts_can_be_split_and_repeated_by_row():
    """Like any other tensor of a batch."""
    batch = prompts(AWKWARD).take(torch.tensor([2, 0, 2]))
    assert unpack(batch.info[FACTS]) == [AWKWARD[2], AWKWARD[0], AWKWARD[2]]


# Functions of text


def test_terms_see_the_texts_and_facts_of_their_samples():
    """Each function is bound to its own name, and all get the whole batch in order."""
    functions = on_text(
        {
            "as_wanted": lambda texts, facts: [
                text == fact["wanted"] for text, fact in zip(texts, facts, strict=True)
            ],
            "vowels": lambda texts, facts: [text.count("a") for text in texts],
        },
        letters,
    )
    batch = prompts([{"wanted": "ab"}, {"wanted": "ab"}, {"wanted": "ba"}])
    terms = Reward(functions).terms(OUTPUTS, batch)
    assert {name: value.tolist() for name, value in terms.items()} == {
        "as_wanted": [1, 0, 1],
        "vowels": [1, 0, 1],
    }
    assert Reward(functions).terms(OUTPUTS[1:], batch.take(torch.tensor([0, 1])))[
        "as_wanted"
    ].tolist() == [0, 0]


def test_a_batch_is_decoded_once_for_all_terms():
    """And anew for other outputs or other prompts, in any order."""
    calls = []

    def decode(outputs):
        calls.append(outputs)
        return letters(outputs)

    functions = on_text(
        {
            name: lambda texts, facts, letter=name: [text.count(letter) for text in texts]
            for name in "abc"
        },
        decode,
    )
    reward, batch = Reward(functions), prompts([{}] * 3)
    assert [value.tolist() for value in reward.terms(OUTPUTS, batch).values()] == [
        [1, 0, 1],
        [1, 0, 1],
        [0, 2, 0],
    ]
    assert len(calls) == 1
    other = OUTPUTS.flip(0).clone()
    other[0] = 2
    assert [value.tolist() for value in reward.terms(other, batch).values()] == [
        [0, 0, 1],
        [0, 0, 1],
        [2, 2, 0],
    ]
    assert len(calls) == 2
    assert reward.terms(OUTPUTS, batch)["c"].tolist() == [0, 2, 0]
    assert len(calls) == 3


def test_facts_of_other_prompts_are_not_those_of_the_last():
    """The same outputs judged for other problems."""
    functions = on_text({"value": lambda texts, facts: [fact["v"] for fact in facts]}, letters)
    term = functions["value"]
    assert term(OUTPUTS[:1], prompts([{"v": 1}])) == [1]
    outputs = OUTPUTS[:1]
    assert term(outputs, prompts([{"v": 2}])) == [2]
    assert term(outputs, prompts([{"v": 3}])) == [3]


def test_a_function_that_fails_is_named_with_its_sample():
    """As any reward: by term and first offending sample."""
    functions = on_text({"broken": lambda texts, facts: [1 / fact["v"] for fact in facts]}, letters)
    with pytest.raises(RewardError, match="'broken' raised ZeroDivisionError.* sample 1,"):
        Reward(functions).terms(OUTPUTS, prompts([{"v": 1}, {"v": 0}, {"v": 2}]))
