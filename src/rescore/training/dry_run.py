"""A run of a large model at tiny size: random weights, two updates, everything else the same."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import torch

from rescore.models.layouts import read_layout
from rescore.models.miniature import write_miniature
from rescore.sampling.decoder import Decoder
from rescore.tasks.text import TextTask
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.pretrained import Pretrained
from rescore.training.run import Run

TEXTS = 64
"""Problems that the tokenizer of the miniature learns from."""


def dry_run(run: Run, folder: Path) -> Run:
    """The same run on a miniature of its model, short enough to try on a laptop.

    A checkpoint of random weights in the original's layout, with a tokenizer of the original's
    class, is written into ``folder`` (unless it is there), and weights and tokenizer are read from
    it. Two rollouts of two groups, as few denoising steps as the method allows, a checkpoint after
    each; on the CPU if the device is not there. All other settings stay.

    Raises:
        ValueError: the run does not start from a pretrained language model.
    """
    task, base = run.task, run.base
    if not (
        isinstance(base, Pretrained)
        and isinstance(task, TextTask)
        and isinstance(task.tokenizer, PretrainedTokenizer)
    ):
        raise ValueError(
            f"--dry-run replaces pretrained weights, but this run starts from a "
            f"{type(base).__name__}; run it as it is, it is small"
        )
    if (folder / "config.json").exists():
        family = read_layout(str(folder)).family
        if family != base.miniature:
            raise ValueError(
                f"{folder} holds a miniature of {family}, and this recipe wants one of "
                f"{base.miniature}; delete it, or choose another --out"
            )
    else:
        problems = task.problems("train")[:TEXTS]
        texts = [f"{problem.question}\n{problem.gold}" for problem in problems]
        write_miniature(folder, base.miniature, seed=run.seed, texts=texts, window=task.length)
    tokenizer = dataclasses.replace(task.tokenizer, path=str(folder))
    cuda = torch.cuda.is_available() or not run.device.startswith("cuda")
    return dataclasses.replace(
        run,
        task=dataclasses.replace(task, tokenizer=tokenizer),
        base=dataclasses.replace(base, weights=None, quantize=base.quantize if cuda else None),
        decoder=_few_steps(run),
        steps=2,
        batch_size=math.lcm(2 * run.group_size, run.optim.mini_batches)
        * int(os.environ.get("WORLD_SIZE", "1")),
        evaluate=dataclasses.replace(run.evaluate, every=1, n=4, n_test=4),
        save_every=1,
        device=run.device if cuda else "cpu",
    )


def _few_steps(run: Run) -> Decoder:
    """The decoder of a run with the fewest steps, at least two per block, that its method takes."""
    decoder, names = run.decoder, tuple(run.task.reward.functions)
    for per_block in range(2, decoder.steps_per_block):
        shorter = dataclasses.replace(decoder, steps=per_block * decoder.blocks)
        try:
            run.algorithm.check(shorter, run.group_size, names)
        except ValueError:
            continue
        return shorter
    return decoder
