r"""What an image is worth to networks on top of CLIP: likeness to a text, preference, beauty.

CLIP maps an image x and a text c to unit vectors e(x) and e(c). Sources: CLIP, Radford et al. 2021,
arXiv:2103.00020; PickScore, Kirstain et al. 2023, arXiv:2305.01569; the aesthetic score is LAION's
predictor, github.com/christophschuhmann/improved-aesthetic-predictor, the version without
activations (``sac+logos+ava1-l14-linearMSE``).

Weights are read from safetensors alone, in float32, once per process and device.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rescore.rewards.images import Images, checked, checked_texts

LARGE = "openai/clip-vit-large-patch14"
MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of the channels of CLIP's training images, as in its published code."""
STD = (0.26862954, 0.26130258, 0.27577711)
OLD_END = 2
"""Number of the end token in old configurations; transformers then takes the highest token."""
HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)
"""Features between the layers of the aesthetic head."""
HEAD_LAYERS = (0, 2, 4, 6, 7)
"""What its file calls them; the numbers between are dropout."""


@dataclass(frozen=True, kw_only=True)
class ClipScorer:
    """How well an image fits its text: the cosine of e(x) and e(c), in [-1, 1]."""

    weights: str = LARGE
    """A CLIP model of transformers: a folder, or a repository on the hub."""
    tokenizer: str = ""
    """The same for its tokenizer; empty where the weights have it with them."""
    batch: int = 32
    """Images or texts per forward pass."""

    def __call__(self, images: Images, texts: Sequence[str], /) -> Float[Tensor, " B"]:
        """One number per image; a text counts up to the longest that the model reads.

        Raises:
            ValueError: transformers or the weights are missing, or the images or the texts are not
                what they must be.
        """
        clip = load_clip(self.weights, str(images.device))
        tokenizer = load_tokenizer(self.tokenizer or self.weights)
        distinct = list(dict.fromkeys(checked_texts(texts, len(images))))
        place = {text: number for number, text in enumerate(distinct)}
        row = torch.tensor([place[text] for text in texts], dtype=torch.long, device=images.device)
        of_text = embed_texts(clip, tokenizer, distinct, self.batch)
        return (embed_images(clip, images, self.batch) * of_text[row]).sum(1)


@dataclass(frozen=True, kw_only=True)
class PickScore(ClipScorer):
    r"""What people who asked for c would pick: $\tau \cos(e(x), e(c))$, $\tau$ learned.

    CLIP-H, fine-tuned on choices; the difference of the scores of two images is the log-odds of
    choosing the first. Scores are about 20, and differ by about 1.
    """

    weights: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __call__(self, images: Images, texts: Sequence[str], /) -> Float[Tensor, " B"]:
        """As ``ClipScorer``, times the temperature of the model."""
        temperature = load_clip(self.weights, str(images.device)).logit_scale.exp()
        return temperature * super().__call__(images, texts)


@dataclass(frozen=True, kw_only=True)
class AestheticScorer:
    """How people would rate an image from 1 to 10, whatever it shows: a head on e(x)."""

    head: str
    """The head's weights, a file ``.safetensors`` with the names of LAION's file."""
    weights: str = LARGE
    """The CLIP model that the head was trained on, as in ``ClipScorer``."""
    batch: int = 32
    """Images per forward pass."""

    def __call__(self, images: Images, _: object = None, /) -> Float[Tensor, " B"]:
        """One number per image.

        Raises:
            ValueError: transformers or weights are missing, the head does not fit the model, or the
                images are not what they must be.
        """
        head = load_aesthetic_head(self.head, str(images.device))
        clip = load_clip(self.weights, str(images.device))
        if clip.config.projection_dim != HEAD_WIDTHS[0]:
            raise ValueError(
                f"'{self.weights}' gives {clip.config.projection_dim} features per image; the head "
                f"reads {HEAD_WIDTHS[0]}, those of {LARGE}"
            )
        return head(embed_images(clip, images, self.batch)).squeeze(1)


# Images and texts to vectors


