r"""Gaussian noise: all that follows from a reverse step that is affine.

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

Log-probabilities are in nats, sums over all dimensions of a sample, in float32 or better. Values of
coefficients and times are checked where they are on the CPU. On another device a look at them would
wait for it at every call; what has no likelihood or no rate gives numbers that are not finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from rescore.processes.convert import Prediction, score_coefficients
from rescore.processes.gaussian_schedules import GaussianSchedule
from rescore.types import State

C = TypeVar("C", bound="_Rows")

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
    past = {"x_before": x_before, "a_before": a_before}
    wide = {name: None if value is None else value.double() for name, value in past.items()}
    residual = x_s.double() - mean(step, x_t.double(), a.double(), **wide)
    std = step.std.to(residual.device)
    n_dims = math.prod(residual.shape[1:])
    constant = n_dims * (torch.log(std) + 0.5 * math.log(2 * math.pi))
    return -_dot(residual, residual) / (2 * std**2) - constant


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
    if t.device.type == "cpu" and not bool(schedule.g2(t).isfinite().all()):
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
    if is_random.device.type == "cpu" and not bool(is_random.all()):
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
