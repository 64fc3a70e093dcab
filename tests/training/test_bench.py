"""The bench makes the same network calls as an RL step, and counts them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from gaussians import SOLVERS, GaussianTask, gaussian_policy, gaussian_run, gaussian_world
from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.egspo import Egspo
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.models.finetune import Lora
from rescore.models.value import value_critic_for
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.training.bench import (
    Call,
    CriticCall,
    Recorder,
    measure,
    print_rows,
    recorded,
    replay_critic,
    serves,
)
from rescore.training.optim import Optim
from rescore.training.recipes import recipes, run_of
from tiny import Match, TransformerBase, masked_policy, tiny_run, tiny_world


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        # 3 forwards of 16 canvases; 3 steps of each in an update, those of equal groups left out
        ({}, (48 + 24, 48 + 48)),
        # the reference sees the 2 chosen steps once per rollout; every chosen step is trained on
        ({"algorithm": Egspo(n_steps=2, beta=0.1)}, (48 + 32 + 30, 48 + 32 + 32)),
        (
            {
                "algorithm": Egspo(n_steps=2, beta=0.1, kl="exact"),
                "optim": Optim(epochs=2, mini_batches=2),
                "base": TransformerBase(),
                "lora": Lora(rank=2),
            },
            ((48 + 2 * 2 * 30) / 4, (48 + 2 * 2 * 32) / 4),
        ),
        ({"precision": "bfloat16", "base": TransformerBase()}, (48, 48 + 48)),
    ],
    ids=["reinforce", "egspo", "adapters", "bfloat16"],
)
def test_a_row_has_every_figure(changes, rows):
    """All of them, with the rows of the network calls of an update."""
    row = measure("tiny", tiny_run(**changes), repeats=5)
    figures = dataclasses.asdict(row)
    assert json.loads(json.dumps(figures)) == figures
    assert figures.keys() >= {
        *("recipe", "overhead", "rollout_s", "reward_s", "update_s", "bare_s", "rows", "peak_mb")
    }
    assert row.recipe == "tiny"
    assert row.overhead > 0.9
    assert rows[0] <= row.rows <= rows[1]
    assert row.batch == 16
    assert row.threads == torch.get_num_threads()
    assert row.peak_mb > 10
    assert min(row.rollout_s, row.reward_s, row.update_s, row.bare_s) > 0
    assert row.other_s >= 0


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        # 5 forwards of 16 states; the 4 with noise in an update
        ({"algorithm": Ddpo(statistics="batch")}, 80 + 64),
        # the reference is asked once per rollout, the policy in each of four half updates
        (
            {
                "algorithm": Ddpo(beta=0.1),
                "optim": Optim(epochs=2, mini_batches=2),
                "task": GaussianTask(labels=3),
            },
            (80 + 64 + 2 * 64) / 4,
        ),
        # two steps need two states in an update, and the reference those before as well
        ({"algorithm": FlowGrpo(), **SOLVERS["two_steps"]}, 80 + 64 + 2 * 64),
        ({"algorithm": Dpok(), "precision": "bfloat16"}, 80 + 64 + 64),
    ],
    ids=["ddpo", "reference", "two steps", "critic"],
)
def test_states_are_rows(changes, rows):
    """Networks for Gaussian noise: every call of theirs is recorded and made again."""
    run = gaussian_run(**changes)
    row = measure("gaussian", run, repeats=5)
    assert row.rows == rows
    assert min(row.rollout_s, row.update_s, row.bare_s) > 0
    assert row.overhead > 0.9


@pytest.mark.parametrize("form", ["ppo", "score_gradient"])
def test_the_calls_of_a_critic_are_made_again(form, monkeypatch):
    """16 paths of 5 states: valued, fitted twice in batches of 40, asked for slopes; no more."""
    calls: list[list[tuple[bool, bool, int]]] = []

    def note(critic, made):
        calls.append([(call.grad, call.inputs[0].requires_grad, len(call[1][0])) for call in made])
        return replay_critic(critic, made)

    monkeypatch.setattr("rescore.training.bench.replay_critic", note)
    algorithm = ScoreAsAction(form=form, design="linear", critic_epochs=2, critic_batch=40)
    assert measure("gaussian", gaussian_run(algorithm=algorithm), repeats=5).overhead > 0.9
    slopes = [(True, True, 80)] * (form == "score_gradient")
    assert calls == [[(False, False, 80), *slopes, *[(True, False, 40)] * 4]] * 7


def test_a_critic_made_again_is_trained():
    """Batches without a gradient of the state are steps of its optimiser; others leave it alone."""
    critic = value_critic_for((2,), {}, n_labels=0, design="plain", seed=0)
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    before = [p.detach().clone() for p in critic.parameters()]
    asked = x.clone().requires_grad_()
    replay_critic(critic, [CriticCall(False, (x, t, {})), CriticCall(True, (asked, t, {}))])
    assert all(map(torch.equal, before, critic.parameters()))
    replay_critic(critic, [CriticCall(True, (x, t, {}))])
    assert not any(map(torch.equal, before, critic.parameters()))


def test_a_recorded_network_says_the_same():
    """Also what it is, and how it is counted; the states in float64 stay so."""
    policy = gaussian_policy(gaussian_world(gaussian_run()).models.new)
    calls: list[Call] = []
    other = gaussian_policy(recorded(policy, calls, of_reference=True))
    prompts, rng = GaussianTask().prompts("train", torch.arange(3)), SampleRng(0, torch.arange(3))
    path = other.sample(prompts, Record(moves="all"), rng)
    assert torch.equal(path.path, policy.sample(prompts, Record(moves="all"), rng).path)
    assert path.x_0.dtype == torch.float64
    assert [(call.grad, call.of_reference) for call in calls] == [(False, True)] * 5
    assert torch.equal(calls[2].inputs[0], path.path[:, 2])
    other.transition(path, torch.tensor([0, 1, 2]), Score())
    assert calls[5].grad
    assert other.rows == 18


def test_few_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=4; the median needs at least 5"):
        measure("tiny", tiny_run(), repeats=4)


def test_large_models_are_measured_only_when_asked_for():
    """They would take a hub, or a card, that all others have no use for."""
    named = {name: serves(run_of(name)) for name in recipes()}
    assert named["sudoku_egspo"] and named["digits_ddpo"] and named["dna_sepo"]
    assert not any(named[name] for name in ("sd15_ddpo", "sd3_flow_grpo", "llada_sudoku_egspo_sa"))
    assert serves(tiny_run()) and not serves(tiny_run(batch_size=18))  # nor what cannot work


def test_a_run_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="batch_size=18 is not divisible"):
        measure("tiny", tiny_run(batch_size=18))


def test_the_recorder_passes_calls_on_and_notes_them():
    """Same logits; whether gradients were on, and the inputs."""
    network = masked_policy(tiny_world(tiny_run()).models.new).denoiser
    recorder = Recorder(network)
    x_t = Match().prompts("train", torch.arange(5)).tokens
    positions = torch.zeros(5, 1, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(
            recorder.predict(x_t, positions=positions), network.predict(x_t, positions=positions)
        )
    recorder.predict(x_t)
    assert [call.grad for call in recorder.calls] == [False, True]
    assert all(call.method == "predict" for call in recorder.calls)
    assert all(len(call.inputs) == 1 and call.inputs[0] is x_t for call in recorder.calls)
    assert recorder.calls[0].options["positions"] is positions
    assert recorder.calls[1].options.get("positions") is None
    assert sum(len(call.inputs[0]) for call in recorder.calls) == 10
    assert (recorder.vocab_size, recorder.mask_id) == (network.vocab_size, network.mask_id)


def test_the_table_shows_every_row(capsys):
    one = measure("one", tiny_run(), repeats=5)
    print_rows([one, dataclasses.replace(one, recipe="two")])
    printed = capsys.readouterr().out
    assert "one" in printed
    assert "two" in printed
    assert "overhead" in printed
