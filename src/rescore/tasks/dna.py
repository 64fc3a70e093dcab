"""Enhancer design: write 200 letters of DNA that are active, without any prompt.

The reward is a network, and a policy can please it more than the truth warrants. So there are two
networks, of the same make and fitted to disjoint halves of the measurements: one is optimised, the
other only reports; and where the sequences are generated here (``dna_sequences``), the noiseless
activity of their grammar reports as well.

Source of the set-up (length, two oracles on disjoint data, metrics): the code and tables of DRAKES,
for whose data ``rescore.tasks.gosai`` has a loader.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.fit import Fit, Labelled, fit
from rescore.models.oracle import ConvolutionalEnsemble
from rescore.rewards.reward import Reward, RewardFunction
from rescore.tasks import dna_metrics
from rescore.tasks.dna_sequences import (
    LENGTH,
    LETTERS,
    Grammar,
    Half,
    Library,
    Measured,
    known_patterns,
)
from rescore.tasks.task import Split, TokenTask, check_numbers
from rescore.types import Examples, Prompts

WIDTH = 12
"""Letters that a first-layer filter of an oracle sees."""
CHANNELS = 24
"""Filters per layer and member: both strands of twelve motifs to start from."""
REFERENCE = 100
"""How many of the most active test sequences stand for real enhancers in the metrics."""

Target = Literal["activity", "accessible"]


@runtime_checkable
class Oracle(Protocol):
    """Anything that says how active sequences are."""

    def __call__(self, tokens: Int[Tensor, "B L"], /) -> Float[Tensor, " B"]:
        """One number per sequence, higher is more active."""
        ...


@dataclass(frozen=True, kw_only=True)
class FittedOracle:
    """Convolutional networks fitted to the measurements of half a library; their mean speaks.

    Fitted when first asked, once per process; equal fields give the same network. The first-layer
    filters start from the motifs of ``dna_motifs.json``.
    """

    target: ClassVar[Target] = "activity"

    library: Library
    """Where the measurements come from."""
    half: Half
    """Which half of its training split."""
    members: int = 3
    """Networks in the ensemble."""
    fit: Fit = dataclasses.field(default_factory=lambda: Fit(epochs=6, batch=32, lr=7e-3))
    """How they are fitted."""
    seed: int = 0
    """Of their weights and of the order of the data."""

    def __call__(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """The mean prediction of the members.

        Raises:
            ValueError: a token is no letter; the message names it.
        """
        with torch.no_grad():
            return _on(self, str(tokens.device))(tokens).mean(1)

    @property
    def held_out(self) -> float:
        """R2 on the measurements of the test split, which nothing is fitted to.

        Of a classifier the fraction of right answers.
        """
        return _fitted(self)[1]


@dataclass(frozen=True, kw_only=True)
class FittedClassifier(FittedOracle):
    """The same for accessibility: the probability that a sequence is open."""

    target: ClassVar[Target] = "accessible"

    members: int = 1
    fit: Fit = dataclasses.field(
        default_factory=lambda: Fit(loss="logistic", epochs=5, batch=32, lr=7e-3)
    )

    def __call__(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """The probability, from the mean log-odds of the members."""
        with torch.no_grad():
            return torch.sigmoid(_on(self, str(tokens.device))(tokens).mean(1))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # gradients, even if a reward is first asked for where they are off
def _fitted(oracle: FittedOracle) -> tuple[ConvolutionalEnsemble, float]:
    data = _labelled(oracle.library.part("train", oracle.half), oracle.target)
    held_out = _labelled(oracle.library.part("test"), oracle.target)
    generator = torch.Generator().manual_seed(oracle.seed)
    network = ConvolutionalEnsemble(
        len(LETTERS),
        generator=generator,
        members=oracle.members,
        channels=CHANNELS,
        width=WIDTH,
        pool=8,
        filters=known_patterns(WIDTH),
        offset=data.targets.mean().item() if oracle.fit.loss == "squared" else 0.0,
    )
    score = fit(network, data, held_out, oracle.fit, generator)
    return network.requires_grad_(False), score


def _labelled(rows: Measured, target: Target) -> Labelled:
    targets = rows.activity if target == "activity" else rows.accessible
    if targets is None:
        raise ValueError("this library has no measurements of accessibility to fit to")
    return Labelled(inputs=rows.tokens, targets=targets.float())


@functools.lru_cache(maxsize=16)
def _on(oracle: FittedOracle, device: str) -> ConvolutionalEnsemble:
    return copy.deepcopy(_fitted(oracle)[0]).to(device)


def _term(function: Oracle) -> RewardFunction:
    def term(outputs: Int[Tensor, "B L"], prompts: Prompts) -> Float[Tensor, " B"]:
        return function(outputs)

    return term


def _is_open(classifier: FittedClassifier) -> Oracle:
    def is_open(tokens: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        return (classifier(tokens) > 0.5).float()

    return is_open


@dataclass(frozen=True, kw_only=True)
class Dna(TokenTask):
    """Sequences of 200 letters; every prompt is the fully masked canvas.

    Oracles are fitted when an output is first scored, 15 CPU-seconds in all for the default
    library. On its held-out measurements both reach R2 0.74, where the noiseless activity itself
    reaches 0.86; the classifier is right in 0.74 of cases, where the true probability is right in
    0.78. Sixty steps of hill climbing on the first oracle raise the median of 64 backgrounds from
    0.7 to 8.8 in its own eyes, to 7.5 in those of the second and to 5.9 in truth.

    Raises:
        ValueError: a field is out of range, or a weight names no term.

    Warns:
        UserWarning: training and evaluation use the same oracle, so that ``eval_activity`` is the
            reward itself and cannot show over-optimisation.
    """

    library: Library = dataclasses.field(default_factory=Grammar)
    """Sequences and measurements: ``Grammar``, or ``rescore.tasks.gosai.Gosai``."""
    oracle: Oracle | None = None
    """What is optimised; None = fitted to half 0 of the library."""
    eval_oracle: Oracle | None = None
    """What only reports; None = fitted to half 1."""
    pool: int = 8192
    """Training prompts, all alike."""
    validation_pool: int = 256
    """Validation prompts: the most samples that an evaluation can draw."""
    test_pool: int = 640
    """Test prompts."""
    reward_weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"activity": 1.0}
    )
    """What is optimised: weights of the terms, 0 where not named."""

    def __post_init__(self) -> None:
        for field in ("pool", "validation_pool", "test_pool"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 1 or more")
        _ = self.reward  # refuses weights of terms that do not exist
        trained, judging = self.oracles
        if trained is judging or trained == judging:
            warnings.warn(
                "training and evaluation use the same oracle: eval_activity is then the reward "
                "itself and hides over-optimisation; give eval_oracle one of disjoint data",
                stacklevel=3,
            )

    @property
    def oracles(self) -> tuple[Oracle, Oracle]:
        """The one that is optimised and the one that only reports."""
        return (
            self.oracle or FittedOracle(library=self.library, half=0),
            self.eval_oracle or FittedOracle(library=self.library, half=1, seed=1),
        )

    @property
    def classifier(self) -> FittedClassifier:
        """What says whether a sequence is accessible, fitted to half 1."""
        return FittedClassifier(library=self.library, half=1, seed=2)

    @property
    def vocab_size(self) -> int:
        """The letters."""
        return len(LETTERS)

    def symbol(self, token: int) -> str:
        """A, C, G or T."""
        return LETTERS[token]

    @property
    def length(self) -> int:
        """200."""
        return LENGTH

    @property
    def reward(self) -> Reward:
        """What is optimised, and what is reported beside it.

        ``activity``: the training oracle. ``eval_activity``: the evaluation oracle.
        ``accessible``: 1 where the classifier gives more than 1/2. ``true_activity``: the grammar
        without noise. The last two exist where the library knows of them.
        """
        trained, judging = self.oracles
        functions = {"activity": _term(trained), "eval_activity": _term(judging)}
        if self.library.labels_accessible:
            functions["accessible"] = _term(_is_open(self.classifier))
        if self.library.truth is not None:
            functions["true_activity"] = _term(self.library.truth)
        return Reward(functions, dict.fromkeys(functions, 0.0) | dict(self.reward_weights))

    def size(self, split: Split) -> int:
        """Prompts of a split."""
        return {
            "train": self.pool,
            "validation": self.validation_pool,
            "test": self.test_pool,
        }[split]

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Prompts:
        """Fully masked canvases.

        Raises:
            ValueError: a number is not in ``[0, size(split))``.
        """
        check_numbers(index, split, self.size(split))
        return self._as_prompts(torch.full((len(index), LENGTH), self.mask_id))

    def clean(self, split: Split) -> Examples:
        """The sequences of the library that belong to a split, active or not."""
        x_0 = self.library.part(split).tokens
        return Examples(x_0=x_0, editable=torch.ones_like(x_0, dtype=torch.bool))

    def read(self, texts: Sequence[str]) -> Prompts:
        """Prompts from sequences with dots for what is to be written.

        Raises:
            ValueError: a text is not 200 of ``ACGT.``, or has no dot.
        """
        if not texts:
            raise ValueError("no sequence was given; expected at least one")
        return self._as_prompts(torch.stack([self._parsed(text) for text in texts]))

    def show(self, tokens: Int[Tensor, " L"]) -> str:
        """One line of letters; ``read`` reads it back."""
        return "".join("." if t == self.mask_id else self.symbol(t) for t in tokens.tolist())

    def check(self) -> None:
        """The library can be had.

        Raises:
            ValueError: it cannot.
        """
        self.library.check()

    def validate(self, n: int = 16) -> None:
        """Score clean sequences of each split; there are no gold outputs.

        Raises:
            RewardError: a term fails on one or is not finite.
        """
        for split in ("train", "validation", "test"):
            tokens = self.library.part(split).tokens[:n]
            self.reward.terms(tokens, self._as_prompts(tokens))

    def metrics(self, outputs: Int[Tensor, "n L"]) -> dict[str, float]:
        """What a set of sequences is worth, the training oracle left out of it.

        ``median_activity`` and ``accessible`` (fraction, where known): of the evaluation networks.
        ``kmer_correlation`` (Pearson, k = 3) and ``motif_correlation`` (Spearman): with the 100
        most active test sequences of the library. ``diversity``: mean fraction of positions in
        which two outputs differ. ``distinct``: different outputs over outputs.
        ``median_true_activity``: where the grammar is known. The log-likelihood needs a model:
        ``dna_metrics.log_likelihood_bound``.

        Raises:
            ValueError: there are fewer than two outputs, or one holds a mask.
        """
        real = self.reference().to(outputs.device)
        found = {
            "median_activity": self.oracles[1](outputs).median().item(),
            "kmer_correlation": dna_metrics.kmer_correlation(outputs, real),
            "motif_correlation": dna_metrics.motif_correlation(outputs, real),
            "diversity": dna_metrics.diversity(outputs),
            "distinct": dna_metrics.distinct(outputs),
        }
        if self.library.labels_accessible:
            found["accessible"] = (self.classifier(outputs) > 0.5).double().mean().item()
        if self.library.truth is not None:
            found["median_true_activity"] = self.library.truth(outputs).median().item()
        return found

    def reference(self) -> Int[Tensor, "m L"]:
        """The 100 test sequences of highest measured activity, the most active first."""
        test = self.library.part("test")
        return test.tokens[test.activity.argsort(descending=True, stable=True)[:REFERENCE]]

    def _parsed(self, text: str) -> Int[Tensor, " L"]:
        strange = sorted(set(text) - set(LETTERS + "."))
        if strange:
            raise ValueError(
                f"sequence {text!r} has the characters {strange}; expected A, C, G and T, and dots "
                f"for what is to be written"
            )
        if len(text) != LENGTH or "." not in text:
            raise ValueError(
                f"sequence {text!r} has {len(text)} letters, {text.count('.')} of them dots; "
                f"expected {LENGTH} with at least one dot"
            )
        return torch.tensor([(LETTERS + ".").index(letter) for letter in text])

    def _as_prompts(self, canvas: Int[Tensor, "B L"]) -> Prompts:
        number = torch.arange(len(canvas))
        return Prompts(
            tokens=canvas,
            editable=canvas == self.mask_id,
            group=number,
            sample_id=number,
            info={},
        )
