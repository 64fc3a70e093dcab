"""Prompts of a step are pure functions of their place; recorded steps can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussians import SOLVERS, LinearNetwork, gaussian_run, gaussian_world
from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.models.tiny import MlpDenoiser
from rescore.models.transformer import TransformerConfig
from rescore.rewards.reward import Reward, RewardError
from rescore.sampling.decoder import Decoder
from rescore.sampling.record import Score
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import Task
from rescore.training.base import Base
from rescore.training.optim import Optim, TrainingError
from rescore.training.rollout import (
    PROBE_ROWS,
    PROBE_TOLERANCE,
    batch_prompts,
    probe,
    prompt_index,
    rollout,
    score,
)
from rescore.training.world import World
from rescore.types import Credited, Prompts, Scored, Selected
from tiny import (
    L,
    Match,
    MlpBase,
    TransformerBase,
    V,
    masked,
    matches,
    solved,
    tiny_run,
    tiny_world,
)


@pytest.mark.parametrize(("n", "size"), [(4, 15), (5, 15), (15, 15), (40, 15), (1, 1)])
def test_every_prompt_is_used_before_any_repeats(n, size):
    """Consecutive steps, laid end to end, are one permutation of all prompts after another."""
    steps = -(-3 * size // n)
    whole = torch.cat([prompt_index(7, step, n, size) for step in range(steps)])
    passes = whole[: 3 * size].view(3, size)
    assert torch.equal(passes.sort(1).values, torch.arange(size).expand(3, -1))
    if size > 1:
        assert len({tuple(row) for row in passes.tolist()}) == 3, "each pass has its own order"


def test_the_prompts_of_a_step_depend_on_seed_and_step_only():
    """Asking twice, in any order and whatever else was drawn, gives the same; seeds differ."""
    late = prompt_index(3, 1000, 8, 15)
    first = prompt_index(3, 0, 8, 15)
    torch.manual_seed(5)
    assert torch.equal(prompt_index(3, 0, 8, 15), first)
    assert torch.equal(prompt_index(3, 1000, 8, 15), late)
    state = torch.random.get_rng_state()
    prompt_index(3, 0, 8, 15)
    assert torch.equal(torch.random.get_rng_state(), state)
    for seed in (0, 2, 3 + 2**31):
        assert not torch.equal(prompt_index(seed, 0, 8, 15), first), seed


def test_a_batch_is_whole_groups_with_names_of_their_own():
    """Samples of a group share a prompt; sample ids never repeat in a run."""
    run = tiny_run()
    ids = []
    for step in range(3):
        prompts = batch_prompts(run, step)
        assert prompts.group.tolist() == [g for g in range(4) for _ in range(4)]
        number = prompt_index(run.seed, step, 4, 15).repeat_interleave(4)
        expected = run.task.prompts("train", number)
        assert isinstance(prompts, Prompts) and isinstance(expected, Prompts)
        assert torch.equal(prompts.tokens, expected.tokens)
        assert torch.equal(prompts.info["target"], expected.info["target"])
        ids += prompts.sample_id.tolist()
    assert ids == list(range(48))


def test_a_rollout_is_a_pure_function_of_weights_and_step():
    """Twice the same; another step or another seed is another batch."""

    def x_0(seed: int, step: int) -> Tensor:
        world = tiny_world(tiny_run(base=Fixed(), seed=seed, batch_size=64))
        return rollout(world, step)[0].trajectory.x_0

    assert torch.equal(x_0(0, 5), x_0(0, 5))
    assert not torch.equal(x_0(0, 5), x_0(0, 6))
    assert not torch.equal(x_0(0, 5), x_0(1, 5))


@dataclass(frozen=True, kw_only=True)
class Fixed(Base):
    """The same weights whatever the seed of the run; ``spoil`` may change the network."""

    spoil: Callable[[MlpDenoiser], nn.Module] = lambda network: network

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        return self.spoil(MlpDenoiser(V, L, generator=torch.Generator().manual_seed(0)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Dropped(MlpDenoiser):
    """Loses units at random, in evaluation mode too."""

    def logits(self, x_t: Tensor) -> Tensor:
        out = super().logits(x_t)
        return nn.functional.dropout(out, 0.2, training=True)


class Mixed(MlpDenoiser):
    """A row depends on the others in the batch."""

    def logits(self, x_t: Tensor) -> Tensor:
        out = super().logits(x_t)
        return out - 0.01 * out.mean(0, keepdim=True)


class LateNoise(MlpDenoiser):
    """Wrong in the last step of three only: one position is masked."""

    def logits(self, x_t: Tensor) -> Tensor:
        out = super().logits(x_t)
        last = (x_t == self.mask_id).sum(1) == 1
        return out + last[:, None, None] * torch.rand(out.shape)


def every_step(world: World) -> Credited:
    """A rollout whose every step is trained on, whatever the rewards."""
    credited = world.run.algorithm.credit(rollout(world, 0)[0])
    return replace(credited, weight=torch.ones_like(credited.weight))


def spoiled(kind: type[MlpDenoiser], **changes) -> float | None:
    base = Fixed(spoil=lambda _: kind(V, L, generator=torch.Generator().manual_seed(0)))
    world = tiny_world(tiny_run(base=base, **changes))
    return probe(world, every_step(world))


@pytest.mark.parametrize("kind", [Dropped, Mixed, LateNoise])
def test_the_probe_stops_a_network_that_replays_differently(kind):
    """Noise, rows that influence each other, and noise in a single step, with an explanation."""
    with pytest.raises(TrainingError, match="replayed log-probabilities differ.*dropout"):
        spoiled(kind)


@pytest.mark.parametrize("batch_size", [512, 1024])
def test_the_probe_sees_every_step_of_large_batches(batch_size):
    """When only some of the steps are replayed, they are from all over the path."""
    assert batch_size * 3 > PROBE_ROWS
    with pytest.raises(TrainingError, match="replayed log-probabilities"):
        spoiled(LateNoise, batch_size=batch_size)


def test_the_probe_stops_weights_that_are_not_finite():
    """NaN is not within any tolerance."""
    world = tiny_world(tiny_run())
    credited = every_step(world)
    with torch.no_grad():
        next(world.module.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        probe(world, credited)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("order", ["random", "low_confidence", "plackett_luce", "max_prob"])
@pytest.mark.parametrize("base", ["mlp", "transformer"])
def test_the_probe_passes_an_honest_network(precision, order, base):
    """Within its tolerance, in every precision, order and score."""
    algorithms = [Reinforce(), Reinforce(score=Score(form="tokens_and_selection"))]
    for algorithm in algorithms:
        world = tiny_world(
            tiny_run(
                base=MlpBase() if base == "mlp" else TransformerBase(),
                precision=precision,
                decoder=Decoder(steps=3, order=order, temperature=0.7),
                algorithm=algorithm,
            )
        )
        credited = every_step(world)
        gap = probe(world, credited)
        assert gap is not None and gap <= PROBE_TOLERANCE[precision][1]
        dtype = torch.float64 if precision == "float64" else torch.float32
        assert credited.trajectory.log_prob.dtype == credited.reward.dtype == dtype


def test_the_probe_is_zero_for_identical_shapes():
    """One step of 16 samples, replayed as one micro-batch of 16 rows."""
    world = tiny_world(tiny_run(decoder=Decoder(steps=1)))
    credited = every_step(world)
    assert len(credited.pairs()) == 16 <= world.run.optim.micro_batch
    assert probe(world, credited) == 0.0


def test_the_probe_waits_for_a_batch_with_something_to_train_on():
    """Without a pair there is no ratio, and so no verdict."""
    world = tiny_world(tiny_run(base=Fixed(spoil=lambda _: Dropped(V, L, generator=seeded()))))
    credited = every_step(world)
    nothing = replace(credited, weight=torch.zeros_like(credited.weight))
    assert probe(world, nothing) is None
    one = torch.zeros_like(credited.weight)
    one[:, 1] = 0.5  # several samples: one alone may lose nothing to the dropout
    with pytest.raises(TrainingError, match="replayed log-probabilities"):
        probe(world, replace(credited, weight=one))


@pytest.mark.parametrize("off", [0.1, -0.1])
def test_the_probe_compares_with_what_was_recorded(off):
    """It reports |log ratio|: one recorded step that is off stops the run, in either direction."""
    world = tiny_world(tiny_run())
    credited = every_step(world)
    log_prob = credited.trajectory.log_prob.clone()
    log_prob[3, 1] += off
    shifted = replace(credited, trajectory=replace(credited.trajectory, log_prob=log_prob))
    with pytest.raises(TrainingError, match="replayed log-probabilities"):
        probe(world, shifted)
    small = replace(credited.trajectory, log_prob=credited.trajectory.log_prob + 1e-13)
    gap = probe(world, replace(credited, trajectory=small))
    assert gap == pytest.approx(1e-13, rel=0.05)


@pytest.mark.parametrize("solver", ["ddim", "two_steps"])
@pytest.mark.parametrize("effect", ["rows", "noise", "mistake", "last"])
def test_in_bfloat16_the_probe_knows_rounding_from_mistakes(solver, effect, monkeypatch):
    """An output that depends on the number of rows in a forward passes, or one that changes when
    asked again; as small a difference between sampling and training does not, but where all samples
    are of the last forward, which is smaller."""
    run = replace(
        gaussian_run(**SOLVERS[solver], algorithm=Ddpo(statistics="batch"), batch_size=20),
        **{"precision": "bfloat16", "group_size": 1, "forward_rows": 8},
        optim=Optim(micro_batch=3),
    )
    exact, sampling = LinearNetwork.predict, True

    def predict(self: LinearNetwork, x_t: Tensor, *told: Any) -> Tensor:
        small = {"rows": 0.002 * len(x_t), "noise": 0.002 * torch.rand(1).item()}
        return exact(self, x_t, *told) + small.get(effect, 0.0 if sampling else 0.002)

    monkeypatch.setattr(LinearNetwork, "predict", predict)
    world = gaussian_world(run)
    credited = every_step(world)
    sampling = False
    credited = replace(credited, weight=credited.trajectory.acts().to(credited.weight))
    if effect == "last":
        credited.weight[:16] = 0
    if effect == "mistake":
        with pytest.raises(TrainingError, match="in forwards of 8 rows as in sampling"):
            probe(world, credited)
    else:
        gap = probe(world, credited)
        assert gap is not None and gap > 1e-4


def test_the_probe_leaves_no_gradient():
    world = tiny_world(tiny_run())
    probe(world, every_step(world))
    assert all(p.grad is None for p in world.module.parameters())


def test_bfloat16_changes_the_network_but_not_the_precision_of_log_probs():
    """Log-probabilities differ from float32's by rounding of the network, and stay float32."""
    found = {}
    for precision in ("float32", "bfloat16"):
        config = TransformerConfig(vocab_size=V, length=L, width=32, depth=2, heads=2)
        run = tiny_run(
            base=TransformerBase(config=config), precision=precision, decoder=Decoder(steps=1)
        )
        world = tiny_world(run)
        found[precision] = rollout(world, 0)[0].trajectory.log_prob
        assert all(p.dtype == torch.float32 for p in world.module.parameters())
    gap = (found["float32"] - found["bfloat16"]).abs().max()
    assert 0 < gap < 0.1
    assert found["bfloat16"].dtype == torch.float32
    coarse = found["bfloat16"].to(torch.bfloat16).float()
    assert not torch.equal(coarse, found["bfloat16"])


