"""Text-to-image pipelines that somebody else trained: SD 1.5, SDXL, SD3 and Flux."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rescore.models.finetune import Lora
from rescore.models.images import (
    PIPELINES,
    ImageNetwork,
    Kind,
    load_image_network,
    schedule_of,
)
from rescore.models.language import Dtype, require
from rescore.models.language_files import new_folder
from rescore.models.miniature_images import CHANNELS, SIDE, write_tiny_pipeline
from rescore.tasks.image_prompts import ImagePrompts
from rescore.tasks.task import Task
from rescore.training.pretrained import Published

INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class PretrainedPipeline(Published):
    """A pipeline of diffusers, from a folder or the hub; no code of the checkpoint runs."""

    kind: Kind
    """Family of the pipeline; a checkpoint of another one is refused."""
    weights: str
    """Folder with ``model_index.json`` and safetensors, or name of a repository on the hub."""
    guidance: float
    """Scale w of classifier-free guidance, u + w (c - u), in sampling and training; 1 turns it off.
    Above 1 it doubles the cost of every prediction. Flux dev is told w instead, also 1."""
    dtype: Dtype = "bfloat16"
    """Of the frozen weights and the text encoders; adapters and the VAE are float32."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them."""
    text_device: str | None = None
    """Where the text encoders are, if not beside the network: ``cpu`` saves their memory. Every
    prompt is encoded once."""
    text_tokens: int | None = None
    """Positions of the text of SD3's and Flux's T5 encoder; None = 256 and 512, as in diffusers."""
    variant: str | None = None
    """Of the files of weights, such as ``fp16``; every text encoder must have one."""

    def __post_init__(self) -> None:
        if not 1 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be finite and at least 1, got {self.guidance}")

    def check(self, task: Task, device: str) -> None:
        """Refuse a missing package, a missing checkpoint, and one for another task.

        Only its configuration is read.

        Raises:
            ValueError: says what is missing or does not fit, and what to do.
        """
        if not isinstance(task, ImagePrompts):
            raise ValueError(
                f"a {type(self).__name__} makes images from texts, which a {type(task).__name__} "
                f"does not ask for; use ImagePrompts"
            )
        require("diffusers", "text-to-image models", "images")
        require("transformers", "text-to-image models", "images")
        name = self._config(INDEX).get("_class_name")
        if name != PIPELINES[self.kind]:
            raise ValueError(
                f"{self.weights} is a {name}, and this run expects a {PIPELINES[self.kind]}; give "
                f"other weights, or set base.kind"
            )
        schedule_of(self._config("scheduler/scheduler_config.json"))
        self._check_network(task)
        if self.text_device is not None:
            try:
                torch.device(self.text_device)
            except RuntimeError as error:
                raise ValueError(
                    f"base.text_device='{self.text_device}' is no device; expected one such as "
                    f"'cpu' or 'cuda:1', or none"
                ) from error

    def check_training(self, *, adapters: bool, precision: str) -> None:
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
    ) -> ImageNetwork:
        assert isinstance(task, ImagePrompts)
        note(f"loading {self.weights}")
        return load_image_network(
            self.kind,
            self.weights,
            shape=task.latents,
            text=task.text,
            guidance=self.guidance,
            dtype=self.dtype,
            device=device,
            text_device=self.text_device,
            text_tokens=self.text_tokens,
            variant=self.variant,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def in_miniature(
        self, task: Task, folder: Path, *, seed: int, device: str
    ) -> tuple[PretrainedPipeline, ImagePrompts]:
        """See ``Published``; the latents are 8 x 8, the texts of T5 short."""
        if not isinstance(task, ImagePrompts):
            raise ValueError(f"a {type(task).__name__} has no prompts for a text-to-image model")
        small = dataclasses.replace(self, weights=str(folder), variant=None, text_device=None)
        if self.text_tokens is None and self.kind in ("sd3", "flux"):
            small = dataclasses.replace(small, text_tokens=16)
        if not (folder / INDEX).exists():
            write_tiny_pipeline(folder, self.kind, seed=seed, texts=task.texts)
        elif small._config(INDEX)["_class_name"] != PIPELINES[self.kind]:
            raise ValueError(
                f"{folder} holds a miniature of another pipeline than {PIPELINES[self.kind]}; "
                f"delete it, or choose another --out"
            )
        return small, dataclasses.replace(task, latents=(CHANNELS[self.kind], SIDE, SIDE))

    def export(self, module: nn.Module, folder: Path, task: Task, adapters: Lora | None) -> None:
        """See ``Published``: ``pipe.load_lora_weights(folder)`` reads adapters.

        Its readers take alpha for the rank, so alpha / rank is put into B. Without adapters the
        folder is a whole pipeline.
        """
        assert isinstance(module, ImageNetwork)
        with new_folder(folder) as aside:
            if adapters is None:
                merge_adapters(module.network)
                module.pipeline.save_pretrained(aside)
                return
            part = "unet" if self.kind in ("sd15", "sdxl") else "transformer"
            state = adapter_state(module.network, adapters)
            module.pipeline.save_lora_weights(aside, **{f"{part}_lora_layers": state})

    def _check_network(self, task: ImagePrompts) -> None:
        """Refuse latents that the denoising network does not take."""
        channels, *sides = task.latents
        if self.kind in ("sd15", "sdxl"):
            config = self._config("unet/config.json")
            multiple = 2 ** (len(config["block_out_channels"]) - 1)
            expected = config["in_channels"]
            if config.get("time_cond_proj_dim") is not None:
                raise ValueError(
                    f"{self.weights} is distilled to few steps (its UNet is told the guidance), "
                    f"which the steps of no decoder here replay; use the model it was made from"
                )
        else:
            config = self._config("transformer/config.json")
            multiple = 2 if self.kind == "flux" else config["patch_size"]
            expected = config["in_channels"] // 4 if self.kind == "flux" else config["in_channels"]
            most = config.get("pos_embed_max_size")
            if most is not None and max(sides) > most * multiple:
                raise ValueError(
                    f"task.latents={task.latents}, but {self.weights} takes at most "
                    f"{most * multiple} rows and columns"
                )
        if channels != expected or any(side % multiple for side in sides):
            raise ValueError(
                f"task.latents={task.latents}, but {self.weights} takes {expected} channels, and "
                f"rows and columns in multiples of {multiple}"
            )

    def _config(self, file: str) -> dict[str, Any]:
        """The content of a JSON file of the checkpoint; from the hub that file is fetched."""
        folder = Path(self.weights)
        if folder.is_dir():
            path = folder / file
            if not path.is_file():
                raise ValueError(
                    f"{self.weights} is not a complete pipeline: it has no {file}; expected the "
                    f"layout of diffusers, {INDEX} and a folder for each component"
                )
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.weights):
            path = _fetched(self.weights, file)
        else:
            raise ValueError(
                f"there is no folder {self.weights}; expected one with {INDEX}, or the name of a "
                f"repository on the hub such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'"
            )
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); copy the checkpoint again") from error


def adapter_state(network: nn.Module, lora: Lora) -> dict[str, Tensor]:
    """The adapters by the names of peft, on the CPU, the scale alpha / rank put into B."""
    state = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            scale = lora.alpha / lora.rank if ".lora_B." in name else 1.0
            tensor = (parameter.detach() * scale).cpu().contiguous()
            state[name.replace(".default.", ".")] = tensor
    return state


def merge_adapters(network: nn.Module) -> None:
    """Add adapters into the weights and take them away, in place; none is fine."""
    from peft.tuners.lora import Linear

    for name, layer in list(network.named_modules()):
        if isinstance(layer, Linear):
            layer.merge()
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, layer.get_base_layer())


def _fetched(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, EntryNotFoundError) as error:
        raise ValueError(
            f"'{name}' is no folder here and its {file} cannot be had from the hub "
            f"({type(error).__name__}); check the name and the connection, accept the model's "
            f"licence on its page if it has one, or give the folder of a downloaded copy"
        ) from error
