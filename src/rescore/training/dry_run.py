"""A run of a large model at tiny size: random weights, two updates, everything else the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import torch

from rescore.models.miniature import write_tiny_classifier
from rescore.sampling.decoder import Decoding
from rescore.tasks.reward_models import Conversations
from rescore.training.pretrained import Published
from rescore.training.run import Run

REQUESTS = ("Tell me about", "Write a poem about", "What is good about", "How do I draw")
THINGS = ("a horse", "the sea", "rain", "bread", "a small town", "snow", "the moon", "an old car")


def dry_run(run: Run, folder: Path) -> Run:
    """The same run on a miniature of its model, short enough to try on a laptop.

    A checkpoint of random weights in the original's layout, with a tokenizer of the original's
    class, is written into ``folder`` (unless it is there), and weights and tokenizer are read from
    it; so are the prompts and the reward model of ``Conversations``. Images are as small as the
    miniature makes them. Two rollouts of two groups, beside those that serve a critic alone, as few
    denoising steps as the method allows, a checkpoint after each; on the CPU if the device is not
    there. All other settings stay.

    Raises:
        ValueError: the run does not start from a pretrained model.
    """
    task, base = run.task, run.base
    if not isinstance(base, Published):
        raise ValueError(
            f"--dry-run replaces pretrained weights, but this run starts from a "
            f"{type(base).__name__}; run it as it is, it is small"
        )
    cuda = torch.cuda.is_available() or not run.device.startswith("cuda")
    device = run.device if cuda else "cpu"
    if isinstance(task, Conversations):
        task = _small_talk(task, folder, seed=run.seed, device=device)
    base, task = base.in_miniature(task, folder, seed=run.seed, device=device)
    return dataclasses.replace(
        run,
        task=task,
        base=base,
        decoder=_few_steps(run),
        steps=run.algorithm.warm_up + 2,
        batch_size=math.lcm(2 * run.group_size, run.optim.mini_batches)
        * int(os.environ.get("WORLD_SIZE", "1")),
        evaluate=dataclasses.replace(run.evaluate, every=1, n=4, n_test=4),
        save_every=1,
        device=device,
    )


def _small_talk(task: Conversations, folder: Path, *, seed: int, device: str) -> Conversations:
    """The task with prompts made here and a reward model of random weights, both in the folder."""
    source, reward_model = folder / "prompts.jsonl", folder / "reward-model"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts = [" ".join(words) for words in itertools.product(REQUESTS, THINGS)]
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        write_tiny_classifier(reward_model, seed=seed, texts=prompts)
    return dataclasses.replace(
        task, source=str(source), reward_model=str(reward_model), reward_device=device
    )


def _few_steps(run: Run) -> Decoding:
    """The decoder of a run with the fewest steps, at least two per block, that its method takes."""
    names = tuple(run.task.reward.functions)
    for shorter in run.decoder.shorter():
        try:
            run.algorithm.check(shorter, run.group_size, names)
        except ValueError:
            continue
        return shorter
    return run.decoder
