"""Digits: small images, unconditional or of a wanted class, without anything to download.

The reward can be a classifier, and a policy can please it more than the truth warrants. So there
are two, of the same make and fitted to disjoint halves of the training images: one is optimised,
the other only judges, and its features measure how real and how varied a set of images is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rescore.models.language import require
from rescore.rewards.images import brightness, jpeg_size
from rescore.rewards.reward import Reward, RewardFunction
from rescore.tasks import digits_metrics
from rescore.tasks.digits_classifier import Classifier
from rescore.tasks.digits_images import N_CLASSES, SIZE, intensity, part
from rescore.tasks.task import ContinuousTask, Split, check_numbers
from rescore.types import Conditions, Given, Points

Term = Literal["log_prob", "similarity", "brightness", "compressibility"]
"""What can be optimised; the first two need a wanted class."""
SHADES = " .:-=+*#%@"
"""Ink as characters."""


@dataclass(frozen=True, kw_only=True)
class Digits(ContinuousTask):
    """Images of digits [1 8 8], from -1 for paper to 1 for ink; rewards look at what lies between.

    The classifiers are fitted when an output is first scored, 3 CPU-seconds in all; both are right
    on 0.97 of the test images.

    Raises:
        ValueError: a field is out of range, or the reward needs a class and none is wanted.
    """

    conditional: bool = True
    """Whether prompts name a digit, the input "label"; otherwise they are all alike."""
    target: int | None = None
    """The digit that is wanted; None = the one that the prompt names."""
    optimise: Term = "log_prob"
    """The term that is the reward; the others are only reported."""
    pool: int = 8192
    """Training prompts; the digits take turns."""
    validation_pool: int = 512
    """Validation prompts: the most samples that an evaluation can draw."""
    test_pool: int = 1024
    """Test prompts."""

    def __post_init__(self) -> None:
        for field in ("pool", "validation_pool", "test_pool"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 1 or more")
        if self.target is not None and not 0 <= self.target < N_CLASSES:
            raise ValueError(f"target is {self.target}; expected 0 to {N_CLASSES - 1}, or None")
        if self.optimise not in self.reward.functions:
            raise ValueError(
                f"optimise is '{self.optimise}', which there is not without a wanted digit; choose "
                f"one of {[*self._plain()]}, set target, or conditional=True"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, SIZE, SIZE)

    @property
    def n_labels(self) -> int:
        """10, or 0 without conditions."""
        return N_CLASSES if self.conditional else 0

    @property
    def wants_a_class(self) -> bool:
        """Whether samples should show a certain digit."""
        return self.conditional or self.target is not None

    @property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """The one that is optimised and the one that only judges."""
        return Classifier(half=0), Classifier(half=1, seed=1)

    @property
    def reward(self) -> Reward:
        """What is optimised, and what is reported beside it.

        ``log_prob``: of the wanted digit, by the training classifier, nats. ``judge_log_prob``,
        ``judge_accuracy``: by the one that judges. ``similarity``: minus the mean squared
        difference in ink from the mean training image of the wanted digit. ``brightness``: mean
        ink. ``compressibility``: minus the size of a JPEG file, in hundreds of bytes; only if it is
        what is optimised. The first four exist if a digit is wanted.
        """
        functions: dict[str, RewardFunction] = {}
        if self.wants_a_class:
            trained, judging = self.classifiers
            functions = {
                "log_prob": self._log_prob(trained),
                "judge_log_prob": self._log_prob(judging),
                "judge_accuracy": self._is_right,
                "similarity": self._similarity,
            }
        functions |= self._plain()
        if self.optimise != "compressibility":
            del functions["compressibility"]
        return Reward(functions, {name: float(name == self.optimise) for name in functions})

    def size(self, split: Split) -> int:
        """Prompts of a split."""
        return {
            "train": self.pool,
            "validation": self.validation_pool,
            "test": self.test_pool,
        }[split]

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Conditions:
        """The last digit of the number is the label.

        Raises:
            ValueError: a number is not in ``[0, size(split))``.
        """
        check_numbers(index, split, self.size(split))
        return self._as_conditions(index % N_CLASSES)

    def clean(self, split: Split) -> Points:
        """The images of a split, with labels if there are conditions."""
        data = part(split)
        return Points(x_0=data.images, inputs={"label": data.labels} if self.conditional else {})

    def read(self, texts: Sequence[str]) -> Conditions:
        """Prompts from digits; without conditions from empty texts.

        Raises:
            ValueError: a text is something else.
        """
        valid = [str(label) for label in range(N_CLASSES)] if self.conditional else [""]
        if not texts:
            raise ValueError("no prompt was given; expected at least one")
        for text in texts:
            if text.strip() not in valid:
                raise ValueError(f"prompt {text!r} is not valid; expected one of {valid}")
        return self._as_conditions(torch.tensor([valid.index(text.strip()) for text in texts]))

    def show(self, sample: Float[Tensor, "1 8 8"], /) -> str:
        """Eight lines of characters, two for a pixel, the darker the more ink."""
        level = (intensity(sample[0]) * (len(SHADES) - 1)).round().long()
        return "\n".join("".join(2 * SHADES[i] for i in row).rstrip() for row in level.tolist())

    def show_prompt(self, prompts: Given, row: int) -> str:
        """The digit that a prompt names."""
        assert isinstance(prompts, Conditions)
        return f"digit {int(prompts.inputs['label'][row])}" if self.conditional else "any digit"

    def pictures(self, outputs: Float[Tensor, "B 1 8 8"]) -> Float[Tensor, "B 1 8 8"]:
        """Ink as white."""
        return intensity(outputs)

    def check(self) -> None:
        """The images can be loaded, and compressed if need be.

        Raises:
            ValueError: a package is missing; says how to install it.
        """
        require("sklearn", "the digits task", "digits")
        if self.optimise == "compressibility":
            require("PIL", "the reward 'compressibility'", "digits")

    def metrics(self, outputs: Float[Tensor, "n 1 8 8"], prompts: Conditions) -> dict[str, float]:
        """What a set of images is worth to the classifier that judges, beside ``real()`` images.

        ``frechet``, ``frechet_floor``: distance of its features, of the outputs and of half of the
        real images, from the other half. ``diversity``, ``real_diversity``: mean distance of the
        features of two outputs, and of two real images. ``class_entropy``: of the digits it sees in
        the outputs, nats; log 10 at most. ``accuracy``, ``log_prob``: of the wanted digit, if there
        is one.

        Raises:
            ValueError: there are fewer outputs than half as many as real images.
        """
        judge = self.classifiers[1]
        with torch.no_grad():
            features = judge.features(outputs)
            target = judge.features(self.real().to(outputs.device))
            frechet, floor = digits_metrics.frechet_beside_floor(features, target)
            found = {
                "frechet": frechet,
                "frechet_floor": floor,
                "diversity": digits_metrics.mean_distance(features),
                "real_diversity": digits_metrics.mean_distance(target),
                "class_entropy": digits_metrics.class_entropy(judge.log_probs(outputs).argmax(1)),
            }
            if self.wants_a_class:
                found["accuracy"] = self._is_right(outputs, prompts).mean()
                found["log_prob"] = self._log_prob(judge)(outputs, prompts).mean()
        return {name: value.item() for name, value in found.items()}

    def real(self) -> Float[Tensor, "n 1 8 8"]:
        """Images that the judge was not fitted to; of ``target``, if there is one."""
        seen = (part("train", 0), part("validation"), part("test"))
        images = torch.cat([data.images for data in seen])
        if self.target is None:
            return images
        return images[torch.cat([data.labels for data in seen]) == self.target]

    def _plain(self) -> dict[str, RewardFunction]:
        """Terms that need no class."""
        return {"brightness": _brightness, "compressibility": _compressibility}

    def _wanted(self, prompts: Conditions) -> Int[Tensor, " B"]:
        if self.target is None:
            return prompts.inputs["label"]
        return torch.full_like(prompts.sample_id, self.target)

    def _log_prob(self, classifier: Classifier) -> RewardFunction:
        def log_prob(outputs: Float[Tensor, "B 1 8 8"], prompts: Conditions) -> Float[Tensor, " B"]:
            wanted = self._wanted(prompts)
            return classifier.log_probs(outputs).gather(1, wanted[:, None]).squeeze(1)

        return log_prob

    def _is_right(
        self, outputs: Float[Tensor, "B 1 8 8"], prompts: Conditions
    ) -> Float[Tensor, " B"]:
        seen = self.classifiers[1].log_probs(outputs).argmax(1)
        return (seen == self._wanted(prompts)).float()

    def _similarity(
        self, outputs: Float[Tensor, "B 1 8 8"], prompts: Conditions
    ) -> Float[Tensor, " B"]:
        data = part("train")
        means = [intensity(data.images[data.labels == c]).mean(0) for c in range(N_CLASSES)]
        wanted = torch.stack(means).to(outputs)[self._wanted(prompts)]
        return -(intensity(outputs) - wanted).square().flatten(1).mean(1)

    def _as_conditions(self, label: Int[Tensor, " B"]) -> Conditions:
        number = torch.arange(len(label))
        inputs = {"label": label} if self.conditional else {}
        return Conditions(group=number, sample_id=number, info={}, inputs=inputs)


def _brightness(outputs: Float[Tensor, "B 1 8 8"], prompts: Conditions) -> Float[Tensor, " B"]:
    return brightness(intensity(outputs))


def _compressibility(outputs: Float[Tensor, "B 1 8 8"], prompts: Conditions) -> Float[Tensor, " B"]:
    """Of the images enlarged bilinearly to 32 x 32: JPEG's blocks would hold one of 8 x 8 whole."""
    large = nn.functional.interpolate(intensity(outputs), scale_factor=4.0, mode="bilinear")
    return -10 * jpeg_size(large)
