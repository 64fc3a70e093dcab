"""Replies across a counter: a tiny language, a hidden rule, and a reward model trained on choices.

A customer asks a small shop for one of forty goods ("any milk today?"), and the model writes the
reply ("gladly, take the milk now."). Replies of very mixed quality are what a base learns from. The
hidden rule wants a reply that is courteous, names the goods asked for, and says no word twice; it
draws the choices between two replies from which the reward model is trained, and is reported, but
nothing is optimised for it.

The whole of reinforcement learning from human feedback in small (Ouyang et al. 2022,
arXiv:2203.02155), with the rule in the place of the humans, so that one can see what they think of
the result.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rescore.rewards.preference import PROMPT, PreferencePair, PreferenceReward
from rescore.rewards.text import Facts, TextFunction
from rescore.tasks.records import split_by_content
from rescore.tasks.reward_models import BradleyTerry, load_reward_model, train_reward_model
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import Characters
from rescore.types import Examples, Prompts

T = TypeVar("T")

# The language

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,?"
GOODS = (
    *("soup", "rice", "cake", "corn", "plum", "pear", "milk", "salt", "fish", "beef"),
    *("kale", "bean", "tart", "stew", "lamb", "pork", "leek", "lime", "mint", "sage"),
    *("dill", "figs", "kiwi", "nuts", "oats", "eggs", "loaf", "buns", "jams", "teas"),
    *("mead", "wine", "beer", "cola", "tuna", "crab", "clam", "duck", "veal", "peas"),
)
"""What can be asked for; all of four letters."""
QUESTIONS = (
    *("any {} today?", "got any {}?", "is there {}?", "have you {}?", "how is the {}?"),
    *("where is {}?", "can i get {}?", "may i buy {}?", "i want {}.", "i need {}.", "show me {}."),
    *("is {} cheap?", "is {} fresh?", "who makes {}?", "why no {}?", "more {} here?"),
)
COURTESIES = ("please", "thanks", "gladly", "kindly")
OTHER_OPENINGS = ("well", "look", "hm", "")
BODIES = ("we have {}", "take the {}", "{} is here", "try our {}", "here is {}", "eat the {}")
CLOSINGS = (".", " now.", " then.")
WORDS = frozenset(
    re.findall("[a-z]+", " ".join((*GOODS, *COURTESIES, *OTHER_OPENINGS, *BODIES, *CLOSINGS)))
)
"""Every word that a reply may have."""

COURTEOUS = 0.35
"""Share of replies that open with a courtesy."""
ON_TOPIC = 0.4
"""Share of replies that name the goods asked for; the others name something else."""
STUTTERS = 0.5
"""Share of replies that say a word twice."""
CUT = 0.2
"""Share of the replies in a choice that end early, anywhere."""
MISSPELT = 0.2
"""Share of the replies in a choice with one to four characters exchanged for random ones. Cut and
misspelt replies teach the reward model what a policy would soon find if it had never seen them."""

PROMPT_LENGTH, REPLY_LENGTH = 16, 32
"""Characters of the longest question and the longest reply."""
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Expected share of all questions in each split."""
HELD_OUT = 1024
"""Choices, and replies, on which a reward model is judged and standardised."""


def rule(reply: str, goods: str) -> float:
    """The hidden rule, in [0, 1]: the share of known words times the mean of three answers.

    Is there a courtesy, are the goods named, is no word said twice? A reply without words gets 0.
    """
    words = re.findall("[a-z]+", reply)
    if not words:
        return 0.0
    spelled = sum(word in WORDS for word in words) / len(words)
    courteous = any(word in COURTESIES for word in words)
    return spelled * (courteous + (goods in words) + (len(set(words)) == len(words))) / 3


def draw_reply(goods: str, rng: np.random.Generator) -> str:
    """A reply of mixed quality to a question for these goods."""
    opening = _pick(COURTESIES if rng.random() < COURTEOUS else OTHER_OPENINGS, rng)
    others = [other for other in GOODS if other != goods]
    named = goods if rng.random() < ON_TOPIC else _pick(others, rng)
    words = _pick(BODIES, rng).format(named).split()
    if rng.random() < STUTTERS:
        place = int(rng.integers(len(words)))
        words.insert(place, words[place])
    return (f"{opening}, " if opening else "") + " ".join(words) + _pick(CLOSINGS, rng)


