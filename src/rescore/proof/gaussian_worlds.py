"""Worlds of Gaussian noise that are small enough for quadrature: linear chains of one dimension.

The data are N(1, 1/4), the network is a perfect one of them plus a linear error, the reward is a
quadratic: states are affine in the noise, and all expectations are those of polynomials. float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rescore.models.gaussian_network import CountedOutputs
from rescore.models.value import Design, ValueCritic, coefficients
from rescore.processes.convert import Prediction, convert_prediction
from rescore.processes.gaussian import (
    AffineStep,
    DeterministicStep,
    GaussianSchedule,
    RectifiedFlow,
    VariancePreserving,
    continuous_kl,
    step_kl,
)
from rescore.sampling.decoder import GaussianDecoder, Solver
from rescore.sampling.gaussian_policy import At, GaussianPolicy
from rescore.types import Conditions, State

KlMeaning = Literal["step", "continuous"]
"""The KL of the chain that is simulated, or of its equation with the outputs held over steps."""
Theta = tuple[float, float, float]
"""The error of a network's output: theta_0 + theta_1 x + theta_2 t."""

POLICY: Theta = (0.3, -0.2, 0.25)
REFERENCE: Theta = (-0.1, 0.15, 0.05)
WRONG: Theta = (0.2, -0.3, 0.1)
"""What a wrong value adds to the exact one, as a polynomial in x."""
MEAN, VARIANCE = 1.0, 0.25
"""Of the data."""
GOAL, CURVATURE = 2.0, 0.5
"""r(x) = -CURVATURE (x - GOAL)^2."""
T_MIN = 0.1


@dataclass(frozen=True, kw_only=True)
class GaussianWorld:
    """K steps of a solver from N(0, 1) towards the data."""

    steps: int
    solver: Solver = "ddim"
    eta: float = 1.0
    window: tuple[int, int] | None = None
    t_min: float = T_MIN
    """Where the chain ends. At 0 most solvers draw no noise in their last step."""
    noise: Literal["vp", "flow"] = "vp"

    def __str__(self) -> str:
        """Steps, noise and solver, e.g. "K2 vp ddim eta=0.5 window=0:1"."""
        words = [f"K{self.steps}", self.noise, self.solver]
        words += [f"eta={self.eta:g}"] if self.eta != 1 else []
        words += [f"window={self.window[0]}:{self.window[1]}"] if self.window else []
        words += [f"t_min={self.t_min:g}"] if self.t_min != T_MIN else []
        return " ".join(words)

    @property
    def decoder(self) -> GaussianDecoder:
        return GaussianDecoder(
            steps=self.steps,
            solver=self.solver,
            eta=self.eta,
            window=self.window,
            t_min=self.t_min,
        )

    @property
    def schedule(self) -> GaussianSchedule:
        """Milder noise than usual, or two steps would leave little of where they started."""
        return VariancePreserving(0.1, 6.0) if self.noise == "vp" else RectifiedFlow()

    @property
    def prediction(self) -> Prediction:
        """What the network says."""
        return "eps" if self.noise == "vp" else "flow"

    def policy(self, theta: Theta, *, only_random: bool = False) -> tuple[GaussianPolicy, Tensor]:
        """A policy, and its parameters [3].

        Args:
            theta: their values.
            only_random: no gradient through the steps that draw no noise.
        """
        network = LinearNetwork(self.schedule, self.prediction, theta)
        policy = GaussianPolicy(CountedOutputs(network), self.decoder)
        if only_random:
            assert isinstance(policy.steps, AffineStep)
            network.held_at = policy.times[:-1][~policy.steps.is_random]
        return policy, network.theta

    def prompts(self, n: int) -> Conditions:
        """n unconditional samples, each its own group."""
        return Conditions(group=torch.arange(n), sample_id=torch.arange(n), info={}, inputs={})

    def reward(self, x_0: State) -> Float[Tensor, " B"]:
        """r(x_0), nowhere above 0."""
        return -CURVATURE * (x_0[:, 0] - GOAL) ** 2

    def kl(self, new: At, ref: At, meaning: KlMeaning) -> Float[Tensor, " N"]:
        """KL(new || ref) of each step, nats; exact ones are 0 where no noise is drawn."""
        if meaning == "continuous":
            how = {"prediction": self.prediction, "eta": self.decoder.noise_eta}
            return continuous_kl(self.schedule, new.t, new.s, new.a, ref.a, **how)
        step, random = new.with_density()
        past = {"a_before": new.a_before, "a_before_ref": ref.a_before}
        return torch.where(random, step_kl(step, new.a, ref.a, **past), 0.0)

    def values(self, beta: float, kl: KlMeaning) -> Float[Tensor, "M 3"]:
        """V(x, t_k) = E[r - beta (KL of the steps from k on) | x_k = x] of the policy's chain.

        Coefficients of 1, x and x^2 at every time, by recursion from the end, where V is r.

        Raises:
            ValueError: a two-step solver, whose value is a function of two states.
        """
        new, ref = (self.policy(theta)[0] for theta in (POLICY, REFERENCE))
        table = new.steps
        if not isinstance(table, AffineStep | DeterministicStep):
            raise ValueError(f"{self.solver} looks at two states, so its value is no V(x, t)")
        value = CURVATURE * _vector(-(GOAL**2), 2 * GOAL, -1.0)
        rows, zero, one = [value], _vector(0.0)[:, None], _vector(1.0)[:, None]
        for k in reversed(range(self.steps)):
            step, t, s = table.take(slice(k, k + 1)), new.times[[k]], new.times[[k + 1]]
            std = step.std if isinstance(step, AffineStep) else _vector(0.0)
            (d, c), (d_ref, c_ref) = (_line(policy, t) for policy in (new, ref))
            at_one, at_zero = (At(step, t, s, zero, output) for output in (one, zero))
            price = beta * self.kl(at_one, at_zero, kl) if beta else 0.0
            value = _expected(value, step.on_a * d, step.on_x + step.on_a * c, std)
            d, c = d - d_ref, c - c_ref
            value = value - price * torch.cat([d * d, 2 * c * d, c * c])
            rows.append(value)
        return torch.stack(rows[::-1])

    def critic(
        self,
        beta: float = 0.0,
        kl: KlMeaning = "step",
        *,
        design: Design = "plain",
        wrong: bool = False,
    ) -> ValueCritic:
        """One that says ``values``, or something else.

        Args:
            beta: weight of the KL.
            kl: its meaning.
            design: of the critic. Its F is what is left of V without c_skip r(hat x_0).
            wrong: add another quadratic at all times but the last.
        """
        table = self.values(beta, kl)
        if wrong:
            table[:-1] += _vector(*WRONG)
        return GivenValue(self, table, design)


