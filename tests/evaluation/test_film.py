"""The film of one prompt: frame k is the canvas before step k, the last one the output."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from rescore.evaluation.film import film_strip
from rescore.models.tiny import TableDenoiser
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from tiny import L, Match, V


@pytest.mark.parametrize("number", [0, 1])  # 21: its first digit is given; 22: nothing is
def test_frames_fill_up_from_the_prompt_to_the_output(number):
    generator = torch.Generator().manual_seed(0)
    policy = MaskedPolicy(
        TableDenoiser(V, L, generator=generator), Decoder(steps=3, order="left_to_right")
    )
    task, index = Match(), torch.tensor([number])
    strip = film_strip(policy, task, "test", number, seed=4, label="before", device="cpu")
    assert json.loads(json.dumps(strip)) == strip
    prompts = task.prompts("test", index)
    path = policy.sample(prompts, Record(), SampleRng(4, index))
    assert strip["label"] == "before"
    assert strip["given"] == (~prompts.editable[0]).tolist() == [number == 0, False, False]
    assert strip["solution"] == ["abc"[t] for t in prompts.info["target"][0].tolist()]
    assert [frame["step"] for frame in strip["frames"]] == [0, 1, 2, 3]
    frames = [frame["cells"] for frame in strip["frames"]]
    assert frames[0] == ["abc."[t].replace(".", "") for t in prompts.tokens[0].tolist()]
    assert frames[-1] == ["abc"[t] for t in path.x_0[0].tolist()]
    for before, after in itertools.pairwise(frames):
        assert all(a in ("", b) for a, b in zip(before, after, strict=True)), "nothing is erased"
    empty = [cells.count("") for cells in frames]
    assert empty == ([2, 1, 0, 0] if number == 0 else [3, 2, 1, 0])
    terms = task.reward.terms(path.x_0, prompts)
    right, whole = terms["matches"].item(), terms["solved"].item()
    assert strip["note"] == f"matches {right:.2f}, solved {whole:.2f}"


def test_two_films_of_a_prompt_share_their_noise():
    """The noise is that of evaluation: prompt number and seed."""
    generator = torch.Generator().manual_seed(0)
    policy = MaskedPolicy(TableDenoiser(V, L, generator=generator), Decoder(steps=2))

    def film(seed: int):
        return film_strip(policy, Match(), "train", 2, seed=seed, label="", device="cpu")["frames"]

    assert film(0) == film(0)
    assert any(film(0) != film(seed) for seed in range(1, 5))
