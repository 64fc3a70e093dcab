r"""Gaussian noise: its schedules, and all that follows from a reverse step that is affine.

Data x_0 are seen through x_t = alpha_t x_0 + sigma_t eps, the law at time t of

    dx = f(t) x dt + g(t) dw,    f = (log alpha)',    g^2 = (sigma^2)' - 2 f sigma^2.

A solver (``rescore.processes.solvers``) moves from t to s < t by a step that is affine in the
output a of the network, whatever it predicts, and in a noise z ~ N(0, I):

    x_s = A x_t + B a + S z    (two-step solvers: + A' x_before + B' a_before).

Log-probability, ratio, KL and advantage follow from these coefficients alone. Which losses a step
can serve is a matter of its type:

    AffineStep           ratio, log-probability, step KL, closed-form advantage
    TwoStep              ratio, log-probability, step KL; both outputs computed with gradients
    DeterministicStep, DeterministicTwoStep, HeunStep
                         none: the next state has no density given the last. For sampling,
                         evaluation, and losses through the reward's gradient or without a path

Log-probabilities are in nats, sums over all dimensions of a sample, in float32 or better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rescore.processes.convert import Prediction, score_coefficients
from rescore.types import State

C = TypeVar("C", bound="_Rows")

# ---- schedules -----------------------------------------------------------------------------------


class _Preserving:
    """alpha^2 + sigma^2 = 1: all follows from beta and its integral n, alpha^2 = exp(-n)."""

    def beta(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        raise NotImplementedError

    def beta_integral(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        raise NotImplementedError

    def alpha(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Amplitude of the signal, float64."""
        return torch.exp(-self.beta_integral(t) / 2)

    def sigma(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Standard deviation of the noise, float64."""
        return torch.sqrt(-torch.expm1(-self.beta_integral(t)))

    def log_snr(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log(alpha^2 / sigma^2)."""
        return -torch.log(torch.expm1(self.beta_integral(t)))

    def drift(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """f = -beta / 2."""
        return -self.beta(t) / 2

    def g2(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """g^2 = beta."""
        return self.beta(t)

    def g2_integral(self, s: Shaped[Tensor, "*B"], t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of g^2 from s to t: log(alpha_s^2 / alpha_t^2)."""
        return self.beta_integral(t) - self.beta_integral(s)


@dataclass(frozen=True)
class VariancePreserving(_Preserving):
    """dx = -beta x / 2 dt + sqrt(beta) dw with beta linear in t, from beta_min to beta_max.

    Source: the VP SDE of Song et al. 2021, arXiv:2011.13456, with its usual constants.

    Raises:
        ValueError: not 0 <= beta_min <= beta_max with beta_max > 0.
        TypeError: a time of an integer dtype.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max < math.inf or self.beta_max == 0:
            raise ValueError(
                f"beta runs from {self.beta_min} to {self.beta_max}, but it must start at 0 or "
                "more, not fall, and end above 0"
            )

    def beta(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Rate of the noise at t."""
        return self.beta_min + (self.beta_max - self.beta_min) * _time(t)

    def beta_integral(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of beta from 0 to t."""
        t = _time(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2


@dataclass(frozen=True, eq=False)
class DiscreteTable(_Preserving):
    """The table of alpha^2 that a model was trained with, as diffusers' ``alphas_cumprod``.

    Entry n of M stands at time (n + 1) / M (``time_of``); time 0 is what comes after entry 0. In
    between log alpha^2 is linear, so that beta is constant over each interval; at an entry it is
    that of the interval below, which a step down from there runs through.

    Raises:
        ValueError: entries not in [0, 1) or not falling, or ``final`` out of place.
        TypeError: a time of an integer dtype.
    """

    alphas_cumprod: Float[Tensor, " M"]
    """alpha^2 of every entry, clean to noisy."""
    final: float = 1.0
    """alpha^2 at time 0: 1 (diffusers' ``set_alpha_to_one=True``), or the first entry (False)."""

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.double()
        if len(table) == 0 or bool(
            (table.diff() >= 0).any() | (table < 0).any() | (table >= 1).any()
        ):
            raise ValueError(
                "alphas_cumprod must fall from entry to entry and lie in [0, 1), "
                f"but its ends are {table[:1].tolist()} and {table[-1:].tolist()}"
            )
        if not float(table[0]) <= self.final <= 1:
            raise ValueError(
                f"final is {self.final}, but time 0 has less noise than the first entry: give 1.0 "
                f"or alphas_cumprod[0] = {float(table[0])}"
            )

    def time_of(self, entry: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """(n + 1) / M, the time of entry n; the entry -1 is time 0."""
        return (entry.double() + 1) / len(self.alphas_cumprod)

    def beta(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Slope of -log alpha^2 in the interval that ends at t."""
        noise, below, _ = self._locate(t)
        return (noise[below + 1] - noise[below]) * len(self.alphas_cumprod)

    def beta_integral(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """-log alpha^2, which starts at -log final."""
        noise, below, part = self._locate(t)
        return noise[below] + part * (noise[below + 1] - noise[below])

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log alpha^2 at 0, 1/M, ..., 1; the interval (below, below + 1] of t; the place in it."""
        t = _time(t)
        table = self.alphas_cumprod.to(t)
        noise = -torch.cat([table.new_tensor([self.final]), table]).log()
        place = t * len(table)
        entry = place.round()
        place = torch.where((place - entry).abs() < 1e-4, entry, place)  # times from float32
        below = (place.ceil().long() - 1).clamp(min=0)
        return noise, below, place - below


@dataclass(frozen=True)
class VarianceExploding:
    """dx = g dw, sigma_t = sigma_min (sigma_max / sigma_min)^t. At t = 0 some noise is left.

    Source: the VE SDE of Song et al. 2021, arXiv:2011.13456, with its usual constants.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
        TypeError: a time of an integer dtype.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma runs from {self.sigma_min} to {self.sigma_max}, but it must grow between "
                "two positive numbers"
            )

    def alpha(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Amplitude of the signal: 1."""
        return torch.ones_like(_time(t))

    def sigma(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Standard deviation of the noise, float64."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** _time(t)

    def log_snr(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log(alpha^2 / sigma^2)."""
        return -2 * torch.log(self.sigma(t))

    def drift(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """f = 0."""
        return torch.zeros_like(_time(t))

    def g2(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """g^2 = (sigma^2)'."""
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.sigma(t) ** 2

    def g2_integral(self, s: Shaped[Tensor, "*B"], t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of g^2 from s to t: sigma_t^2 - sigma_s^2."""
        return self.sigma(t) ** 2 - self.sigma(s) ** 2


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x_0 + t eps. A shift of the noise levels is a choice of times.

    Source: Liu et al. 2022, arXiv:2209.03003, with data at t = 0 as in SD3, arXiv:2403.03206.

    Raises:
        TypeError: a time of an integer dtype.
    """

    def alpha(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """1 - t, float64."""
        return 1 - _time(t)

    def sigma(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """t, float64."""
        return _time(t)

    def log_snr(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """log(alpha^2 / sigma^2)."""
        return 2 * (torch.log1p(-_time(t)) - torch.log(_time(t)))

    def drift(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """f = -1 / (1 - t)."""
        return -1 / (1 - _time(t))

    def g2(self, t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """g^2 = 2 t / (1 - t), infinite at t = 1."""
        return 2 * _time(t) / (1 - _time(t))

    def g2_integral(self, s: Shaped[Tensor, "*B"], t: Shaped[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Integral of g^2 from s to t: 2 (s - t) + 2 log((1 - s) / (1 - t)); infinite at t = 1."""
        s, t = _time(s), _time(t)
        return 2 * (s - t + torch.log1p(-s) - torch.log1p(-t))


GaussianSchedule = VariancePreserving | VarianceExploding | RectifiedFlow | DiscreteTable
"""Any of the schedules. f, g^2 and their integrals are per unit of t; all values are float64."""

# ---- steps ---------------------------------------------------------------------------------------


class _Rows:
    """Coefficients of N steps, a row each."""

    def take(self: C, rows: Shaped[Tensor, " n"] | slice) -> C:
        """Some of the rows, by number, by mask or a range."""
        return self._map(lambda coefficient: coefficient[rows])

    def to(self: C, device: torch.device | str) -> C:
        """The same rows on ``device``."""
        return self._map(lambda coefficient: coefficient.to(device))

    def _map(self: C, function: Callable[[Tensor], Tensor]) -> C:
        assert dataclasses.is_dataclass(self)
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return type(self)(
            *(v._map(function) if isinstance(v, _Rows) else function(v) for v in values)
        )


@dataclass(frozen=True, eq=False)
class AffineStep(_Rows):
    """x_s = on_x x_t + on_a a + std z: the A, B and S of one step, float64, of length N or 1.

    std is 0 in a last step that leaves no noise (s = 0): it can be drawn, but it has no density,
    and the functions of likelihood refuse it. Leave such rows out: ``step.take(step.is_random)``.
    What the policy does there is then not trained, as far as the gradient of the likelihood goes.
    """

    on_x: Float[Tensor, " N"]
    on_a: Float[Tensor, " N"]
    std: Float[Tensor, " N"]

    @property
    def is_random(self) -> Bool[Tensor, " N"]:
        """Where there is noise, so that there is a density."""
        return self.std > 0


@dataclass(frozen=True, eq=False)
class TwoStep(_Rows):
    """x_s = on_x x_t + on_a a + on_x_before x_before + on_a_before a_before + std z.

    The state of the chain is (x_t, x_before), two states in a row, and both a = network(x_t) and
    a_before = network(x_before) are functions of the parameters: compute both with gradients. With
    a stored a_before the ratio is still 1 at the old parameters, but its gradient is another one.
    std may be 0 as in ``AffineStep``.
    """

    on_x: Float[Tensor, " N"]
    on_a: Float[Tensor, " N"]
    on_x_before: Float[Tensor, " N"]
    on_a_before: Float[Tensor, " N"]
    std: Float[Tensor, " N"]

    @property
    def is_random(self) -> Bool[Tensor, " N"]:
        """Where there is noise, so that there is a density."""
        return self.std > 0


@dataclass(frozen=True, eq=False)
class DeterministicStep(_Rows):
    """x_s = on_x x_t + on_a a. No likelihood."""

    on_x: Float[Tensor, " N"]
    on_a: Float[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class DeterministicTwoStep(_Rows):
    """x_s = on_x x_t + on_a a + on_x_before x_before + on_a_before a_before. No likelihood."""

    on_x: Float[Tensor, " N"]
    on_a: Float[Tensor, " N"]
    on_x_before: Float[Tensor, " N"]
    on_a_before: Float[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class HeunStep(_Rows):
    """A guess x_guess = mean(guess, x_t, a), then ``corrected`` by network(x_guess, s).

    Where s has no noise the guess is final: there the correction is the guess. No likelihood.
    """

    guess: DeterministicStep
    on_x: Float[Tensor, " N"]
    on_a: Float[Tensor, " N"]
    on_x_guess: Float[Tensor, " N"]
    on_a_guess: Float[Tensor, " N"]

    def corrected(self, x_t: State, a: State, x_guess: State, a_guess: State) -> State:
        """x_s = on_x x_t + on_a a + on_x_guess x_guess + on_a_guess a_guess."""
        first = _times(self.on_x, x_t) + _times(self.on_a, a)
        return first + _times(self.on_x_guess, x_guess) + _times(self.on_a_guess, a_guess)


RandomStep = AffineStep | TwoStep
"""Steps with a density."""
Step = AffineStep | TwoStep | DeterministicStep | DeterministicTwoStep
"""Steps made from outputs at states that are there already; Heun's guesses another first."""


def mean(
    step: Step,
    x_t: State,
    a: State,
    *,
    x_before: State | None = None,
    a_before: State | None = None,
) -> State:
    """The next state without its noise, in float32 or better.

    Args:
        step: its coefficients.
        x_t: the present state.
        a: the network's output there.
        x_before: the state before, for two-step solvers and only for them.
        a_before: the network's output there.

    Raises:
        ValueError: a state before that is missing or not asked for; wrong number of rows.
    """
    return _times(step.on_x, x_t) + _by_network(step, a, a_before) + _by_past(step, x_before)


def draw(
    step: RandomStep,
    x_t: State,
    a: State,
    z: State,
    *,
    x_before: State | None = None,
    a_before: State | None = None,
) -> State:
    """The next state x_s = mean + std z, given standard normal noise z. Arguments as in ``mean``.

    Raises:
        ValueError: a deterministic step, which takes no noise; and as ``mean``.
    """
    _check_random(step)
    return mean(step, x_t, a, x_before=x_before, a_before=a_before) + _times(step.std, z)


def step_log_prob(
    step: RandomStep,
    x_t: State,
    a: State,
    x_s: State,
    *,
    x_before: State | None = None,
    a_before: State | None = None,
) -> Float[Tensor, " B"]:
    """log N(x_s; mean, std^2 I), all constants included, summed over dimensions, nats, float64.

    Args:
        step: its coefficients.
        x_t: the present state.
        a: the network's output there; gradients flow through it.
        x_s: the next state that was drawn.
        x_before: the state before, for ``TwoStep`` and only for it.
        a_before: the network's output there, with gradients too.

    Raises:
        ValueError: a deterministic step, or a row with std = 0; and as ``mean``.
    """
    _check_density(step)
    residual = _precise(x_s) - mean(step, x_t, a, x_before=x_before, a_before=a_before)
    std = step.std.to(residual.device)
    n_dims = math.prod(residual.shape[1:])
    constant = n_dims * (torch.log(std) + 0.5 * math.log(2 * math.pi))
    return -_dot(residual, residual).double() / (2 * std**2) - constant


def log_ratio(
    step: RandomStep,
    x_t: State,
    a: State,
    a_old: State,
    x_s: State,
    *,
    x_before: State | None = None,
    a_before: State | None = None,
    a_before_old: State | None = None,
) -> Float[Tensor, " B"]:
    """log N(x_s; mean of a) - log N(x_s; mean of a_old), nats.

    From the difference of the means, so that close outputs lose no digits: exactly 0 for equal
    ones. Arguments and errors as in ``step_log_prob``.
    """
    _check_density(step)
    change = _by_network(step, _precise(a) - _precise(a_old), _change(a_before, a_before_old))
    old = mean(step, x_t, a_old, x_before=x_before, a_before=a_before_old)
    return _dot(change, _precise(x_s) - old - change / 2) / step.std.to(change) ** 2


def step_kl(
    step: RandomStep,
    a: State,
    a_ref: State,
    *,
    a_before: State | None = None,
    a_before_ref: State | None = None,
) -> Float[Tensor, " B"]:
    """KL(step with a || step with a_ref) from the same state: |difference of means|^2 / (2 std^2).

    Exact for the chain that is simulated, in nats; summed along a path it is the KL of the chains.
    At practical numbers of steps it is not ``continuous_kl``: for DDIM it is much larger.

    Raises:
        ValueError: a deterministic step, or a row with std = 0: unless the outputs are equal, its
            KL is infinite.
    """
    _check_density(step)
    change = _by_network(step, _precise(a) - _precise(a_ref), _change(a_before, a_before_ref))
    return _dot(change, change) / (2 * step.std.to(change) ** 2)


class Advantage(NamedTuple):
    """Of a step (or a rate, per unit of t); the whole is reward + kl_weight * penalty."""

    reward: Float[Tensor, " B"]
    """Units of the value whose gradient is used."""
    penalty: Float[Tensor, " B"]
    """Nats: what the step does to the KL to the reference, with a minus sign."""


def step_advantage(
    step: AffineStep, x_t: State, a: State, a_ref: State, x_s: State, value_gradient: State
) -> Advantage:
    r"""How good the noise of this step was, to first order, in closed form.

    With the sampler's noise read as noise of the action, a_k = a + (S / B) z:

        reward  = B <grad V, a_k - a> = <grad V, x_s - mean>
        penalty = -(B^2 / 2 S^2) (|a_k - a_ref|^2 - |a - a_ref|^2) + d / 2,

    both of mean 0 given x_t; d / 2 undoes the mean -d / 2 that sampling gives the penalty. The
    reward part is what agrees with increments of V; the penalty is noisy when a differs from a_ref.
    Use the reward part and subtract kl_weight times the gradient of ``step_kl``, or add the penalty
    and do not: its score-function gradient is -grad KL already.

    A two-step solver is not served: there a acts on the state after the next as well, and the
    value's gradient in both states is needed.

    Args:
        step: its coefficients.
        x_t: the present state.
        a: the policy's output there.
        a_ref: the reference's.
        x_s: the next state that was drawn.
        value_gradient: gradient of V in x, at (t, x_t).

    Raises:
        ValueError: a step of another type, or a row with std = 0.
    """
    if not isinstance(step, AffineStep):
        raise ValueError(
            f"a {type(step).__name__} has no closed-form advantage: one-step random solvers have"
        )
    _check_density(step)
    move = _precise(x_s) - mean(step, x_t, a)
    apart = _by_network(step, _precise(a) - _precise(a_ref), None)
    variance, n_dims = step.std.to(move) ** 2, math.prod(move.shape[1:])
    excess = (_dot(move, move) + 2 * _dot(move, apart)) / (2 * variance)
    return Advantage(_dot(_precise(value_gradient), move), n_dims / 2 - excess)


# ---- rates in continuous time --------------------------------------------------------------------


def girsanov_rate(
    schedule: GaussianSchedule,
    t: Float[Tensor, " N"],
    a: State,
    a_ref: State,
    *,
    prediction: Prediction,
    eta: float = 1.0,
) -> Float[Tensor, " B"]:
    r"""$\frac{1}{2} ((1 + \eta^2) / 2\eta)^2 g^2 |score - score_{ref}|^2$, nats per unit of t.

    Integrated along paths of dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dw, run from t = 1
    to 0, it is KL(path law || path law of the reference), by Girsanov.

    Raises:
        ValueError: eta is 0, where the laws of paths are singular; a t where g^2 is infinite.
    """
    per_score = _drift_gain(eta) ** 2 / (2 * eta**2) * schedule.g2(t)
    return _squared(per_score * _score_gain(schedule, t, prediction) ** 2, a, a_ref)


def continuous_kl(
    schedule: GaussianSchedule,
    t: Float[Tensor, " N"],
    s: Float[Tensor, " N"],
    a: State,
    a_ref: State,
    *,
    prediction: Prediction,
    eta: float = 1.0,
) -> Float[Tensor, " B"]:
    """``girsanov_rate`` over a step from t to s, with the difference of the scores held: nats.

    Depends on the number of steps only through where scores are taken, unlike ``step_kl``.

    Raises:
        ValueError: as ``girsanov_rate``.
    """
    per_score = _drift_gain(eta) ** 2 / (2 * eta**2) * schedule.g2_integral(s, t)
    return _squared(per_score * _score_gain(schedule, t, prediction) ** 2, a, a_ref)


def advantage_rate(
    schedule: GaussianSchedule,
    t: Float[Tensor, " N"],
    action: State,
    a: State,
    a_ref: State,
    value_gradient: State,
    *,
    prediction: Prediction,
    eta: float = 1.0,
) -> Advantage:
    """What ``action`` in place of a at t is worth, per unit of t; all as outputs of a network.

    With G = (1 + eta^2) / 2 g^2 and scores u (action), v (a), w (a_ref):

        reward  = G <u - v, grad V>
        penalty = -(G^2 / (2 eta^2 g^2)) (|u - w|^2 - |v - w|^2).

    For an action that was not sampled, such as another policy's output: then J(new) - J(old) is the
    integral of reward + kl_weight * penalty along paths of the new policy. For a sampled one use
    ``step_advantage``. The gradient in the action, at action = a, is that of the policy gradient.

    Raises:
        ValueError: as ``girsanov_rate``.
    """
    gain = _score_gain(schedule, t, prediction)
    along = _drift_gain(eta) * schedule.g2(t) * gain
    change = _precise(action) - _precise(a)
    reward = _dot(_times(along, change), _precise(value_gradient))
    per_score = _drift_gain(eta) ** 2 / (2 * eta**2) * schedule.g2(t)
    now, held = (_squared(per_score * gain**2, b, a_ref) for b in (action, a))
    return Advantage(reward, held - now)


# ---- parts ---------------------------------------------------------------------------------------


def _drift_gain(eta: float) -> float:
    if not eta > 0:
        raise ValueError(
            f"eta is {eta}: without noise two policies' paths have no KL and no density; use eta "
            "above 0, or a loss that needs neither"
        )
    return (1 + eta**2) / 2


def _score_gain(
    schedule: GaussianSchedule, t: Float[Tensor, " N"], prediction: Prediction
) -> Float[Tensor, " N"]:
    """Change of the score per change of the network's output."""
    if not bool(schedule.g2(t).isfinite().all()):
        raise ValueError(f"g^2 of {schedule} is infinite at some t (pure noise): start below t = 1")
    return score_coefficients(prediction, schedule.alpha(t), schedule.sigma(t))[1]


def _squared(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    change = _precise(a) - _precise(b)
    _check_rows(weight, change)
    return weight.to(change) * _dot(change, change)


def _by_network(step: Step, a: Tensor, a_before: Tensor | None) -> Tensor:
    """What the outputs of the network add to the next state."""
    now = _times(step.on_a, a)
    if isinstance(step, AffineStep | DeterministicStep):
        if a_before is not None:
            raise ValueError(f"a_before was given, but a {type(step).__name__} uses one output")
        return now
    if a_before is None:
        raise ValueError(
            f"a {type(step).__name__} needs a_before, the network's output at the state before, "
            "computed with the same parameters as a"
        )
    return now + _times(step.on_a_before, a_before)


def _by_past(step: Step, x_before: Tensor | None) -> Tensor | float:
    if isinstance(step, AffineStep | DeterministicStep):
        if x_before is not None:
            raise ValueError(f"x_before was given, but a {type(step).__name__} uses one state")
        return 0.0
    if x_before is None:
        raise ValueError(f"a {type(step).__name__} needs x_before, the state before x_t")
    return _times(step.on_x_before, x_before)


def _change(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None or old is None:
        if new is not old:
            raise ValueError("give the outputs at the state before for both policies or for none")
        return None
    return _precise(new) - _precise(old)


def _check_random(step: object) -> RandomStep:
    if not isinstance(step, AffineStep | TwoStep):
        raise ValueError(
            f"a {type(step).__name__} is deterministic: the next state has no density given the "
            "last, so that there is no log-probability, ratio or KL. Use a random solver (ddim "
            "with eta above 0, dpm_solver_2m_sde, ...), or a loss without likelihoods"
        )
    return step


def _check_density(step: object) -> None:
    is_random = _check_random(step).is_random
    if not bool(is_random.all()):
        rows = (~is_random).nonzero().flatten().tolist()
        raise ValueError(
            f"rows {rows} of the steps have std = 0, as a last step to s = 0 has, and no density: "
            "leave them out, step.take(step.is_random), or end above s = 0"
        )


def _check_rows(coefficient: Tensor, x: Tensor) -> None:
    if len(coefficient) not in (1, len(x)):
        raise ValueError(
            f"{len(coefficient)} steps for {len(x)} samples: give one for each, or one"
        )


def _times(coefficient: Float[Tensor, " N"], x: Tensor) -> Tensor:
    """A coefficient for each sample, or one for all, times what it stands for."""
    x = _precise(x)
    _check_rows(coefficient, x)
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1)) * x


def _dot(x: Tensor, y: Tensor) -> Float[Tensor, " B"]:
    """Summed in float64: of many thousand dimensions float32 would keep no small difference."""
    return (x * y).flatten(1).sum(1, dtype=torch.float64)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _time(t: Tensor) -> Tensor:
    """``t`` in float64; times of an integer dtype have lost their fractions already."""
    if not t.is_floating_point():
        raise TypeError(
            f"times have dtype {t.dtype}, in which every t below 1 is 0: pass a float tensor "
            "(of entries of a DiscreteTable, time_of makes times)"
        )
    return t.double()
