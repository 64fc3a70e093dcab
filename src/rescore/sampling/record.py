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

    score_temperature: float | None = None
    """Temperature of the law tokens are scored under; None = the one they were sampled at, which is
    exact. 1 is what the released EGSPO code does whatever the sampling temperature; it is
    biased."""

    def __post_init__(self) -> None:
        if self.score_temperature is not None and self.score_temperature <= 0:
            raise ValueError(
                f"score_temperature must be positive, got {self.score_temperature}; "
                f"leave it out to score at the sampling temperature"
            )


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Keep the one-step completion of ``n`` steps per sample while sampling."""

    n: int
    by: Literal["top_entropy", "reservoir"]
    """``top_entropy``: the n steps of largest entropy. ``reservoir``: n independent draws of a step
    with probability q proportional to entropy + ``delta``, with replacement."""
    delta: float = 1e-3
    """Added to the entropies (nats) of the reservoirs, so that every step can be drawn."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What to save besides the path itself and its log-probabilities."""

    score: Score = Score()
    """The score that ``log_prob`` is recorded in."""
    entropy: bool = False
    """Save the entropy of the sampling law, summed over the positions a step reveals."""
    slots: Slots | None = None
    """Save one-step completions."""
