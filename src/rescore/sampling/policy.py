"""A policy: a network and the way it is decoded. Samples paths and scores steps of given paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.critics import Learned
from rescore.models.denoiser import Counted, CountedScores, Denoiser, ScoreNetwork, SubsScores
from rescore.models.gaussian_network import CountedOutputs, GaussianNetwork
from rescore.objectives.divergences import categorical_kl, finite, law_kl
from rescore.processes.ctmc import Law
from rescore.sampling.base import Policy, Transition
from rescore.sampling.chunks import over_rows
from rescore.sampling.decoder import Decoder, Decoding, GaussianDecoder, RateDecoder
from rescore.sampling.discrete import StepRows, columns_of, fill_in, sample_masked, step_log_prob
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.rates import (
    laws_at,
    laws_of,
    log_or_impossible,
    sample_rates,
    tokens_log_prob,
)
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng
from rescore.types import Given, MaskedTrajectory, Prompts, RateTrajectory, Trajectory

Network = Denoiser | ScoreNetwork | GaussianNetwork
"""Any network that can be fine-tuned."""


@dataclass(frozen=True)
class TokenTransition(Transition):
    """Steps that write tokens."""

    law: Callable[[], Float[Tensor, "N R V"]]
    """Computes ``log_p``, which only KL terms need."""
    revealed: Bool[Tensor, "N R"]
    """True for the rows the step revealed."""

    @property
    def log_p(self) -> Float[Tensor, "N R V"]:
        """The law the tokens are scored under, at the rows that were needed, nats."""
        return self.law()

    def kl(self, other: TokenTransition) -> Float[Tensor, " N"]:
        """Over the rows the step revealed; tokens that ``other`` excludes count as 1e-6."""
        return self.kl_to(finite(other.log_p))

    def kl_to(self, log_q: Float[Tensor, "N R V"]) -> Float[Tensor, " N"]:
        """KL to a law without zeros, over the rows the step revealed."""
        return categorical_kl(self.log_p, log_q, self.revealed)


@dataclass(frozen=True)
class RateTransition(TokenTransition):
    """Steps of a process in continuous time, whose laws are probabilities."""

    probs: Float[Tensor, "N L S"]

    def kl_to(self, log_q: Float[Tensor, "N L S"]) -> Float[Tensor, " N"]:
        return law_kl(self.probs, log_q, self.revealed)


@dataclass(frozen=True)
class MaskedPolicy(Policy[MaskedTrajectory, TokenTransition]):
    """pi(x_s | x_t): the law of one reverse step of the masked process."""

    denoiser: Denoiser
    decoder: Decoder
    forward_rows: int = 1024
    """Network rows per forward without gradients; any value gives the same paths and numbers."""

    @property
    def rows(self) -> int:
        return self.denoiser.rows if isinstance(self.denoiser, Counted) else 0

    def draw(self, prompts: Given, record: Record, rng: Rng) -> MaskedTrajectory:
        assert isinstance(prompts, Prompts)
        return sample_masked(self.denoiser, self.decoder, prompts, record, rng)

    @torch.no_grad()
    def completions(
        self, trajectory: MaskedTrajectory, step: Int[Tensor, " N"]
    ) -> Int[Tensor, "N L"]:
        """The one-step completion from the state before step ``step[i]`` of path i.

        One network row each, a part at a time; while sampling they cost none (``Slots``).
        """

        def part(rows: Int[Tensor, " n"]) -> Int[Tensor, "n L"]:
            rows = rows.to(step.device)
            paths = trajectory.take(rows)
            x_t = paths.state(step[rows], self.denoiser.mask_id)
            still = paths.step_of() >= step[rows, None]
            position = columns_of(still, int(still.sum(1).amax()))
            logits = self.denoiser.predict(x_t, attend=paths.prompts.attend, positions=position)
            return fill_in(x_t, still, position, logits)

        parts = over_rows(part, len(step), at_most=self.forward_rows)
        return torch.cat(parts) if parts else trajectory.x_0[:0]

    def transition(
        self, trajectory: Trajectory, step: Int[Tensor, " N"], score: Score
    ) -> TokenTransition:
        assert isinstance(trajectory, MaskedTrajectory)
        listing_all = score.form == "tokens_and_selection" and self.decoder.order in (
            "plackett_luce",
            "low_confidence",
            "soft_low_confidence",
        )
        rows = self._rows(trajectory, step, listing_all)
        x_t = trajectory.state(step, self.denoiser.mask_id)
        logits = self.denoiser.predict(
            x_t, attend=trajectory.prompts.attend, positions=rows.position
        )
        log_prob, log_p = step_log_prob(logits, rows, self.decoder, score)
        return TokenTransition(log_prob=log_prob, law=lambda: log_p, revealed=rows.place >= 0)

    def _rows(
        self, trajectory: MaskedTrajectory, step: Int[Tensor, " N"], listing_all: bool
    ) -> StepRows:
        """The rows of a recorded step, laid out as the sampler laid them out."""
        per_block = self.decoder.steps_per_block
        step_of, now = trajectory.step_of(), step[:, None]
        revealed = step_of == now
        candidate = (step_of >= now) & (step_of // per_block == now // per_block)
        if listing_all:
            order = (~candidate).to(torch.uint8)
            position = order.argsort(dim=1, stable=True)[:, : trajectory.max_candidates]
        else:
            order = torch.where(revealed, trajectory.rank, torch.iinfo(trajectory.rank.dtype).max)
            position = order.argsort(dim=1, stable=True)[:, : trajectory.max_revealed]
        place = torch.where(revealed, trajectory.rank % trajectory.x_0.shape[1], -1)
        token = torch.where(revealed, trajectory.x_0, 0)  # given tokens may lie outside the logits
        return StepRows(
            position=position,
            token=token.gather(1, position),
            place=place.gather(1, position),
            n_candidates=candidate.sum(1),
            log_time=None
            if trajectory.log_time is None
            else trajectory.log_time.gather(1, position),
        )


@dataclass(frozen=True)
class RatePolicy(Policy[RateTrajectory, RateTransition]):
    """pi(x_s | x_t) of the reverse of a process in continuous time, step by step of its grid."""

    network: ScoreNetwork
    decoder: RateDecoder
    forward_rows: int = 1024
    """Network rows per forward without gradients; any value gives the same paths and numbers."""

    @property
    def rows(self) -> int:
        return self.network.rows if isinstance(self.network, CountedScores) else 0

    def draw(self, prompts: Given, record: Record, rng: Rng) -> RateTrajectory:
        assert isinstance(prompts, Prompts)
        return sample_rates(self.network, self.decoder, prompts, record, rng)

    def transition(
        self, trajectory: Trajectory, step: Int[Tensor, " N"], score: Score
    ) -> RateTransition:
        assert isinstance(trajectory, RateTrajectory)
        before, after = trajectory.move(step)
        probs = self.law(before, step, trajectory.prompts.attend)
        editable = trajectory.prompts.editable
        log_prob = tokens_log_prob(probs, after, editable)
        return RateTransition(
            log_prob=log_prob, law=lambda: log_or_impossible(probs), revealed=editable, probs=probs
        )

    def law(
        self, x: Int[Tensor, "N L"], step: Int[Tensor, " N"], attend: Bool[Tensor, "N L"] | None
    ) -> Float[Tensor, "N L S"]:
        """The law of every token after step ``step[i]`` from state i: one network row each."""
        moves = laws_of(self.network.process, self.decoder)
        laws: list[Law] = list(dict.fromkeys(move[0] for move in moves))
        rows = [(level, length, laws.index(law)) for law, level, length in moves]
        table = torch.tensor(rows, dtype=torch.float64, device=x.device)
        level, length, number = table[step].unbind(1)
        law_of = laws_at(self.network, x, level, attend)
        probs = law_of(laws[0], torch.where(number == 0, length, 0.0))
        for i, law in enumerate(laws[1:], start=1):
            here = number == i
            others = law_of(law, torch.where(here, length, 0.0))
            probs = torch.where(here[:, None, None], others, probs)
        return probs


def policy_of(network: Network, decoder: Decoding, forward_rows: int) -> Policy:
    """The policy of a network under a decoder; its network rows are counted.

    A masked denoiser serves processes in continuous time too: its predictions are concrete scores
    (``SubsScores``).

    Raises:
        ValueError: the decoder cannot be used with this network.
    """
    if isinstance(decoder, GaussianDecoder) != isinstance(network, GaussianNetwork):
        raise ValueError(
            f"decoder: a {type(decoder).__name__} does not decode a {type(network).__name__}; "
            f"continuous networks need a GaussianDecoder, and nothing else does"
        )
    if isinstance(decoder, GaussianDecoder):
        assert isinstance(network, GaussianNetwork)
        decoder.check(network.schedule, network.prediction)
        return GaussianPolicy(CountedOutputs(network), decoder, forward_rows)
    assert not isinstance(network, GaussianNetwork)
    if isinstance(decoder, RateDecoder):
        scores = network if isinstance(network, ScoreNetwork) else SubsScores(network)
        return RatePolicy(CountedScores(scores), decoder, forward_rows)
    assert isinstance(decoder, Decoder)
    if not isinstance(network, Denoiser):
        raise ValueError(
            f"decoder: a {type(network).__name__} predicts concrete scores, which Decoder does not "
            f"use; give the run a RateDecoder"
        )
    return MaskedPolicy(Counted(network), decoder, forward_rows)


@dataclass(frozen=True)
class Models:
    """The policies a loss may ask. The old policy is not among them: what it said is recorded."""

    new: Policy
    """The policy being trained."""
    ref: Policy | None = None
    """The frozen reference that KL terms refer to; None when the algorithm uses none."""
    critic: Learned | None = None
    """Predicts rewards, as the algorithm made it; None when it uses none."""
