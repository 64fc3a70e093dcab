"""A warm start: supervised fine-tuning of a pretrained model on demonstrations, before RL.

As d1 does (arXiv:2504.12216): adapters are trained with the masked cross-entropy on completions,
the prompts in clear, and merged; the result takes the place of the base, so that RL starts from it
and measures its KL to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rescore.models.finetune import add_lora
from rescore.models.language import LanguageModel
from rescore.models.language_files import save_merged
from rescore.tasks.records import read_records, split_by_content
from rescore.tasks.text import Problem, TextTask
from rescore.training.directory import default_cache
from rescore.training.pretrained import Pretrained
from rescore.training.run import Run
from rescore.training.supervised import Row, Supervised, fit
from rescore.training.world import accelerator_for, as_network


@dataclass(frozen=True, kw_only=True)
class Sft(Supervised):
    """How a pretrained model is fine-tuned on demonstrations; the rest is the recipe's."""

    data: str
    """JSONL or parquet, or ``hub:`` and a name: rows with ``question`` and ``completion``."""
    out: Path
    """A new folder, for the merged weights in the layout of the original checkpoint."""
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 16
    """Demonstrations per step."""
    lr: float = 1e-5
    """Peak learning rate of AdamW; falls to 0 along a half cosine."""
    micro_batch: int = 4
    """Demonstrations per backward pass."""
    validation_rows: int = 64
    """Sequences in the validation loss, the same ones under the same masks every time."""
    held_out: float = 0.05
    """Share of the demonstrations kept for the validation loss, chosen by content."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")


def sft(run: Run, options: Sft, note: Callable[[str], None]) -> Path:
    """Fine-tune the base of a run on demonstrations and write it as a checkpoint to start from.

    Raises:
        ValueError: the run has no pretrained base or no adapters, a row is no demonstration or does
            not fit into the windows of the task, or the folder exists.
    """
    task, base = run.task, run.base
    if not (isinstance(base, Pretrained) and isinstance(task, TextTask) and run.lora is not None):
        raise ValueError(
            "a warm start trains adapters (lora) on a pretrained language model with a task in "
            "text; this recipe has something else"
        )
    if base.quantize is not None:
        raise ValueError(
            f"quantize='{base.quantize}' leaves nothing exact to merge the adapters into; set "
            f"quantize=None for the warm start"
        )
    if options.out.exists():
        raise ValueError(f"{options.out} exists; choose a new folder")
    run.check()
    problems = demonstrations(options.data, options.held_out)
    data, validation = task.examples(problems["train"]), task.examples(problems["held_out"])
    accelerator = accelerator_for(run)
    module = replace(base, guidance=0.0).build(  # guidance belongs to sampling
        task, seed=run.seed, cache=default_cache(), device=accelerator.device, note=note
    )
    as_network(module, run)
    generator = torch.Generator().manual_seed(run.seed)
    add_lora(module, run.lora, generator=generator)

    def tell(row: Row) -> None:
        note(f"step {row.step}: validation bound {row.validation:.3f} nats per completion")

    with torch.autocast(
        accelerator.device.type,
        torch.bfloat16,
        enabled=run.precision == "bfloat16",
        cache_enabled=False,  # a cast kept from before an update would hide the update
    ):
        fit(
            module,
            data,
            validation,
            options,
            generator,
            micro_batch=options.micro_batch,
            progress=tell,
        )
    assert isinstance(module, LanguageModel)
    save_merged(module, options.out, base.source(task))
    return options.out


def demonstrations(source: str, held_out: float) -> dict[str, list[Problem]]:
    """The rows of a file as problems whose gold completion is the demonstration, in two parts.

    ``train`` and ``held_out`` are told apart by the question alone.

    Raises:
        ValueError: a row lacks ``question`` or ``completion``, one of them is no text, or a part
            stays empty.
    """
    rows = read_records(source, "train")
    for number, row in enumerate(rows):
        if not all(isinstance(row.get(name), str) for name in ("question", "completion")):
            raise ValueError(
                f"row {number} of {source} has the fields {sorted(row)}; expected 'question' and "
                f"'completion', both texts"
            )
    parts = split_by_content(rows, "question", {"train": 1 - held_out, "held_out": held_out})
    return {
        name: [Problem(question=row["question"], gold=row["completion"], facts={}) for row in part]
        for name, part in parts.items()
    }
