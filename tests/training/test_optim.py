"""The update: warm-up, clipping, and steps that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rescore.models.finetune import Ema
from rescore.models.tiny import MlpDenoiser
from rescore.training.log import Console
from rescore.training.loop import train
from rescore.training.optim import Optim, TrainingError, Updater
from tiny import L, MlpBase, V, last_checkpoint, rows, tiny_run, tiny_world


def updater(optim: Optim, n: int = 1) -> tuple[Updater, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(1, n, dtype=torch.float64))
    module = nn.ParameterDict({"weight": weight})
    return Updater(module, optim, Accelerator(cpu=True), None), weight


ZERO = torch.zeros((), dtype=torch.float64)


def test_warm_up_is_linear_and_counts_updates():
    """A constant gradient moves Adam by exactly lr: k / (warmup + 1) of it in update k."""
    up, weight = updater(Optim(lr=0.5, warmup=3))
    moves = []
    for _ in range(6):
        before = weight.item()
        weight.grad = torch.full_like(weight, -1.0)
        up.step(ZERO)
        moves.append((weight.item() - before) / 0.5)
    assert moves == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-6)


def test_gradients_are_shortened_to_the_bound_and_the_norm_before_is_returned():
    """Direction kept; a shorter gradient is left alone."""
    for length, kept in ((5.0, 2.0), (1.0, 1.0)):
        up, weight = updater(Optim(clip_norm=2.0, betas=(0.0, 0.99)), n=2)
        weight.grad = length * torch.tensor([[0.6, -0.8]], dtype=torch.float64)
        norm = up.step(ZERO)
        assert norm is not None
        assert norm.item() == pytest.approx(length)
        moment = up.optimizer.state[weight]["exp_avg"]
        expected = kept * moment.new_tensor([[0.6, -0.8]])
        torch.testing.assert_close(moment, expected, rtol=1e-5, atol=0)


def test_weight_decay_is_decoupled_and_gradients_are_cleared():
    """With a zero gradient the weight shrinks by lr * decay and nothing else."""
    up, weight = updater(Optim(lr=0.5, weight_decay=0.1, warmup=0))
    nn.init.ones_(weight)
    weight.grad = torch.zeros_like(weight)
    up.step(ZERO)
    assert weight.item() == pytest.approx(1 - 0.5 * 0.1, rel=1e-12)
    assert weight.grad is None


def test_a_parameter_that_the_loss_does_not_reach_is_treated_as_on_many_processes():
    """Its gradient is zero: the optimiser has state for it, and decay applies."""
    up, weight = updater(Optim(lr=0.5, weight_decay=0.1, warmup=0))
    nn.init.ones_(weight)
    up.step(ZERO)
    assert weight.item() == pytest.approx(0.95, rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_an_update_that_is_not_finite_is_skipped_whole(bad, where):
    """Weights, moments, schedule and average stay; the next one counts from there."""
    module = nn.Linear(2, 1, dtype=torch.float64)
    ema = Ema(module, decay=0.9)
    up = Updater(module, Optim(max_skipped=3, warmup=5), Accelerator(cpu=True), ema)

    def step(value: float, loss: float) -> Tensor | None:
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.5)
        assert module.weight.grad is not None
        module.weight.grad[0, 1] = value
        return up.step(torch.tensor(loss, dtype=torch.float64))

    assert step(0.5, 0.0) is not None
    kept = {
        "weight": module.weight.detach().clone(),
        **{k: v.clone() for k, v in up.optimizer.state[module.weight].items()},
        **{f"ema.{k}": v.clone() for k, v in ema.state_dict().items()},
    }
    assert (step(bad, 0.0) if where == "gradient" else step(0.5, bad)) is None
    now = {
        "weight": module.weight,
        **up.optimizer.state[module.weight],
        **{f"ema.{k}": v for k, v in ema.state_dict().items()},
    }
    for name, value in kept.items():
        assert torch.equal(value, now[name]), name
    assert all(p.grad is None for p in module.parameters())
    assert (up.counts.done, up.counts.skipped, up.counts.skipped_in_a_row) == (1, 1, 1)
    step(0.5, 0.0)
    assert (up.counts.done, up.counts.skipped, up.counts.skipped_in_a_row) == (2, 1, 0)
    assert not torch.equal(kept["weight"], module.weight)


def test_too_many_skipped_in_a_row_stop_the_run():
    """Only a row of them counts; the message has the loss, the norm and the advice."""
    up, weight = updater(Optim(max_skipped=2))
    for value in (torch.nan, 1.0, torch.nan):
        weight.grad = torch.full_like(weight, value)
        up.step(ZERO)
    weight.grad = torch.full_like(weight, torch.nan)
    with pytest.raises(TrainingError, match="2 updates in a row.*loss 0.0, gradient norm nan.*lr"):
        up.step(ZERO)
    assert up.counts.skipped == 3
    assert torch.isfinite(weight).all()


class Exploding(MlpDenoiser):
    """Fine forwards; from the third backward pass on its gradients are NaN."""

    backward_passes = 0

    def logits(self, x_t: Tensor) -> Tensor:
        out = super().logits(x_t)
        if out.requires_grad:
            out.register_hook(self.spoil)
        return out

    def spoil(self, grad: Tensor) -> Tensor:
        self.backward_passes += 1
        return grad * torch.nan if self.backward_passes > 2 else grad


class ExplodingBase(MlpBase):
    def build(self, *args, seed: int, **kwargs) -> nn.Module:
        return Exploding(V, L, generator=torch.Generator().manual_seed(seed))


def test_a_run_whose_gradients_become_nan_stops_with_good_weights(tmp_path):
    """Two good updates, then skips that are counted in the metrics, then a clear error."""
    run = tiny_run(
        base=ExplodingBase(),
        steps=20,
        save_every=1,
        optim=Optim(max_skipped=4, micro_batch=512),
    )
    world = tiny_world(run)
    with pytest.raises(TrainingError, match="4 updates in a row had a non-finite loss or gradient"):
        train(world, tmp_path, Console("", run.steps, enabled=False))
    assert [row["skipped_updates"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 0, 1, 2, 3]
    assert rows(tmp_path / "metrics.jsonl")[2]["gradient_norm"] is None
    saved = last_checkpoint(tmp_path)
    assert saved.step == 5
    assert saved.state["updates"] == {"done": 2, "skipped": 3, "skipped_in_a_row": 3}
    good = tiny_world(replace(run, base=MlpBase(), steps=2))
    (tmp_path / "good").mkdir()
    train(good, tmp_path / "good", Console("", 2, enabled=False))
    for name, p in good.module.named_parameters():
        assert torch.equal(saved.tensors["model"][name], p)


@pytest.mark.parametrize(
    "field", [{"weight_decay": -1.0}, {"warmup": -1}, {"betas": (2.0, 0.9)}, {"lr": math.nan}]
)
def test_numbers_that_no_optimiser_takes_are_refused(field):
    """Refused before anything is built, naming the field."""
    with pytest.raises(ValueError, match=next(iter(field))):
        Optim(**field)
