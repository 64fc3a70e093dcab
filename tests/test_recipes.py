"""Every recipe runs: shrunken to seconds, from pre-training to the report.

Those of large models have their own flag for it; see training/test_dry_run.py.
"""

import dataclasses
from typing import Any

import pytest

from rescore.algorithms.base import Algorithm
from rescore.algorithms.sepo import Sepo
from rescore.models.dna import ConvConfig
from rescore.models.unet import UNetConfig
from rescore.sampling.decoder import Decoding, RateDecoder
from rescore.tasks.countdown import Countdown
from rescore.tasks.digits import Digits
from rescore.tasks.dna import Dna
from rescore.tasks.dna_sequences import Grammar
from rescore.tasks.replies import Replies
from rescore.tasks.sudoku import Sudoku
from rescore.training.directory import Origin
from rescore.training.log import read
from rescore.training.pretrain import Pretrain
from rescore.training.recipes import recipes, run_of
from rescore.training.session import start

pytestmark = pytest.mark.usefixtures("undrawn")

SHAPES: dict[type, dict[str, Any]] = {
    ConvConfig: {"width": 4, "dilations": (1, 4)},
    UNetConfig: {"widths": (8, 8)},
}
DATA: dict[type, dict[str, Any]] = {
    Sudoku: {"pool": 64, "validation_pool": 32, "test_pool": 32},
    Countdown: {"pool": 64},
    Dna: {"library": Grammar(sequences=400)},
    Replies: {"pairs": 32, "clean_pool": 64},
    Digits: {"pool": 64},
}
"""Less of everything."""
SMALL = [name for name in sorted(recipes()) if isinstance(run_of(name).base, Pretrain)]


def short(decoder: Decoding) -> Decoding:
    """As few steps as there may be in continuous time; those of the other recipes are few."""
    return next(decoder.shorter()) if isinstance(decoder, RateDecoder) else decoder


def small_algorithm(algorithm: Algorithm) -> Algorithm:
    """Two steps are all there are for a path KL."""
    if isinstance(algorithm, Sepo):
        return dataclasses.replace(algorithm, kl_steps=1)
    return algorithm


@pytest.mark.parametrize("name", SMALL)
def test_a_shrunken_recipe_trains_and_reports(name, tmp_path, monkeypatch):
    """Two rollouts of the recipe's own algorithm, adapters, average and optimiser."""
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "cache"))
    run = run_of(name)
    assert isinstance(run.base, Pretrain)
    shape = SHAPES.get(type(run.base.model), {"width": 16, "depth": 1, "heads": 2})
    model = dataclasses.replace(run.base.model, **shape)
    run = dataclasses.replace(
        run,
        base=dataclasses.replace(run.base, model=model, steps=2, batch=8, validation_rows=8),
        task=dataclasses.replace(run.task, **DATA[type(run.task)]),
        decoder=next(run.decoder.shorter())
        if isinstance(run.decoder, RateDecoder)
        else run.decoder,
        steps=2,
        algorithm=small_algorithm(run.algorithm),
        batch_size=2 * run.group_size * run.optim.mini_batches,
        evaluate=dataclasses.replace(run.evaluate, every=1, n=16, n_test=16),
    )
    out = tmp_path / "run"
    report = start(run, Origin(recipe=name, arguments=()), out, resume=False)
    assert report.stat().st_size > 10_000
    rows = read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert ("kl_new_ref" in rows[-1]) == run.algorithm.uses_reference
    assert (out / "result.json").exists()
