"""What is claimed: for each algorithm, options one at a time from the default, and their crosses.

A new algorithm adds one function here, named in ``CASES``.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rescore.algorithms.base import Algorithm
from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.egspo import Egspo
from rescore.algorithms.flow_grpo import FlowGrpo
from rescore.algorithms.reinforce import Reinforce
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.algorithms.sepo import Sepo
from rescore.models.value import ValueCritic
from rescore.objectives.advantages import Baseline
from rescore.objectives.divergences import KlEstimator
from rescore.processes.masked import Order
from rescore.proof import gaussian_oracle, oracle, score_oracle
from rescore.proof.gaussian_worlds import GaussianWorld, KlMeaning
from rescore.proof.oracle import Estimate
from rescore.proof.score_worlds import EnergyWorld, Network, SamplerWorld, ScoreWorld
from rescore.proof.worlds import World
from rescore.sampling.decoder import Decoder
from rescore.sampling.record import Score


@dataclass(frozen=True, kw_only=True)
class Claim(abc.ABC):
    """E[estimator] = factor * gradient of (E[r] - beta KL), on one world."""

    algorithm: Algorithm
    world: World | ScoreWorld | GaussianWorld
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
    @abc.abstractmethod
    def option(self) -> str:
        """Every setting that is not the default, as ``name=value`` words."""

    @abc.abstractmethod
    def measure(self) -> tuple[Float[Tensor, " D"], Estimate]:
        """The exact gradient, and the estimator in expectation."""


@dataclass(frozen=True, kw_only=True)
class Case(Claim):
    """A claim about a masked process, in one order."""

    world: World
    order: Order = "random"
    temperature: float = 1.0
    exact_values: bool = False
    """The exact value of each state stands in the place of its completion's reward."""

    @property
    def decoder(self) -> Decoder:
        return self.world.decoder(self.order, self.temperature)

    @property
    def option(self) -> str:
        """The order comes last, and the temperature after it if it is not 1."""
        words = [*_settings(self.algorithm), f"order={self.order}"]
        if self.exact_values:
            words.insert(0, "r_hat=V")
        if self.temperature != 1:
            words.append(f"temperature={self.temperature:g}")
        return " ".join(words)

    def measure(self) -> tuple[Float[Tensor, " D"], Estimate]:
        exact = oracle.exact_gradient(self.world, self.decoder, self.beta)
        estimate = oracle.expectation(
            self.algorithm, self.world, self.decoder, exact_values=self.exact_values
        )
        return exact, estimate


@dataclass(frozen=True, kw_only=True)
class ScoreCase(Claim):
    """A claim about a process in continuous time."""

    world: ScoreWorld

    @property
    def option(self) -> str:
        """The kind of world comes last: ``energy`` or ``sampler``."""
        return " ".join([*_settings(self.algorithm), f"world={self.world.kind}"])

    def measure(self) -> tuple[Float[Tensor, " D"], Estimate]:
        exact = score_oracle.exact_gradient(self.world, self.beta)
        return exact, score_oracle.expectation(self.algorithm, self.world)


@dataclass(frozen=True, kw_only=True)
class GaussianCase(Claim):
    """A claim about a process with Gaussian noise."""

    world: GaussianWorld
    kl: KlMeaning = "step"
    """Of the objective."""
    value: Literal["exact", "wrong"] | None = None
    """What the critic says: the value of this chain, or something else. None = there is none."""
    group_size: int = 2
    """1 for methods whose samples know nothing of each other: longer chains can be enumerated."""
    through: Literal["all", "random"] = "all"
    """Which steps the exact gradient goes through: all of them, or those that draw noise."""

    @property
    def option(self) -> str:
        """The kind of world comes last."""
        words = [*_settings(self.algorithm)]
        words += [f"V={self.value}"] if self.value else []
        words += [f"through={self.through}"] if self.through != "all" else []
        words += [f"group_size={self.group_size}"] if self.group_size != 2 else []
        return " ".join([*words, "world=gaussian"])

    def measure(self) -> tuple[Float[Tensor, " D"], Estimate]:
        exact = gaussian_oracle.exact_gradient(
            self.world, self.beta, self.kl, only_random=self.through == "random"
        )
        estimate = gaussian_oracle.expectation(
            self.algorithm, self.world, critic=self._critic(), group_size=self.group_size
        )
        return exact, estimate

    def _critic(self) -> ValueCritic | None:
        if self.value is None:
            return None
        if isinstance(self.algorithm, Dpok):
            return self.world.critic(wrong=self.value == "wrong")
        assert isinstance(self.algorithm, ScoreAsAction)
        design, wrong = self.algorithm.design, self.value == "wrong"
        return self.world.critic(self.beta, self.kl, design=design, wrong=wrong)


