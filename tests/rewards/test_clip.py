"""Rewards on top of CLIP, on a tiny random model with a tokenizer of bytes; nothing is fetched."""

from __future__ import annotations

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from rescore.rewards.clip import (
    HEAD_WIDTHS,
    MEAN,
    STD,
    AestheticScorer,
    ClipScorer,
    PickScore,
    clip_pixels,
    embed_texts,
    load_aesthetic_head,
    load_clip,
)

SIZE, WINDOW = 12, 8
TEXTS = ["a", "some digits", "a", "one 1, in a text that is longer than the window"]


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_clip(folder, *, features=768, end=None):
    """A checkpoint as the published ones are, weights random."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    part = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(names),
        "max_position_embeddings": WINDOW,
        "bos_token_id": len(names) - 2,
        "eos_token_id": len(names) - 1 if end is None else end,
        "pad_token_id": len(names) - 1,
    }
    config = CLIPConfig(
        text_config=part | text,
        vision_config=part | {"image_size": SIZE, "patch_size": 4},
        projection_dim=features,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
            model.logit_scale.fill_(math.log(17.0))
    model.save_pretrained(folder)
    return str(folder)


def write_head(file, **more):
    """LAION's layers under LAION's names."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for layer, n_in, n_out in zip((0, 2, 4, 6, 7), HEAD_WIDTHS, HEAD_WIDTHS[1:], strict=False):
        weight = torch.randn(n_out, n_in, generator=generator) * 2 * n_in**-0.5
        state[f"layers.{layer}.weight"] = weight
        state[f"layers.{layer}.bias"] = torch.randn(n_out, generator=generator)
    save_file({name: value for name, value in (state | more).items() if value is not None}, file)
    return str(file)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return write_head(tmp_path_factory.mktemp("head") / "head.safetensors")


def reference(path, images, texts):
    """What transformers itself says: its forward pass, all images with all texts."""
    model = CLIPModel.from_pretrained(path).eval()
    tokens = AutoTokenizer.from_pretrained(path)(
        texts, padding=True, truncation=True, max_length=WINDOW, return_tensors="pt"
    )
    with torch.no_grad():
        return model(pixel_values=clip_pixels(images, SIZE), **tokens)


