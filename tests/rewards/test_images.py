"""Rewards of pixels: what images must be, by hand and against Pillow."""

from __future__ import annotations

import io
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from rescore.rewards.images import (
    brightness,
    checked,
    checked_texts,
    jpeg_size,
    to_bytes,
    warn_if_black,
)
from rescore.rewards.reward import Reward, RewardError
from rescore.types import Conditions


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# What every image must be


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.zeros(2, 8, 8), r"shape \(2, 8, 8\); expected .*[B 1 H W]"),
        (torch.zeros(2, 8, 8, 3), r"shape \(2, 8, 8, 3\)"),  # channels last
        (torch.zeros(2, 4, 8, 8), r"shape \(2, 4, 8, 8\)"),  # latents
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"are torch.uint8"),
        (torch.stack([noise(1, 8, 8), noise(1, 8, 8) * 2 - 1]), r"image 1 has values from -0\.9"),
        (
            torch.stack([noise(1, 8, 8) * 255]),
            r"image 0 has values .* to 25\d.*divide bytes by 255",
        ),
        (torch.full((1, 1, 8, 8), float("nan")), r"image 0 .* not a number .*overflows"),
        (torch.full((1, 1, 8, 8), float("inf")), r"image 0 has values from inf"),
    ],
)
def test_what_is_no_image_is_refused(images, complaint):
    with pytest.raises(ValueError, match=complaint.replace("[B", r"\[B").replace("W]", r"W\]")):
        checked(images)


def test_both_ends_of_the_range_are_images():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    assert checked(ends).tolist() == ends.tolist()
    assert checked(ends).dtype == torch.float32
    assert checked(ends[:0]).shape == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ("ab", "are a str; expected a list of str"),  # two letters are no two texts
        (None, "are a NoneType"),
        (["a"], "are 1 texts for 2 images; expected one"),
        (["a", 3], "one of them a int"),
    ],
)
def test_texts_are_one_per_image(texts, complaint):
    with pytest.raises(ValueError, match=complaint):
        checked_texts(texts, 2)
    assert checked_texts(("a", "b"), 2) == ["a", "b"]


def test_levels_are_rounded_not_cut():
    """0.998 * 255 = 254.49 and 0.9985 * 255 = 254.62; the last axis is the channel."""
    levels = to_bytes(torch.tensor([0.0, 0.998, 0.9985]).reshape(1, 3, 1, 1))
    assert levels.dtype == torch.uint8
    assert levels.tolist() == [[[[0, 254, 255]]]]


def test_black_batches_are_warned_of():
    """From one half on; an image is black if every value rounds to 0 of 255."""
    black, dim = torch.full((1, 4, 4), 0.0019), torch.zeros(1, 4, 4)
    dim[0, 3, 3] = 0.0021
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_if_black(torch.stack([black, dim, dim]))
        assert not warn_if_black(torch.zeros(0, 1, 4, 4))
    with pytest.warns(UserWarning, match="67% of 3 images are black"):
        assert warn_if_black(torch.stack([black, dim, black]))


# Rewards


def test_brightness_is_the_mean():
    """By hand: grey 2/8, and an RGB image with one full channel."""
    grey = torch.zeros(1, 1, 2, 4)
    grey[0, 0, 1, 1:3] = 1
    torch.testing.assert_close(brightness(grey), torch.tensor([0.25]))
    rgb = torch.zeros(2, 3, 5, 7)
    rgb[1, 0] = 1
    torch.testing.assert_close(brightness(rgb), torch.tensor([0.0, 1 / 3]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_jpeg_size_is_the_length_of_pillows_file(channels, mode):
    images = noise(2, channels, 16, 24)
    expected = []
    for image in images:
        levels = np.asarray((image * 255).round().permute(1, 2, 0), dtype=np.uint8)
        file = io.BytesIO()
        picture = Image.fromarray(levels if channels == 3 else levels[..., 0])
        assert picture.mode == mode
        picture.save(file, format="JPEG", quality=70)
        expected.append(len(file.getvalue()) / 1000)
    assert jpeg_size(images, quality=70).tolist() == torch.tensor(expected).tolist()


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_noise_is_larger_than_a_flat_image(channels, size):
    """So the size rewards detail, and with weight -1 plainness; more quality, more bytes."""
    flat, detailed = torch.full((1, channels, size, size), 0.4), noise(1, channels, size, size)
    images = torch.cat([flat, detailed])
    small, large = jpeg_size(images).tolist()
    assert large > small > 0.1
    assert jpeg_size(images, quality=30)[1] < large
    prompts = Conditions(group=torch.arange(2), sample_id=torch.arange(2), info={}, inputs={})
    reward = Reward({"kilobytes": jpeg_size, "brightness": brightness}, {"kilobytes": -1.0})
    terms = reward.terms(images, prompts)
    torch.testing.assert_close(reward.total(terms), brightness(images) - jpeg_size(images))


def test_jpeg_size_says_what_is_missing_or_wrong(monkeypatch):
    with pytest.raises(ValueError, match="quality is 96; expected 1 to 95"):
        jpeg_size(noise(1, 1, 8, 8), quality=96)
    assert jpeg_size(noise(0, 1, 8, 8)).shape == (0,)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ValueError, match="needs Pillow.*pip install pillow"):
        jpeg_size(noise(1, 1, 8, 8))


# In the messages of a reward


def test_a_large_image_is_not_printed_in_a_message():
    """Its shape is; the numbers of a small one are."""
    prompts = Conditions(group=torch.zeros(1).long(), sample_id=torch.arange(1), info={}, inputs={})
    reward = Reward({"odd": lambda images, prompts: [float("nan")]})
    for side, written in ((64, "output of shape (3, 64, 64)"), (1, "output [[[0.0]], [[0.0]]")):
        with pytest.raises(RewardError, match=re.escape(written)) as caught:
            reward.terms(torch.zeros(1, 3, side, side), prompts)
        assert len(str(caught.value)) < 300


def test_a_reward_error_of_a_function_is_passed_on_at_once():
    """The function is not called again to look for the sample: it may have waited for minutes."""
    calls = []

    def broken(images, prompts):
        calls.append(len(images))
        raise RewardError("the server is dead")

    prompts = Conditions(group=torch.arange(2), sample_id=torch.arange(2), info={}, inputs={})
    with pytest.raises(RewardError, match="^reward term 'far': the server is dead$"):
        Reward({"far": broken}).terms(torch.zeros(2, 1, 8, 8), prompts)
    assert calls == [2]