def test_metrics_of_the_reference_are_annotated():
    """EGSPO with a KL asks the reference about every step trained on: the policy, at the start."""
    run = tiny_run(algorithm=Egspo(n_steps=2, beta=0.1))
    world = tiny_world(run)
    scored, _ = rollout(world, 0)
    recorded = scored.trajectory.log_prob.gather(1, scored.step)
    torch.testing.assert_close(scored.notes["log_prob_ref"], recorded, rtol=0, atol=1e-12)


def wrong_shape(outputs: Tensor, prompts: Prompts) -> Tensor:
    return torch.zeros(len(outputs), 1)


def nan_for_one(outputs: Tensor, prompts: Prompts) -> Tensor:
    return torch.where(prompts.sample_id == 5, torch.nan, 1.0)


def raising(outputs: Tensor, prompts: Prompts) -> Tensor:
    if bool((prompts.sample_id == 6).any()):
        raise KeyError("no such board")
    return torch.zeros(len(outputs))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_shape, r"'bad' returned shape \((\d+), 1\); expected \(\1,\)"),
        (nan_for_one, r"'bad' returned nan for sample \d+ \(sample_id 5, output"),
        (raising, r"'bad' raised KeyError.*no such board.*sample \d+, sample_id 6"),
    ],
)
def test_a_broken_reward_is_named_with_its_sample(function, message):
    run = tiny_run()
    task = Match(functions={"solved": solved, "bad": function})
    with pytest.raises(RewardError, match=message):
        rollout(tiny_world(replace(run, task=task)), 0)


