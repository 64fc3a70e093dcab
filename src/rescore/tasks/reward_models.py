"""Reward models of text: trained from preference pairs, kept in files, used by tasks.

A reward model is a file ``.safetensors`` that ``save_reward_model`` wrote, or a sequence classifier
of transformers with one output, in a folder or on the hub.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rescore.models.fit import Fit, Labelled, fit
from rescore.models.scorer import Scorer, ScorerConfig, load_classifier
from rescore.rewards.preference import (
    PADDING,
    PROMPT,
    Difference,
    PreferencePair,
    PreferenceReward,
    scores,
)
from rescore.rewards.text import Facts, TextFunction
from rescore.tasks.records import Record, read_split
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import Characters, load_tokenizer
from rescore.types import Examples

# From text to tokens


@dataclass(frozen=True, kw_only=True)
class CharacterPairs:
    """Prompt, end token, reply, each character a token; shorter rows are padded on the right."""

    tokenizer: Characters
    """The characters; its end token separates prompt and reply."""
    length: int
    """Positions of the longest sequence."""

    def __call__(
        self, prompts: Sequence[str], replies: Sequence[str], /
    ) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Tokens, and where they are not padding.

        Raises:
            ValueError: a text has characters that are not known, or is too long.
        """
        encode, end = self.tokenizer.encode, self.tokenizer.end_id
        rows = [[*encode(p), end, *encode(r)] for p, r in zip(prompts, replies, strict=True)]
        longest = max(map(len, rows), default=0)
        if longest > self.length:
            raise ValueError(
                f"a prompt and its reply take {longest} positions with the token between them; "
                f"this reward model reads at most {self.length}"
            )
        tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        tokens = tokens.view(len(rows), longest)
        return tokens, torch.arange(longest) < lengths[:, None]


@dataclass(frozen=True, kw_only=True)
class PretrainedPairs:
    """Prompt and reply as a tokenizer of transformers joins them.

    In its chat template, as a turn of the user and one of the assistant; without a template as a
    pair of texts.
    """

    path: str
    """A folder or the name of a repository on the hub."""
    length: int | None = None
    """Positions of the longest sequence; None = what the tokenizer declares."""

    def __call__(
        self, prompts: Sequence[str], replies: Sequence[str], /
    ) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Tokens, and where they are not padding.

        Raises:
            ValueError: a text is too long; or the tokenizer has no padding, or tells the two
                texts apart by token types, which are not passed on.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer of {self.path} has no padding; in a copy, name a token under "
                f"'pad_token' in tokenizer_config.json, and its number under "
                f"'pad_token_id' in config.json"
            )
        if tokenizer.chat_template is None:
            batch = tokenizer(list(prompts), list(replies), padding=True)
        else:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": p}, {"role": "assistant", "content": r}],
                    tokenize=False,
                )
                for p, r in zip(prompts, replies, strict=True)
            ]
            batch = tokenizer(texts, padding=True, add_special_tokens=False)
        if any(map(any, batch.get("token_type_ids", []))):
            raise ValueError(
                f"the tokenizer of {self.path} tells prompt and reply apart by token types, which "
                f"is not supported; use a reward model with a chat template, or without types"
            )
        tokens = torch.tensor(batch["input_ids"])
        limit = tokenizer.model_max_length if self.length is None else self.length
        if tokens.shape[1] > limit:
            raise ValueError(
                f"a prompt and its reply have {tokens.shape[1]} tokens; the reward model in "
                f"{self.path} reads at most {limit}"
            )
        return tokens, torch.tensor(batch["attention_mask"]).bool()


# Training


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """How a small reward model is shaped and trained."""

    width: int = 48
    """Features per position."""
    depth: int = 1
    """Attention blocks."""
    fit: Fit = Fit(loss="logistic", epochs=2)
    """The optimisation; the loss must be ``logistic``."""

    def __post_init__(self) -> None:
        if self.fit.loss != "logistic":
            raise ValueError(f"fit.loss is '{self.fit.loss}'; choices are fitted with 'logistic'")


