"""Tasks in text: a question in words, a completion of tokens, and rewards that read it.

A canvas is ``prompt_length`` columns that hold the prompt, right-aligned and padded on the left
with columns nothing attends to, then ``completion_length`` columns that the model writes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from rescore.rewards.reward import Reward
from rescore.rewards.text import FACTS, Facts, TextFunction, on_text, pack, unpack
from rescore.tasks.task import Split, TokenTask, check_numbers
from rescore.tasks.tokenizers import Tokenizer
from rescore.types import Examples, Prompts


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with what its rewards need."""

    question: str
    """What the user asks."""
    gold: str
    """A completion that earns the full reward in every term."""
    facts: Facts
    """What the rewards need to know, as JSON."""


@dataclass(frozen=True, kw_only=True)
class TextTask(TokenTask):
    """A task whose prompts and completions are text. Implement ``problems`` and ``functions``."""

    tokenizer: Tokenizer
    """Text to tokens and back."""
    prompt_length: int
    """Columns for the prompt; a longer one is refused."""
    completion_length: int
    """Columns that the model writes."""
    prefill: str = ""
    """The first words of every answer, given to the model."""
    reward_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Weights of the reward terms; those not named keep the weight of ``default_weights``."""

    @abc.abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, the same list every time; splits share no content."""

    @property
    @abc.abstractmethod
    def functions(self) -> Mapping[str, TextFunction]:
        """The reward terms by name, each in [0, 1]; gold completions earn 1 in every one."""

    @property
    @abc.abstractmethod
    def default_weights(self) -> Mapping[str, float]:
        """Weight of every term; 0 reports a term without using it."""

    @abc.abstractmethod
    def problem(self, text: str) -> Problem:
        """The problem that a person typed.

        Raises:
            ValueError: it is none; says why.
        """

    def __post_init__(self) -> None:
        for name in ("prompt_length", "completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.reward  # refuses weights of terms that do not exist

    @property
    def vocab_size(self) -> int:
        """The tokens of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def mask_id(self) -> int:
        return self.tokenizer.mask_id

    @property
    def length(self) -> int:
        """Prompt columns, then completion columns."""
        return self.prompt_length + self.completion_length

    @property
    def reward(self) -> Reward:
        """The terms of ``functions``, weighted by ``default_weights`` and ``reward_weights``."""
        functions = on_text(self.functions, self.completions)
        return Reward(functions, {**self.default_weights, **self.reward_weights})

    def symbol(self, token: int) -> str:
        """One token as text."""
        return self.tokenizer.symbol(token)

    def check(self) -> None:
        """Lay out the prompts with most characters, which have about the most tokens.

        Raises:
            ValueError: one is longer than the window, or the tokenizer cannot be used.
        """
        for split in ("train", "validation", "test"):
            longest = sorted(self.problems(split), key=lambda problem: -len(problem.question))
            for problem in longest[:8]:
                self._canvas(problem.question)

    def size(self, split: Split) -> int:
        """Number of problems in a split."""
        return len(self.problems(split))

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Prompts:
        """The problems with these numbers; ``info["facts"]`` holds their facts as bytes.

        Raises:
            ValueError: a number is not in ``[0, size(split))``, or a prompt is too long.
        """
        problems = self.problems(split)
        check_numbers(index, split, len(problems), "problem")
        return self._prompts([problems[number] for number in index.tolist()])

    def read(self, texts: Sequence[str]) -> Prompts:
        """Prompts from typed problems, in the form ``problem`` understands.

        Raises:
            ValueError: a text is no valid problem; says which and why.
        """
        if not texts:
            raise ValueError("no problem was given; expected at least one")
        problems = []
        for number, text in enumerate(texts):
            try:
                problems.append(self.problem(text))
            except ValueError as error:
                raise ValueError(f"number {number} of the given problems: {error}") from None
        return self._prompts(problems)

    def gold(self, prompts: Prompts) -> Int[Tensor, "B L"]:
        """The prompts with the gold completions of their problems filled in."""
        gold = [self._completion(facts["gold"]) for facts in unpack(prompts.info[FACTS])]
        return torch.cat([prompts.tokens[:, : self.prompt_length], torch.stack(gold)], 1)

    def clean(self, split: Split) -> Examples:
        """Every problem of a split with its gold completion; noise goes to the completion only."""
        return self.examples(self.problems(split))

    def examples(self, problems: Sequence[Problem]) -> Examples:
        """Problems with their gold completions.

        Raises:
            ValueError: a prompt or a completion does not fit into its window.
        """
        prompts = self._prompts(problems)
        return Examples(x_0=self.gold(prompts), editable=prompts.editable, attend=prompts.attend)

    def completions(self, outputs: Int[Tensor, "B L"]) -> list[str]:
        """The text of each completion, the prefill in front, up to the first end token."""
        rows = outputs[:, self.prompt_length :].tolist()
        return [self.prefill + self.tokenizer.decode(row) for row in rows]

    def show(self, tokens: Int[Tensor, " L"]) -> str:
        """Prompt and completion as text; a position not yet written is a dot."""
        prompt, completion = tokens[: self.prompt_length], tokens[self.prompt_length :]
        words = [self.tokenizer.symbol(t) for t in prompt.tolist() if t != self.tokenizer.end_id]
        for token in completion.tolist():
            words.append("." if token == self.mask_id else self.tokenizer.symbol(token))
        return "".join(words)

    def _prompts(self, problems: Sequence[Problem]) -> Prompts:
        rows = [self._canvas(problem.question) for problem in problems]
        number = torch.arange(len(rows))
        tokens = torch.tensor([row for row, _ in rows], dtype=torch.long).view(-1, self.length)
        column = torch.arange(self.length).expand_as(tokens)
        start = torch.tensor([start for _, start in rows], dtype=torch.long)
        facts = [{**problem.facts, "gold": problem.gold} for problem in problems]
        return Prompts(
            tokens=tokens,
            editable=column >= self.prompt_length,
            attend=column >= start[:, None],
            group=number,
            sample_id=number,
            info={FACTS: pack(facts)},
        )

    def _canvas(self, question: str) -> tuple[list[int], int]:
        """The canvas of a question and the column at which its prompt starts.

        Raises:
            ValueError: the prompt is longer than the window.
        """
        prompt = self.tokenizer.prompt(question, self.prefill)
        start = self.prompt_length - len(prompt)
        if start < 0:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens, but prompt_length={self.prompt_length}; raise "
                f"prompt_length (prompts are never cut). It begins {question[:60]!r}"
            )
        pad, mask = [self.tokenizer.end_id] * start, [self.mask_id] * self.completion_length
        return [*pad, *prompt, *mask], start

    def _completion(self, text: str) -> Int[Tensor, " C"]:
        """The tokens of a completion, filled up with end tokens.

        Raises:
            ValueError: it does not fit, or does not begin with the prefill.
        """
        if not text.startswith(self.prefill):
            raise ValueError(
                f"a completion begins {text[:60]!r}; expected the prefill {self.prefill!r} first"
            )
        tokens = self.tokenizer.encode(text.removeprefix(self.prefill))
        if len(tokens) > self.completion_length:
            raise ValueError(
                f"a completion has {len(tokens)} tokens, but "
                f"completion_length={self.completion_length}; raise it. It begins {text[:60]!r}"
            )
        fill = [self.tokenizer.end_id] * (self.completion_length - len(tokens))
        return torch.tensor([*tokens, *fill])
