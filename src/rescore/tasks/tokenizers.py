"""Text to tokens and back: characters for small models, and the tokenizers of pretrained ones."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

UNDECLARED_MASKS = ("<|mdm_mask|>",)
"""Mask tokens that a vocabulary has although ``tokenizer_config.json`` does not call them so; the
published LLaDA is such a case."""

TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
"""Tokens that end a turn of a chat."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer(abc.ABC):
    """Text to tokens and back. Frozen: a description, loaded on first use."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens it knows."""

    @property
    @abc.abstractmethod
    def mask_id(self) -> int:
        """The mask token."""

    @property
    @abc.abstractmethod
    def end_id(self) -> int:
        """Ends a completion, fills what is left of it, and pads."""

    @abc.abstractmethod
    def prompt(self, question: str, prefill: str) -> list[int]:
        """The tokens a model is given: the question as a user's turn, the answer's first words."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, without special ones.

        Raises:
            ValueError: it cannot be written in these tokens.
        """

    @abc.abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the first end, without special tokens."""

    @abc.abstractmethod
    def symbol(self, token: int) -> str:
        """One token as text, special ones by name."""


@dataclass(frozen=True, kw_only=True)
class Characters(Tokenizer):
    """One token per character, then the end token, then the mask token."""

    alphabet: str = "0123456789+-*/()=, "
    """The characters, each once."""

    def __post_init__(self) -> None:
        if len(set(self.alphabet)) != len(self.alphabet) or not self.alphabet:
            raise ValueError(f"alphabet {self.alphabet!r} is empty or names a character twice")

    @property
    def vocab_size(self) -> int:
        """The characters and the end token; the mask token is the next."""
        return len(self.alphabet) + 1

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    @property
    def end_id(self) -> int:
        return len(self.alphabet)

    def prompt(self, question: str, prefill: str) -> list[int]:
        return self.encode(question + prefill)

    def encode(self, text: str) -> list[int]:
        strange = sorted(set(text) - set(self.alphabet))
        if strange:
            raise ValueError(f"{text!r} has the characters {strange}; known are {self.alphabet!r}")
        return [self.alphabet.index(char) for char in text]

    def decode(self, tokens: Sequence[int]) -> str:
        ends = (place for place, token in enumerate(tokens) if token >= self.end_id)
        return "".join(self.alphabet[token] for token in tokens[: next(ends, len(tokens))])

    def symbol(self, token: int) -> str:
        return (*self.alphabet, "\N{END OF PROOF}", "_")[token]


@dataclass(frozen=True, kw_only=True)
class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a pretrained model, loaded once; no code of the checkpoint runs."""

    path: str
    """A folder or the name of a repository on the hub."""

    @property
    def vocab_size(self) -> int:
        """The tokens with a text, special ones included; the model may have more columns."""
        return len(load_tokenizer(self.path))

    @property
    def mask_id(self) -> int:
        """The declared mask token, or LLaDA's.

        Raises:
            ValueError: there is none.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer.mask_token_id is not None:
            return tokenizer.mask_token_id
        for name in UNDECLARED_MASKS:
            if name in tokenizer.get_vocab():
                return tokenizer.get_vocab()[name]
        raise ValueError(
            f"the tokenizer of {self.path} has no mask token; use that of a masked model, name the "
            f"token under 'mask_token' in a copy of its tokenizer_config.json, or, for a model "
            f"whose mask comes after all tokens (SEDD), make it an AppendedMask"
        )

    @property
    def end_id(self) -> int:
        """The padding token, with which LLaDA and Dream fill what follows an answer.

        Raises:
            ValueError: the tokenizer declares neither padding nor an end of sequence.
        """
        tokenizer = load_tokenizer(self.path)
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            f"the tokenizer of {self.path} has no end token; name one under 'pad_token' in a copy "
            f"of its tokenizer_config.json"
        )

    def prompt(self, question: str, prefill: str) -> list[int]:
        """The question in the chat template, or as it is if there is none; then the prefill."""
        tokenizer = load_tokenizer(self.path)
        text = question
        if tokenizer.chat_template is not None:
            turn = {"role": "user", "content": question}
            text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text + prefill, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text; a special token's name in it is text like any other."""
        tokenizer = load_tokenizer(self.path)
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the first end of sequence, turn or padding, without special tokens."""
        tokenizer = load_tokenizer(self.path)
        vocab = tokenizer.get_vocab()
        ends = {self.end_id, tokenizer.eos_token_id, tokenizer.sep_token_id}
        ends |= {vocab[name] for name in TURN_ENDS if name in vocab}
        stops = (place for place, token in enumerate(tokens) if token in ends)
        kept = tokens[: next(stops, len(tokens))]
        return tokenizer.decode(list(kept), skip_special_tokens=True)

    def symbol(self, token: int) -> str:
        """One token as text; a number in angle brackets for columns that have none."""
        return load_tokenizer(self.path).decode([token]) or f"<{token}>"


@dataclass(frozen=True, kw_only=True)
class AppendedMask(PretrainedTokenizer):
    """A pretrained tokenizer without a mask token, for a model that puts the mask after its tokens.

    SEDD does so with the tokenizer of GPT-2.
    """

    @property
    def mask_id(self) -> int:
        """The number after the last token."""
        return self.vocab_size


@cache
def load_tokenizer(path: str) -> Any:
    """The tokenizer of transformers at a path; Dream's own class is a Qwen2Tokenizer.

    Raises:
        ValueError: transformers is missing, or there is no tokenizer at the path.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
        from transformers.models.auto.tokenization_auto import get_tokenizer_config
    except ImportError as error:
        raise ValueError(
            'pretrained tokenizers need transformers: pip install "rescore[language]"'
        ) from error
    kinds: dict[str, Any] = {
        "DreamTokenizer": Qwen2Tokenizer,
        "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    }
    try:
        kind = get_tokenizer_config(path).get("tokenizer_class", "")
        return kinds.get(kind, AutoTokenizer).from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a tokenizer from '{path}' ({error}); expected a folder with "
            f"tokenizer_config.json and the files of its class, or a repository on the hub"
        ) from error