# Judging ----------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Fraction of positions right, and everything it was asked about."""

    asked: list[tuple[int, ...]]

    def __call__(self, outputs: Tensor, prompts: Prompts) -> Tensor:
        rows = torch.cat([prompts.info["target"], outputs], 1)
        self.asked += [tuple(row) for row in rows.tolist()]
        return matches(outputs, prompts)


def first_is_a(outputs: Tensor, prompts: Prompts) -> Tensor:
    return (outputs[:, 0] == 0).double()


@dataclass(frozen=True, kw_only=True)
class Weighed(Match):
    """Two terms of different weights."""

    @property
    def reward(self) -> Reward:
        return Reward(self.functions, {"judge": 0.5, "a": 0.25})


def judged(**changes) -> tuple[Selected, Scored, list[tuple[int, ...]]]:
    """A selection with completions, its scores, and (target, output) of all that was judged."""
    judge = Judge([])
    task = Weighed(functions={"judge": judge, "a": first_is_a})
    settings = {"n_steps": 3, "lam": 0.5, "beta": 0.0, **changes}
    world = tiny_world(tiny_run(task=task, algorithm=Egspo(**settings), base=Fixed()))
    prompts = batch_prompts(world.run, 0)
    rng = SampleRng(world.run.seed, prompts.sample_id)
    trajectory = world.models.new.sample(prompts, world.run.algorithm.record, rng)
    selected = world.run.algorithm.select(world.models, trajectory)
    return selected, score(world, selected), judge.asked


