"""Text tasks: where prompts and completions lie on the canvas, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from rescore.rewards.text import FACTS, unpack
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import Characters

LETTERS = Characters(alphabet="abcdefgh >")
END, MASK = LETTERS.end_id, LETTERS.mask_id


def problem(question):
    """Write the question backwards."""
    return Problem(question=question, gold=f">{question[::-1]}", facts={"wanted": question[::-1]})


@dataclass(frozen=True, kw_only=True)
class Backwards(TextTask):
    """Three splits of a few words each."""

    tokenizer: Characters = LETTERS
    prompt_length: int = 6
    completion_length: int = 5
    train: tuple[str, ...] = ("abc", "d", "ee fg")

    def problems(self, split):
        words = {"train": self.train, "validation": ("gh",), "test": ("hhh", "ab")}[split]
        return [problem(word) for word in words]

    @property
    def functions(self):
        return {
            "exact": lambda texts, facts: [
                text == ">" + fact["wanted"] for text, fact in zip(texts, facts, strict=True)
            ],
            "arrow": lambda texts, facts: [text.startswith(">") for text in texts],
        }

    @property
    def default_weights(self):
        return {"exact": 2.0, "arrow": 0.0}

    def problem(self, text):
        if not text:
            raise ValueError("it is empty")
        return problem(text)


TASKS = [Backwards(completion_length=6), Backwards(prefill=">")]


def whole(task, split):
    return task.prompts(split, torch.arange(task.size(split)))


# Canvases


def test_canvases_by_hand():
    """Padding, prompt, prefill, masks: the prompt ends where the completion begins."""
    prompts = whole(Backwards(prefill=">"), "train")
    e, m, arrow = END, MASK, 9
    assert prompts.tokens.tolist() == [
        [e, e, 0, 1, 2, arrow, m, m, m, m, m],
        [e, e, e, e, 3, arrow, m, m, m, m, m],
        [4, 4, 8, 5, 6, arrow, m, m, m, m, m],
    ]
    assert prompts.editable.tolist() == [[False] * 6 + [True] * 5] * 3
    assert prompts.attend is not None
    assert prompts.attend.tolist() == [
        [False] * 2 + [True] * 9,
        [False] * 4 + [True] * 7,
        [True] * 11,
    ]
    assert prompts.group.tolist() == prompts.sample_id.tolist() == [0, 1, 2]


@pytest.mark.parametrize("task", TASKS)
def test_only_the_completion_is_written(task):
    """Editable positions are the masks; all of them are attended to, and so is every prompt."""
    for split in ("train", "validation", "test"):
        prompts = whole(task, split)
        assert prompts.tokens.shape == (task.size(split), task.length)
        assert torch.equal(prompts.editable, prompts.tokens == task.mask_id)
        assert prompts.attend is not None
        assert bool(prompts.attend[prompts.editable].all())
        assert torch.equal(prompts.attend, prompts.tokens != END)


def test_prompts_are_a_pure_function_of_the_index():
    """Any order, with repeats; the bookkeeping counts positions in the batch."""
    task = TASKS[1]
    everything, index = whole(task, "train"), torch.tensor([2, 0, 2])
    batch = task.prompts("train", index)
    assert torch.equal(batch.tokens, everything.tokens[index])
    assert batch.attend is not None
    assert everything.attend is not None
    assert torch.equal(batch.attend, everything.attend[index])
    assert [fact["wanted"] for fact in unpack(batch.info[FACTS])] == ["gf ee", "cba", "gf ee"]
    assert batch.group.tolist() == batch.sample_id.tolist() == [0, 1, 2]


@pytest.mark.parametrize("index", [[0, 3], [-1], [0, 1000]])
def test_an_index_outside_the_split_is_refused(index):
    """The message names the index and the valid range."""
    with pytest.raises(ValueError, match=f"problem {index[-1]} of split 'train'.*0 to 2"):
        TASKS[0].prompts("train", torch.tensor(index))


# Completions


@pytest.mark.parametrize("task", TASKS)
def test_gold_completions_come_back_as_text(task):
    """The prompt stays, every mask is filled, and the text has the prefill in front."""
    for split in ("train", "validation", "test"):
        prompts = whole(task, split)
        gold = task.gold(prompts)
        kept = ~prompts.editable
        assert torch.equal(gold[kept], prompts.tokens[kept])
        assert not bool((gold == task.mask_id).any())
        assert task.completions(gold) == [one.gold for one in task.problems(split)]
    task.validate()


@pytest.mark.parametrize("task", TASKS)
def test_clean_examples_are_gold_outputs_with_noise_in_the_completion_only(task):
    """The same canvases, editable and attended to as in the prompts; the end is learned too."""
    prompts, clean = whole(task, "train"), task.clean("train")
    assert torch.equal(clean.x_0, task.gold(prompts))
    assert torch.equal(clean.editable, prompts.editable)
    assert clean.attend is not None
    assert prompts.attend is not None
    assert torch.equal(clean.attend, prompts.attend)
    assert clean.x_0[1, task.prompt_length :].tolist()[-3:] == [END] * 3


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ([2, 1, 0, END, END], ">cba"),
        ([2, 1, 0, END, 5], ">cba"),  # what stands behind the end does not count
        ([END, 2, 1, 0, 0], ">"),
        ([2, MASK, 0, END, END], ">c"),  # nor does what stands behind a hole
        ([2, 1, 0, 0, 0], ">cbaaa"),
    ],
)
def test_a_completion_ends_at_the_first_end(written, text):
    """The prefill is part of the text."""
    task = Backwards(prefill=">")
    canvas = whole(task, "train").tokens[:1].clone()
    canvas[0, task.prompt_length :] = torch.tensor(written)
    assert task.completions(canvas) == [text]


def test_rewards_read_the_completion():
    """By hand: right, wrong, and right only for another problem."""
    task = Backwards(prefill=">")
    prompts = whole(task, "train")
    outputs = task.gold(prompts)
    outputs[1, task.prompt_length] = 0
    terms = task.reward.terms(outputs, prompts)
    assert terms["exact"].tolist() == [1, 0, 1]
    assert terms["arrow"].tolist() == [1, 1, 1]
    assert task.reward.total(terms).tolist() == [2, 0, 2]
    swapped = outputs[torch.tensor([2, 1, 0])]
    assert task.reward.terms(swapped, prompts)["exact"].tolist() == [0, 0, 0]


def test_weights_replace_those_they_name():
    """The others keep their default."""
    prompts = whole(TASKS[1], "train")
    task = Backwards(prefill=">", reward_weights={"arrow": 0.5})
    assert task.reward.total(task.reward.terms(task.gold(prompts), prompts)).tolist() == [2.5] * 3
    with pytest.raises(ValueError, match=r"unknown terms \['speed'\]"):
        Backwards(reward_weights={"speed": 1.0})


def test_show_writes_dots_for_masks():
    """Without the padding; the end of a completion has a sign of its own."""
    task = Backwards(prefill=">")
    prompts = whole(task, "train")
    assert task.show(prompts.tokens[0]) == "abc>....."
    assert task.show(task.gold(prompts)[0]) == "abc>cba∎∎"


# Refusals


def test_a_prompt_that_does_not_fit_is_refused():
    """It is never cut; prefill and question together make its length."""
    exact = Backwards(train=("abcdef",), completion_length=7)
    assert exact.prompts("train", torch.tensor([0])).tokens[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    message = r"a prompt has 7 tokens, but prompt_length=6; .*It begins '{}'"
    for task, word in [
        (Backwards(train=("d", "abcdefg")), "abcdefg"),
        (Backwards(train=("d", "abcdef"), prefill=">"), "abcdef"),
    ]:
        with pytest.raises(ValueError, match=message.format(word)):
            task.prompts("train", torch.tensor([0, 1]))


def test_a_completion_that_does_not_fit_is_refused():
    """Neither is it cut; the prefill takes no room."""
    assert Backwards(train=("abcde",), prefill=">").clean("train").x_0.shape == (1, 11)
    task = Backwards(train=("d", "abcde"))
    with pytest.raises(ValueError, match="a completion has 6 tokens, but completion_length=5"):
        task.clean("train")
    with pytest.raises(ValueError, match="a completion has 6 tokens"):
        task.gold(whole(task, "train"))


def test_a_completion_without_the_prefill_is_refused():
    """It would not come back as the text it was."""
    task = Backwards(prefill="h")
    with pytest.raises(ValueError, match="begins '>cba'; expected the prefill 'h' first"):
        task.clean("train")


@pytest.mark.parametrize("field", ["prompt_length", "completion_length"])
def test_lengths_are_positive(field):
    """The message names the field."""
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        dataclasses.replace(TASKS[0], **{field: 0})


# Typed problems


def test_typed_problems_are_prompts_like_any_other():
    """With their facts; the canvases are those of the split with these words."""
    task = TASKS[0]
    prompts = task.read(["abc", "d", "ee fg"])
    assert torch.equal(prompts.tokens, whole(task, "train").tokens)
    assert torch.equal(prompts.info[FACTS], whole(task, "train").info[FACTS])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no problem was given"),
        (["abc", ""], "number 1 of the given problems: it is empty"),
        (["abcdefg"], "a prompt has 7 tokens"),
        (["xyz"], r"has the characters \['x', 'y', 'z'\]"),
    ],
)
def test_a_typed_problem_that_cannot_be_posed_is_refused(texts, message):
    """The message says which and why."""
    with pytest.raises(ValueError, match=message):
        TASKS[0].read(texts)


# Characters


def test_characters_are_numbered_in_order():
    """One token per character, then the end, then the mask."""
    assert LETTERS.vocab_size == 11
    assert (END, MASK) == (10, 11)
    assert LETTERS.encode("ba >") == [1, 0, 8, 9]
    assert LETTERS.decode([1, 0, 8, 9]) == "ba >"
    assert [LETTERS.symbol(token) for token in (0, 9, END, MASK)] == ["a", ">", "∎", "_"]
    assert LETTERS.decode([]) == ""


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_an_alphabet_names_each_character_once(alphabet):
    """And at least one."""
    with pytest.raises(ValueError, match="is empty or names a character twice"):
        Characters(alphabet=alphabet)
