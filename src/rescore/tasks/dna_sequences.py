"""Generated enhancers: backgrounds, planted binding sites, and how active each sequence is.

The motifs are real: twelve human profiles of JASPAR 2024 (Rauluseviciute et al. 2024,
doi:10.1093/nar/gkad1059; CC BY 4.0), in ``dna_motifs.json``. Everything else is made up for this
task and says nothing about cells: which motifs activate, by how much, which of them work together
and how a sequence is drawn. Tokens are 0 1 2 3 for A C G T.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from rescore.tasks.task import Split

LENGTH = 200
"""Letters of a sequence."""
LETTERS = "ACGT"
"""The alphabet, in the order of the tokens."""
Half = Literal[0, 1]
"""Sequences belong to one of two halves, so that two oracles can learn from disjoint data."""


# Whose a sequence is


def membership(sequence: Sequence[int]) -> tuple[Split, Half]:
    """Split and half of a sequence; they depend on nothing but its letters.

    8 of 10 sequences are for training, one for validation and one for test; halves cut each split.
    """
    number = int.from_bytes(hashlib.sha256(bytes(sequence)).digest()[:8])
    part = number % 10
    split = "train" if part < 8 else "validation" if part < 9 else "test"
    return split, 1 if number // 10 % 2 else 0


# What a source of sequences offers


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sequences and what was measured of them."""

    tokens: Int[Tensor, "n L"]
    activity: Float[Tensor, " n"]
    """A noisy measurement."""
    accessible: Float[Tensor, " n"] | None = None
    """1 where the sequence was found open, 0 where closed; None where nobody looked."""

    def take(self, rows: Bool[Tensor, " n"]) -> Measured:
        """Some of the rows."""
        open_ = None if self.accessible is None else self.accessible[rows]
        return Measured(tokens=self.tokens[rows], activity=self.activity[rows], accessible=open_)


@dataclass(frozen=True, kw_only=True)
class Library(abc.ABC):
    """Measured sequences, cut by content into splits and halves; equal fields, equal data."""

    @abc.abstractmethod
    def everything(self) -> Measured:
        """All sequences, none twice; computed once."""

    def check(self) -> None:
        """Refuse what cannot be had, before anything is computed.

        Raises:
            ValueError: says what is missing.
        """
        return

    @property
    def truth(self) -> Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]] | None:
        """The activity without noise, where it is known."""
        return None

    @property
    def labels_accessible(self) -> bool:
        """Whether ``accessible`` is measured."""
        return False

    def part(self, split: Split, half: Half | None = None) -> Measured:
        """The sequences of a split; of one half of it, when given.

        Raises:
            ValueError: there are none.
        """
        whole = self.everything()
        keep = _belonging(self, split, half)
        if not bool(keep.any()):
            where = "" if half is None else f", half {half}"
            raise ValueError(
                f"none of {len(keep)} sequences belongs to split '{split}'{where}; use more"
            )
        return whole.take(keep)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _belonging(library: Library, split: Split, half: Half | None) -> Bool[Tensor, " n"]:
    places = _places(library)
    return torch.tensor([at == split and half in (None, which) for at, which in places])


@functools.lru_cache(maxsize=8)
def _places(library: Library) -> list[tuple[Split, Half]]:
    rows = library.everything().tokens.numpy().astype(np.uint8)
    return [membership(row.tobytes()) for row in rows]


# The motifs


@dataclass(frozen=True, kw_only=True)
class Motif:
    """A binding profile."""

    matrix_id: str
    """Of JASPAR, with version."""
    name: str
    """Of the factor that binds."""
    probability: Float[np.ndarray, "4 w"]
    """Of each letter in each column: observed frequencies, mixed with 1 part in 100 of uniform."""

    @property
    def width(self) -> int:
        return self.probability.shape[1]

    @property
    def threshold(self) -> float:
        """Log-odds of a site that is bound half of the time, nats.

        Two below the mean over drawn sites, at least 6.5: about one chance site in 665 positions.
        """
        information = (self.probability * np.log(4 * self.probability)).sum()
        return max(6.5, float(information) - 2.0)


@functools.cache
def motifs() -> dict[str, Motif]:
    """The twelve motifs by name."""
    data = json.loads((files("rescore.tasks") / "dna_motifs.json").read_text())
    found = {}
    for entry in data["motifs"]:
        counts = np.array([entry["counts"][letter] for letter in LETTERS], dtype=np.float64)
        found[entry["name"]] = Motif(
            matrix_id=entry["matrix_id"],
            name=entry["name"],
            probability=0.99 * counts / counts.sum(0) + 0.01 / 4,
        )
    return found