every_selection = pytest.mark.parametrize(
    "changes",
    [{"n_steps": 1}, {}, {"selection": "all"}, {"selection": "adaptive", "mass": 0.5}],
    ids=str,
)


@every_selection
def test_equal_outputs_of_a_group_are_judged_once(changes):
    """Every distinct (group, output) once: finished samples and completions that count."""
    selected, _, asked = judged(**changes)
    assert selected.completion is not None
    path = selected.trajectory
    group, target = path.prompts.group.tolist(), path.prompts.info["target"].tolist()
    wanted = [(g, *r, *x) for g, r, x in zip(group, target, path.x_0.tolist(), strict=True)]
    for b, k in (selected.step_weight != 0).nonzero().tolist():
        wanted.append((group[b], *target[b], *selected.completion[b, k].tolist()))
    assert sorted(asked) == sorted(row[1:] for row in set(wanted))
    assert len(asked) < len(wanted)


@every_selection
def test_scores_land_where_they_belong(changes):
    """What judging each sample and each completion by itself gives; weights are those of terms."""
    selected, scored, _ = judged(**changes)
    path, prompts = selected.trajectory, selected.trajectory.prompts
    assert isinstance(prompts, Prompts)
    assert selected.completion is not None and scored.completion is None
    torch.testing.assert_close(scored.terms["judge"], matches(path.x_0, prompts))
    torch.testing.assert_close(scored.terms["a"], first_is_a(path.x_0, prompts))
    total = 0.5 * scored.terms["judge"] + 0.25 * scored.terms["a"]
    torch.testing.assert_close(scored.reward, total)
    counted = selected.step_weight != 0
    assert set(scored.completion_terms) == {"judge", "a"}
    for k in range(counted.shape[1]):
        for name, weight, term in (("judge", 0.5, matches), ("a", 0.25, first_is_a)):
            alone = weight * term(selected.completion[:, k], prompts)
            expected = torch.where(counted[:, k], alone, 0.0)
            torch.testing.assert_close(scored.completion_terms[name][:, k], expected)
    varied = scored.completion_terms["judge"][counted]
    assert varied.unique().numel() > 2


