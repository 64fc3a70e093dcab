"""What an image is worth by its pixels: brightness and JPEG size; and what every image must be.

Rewards of images are functions of images [B C H W], grey or RGB, in [0, 1], and of what the images
were made under: for ``http.py`` and ``clip.py`` the texts, for those here nothing.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Images = Float[Tensor, "B C H W"]
"""Grey (C = 1) or RGB (C = 3), from 0 to 1."""

MANY = 0.5
"""Fraction of black images in a batch from which on one is warned of."""


# What every image must be


def checked(images: Tensor) -> Images:
    """Images in float32, on their device, after a look at what they are.

    Raises:
        ValueError: they are no batch of grey or RGB images, or a value is not in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; expected floating-point "
            f"numbers of shape [B 1 H W] or [B 3 H W]"
        )
    outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)  # NaN is outside too
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        if bool(images[first].isnan().any()):
            raise ValueError(
                f"image {first} has values that are not a number (NaN); look for what overflows "
                f"before it, in the network or in its decoder"
            )
        low, high = images[first].aminmax()
        raise ValueError(
            f"image {first} has values from {low.item():.4g} to {high.item():.4g}; expected 0 to "
            f"1: divide bytes by 255, shift images of -1 to 1 by (x + 1) / 2, then clamp"
        )
    return images.float()


def checked_texts(texts: Any, n_images: int) -> list[str]:
    """One text per image.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"texts are a {type(texts).__name__}; expected a list of str")
    odd = [type(text).__name__ for text in texts if not isinstance(text, str)]
    if odd or len(texts) != n_images:
        raise ValueError(
            f"there are {len(texts)} texts for {n_images} images"
            + (f", one of them a {odd[0]}" if odd else "")
            + "; expected one str per image"
        )
    return list(texts)


def to_bytes(images: Images) -> UInt8[Tensor, "B H W C"]:
    """Levels 0 to 255, rounded, on the CPU, channels last: what image files hold."""
    levels = (checked(images) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().contiguous()


def warn_if_black(images: Images) -> bool:
    """Warn of a batch of which half or more are black, naming the fraction; whether it was so.

    Black is an image whose every value is 0 of 255. A diffusion model that was trained too hard, or
    decoded in half precision, makes such images, and many rewards have no objection to them.
    """
    fraction = (checked(images).flatten(1).amax(1) * 255 < 0.5).float().mean().item()
    many = fraction >= MANY
    if many:
        warnings.warn(
            f"{fraction:.0%} of {len(images)} images are black: look at the samples; lower the "
            f"learning rate, raise the KL coefficient, or decode in float32",
            stacklevel=2,
        )
    return many


# Rewards


def brightness(images: Images, _: object = None, /) -> Float[Tensor, " B"]:
    """Mean over pixels and channels, in [0, 1]."""
    return checked(images).flatten(1).mean(1)


def jpeg_size(images: Images, _: object = None, /, *, quality: int = 95) -> Float[Tensor, " B"]:
    """Size of each image as a JPEG file, in kilobytes (1000 bytes).

    With a positive weight it rewards detail (incompressibility), with a negative one plainness
    (compressibility). Source: DDPO, Black et al. 2023, arXiv:2305.13301, section 5.1.

    Args:
        images: grey ones become grey files, which are smaller by a constant.
        quality: of the JPEG, 1 to 95.

    Raises:
        ValueError: Pillow is not installed, or the quality is out of range.
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}; expected 1 to 95")
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ValueError(
            f"jpeg_size needs Pillow, which cannot be imported ({error}): pip install pillow"
        ) from error
    sizes = []
    for pixels in to_bytes(images).numpy():
        file = io.BytesIO()
        pillow.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
            file, format="JPEG", quality=quality
        )
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)
