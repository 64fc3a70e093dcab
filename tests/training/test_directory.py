"""The run directory: enough to build the run again, refused to any other run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from rescore.algorithms.egspo import Egspo
from rescore.models.finetune import Lora
from rescore.training.directory import (
    Origin,
    check_same,
    default_cache,
    describe_directory,
    environment,
    read_run,
)
from rescore.training.optim import Optim
from rescore.training.run import Evaluate, describe
from tiny import tiny_run

ORIGIN = Origin(recipe="tiny", arguments=("--seed", "3"))


def test_run_json_holds_the_command_and_every_field(tmp_path):
    """And is strict JSON, whatever the numbers."""
    run = tiny_run(seed=3, optim=Optim(clip_norm=math.inf))
    describe_directory(tmp_path, run, ORIGIN)
    stored = read_run(tmp_path)
    assert stored == {
        "recipe": "tiny",
        "arguments": ["--seed", "3"],
        "command": "rescore train tiny --seed 3",
        "seed": 3,
        "config": describe(run),
    }
    check_same(tmp_path, run)


def test_the_environment_is_what_bitwise_results_depend_on():
    found = environment(tiny_run())
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["processes"] == 1
    assert found["device"] == "cpu"
    assert found.keys() >= {"python", "platform", "git", "rescore", "numpy", "accelerate"}


@pytest.mark.parametrize("name", ["recipe.py", "other.py"])
def test_a_recipe_file_is_kept_as_it_was_when_the_run_began(tmp_path, name):
    """As ``FILE.py`` and as ``FILE.py:function``; a resume does not change the copy."""
    source = tmp_path / name
    source.write_text("first = 1\n")
    for recipe in (str(source), f"{source}:function"):
        out = tmp_path / recipe.replace("/", "-")
        out.mkdir()
        source.write_text("first = 1\n")
        describe_directory(out, tiny_run(), Origin(recipe=recipe, arguments=()))
        assert (out / "recipe.py").read_text() == "first = 1\n"
        source.write_text("second = 2\n")
        describe_directory(out, tiny_run(), Origin(recipe=recipe, arguments=()))
        assert (out / "recipe.py").read_text() == "first = 1\n"


def test_a_recipe_by_name_has_no_file(tmp_path):
    describe_directory(tmp_path, tiny_run(), ORIGIN)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "environment.json"}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"seed": 7}, ["seed: 0 in the run, 7 now"]),
        ({"batch_size": 32}, ["batch_size: 16 in the run, 32 now"]),
        ({"optim": Optim(lr=0.25, warmup=2, micro_batch=64)}, ["optim.lr: 0.05 in the run, 0.25"]),
        ({"ema": 0.5}, ["ema: 0.0 in the run, 0.5 now"]),
        ({"lora": Lora(rank=2)}, ["lora: None in the run, {'class': 'rescore"]),
        ({"precision": "float32"}, ["precision: 'float64' in the run, 'float32' now"]),
        ({"evaluate": Evaluate(every=1, n=6, n_test=6)}, ["evaluate.every: 2 in the run, 1 now"]),
        (
            {"algorithm": Egspo(n_steps=2)},
            [
                "algorithm.class: 'rescore.algorithms.reinforce.Reinforce' in",
                "algorithm.n_steps: No",
            ],
        ),
        ({"steps": 3}, ["steps: 4 in the run, 3 now", "may only raise 'steps'"]),
    ],
)
def test_another_run_is_refused_field_by_field(tmp_path, change, lines):
    """Every differing field with both values; the same fields do not appear."""
    describe_directory(tmp_path, tiny_run(), ORIGIN)
    with pytest.raises(ValueError, match="holds a different run") as error:
        check_same(tmp_path, tiny_run(**change))
    for line in lines:
        assert line in str(error.value)
    assert "group_size" not in str(error.value)


def test_every_field_of_a_run_but_steps_is_compared(tmp_path):
    """A field that is added to Run later is refused too, unless it is listed as extendable."""
    run = tiny_run()
    describe_directory(tmp_path, run, ORIGIN)
    path = tmp_path / "run.json"
    stored = json.loads(path.read_text())
    for name in stored["config"]:
        changed = {**stored, "config": {**stored["config"], name: "something else"}}
        if name == "steps":
            continue
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=name):
            check_same(tmp_path, run)


def test_steps_may_grow(tmp_path):
    describe_directory(tmp_path, tiny_run(), ORIGIN)
    check_same(tmp_path, replace(tiny_run(), steps=5))


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a run directory.*run.json cannot be read"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"recipe": "ti')
    with pytest.raises(ValueError, match="run.json is not JSON.*damaged"):
        read_run(tmp_path)


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.setenv("RESCORE_CACHE", "")
    assert default_cache().parts[-2:] == (".cache", "rescore")
