"""Replies across a counter: the language, the hidden rule, the choices and the reward model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import rescore.tasks.replies as language
from rescore.models.fit import Fit
from rescore.rewards.preference import read_pairs, write_pairs
from rescore.rewards.reward import RewardError
from rescore.rewards.text import FACTS, unpack
from rescore.tasks.replies import (
    ALPHABET,
    COURTESIES,
    GOODS,
    WORDS,
    Replies,
    choices,
    draw_pair,
    draw_reply,
    replies,
    rule,
)
from rescore.tasks.reward_models import (
    BradleyTerry,
    CharacterPairs,
    Conversations,
    PretrainedPairs,
    load_reward_model,
    save_reward_model,
    train_reward_model,
)
from rescore.tasks.tokenizers import Characters

SPLITS = ("train", "validation", "test")
SMALL = BradleyTerry(width=8, fit=Fit(loss="logistic", epochs=1))
TASK = Replies(pairs=128, clean_pool=400, bradley_terry=SMALL)
CHARACTERS = Characters(alphabet=ALPHABET)


def whole(task, split):
    return task.prompts(split, torch.arange(task.size(split)))


def words(text):
    return re.findall("[a-z]+", text)


def goods_in(text):
    return next(word for word in words(text) if word in GOODS)


# The rule


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("gladly, take the milk now.", 1.0),
        ("take the milk now.", 2 / 3),  # no courtesy
        ("gladly, take the beer now.", 2 / 3),  # something else
        ("gladly, take the the milk now.", 2 / 3),  # a word twice
        ("look, take take the beer now.", 0.0),
        ("gladly, tkae the milk now.", 4 / 5),  # one word in five is none
        ("gladlymilk", 0.0),
        (" .,? ", 0.0),
        ("", 0.0),
    ],
)
def test_the_rule(reply, expected):
    assert rule(reply, "milk") == pytest.approx(expected)


def test_the_gold_replies_satisfy_the_rule():
    for split in SPLITS:
        prompts = whole(TASK, split)
        assert bool((TASK.reward.terms(TASK.gold(prompts), prompts)["rule"] == 1).all())


# The language


def test_replies_are_of_mixed_quality():
    """Each answer of the rule holds about as often as its share, so no base starts at 0 or 1."""
    drawn = replies("train", 2000)
    parts = np.array(
        [
            (bool(set(words(r)) & set(COURTESIES)), goods_in(q) in words(r), rule(r, goods_in(q)))
            for q, r in drawn
        ]
    ).mean(0)
    error = 4 * math.sqrt(0.25 / 2000)
    assert abs(parts[0] - 0.35) < error
    assert abs(parts[1] - 0.4) < error
    assert abs(parts[2] - (0.35 + 0.4 + 0.5) / 3) < error
    assert all(set(words(reply)) <= WORDS for _, reply in drawn)


def test_the_other_goods_are_other(monkeypatch):
    """A reply off the topic never names the goods by chance, but any of the others."""
    monkeypatch.setattr(language, "ON_TOPIC", 0.0)
    rng = np.random.default_rng(3)
    named = {goods_in(draw_reply("milk", rng)) for _ in range(1000)}
    assert named == set(GOODS) - {"milk"}


def test_no_question_is_in_two_splits():
    """And each of them is a question for known goods."""
    asked = {split: {p.question for p in TASK.problems(split)} for split in SPLITS}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 16 * 40
    assert all(len(set(words(q)) & set(GOODS)) == 1 for q in set.union(*asked.values()))
    assert len(asked["train"]) > len(asked["test"]) > len(asked["validation"]) > 32
    other = dataclasses.replace(TASK, seed=4)
    assert [p.question for p in other.problems("test")] == [
        p.question for p in TASK.problems("test")
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_clean_data_is_of_its_split(split):
    """Nothing is padding; questions stand where prompts have them, and no mask is left."""
    data = TASK.clean(split)
    assert len(data.x_0) == (400 if split == "train" else 50)
    assert data.attend is None
    assert int(data.x_0.max()) == TASK.tokenizer.end_id == TASK.vocab_size - 1
    mine = {tuple(row) for row in whole(TASK, split).tokens[:, :16].tolist()}
    assert {tuple(row) for row in data.x_0[:, :16].tolist()} <= mine
    assert bool((data.editable == (torch.arange(48) >= 16)).all())
    texts = TASK.completions(data.x_0)
    assert texts == [reply for _, reply in replies(split, len(texts))]


def test_clean_data_is_drawn_from_the_seed():
    again = dataclasses.replace(TASK)
    assert torch.equal(again.clean("train").x_0, TASK.clean("train").x_0)
    other = dataclasses.replace(TASK, seed=1)
    assert not torch.equal(other.clean("train").x_0, TASK.clean("train").x_0)


# Prompts


def test_prompts_are_clamped_and_replies_are_masked():
    prompts = TASK.prompts("test", torch.tensor([3, 0]))
    assert prompts.attend is None
    assert prompts.tokens.shape == (2, 48)
    assert bool((prompts.tokens[:, 16:] == TASK.mask_id).all())
    assert bool((prompts.tokens[:, :16] < TASK.vocab_size).all())
    assert bool((prompts.editable == (torch.arange(48) >= 16)).all())
    facts = unpack(prompts.info[FACTS])
    assert [fact["prompt"] for fact in facts] == [
        TASK.problems("test")[3].question,
        TASK.problems("test")[0].question,
    ]
    assert all(fact["goods"] == goods_in(fact["prompt"]) for fact in facts)


def test_wider_windows_are_filled_with_spaces():
    wide = dataclasses.replace(TASK, prompt_length=20, completion_length=33)
    prompts = wide.prompts("test", torch.tensor([0]))
    question = TASK.problems("test")[0].question
    assert wide.tokenizer.decode(prompts.tokens[0, :20].tolist()) == question.rjust(20)
    assert prompts.tokens.shape == (1, 53)


def test_a_typed_question_is_read_and_shown():
    prompts = TASK.read([" sell me milk? "])
    assert unpack(prompts.info[FACTS])[0]["goods"] == "milk"
    assert TASK.show(prompts.tokens[0]) == "sell me milk? " + "." * 32
    assert TASK.show(TASK.gold(prompts)[0]).startswith("sell me milk? gladly, take the milk now.")
    for text, complaint in [
        ("sell me gold?", "no goods"),
        ("milk or beer?", "names \\['beer', 'milk'\\]"),
        ("could i have milk?", "18 characters"),
        ("Milk?", "no goods"),
        ("milk!", "has the characters"),
    ]:
        with pytest.raises(ValueError, match=f"number 0.*{complaint}"):
            TASK.read([text])


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_length": 15},
        {"completion_length": 31},
        {"clean_pool": 0},
        {"pairs": 0},
        {"sharpness": 0.0},
        {"sharpness": math.inf},
        {"seed": -1},
        {"reward_weights": {"politeness": 1.0}},
        {"tokenizer": Characters(alphabet="abc ")},
    ],
)
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(
        ValueError, match="politeness" if "reward_weights" in wrong else next(iter(wrong))
    ):
        dataclasses.replace(TASK, **wrong)


# The choices


def test_choices_follow_bradley_terry():
    """The better reply is chosen as often as its probability says, in each range of gaps."""
    sharpness = 4.0
    pairs = choices("train", 2000, sharpness=sharpness)
    gaps = np.array(
        [rule(p.chosen, goods_in(p.prompt)) - rule(p.rejected, goods_in(p.prompt)) for p in pairs]
    )
    assert (gaps != 0).all()
    chance = 1 / (1 + np.exp(-sharpness * np.abs(gaps)))
    for low, high in [(0.0, 0.2), (0.2, 0.4), (0.4, 1.1)]:
        rows = (np.abs(gaps) > low) & (np.abs(gaps) <= high)
        assert rows.sum() > 150
        error = 4 * math.sqrt((chance[rows] * (1 - chance[rows])).sum()) / rows.sum()
        assert abs((gaps[rows] > 0).mean() - chance[rows].mean()) < error


def test_choices_are_of_their_split_and_seed():
    asked = {problem.question for problem in TASK.problems("validation")}
    pairs = TASK.preference_pairs("validation", 90)
    assert {pair.prompt for pair in pairs} == asked
    assert pairs == TASK.preference_pairs("validation", 100)[:90]
    assert pairs != choices("validation", 90, sharpness=TASK.sharpness, seed=1)


def test_some_replies_of_choices_are_damaged():
    """Some are cut short and some misspelt; all of them fit and can be read."""
    rng = np.random.default_rng(0)
    pairs = [draw_pair("any milk today?", "milk", 12.0, rng) for _ in range(500)]
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    cut = np.array([not text.endswith(".") for text in texts])
    misspelt = np.array([not set(words(text)[:-1]) <= WORDS for text in texts])
    assert 0.15 < cut.mean() < 0.35
    assert 0.1 < misspelt[~cut].mean() < 0.3
    assert misspelt[cut].any() and not misspelt[cut].all()
    assert max(map(len, texts)) <= 32
    assert all(set(text) <= set(ALPHABET) for text in texts)


def test_choices_go_through_a_file(tmp_path):
    pairs = TASK.preference_pairs("train", 200)
    write_pairs(tmp_path / "choices.jsonl", pairs)
    assert read_pairs(tmp_path / "choices.jsonl") == pairs


# The reward


def test_the_reward_model_is_what_is_optimised():
    """The rule is reported and has no weight."""
    prompts = TASK.prompts("test", torch.arange(5))
    outputs = TASK.gold(prompts)
    terms = TASK.reward.terms(outputs, prompts)
    assert list(terms) == ["preference", "rule"]
    assert torch.equal(TASK.reward.total(terms), terms["preference"])
    assert torch.equal(terms["rule"], torch.ones(5))


def test_nothing_is_trained_before_the_reward_is_asked_for():
    """Making a task and looking at its terms must stay cheap."""
    huge = Replies(pairs=10**12)
    assert list(huge.reward.functions) == ["preference", "rule"]


def test_the_preference_has_mean_0_and_standard_deviation_1():
    """Over replies of mixed quality to the questions of the validation split."""
    drawn = replies("validation", 1024)
    score = TASK.preference([r for _, r in drawn], [{"prompt": q} for q, _ in drawn])
    assert score.mean().item() == pytest.approx(0, abs=1e-4)
    assert score.std().item() == pytest.approx(1, abs=1e-4)


def test_what_follows_the_end_of_a_reply_does_not_count():
    """Neither for the reward model nor for the rule; nor does it matter who else is scored."""
    prompts = TASK.prompts("test", torch.arange(4))
    outputs = TASK.gold(prompts)
    expected = TASK.reward.terms(outputs, prompts)
    junk = outputs.clone()
    end = int((outputs[0] == TASK.tokenizer.end_id).nonzero()[0])
    junk[:, end + 1 :] = 5
    found = TASK.reward.terms(junk, prompts)
    torch.testing.assert_close(found["preference"], expected["preference"], rtol=0, atol=0)
    assert torch.equal(found["rule"], expected["rule"])
    junk[:, end] = 5
    assert not torch.allclose(
        TASK.reward.terms(junk, prompts)["preference"], expected["preference"]
    )
    alone = TASK.reward.terms(outputs[2:3], prompts.take(torch.tensor([2])))
    torch.testing.assert_close(alone["preference"], expected["preference"][2:3])


def test_an_empty_reply_is_scored():
    prompts = TASK.prompts("test", torch.arange(2))
    outputs = torch.where(prompts.editable, TASK.tokenizer.end_id, prompts.tokens)
    terms = TASK.reward.terms(outputs, prompts)
    assert bool(torch.isfinite(terms["preference"]).all())
    assert terms["rule"].tolist() == [0, 0]


def test_the_first_question_may_come_where_gradients_are_off():
    """The model is trained all the same, to the same bits."""
    task = dataclasses.replace(TASK, pairs=96)
    with torch.inference_mode():
        inside = task.judge
    outside = train_reward_model(
        task.preference_pairs("train", 96),
        CHARACTERS,
        49,
        SMALL,
        known=replies("validation", 1024),
    )
    assert inside is task.judge
    assert inside.std == outside.std
    for a, b in zip(inside.module.parameters(), outside.module.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.slow
def test_the_reward_model_orders_choices_it_has_not_seen():
    """At least 80 % of 1024 held-out choices, of which the noise leaves 94 % predictable."""
    task = Replies()
    for split in ("validation", "test"):
        assert task.judge.accuracy(task.preference_pairs(split, 1024)) >= 0.8
    prompts = whole(task, "test")
    assert task.reward.terms(task.gold(prompts), prompts)["preference"].mean() > 1


# Reward models in files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "judge.safetensors"
    save_reward_model(path, TASK.judge)
    return str(path)


def test_a_saved_reward_model_says_the_same(saved):
    facts = [{"prompt": "any milk today?", "goods": "milk"}] * 2
    texts = ["gladly, take the milk now.", "look, eat the beer."]
    expected = TASK.preference(texts, facts)
    found = dataclasses.replace(TASK, reward_model=saved, pairs=1).preference(texts, facts)
    assert torch.equal(found, expected)
    assert load_reward_model(saved) is load_reward_model(saved)


def test_a_damaged_reward_model_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_reward_model(str(tmp_path / "none.safetensors"))
    for name, content in [("half", Path(saved).read_bytes()[:-40]), ("other", b"{}")]:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no reward model"):
            load_reward_model(str(path))


def test_characters_that_are_not_known_are_named(saved):
    with pytest.raises(ValueError, match="has the characters \\['M'\\]"):
        load_reward_model(saved)(["Milk"], [{"prompt": "milk?"}])
    with pytest.raises(ValueError, match="take 61 positions.*at most 49"):
        load_reward_model(saved)(["milk " * 11], [{"prompt": "milk?"}])


def test_only_logistic_fits_make_a_reward_model():
    with pytest.raises(ValueError, match="logistic"):
        BradleyTerry(fit=Fit())


def test_prompt_and_reply_are_set_apart():
    encode = CharacterPairs(tokenizer=Characters(alphabet="abc"), length=6)
    tokens, attend = encode(["ab", ""], ["c", "b"])
    assert tokens.tolist() == [[0, 1, 3, 2], [3, 1, 3, 3]]
    assert attend.tolist() == [[True] * 4, [True, True, False, False]]


# Conversations: a user's prompts and reward model


def conversations(folder, reward_model, rows, **fields):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Conversations(
        tokenizer=CHARACTERS,
        prompt_length=20,
        completion_length=32,
        source=str(path),
        reward_model=reward_model,
        **fields,
    )


@pytest.fixture
def rows():
    return [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in TASK.preference_pairs("train", 60)
    ]


def test_conversations_take_prompts_from_a_file(saved, rows, tmp_path):
    """Files of preference pairs serve; the preference is the whole reward."""
    task = conversations(tmp_path, saved, rows)
    task.check()
    task.validate()
    asked = {split: {p.question for p in task.problems(split)} for split in SPLITS}
    assert set.union(*asked.values()) == {row["prompt"] for row in rows}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values()))
    prompts = whole(task, "train")
    terms = task.reward.terms(task.gold(prompts), prompts)
    problems = task.problems("train")
    expected = TASK.preference([p.gold for p in problems], [p.facts for p in problems])
    torch.testing.assert_close(terms["preference"], expected)
    assert list(terms) == ["preference"]
    assert task.completions(task.clean("train").x_0) == [p.gold for p in problems]


def test_conversations_without_replies_cannot_train_a_base(saved, rows, tmp_path):
    """But they can be prompts."""
    task = conversations(tmp_path, saved, [{"prompt": row["prompt"]} for row in rows])
    task.check()
    with pytest.raises(ValueError, match="has no reply"):
        task.clean("train")
    assert unpack(task.read(["why no milk?"]).info[FACTS])[0]["prompt"] == "why no milk?"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "a"}, "row 0 of .*'prompt' is None.*question"),
        ({"prompt": " "}, "row 0 of .*'prompt' is ' '"),
        ({"prompt": "a", "reply": 3}, "row 0 of .*the reply is 3"),
        ({"prompt": "a"}, "fell to split"),
    ],
)
def test_conversations_say_which_row_is_wrong(saved, tmp_path, row, complaint):
    with pytest.raises(ValueError, match=complaint):
        conversations(tmp_path, saved, [row]).check()


def test_a_reward_model_that_cannot_be_used_is_found_by_the_check(rows, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        conversations(tmp_path, str(tmp_path / "no.safetensors"), rows).check()
    with pytest.raises(RewardError, match="does not exist"):
        conversations(tmp_path, str(tmp_path / "no.safetensors"), rows).validate()


# Sequence classifiers of transformers


def classifier(folder, *, labels=1, template=None, pad="<pad>", base=False, types=False):
    """A GPT-2 of random weights with a scalar head, and a tokenizer of characters."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocab = {token: n for n, token in enumerate(["<pad>", "<end>", *ALPHABET])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if types:
        inner.post_processor = processors.TemplateProcessing(single="$A", pair="$A:0 $B:1")
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        eos_token="<end>",
        chat_template=template,
        model_max_length=40,
        model_input_names=names,
    )
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(vocab),
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=2,
        num_labels=labels,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    kind = transformers.GPT2Model if base else transformers.GPT2ForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind(config)
    network.save_pretrained(folder)
    return str(folder)


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{{ ',' if m['role'] == 'user' else '.' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_classifier_of_transformers_is_a_reward_model(tmp_path, template):
    """Each reply gets the logit of its own text, whatever the batch; prompts count."""
    import transformers

    path = classifier(tmp_path / "model", template=template)
    reward = load_reward_model(path)
    texts, facts = ["yes", "no milk now", "a"], [{"prompt": p} for p in ("milk?", "why?", "milk?")]
    found = reward(texts, facts)
    network = transformers.GPT2ForSequenceClassification.from_pretrained(path).eval()
    for row, (text, fact) in enumerate(zip(texts, facts, strict=True)):
        said = f"{fact['prompt']},{text}." if template else fact["prompt"] + text
        tokens = torch.tensor([[2 + ALPHABET.index(char) for char in said]])
        with torch.no_grad():
            expected = network(input_ids=tokens).logits[0, 0]
        torch.testing.assert_close(found[row], expected)
    assert len(set(found.tolist())) == 3


def test_a_classifier_judges_conversations(tmp_path, rows):
    path = classifier(tmp_path / "model")
    task = conversations(tmp_path, path, rows)
    with pytest.raises(ValueError, match="reads at most 40"):
        load_reward_model(path)(["milk " * 8], [{"prompt": "milk?"}])
    prompts = whole(task, "test")
    short = torch.where(prompts.editable, CHARACTERS.end_id, prompts.tokens)
    assert bool(torch.isfinite(task.reward.terms(short, prompts)["preference"]).all())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"labels": 2}, "it has 2 outputs"),
        ({"base": True}, "lacks the weights \\['score.weight'\\]"),
    ],
)
def test_a_model_that_is_no_reward_model_is_refused(tmp_path, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_reward_model(classifier(tmp_path / "model", **fields))


@pytest.mark.parametrize(
    ("fields", "complaint"), [({"pad": None}, "no padding"), ({"types": True}, "token types")]
)
def test_a_tokenizer_that_cannot_join_pairs_is_refused(tmp_path, fields, complaint):
    encode = PretrainedPairs(path=classifier(tmp_path / "model", **fields))
    with pytest.raises(ValueError, match=complaint):
        encode(["milk?"], ["yes"])
