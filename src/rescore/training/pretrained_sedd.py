"""A base of concrete scores that somebody else trained: SEDD."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rescore.models.finetune import Lora
from rescore.models.importers import GRAPHS, INV_FREQ, load_sedd
from rescore.models.language_files import new_folder
from rescore.models.layouts import missing_files
from rescore.models.miniature import write_gpt2_tokenizer
from rescore.models.miniature_sedd import write_tiny_sedd
from rescore.models.sedd import Sedd
from rescore.tasks.task import Task, TokenTask
from rescore.tasks.text import TextTask
from rescore.training.pretrained import Published, checked_text_task, words_of


@dataclass(frozen=True, kw_only=True)
class PretrainedSedd(Published):
    """A SEDD in the layout of louaaron/sedd-medium, in float32; no code of the checkpoint runs."""

    weights: str
    """Folder with ``config.json`` and safetensors, or name of a repository on the hub."""
    process: Literal["absorbing", "uniform"] = "absorbing"
    """The forward process; a checkpoint of the other one is refused."""

    @property
    def uniform(self) -> bool:
        return self.process == "uniform"

    def check(self, task: Task, device: str) -> None:
        """Refuse a missing checkpoint, and one of another process, vocabulary or window.

        Only its config, and the task's tokenizer, are read.

        Raises:
            ValueError: says what is missing or does not fit, and what to do.
        """
        if not isinstance(task, TokenTask):
            raise ValueError(
                f"a {type(self).__name__} makes tokens, which {type(task).__name__} does not use"
            )
        process, n_tokens, window = self._described()
        if process != self.process:
            raise ValueError(
                f"{self.weights} is of the {process} process, and this run expects the "
                f"{self.process} one; give other weights, or set base.process and a mode of the "
                f"algorithm for it"
            )
        if task.mask_id != n_tokens or task.vocab_size > n_tokens:
            raise ValueError(
                f"{self.weights} has {n_tokens} tokens, the task {task.vocab_size}, and a mask at "
                f"{task.mask_id}; expected the mask after all tokens, at {n_tokens}: use the "
                f"tokenizer of the model, as an AppendedMask"
            )
        if task.length > window:
            raise ValueError(
                f"the task has {task.length} positions, {self.weights} takes at most {window}; "
                f"make prompt_length + completion_length smaller"
            )

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> Sedd:
        note(f"loading {self.weights}")
        return load_sedd(self.weights).to(device)

    def in_miniature(
        self, task: Task, folder: Path, *, seed: int, device: str
    ) -> tuple[PretrainedSedd, TextTask]:
        task, tokenizer = checked_text_task(task)
        small, words = dataclasses.replace(self, weights=str(folder)), folder / "tokenizer"
        if not (folder / "config.json").exists():
            vocab_size = write_gpt2_tokenizer(words, words_of(task))
            (graph,) = (name for name, process in GRAPHS.items() if process == self.process)
            write_tiny_sedd(
                folder, vocab_size=vocab_size, length=task.length, seed=seed, graph=graph
            )
        elif small._described()[0] != self.process:
            raise ValueError(
                f"{folder} holds a miniature of the other process, and this recipe wants the "
                f"{self.process} one; delete it, or choose another --out"
            )
        tokenizer = dataclasses.replace(tokenizer, path=str(words))
        return small, dataclasses.replace(task, tokenizer=tokenizer)

    def export(self, module: nn.Module, folder: Path, task: Task, adapters: Lora | None) -> None:
        if adapters is not None:
            raise ValueError(
                "adapters of a SEDD are in no format that other programs read; export all weights, "
                "the adapters added in, with --merged"
            )
        assert isinstance(module, Sedd)
        with new_folder(folder) as aside:
            (aside / "config.json").write_text(json.dumps(_config(self.weights), indent=1) + "\n")
            save_file(
                published_state(module), aside / "model.safetensors", metadata={"format": "pt"}
            )

    def _described(self) -> tuple[str, int, int]:
        """Process, ordinary tokens and longest canvas, as the ``config.json`` says.

        Raises:
            ValueError: there is no complete checkpoint, or its config is of another layout.
        """
        config = _config(self.weights)
        config = config.get("config", config)  # newer versions of the hub's mixin nest it
        try:
            graph, n_tokens = config["graph"]["type"], config["tokens"]
            window = config["model"]["length"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.weights} is no SEDD: its config.json lacks 'graph.type', 'tokens' or "
                f"'model.length'"
            ) from error
        if graph not in GRAPHS:
            raise ValueError(
                f"{self.weights} has graph.type '{graph}'; expected one of {sorted(GRAPHS)}"
            )
        return GRAPHS[graph], n_tokens, window


def published_state(module: Sedd) -> dict[str, Tensor]:
    """Every weight by its name in the published layout, on the CPU.

    Adapters are added into the weights, in place.
    """
    if any(".lora_" in name for name, _ in module.named_parameters()):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
    width = module.head_width
    return {
        INV_FREQ: 10000.0 ** (-torch.arange(0, width, 2) / width),
        **{
            name.replace(".base_layer.", "."): weight.cpu().contiguous()
            for name, weight in module.state_dict().items()
            if ".lora_" not in name
        },
    }


def _config(weights: str) -> dict[str, Any]:
    """The content of ``config.json``; on the hub that file is fetched."""
    folder = Path(weights)
    if folder.is_dir():
        missing = missing_files(folder)
        if missing:
            raise ValueError(
                f"{weights} is not a complete checkpoint: it has no {', '.join(missing)}; expected "
                f"are config.json and model.safetensors"
            )
        file = folder / "config.json"
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights):
        file = _fetched(weights)
    else:
        raise ValueError(
            f"there is no folder {weights}; expected one with config.json and model.safetensors, "
            f"or the name of a repository on the hub such as 'louaaron/sedd-medium'"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the checkpoint again") from error


def _fetched(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ValueError('downloads need: pip install "rescore[language]"') from error
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, EntryNotFoundError) as error:
        raise ValueError(
            f"'{name}' is no folder here and its config.json cannot be had from the hub "
            f"({type(error).__name__}); check the name and the connection, or give the folder of a "
            f"downloaded copy"
        ) from error
