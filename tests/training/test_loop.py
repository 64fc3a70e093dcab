"""The loop: what is evaluated, which checkpoints stay, and that it learns."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from gaussians import gaussian_run, gaussian_world
from rescore.algorithms.egspo import Egspo
from rescore.evaluation.metrics import evaluate
from rescore.models.finetune import Lora
from rescore.sampling.decoder import Decoder
from rescore.tasks.task import Split
from rescore.training import checkpoint, loop
from rescore.training.log import Console
from rescore.training.loop import (
    EVALUATION_SEED,
    correlation,
    evaluate_split,
    graceful_stop,
    rollout_metrics,
    train,
)
from rescore.training.optim import Optim
from rescore.training.rollout import rollout
from rescore.training.run import Evaluate, Run
from rescore.training.session import load_best
from rescore.training.world import World, load_weights, save_state
from rescore.types import Prompts
from tiny import (
    Match,
    MlpBase,
    TransformerBase,
    in_training,
    last_checkpoint,
    rows,
    tiny_run,
    tiny_world,
)


def trained(run: Run, out: Path) -> World:
    run.check()
    world = tiny_world(run)
    train(world, out, Console("", run.steps, enabled=False))
    return world


def weights(world: World) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in world.module.named_parameters()}


def always_a(outputs: Tensor, prompts: Prompts) -> Tensor:
    """Fraction of tokens that are 'a': easy to learn."""
    return (outputs == 0).double().mean(1)


def easy(**changes) -> Run:
    return tiny_run(
        task=Match(functions={"a": always_a}),
        decoder=Decoder(steps=3, temperature=1.0),
        steps=40,
        batch_size=64,
        save_every=40,
        evaluate=Evaluate(every=10, n=6, n_test=6),
        optim=Optim(lr=0.05, warmup=0),
        **changes,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": Egspo(n_steps=2, beta=0.0), "precision": "float32"},
        {"base": TransformerBase(), "precision": "bfloat16"},
        {"base": TransformerBase(), "lora": Lora(rank=4, targets=("up", "down", "head"))},
        {"ema": 0.8},
    ],
    ids=["reinforce", "egspo", "bfloat16", "adapters", "average"],
)
def test_it_learns(changes, tmp_path):
    """The reward rises on training prompts and on validation, in every mode of training."""
    trained(easy(**changes), tmp_path)
    metrics = rows(tmp_path / "metrics.jsonl")
    first, last = metrics[0]["reward"], metrics[-1]["reward"]
    assert last > first + 0.25
    values = [row["metrics"]["reward"]["mean"] for row in rows(tmp_path / "evaluations.jsonl")]
    assert values[-1] > values[0] + 0.2


def test_evaluations_are_on_time_and_choose_the_best(tmp_path):
    """At the start, every ``every`` steps and at the end; the first of equals is kept."""
    run = tiny_run(steps=9, evaluate=Evaluate(every=4, n=6, n_test=6, by="matches"))
    world = trained(run, tmp_path)
    found = rows(tmp_path / "evaluations.jsonl")
    assert [row["step"] for row in found] == [0, 4, 8, 9]
    values = {row["step"]: row["metrics"]["matches"]["mean"] for row in found}
    best = max(values.values())
    assert world.state.best_value == best
    assert world.state.best_step == min(s for s, v in values.items() if v == best)


def best_at_4(**changes) -> Run:
    """Validation, every 2 steps, is worth 0, 0.5, 1 and never more; 1 once again at step 8."""
    worth = iter([0.0, 0.5, 1.0, 0.25, 1.0, 0.25, 0.25])

    def scripted(outputs: Tensor, prompts: Prompts) -> Tensor:
        if in_training(prompts):
            return always_a(outputs, prompts)
        return torch.full((6,), next(worth))

    task = Match(functions={"worth": scripted})
    return tiny_run(task=task, steps=12, **changes)


def test_the_best_checkpoint_survives_and_the_last_ones_are_kept(tmp_path):
    """Best of 12 steps at 4; of the others the last three saves stay."""
    world = trained(best_at_4(save_every=1, keep_last=3), tmp_path)
    assert world.state.best_step == 4
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 10, 11, 12]
    assert last_checkpoint(tmp_path).state["train"]["best_step"] == 4


def test_the_best_is_saved_when_no_save_is_due(tmp_path):
    """Its weights are needed at the end."""
    trained(best_at_4(save_every=100, keep_last=1), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 12]


def test_the_best_of_a_run_that_averages_is_the_average(tmp_path):
    """``load_best`` gives the averages of the best step, which are what was evaluated then."""
    run = tiny_run(ema=0.8, steps=6, batch_size=64, evaluate=Evaluate(every=2, n=6, n_test=6))
    world = trained(run, tmp_path)
    folder = tmp_path / "checkpoints"
    for step in (4, 6):
        world.state.best_step = step
        saved = checkpoint.load(folder, step)
        load_best(world, folder)
        for name, p in world.module.named_parameters():
            assert torch.equal(p, saved.tensors["ema"][name])
            assert not torch.equal(p, saved.tensors["model"][name])
        values = evaluate_split(world, "validation", 6, policy=world.models.new)
        row = next(r for r in rows(tmp_path / "evaluations.jsonl") if r["step"] == step)
        assert values["reward"].mean().item() == row["metrics"]["reward"]["mean"]


def test_the_average_is_the_recursion_over_the_weights_after_each_update(tmp_path):
    """a <- d a + (1 - d) theta with d = min(decay, (1 + n) / (10 + n))."""
    run = tiny_run(ema=0.15, save_every=1, keep_last=9)
    expected = weights(tiny_world(run))
    trained(run, tmp_path)
    for n in range(4):
        saved = checkpoint.load(tmp_path / "checkpoints", n + 1)
        decay = min(0.15, (1 + n) / (10 + n))
        for name, theta in saved.tensors["model"].items():
            expected[name] = decay * expected[name] + (1 - decay) * theta
            torch.testing.assert_close(saved.tensors["ema"][name], expected[name])


def test_evaluation_uses_the_average_and_leaves_the_weights(tmp_path):
    """Weights far from the average do not show; they are there again afterwards, bitwise."""
    world = trained(tiny_run(ema=0.8), tmp_path)
    before = evaluate_split(world, "test", 6)
    with torch.no_grad():
        for p in world.module.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=9.0)
    own = weights(world)
    direct = evaluate(
        world.models.new, world.run.task, "test", torch.arange(6), seed=EVALUATION_SEED["test"]
    )
    after = evaluate_split(world, "test", 6)
    assert torch.equal(after["matches"], before["matches"])
    assert not torch.equal(direct["matches"], before["matches"])
    for name, p in world.module.named_parameters():
        assert torch.equal(p, own[name])


def test_splits_do_not_share_their_noise():
    """Where prompts are all alike, a checkpoint would be chosen on the samples it is tested on."""
    world = gaussian_world(gaussian_run())
    rewards = [evaluate_split(world, split, 4)["reward"] for split in get_args(Split)]
    assert len(torch.cat(rewards).unique()) == 12
    assert torch.equal(evaluate_split(world, "test", 4)["reward"], rewards[-1])


def test_more_prompts_than_a_split_has_are_all_of_them():
    values = evaluate_split(tiny_world(tiny_run()), "test", 1000)
    assert {len(value) for value in values.values()} == {6}


def test_another_network_can_be_evaluated_in_its_place():
    """The base beside the trained one, on the same noise; its own weights are not touched."""
    run = tiny_run(ema=0.8, seed=1)
    world, other = tiny_world(tiny_run(seed=2)), tiny_world(run)
    expected = evaluate_split(tiny_world(tiny_run(seed=1)), "test", 6)
    found = evaluate_split(other, "test", 6, policy=world.models.new)
    same = evaluate_split(other, "test", 6, policy=tiny_world(run).models.new)
    assert torch.equal(same["matches"], expected["matches"])
    assert not torch.equal(found["matches"], expected["matches"])


def test_adapters_only_are_checkpointed(tmp_path):
    """The base is frozen, so it is not copied into every checkpoint."""
    run = tiny_run(base=TransformerBase(), lora=Lora(rank=2, alpha=4))
    world = trained(run, tmp_path)
    saved = last_checkpoint(tmp_path)
    assert saved.tensors["model"].keys() == {n for n in weights(world) if ".lora_" in n}
    assert saved.tensors["optimizer"].keys() == {
        f"{name}.{key}"
        for name in saved.tensors["model"]
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_checkpoint_with_other_shapes_is_refused():
    """By the name of the parameter."""
    world = tiny_world(tiny_run())
    tensors = {name: tensor[:1] for name, tensor in weights(world).items()}
    with pytest.raises(checkpoint.CheckpointError, match="'weight_in' is missing or has another"):
        load_weights(world.module, tensors)


def test_ctrl_c_twice_stops_at_once(monkeypatch):
    """But not when both come within a moment, as the launcher of several processes sends them."""
    monkeypatch.setattr(loop, "SAME_REQUEST_S", 0.05)
    with graceful_stop() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping()
        time.sleep(0.06)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_groups_of_equal_rewards_are_counted(tmp_path):
    """The fraction of samples in such groups; a batch of nothing else trains nothing."""
    task = Match(functions={"worth": lambda outputs, prompts: [1.0] * len(outputs)})
    world = tiny_world(tiny_run(task=task))
    before = weights(world)
    train(world, tmp_path, Console("", 4, enabled=False))
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["zero_variance_groups"] for row in metrics] == [1.0] * 4
    assert all(row["gradient_norm"] is None for row in metrics)
    for name, p in world.module.named_parameters():
        assert torch.equal(p, before[name])


def test_saving_twice_replaces(tmp_path):
    """A step may be saved again, as after Ctrl-C in a step that was just saved."""
    world = tiny_world(tiny_run(base=MlpBase()))
    world.state.best_step = 0
    for _ in range(2):
        save_state(world, tmp_path)
    assert checkpoint.steps(tmp_path) == [0]


def test_correlation_by_hand():
    """Pearson's coefficient of (1, 2, 4) with (3, 5, 9) is 1, with (1, 1, 1) 0 by convention."""
    x = torch.tensor([1.0, 2.0, 4.0])
    assert float(correlation(x, 2 * x + 1)) == pytest.approx(1)
    assert float(correlation(x, -x)) == pytest.approx(-1)
    assert float(correlation(x, torch.tensor([1.0, 0.0, 1.0]))) == pytest.approx(0.18898223650)
    assert float(correlation(x, torch.ones(3))) == 0


def test_stepwise_methods_log_the_reward_of_their_completions():
    """Mean and correlation over the selected steps only."""
    run = tiny_run(algorithm=Egspo(n_steps=2, lam=0.5, beta=0.0))
    scored, _ = rollout(tiny_world(run), 0)
    metrics = rollout_metrics(scored)
    terms = torch.stack(list(scored.completion_terms.values())).sum(0)
    assert metrics["completion_reward"] == pytest.approx(float(terms.mean()))
    table = torch.stack([terms.flatten(), scored.reward.repeat_interleave(2)])
    assert metrics["completion_correlation"] == pytest.approx(float(torch.corrcoef(table)[0, 1]))
