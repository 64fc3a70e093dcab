"""Worlds of concrete scores that are small enough to enumerate; float64, seeded.

An ``EnergyWorld`` knows its policy in closed form: the scores are exact ratios, and samples are
drawn from the policy itself. In a ``SamplerWorld`` the policy is whatever the real sampler makes of
a network's scores, which are the ratios of no law. What is exact in the first only is not called
unbiased.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.critics import Critic, ScalarCritic
from rescore.models.denoiser import CountedScores
from rescore.processes.convert import score_from_log_probs
from rescore.processes.ctmc import Absorbing, Process, Uniform
from rescore.proof.worlds import HIDDEN, TokenWorld
from rescore.sampling.decoder import RateDecoder
from rescore.sampling.policy import RatePolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import Rng, Stream
from rescore.types import Given, Prompts, RateTrajectory

Network = Literal["table", "mlp", "factorised"]
"""phi: a number per sample; a small MLP, so that samples share parameters; or a sum over positions,
so that these are independent."""
CRITIC_LEVEL = 0.4
"""What the critic of these worlds, which have one prompt, expects of it."""


@dataclass(frozen=True, kw_only=True)
class ScoreWorld(TokenWorld, abc.ABC):
    """A process in continuous time, and a critic of the one prompt there is."""

    process: Literal["uniform", "absorbing"]

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """Where the samples come from, one word."""

    @property
    @abc.abstractmethod
    def decoder(self) -> RateDecoder:
        """How the network is decoded."""

    @abc.abstractmethod
    def policy(self, seed: int) -> tuple[RatePolicy, list[nn.Parameter]]:
        """The policy drawn with ``POLICY_SEED`` or ``REFERENCE_SEED``, and what it learns."""

    @property
    def states(self) -> Int[Tensor, "N L"]:
        """Every finished sample; row n is the number n in base V."""
        place = _places(self.vocab_size, self.length)
        number = torch.arange(self.vocab_size**self.length)
        return number[:, None] // place % self.vocab_size

    @property
    def ctmc(self) -> Process:
        """The forward process of one token; the mask, if there is one, is V."""
        if self.process == "uniform":
            return Uniform(self.vocab_size)
        return Absorbing(self.vocab_size + 1, mask_id=self.vocab_size)

    def critic(self) -> Critic:
        """A function of the prompt, and there is only one prompt: a constant."""
        critic = ScalarCritic()
        nn.init.constant_(critic.level, CRITIC_LEVEL)
        critic.fitted.fill_(True)
        return critic


@dataclass(frozen=True, kw_only=True)
class EnergyWorld(ScoreWorld):
    r"""$\pi = \mathrm{softmax}(\phi_\theta)$ over all V^L samples; a sample is one draw from it."""

    network: Network = "mlp"
    """What phi is."""

    def __str__(self) -> str:
        """Size, process and network, e.g. "V3L2 uniform mlp"."""
        return f"V{self.vocab_size}L{self.length} {self.process} {self.network}"

    @property
    def kind(self) -> str:
        return "energy"

    @property
    def decoder(self) -> RateDecoder:
        """Plays no part in the draw; its last noise level is what the scores are asked at."""
        return RateDecoder(steps=2)

    def policy(self, seed: int) -> tuple[RatePolicy, list[nn.Parameter]]:
        network = (UniformEnergy if self.process == "uniform" else MaskedEnergy)(self, seed)
        return ExactPolicy(CountedScores(network), self.decoder), list(network.parameters())


@dataclass(frozen=True, kw_only=True)
class SamplerWorld(ScoreWorld):
    """The real sampler, T + n_c steps of it, and scores that are the ratios of no law."""

    steps: int
    corrector_steps: int = 0
    predictor: Literal["analytic", "euler"] = "analytic"

    def __str__(self) -> str:
        """Size, process, steps and predictor, e.g. "V2L2 uniform 2+1 euler"."""
        steps = f"{self.steps}+{self.corrector_steps}" if self.corrector_steps else self.steps
        return f"V{self.vocab_size}L{self.length} {self.process} {steps} {self.predictor}"

    @property
    def kind(self) -> str:
        return "sampler"

    @property
    def decoder(self) -> RateDecoder:
        return RateDecoder(
            steps=self.steps, corrector_steps=self.corrector_steps, predictor=self.predictor
        )

    def policy(self, seed: int) -> tuple[RatePolicy, list[nn.Parameter]]:
        network = ScoreMlp(self.ctmc, self.length, generator=self.generator(seed))
        return RatePolicy(CountedScores(network), self.decoder), list(network.parameters())


class ExactPolicy(RatePolicy):
    """Draws samples from the law that its network's scores are the ratios of, in one step."""

    def draw(self, prompts: Given, record: Record, rng: Rng) -> RateTrajectory:
        """One categorical draw over all samples; no moves are kept, for there are none."""
        assert isinstance(prompts, Prompts) and isinstance(self.network, CountedScores)
        energy = self.network.network
        assert isinstance(energy, Energy) and not record.moves
        n_samples = prompts.n_samples
        law = energy.log_probs().exp().expand(n_samples, 1, -1)
        number = rng.categorical(law, Stream.TOKEN, 0, torch.zeros(n_samples, 1, dtype=torch.long))
        x_0 = energy.world.states[number[:, 0]]
        return RateTrajectory(
            prompts=prompts,
            x_0=x_0,
            log_prob=energy.log_likelihood(x_0)[:, None],
            step=number[:, :0],
            before=x_0[:, None][:, :0],
            after=x_0[:, None][:, :0],
        )