def draw_pair(
    question: str, goods: str, sharpness: float, rng: np.random.Generator
) -> PreferencePair:
    """Two replies that differ in the rule's score s, and a choice with Bradley-Terry noise.

    The first is chosen with probability ``1 / (1 + exp(-sharpness (s_1 - s_2)))``.
    """
    while True:
        replies = [_damaged(draw_reply(goods, rng), rng) for _ in range(2)]
        gap = rule(replies[0], goods) - rule(replies[1], goods)
        if gap != 0:
            break
    if rng.random() >= 1 / (1 + math.exp(-sharpness * gap)):
        replies.reverse()
    return PreferencePair(prompt=question, chosen=replies[0], rejected=replies[1])


def _damaged(reply: str, rng: np.random.Generator) -> str:
    letters = list(reply)
    if rng.random() < CUT:
        letters = letters[: int(rng.integers(len(letters)))]
    if letters and rng.random() < MISSPELT:
        for place in rng.integers(len(letters), size=rng.integers(1, 5)).tolist():
            letters[place] = _pick(ALPHABET, rng)
    return "".join(letters)


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


# Questions, replies and choices of a split


@functools.cache
def _questions() -> Mapping[str, Sequence[tuple[str, str]]]:
    """Question and goods of every prompt, by split: a hash of the question decides."""
    rows = [{PROMPT: form.format(goods), "goods": goods} for form in QUESTIONS for goods in GOODS]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    parts = split_by_content([rows[number] for number in order], PROMPT, SHARES)
    return {name: [(row[PROMPT], row["goods"]) for row in part] for name, part in parts.items()}


@functools.cache
def _problems(split: Split) -> tuple[Problem, ...]:
    return tuple(_problem(question, goods) for question, goods in _questions()[split])


def _problem(question: str, goods: str) -> Problem:
    return Problem(
        question=question,
        gold=f"gladly, take the {goods} now.",
        facts={PROMPT: question, "goods": goods},
    )


def _rng(seed: int, split: Split, purpose: str) -> np.random.Generator:
    streams = [(part, use) for part in SHARES for use in ("replies", "choices")]
    return np.random.default_rng([seed, streams.index((split, purpose))])


