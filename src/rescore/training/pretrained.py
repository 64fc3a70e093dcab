"""Bases whose weights somebody else trained: LLaDA, Dream or a masked language model."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rescore.models.finetune import Lora
from rescore.models.language import (
    Dtype,
    LanguageModel,
    Quantization,
    check_installed,
    load_language_model,
    read_mask_id,
)
from rescore.models.language_files import save_adapter, save_merged
from rescore.models.layouts import read_layout
from rescore.models.miniature import Family, write_miniature
from rescore.tasks.task import Task, TokenTask
from rescore.tasks.text import TextTask
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.base import Base

TEXTS = 64
"""Problems that the tokenizer of a miniature learns from."""


@dataclass(frozen=True, kw_only=True)
class Published(Base):
    """A base whose weights are read from files that others wrote, and written back as such."""

    @abc.abstractmethod
    def in_miniature(
        self, task: Task, folder: Path, *, seed: int, device: str
    ) -> tuple[Published, Task]:
        """The same base on random weights at tiny size, written into a folder unless it is there.

        Args:
            task: its tiny tokenizer learns from its problems.
            folder: where to; weights are in the layout of the original.
            seed: of the weights.
            device: where they will be used.

        Returns:
            The base that reads them, and the task for it.

        Raises:
            ValueError: the folder holds a miniature of another model, or the task is not for this
                kind of model.
        """

    @abc.abstractmethod
    def export(self, module: nn.Module, folder: Path, task: Task, adapters: Lora | None) -> None:
        """Write a fine-tuned network as a new folder in a format that other programs read.

        Args:
            module: what ``build`` made, with other weights; not to be used afterwards.
            folder: where to.
            task: that it was built for.
            adapters: write these alone; None = all weights in the original's layout, adapters added
                in.

        Raises:
            ValueError: the folder exists, or there is no such format.
        """


def checked_text_task(task: Task) -> tuple[TextTask, PretrainedTokenizer]:
    """A task in text, and its pretrained tokenizer.

    Raises:
        ValueError: it is another task, or has another tokenizer.
    """
    if not (isinstance(task, TextTask) and isinstance(task.tokenizer, PretrainedTokenizer)):
        raise ValueError(
            f"a {type(task).__name__} has no pretrained tokenizer that a tiny one could stand for"
        )
    return task, task.tokenizer


def words_of(task: TextTask) -> list[str]:
    """Texts of the first problems to train on."""
    return [f"{problem.question}\n{problem.gold}" for problem in task.problems("train")[:TEXTS]]


@dataclass(frozen=True, kw_only=True)
class Pretrained(Published):
    """A pretrained language model, from a folder or the hub; no code of the checkpoint runs."""

    weights: str | None = None
    """Folder or name of a repository on the hub; None = where the task's tokenizer is."""
    dtype: Dtype = "bfloat16"
    """Of the frozen weights; adapters are float32."""
    quantize: Quantization | None = None
    """``nf4`` keeps the linear layers in 4 bits, on a GPU, for training adapters only."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    guidance: float = 0.0
    """Scale w of classifier-free guidance away from the model without the prompt; 0 = off. It
    doubles the cost of every prediction."""

    miniature: Family = "llada"
    """The checkpoint that ``--dry-run`` writes in the place of the weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be finite and not negative, got {self.guidance}")

    @property
    def uniform(self) -> bool:
        return False

    def source(self, task: Task) -> str:
        """Where the weights are.

        Raises:
            ValueError: neither the base nor the task says where.
        """
        if self.weights is not None:
            return self.weights
        if isinstance(task, TextTask) and isinstance(task.tokenizer, PretrainedTokenizer):
            return task.tokenizer.path
        raise ValueError(
            f"{type(task).__name__} has no pretrained tokenizer that would tell where the weights "
            f"are; set weights to a folder or a name on the hub"
        )

    def check(self, task: Task, device: str) -> None:
        """Refuse a missing package, a missing or unknown checkpoint, and one for another task.

        Only its config, and the task's tokenizer, are read.

        Raises:
            ValueError: says what is missing or does not fit, and what to do.
        """
        if not isinstance(task, TokenTask):
            raise ValueError(
                f"a {type(self).__name__} makes tokens, which {type(task).__name__} does not use"
            )
        check_installed(torch.device(device), self.quantize)
        weights = self.source(task)
        layout = read_layout(weights)
        mask_id = read_mask_id(weights, layout)
        if mask_id != task.mask_id or task.vocab_size > layout.vocab_size:
            raise ValueError(
                f"{weights} has {layout.vocab_size} tokens and mask token {mask_id}, the task "
                f"{task.vocab_size} and {task.mask_id}; use the tokenizer of the model"
            )
        if task.length > layout.window:
            raise ValueError(
                f"the task has {task.length} positions, {weights} takes at most {layout.window}; "
                f"make prompt_length + completion_length smaller"
            )
        if self.guidance and not isinstance(task, TextTask):
            raise ValueError(
                f"guidance={self.guidance} hides the prompt, but a {type(task).__name__} has no "
                f"prompt columns; set guidance=0"
            )

    def check_training(self, *, adapters: bool, precision: str) -> None:
        if self.quantize is not None and not (adapters and precision == "bfloat16"):
            raise ValueError(
                f"quantize='{self.quantize}' freezes the weights in 4 bits and computes in "
                f"bfloat16; got precision={precision} {'with' if adapters else 'without'} lora, "
                f"set precision to bfloat16 and lora, or quantize=None"
            )
        if self.dtype == precision == "bfloat16" and not adapters:
            raise ValueError(
                "all weights would be trained in bfloat16, which loses small updates; train "
                "adapters (lora), or set base.dtype to float32"
            )

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> LanguageModel:
        weights = self.source(task)
        note(f"loading {weights}")
        return load_language_model(
            weights,
            device=device,
            dtype=self.dtype,
            quantize=self.quantize,
            gradient_checkpointing=self.gradient_checkpointing,
            prompt_length=task.prompt_length if isinstance(task, TextTask) else 0,
            guidance=self.guidance,
        )

    def in_miniature(
        self, task: Task, folder: Path, *, seed: int, device: str
    ) -> tuple[Pretrained, TextTask]:
        task, tokenizer = checked_text_task(task)
        if (folder / "config.json").exists():
            family = read_layout(str(folder)).family
            if family != self.miniature:
                raise ValueError(
                    f"{folder} holds a miniature of {family}, and this recipe wants one of "
                    f"{self.miniature}; delete it, or choose another --out"
                )
        else:
            texts = words_of(task)
            write_miniature(folder, self.miniature, seed=seed, texts=texts, window=task.length)
        quantize = self.quantize if device.startswith("cuda") else None
        small = dataclasses.replace(self, weights=None, quantize=quantize)
        tokenizer = dataclasses.replace(tokenizer, path=str(folder))
        return small, dataclasses.replace(task, tokenizer=tokenizer)

    def export(self, module: nn.Module, folder: Path, task: Task, adapters: Lora | None) -> None:
        assert isinstance(module, LanguageModel)
        if adapters is None:
            save_merged(module, folder, self.source(task))
        else:
            save_adapter(module, adapters, folder, self.source(task))
