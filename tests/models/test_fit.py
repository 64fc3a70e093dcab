"""The supervised fit: what it learns, what it reports, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from rescore.models.fit import Fit, Labelled, fit, predict, score


class Linear(nn.Module):
    """w . x + b for one member, or for several side by side."""

    def __init__(self, features: int, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, features, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight.movedim(-1, 0) + self.bias


def lines(n: int, seed: int, noise: float = 0.0, features: int = 2) -> Labelled:
    """y = 2 x_0 - x_1 + 3, with Gaussian errors; only some of the features are shown."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    error = noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return Labelled(inputs=x[:, :features], targets=2 * x[:, 0] - x[:, 1] + 3 + error)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CONFIG = Fit(epochs=40, batch=32, lr=0.1, weight_decay=0.0)


def test_a_line_is_found():
    """Squared loss on noiseless data of a linear law recovers its coefficients, and R2 is 1."""
    module = Linear(2)
    found = fit(module, lines(256, 0), lines(64, 1), CONFIG, seeded())
    torch.testing.assert_close(
        module.weight.data, torch.tensor([2.0, -1.0]).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(module.bias.data, torch.tensor(3.0).double(), atol=1e-3, rtol=0)
    assert found == pytest.approx(1.0, abs=1e-5)


def test_the_score_is_r2_of_held_out_rows():
    """By hand: targets 0 2 4, predictions 1 2 3 leave 2 of 8, so R2 is 3 / 4."""
    module = Linear(1)
    module.weight.data.fill_(1.0)
    rows = Labelled(
        inputs=torch.tensor([[1.0], [2.0], [3.0]]).double(), targets=torch.tensor([0.0, 2.0, 4.0])
    )
    assert score(module, rows, CONFIG) == pytest.approx(0.75)
    still = dataclasses.replace(CONFIG, epochs=1, lr=1e-12)
    assert fit(module, lines(8, 0, features=1), rows, still, seeded()) == pytest.approx(0.75)


def test_the_score_of_a_classifier_is_its_share_of_right_answers():
    """By hand: log-odds 1 -2 3 against labels 1 1 1 are right twice in three."""
    module = Linear(1)
    module.weight.data.fill_(1.0)
    rows = Labelled(inputs=torch.tensor([[1.0], [-2.0], [3.0]]).double(), targets=torch.ones(3))
    assert score(module, rows, Fit(loss="logistic")) == pytest.approx(2 / 3)


def test_the_logistic_fit_finds_the_log_odds():
    """With three quarters of all labels 1 and nothing to go by, the answer is log 3."""
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(64)
    data = Labelled(inputs=torch.zeros(256, 1, dtype=torch.float64), targets=labels)
    module = Linear(1)
    assert fit(module, data, data, dataclasses.replace(CONFIG, loss="logistic"), seeded()) == 0.75
    assert module.bias.item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.01)


def test_members_learn_as_they_would_alone():
    """A column of an ensemble ends where a network by itself does, given the same rows in turn."""
    data, held_out = lines(64, 2, noise=0.5), lines(32, 3, noise=0.5)
    config = dataclasses.replace(CONFIG, epochs=3)
    alone, together = Linear(2), Linear(2, 3)
    fit(alone, data, held_out, config, seeded())
    fit(together, data, held_out, config, seeded())
    for member in range(3):
        torch.testing.assert_close(together.weight[member], alone.weight)
    torch.testing.assert_close(predict(together, held_out.inputs), predict(alone, held_out.inputs))


def test_the_prediction_of_an_ensemble_is_the_mean_of_its_members():
    module = Linear(1, 2)
    module.bias.data = torch.tensor([1.0, 4.0]).double()
    assert predict(module, torch.zeros(3, 1).double()).tolist() == [2.5] * 3


def test_the_generator_alone_decides_the_order():
    """The same generator gives the same bits, another other ones; the global one is untouched."""
    ends = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(ends))
        before = torch.get_rng_state()
        module = Linear(2)
        fit(
            module,
            lines(64, 2, 0.5),
            lines(8, 3),
            dataclasses.replace(CONFIG, epochs=2),
            seeded(seed),
        )
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(module.weight.data.clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -1.0),
        ("warmup", -1),
    ],
)
def test_a_configuration_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Fit(**{field: value})


def test_bad_data_is_refused():
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        Labelled(inputs=x, targets=torch.zeros(2))
    with pytest.raises(ValueError, match="at least one"):
        Labelled(inputs=x[:0], targets=torch.zeros(0))
    with pytest.raises(ValueError, match="target 1 is nan"):
        Labelled(inputs=x, targets=torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="target 2 is 1.5"):
        data = Labelled(inputs=x.double(), targets=torch.tensor([0.0, 1.0, 1.5]))
        fit(Linear(1), data, data, Fit(loss="logistic"), seeded())


def test_a_loss_that_is_not_finite_stops_the_fit():
    data = lines(64, 0)
    broken = Linear(2)
    broken.bias.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"the loss is inf at step 0; lower lr"):
        fit(broken, data, data, CONFIG, seeded())