class Energy(nn.Module):
    """phi(x) of every sample at once, and what follows from it; the same at every noise level.

    Args:
        world: its size and network.
        seed: draws the weights; those of a layer have variance 1 / fan-in, output weights 1.
    """

    def __init__(self, world: EnergyWorld, seed: int) -> None:
        super().__init__()
        self.world, self.process = world, world.ctmc
        generator = world.generator(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.one_hot = nn.functional.one_hot(world.states, world.vocab_size).double()
        n_inputs = self.one_hot[0].numel()
        if world.network == "table":
            self.out = nn.Parameter(weight(len(self.one_hot)))
        elif world.network == "factorised":
            self.out = nn.Parameter(weight(n_inputs))
        else:
            self.into = nn.Parameter(weight(HIDDEN, n_inputs) * n_inputs**-0.5)
            self.out = nn.Parameter(weight(HIDDEN))

    def energies(self) -> Float[Tensor, " N"]:
        """phi, up to a constant the log-probabilities of all samples."""
        if self.world.network == "table":
            return self.out
        inputs = self.one_hot.flatten(1)
        if self.world.network == "factorised":
            return inputs @ self.out
        return torch.tanh(inputs @ self.into.T) @ self.out

    def log_probs(self) -> Float[Tensor, " N"]:
        """log pi of every sample."""
        return self.energies().log_softmax(0)

    def log_likelihood(self, x_0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """log pi(x_0)."""
        return self.log_probs()[self._number(x_0)]

    def _number(self, x: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
        return (x * _places(self.world.vocab_size, self.world.length)).sum(-1)


class UniformEnergy(Energy):
    """log s(x)_y = phi(y) - phi(x)."""

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """The exact ratios of pi, whatever the noise."""
        place = _places(self.world.vocab_size, self.world.length)
        change = torch.arange(self.world.vocab_size) - x_t[..., None]
        number = self._number(x_t)
        phi = self.energies()
        return phi[number[:, None, None] + change * place[:, None]] - phi[number][:, None, None]


class MaskedEnergy(Energy):
    """The scores of a perfect masked model of pi: its conditionals given what is not masked."""

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """p(x^l = v | tokens of x_t) at masked positions, as scores."""
        mask_id, masked = self.world.vocab_size, (x_t == self.world.vocab_size)[..., None]
        agrees = ((x_t[:, None] == self.world.states) | masked[..., 0][:, None]).all(-1).double()
        mass = torch.einsum("bn,n,nlv->blv", agrees, self.log_probs().exp(), self.one_hot)
        log_p = torch.where(masked, mass, 1.0).log() - mass.sum(-1, keepdim=True).log()
        return score_from_log_probs(log_p, x_t, total_noise, mask_id, mask_id + 1)


class ScoreMlp(nn.Module):
    """One hidden layer of tanh units on the state and on e^-n, n the total noise.

    With o its output and k = e^-n / (1 - e^-n), log s = e^-n o for uniform noise, whose ratios tend
    to 1, and o + log(k / V) for absorbing noise, so that the scores of tokens are about k together.

    Args:
        process: what the scores are about.
        length: L.
        generator: draws the weights, normal of variance 1 / fan-in.
    """

    def __init__(self, process: Process, length: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.process, self.length = process, length
        n_inputs, n_outputs = length * process.n_states + 1, length * process.n_states

        def weight(n_out: int, n_in: int) -> nn.Parameter:
            draw = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
            return nn.Parameter(draw * n_in**-0.5)

        self.into, self.out = weight(HIDDEN, n_inputs), weight(n_outputs, HIDDEN)

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """log s, 0 at the token itself."""
        n_states, noise = self.process.n_states, total_noise.double()[:, None]
        state = nn.functional.one_hot(x_t, n_states).flatten(1).double()
        units = torch.tanh(torch.cat([state, torch.exp(-noise)], 1) @ self.into.T)
        output = (units @ self.out.T).unflatten(-1, (self.length, n_states))
        if self.process.mask_id is None:
            output = output * torch.exp(-noise)[..., None]
        else:
            output = output - (torch.expm1(noise).log() + math.log(n_states - 1))[..., None]
        return output.scatter(-1, x_t[..., None], 0.0)


def _places(base: int, length: int) -> Int[Tensor, " L"]:
    """The value of each digit; position 0 is the most significant."""
    return base ** torch.arange(length - 1, -1, -1)
