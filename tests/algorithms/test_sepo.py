"""SEPO through the pipeline: what each mode scores, what it costs, what it refuses, that it learns.

The exact expectations of its gradients are in ``tests/proof/test_verify_sepo.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rescore.algorithms import sepo
from rescore.algorithms.sepo import SNIS_BYTES, Sepo
from rescore.models.critics import Critic, ScalarCritic
from rescore.models.denoiser import ScoreNetwork
from rescore.models.sedd import SeddConfig
from rescore.processes.ctmc import Absorbing, Process, Uniform
from rescore.rewards.reward import Reward
from rescore.sampling.decoder import Decoder, RateDecoder
from rescore.sampling.policy import Models, RatePolicy, policy_of
from rescore.sampling.record import Score
from rescore.sampling.rng import SampleRng
from rescore.tasks.task import Split, Task, TokenTask
from rescore.training.base import Base
from rescore.training.optim import Optim
from rescore.training.rollout import probe, rollout
from rescore.training.run import Evaluate, Run
from rescore.training.supervised import Supervised, fit
from rescore.training.update import update
from rescore.training.world import World, accelerator_for, build
from rescore.types import Actions, Examples, Prompts, Scored


class Mlp(nn.Module):
    """Scores of small canvases: a hidden layer on the one-hot state and the noise, float64."""

    def __init__(
        self, process: Process, length: int, *, seed: int, hidden: int = 16, timed: bool = True
    ) -> None:
        super().__init__()
        self.timed = timed
        generator = torch.Generator().manual_seed(seed)
        n, self.length = process.n_states, length
        self.process: Process = process

        def weight(rows: int, columns: int) -> nn.Parameter:
            draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return nn.Parameter(draw * columns**-0.5)

        self.inner, self.outer = weight(hidden, length * n + 1), weight(length * n, hidden)

    def log_score(
        self, x_t: Tensor, total_noise: Tensor, *, attend: Tensor | None = None
    ) -> Tensor:
        """0 at the token itself."""
        one_hot = nn.functional.one_hot(x_t, self.process.n_states).flatten(1).double()
        kept = torch.exp(-total_noise.double())[:, None]
        inputs = torch.cat([one_hot, kept if self.timed else torch.zeros_like(kept)], 1)
        out = torch.tanh(inputs @ self.inner.T) @ self.outer.T
        return out.unflatten(1, (self.length, -1)).scatter(-1, x_t[..., None], 0.0)


class Letters(nn.Module):
    """One free number per letter, whatever the canvas: the cheapest score network there is."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process: Process = process
        self.level = nn.Parameter(torch.linspace(0, 1, process.n_states))

    def log_score(
        self, x_t: Tensor, total_noise: Tensor, *, attend: Tensor | None = None
    ) -> Tensor:
        """Differences of the numbers."""
        return self.level - self.level[x_t][..., None]


UNIFORM, MASKED = Uniform(4), Absorbing(5, mask_id=4)


@dataclass(frozen=True, kw_only=True)
class Sums(TokenTask):
    """Write letters of large weight; the weights of positions differ, so rewards rarely tie."""

    positions: int = 200

    @property
    def vocab_size(self) -> int:
        return 4

    def symbol(self, token: int) -> str:
        return "ACGT"[token]

    @property
    def length(self) -> int:
        return self.positions

    @property
    def reward(self) -> Reward:
        return Reward({"sum": total})

    def size(self, split: Split) -> int:
        return 64

    def prompts(self, split: Split, index: Tensor) -> Prompts:
        return blank(len(index), self.positions)

    def clean(self, split: Split) -> Examples:
        raise ValueError("this task has no finished sequences")

    def read(self, texts: Any) -> Prompts:
        raise ValueError("this task has no prompts")

    def show(self, tokens: Tensor) -> str:
        return "".join(map(self.symbol, tokens.tolist()))


def total(outputs: Tensor, prompts: Prompts) -> Tensor:
    weight = torch.sin(torch.arange(outputs.shape[1]) + 1.0).double()
    return (outputs * weight).sum(1)


