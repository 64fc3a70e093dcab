"""Safetensors from a pickled checkpoint, without running what the pickle asks for.

    python -m rescore.models.convert_checkpoint pretrained.ckpt pretrained.safetensors

The file is read by ``torch.load(weights_only=True)``, PyTorch's restricted unpickler: it knows
tensors and containers only. A Lightning checkpoint also holds objects of its program (its
configuration, say), whose classes that unpickler refuses; here each stands for an inert class of
the same name, so nothing of theirs is imported or called. All the same, convert files of sources
you trust.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

STATES = ("state_dict", "model")
"""Where Lightning and SEDD's training keep the weights; otherwise the file is the weights."""


class Inert:
    """Stands for an object that is not read: it takes any arguments and any state, and is empty."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def convert_checkpoint(source: str | Path, target: str | Path) -> int:
    """Write the tensors of a pickled checkpoint as safetensors.

    Of a Lightning checkpoint these are the weights in ``state_dict``, not a moving average that
    may lie beside them.

    Args:
        source: a file written by ``torch.save``.
        target: a new file that ends in ``.safetensors``.

    Returns:
        The number of tensors.

    Raises:
        ValueError: the source cannot be read or holds no tensors, or the target exists.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"{target} must be a new file that ends in .safetensors")
    if not source.is_file():
        raise ValueError(f"there is no file {source}")
    content = _load(source)
    for name in STATES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        tensors = {
            str(name): value.detach().clone().contiguous()
            for name, value in content.items()
            if isinstance(value, Tensor)
        }
    if not tensors:
        raise ValueError(f"{source} holds no tensors by name, under {STATES} or at the top")
    save_file(tensors, target, metadata={"format": "pt"})
    return len(tensors)


def _load(source: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
        inert = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(inert):  # pyright: ignore[reportArgumentType]
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be read as a checkpoint of weights ({type(error).__name__}: {error})"
        ) from error


def main() -> None:
    """Convert the file named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rescore.models.convert_checkpoint",
        description="Write the tensors of a pickled checkpoint as safetensors.",
    )
    parser.add_argument("source", help="a file written by torch.save: .ckpt, .pt, .pth or .bin")
    parser.add_argument("target", help="a new file that ends in .safetensors")
    arguments = parser.parse_args()
    try:
        n_tensors = convert_checkpoint(arguments.source, arguments.target)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{arguments.target}: {n_tensors} tensors")


if __name__ == "__main__":
    main()