def train_reward_model(
    pairs: Sequence[PreferencePair],
    tokenizer: Characters,
    length: int,
    config: BradleyTerry,
    *,
    known: Sequence[tuple[str, str]],
    seed: int = 0,
) -> PreferenceReward:
    """A Bradley-Terry model of the pairs; the same arguments give the same bits.

    Args:
        pairs: what to learn from.
        tokenizer: the characters it reads.
        length: positions of the longest sequence: prompt, a token between, reply.
        config: its shape and training.
        known: prompts with replies, best not those of the pairs; their scores get mean 0 and
            standard deviation 1.
        seed: of the weights, then of the order of the pairs.

    Raises:
        ValueError: a text does not fit, or the known replies all score alike.
        RuntimeError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = ScorerConfig(
        n_tokens=tokenizer.vocab_size,
        separator=tokenizer.end_id,
        length=length,
        width=config.width,
        depth=config.depth,
    )
    scorer = shape.network(generator)
    encode = CharacterPairs(tokenizer=tokenizer, length=length)
    rows = _rows(pairs, encode)
    data = Labelled(inputs=rows, targets=torch.ones(len(rows)))
    fit(Difference(scorer), data, data, config.fit, generator)
    scorer.eval().requires_grad_(False)
    score = scores(scorer, encode, [prompt for prompt, _ in known], [reply for _, reply in known])
    mean, std = score.double().mean().item(), score.double().std().item()
    return PreferenceReward(module=scorer, encode=encode, mean=mean, std=std)


def _rows(pairs: Sequence[PreferencePair], encode: CharacterPairs) -> Int[Tensor, "n 2 L"]:
    prompts = [pair.prompt for pair in pairs]
    texts = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    tokens, attend = encode([*prompts, *prompts], [*texts[0], *texts[1]])
    return tokens.masked_fill(~attend, PADDING).unflatten(0, (2, -1)).transpose(0, 1)


# Files


def save_reward_model(path: str | Path, reward: PreferenceReward) -> None:
    """Write a model made by ``train_reward_model``: weights, shape, alphabet, mean and scale."""
    assert isinstance(reward.module, Scorer) and isinstance(reward.encode, CharacterPairs)
    about = {
        "scorer": dataclasses.asdict(reward.module.config),
        "alphabet": reward.encode.tokenizer.alphabet,
        "mean": reward.mean,
        "std": reward.std,
    }
    weights = {name: value.cpu().contiguous() for name, value in reward.module.state_dict().items()}
    save_file(weights, Path(path).expanduser(), metadata={"reward_model": json.dumps(about)})


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # a reward may be asked for the first time where gradients are off
def load_reward_model(path: str, device: str = "cpu") -> PreferenceReward:
    """The reward model in a file ``.safetensors``, in a folder or on the hub; loaded once.

    Those of transformers have mean 0 and scale 1: their scores are taken as they are.

    Raises:
        ValueError: there is none, it is damaged, or its kind is not supported.
    """
    if not path.endswith(".safetensors"):
        module = load_classifier(path).to(device)
        load_tokenizer(path)
        return PreferenceReward(module=module, encode=PretrainedPairs(path=path))
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"'{path}' does not exist; expected a file written by save_reward_model")
    try:
        with safe_open(file, framework="pt") as content:
            about = json.loads((content.metadata() or {})["reward_model"])
        shape = ScorerConfig(**about["scorer"])
        scorer = shape.network(torch.Generator())
        scorer.load_state_dict(load_file(file))
        tokenizer = Characters(alphabet=about["alphabet"])
        mean, std = about["mean"], about["std"]
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"'{path}' is damaged or no reward model: {error}") from error
    scorer.to(device).eval().requires_grad_(False)
    encode = CharacterPairs(tokenizer=tokenizer, length=shape.length)
    return PreferenceReward(module=scorer, encode=encode, mean=mean, std=std)


# A task of a user's own prompts


@dataclass(frozen=True, kw_only=True)
class Conversations(TextTask):
    """Prompts from a file, replies judged by a reward model.

    Rows are ``{"prompt": ...}``, with a reply to learn from in ``reply`` or ``chosen`` where there
    is one: files of preference pairs serve. A folder has a file for each split; anything else is
    one table, split by the prompts.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    source: str
    """Where the prompts are, as ``rescore.tasks.records`` understands it."""
    reward_model: str
    """A file ``.safetensors`` of ``save_reward_model``, or a sequence classifier with one output,
    in a folder or on the hub."""
    reward_device: str = "cpu"
    """Where the reward model runs."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The rows of a split; the source is read once per process.

        Raises:
            ValueError: it cannot be read, or has no row for the split.
        """
        return _conversations(self.source, split)

    def problem(self, text: str) -> Problem:
        """A typed prompt.

        Raises:
            ValueError: it is empty.
        """
        return _conversation({"prompt": text})

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        """``preference``: what the reward model says; it has no largest value."""
        return {"preference": self.preference}

    @property
    def default_weights(self) -> Mapping[str, float]:
        """The preference is all there is."""
        return {"preference": 1.0}

    def preference(self, texts: Sequence[str], facts: Sequence[Facts], /) -> Any:
        """The score of every completion as a reply to its prompt."""
        return load_reward_model(self.reward_model, self.reward_device)(texts, facts)

    def clean(self, split: Split) -> Examples:
        """Every prompt of a split with its reply.

        Raises:
            ValueError: a row has no reply.
        """
        problems = self.problems(split)
        for problem in problems:
            if not problem.gold:
                raise ValueError(
                    f"the prompt {problem.question[:60]!r} of '{self.source}' has no reply to "
                    f"learn from; give one under 'reply' or 'chosen'"
                )
        return self.examples(problems)

    def check(self) -> None:
        """Read the prompts of every split, then load the reward model and score one reply.

        Raises:
            ValueError: a source cannot be read, or the reward model cannot be used.
        """
        super().check()
        problem = self.problems("test")[0]
        self.preference([problem.gold], [problem.facts])

    def validate(self, n: int = 16) -> None:
        """Score replies of each split; a preference has no full reward that could be demanded.

        Raises:
            RewardError: the reward model fails.
        """
        for split in ("train", "validation", "test"):
            prompts = self.prompts(split, torch.arange(min(n, self.size(split))))
            self.reward.terms(self.gold(prompts), prompts)