def blank(n: int, length: int) -> Prompts:
    row = torch.arange(n)
    return Prompts(
        tokens=torch.full((n, length), 4),
        editable=torch.ones(n, length, dtype=torch.bool),
        group=row,
        sample_id=row,
        info={},
    )


@dataclass(frozen=True, kw_only=True)
class LettersBase(Base):
    """Untrained ``Letters``."""

    process: Process

    @property
    def uniform(self) -> bool:
        return self.process.mask_id is None

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        return Letters(self.process)


def run_of(algorithm: Sepo, process: Process, **changes: Any) -> Run:
    run = Run(
        task=Sums(),
        base=LettersBase(process=process),
        decoder=RateDecoder(steps=128),
        algorithm=algorithm,
        steps=1,
        batch_size=128,
        group_size=8,
        optim=Optim(epochs=5, micro_batch=256),
        evaluate=Evaluate(every=1, n=8, n_test=8),
    )
    return replace(run, **changes)


def world_of(run: Run) -> World:
    run.check()
    accelerator = accelerator_for(run)
    module = run.base.build(
        run.task, seed=0, cache=Path("unused"), device="cpu", note=lambda line: None
    )
    return build(run, module, accelerator)


ROWS = {
    "conditional": (Sepo(), UNIFORM, 0, 128 * 128 + 128 * 1 * 6),
    "elbo": (Sepo(), MASKED, 0, 128 * 128 + 128 * 4 * 6),
    "elbo, KL, corrector": (
        Sepo(beta=0.1, kl_steps=3),
        MASKED,
        7,
        128 * (128 + 7) + 128 * 4 * 6 + 128 * 3 * 6,
    ),
    "joint": (
        Sepo(mode="joint", snis_draws=2),
        UNIFORM,
        0,
        128 * 128 + 128 * (1 + 2) * 6 + 128,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_network_rows_of_a_rollout_and_its_updates(name):
    """At the sizes of the released code: G = 8, B = 16, mu = 5, L = 200, T = 128."""
    algorithm, process, corrector_steps, expected = ROWS[name]
    decoder = RateDecoder(steps=128, corrector_steps=corrector_steps)
    world = world_of(run_of(algorithm, process, decoder=decoder))
    scored, _ = rollout(world, 0)
    credited = world.run.algorithm.credit(scored)
    assert len(credited.pairs()) == 128  # no advantage is 0 by chance
    update(world, credited, 0)
    assert world.network_rows() == expected
    if name == "conditional":
        assert expected <= 17_200
    if name == "elbo":
        assert expected <= 20_000


@pytest.mark.parametrize(("process", "mode"), [(UNIFORM, "conditional"), (MASKED, "elbo")])
def test_the_probe_sees_a_ratio_of_one(process, mode):
    world = world_of(run_of(Sepo(mode=mode), process, decoder=RateDecoder(steps=4)))
    scored, _ = rollout(world, 0)
    assert probe(world, world.run.algorithm.credit(scored)) == 0.0


L = 3


def scored_by(
    algorithm: Sepo, process: Process, *, n: int = 8, decoder: RateDecoder | None = None
) -> tuple[Models, Scored]:
    """Two groups of samples of a small network, with another one as the reference."""
    decoder = decoder or RateDecoder(steps=4)
    new = policy_of(Mlp(process, L, seed=0), decoder, 1024)
    ref = policy_of(Mlp(process, L, seed=1), decoder, 1024)
    critic = ScalarCritic() if algorithm.uses_critic else None
    models = Models(new=new, ref=ref if algorithm.uses_reference else None, critic=critic)
    algorithm.check(decoder, n // 2, ["reward"])
    algorithm.check_models(models)
    prompts = replace(blank(n, L), group=torch.arange(n) // (n // 2))
    rng = SampleRng(0, prompts.sample_id)
    selected = algorithm.select(models, new.sample(prompts, algorithm.record, rng))
    reward = total(selected.trajectory.x_0, prompts)
    scored = Scored(**selected.fields(), reward=reward, terms={"reward": reward})
    return models, algorithm.annotate(models, scored, rng)


def actions_of(algorithm: Sepo, scored: Scored) -> Actions:
    credited = algorithm.credit(scored)
    return credited.actions(credited.pairs())


def gradient(models: Models, algorithm: Sepo, actions: Actions) -> Tensor:
    assert isinstance(models.new, RatePolicy)
    terms = algorithm.loss(models, actions, SampleRng(0, actions.trajectory.prompts.sample_id))
    network: Any = models.new.network
    weights = list(network.network.parameters())
    grads = torch.autograd.grad((terms.loss * actions.weight).sum(), weights)
    return torch.cat([g.flatten() for g in grads])


def test_conditional_is_the_gradient_of_the_pseudo_likelihood():
    """On the policy that sampled: -mean of A times grad of sum_l log softmax of the scores at x."""
    algorithm = Sepo(normalise_std=False)
    models, scored = scored_by(algorithm, UNIFORM)
    actions = actions_of(algorithm, scored)
    found = gradient(models, algorithm, actions)

    assert isinstance(models.new, RatePolicy)
    network: Any = models.new.network
    x = actions.trajectory.x_0
    level = models.new.decoder.noise.total_noise(torch.tensor([0.25])).expand(len(x))
    log_p = network.network.log_score(x, level).log_softmax(-1)
    value = log_p.gather(-1, x[..., None]).sum((1, 2))
    loss = -(actions.advantage * value * actions.weight).sum()
    grads = torch.autograd.grad(loss, list(network.network.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]))


def test_modes_differ_and_each_has_a_gradient():
    """A mode that fell back to another one would go unnoticed otherwise."""
    found = []
    for mode in ("conditional", "ball", "joint"):
        algorithm = Sepo(mode=mode, normalise_std=False)
        models, scored = scored_by(algorithm, UNIFORM)
        found.append(gradient(models, algorithm, actions_of(algorithm, scored)))
    for mode in ("elbo", "pseudo_likelihood"):
        algorithm = Sepo(mode=mode, normalise_std=False, masks=2)
        models, scored = scored_by(algorithm, MASKED)
        found.append(gradient(models, algorithm, actions_of(algorithm, scored)))
    assert all(g.norm() > 1e-6 for g in found)
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[3], found[4])


@pytest.mark.parametrize("coefficient", ["plain", "ppo_min", "capped"])
def test_coefficients_agree_before_the_first_update(coefficient):
    """At ratio 1 nothing is clipped, whatever the bounds."""
    plain = Sepo(coefficient="plain")
    models, scored = scored_by(plain, MASKED)
    other = Sepo(coefficient=coefficient, clip_low=0.1, clip_high=0.3)
    expected = gradient(models, plain, actions_of(plain, scored))
    assert torch.equal(gradient(models, other, actions_of(other, scored)), expected)


def test_groups_without_spread_are_left_out():
    algorithm = Sepo()
    _, scored = scored_by(algorithm, UNIFORM)
    scored = replace(scored, reward=torch.where(scored.reward.argsort() >= 0, 1.0, 0.0).double())
    assert len(algorithm.credit(scored).pairs()) == 0


def test_standard_deviation_is_divided_out():
    """Rewards ten times as large give the same advantages, but for the 1e-8."""
    algorithm = Sepo()
    _, scored = scored_by(algorithm, UNIFORM)
    large = replace(scored, reward=10 * scored.reward)
    found, expected = (algorithm.credit(s).advantage for s in (large, scored))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = replace(algorithm, normalise_std=False)
    torch.testing.assert_close(plain.credit(large).advantage, 10 * plain.credit(scored).advantage)


def test_the_critic_is_subtracted_before_it_learns():
    """Advantage r - V with the V of earlier rollouts; the first rollout only fits V."""
    algorithm = Sepo(baseline="critic", normalise_std=False, critic_lr=0.02, critic_epochs=3)
    models, scored = scored_by(algorithm, UNIFORM)
    credited = algorithm.credit(scored)
    assert len(credited.pairs()) == 0
    algorithm.fit(models, credited)
    assert models.critic is not None
    assert isinstance(models.critic, Critic) and isinstance(scored.trajectory.prompts, Prompts)
    value = models.critic.value(scored.trajectory.prompts)
    torch.testing.assert_close(value.double(), scored.reward.mean().expand(8), atol=0.1, rtol=0)
    again = algorithm.annotate(models, replace(scored, notes={}), SampleRng(0, torch.arange(8)))
    found = algorithm.credit(again)
    torch.testing.assert_close(found.advantage[:, 0], scored.reward - value.detach().double())
    assert len(found.pairs()) == 8


def test_the_path_kl_is_positive_and_zero_against_itself():
    algorithm = Sepo(beta=1.0, kl_steps=4)
    models, scored = scored_by(algorithm, MASKED)
    actions = actions_of(algorithm, scored)
    rng = SampleRng(0, actions.trajectory.prompts.sample_id)
    kl = algorithm.loss(models, actions, rng).metrics["kl_new_ref"]
    assert (kl >= 0).all() and kl.mean() > 1e-3
    same = replace(models, ref=models.new)
    again = algorithm.annotate(same, replace(scored, notes={}), SampleRng(0, torch.arange(8)))
    actions = actions_of(algorithm, again)
    assert algorithm.loss(same, actions, rng).metrics["kl_new_ref"].abs().max() < 1e-12


def test_a_table_too_large_to_keep_changes_nothing(monkeypatch):
    """The laws of the reference, computed anew in every update, are those that were kept."""
    algorithm = Sepo(beta=1.0, kl_steps=4)
    models, scored = scored_by(algorithm, MASKED)
    monkeypatch.setattr(sepo, "KEPT_BYTES", 0)
    _, without = scored_by(algorithm, MASKED)
    assert "log_p_ref" in scored.notes and "log_p_ref" not in without.notes
    rng = SampleRng(0, torch.arange(8))
    kept, anew = (algorithm.loss(models, actions_of(algorithm, s), rng) for s in (scored, without))
    assert torch.equal(kept.loss, anew.loss)


class Excluding(RatePolicy):
    """Never moves to state 0."""

    def transition(self, trajectory, step, score):
        seen = super().transition(trajectory, step, score)
        law = seen.log_p.clone()
        law[..., 0] = -torch.inf
        return replace(seen, law=lambda: law)


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_what_the_reference_excludes_has_a_finite_kl(monkeypatch, kept_bytes):
    """A clipped step gives probability 0 to what the policy does: counted as 1e-6, no NaN."""
    algorithm = Sepo(beta=1.0, kl_steps=4)
    monkeypatch.setattr(sepo, "KEPT_BYTES", kept_bytes)
    models, scored = scored_by(algorithm, MASKED)
    assert isinstance(models.ref, RatePolicy)
    models = replace(models, ref=Excluding(models.ref.network, models.ref.decoder))
    rng = SampleRng(0, scored.trajectory.prompts.sample_id)
    actions = actions_of(algorithm, algorithm.annotate(models, scored, rng))
    kl = algorithm.loss(models, actions, SampleRng(0, torch.arange(8))).metrics["kl_new_ref"]
    assert kl.isfinite().all() and kl.mean() > 1
    assert gradient(models, algorithm, actions).isfinite().all()


def test_the_path_kl_is_the_sum_over_its_steps():
    """With all four steps kept it is what the transitions say of them, added up."""
    decoder = RateDecoder(steps=3, corrector_steps=1)
    algorithm = Sepo(beta=1.0, kl_steps=4)
    models, scored = scored_by(algorithm, MASKED, n=8, decoder=decoder)
    actions = actions_of(algorithm, scored)
    path = actions.trajectory
    found = algorithm.loss(models, actions, SampleRng(0, path.prompts.sample_id))
    assert models.ref is not None
    total = torch.zeros(())
    for k in range(4):
        step = torch.full((len(path.log_prob),), k)
        new, ref = (m.transition(path, step, Score()) for m in (models.new, models.ref))
        gap = torch.where(new.log_p.isfinite(), new.log_p - ref.log_p, 0.0)
        total = total + torch.where(new.revealed[..., None], new.log_p.exp() * gap, 0.0).sum((1, 2))
    torch.testing.assert_close(found.metrics["kl_new_ref"], total.detach())


def test_random_steps_estimate_the_path_kl():
    """The mean over draws of ``kl_steps=1`` is the sum over all steps, up to the sampling error."""
    decoder = RateDecoder(steps=3, corrector_steps=1)
    every, one = Sepo(beta=1.0, kl_steps=4), Sepo(beta=1.0, kl_steps=1)
    values = []
    for algorithm in (every, one):
        models, scored = scored_by(algorithm, MASKED, n=4000, decoder=decoder)
        actions = actions_of(algorithm, scored)
        rng = SampleRng(0, actions.trajectory.prompts.sample_id)
        values.append(algorithm.loss(models, actions, rng).metrics["kl_new_ref"])
    gap = values[0] - values[1]  # the paths are the same
    assert gap.mean().abs() < 4 * gap.std() / len(gap) ** 0.5
    assert gap.std() > 0


def pretrained(seed: int) -> Mlp:
    """Small scores of a random law of two positions, trained on its samples, not told the noise."""
    network = Mlp(UNIFORM, 2, seed=seed, hidden=32, timed=False)
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand(16, generator=generator) ** 2
    number = torch.multinomial(law, 4000, replacement=True, generator=generator)
    x_0 = torch.stack([number // 4, number % 4], 1)
    data = Examples(x_0=x_0, editable=torch.ones_like(x_0, dtype=torch.bool))
    config = Supervised(steps=300, batch=128, lr=1e-2, validate_every=300, validation_rows=256)
    fit(network, data, data, config, generator)
    return network


@pytest.mark.parametrize(
    ("seed", "lr", "updates"),
    [
        (0, 3e-3, 60),
        pytest.param(0, 1e-3, 150, marks=pytest.mark.slow),
        pytest.param(1, 1e-3, 150, marks=pytest.mark.slow),
    ],
)
def test_sepo_learns(seed, lr, updates):
    """T20: from pre-trained scores, at least half of what there is to win in 150 updates."""
    decoder, algorithm = RateDecoder(steps=16), Sepo(baseline="leave_one_out", normalise_std=False)
    network = pretrained(seed)
    models = Models(new=policy_of(network, decoder, 4096))
    reward = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).double()
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    prompts = replace(blank(128, 2), group=torch.arange(128) // 8)
    curve = []
    for step in range(updates):
        rng = SampleRng(step, prompts.sample_id)
        selected = algorithm.select(models, models.new.sample(prompts, algorithm.record, rng))
        earned = reward[selected.trajectory.x_0.unbind(1)]
        curve.append(earned.mean().item())
        scored = Scored(**selected.fields(), reward=earned, terms={})
        actions = actions_of(algorithm, algorithm.annotate(models, scored, rng))
        terms = algorithm.loss(models, actions, rng)
        optimizer.zero_grad()
        (terms.loss * actions.weight).sum().backward()
        optimizer.step()
    start, end = curve[0], sum(curve[-10:]) / 10
    assert end >= start + 0.5 * (reward.max().item() - start)


REFUSED = [
    (Sepo(mode="conditional"), MASKED, "do not depend on its weights"),
    (Sepo(mode="elbo"), UNIFORM, "behind masks"),
    (Sepo(mode="joint", likelihood="network"), UNIFORM, "no log_likelihood"),
]


@pytest.mark.parametrize(("algorithm", "process", "message"), REFUSED)
def test_modes_that_the_network_cannot_serve_are_refused(algorithm, process, message):
    with pytest.raises(ValueError, match=message):
        scored_by(algorithm, process)


@pytest.mark.parametrize(("algorithm", "process", "message"), REFUSED[:2])
def test_a_run_refuses_them_before_anything_is_built(algorithm, process, message):
    """A base that knows its noise says so first; pairs of masks are for the mode that uses them."""
    run = run_of(algorithm, process)
    with pytest.raises(ValueError, match=message):
        run.check()
    run_of(Sepo(masks=3), UNIFORM).check()
    with pytest.raises(ValueError, match="masks=3"):
        run_of(Sepo(masks=3), MASKED).check()


@pytest.mark.parametrize("mode", ["elbo", "pseudo_likelihood"])
def test_samples_with_fewer_positions_than_masks_have_finite_gradients(mode):
    """Also one with nothing to write, which is not trained on; a network that divides by noise."""
    config = SeddConfig(vocab_size=4, length=L, width=16, depth=1, heads=2, cond_width=8)
    network = config.network(torch.Generator().manual_seed(0))
    for p in network.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3, generator=torch.Generator().manual_seed(1))
    algorithm = Sepo(mode=mode, baseline="none", normalise_std=False)
    models = Models(new=policy_of(network, RateDecoder(steps=4), 64))
    editable = torch.arange(L) < torch.tensor([0, 1, 2, 3])[:, None]
    prompts = replace(blank(4, L), editable=editable)
    prompts = replace(prompts, tokens=torch.where(editable, 4, 1))
    rng = SampleRng(0, prompts.sample_id)
    selected = algorithm.select(models, models.new.sample(prompts, algorithm.record, rng))
    scored = Scored(**selected.fields(), reward=torch.ones(4), terms={})
    actions = actions_of(algorithm, algorithm.annotate(models, scored, rng))
    assert len(actions.step) == 3
    terms = algorithm.loss(models, actions, rng)
    (terms.loss * actions.weight).sum().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in grads) and any(bool((g != 0).any()) for g in grads)


SETTINGS = [
    (Sepo(masks=0), {}, "masks must be at least 1"),
    (Sepo(mode="ball", baseline="none"), {}, "invariant"),
    (Sepo(beta=-1.0), {}, "beta=-1.0"),
    (Sepo(beta=1.0, kl_steps=5), {}, "kl_steps=5"),
    (Sepo(clip_low=1.5), {}, "clip_low"),
    (Sepo(critic_lr=0.0), {}, "critic_lr"),
    (Sepo(), {"group_size": 1}, "group_size=1"),
    (Sepo(baseline="critic"), {"group_size": 1}, "normalise_std"),
    (Sepo(), {"decoder": Decoder(steps=4)}, "use a RateDecoder"),
]


@pytest.mark.parametrize(("algorithm", "changes", "message"), SETTINGS)
def test_settings_that_cannot_work_are_refused(algorithm, changes, message):
    arguments = {"decoder": RateDecoder(steps=4), "group_size": 4, "terms": ["r"]} | changes
    with pytest.raises(ValueError, match=message):
        algorithm.check(**arguments)


def test_snis_refuses_a_vocabulary_beyond_its_memory():
    """The error says how much it would need; nothing of that size is allocated."""
    algorithm = Sepo(mode="joint", snis_draws=1000)
    n_states = SNIS_BYTES // (1000 * L * 4) + 1
    process = Uniform(n_states)

    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.process: Process = process

        def log_score(
            self, x_t: Tensor, total_noise: Tensor, *, attend: Tensor | None = None
        ) -> Tensor:
            raise AssertionError("the network was asked")

    network = Never()
    assert isinstance(network, ScoreNetwork)
    models, scored = scored_by(Sepo(), UNIFORM)
    models = replace(models, new=policy_of(network, RateDecoder(steps=4), 8))
    with pytest.raises(ValueError, match=r"2\.0 GiB per sample \(at most 2\)"):
        algorithm.annotate(models, replace(scored, notes={}), SampleRng(0, torch.arange(8)))