def clip_pixels(images: Images, size: int) -> Float[Tensor, "B 3 S S"]:
    """Images as CLIP sees them: the middle square, ``size`` pixels wide, its channels standardised.

    The shorter edge is resized by bicubic interpolation with an antialiasing filter, rows before
    columns, each cut to [0, 1], as Pillow does it for CLIP's own code, but not rounded to 8 bits.

    Args:
        images: grey ones become RGB.
        size: S.
    """
    images = checked(images)
    height, width = images.shape[-2:]
    short = min(height, width)
    rows, columns = size * height // short, size * width // short
    for edges in ((height, columns), (rows, columns)):
        images = F.interpolate(images, edges, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (rows - size) // 2, (columns - size) // 2
    images = images[..., top : top + size, left : left + size]
    mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
    return (images.expand(-1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def embed_images(clip: Any, images: Images, batch: int) -> Float[Tensor, "B D"]:
    """e(x): unit vectors."""
    size = clip.config.vision_config.image_size
    parts = [torch.zeros(0, clip.config.projection_dim, device=images.device)]
    for at in range(0, len(images), batch):
        pixels = clip_pixels(images[at : at + batch], size)
        pooled = clip.vision_model(pixel_values=pixels).pooler_output
        parts.append(F.normalize(clip.visual_projection(pooled), dim=-1))
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(
    clip: Any, tokenizer: Any, texts: Sequence[str], batch: int
) -> Float[Tensor, "n D"]:
    """e(c): unit vectors.

    Raises:
        ValueError: the tokenizer is not that of the model.
    """
    shape = clip.config.text_config
    parts = [torch.zeros(0, clip.config.projection_dim, device=clip.device)]
    for at in range(0, len(texts), batch):
        tokens = tokenizer(
            list(texts[at : at + batch]),
            padding=True,
            truncation=True,
            max_length=shape.max_position_embeddings,
            return_tensors="pt",
        ).to(clip.device)
        end = tokenizer.eos_token_id
        known = len(tokenizer) <= shape.vocab_size and shape.eos_token_id in (end, OLD_END)
        if not known or not bool((tokens["input_ids"] == end).any(1).all()):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and ends texts with {end}; the model "
                f"has {shape.vocab_size} and reads {shape.eos_token_id} as the end: name the "
                f"model's own tokenizer in tokenizer"
            )
        pooled = clip.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        parts.append(F.normalize(clip.text_projection(pooled), dim=-1))
    return torch.cat(parts)


# Weights


@functools.lru_cache(maxsize=4)
def load_clip(weights: str, device: str = "cpu") -> Any:
    """A CLIP model of transformers in a folder or on the hub, for evaluation; loaded once.

    Raises:
        ValueError: transformers is missing, there is no such model, or it is not complete.
    """
    kind = _transformers("CLIPModel")
    try:
        clip, info = kind.from_pretrained(
            weights, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load a CLIP model from '{weights}': {error} (expected a folder with "
            f"config.json and model.safetensors, or the name of a repository on the hub that has "
            f"them; without a connection give the folder of a downloaded copy)"
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"the model in '{weights}' lacks the weights {sorted(info['missing_keys'])[:3]}; "
            f"expected a CLIP model, with its text and its vision part"
        )
    return clip.to(device).eval().requires_grad_(False)


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """A tokenizer of transformers in a folder or on the hub; loaded once.

    Raises:
        ValueError: transformers is missing, or there is none.
    """
    try:
        return _transformers("AutoTokenizer").from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load the tokenizer of a CLIP model from '{path}': {error} (expected a folder "
            f"with tokenizer.json, or with vocab.json and merges.txt; name one in tokenizer)"
        ) from error


@functools.lru_cache(maxsize=4)
def load_aesthetic_head(path: str, device: str = "cpu") -> nn.Sequential:
    """LAION's layers, without activations between them; loaded once.

    Raises:
        ValueError: the file is missing, damaged, of another format, or has other weights.
    """
    file = Path(path).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(
            f"'{path}' is no safetensors file, and a pickle can run code; convert it once: "
            f'torch.load("{file.name}", weights_only=True), then safetensors.torch.save_file'
            f'(weights, "{file.stem}.safetensors")'
        )
    if not file.is_file():
        raise ValueError(f"'{path}' does not exist; expected the weights of an aesthetic head")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged: {error}; copy it again") from error
    with torch.device("meta"):  # no memory, no draw from the global generator
        layers = zip(HEAD_LAYERS, itertools.pairwise(HEAD_WIDTHS), strict=True)
        head = nn.Sequential(OrderedDict((str(n), nn.Linear(*widths)) for n, widths in layers))
    shapes = {f"layers.{name}": tuple(weight.shape) for name, weight in head.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in state.items()}
    odd = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
    if odd:
        raise ValueError(
            f"'{path}' is no aesthetic head: '{odd[0]}' has shape {found.get(odd[0], 'none')}; "
            f"expected {shapes.get(odd[0], 'none')}"
        )
    weights = {name.removeprefix("layers."): weight.float() for name, weight in state.items()}
    head.load_state_dict(weights, assign=True)
    return head.to(device).eval().requires_grad_(False)


def _transformers(name: str) -> Any:
    try:
        return getattr(importlib.import_module("transformers"), name)
    except ImportError as error:
        raise ValueError(
            f"rewards on top of CLIP need transformers, which cannot be imported ({error}): "
            f"pip install 'rescore[images]'"
        ) from error