def _conversation(row: Record) -> Problem:
    prompt, reply = row.get("prompt"), row.get("reply", row.get("chosen", ""))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"'prompt' is {prompt!r}; expected a text (columns are {sorted(row)})")
    if not isinstance(reply, str):
        raise ValueError(f"the reply is {reply!r}; expected a text")
    return Problem(question=prompt, gold=reply, facts={PROMPT: prompt})


def _content(problem: Problem) -> tuple[int, ...]:
    """What no two splits may share: the prompt without case and spacing."""
    return tuple("".join(problem.question.casefold().split()).encode())


def _split_of(content: tuple[int, ...]) -> Split:
    """Eight of ten parts of all prompts to train on, one to validate and one to test on."""
    part = int.from_bytes(hashlib.sha256(bytes(content)).digest()[:6]) % 10
    return "train" if part < 8 else "validation" if part == 8 else "test"


@functools.lru_cache(maxsize=8)
def _conversations(source: str, split: Split) -> tuple[Problem, ...]:
    rows = read_split(source, split, read=_conversation, content=_content, split_of=_split_of)
    if not rows:
        raise ValueError(
            f"none of the prompts of '{source}' fell to split '{split}'; give more prompts, or a "
            f"folder with a file for each split"
        )
    return tuple(problem for _, problem in rows)
