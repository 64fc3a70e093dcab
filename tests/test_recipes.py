"""Every recipe runs: shrunken to seconds, from pre-training to the report.

Those of large models have their own flag for it; see training/test_dry_run.py.
"""

import dataclasses

import pytest

from rescore.models.transformer import TransformerConfig
from rescore.tasks.countdown import Countdown
from rescore.tasks.sudoku import Sudoku
from rescore.training.directory import Origin
from rescore.training.log import read
from rescore.training.pretrain import Pretrain
from rescore.training.recipes import recipes, run_of
from rescore.training.session import start

SMALL = [name for name in sorted(recipes()) if isinstance(run_of(name).base, Pretrain)]


@pytest.mark.parametrize("name", SMALL)
def test_a_shrunken_recipe_trains_and_reports(name, tmp_path, monkeypatch):
    """Two rollouts of the recipe's own algorithm, adapters, average and optimiser."""
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "cache"))
    run = run_of(name)
    assert isinstance(run.task, Sudoku | Countdown)
    assert isinstance(run.base, Pretrain)
    shape = TransformerConfig(
        vocab_size=run.task.vocab_size, length=run.task.length, width=16, depth=1, heads=2
    )
    run = dataclasses.replace(
        run,
        base=dataclasses.replace(run.base, model=shape, steps=2),
        task=dataclasses.replace(run.task, pool=64),
        steps=2,
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