def test_completions_that_count_for_nothing_are_not_judged():
    """A completion that would break the reward, in columns of weight 0, never reaches it."""
    selected, before, _ = judged()
    assert selected.completion is not None
    weight, completion = selected.step_weight.clone(), selected.completion.clone()
    weight[::3, 1] = 0.0
    completion[::3, 1] = -1

    def strict(outputs: Tensor, prompts: Prompts) -> Tensor:
        assert bool((outputs >= 0).all()), "a completion of weight 0"
        return matches(outputs, prompts)

    task = Weighed(functions={"judge": strict, "a": first_is_a})
    world = tiny_world(tiny_run(task=task, base=Fixed()))
    spoiled = replace(selected, step_weight=weight, completion=completion)
    after = score(world, spoiled)
    dropped = weight == 0
    for name, value in after.completion_terms.items():
        assert bool((value[dropped] == 0).all())
        assert torch.equal(value[~dropped], before.completion_terms[name][~dropped])
    with pytest.raises(RewardError, match="a completion of weight 0"):
        score(world, replace(spoiled, step_weight=selected.step_weight))


def test_without_completions_there_are_no_completion_terms():
    """lambda 0: the finished samples alone are judged."""
    selected, scored, asked = judged(lam=0.0)
    assert selected.completion is None and scored.completion_terms == {}
    path = selected.trajectory
    rows = torch.cat([path.prompts.group[:, None], path.x_0], 1)
    assert len(asked) == len(rows.unique(dim=0))


@pytest.mark.parametrize("forward_rows", [1, 5, 16])
def test_the_parts_of_a_rollout_change_nothing(forward_rows):
    """``forward_rows`` bounds the memory; paths, kept steps and completions are the same."""
    algorithm = Egspo(n_steps=2, lam=0.5, selection="importance")

    def paths(rows: int) -> Scored:
        run = tiny_run(base=Fixed(), algorithm=algorithm, forward_rows=rows)
        return rollout(tiny_world(run), 0)[0]

    found, whole = paths(forward_rows), paths(1024)
    assert torch.equal(found.trajectory.x_0, whole.trajectory.x_0)
    assert torch.equal(masked(found.trajectory).rank, masked(whole.trajectory).rank)
    assert torch.equal(found.step, whole.step)
    for name, value in whole.completion_terms.items():
        assert torch.equal(found.completion_terms[name], value)
    for name, value in whole.notes.items():
        torch.testing.assert_close(found.notes[name], value, rtol=0, atol=1e-12)
    gap = found.trajectory.log_prob - whole.trajectory.log_prob
    assert float(gap.abs().max()) < 1e-12


def test_stepwise_advantages_train_end_to_end():
    """The table of a rollout is credited and has pairs to train on, in every selection."""
    for selection in ("top", "bottom", "uniform", "random", "importance", "all", "adaptive"):
        algorithm = Egspo(n_steps=2, lam=0.5, selection=selection)
        world = tiny_world(tiny_run(base=Fixed(), algorithm=algorithm))
        credited = algorithm.credit(rollout(world, 0)[0])
        assert len(credited.pairs()) > 16