def _settings(instance: Algorithm | Score) -> Iterator[str]:
    """``name=value`` where it differs from the default; the form of a ``Score`` is called score."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, Score):
            yield from _settings(value)
        elif value != field.default:
            is_form = isinstance(instance, Score) and field.name == "form"
            name = "score" if is_form else field.name
            yield f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


WORLDS = tuple(
    World(vocab_size, length, steps, blocks, network)
    for vocab_size, length, steps, blocks in (
        (3, 3, 3, 1),
        (3, 3, 2, 1),
        (2, 4, 2, 2),
        (2, 4, 4, 2),
    )
    for network in ("table", "mlp")
)
TWO_STEPS = tuple(world for world in WORLDS if world.steps == 2)
NETWORKS: tuple[tuple[int, int, Network], ...] = (
    (5, 1, "mlp"),
    (3, 2, "mlp"),
    (2, 3, "mlp"),
    (3, 2, "table"),
    (2, 3, "table"),
    (3, 2, "factorised"),
    (2, 3, "factorised"),
)
ENERGIES = tuple(
    EnergyWorld(process=process, vocab_size=vocab_size, length=length, network=network)
    for process in ("uniform", "absorbing")
    for vocab_size, length, network in NETWORKS
)
ONE_POSITION = SamplerWorld(process="uniform", vocab_size=3, length=1, steps=3)
TWO_POSITIONS = SamplerWorld(process="uniform", vocab_size=2, length=2, steps=2)
SAMPLERS = tuple(
    replace(world, process=process)
    for process in ("uniform", "absorbing")
    for world in (
        ONE_POSITION,
        TWO_POSITIONS,
        replace(TWO_POSITIONS, steps=3),
        replace(TWO_POSITIONS, steps=3, predictor="euler"),
        replace(TWO_POSITIONS, corrector_steps=1),
    )
)
DDIM = GaussianWorld(steps=3)
TWO_DDIM, ONE_DDIM = GaussianWorld(steps=2), GaussianWorld(steps=1)
TWO_FLOW = GaussianWorld(steps=2, noise="flow", solver="flow_sde", eta=0.7)
ONE_STATE = tuple(
    replace(world, steps=steps)
    for steps in (3, 2)
    for world in (
        replace(DDIM, eta=0.5),
        replace(DDIM, solver="euler_maruyama"),
        replace(DDIM, solver="euler_maruyama", eta=0.7),
        replace(DDIM, solver="flow_match_stochastic", noise="flow"),
        TWO_FLOW,
        DDIM,
    )
)
"""Of solvers that look at one state, with noise in every step."""
TWO_STATES = tuple(GaussianWorld(steps=steps, solver="dpm_solver_2m_sde") for steps in (3, 2))
QUIET = (
    replace(DDIM, t_min=0.0),
    replace(DDIM, window=(0, 2)),
    replace(DDIM, window=(1, 2)),
    replace(TWO_FLOW, window=(0, 1)),
)
"""Some steps draw no noise."""
WITHOUT_NOISE = tuple(
    GaussianWorld(steps=3, solver=solver, t_min=t_min)
    for solver in ("ddim_ode", "probability_flow")
    for t_min in (0.1, 0.0)
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
FEW_PATHS: tuple[Order, ...] = ("left_to_right", "max_prob")
"""Orders with so few paths that two draws of three or four steps can be enumerated too."""
BASELINES: Mapping[Baseline, float] = {"none": 1.0, "leave_one_out": 1.0, "group_mean": 0.5}
"""Factor of each baseline in a group of two: a mean that includes the sample scales by 1 - 1/G."""
KL: tuple[KlEstimator | Literal["exact"], ...] = ("k1", "k2", "k3", "exact")


def exact_score(order: Order) -> Score:
    """The cheapest score that is exact for an order."""
    return Score(form="tokens_and_selection" if order in DRAWN else "tokens")


def chooses(world: World) -> bool:
    """True if some step leaves candidates unrevealed; else which it draws changes nothing."""
    return world.steps > world.blocks


def reinforce() -> Iterator[Claim]:
    """Exact on every world, in every order, if the score is; biased if it leaves a part out."""
    for world, order, temperature in itertools.product(WORLDS, ORDERS, (1.0, 0.7)):
        case = partial(Case, world=world, order=order, temperature=temperature)
        for baseline, factor in BASELINES.items():
            algorithm = Reinforce(baseline=baseline, score=exact_score(order))
            yield case(algorithm=algorithm, factor=factor)
        if order in DRAWN and chooses(world):
            yield case(algorithm=Reinforce(), factor=None)
        if order == "random":
            yield case(algorithm=Reinforce(score=Score(form="tokens_and_selection")), factor=1.0)
        if order == "random" and temperature != 1:
            score = Score(score_temperature=1.0)
            yield case(algorithm=Reinforce(score=score), factor=None)
    for sampler, (baseline, factor) in itertools.product(SAMPLERS, BASELINES.items()):
        yield ScoreCase(algorithm=Reinforce(baseline=baseline), world=sampler, factor=factor)
    for chain, (baseline, factor) in itertools.product(
        (*ONE_STATE, *TWO_STATES), BASELINES.items()
    ):
        yield GaussianCase(algorithm=Reinforce(baseline=baseline), world=chain, factor=factor)
    with_kl = Reinforce(beta=0.5)
    for chain in (TWO_DDIM, TWO_FLOW):
        yield GaussianCase(algorithm=with_kl, world=chain, beta=with_kl.beta, factor=None)
    for chain in QUIET:
        yield GaussianCase(algorithm=Reinforce(), world=chain, factor=None)
        yield GaussianCase(algorithm=Reinforce(), world=chain, through="random", factor=1.0)


def egspo() -> Iterator[Case]:
    """Top-K is biased unless K = T, importance draws never; a KL that takes its states as given is.

    Such a KL has no gradient through how often a state is met, whichever estimator is used.
    """
    default = Egspo(n_steps=1)  # the paper's, on worlds where it keeps one of two steps
    for world in TWO_STEPS:
        case = partial(Case, world=world, beta=default.beta, factor=None)
        yield case(algorithm=default)
        yield case(algorithm=replace(default, n_steps=2))
        yield case(algorithm=replace(default, selection="importance"))
        yield case(algorithm=replace(default, selection="importance", delta=0.5))
        yield case(algorithm=replace(default, baseline="none"))
        yield case(algorithm=replace(default, baseline="leave_one_out"))
        yield case(algorithm=replace(default, clip_low=0.1))
        yield case(algorithm=replace(default, clip_high=0.3))
        yield case(algorithm=replace(default, beta=0.0), beta=0.0)
        yield case(algorithm=replace(default, kl="k1"))
        yield case(algorithm=replace(default, kl="k2"))
        yield case(algorithm=replace(default, kl="exact"))
        yield case(algorithm=replace(default, score=Score(form="tokens_and_selection")))
        yield case(algorithm=replace(default, selection="bottom"))
        yield case(algorithm=replace(default, selection="uniform"))
        yield case(algorithm=replace(default, selection="adaptive"))
        alone = partial(Case, world=world, factor=None)
        every = Egspo(selection="all", beta=0.0, baseline="leave_one_out")
        yield alone(algorithm=replace(every, aggregation="mean"))
        yield alone(algorithm=replace(every, lam=0.5, lam_schedule="rising", normalise=False))
        mixed = replace(every, score=Score(form="tokens_and_selection", selection_weight=0.3))
        if chooses(world):
            yield alone(algorithm=mixed, order="low_confidence")
            yield alone(algorithm=mixed, order="plackett_luce")
        unscaled = replace(default, score=Score(score_temperature=1.0))
        yield case(algorithm=unscaled, temperature=0.7)

    for world in WORLDS[:2]:  # of three steps: all of them, but their baseline goes by rank
        ranked = Egspo(n_steps=3, lam=0.5, beta=0.0, baseline="leave_one_out")
        yield Case(algorithm=ranked, world=world, order="left_to_right", factor=None)

    for world, order in itertools.product(WORLDS, ORDERS):
        case = partial(Case, world=world, order=order, temperature=0.7)
        for n_steps, baseline in itertools.product(range(1, world.steps + 1), BASELINES):
            top = Egspo(n_steps=n_steps, baseline=baseline, beta=0.0, score=exact_score(order))
            factor = BASELINES[baseline]
            yield case(algorithm=top, factor=factor if n_steps == world.steps else None)
            if n_steps == 1 or (n_steps == 2 and (world in TWO_STEPS or order in FEW_PATHS)):
                yield case(algorithm=replace(top, selection="importance"), factor=factor)
                share = n_steps / world.steps
                yield case(algorithm=replace(top, selection="random"), factor=factor * share)
        if order in DRAWN and chooses(world):
            drawn = Egspo(n_steps=1, selection="importance", baseline="leave_one_out", beta=0.0)
            yield case(algorithm=drawn, factor=None)
        yield from stepwise(world, order)

    for world, kl in itertools.product(WORLDS, KL):
        algorithm = Egspo(n_steps=world.steps, baseline="leave_one_out", beta=0.5, kl=kl)
        yield Case(algorithm=algorithm, world=world, beta=algorithm.beta, factor=None)


def stepwise(world: World, order: Order) -> Iterator[Case]:
    """EGSPO-SA: its baseline looks at the state only, so it changes no expectation of all steps.

    {top, importance, all} x {lambda 0.5, exact value} x {tokens, tokens_and_selection}; lambda 0 is
    what ``egspo`` itself claims.
    """
    case = partial(Case, world=world, order=order)
    for form in ("tokens", "tokens_and_selection"):
        if form == "tokens_and_selection" and order not in (*DRAWN, "random"):
            continue  # it adds nothing
        exact = form == "tokens_and_selection" or order not in DRAWN or not chooses(world)
        plain = Egspo(
            n_steps=1, beta=0.0, baseline="leave_one_out", lam=0.5, score=Score(form=form)
        )
        for selection in ("top", "importance", "all"):
            algorithm = replace(plain, selection=selection)
            factor = 1.0 if exact and selection != "top" else None
            yield case(algorithm=algorithm, factor=factor)
            ideal = replace(algorithm, lam=math.inf, baseline="none")
            yield case(algorithm=ideal, factor=factor, exact_values=True)
        if not exact:
            continue
        every = replace(plain, selection="all")
        yield case(algorithm=replace(every, normalise=False), factor=1.5)
        yield case(algorithm=replace(every, baseline="group_mean"), factor=0.5)
        yield case(algorithm=replace(every, lam_schedule="rising"), factor=1.0)
        yield case(algorithm=replace(every, lam=math.inf), factor=1.0)
        yield case(algorithm=replace(every, centre_completions=False), factor=1.0)


PLAIN_SEPO = Sepo(baseline="leave_one_out", normalise_std=False)
"""The defaults but for what is biased in every mode."""


def sepo() -> Iterator[ScoreCase]:
    """Where the scores are exact some modes are; none is for the sampler that really runs."""
    for world in ENERGIES:
        one = world.length == 1
        independent = one or world.network == "factorised"
        if world.process == "uniform":
            yield from sepo_options(
                world, replace(PLAIN_SEPO, mode="conditional"), exact=independent
            )
            yield from sepo_options(world, replace(PLAIN_SEPO, mode="ball"), exact=one)
            joint = replace(PLAIN_SEPO, mode="joint", likelihood="network")
            yield from sepo_options(world, joint, exact=one)
            for snis_draws in (1, 2):
                drawn = replace(joint, likelihood="snis", snis_draws=snis_draws)
                yield ScoreCase(algorithm=drawn, world=world, factor=1.0 if one else None)
            continue
        elbo = replace(PLAIN_SEPO, mode="elbo")
        yield from sepo_options(world, replace(elbo, masks=2), exact=True)
        for masks, antithetic in ((1, False), (2, False), (4, True)):
            drawn = replace(elbo, masks=masks, antithetic=antithetic)
            if masks < 4 or world.length < 3:  # the outcomes would be too many
                yield ScoreCase(algorithm=drawn, world=world, factor=1.0)
        for masks in sorted({1, world.length, 4}):  # sets beyond the positions stay empty
            singly = replace(PLAIN_SEPO, mode="pseudo_likelihood", masks=masks)
            factor = 1.0 if independent else None
            yield ScoreCase(algorithm=singly, world=world, factor=factor)

    for world in SAMPLERS:
        case = partial(ScoreCase, world=world, factor=None)
        yield case(algorithm=Sepo())
        for mode in ("conditional", "ball") if world.process == "uniform" else ("elbo",):
            yield case(algorithm=replace(PLAIN_SEPO, mode=mode))
        if world.process == "uniform":
            yield case(algorithm=replace(PLAIN_SEPO, mode="joint", snis_draws=2))
        else:
            yield case(algorithm=replace(PLAIN_SEPO, mode="pseudo_likelihood", masks=2))
        if world.process == "absorbing" and world.steps == 3:
            continue  # one path is impossible under the reference: the KL is infinite
        for kl_steps in (1, world.decoder.n_moves):
            with_kl = replace(PLAIN_SEPO, beta=0.5, kl_steps=kl_steps, masks=2)
            yield case(algorithm=with_kl, beta=with_kl.beta)


def sepo_options(world: EnergyWorld, plain: Sepo, *, exact: bool) -> Iterator[ScoreCase]:
    """One mode with each coefficient and baseline; the ratio is 1, so all coefficients are A.

    Dividing by the standard deviation of a group is biased whatever the mode.
    """
    case = partial(ScoreCase, world=world, factor=1.0 if exact else None)
    yield case(algorithm=plain)
    yield case(algorithm=replace(plain, coefficient="plain"))
    yield case(algorithm=replace(plain, coefficient="capped"))
    if plain.mode != "ball":
        yield case(algorithm=replace(plain, baseline="none"))
    yield case(algorithm=replace(plain, baseline="critic"))
    half = replace(plain, baseline="group_mean")
    yield case(algorithm=half, factor=0.5 if exact else None)
    yield case(algorithm=replace(half, normalise_std=True), factor=None)


def score_as_action() -> Iterator[GaussianCase]:
    """Both forms are exact with the value of the chain, for the KL that they are told to use."""
    for form in ("ppo", "score_gradient"):
        default = ScoreAsAction(form=form)
        for world in (*ONE_STATE, *TWO_STATES):
            yield _valued(default, world)
            if world.noise == "vp":
                yield _valued(replace(default, kl="continuous"), world)
        yield from score_as_action_options(default)

    default = ScoreAsAction()
    for world in (TWO_DDIM, ONE_DDIM):
        for whitening in ("global", "per_step"):
            white = replace(default, whitening=whitening, beta=0.0)
            yield _valued(white, world, group_size=2, factor=None)
    yield _valued(replace(default, advantage_clip=1.0), DDIM, factor=None)
    for world in QUIET:
        yield _valued(replace(default, beta=0.0), world, factor=None)
        yield _valued(replace(default, beta=0.0), world, through="random")

    default = ScoreAsAction(form="score_gradient")
    for world in QUIET:  # trained where nothing costs, or where the KL of a step is known
        yield _valued(replace(default, beta=0.0), world)
        yield _valued(default, world, factor=None)
        yield _valued(default, world, through="random")
    for world in WITHOUT_NOISE:
        yield _valued(replace(default, beta=0.0), world)
        yield _valued(replace(default, kl="continuous"), world)
    rate = replace(default, kl="continuous", weighting="continuous")
    yield _valued(rate, DDIM, factor=None)
    yield _valued(replace(default, through_score=False), DDIM, factor=None)
    yield _valued(replace(default, through_score=False, design="plain"), DDIM)


def score_as_action_options(default: ScoreAsAction) -> Iterator[GaussianCase]:
    """What both forms share, one at a time."""
    for beta in (0.0, 0.5):
        yield _valued(replace(default, beta=beta), DDIM)
    yield _valued(replace(default, beta=0.5, kl="continuous"), DDIM)
    for n_steps in (1, 2):
        yield _valued(replace(default, n_steps=n_steps), DDIM)
    for design in ("linear", "constant", "plain"):
        yield _valued(replace(default, design=design), DDIM)
    yield _valued(replace(default, proximal=0.3), DDIM)
    yield _valued(default, DDIM, value="wrong", factor=None)


def _valued(
    algorithm: ScoreAsAction,
    world: GaussianWorld,
    *,
    value: Literal["exact", "wrong"] = "exact",
    group_size: int = 1,
    through: Literal["all", "random"] = "all",
    factor: float | None = 1.0,
) -> GaussianCase:
    """Score as Action with a given critic, against the objective that it names."""
    return GaussianCase(
        algorithm=algorithm,
        world=world,
        beta=algorithm.beta,
        kl=algorithm.kl,
        value=value,
        group_size=group_size,
        through=through,
        factor=factor,
    )


def dpok() -> Iterator[GaussianCase]:
    """Any V(x, t) is a baseline; the KL takes its states as given, as it does in ``egspo``."""
    default = Dpok()
    plain = replace(default, beta=0.0)
    for world, value in itertools.product((*ONE_STATE, *TWO_STATES), ("exact", "wrong")):
        yield GaussianCase(algorithm=plain, world=world, value=value, group_size=1, factor=1.0)
    for world, through in itertools.product(QUIET, ("all", "random")):
        yield GaussianCase(
            algorithm=plain,
            world=world,
            value="exact",
            group_size=1,
            through=through,
            factor=None if through == "all" else 1.0,
        )
    for beta in (default.beta, 0.5):
        yield GaussianCase(
            algorithm=replace(default, beta=beta),
            world=DDIM,
            beta=beta,
            value="exact",
            group_size=1,
            factor=None,
        )


def ddpo() -> Iterator[GaussianCase]:
    """Biased by its standard deviation in all settings; drawing steps adds nothing to that."""
    default = Ddpo()
    for world in (*TWO_STATES, *ONE_STATE):
        yield GaussianCase(algorithm=default, world=world, factor=None)
    for world in (TWO_DDIM, ONE_DDIM):
        batch = replace(default, statistics="batch")
        yield GaussianCase(algorithm=batch, world=world, factor=None)
    case = partial(GaussianCase, world=TWO_DDIM, factor=None)
    yield case(algorithm=replace(default, n_steps=1))
    yield case(algorithm=replace(default, advantage_clip=math.inf))
    yield case(algorithm=replace(default, beta=0.01), beta=0.01)


def flow_grpo() -> Iterator[GaussianCase]:
    """As ``ddpo``; with a window, part of the gradient is not looked for."""
    default = FlowGrpo()
    plain = replace(default, beta=0.0)
    for world in (*TWO_STATES, *ONE_STATE, QUIET[-1]):
        yield GaussianCase(algorithm=default, world=world, beta=default.beta, factor=None)
    for world in (TWO_FLOW, QUIET[-1], ONE_DDIM):
        case = partial(GaussianCase, world=world, factor=None)
        yield case(algorithm=plain)
        yield case(algorithm=replace(plain, std="batch"))


CASES: Mapping[str, Callable[[], Iterator[Claim]]] = {
    "reinforce": reinforce,
    "egspo": egspo,
    "sepo": sepo,
    "score_as_action": score_as_action,
    "dpok": dpok,
    "ddpo": ddpo,
    "flow_grpo": flow_grpo,
}
"""By the module name of the algorithm."""
