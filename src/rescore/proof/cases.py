"""What is claimed: for each algorithm, options one at a time from the default, and their crosses.

A new algorithm adds one function here, named in ``CASES``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rescore.algorithms.base import Algorithm
from rescore.algorithms.egspo import Egspo
from rescore.algorithms.reinforce import Reinforce
from rescore.objectives.advantages import Baseline
from rescore.processes.masked import Order
from rescore.proof.worlds import World
from rescore.sampling.decoder import Decoder
from rescore.sampling.record import Score


@dataclass(frozen=True, kw_only=True)
class Case:
    """E[estimator] = factor * gradient of (E[r] - beta KL), on one world with one decoder."""

    algorithm: Algorithm
    world: World
    order: Order = "random"
    temperature: float = 1.0
    factor: float | None
    """What the gradient is claimed to be multiplied by; None = claimed to be biased."""
    beta: float = 0.0
    """Weight of the KL in the objective, reward units per nat."""

    @property
    def name(self) -> str:
        """Module of the algorithm."""
        return type(self.algorithm).__module__.rpartition(".")[-1]

    @property
    def claimed(self) -> Literal["unbiased", "scaled", "biased"]:
        if self.factor is None:
            return "biased"
        return "unbiased" if self.factor == 1 else "scaled"

    @property
    def decoder(self) -> Decoder:
        return self.world.decoder(self.order, self.temperature)

    @property
    def option(self) -> str:
        """The order, and every setting that is not the default, as ``name=value`` words."""
        words = [*_settings(self.algorithm), f"order={self.order}"]
        if self.temperature != 1:
            words.append(f"temperature={self.temperature:g}")
        return " ".join(words)


def _settings(instance: Algorithm | Score) -> Iterator[str]:
    """``name=value`` where it differs from the default; the form of a ``Score`` is called score."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, Score):
            yield from _settings(value)
        elif value != field.default:
            yield f"{'score' if field.name == 'form' else field.name}={value}"


WORLDS = tuple(
    World(vocab_size, length, steps, blocks, network)
    for vocab_size, length, steps, blocks in ((3, 3, 3, 1), (3, 3, 2, 1), (2, 4, 2, 2), (2, 4, 4, 2))
    for network in ("table", "mlp")
)
ORDERS: tuple[Order, ...] = (
    "random",
    "left_to_right",
    "max_prob",
    "low_confidence",
    "plackett_luce",
)
DRAWN: tuple[Order, ...] = ("low_confidence", "plackett_luce")
"""Orders whose choice of positions is random and depends on the network."""
BASELINES: Mapping[Baseline, float] = {"none": 1.0, "leave_one_out": 1.0, "group_mean": 1 - 1 / 2}
"""Factor of each baseline in a group of two: a mean that includes the sample scales by 1 - 1/G."""


def exact_score(order: Order) -> Score:
    """The cheapest score that is exact for an order."""
    return Score(form="tokens_and_selection" if order in DRAWN else "tokens")


def chooses(world: World) -> bool:
    """True if some step leaves candidates unrevealed; else the positions it draws change nothing."""
    return world.steps > world.blocks


def reinforce() -> Iterator[Case]:
    """Exact on every world, with every order, if the score is; biased if it leaves something out."""
    for world, order, temperature in itertools.product(WORLDS, ORDERS, (1.0, 0.7)):
        at = At(world=world, order=order, temperature=temperature)
        for baseline, factor in BASELINES.items():
            yield at(Reinforce(baseline=baseline, score=exact_score(order)), factor)
        if order in DRAWN and chooses(world):
            yield at(Reinforce(), None)
        if order == "random" and temperature != 1:
            yield at(Reinforce(score=Score(score_temperature=1.0)), None)


def egspo() -> Iterator[Case]:
    """Top-K is biased unless K = T; importance draws are exact; a KL by sampled states is biased."""
    # One at a time from the default, the paper's method with two steps.
    default = Egspo(n_steps=2)
    for world in WORLDS[:2]:
        at = At(world=world, beta=default.beta)
        for algorithm in (
            default,
            replace(default, n_steps=1),
            replace(default, selection="importance"),
            replace(default, selection="importance", delta=0.5),
            replace(default, baseline="none"),
            replace(default, baseline="leave_one_out"),
            replace(default, clip_low=0.1),
            replace(default, clip_high=0.3),
            replace(default, kl="k1"),
            replace(default, kl="k2"),
            replace(default, kl="exact"),
            replace(default, score=Score(form="tokens_and_selection")),
        ):
            yield at(algorithm, None)
        yield replace(at, temperature=0.7)(
            replace(default, score=Score(score_temperature=1.0)), None
        )

    for world, order in itertools.product(WORLDS, ORDERS):
        at = At(world=world, order=order, temperature=0.7)
        n_all, exact = world.steps, exact_score(order)
        for n_steps, (baseline, factor) in itertools.product(range(1, n_all + 1), BASELINES.items()):
            top = Egspo(n_steps=n_steps, baseline=baseline, beta=0, score=exact)
            if n_steps == n_all:
                yield at(top, factor)
            elif baseline != "none":
                yield at(top, None)
            if n_steps == 1 or (n_steps == 2 and n_all == 2):
                yield at(replace(top, selection="importance"), factor)
        if order == "low_confidence" and chooses(world):
            yield at(
                Egspo(n_steps=1, selection="importance", baseline="none", beta=0), None
            )
        if order == "random":
            for kl in KLS:
                penalised = Egspo(n_steps=n_all, baseline="leave_one_out", beta=0.5, kl=kl)
                yield replace(at, beta=0.5)(penalised, None)


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {"reinforce": reinforce, "egspo": egspo}
"""By the module name of the algorithm."""
