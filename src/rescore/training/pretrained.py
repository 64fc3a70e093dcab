"""A base whose weights somebody else trained: LLaDA, Dream or a masked language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rescore.models.language import (
    Dtype,
    LanguageModel,
    Quantization,
    check_installed,
    load_language_model,
    read_mask_id,
)
from rescore.models.layouts import read_layout
from rescore.models.miniature import Family
from rescore.tasks.task import Task
from rescore.tasks.text import TextTask
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.base import Base


@dataclass(frozen=True, kw_only=True)
class Pretrained(Base):
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
