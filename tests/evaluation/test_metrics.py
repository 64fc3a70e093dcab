"""Evaluation: paired noise, independent of the batch, and honest standard errors."""

from __future__ import annotations

import pytest
import torch

from rescore.evaluation.metrics import evaluate, mean_and_error, summarise
from rescore.models.tiny import TableDenoiser
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from tiny import L, Match, V, tiny_run, tiny_world


def table(scale: float = 1.0, seed: int = 0, *, steps: int = 1) -> MaskedPolicy:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(steps=steps, temperature=1.0)
    return MaskedPolicy(TableDenoiser(V, L, generator=generator, scale=scale), decoder)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_results_do_not_depend_on_the_batch_size(batch_size):
    """Nor on the order or the company of the prompts: noise belongs to the prompt's number."""
    policy, index = table(steps=3), torch.arange(15)
    whole = evaluate(policy, Match(), "train", index, seed=3)
    cut = evaluate(policy, Match(), "train", index, seed=3, batch_size=batch_size)
    turned = evaluate(policy, Match(), "train", index.flip(0), seed=3, batch_size=batch_size)
    assert whole.keys() == {"reward", "matches", "solved"}
    for name, value in whole.items():
        assert torch.equal(cut[name], value)
        assert torch.equal(turned[name].flip(0), value)


def test_two_policies_meet_the_same_noise():
    """The inverse CDF of the same uniforms: nearby policies mostly draw the same tokens."""
    index = torch.arange(15)
    one = evaluate(table(1.0), Match(), "train", index, seed=3)
    same = evaluate(table(1.0 + 1e-9), Match(), "train", index, seed=3)
    assert torch.equal(one["matches"], same["matches"])
    other = evaluate(table(1.0), Match(), "train", index, seed=4)
    assert not torch.equal(one["matches"], other["matches"])


def test_terms_are_those_of_the_samples_drawn_by_name():
    """The first prompts' numbers from the sampler itself."""
    policy, index = table(), torch.tensor([2, 5])
    prompts = Match().prompts("test", index)
    outputs = policy.sample(prompts, Record(), SampleRng(9, index)).x_0
    values = evaluate(policy, Match(), "test", index, seed=9)
    expected = (outputs == prompts.info["target"]).double()
    torch.testing.assert_close(values["matches"], expected.mean(1))
    assert values["solved"].tolist() == expected.prod(1).tolist()
    torch.testing.assert_close(values["reward"], values["matches"] + values["solved"])


def test_a_perfect_policy_earns_everything():
    """Prompts of a world with one target, and a table that puts all its mass there."""
    world = tiny_world(tiny_run())
    policy = table(0.0)
    assert isinstance(policy.denoiser, TableDenoiser)
    target = Match().prompts("test", torch.tensor([3])).info["target"][0]
    with torch.no_grad():
        policy.denoiser.table[..., torch.arange(L), target] = 1000.0
    values = evaluate(policy, world.run.task, "test", torch.tensor([3]), seed=0)
    assert {name: value.tolist() for name, value in values.items()} == {
        "matches": [1.0],
        "solved": [1.0],
        "reward": [2.0],
    }


def test_standard_error_by_hand():
    """1, 2, 4, 9: mean 4, sample variance 38 / 3, error sqrt(38 / 3 / 4)."""
    result = mean_and_error(torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert result["mean"] == 4.0
    assert result["se"] == pytest.approx((38 / 3 / 4) ** 0.5, rel=1e-12)
    assert mean_and_error(torch.tensor([3.0])) == {"mean": 3.0, "se": 0.0}


def test_means_are_taken_in_double_precision():
    """A float32 sum of many values near 16777216 would be off."""
    value = torch.full((10_001,), 16777216.0)
    value[0] = 16777218.0
    assert mean_and_error(value)["mean"] == pytest.approx(16777216 + 2 / 10_001, abs=1e-8)


def test_every_term_is_summarised():
    values = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0, 2.0])}
    assert summarise(values) == {"a": {"mean": 0.5, "se": 0.5}, "b": {"mean": 2.0, "se": 0.0}}