# Pixels


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((3, 40, 40), 16),  # smaller
        ((3, 64, 37), 16),  # smaller, high
        ((3, 31, 92), 20),  # smaller, wide, an odd number of columns to cut
        ((3, 9, 9), 32),  # larger
        ((1, 8, 8), 28),  # a grey digit
        ((3, 24, 24), 24),  # as it is
    ],
)
def test_pixels_are_those_of_transformers(shape, size):
    """Up to the rounding of Pillow, which resizes rows and columns in 8 bits: 1.5 of 255."""
    levels = (noise(*shape) * 255).round()
    levels[:, : shape[1] // 2] = levels[:, : shape[1] // 2].round(decimals=-2)  # flat, with edges
    levels = levels.clamp(0, 255)
    array = levels.permute(1, 2, 0).numpy().astype(np.uint8)
    image = Image.fromarray(array if shape[0] == 3 else array[..., 0])
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    expected = processor(image, return_tensors="pt")["pixel_values"]
    found = clip_pixels(levels[None] / 255, size)
    assert found.shape == expected.shape
    std = torch.tensor(STD)[:, None, None]
    assert ((found - expected) * std).abs().max() < 1.5 / 255


def test_a_grey_image_is_an_rgb_one_of_equal_channels():
    """Standardised per channel, by hand."""
    grey = torch.full((1, 1, 6, 9), 0.25)
    expected = torch.tensor([(0.25 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(
        clip_pixels(grey, 4), expected[:, None, None].expand(3, 4, 4)[None].contiguous()
    )
    image = noise(2, 1, 8, 8)
    rgb = image.expand(-1, 3, -1, -1)
    torch.testing.assert_close(clip_pixels(image, SIZE), clip_pixels(rgb, SIZE))


def test_what_is_no_image_is_refused(clip):
    with pytest.raises(ValueError, match="image 1 has values"):
        ClipScorer(weights=clip)(torch.stack([noise(3, 8, 8), -noise(3, 8, 8)]), ["a", "b"])


# Scores


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_scores_are_those_of_transformers(clip, batch):
    """The diagonal of images with texts, of which equal ones are embedded once."""
    images = noise(4, 3, 20, 14)
    logits = reference(clip, images, TEXTS).logits_per_image.diagonal()
    cosine = ClipScorer(weights=clip, batch=batch)(images, TEXTS)
    torch.testing.assert_close(cosine, logits / 17, atol=1e-6, rtol=1e-5)
    score = PickScore(weights=clip, tokenizer=clip, batch=batch)(images, TEXTS)
    torch.testing.assert_close(score, logits, atol=1e-5, rtol=1e-5)
    assert cosine.std() > 0.01
    assert (cosine.dtype, score.requires_grad) == (torch.float32, False)


def test_digits_are_scored_too(clip, head):
    digits = noise(2, 1, 8, 8)
    assert ClipScorer(weights=clip)(digits, ["one", "two"]).shape == (2,)
    assert AestheticScorer(weights=clip, head=head)(digits).shape == (2,)
    assert ClipScorer(weights=clip)(digits[:0], []).shape == (0,)


def test_the_aesthetic_score_is_linear_in_the_unit_embedding(clip, head):
    """Layers without activations: one matrix, by hand in float64."""
    images = torch.cat([noise(1, 3, 12, 12), torch.zeros(1, 3, 12, 12), torch.ones(1, 3, 12, 12)])
    matrix, bias = torch.eye(768).double(), torch.zeros(768).double()
    state = load_file(head)
    for layer in (0, 2, 4, 6, 7):
        weight, more = state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]
        matrix, bias = weight.double() @ matrix, weight.double() @ bias + more.double()
    embedded = F.normalize(reference(clip, images, ["a"]).image_embeds.double(), dim=-1)
    expected = (embedded @ matrix.mT + bias).squeeze(1).float()
    found = AestheticScorer(weights=clip, head=head, batch=2)(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 1e-3
    assert not found.requires_grad


def test_no_draw_of_the_global_generator(clip, head):
    load_clip.cache_clear()
    load_aesthetic_head.cache_clear()
    before = torch.get_rng_state()
    AestheticScorer(weights=clip, head=head)(noise(1, 3, 8, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_weights_loaded_in_inference_mode_serve_outside_it(clip):
    load_clip.cache_clear()
    with torch.inference_mode():
        first = ClipScorer(weights=clip)(noise(1, 3, 8, 8), ["a"])
    torch.testing.assert_close(ClipScorer(weights=clip)(noise(1, 3, 8, 8), ["a"]), first)


# Weights that do not serve


def test_texts_must_fit_the_images(clip):
    with pytest.raises(ValueError, match="1 texts for 2 images"):
        ClipScorer(weights=clip)(noise(2, 3, 8, 8), ["a"])


def test_weights_that_are_none_are_named(clip, tmp_path):
    images = noise(1, 3, 8, 8)
    for place in ("no/such-model", str(tmp_path / "nowhere")):
        message = rf"(?s)CLIP model from '{re.escape(place)}'.*without a connection give the folder"
        with pytest.raises(ValueError, match=message):
            ClipScorer(weights=place)(images, ["a"])
    with pytest.raises(ValueError, match="tokenizer of a CLIP model from 'no/such'"):
        ClipScorer(weights=clip, tokenizer="no/such")(images, ["a"])


def test_pickled_and_damaged_weights_are_refused(tmp_path):
    whole = tmp_path / "whole"
    write_clip(whole, features=6)
    file, images = whole / "model.safetensors", noise(1, 3, 8, 8)
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['visual_projection.weight'\]"):
        load_clip(str(whole))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot load a CLIP model"):
        load_clip(str(whole))
    file.unlink()
    torch.save(state, whole / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a CLIP model.*safetensors"):
        ClipScorer(weights=str(whole))(images, ["a"])


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    """It would read the wrong position as the end, and every text would be the same."""
    path = write_clip(tmp_path / "other", features=6, end=7)
    with pytest.raises(ValueError, match="ends texts with 513; the model has 514 and reads 7"):
        ClipScorer(weights=path)(noise(1, 3, 8, 8), ["a"])


def test_a_tokenizer_that_ends_no_text_is_refused(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(ValueError, match="name the model's own tokenizer"):
        embed_texts(load_clip(clip), tokenizer, ["a"], batch=1)


def test_old_configurations_take_the_highest_token_as_the_end(clip, tmp_path):
    """Their end token is called 2 and is not."""
    old = write_clip(tmp_path / "old", end=2)
    images = noise(4, 3, 8, 8)
    found, expected = (ClipScorer(weights=path)(images, TEXTS) for path in (old, clip))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("head.pth", b"", r"no safetensors file.*torch.load\(\"head.pth\", weights_only=True\)"),
        ("head.safetensors", None, "does not exist"),
        ("head.safetensors", b"123", "is damaged"),
        ("head.safetensors", {"layers.6.bias": torch.zeros(3)}, r"'layers.6.bias' has shape \(3,"),
        ("head.safetensors", {"layers.7.bias": None}, "'layers.7.bias' has shape none"),
        ("head.safetensors", {"mean": torch.zeros(1)}, r"'mean' has shape \(1,\); expected none"),
    ],
)
def test_a_head_that_is_none_is_refused(tmp_path, name, content, complaint):
    file = tmp_path / name
    if isinstance(content, dict):
        write_head(file, **content)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load_aesthetic_head(str(file))


def test_a_model_of_another_width_is_refused(tmp_path, head):
    path = write_clip(tmp_path / "narrow", features=6)
    with pytest.raises(ValueError, match="gives 6 features per image; the head reads 768"):
        AestheticScorer(weights=path, head=head)(noise(1, 3, 8, 8))


def test_transformers_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"need transformers.*pip install 'rescore\[images\]'"):
        load_clip("anything")