class LinearNetwork(nn.Module):
    """What a perfect network says about the data, plus theta_0 + theta_1 x + theta_2 t.

    Args:
        schedule: of the noise.
        prediction: what its output is.
        theta: the error.
    """

    shape = (1,)

    def __init__(self, schedule: GaussianSchedule, prediction: Prediction, theta: Theta) -> None:
        super().__init__()
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.theta = nn.Parameter(_vector(*theta))
        self.held_at = torch.empty(0)
        """Times at which the parameters get no gradient."""

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        alpha, sigma = (level(t)[:, None] for level in (self.schedule.alpha, self.schedule.sigma))
        away = (x_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)
        eps, x_0 = sigma * away, MEAN + alpha * VARIANCE * away
        perfect = eps if self.prediction == "eps" else eps - x_0
        held = torch.isin(t, self.held_at.to(t))[:, None]
        theta = torch.where(held, self.theta.detach(), self.theta)
        return perfect + theta[:, :1] + theta[:, 1:2] * x_t + theta[:, 2:] * t[:, None]


class GivenValue(ValueCritic):
    """A quadratic for every time, in float64.

    Args:
        world: whose times, reward and policy.
        table: coefficients of 1, x and x^2, a row for every time.
        design: as of ``ValueCritic``.
    """

    def __init__(self, world: GaussianWorld, table: Float[Tensor, "M 3"], design: Design) -> None:
        reward = None if design == "plain" else lambda outputs, given: world.reward(outputs)
        super().__init__(nn.Linear(1, 1), design, reward)
        self.world, self.table = world, table
        self.times = world.decoder.times(world.schedule)
        self.fitted.fill_(1)

    def value(
        self,
        x_t: State,
        t: Float[Tensor, " N"],
        inputs: Mapping[str, Tensor],
        skip: Float[Tensor, " N"] | None,
    ) -> Float[Tensor, " N"]:
        """V; the part of it that ``skip`` gives is taken from there."""
        row = self.table[(t[:, None] - self.times).abs().argmin(1)]
        value = row[:, 0] + row[:, 1] * x_t[:, 0] + row[:, 2] * x_t[:, 0] ** 2
        if skip is None:
            return value
        network = self.world.policy(POLICY)[0].network
        alpha, sigma = network.schedule.alpha(t), network.schedule.sigma(t)
        output = network.predict(x_t, t, inputs)
        hat = convert_prediction(output, x_t, alpha, sigma, source=network.prediction, target="x_0")
        return value + coefficients(self.design, t)[0] * (skip - self.world.reward(hat))


def _expected(
    value: Float[Tensor, " 3"], shift: Tensor, gain: Tensor, std: Tensor
) -> Float[Tensor, " 3"]:
    """E of a quadratic at shift + gain x + std z, as a quadratic in x; all of length 1."""
    constant, slope, curvature = value.split(1)
    return torch.cat(
        [
            constant + slope * shift + curvature * (shift**2 + std**2),
            (slope + 2 * curvature * shift) * gain,
            curvature * gain**2,
        ]
    )


def _line(policy: GaussianPolicy, t: Float[Tensor, " 1"]) -> tuple[Tensor, Tensor]:
    """What a linear network says at x = 0, and its slope in x."""
    with torch.no_grad():
        at_0, at_1 = policy.network.predict(_vector(0.0, 1.0)[:, None], t.expand(2), {})
    return at_0, at_1 - at_0


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
