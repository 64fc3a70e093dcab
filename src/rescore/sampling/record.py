"""Record: what an algorithm wants saved on the way down (cf. ``SaveAt`` in diffrax)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the log-probability of a step means."""

    form: Literal["tokens", "tokens_and_selection"] = "tokens"
    """``tokens``: the revealed tokens only, as in EGSPO (arXiv:2603.12554).
    ``tokens_and_selection``: also which positions were revealed; exact for every order."""

    selection_weight: float = 1.0
    """What the choice of positions counts for beside the tokens, in ``tokens_and_selection``. Any
    value but 1 is biased: a compromise between the two forms."""

    score_temperature: float | None = None
    """Temperature of the law tokens are scored under; None = the one they were sampled at, which is
    exact. 1 is what the released EGSPO code does whatever the sampling temperature; it is
    biased."""

    def __post_init__(self) -> None:
        if not 0 <= self.selection_weight <= 1:
            raise ValueError(f"selection_weight must lie in [0, 1], got {self.selection_weight}")
        if self.score_temperature is not None and self.score_temperature <= 0:
            raise ValueError(
                f"score_temperature must be positive, got {self.score_temperature}; "
                f"leave it out to score at the sampling temperature"
            )


Choice = Literal["top", "bottom", "uniform", "random", "importance"]
"""Which steps are kept; see ``Slots``."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Keep up to ``n`` steps per sample while sampling; steps that reveal nothing never count."""

    n: int | None
    """K, at most the number of steps except for ``importance``; None = every step."""
    by: Choice
    """``top``, ``bottom``: the n steps of largest or smallest entropy, in that order; the earlier
    one on a tie. ``uniform``: evenly spaced, the first and the last among them. ``random``: n
    distinct steps, every set equally likely. ``importance``: n independent draws of a step with
    probability q proportional to entropy + ``delta``, with replacement, each weighted
    1 / (n q)."""
    delta: float = 0.01
    """Added to the entropies of ``importance`` (nats), so that every step can be drawn."""
    completions: bool = False
    """Also keep the one-step completion from the state before each step."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What to save besides the path itself and its log-probabilities."""

    score: Score = Score()
    """The score that ``log_prob`` is recorded in."""
    entropy: bool = False
    """Save the entropy of the sampling law, summed over the positions a step reveals."""
    slots: Slots | None = None
    """Choose steps on the way down."""
    moves: Literal["all"] | int = 0
    """Steps of a process in continuous time to keep, with the states before and after: all of them
    (2 T L tokens per sample), or this many at random. Masked paths need none, they are rebuilt; of
    continuous samples all states are kept or none."""
    outputs: bool = False
    """Keep what the network said about every state, of continuous samples only."""
