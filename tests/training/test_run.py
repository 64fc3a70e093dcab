"""What a run refuses before anything is written, and how it is written down."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace

import pytest

from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.sampling.decoder import Decoder
from rescore.tasks.task import Task
from rescore.training.optim import Optim
from rescore.training.rollout import batch_prompts, rollout
from rescore.training.run import Evaluate, describe, differences
from rescore.training.update import mini_batches, update
from tiny import Match, MlpBase, matches, tiny_run, tiny_world


def test_the_tiny_run_is_accepted():
    tiny_run().check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "leave_one_out.*group_size=1"),
        ({"group_size": 1, "algorithm": Egspo(n_steps=1)}, "group_mean.*group_size=1"),
        ({"batch_size": 18}, "batch_size=18 is not divisible by group_size=4"),
        (
            {"optim": Optim(mini_batches=3), "algorithm": Egspo(n_steps=1)},
            "batch_size=16 is not divisible by optim.mini_batches=3",
        ),
        ({"decoder": Decoder(steps=3, temperature=0.0)}, "temperature=0 makes.*deterministic"),
        ({"algorithm": Egspo(n_steps=4)}, "n_steps=4 cannot be selected from 3"),
        (
            {"algorithm": Egspo(n_steps=1, lam=0.5, completion_term="matchs")},
            r"'matchs' is no reward term.*'matches', 'solved'",
        ),
        ({"optim": Optim(mini_batches=2)}, "Reinforce is on-policy.*mini_batches=2"),
        ({"optim": Optim(epochs=2)}, "Reinforce is on-policy.*epochs=2"),
        ({"evaluate": Evaluate(by="matchs")}, r"'matchs' is no reward term.*'matches', 'solved'"),
        ({"evaluate": Evaluate(every=0)}, "evaluate.every must be at least 1"),
        ({"evaluate": Evaluate(n=0)}, "evaluate.n must be at least 1"),
        ({"evaluate": Evaluate(n_test=0)}, "evaluate.n_test must be at least 1"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here.*--device cpu"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, r"ema must lie in \[0, 1\)"),
        ({"seed": -1}, r"seed must lie in \[0, 2\^32\), got -1"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"keep_last": 0}, "keep_last must be at least 1"),
        ({"forward_rows": 0}, "forward_rows must be at least 1"),
    ],
)
def test_a_run_that_cannot_work_is_refused(changes, message):
    """The message says what was got and what to change."""
    with pytest.raises(ValueError, match=message):
        tiny_run(**changes).check()


@dataclass(frozen=True, kw_only=True)
class Missing(Match):
    """A task that lacks something."""

    def check(self) -> None:
        raise ValueError("no board found; buy one")


@dataclass(frozen=True, kw_only=True)
class Fussy(MlpBase):
    """A base that fits nothing."""

    def check(self, task: Task, device: str) -> None:
        raise ValueError(f"no weights for {type(task).__name__} on {device}")


def test_task_and_base_are_asked_too():
    """Each may refuse what is not here; the base is told the task and the device."""
    with pytest.raises(ValueError, match="no board found; buy one"):
        tiny_run(task=Missing()).check()
    with pytest.raises(ValueError, match="no weights for Match on cpu"):
        tiny_run(base=Fussy()).check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decoder(steps=3, blocks=2), "steps=3 does not split into blocks=2"),
        (lambda: Optim(mini_batches=0), "mini_batches must be at least 1"),
        (lambda: Optim(micro_batch=0), "micro_batch must be at least 1"),
        (lambda: Optim(epochs=0), "epochs must be at least 1"),
        (lambda: Optim(max_skipped=0), "max_skipped must be at least 1"),
        (lambda: Optim(lr=0.0), "lr and clip_norm must be positive"),
        (lambda: Optim(lr=math.nan), "lr and clip_norm must be positive"),
        (lambda: Optim(clip_norm=-1.0), "lr and clip_norm must be positive"),
    ],
)
def test_parts_of_a_run_refuse_what_cannot_work(make, message):
    """As soon as they are made."""
    with pytest.raises(ValueError, match=message):
        make()


def test_a_seed_of_32_bits_is_accepted():
    """The largest seed works all the way: every generator takes the numbers made from it."""
    run = tiny_run(
        seed=2**32 - 1, optim=Optim(mini_batches=2), algorithm=Egspo(n_steps=1, beta=0.0)
    )
    run.check()
    batch_prompts(run, 10**6)
    world = tiny_world(run)
    scored, _ = rollout(world, 0)
    credited = run.algorithm.credit(scored)
    assert len(list(mini_batches(run, credited, 10**6))) == 2
    update(world, credited, 0)


def test_a_description_is_strict_json_and_names_classes_and_functions():
    """Equal runs have equal descriptions; numbers that JSON lacks become text."""
    run = tiny_run(optim=Optim(clip_norm=math.inf))
    description = describe(run)
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["class"] == "rescore.training.run.Run"
    assert description["base"] == {"class": "tiny.MlpBase"}
    assert description["task"]["functions"]["matches"] == "tiny.matches"
    assert description["optim"]["clip_norm"] == "inf"
    assert description["optim"]["betas"] == [0.9, 0.99]
    assert description["lora"] is None
    assert description == describe(tiny_run(optim=Optim(clip_norm=math.inf)))


def test_any_value_has_a_description():
    """A callable that is not a function has no name, but is described all the same."""
    described = describe({"partial": functools.partial(matches), "class": MlpBase})
    assert "functools.partial" in described["partial"]
    assert described["class"] == "tiny.MlpBase"
    json.dumps(described)


def test_differences_name_every_changed_field_with_both_values():
    """Changed leaves, changed classes, and fields that only one side has."""
    old = tiny_run()
    new = replace(old, seed=3, optim=replace(old.optim, lr=0.25), algorithm=Egspo(n_steps=2))
    found = differences(describe(old), describe(new))
    assert found["seed"] == (0, 3)
    assert found["optim.lr"] == (0.05, 0.25)
    assert found["algorithm.class"] == (
        "rescore.algorithms.reinforce.Reinforce",
        "rescore.algorithms.egspo.Egspo",
    )
    assert found["algorithm.n_steps"] == (None, 2)
    assert all(name.startswith(("seed", "optim.lr", "algorithm.")) for name in found)
    assert differences(describe(old), describe(tiny_run(algorithm=Reinforce()))) == {}