def replies(split: Split, n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions of a split in turn, each with a reply of mixed quality."""
    rng, questions = _rng(seed, split, "replies"), _questions()[split]
    asked = [questions[number % len(questions)] for number in range(n)]
    return [(question, draw_reply(goods, rng)) for question, goods in asked]


def choices(split: Split, n: int, *, sharpness: float, seed: int = 0) -> list[PreferencePair]:
    """Questions of a split in turn, each with a choice between two replies."""
    rng, questions = _rng(seed, split, "choices"), _questions()[split]
    asked = [questions[number % len(questions)] for number in range(n)]
    return [draw_pair(question, goods, sharpness, rng) for question, goods in asked]


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # a reward may be asked for the first time where gradients are off
@torch.enable_grad()
def _trained(pairs: int, sharpness: float, config: BradleyTerry, seed: int) -> PreferenceReward:
    """The reward model of the drawn choices, trained once per process.

    It learns from the questions of the training split; replies to those of the validation split
    have mean 0 and standard deviation 1.
    """
    return train_reward_model(
        choices("train", pairs, sharpness=sharpness, seed=seed),
        Characters(alphabet=ALPHABET),
        PROMPT_LENGTH + 1 + REPLY_LENGTH,
        config,
        known=replies("validation", HELD_OUT, seed),
        seed=seed,
    )


# The task


@dataclass(frozen=True, kw_only=True)
class Replies(TextTask):
    """Write the reply to a question: as a reward model likes it, and as the hidden rule does.

    Questions are given, right-aligned in spaces; what follows a reply is filled with the end token,
    a token like any other, so nothing on the canvas is padding. No question is in two splits, and
    the reward model has seen those of the training split only.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    tokenizer: Characters = Characters(alphabet=ALPHABET)
    """One token per character, and an end token."""
    prompt_length: int = PROMPT_LENGTH
    """Columns for the question."""
    completion_length: int = REPLY_LENGTH
    """Columns for the reply."""
    clean_pool: int = 8192
    """Training questions with a reply of mixed quality, for a base."""
    pairs: int = 8192
    """Choices between two replies, from which the reward model is trained."""
    sharpness: float = 12.0
    """How sure the choices are: the log-odds per unit of the rule's score."""
    bradley_terry: BradleyTerry = BradleyTerry()
    """Shape and training of the reward model."""
    reward_model: str | None = None
    """A reward model to use instead: a file of ``save_reward_model``, or a sequence classifier."""
    seed: int = 0
    """Draws replies and choices, and trains the reward model; has no say in the splits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("prompt_length", PROMPT_LENGTH), ("completion_length", REPLY_LENGTH)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        for name in ("clean_pool", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 < self.sharpness < math.inf:
            raise ValueError(f"sharpness is {self.sharpness}; expected a positive number")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        missing = "".join(sorted(set(ALPHABET) - set(self.tokenizer.alphabet)))
        if missing:
            raise ValueError(f"the alphabet of the tokenizer lacks {missing!r}; add them")

    def problems(self, split: Split) -> Sequence[Problem]:
        """The questions of a split, each with a reply that fully satisfies the rule."""
        return _problems(split)

    def problem(self, text: str) -> Problem:
        """A typed question that names one of the goods.

        Raises:
            ValueError: it names none or several, is too long or has unknown characters.
        """
        question = text.strip()
        named = sorted(set(re.findall("[a-z]+", question)) & set(GOODS))
        if len(named) != 1:
            raise ValueError(
                f"{text!r} names {named or 'no goods'}; expected exactly one of {', '.join(GOODS)}"
            )
        if len(question) > PROMPT_LENGTH:
            raise ValueError(
                f"{text!r} has {len(question)} characters; expected at most {PROMPT_LENGTH}"
            )
        self.tokenizer.encode(question)
        return _problem(question, named[0])

    def clean(self, split: Split) -> Examples:
        """Questions of a split with replies of mixed quality: ``clean_pool`` or one in eight."""
        n = self.clean_pool if split == "train" else max(1, self.clean_pool // 8)
        drawn = replies(split, n, self.seed)
        problems = [Problem(question=q, gold=r, facts={}) for q, r in drawn]
        return self.examples(problems)

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """What a reply is worth to the reward model, and to the hidden rule.

        ``preference``: score of the reward model, 0 and 1 being mean and one standard deviation
        above it of replies such as a base writes; without an upper end. ``rule``: in [0, 1].
        """
        return {"preference": self.preference, "rule": _rule}

    @property
    def default_weights(self) -> Mapping[str, float]:
        """The reward model is what is optimised; the rule stays hidden."""
        return {"preference": 1.0, "rule": 0.0}

    def preference(self, texts: Sequence[str], facts: Sequence[Facts], /) -> Any:
        """The score of every reply; the reward model is trained when it is first asked."""
        return self.judge(texts, facts)

    @property
    def judge(self) -> PreferenceReward:
        """The reward model: from the file that is named, or trained once per process."""
        if self.reward_model is not None:
            return load_reward_model(self.reward_model)
        return _trained(self.pairs, self.sharpness, self.bradley_terry, self.seed)

    def preference_pairs(self, split: Split, n: int) -> list[PreferencePair]:
        """The first n choices of a split, as the reward model is trained (train) or judged on."""
        return choices(split, n, sharpness=self.sharpness, seed=self.seed)

    def validate(self, n: int = 16) -> None:
        """Score the gold replies of each split and demand the full score of the rule.

        Raises:
            ValueError: one earns less than 1.
        """
        for split in ("train", "validation", "test"):
            prompts = self.prompts(split, torch.arange(min(n, self.size(split))))
            value = self.reward.terms(self.gold(prompts), prompts)["rule"]
            if bool((value != 1).any()):
                raise ValueError(f"gold replies of split '{split}' earn {value.min().item()}")

    def show(self, tokens: Int[Tensor, " L"]) -> str:
        """Question and reply as text; a position not yet written is a dot."""
        question = super().show(tokens[: self.prompt_length]).strip()
        return f"{question} {super().show(tokens).removeprefix(question.rjust(self.prompt_length))}"

    def _prompts(self, problems: Sequence[Problem]) -> Prompts:
        """Questions filled up with spaces, so that nothing is padded."""
        width = self.prompt_length
        aligned = [replace(problem, question=problem.question.rjust(width)) for problem in problems]
        return replace(super()._prompts(aligned), attend=None)


def _rule(texts: Sequence[str], facts: Sequence[Facts], /) -> list[float]:
    return [rule(text, known["goods"]) for text, known in zip(texts, facts, strict=True)]
