"""Says which digit an image shows: a small convolutional network, fitted to half the images."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rescore.models.value import draw_weights
from rescore.tasks.digits_images import N_CLASSES, Digitised, Half, intensity, part

N_FEATURES = 32
"""Of an image, before the last layer."""
EPOCHS, BATCH, LR, WEIGHT_DECAY = 30, 32, 3e-3, 0.05
"""Passes over the half, images per step, peak learning rate and weight decay of AdamW."""


class Network(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        with torch.device("meta"):  # no draw from the global generator
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Flatten(),
                nn.Linear(32 * 16, N_FEATURES),
                nn.SiLU(),
            )
            self.head = nn.Linear(N_FEATURES, N_CLASSES)
        self.to_empty(device="cpu")
        draw_weights(self, generator)

    def features(self, ink: Float[Tensor, "B 1 8 8"]) -> Float[Tensor, "B F"]:
        return self.body(2 * ink - 1)

    def forward(self, ink: Float[Tensor, "B 1 8 8"]) -> Float[Tensor, "B C"]:
        """Logits of the digits."""
        return self.head(self.features(ink))


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A network fitted to half the training images when first asked, once per process.

    Equal fields give the same network. Gradients flow to the images, if they are enabled.
    """

    half: Half
    """Which half."""
    seed: int = 0
    """Of the weights and of the order of the images."""

    def log_probs(self, outputs: Float[Tensor, "B 1 8 8"]) -> Float[Tensor, "B C"]:
        """Of every digit, nats."""
        network = _fitted(self, str(outputs.device))
        return network(intensity(outputs).float()).log_softmax(-1)

    def features(self, outputs: Float[Tensor, "B 1 8 8"]) -> Float[Tensor, "B F"]:
        """What the last layer sees."""
        return _fitted(self, str(outputs.device)).features(intensity(outputs).float())

    @property
    def held_out(self) -> float:
        """Fraction of the test images on which it is right."""
        test = part("test")
        with torch.no_grad():
            return (self.log_probs(test.images).argmax(1) == test.labels).double().mean().item()


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # gradients, even if a reward is first asked for where they are off
def _fitted(classifier: Classifier, device: str) -> Network:
    """On the CPU, cross-entropy on images moved by up to one pixel."""
    data = part("train", classifier.half)
    generator = torch.Generator().manual_seed(classifier.seed)
    network = Network(generator)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    n_steps = EPOCHS * -(-len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, n_steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            batch = _moved(data.take(rows), generator)
            optimizer.zero_grad()
            logits = network(intensity(batch.images))
            nn.functional.cross_entropy(logits, batch.labels).backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False).to(device)


def _moved(data: Digitised, generator: torch.Generator) -> Digitised:
    """All images moved by the same -1, 0 or 1 pixels in each direction; paper comes in."""
    right, down = (torch.randint(3, (2,), generator=generator)).tolist()
    wide = nn.functional.pad(data.images, (1, 1, 1, 1), value=-1.0)
    size = data.images.shape[-1]
    images = wide[..., down : down + size, right : right + size]
    return Digitised(images=images, labels=data.labels)
