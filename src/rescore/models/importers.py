"""Published checkpoints of SEDD, MDLM and DRAKES as networks of this library.

Only safetensors are read. A pickle (``.ckpt``, ``.pth``, ``.bin``) could run code when it is
opened, so it is refused; ``python -m rescore.models.convert_checkpoint`` makes safetensors of it.

    network = load_sedd("sedd-medium")          # a folder with config.json and model.safetensors
    network = load_drakes("pretrained.safetensors")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rescore.models.dna import ConvConfig, ConvDenoiser
from rescore.models.mdlm import Mdlm, MdlmConfig
from rescore.models.sedd import Sedd, SeddConfig

M = TypeVar("M", bound=nn.Module)

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that are pickles."""

PREFIX = "backbone."
"""What Lightning and the published MDLM put before the names of the network's weights."""

INV_FREQ = "rotary_emb.inv_freq"
"""A constant that the published transformers store with their weights."""

GRAPHS: dict[str, Literal["absorbing", "uniform"]] = {"absorb": "absorbing", "uniform": "uniform"}
"""SEDD's names of the processes."""

DRAKES_DILATIONS = (1, 1, 4, 16, 64)
"""Dilations of the published model, which its file does not say."""


def load_sedd(source: str | Path) -> Sedd:
    """A SEDD in the layout of louaaron/sedd-small and sedd-medium.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors`` (or shards with their
            index), such a safetensors file, or the name of a repository on the hub.

    Returns:
        The network, on the CPU, in float32 or better.

    Raises:
        ValueError: the files are missing, damaged, pickled, or of another layout.
    """
    tensors, config = read_checkpoint(source)
    config = config.get("config", config)  # newer versions of the hub's mixin nest it
    graph = str(_field(config, "graph.type", source))
    if graph not in GRAPHS:
        raise ValueError(f"{source} has graph.type '{graph}'; expected one of {sorted(GRAPHS)}")
    shape = SeddConfig(
        vocab_size=_field(config, "tokens", source),
        length=_field(config, "model.length", source),
        width=_field(config, "model.hidden_size", source),
        depth=_field(config, "model.n_blocks", source),
        heads=_field(config, "model.n_heads", source),
        cond_width=_field(config, "model.cond_dim", source),
        process=GRAPHS[graph],
        scale_by_sigma=_field(config, "model.scale_by_sigma", source),
    )
    network = Sedd(shape, generator=None)
    return _filled(network, tensors, network.head_width, source)


def load_mdlm(source: str | Path) -> Mdlm:
    """An MDLM without time conditioning in the layout of kuleshov-group/mdlm-owt.

    The mask is the last of the file's ``vocab_size`` tokens, as there.

    Args:
        source: see ``load_sedd``.

    Raises:
        ValueError: see ``load_sedd``; or the model is told the time.
    """
    tensors, config = read_checkpoint(source)
    if config.get("time_conditioning", False):
        raise ValueError(
            f"{source} has time_conditioning=true; only models that are not told the time are "
            f"denoisers here"
        )
    shape = MdlmConfig(
        vocab_size=_field(config, "vocab_size", source) - 1,
        length=_field(config, "model_length", source),
        width=_field(config, "hidden_dim", source),
        depth=_field(config, "n_blocks", source),
        heads=_field(config, "n_heads", source),
        cond_width=_field(config, "cond_dim", source),
    )
    network = Mdlm(shape, generator=None)
    return _filled(network, _backbone(tensors), network.head_width, source)


