"""Out of a run directory, into a format that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rescore.training.pretrained import Published
from rescore.training.run import Run
from rescore.training.session import Loading, best_world


@dataclass(frozen=True, kw_only=True)
class Export(Loading):
    """What to write of the best checkpoint of a run."""

    out: Path = Path("export")
    """A new folder."""
    merged: bool = False
    """All weights in the layout of the original checkpoint, instead of the adapters alone."""


def export_run(run: Run, directory: Path, options: Export) -> Path:
    """Write the best weights of a run on a pretrained model as a folder.

    Adapters are in peft's format: ``PeftModel.from_pretrained(network, folder)`` reads them; those
    of a text-to-image model in diffusers': ``pipe.load_lora_weights(folder)``. All weights together
    are in the layout of the original: ``load_language_model``, ``load_sedd`` and
    ``load_image_network`` read them.

    Raises:
        ValueError: the run is not of a pretrained model, there is nothing of the kind to write, or
            the folder exists.
    """
    if not isinstance(run.base, Published):
        raise ValueError(
            f"{directory} did not start from a pretrained model; its weights are the "
            f"safetensors in {directory / 'checkpoints'}"
        )
    if run.lora is None and not options.merged:
        raise ValueError(f"{directory} trained all weights, not adapters; export it with --merged")
    world = best_world(run, directory, options, run.decoder)
    adapters = None if options.merged else run.lora
    run.base.export(world.module, options.out, run.task, adapters)
    return options.out
