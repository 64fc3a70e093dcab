"""A tiny SEDD checkpoint of random weights, laid out like the published ones: for tests, offline.

write_tiny_sedd("sedd-tiny", vocab_size=300, length=64, seed=0)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rescore.models.importers import GRAPHS, INV_FREQ
from rescore.models.sedd import Sedd, SeddConfig

WIDTH, DEPTH, HEADS, COND_WIDTH = 32, 2, 2, 16


def write_tiny_sedd(
    folder: str | Path,
    *,
    vocab_size: int,
    length: int,
    seed: int,
    graph: str = "absorb",
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` as in louaaron/sedd-small.

    Every weight is random, also those that start at zero in training, so that the noise and all
    layers count.

    Args:
        folder: where to; made if it is not there.
        vocab_size: ordinary tokens.
        length: the longest canvas.
        seed: of the weights.
        graph: ``absorb`` or ``uniform``.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokens": vocab_size,
        "graph": {"type": graph, "file": "data", "report_all": False},
        "noise": {"type": "loglinear", "sigma_min": 0.0001, "sigma_max": 20},
        "model": {
            "name": "tiny",
            "type": "ddit",
            "hidden_size": WIDTH,
            "cond_dim": COND_WIDTH,
            "length": length,
            "n_blocks": DEPTH,
            "n_heads": HEADS,
            "scale_by_sigma": graph == "absorb",
            "dropout": 0.1,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shape = SeddConfig(
        vocab_size=vocab_size,
        length=length,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        cond_width=COND_WIDTH,
        process=GRAPHS[graph],
    )
    generator = torch.Generator().manual_seed(seed)
    state = {INV_FREQ: 10000.0 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))}
    for name, parameter in Sedd(shape, generator=None).named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 0.1 * value + (1.0 if "norm" in name else 0.0)
        else:
            value = value * parameter.shape[1] ** -0.5
        state[name] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