@torch.no_grad()
def load_drakes(source: str | Path, *, length: int = 200) -> ConvDenoiser:
    """The pretrained or fine-tuned DNA model of DRAKES, converted to safetensors.

    Its time layers, always told time 0, become the vectors ``shifts``, and the mask's column of
    the head, which SUBS sets to -inf, is dropped: predictions stay the same. Of a converted
    Lightning checkpoint only ``backbone.*`` is read.

    Args:
        source: the safetensors file.
        length: the longest canvas.

    Raises:
        ValueError: the file is missing, damaged, pickled, or of another layout.
    """
    file = Path(source)
    _refuse_pickle(file)
    if not file.is_file():
        raise ValueError(f"there is no file {file}; expected the converted DRAKES checkpoint")
    tensors = _backbone(_read(file))
    first = tensors.get("linear.weight")
    n_layers = sum(re.fullmatch(r"convs\.\d+\.weight", name) is not None for name in tensors)
    stacks, rest = divmod(n_layers, len(DRAKES_DILATIONS))
    if first is None or first.ndim != 3 or not stacks or rest:
        raise ValueError(
            f"{source} is not in the layout of DRAKES: expected 'linear.weight' of shape [width, "
            f"states, kernel] and a multiple of {len(DRAKES_DILATIONS)} layers 'convs.*', got "
            f"{'none' if first is None else tuple(first.shape)} and {n_layers}"
        )
    width, n_states, kernel = first.shape
    expected = _drakes_shapes(width, n_states, kernel, n_layers)
    _compare({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, source)
    tensors = {name: _exact(name, tensor, source) for name, tensor in tensors.items()}
    config = ConvConfig(
        vocab_size=n_states - 1,
        length=length,
        width=width,
        dilations=DRAKES_DILATIONS,
        stacks=stacks,
        kernel=kernel,
    )
    time_0 = torch.cat([torch.zeros(width // 2), torch.ones(width // 2)])  # sines and cosines of 0
    features = _linear(tensors, "time_embedder.1", time_0.double()).relu()
    state = {n: t for n, t in tensors.items() if not n.startswith(("time_", "final_conv.2."))}
    for layer in range(n_layers):
        shift = _linear(tensors, f"time_layers.{layer}.dense", features)
        state[f"shifts.{layer}"] = shift.to(tensors["linear.weight"].dtype)
    for part in ("weight", "bias"):
        state[f"final_conv.2.{part}"] = tensors[f"final_conv.2.{part}"][:-1].clone()
    network = ConvDenoiser(config, generator=None)
    network.load_state_dict(state, assign=True)
    return network


def read_checkpoint(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by name and the content of ``config.json``.

    Raises:
        ValueError: the files are missing, damaged or pickled.
    """
    place = Path(source)
    _refuse_pickle(place)
    if place.suffix == ".safetensors":
        files, folder = [place], place.parent
    else:
        folder = place if place.is_dir() else _from_hub(str(source))
        files = _weight_files(folder)
    for file in [folder / "config.json", *files]:
        if not file.is_file():
            raise ValueError(f"there is no file {file}; copy the whole checkpoint")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{folder / 'config.json'} is not JSON ({error}); copy the checkpoint again"
        ) from error
    return tensors, config


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [
            folder / n for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    file = folder / "model.safetensors"
    if not file.is_file():
        for pickled in sorted(p for p in folder.iterdir() if p.suffix in PICKLES):
            _refuse_pickle(pickled, target=file)
    return [file]


def _refuse_pickle(file: Path, target: Path | None = None) -> None:
    if file.suffix in PICKLES:
        target = target or file.with_suffix(".safetensors")
        raise ValueError(
            f"{file} is a pickle, which can run code when it is opened; convert it first:\n"
            f"python -m rescore.models.convert_checkpoint {file} {target}"
        )


def _from_hub(name: str) -> Path:
    """A folder with the json and safetensors files of a repository on the hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(
            f"there is no folder {name}; expected one with config.json and model.safetensors, or "
            f"the name of a repository on the hub such as 'louaaron/sedd-medium'"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError('downloads need: pip install "rescore[language]"') from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except OSError as error:
        raise ValueError(
            f"'{name}' is no folder here and cannot be had from the hub "
            f"({type(error).__name__}); check the name and the connection, or give the folder of a "
            f"downloaded copy"
        ) from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from error


def _field(config: Mapping[str, Any], path: str, source: str | Path) -> Any:
    """The entry of a nested mapping, parts of the path separated by dots."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"the config.json of {source} has no field '{path}'")
        value = value[part]
    return value


def _backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under ``backbone.`` without that prefix; all, if there are none."""
    inside = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    return inside or dict(tensors)


def _filled(network: M, tensors: dict[str, Tensor], head_width: int, source: str | Path) -> M:
    """A transformer with the file's weights, whose names it already bears."""
    stored = tensors.pop(INV_FREQ, None)
    if stored is not None:
        expected = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
        if stored.shape != expected.shape or not torch.allclose(
            stored.float(), expected, rtol=1e-4
        ):
            raise ValueError(f"{source} has rotary positions of another base than 10000")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    _compare({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, source)
    state = {name: _exact(name, tensor, source) for name, tensor in tensors.items()}
    network.load_state_dict(state, assign=True)
    return network


def _compare(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    source: str | Path,
) -> None:
    """Refuse weights that are missing, unknown or of another shape."""
    odd = [n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]
    if odd:
        raise ValueError(
            f"{source} is of another layout: '{odd[0]}' has shape {found.get(odd[0], 'none')}, "
            f"expected {expected.get(odd[0], 'none')}"
            + (f", and {len(odd) - 1} other weights differ" if len(odd) > 1 else "")
        )


def _exact(name: str, tensor: Tensor, source: str | Path) -> Tensor:
    """A weight in float32 or better."""
    if not tensor.is_floating_point():
        raise ValueError(f"'{name}' in {source} has dtype {tensor.dtype}; expected real numbers")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """W x + b in float64."""
    return F.linear(x, tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double())


def _drakes_shapes(
    width: int, n_states: int, kernel: int, n_layers: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in DRAKES' layout."""
    modules: dict[str, tuple[int, ...]] = {
        "linear": (width, n_states, kernel),
        "time_embedder.1": (width, width),
        "final_conv.0": (width, width, 1),
        "final_conv.2": (n_states, width, 1),
    }
    for layer in range(n_layers):
        modules[f"convs.{layer}"] = (width, width, kernel)
        modules[f"time_layers.{layer}.dense"] = (width, width)
        modules[f"norms.{layer}"] = (width,)
    return {
        "time_embedder.0.W": (width // 2,),
        **{f"{name}.weight": shape for name, shape in modules.items()},
        **{f"{name}.bias": shape[:1] for name, shape in modules.items()},
    }
