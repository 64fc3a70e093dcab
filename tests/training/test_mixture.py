"""The base of a mixture, and its recipes from the first rollout to the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gaussians
from rescore.models.mixture import MixtureNetwork
from rescore.tasks.mixture import THREE_MODES
from rescore.training.directory import Origin
from rescore.training.mixture import MixtureBase
from rescore.training.run import Evaluate
from rescore.training.session import start
from rescore_recipes.mixture import gaussian_score_as_action, mixture_score_as_action


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("recipe", [mixture_score_as_action, gaussian_score_as_action])
def test_a_shrunken_recipe_trains_and_reports(recipe, tmp_path):
    """Three rollouts, the first for the critic alone; the base is exact, the best is kept."""
    run = replace(
        recipe(),
        steps=3,
        batch_size=32,
        decoder=replace(recipe().decoder, steps=3),
        evaluate=Evaluate(every=1, n=16, n_test=16),
        save_every=1,
    )
    start(run, Origin(recipe="shrunken", arguments=()), tmp_path / "run", resume=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[1])["kl_new_ref"] == 0
    assert json.loads(lines[2])["kl_new_ref"] > 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["label"] for row in result["rows"]] == ["base", "after RL (shrunken)"]


def test_a_base_draws_its_weights_from_the_seed(tmp_path):
    """The same for the same seed, others for others; the output is exact for all."""

    def built(seed: int) -> MixtureNetwork:
        module = MixtureBase(width=8).build(
            THREE_MODES, seed=seed, cache=Path(tmp_path), device="cpu", note=lambda line: None
        )
        assert isinstance(module, MixtureNetwork)
        return module

    one, again, other = built(3), built(3), built(4)
    assert torch.equal(one.hidden.weight, again.hidden.weight)
    assert not torch.equal(one.hidden.weight, other.hidden.weight)
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.4)
    torch.testing.assert_close(one.predict(x, t, {}), THREE_MODES.mixture.score(one.schedule, x, t))


def test_a_base_of_another_task_is_refused():
    """Whose score is not known."""
    with pytest.raises(ValueError, match="the task is a GaussianTask"):
        MixtureBase().check(gaussians.GaussianTask(), "cpu")
