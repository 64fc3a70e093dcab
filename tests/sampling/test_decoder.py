"""Decoders and scores refuse what they cannot mean."""

import math

import pytest

from gaussians import linear_network
from rescore.processes.gaussian_schedules import RectifiedFlow, VariancePreserving
from rescore.sampling.decoder import Decoder, GaussianDecoder
from rescore.sampling.policy import policy_of
from rescore.sampling.record import Score


def test_steps_are_shared_by_the_blocks():
    """steps / blocks steps per block; the text names every choice."""
    decoder = Decoder(steps=6, blocks=3, order="low_confidence", temperature=0.9)
    assert decoder.steps_per_block == 2
    assert str(decoder) == "6 steps, 3 blocks, low confidence order, temperature 0.9"
    assert str(Decoder(steps=4)) == "4 steps, random order, temperature 1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "blocks": 2}, "steps=5 does not split into blocks=2"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 4, "blocks": 0}, "blocks=0"),
        ({"steps": 4, "temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"steps": 4, "position_temperature": 0.0}, "position_temperature must be positive"),
    ],
)
def test_impossible_decoders_are_refused(fields, message):
    """The message says what was got."""
    with pytest.raises(ValueError, match=message):
        Decoder(**fields)


def test_temperature_zero_decodes_greedily():
    """It is allowed: evaluation uses it."""
    assert Decoder(steps=4, temperature=0.0).temperature == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_score_needs_a_positive_temperature(temperature):
    """Scoring a greedy law has no gradient."""
    with pytest.raises(ValueError, match=f"score_temperature must be positive, got {temperature}"):
        Score(score_temperature=temperature)


@pytest.mark.parametrize("temperature", [math.nan, math.inf])
def test_temperatures_that_are_no_numbers_are_refused(temperature):
    """NaN passes every comparison that asks for what is wrong; ask for what is right."""
    with pytest.raises(ValueError, match="temperature"):
        Decoder(steps=2, temperature=temperature)


@pytest.mark.parametrize(
    ("schedule", "fields", "message"),
    [
        (VariancePreserving(), {"eta": 1.5}, "more than there is at s.*take a smaller eta"),
        (
            VariancePreserving(),
            {"eta": 0.5, "eta_end": 1.5},
            "eta goes from 0.5 to eta_end=1.5, where ddim cannot follow: .* take a smaller eta",
        ),
        (VariancePreserving(), {"solver": "flow_sde", "eta": 0.7}, "flow_sde is for a Rectified"),
        (RectifiedFlow(), {"solver": "euler_maruyama"}, "start below t = 1"),
    ],
)
def test_a_network_that_the_solver_cannot_serve_is_refused_before_any_sample(
    schedule, fields, message
):
    """Also what would fail at the end of a run only."""
    network = linear_network(schedule=schedule, prediction="v")
    with pytest.raises(ValueError, match=message):
        policy_of(network, GaussianDecoder(steps=5, **fields), 64)


def test_eta_above_1_is_allowed_where_short_steps_leave_room():
    """S = eta sigma_s sqrt(1 - e^-2h) is below sigma_s there."""
    decoder = GaussianDecoder(steps=50, t_min=0.3, eta=0.5, eta_end=1.5)
    decoder.check(VariancePreserving(), "v")