@functools.cache
@torch.inference_mode(False)
def _filters() -> tuple[Float[Tensor, "M2 4 W"], Float[Tensor, "M2 1"], Bool[Tensor, "M2 L"]]:
    """Log-odds of both strands of every motif, thresholds, and where a site of it may start."""
    every = [
        (motif, strand)
        for motif in motifs().values()
        for strand in (motif.probability, motif.probability[::-1, ::-1])
    ]
    widest = max(motif.width for motif, _ in every)
    odds = np.zeros((len(every), 4, widest))
    for row, (motif, probability) in enumerate(every):
        odds[row, :, : motif.width] = np.log(4 * probability)
    threshold = np.array([[motif.threshold] for motif, _ in every])
    fits = np.arange(LENGTH) <= np.array([[LENGTH - motif.width] for motif, _ in every])
    return torch.tensor(odds).float(), torch.tensor(threshold).float(), torch.tensor(fits)


def occupancy(tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B M 2 L"]:
    """How often each motif is bound at each place: ``sigmoid(log-odds - threshold)``.

    The log-odds of a site are against uniform letters. A place is the leftmost position of the
    site; axis 2 is the strand, the given one first.
    """
    odds, threshold, fits = (part.to(tokens.device) for part in _filters())
    letters = functional.one_hot(tokens, 4).transpose(1, 2).to(odds)
    score = functional.conv1d(functional.pad(letters, (0, odds.shape[2] - 1)), odds)
    bound = torch.sigmoid(score - threshold) * fits
    return bound.unflatten(1, (-1, 2))


def known_patterns(width: int) -> Float[Tensor, "M2 4 w"]:
    """Both strands of every motif as filters on which a site at the threshold scores 2.

    Of a wider motif the most informative columns; a narrower one stands in the middle.
    """
    patterns = np.zeros((2 * len(motifs()), 4, width))
    for row, motif in enumerate(motifs().values()):
        odds = np.log(4 * motif.probability)
        information = (motif.probability * odds).sum(0)
        kept = min(width, motif.width)
        start = int(np.convolve(information, np.ones(kept), "valid").argmax())
        left = (width - kept) // 2
        pattern = 2 / motif.threshold * odds[:, start : start + kept]
        patterns[2 * row, :, left : left + kept] = pattern
        patterns[2 * row + 1, :, left : left + kept] = pattern[::-1, ::-1]
    return torch.tensor(patterns)


def site_counts(bound: Float[Tensor, "B M 2 L"]) -> Float[Tensor, "B M"]:
    """Expected number of bound sites of each motif; the two strands of a place count once."""
    return bound.amax(2).sum(-1)


# The grammar: what makes a sequence active

ACTIVATORS = {
    "HNF4A": 1.0,
    "HNF1A": 1.0,
    "CEBPB": 0.8,
    "FOXA2": 0.6,
    "GATA4": 0.4,
    "SP1": 0.4,
    "CREB1": 0.6,
    "FOS::JUN": 0.7,
    "NFYA": 0.4,
    "ELF1": 0.5,
}
"""Activity that many sites of a motif add, half the value it tends to."""
REPRESSORS = {"REST": 0.8, "SNAI2": 0.5}
"""Fraction of the activity that many sites of a motif take away."""
OPENERS = {"FOXA2": 1.0, "GATA4": 1.0, "SP1": 0.8, "NFYA": 0.6, "FOS::JUN": 0.8}
"""Motifs that open a sequence, and by how much."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two motifs that add activity together: ``second`` follows ``first`` on the same strand."""

    first: str
    second: str
    same: bool
    """Whether both read in the same direction; otherwise they face each other."""
    gap: tuple[int, int]
    """Fewest and most letters between them."""
    gain: float
    """Activity of many such pairs."""


PAIRS = (
    Pair(first="HNF4A", second="CEBPB", same=True, gap=(4, 12), gain=1.5),
    Pair(first="HNF1A", second="FOXA2", same=False, gap=(8, 18), gain=1.2),
    Pair(first="CREB1", second="NFYA", same=True, gap=(10, 20), gain=1.0),
)


def _next_to(
    left: Float[Tensor, "B L"], right: Float[Tensor, "B L"], width: int, gap: tuple[int, int]
) -> Float[Tensor, " B"]:
    """Expected number of pairs: ``sum_i left(i) sum_gap right(i + width + gap)``."""
    total = functional.pad(right.cumsum(1), (1, width + gap[1]))
    total[:, LENGTH + 1 :] = total[:, LENGTH : LENGTH + 1]
    start = torch.arange(LENGTH, device=left.device) + width
    within = total[:, (start + gap[1] + 1).clamp(max=total.shape[1] - 1)] - total[:, start + gap[0]]
    return (left * within).sum(1)


def _pairs(bound: Float[Tensor, "B M 2 L"], pair: Pair) -> Float[Tensor, " B"]:
    """Expected number of pairs in the right order, direction and distance, on either strand."""
    names = list(motifs())
    first, second = bound[:, names.index(pair.first)], bound[:, names.index(pair.second)]
    facing = 0 if pair.same else 1
    widths = motifs()[pair.first].width, motifs()[pair.second].width
    forward = _next_to(first[:, 0], second[:, facing], widths[0], pair.gap)
    return forward + _next_to(second[:, 1 - facing], first[:, 1], widths[1], pair.gap)


def true_activity(tokens: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    r"""The activity of the grammar, without noise.

    $A = \big[\sum_m 2 w_m (1 - e^{-n_m / 2}) + \sum_p g_p (1 - e^{-q_p})\big]
    \prod_r (1 - d_r (1 - e^{-n_r}))$

    over activators m, pairs p and repressors r, with n the expected number of bound sites and q
    that of pairs. Both strands count alike: a sequence is as active as its reverse complement.
    """
    bound = occupancy(tokens)
    count = dict(zip(motifs(), site_counts(bound).unbind(1), strict=True))
    gain = sum(2 * w * -torch.expm1(-count[name] / 2) for name, w in ACTIVATORS.items())
    gain = gain + sum(pair.gain * -torch.expm1(-_pairs(bound, pair)) for pair in PAIRS)
    for name, taken in REPRESSORS.items():
        gain = gain * (1 + taken * torch.expm1(-count[name]))
    assert isinstance(gain, Tensor)
    return gain


def true_accessibility(tokens: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Probability of being open: ``sigmoid(4 sum_m a_m (1 - exp(-n_m)) - 4)`` over the openers."""
    count = dict(zip(motifs(), site_counts(occupancy(tokens)).unbind(1), strict=True))
    pull = sum(a * -torch.expm1(-count[name]) for name, a in OPENERS.items())
    assert isinstance(pull, Tensor)
    return torch.sigmoid(4 * pull - 4)


# The generator: what sequences there are


def background(n: int, rng: np.random.Generator) -> Int[np.ndarray, "n L"]:
    """Sequences without sites, each with a G+C content of its own, uniform in 0.35 to 0.65."""
    law, after = letter_laws(rng.uniform(0.35, 0.65, n))
    tokens = np.empty((n, LENGTH), dtype=np.int64)
    for place in range(LENGTH):
        tokens[:, place] = (rng.random((n, 1)) > law.cumsum(1)[:, :3]).sum(1)
        law = after[np.arange(n), tokens[:, place]]
    return tokens


def letter_laws(
    content: Float[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, "n 4 4"]]:
    """Law of the first letter, and of each letter given the one before: stationary chains.

    A sequence has weight ``prod_l pi(x_l)``, where pi(C) + pi(G) is the content, times 1/4 for
    every C that a G follows, as such pairs are rare in vertebrates. Both strands are alike.
    """
    letters = np.stack([1 - content, content, content, 1 - content], axis=1) / 2
    weight = np.repeat(letters[:, None], 4, axis=1)
    weight[:, 1, 2] /= 4
    ahead = np.ones((len(content), 4, 1))
    for _ in range(30):  # towards the weight of all that may follow a letter
        ahead = weight @ ahead
        ahead /= ahead.max(1, keepdims=True)
    after = weight * ahead.transpose(0, 2, 1)
    after /= after.sum(2, keepdims=True)
    return np.linalg.matrix_power(after, 30)[:, 0], after


def _site(name: str, rng: np.random.Generator, *, scrambled: bool = False) -> list[int]:
    """A site drawn from a motif; from the motif with its columns in random order if scrambled."""
    law = motifs()[name].probability
    if scrambled:
        law = law[:, rng.permutation(law.shape[1])]
    return (rng.random(law.shape[1]) > law.cumsum(0)[:3]).sum(0).tolist()


def reverse_complement(site: Sequence[int]) -> list[int]:
    """The other strand; -1, any letter, stays."""
    return [letter if letter < 0 else 3 - letter for letter in reversed(site)]


def _pair(pair: Pair, rng: np.random.Generator, *, allowed: bool) -> list[int]:
    """Both sites and the letters between them, -1; at a forbidden distance if not allowed."""
    low, high = pair.gap
    gap = int(rng.integers(low, high + 1) if allowed else rng.integers(high + 5, high + 15))
    second = _site(pair.second, rng)
    second = second if pair.same else reverse_complement(second)
    return [*_site(pair.first, rng), *[-1] * gap, *second]


def _blocks(rng: np.random.Generator) -> list[list[int]]:
    """What is planted in one sequence, each block on a random strand.

    Half of all sequences are candidates: 1 to 4 activator sites, a pair in 4 of 10, a repressor in
    1 of 10. The other half are negatives: nothing planted; scrambled motifs; a pair too far apart;
    or activators next to a repressor.
    """
    kind = rng.choice(5, p=(0.5, 0.15, 0.15, 0.1, 0.1))
    weights = np.array(list(ACTIVATORS.values()))

    def sites(n: int, *, scrambled: bool = False) -> list[list[int]]:
        names = rng.choice(list(ACTIVATORS), size=n, p=weights / weights.sum())
        return [_site(str(name), rng, scrambled=scrambled) for name in names]

    def repressor() -> list[int]:
        return _site(str(rng.choice(list(REPRESSORS))), rng)

    if kind == 0:
        blocks = sites(int(rng.integers(1, 5)))
        if rng.random() < 0.4:
            blocks.append(_pair(PAIRS[rng.integers(len(PAIRS))], rng, allowed=True))
        if rng.random() < 0.1:
            blocks.append(repressor())
    elif kind == 1:
        blocks = []
    elif kind == 2:
        blocks = sites(int(rng.integers(1, 5)), scrambled=True)
    elif kind == 3:
        blocks = [_pair(PAIRS[rng.integers(len(PAIRS))], rng, allowed=False)]
    else:
        blocks = [*sites(int(rng.integers(1, 4))), repressor()]
    return [reverse_complement(block) if rng.random() < 0.5 else block for block in blocks]


def _plant(row: Int[np.ndarray, " L"], blocks: list[list[int]], rng: np.random.Generator) -> None:
    """Write the blocks into a sequence, in random order and without overlap."""
    free = LENGTH - sum(map(len, blocks))
    offsets = np.sort(rng.integers(free + 1, size=len(blocks)))
    written = 0
    for offset, which in zip(offsets, rng.permutation(len(blocks)), strict=True):
        block = np.array(blocks[which])
        place = row[offset + written :][: len(block)]
        place[block >= 0] = block[block >= 0]
        written += len(block)


@dataclass(frozen=True, kw_only=True)
class Grammar(Library):
    """Sequences drawn here, with noisy measurements of the activity that the grammar gives them."""

    sequences: int = 10_000
    """How many, all splits together."""
    noise: float = 0.4
    """Standard deviation of the Gaussian error of a measurement."""
    seed: int = 0
    """Draws sequences and errors; has no say in which sequence belongs where."""

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences is {self.sequences}; expected 1 or more")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise is {self.noise}; expected 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")

    @property
    def truth(self) -> Callable[[Int[Tensor, "B L"]], Float[Tensor, " B"]]:
        return true_activity

    @property
    def labels_accessible(self) -> bool:
        return True

    def everything(self) -> Measured:
        return _measured(self)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _measured(grammar: Grammar) -> Measured:
    rng = np.random.default_rng(grammar.seed)
    rows = background(grammar.sequences, rng)
    for row in rows:
        _plant(row, _blocks(rng), rng)
    tokens = torch.tensor(rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])])
    activity = torch.cat([true_activity(part) for part in tokens.split(256)])
    opening = torch.cat([true_accessibility(part) for part in tokens.split(256)])
    error = torch.tensor(rng.normal(size=len(tokens)) * grammar.noise)
    heard = torch.tensor(rng.random(len(tokens)))
    return Measured(
        tokens=tokens,
        activity=(activity + error).float(),
        accessible=(heard < opening).float(),
    )
