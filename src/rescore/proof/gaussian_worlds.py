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
    DeterministicTwoStep,
    HeunStep,
    Step,
    TwoStep,
    continuous_kl,
    step_kl,
)
from rescore.processes.gaussian_schedules import GaussianSchedule, RectifiedFlow, VariancePreserving
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

    def values(self, beta: float, kl: KlMeaning) -> Float[Tensor, "M 3 3"]:
        """V(x, y, t_k) = E[r - beta (KL of the steps from k on) | x_k = x, x_{k-1} = y].

        Of the policy's chain: a quadratic form in u = (1, x, y) at every time, by recursion from
        the end, where V is r. Only two-step solvers look at y.
        """
        new, ref = (self.policy(theta)[0] for theta in (POLICY, REFERENCE))
        table, times = new.steps, new.times
        assert not isinstance(table, HeunStep)
        value = _form(CURVATURE * _vector(-(GOAL**2), 2 * GOAL, -1.0))
        rows = [value]
        for k in reversed(range(self.steps)):
            step, before = table.take(slice(k, k + 1)), max(k - 1, 0)
            said = torch.stack([_line(new, times[[k]], 1), _line(new, times[[before]], 2)])
            other = torch.stack([_line(ref, times[[k]], 1), _line(ref, times[[before]], 2)])
            gains, past = torch.cat([step.on_a, _vector(0.0)]), _vector(0.0)
            if isinstance(step, TwoStep | DeterministicTwoStep):
                gains, past = torch.cat([step.on_a, step.on_a_before]), step.on_x_before
            std = step.std if isinstance(step, AffineStep | TwoStep) else _vector(0.0)
            mean = gains @ said + torch.cat([_vector(0.0), step.on_x, past])
            after = torch.stack([_vector(1.0, 0.0, 0.0), mean, _vector(0.0, 1.0, 0.0)])
            value = after.T @ value @ after + _form(std**2 * value[1, 1] * _vector(1.0, 0.0, 0.0))
            if beta:
                apart = said - other
                price = self._price(step, times[[k]], times[[k + 1]], kl)
                value = value - beta * apart.T @ price @ apart
            rows.append(value)
        return torch.stack(rows[::-1])

    def _price(
        self, step: Step, t: Float[Tensor, " 1"], s: Float[Tensor, " 1"], kl: KlMeaning
    ) -> Float[Tensor, "2 2"]:
        """The KL of a step, a quadratic form in the differences of its two outputs."""
        two_step = isinstance(step, TwoStep | DeterministicTwoStep)

        def at(now: float, before: float) -> At:
            a, a_before = _vector(now)[:, None], _vector(before)[:, None]
            return At(step, t, s, a, a, a, a_before) if two_step else At(step, t, s, a, a)

        zero = at(0.0, 0.0)
        one, other, both = (
            self.kl(at(*apart), zero, kl) for apart in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
        )
        mixed = (both - one - other) / 2
        return torch.stack([torch.cat([one, mixed]), torch.cat([mixed, other])])

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
            table[:-1] += _form(_vector(*WRONG))
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
    """A quadratic form of the states for every time, in float64.

    Args:
        world: whose times, reward and policy.
        table: ``GaussianWorld.values``, or another.
        design: as of ``ValueCritic``.
    """

    def __init__(self, world: GaussianWorld, table: Float[Tensor, "M 3 3"], design: Design) -> None:
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
        form = self.table[(t[:, None] - self.times).abs().argmin(1)]
        u = torch.cat([torch.ones_like(x_t[:, :1]), x_t], 1)  # 1, x, and y where there is one
        n = u.shape[1]
        value = torch.einsum("ni,nij,nj->n", u, form[:, :n, :n], u)
        if skip is None:
            return value
        x_t = x_t[:, :1]
        network = self.world.policy(POLICY)[0].network
        alpha, sigma = network.schedule.alpha(t), network.schedule.sigma(t)
        output = network.predict(x_t, t, inputs)
        hat = convert_prediction(output, x_t, alpha, sigma, source=network.prediction, target="x_0")
        return value + coefficients(self.design, t)[0] * (skip - self.world.reward(hat))


def _form(coefficients: Float[Tensor, " 3"]) -> Float[Tensor, "3 3"]:
    """The quadratic form in (1, x, y) of a quadratic in x, from its coefficients of 1, x, x^2."""
    constant, slope, curvature = coefficients.tolist()
    return torch.stack(
        [
            _vector(constant, slope / 2, 0.0),
            _vector(slope / 2, curvature, 0.0),
            _vector(0.0, 0.0, 0.0),
        ]
    )


def _line(policy: GaussianPolicy, t: Float[Tensor, " 1"], place: int) -> Float[Tensor, " 3"]:
    """What a linear network says, from 1, x and y; of x where ``place`` is 1, else of y."""
    with torch.no_grad():
        at_0, at_1 = policy.network.predict(_vector(0.0, 1.0)[:, None], t.expand(2), {})
    line = _vector(0.0, 0.0, 0.0)
    line[0], line[place] = at_0, at_1 - at_0
    return line


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
