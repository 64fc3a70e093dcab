"""Fine-tuned language models on disk: adapters in peft's format, merged weights in the original's.

Both are folders, written aside and renamed when complete, so they are there whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rescore.models.finetune import Lora, add_lora, has_adapters
from rescore.models.language import LanguageModel, require

ADAPTER = "adapter_model.safetensors"
PEFT = "base_model.model."
"""What peft puts before the names of a network's modules."""


def save_adapter(module: LanguageModel, lora: Lora, folder: str | Path, base: str) -> None:
    """Write the adapters so that ``PeftModel.from_pretrained(network, folder)`` loads them.

    Here ``network`` is the native class of transformers: names are Llama's for LLaDA.

    Args:
        module: a model to which ``add_lora`` was applied.
        lora: with what.
        folder: a new folder.
        base: folder or name of the base model, for the record.

    Raises:
        ValueError: the folder exists, or the module has no adapters.
    """
    if not has_adapters(module):
        raise ValueError(
            "this model has no adapters to save; add them with add_lora, or save_merged"
        )
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted(lora.targets),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors = {name: p.detach().cpu().contiguous() for name, p in _adapters(module).items()}
    with new_folder(folder) as aside:
        config.save_pretrained(str(aside))
        save_file(tensors, aside / ADAPTER, metadata={"format": "pt"})


def load_adapter(module: LanguageModel, folder: str | Path) -> Lora:
    """Add the adapters in a folder to a plain model, in place.

    Adapters trained on LLaDA's own modules load too: names of either layout are understood.

    Args:
        module: a model without adapters.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The rank, scale and targets of the adapters.

    Raises:
        ValueError: a file or peft is missing, a file is damaged, the adapters belong to another
            base or are of a kind that ``add_lora`` does not make, or the module has adapters.
    """
    if has_adapters(module):
        raise ValueError("this model has adapters already; load the saved ones into a plain model")
    require("peft", "an adapter", "language")
    tensors, lora = _read_adapter(Path(folder), module)
    expected = _expected_shapes(module, lora)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(n for n in expected | found if expected.get(n) != found.get(n))
    if odd:
        raise ValueError(
            f"the adapter in {folder} belongs to another base: '{odd[0]}' has shape "
            f"{found.get(odd[0], 'none')} in the file and {expected.get(odd[0], 'none')} in this "
            f"model"
        )
    add_lora(module, lora, generator=torch.Generator())
    with torch.no_grad():
        for name, parameter in _adapters(module).items():
            parameter.copy_(tensors[name])
    return lora


def save_merged(module: LanguageModel, folder: str | Path, source: str) -> None:
    r"""Write the weights with $\frac{\alpha}{r} B A$ added, in the original checkpoint's layout.

    Config and tokenizer files are copied from the source, so the folder can take its place. The
    merged weights are gathered in CPU memory before they are written.

    Args:
        module: a model, with adapters or without.
        folder: a new folder.
        source: folder or name of the base model.

    Raises:
        ValueError: the folder exists, the source cannot be read, or the weights are quantised.
    """
    from huggingface_hub import save_torch_state_dict

    with new_folder(folder) as aside:
        for file in _other_files(source):
            shutil.copyfile(file, aside / file.name)
        save_torch_state_dict(merged_state(module), aside)


@torch.no_grad()
def merged_state(module: LanguageModel) -> dict[str, Tensor]:
    """Every weight once, by its original name, on the CPU, the adapters added in.

    Raises:
        ValueError: the weights are quantised.
    """
    state: dict[str, Tensor] = {}
    for name, weight in module.network.named_parameters():  # a tied weight comes once
        if ".lora_" in name:
            continue
        if not weight.is_floating_point():
            raise ValueError(
                f"'{name}' is quantised, so nothing exact can be merged into it; load the base "
                f"without quantize, load_adapter, then save_merged"
            )
        owner = name.removesuffix(".base_layer.weight")
        if owner != name:
            from peft.tuners.lora import Linear

            layer = module.network.get_submodule(owner)
            assert isinstance(layer, Linear)
            exact = torch.promote_types(weight.dtype, torch.float32)
            delta = layer.get_delta_weight("default")
            weight = (weight.to(exact) + delta.to(exact)).to(weight.dtype)
        plain = name.replace(".base_layer.", ".")
        state[module.layout.to_original(plain)] = weight.detach().cpu()
    return state


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the given name when the block ends without an error.

    Raises:
        ValueError: the name is taken.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        whole = Path(aside) / "whole"
        whole.mkdir()
        yield whole
        os.replace(whole, folder)


def _adapters(module: LanguageModel) -> dict[str, nn.Parameter]:
    """The parameters of the adapters, by the names that peft gives them in files."""
    return {
        PEFT + name.replace(".default.", "."): parameter
        for name, parameter in module.network.named_parameters()
        if ".lora_" in name
    }


def _expected_shapes(module: LanguageModel, lora: Lora) -> dict[str, tuple[int, int]]:
    """Shapes of the adapters that ``add_lora`` would give the model, by their names in files."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in module.network.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in lora.targets:
            shapes[f"{PEFT}{name}.lora_A.weight"] = (lora.rank, layer.in_features)
            shapes[f"{PEFT}{name}.lora_B.weight"] = (layer.out_features, lora.rank)
    return shapes


def _read_adapter(folder: Path, module: LanguageModel) -> tuple[dict[str, Tensor], Lora]:
    """Tensors by native name, and what they are."""
    missing = [n for n in ("adapter_config.json", ADAPTER) if not (folder / n).exists()]
    if missing:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}; expected a LoRA adapter")
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
        saved = load_file(folder / ADAPTER)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} is damaged: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter in {folder} is of type {config.peft_type}; expected LORA")
    for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if getattr(config, name):
            raise ValueError(f"the adapter in {folder} uses {name}, which is not supported here")
    tensors = {
        PEFT + module.layout.to_native(name.removeprefix(PEFT)): tensor
        for name, tensor in saved.items()
    }
    layers = (name.removesuffix(".weight").rpartition(".")[0] for name in tensors)
    targets = sorted({layer.rpartition(".")[2] for layer in layers})
    return tensors, Lora(rank=config.r, alpha=config.lora_alpha, targets=tuple(targets))


def _other_files(source: str) -> list[Path]:
    """The files of a checkpoint that are not weights; from the hub they are fetched."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        weights = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]
        try:
            folder = Path(snapshot_download(source, ignore_patterns=weights))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"'{source}' is neither a folder here nor a repository that the hub gives out "
                f"({type(error).__name__}); its config and tokenizer are needed"
            ) from error
    kinds = {".json", ".txt", ".jinja", ".model", ".py"}
    files = [f for f in folder.iterdir() if f.suffix in kinds and ".index" not in f.name]
    if not any(file.name == "config.json" for file in files):
        raise ValueError(f"{source} has no config.json; expected the folder of the base model")
    return sorted(files)
