"""A policy: a network and the way it is decoded. Samples paths and scores steps of given paths."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.critics import Critic
from rescore.models.denoiser import Counted, CountedScores, Denoiser, ScoreNetwork, SubsScores
from rescore.sampling.chunks import over_rows
from rescore.sampling.decoder import Decoder, Decoding, Move, RateDecoder
from rescore.sampling.discrete import StepRows, columns_of, fill_in, sample_masked, step_log_prob
from rescore.sampling.rates import move_probs, sample_rates, tokens_log_prob
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng, SampleRng
from rescore.types import MaskedTrajectory, Prompts, RateTrajectory, Trajectory, joined

P = TypeVar("P", bound=Trajectory)


@dataclass(frozen=True)
class Transition:
    """How a policy sees given steps of given paths."""

    log_prob: Float[Tensor, " N"]
    """Log-probability of each step, nats, summed over what the score counts."""
    log_p: Float[Tensor, "N R V"]
    """The law the tokens are scored under, at the rows that were needed."""
    revealed: Bool[Tensor, "N R"]
    """True for the rows the step revealed."""


class Policy(abc.ABC, Generic[P]):
    """A network and the way it is decoded: draws paths, and scores steps of given paths."""

    forward_rows: int

    @abc.abstractmethod
    def draw(self, prompts: Prompts, record: Record, rng: Rng) -> P:
        """One path per prompt in one batch; the caller decides about gradients."""

    @abc.abstractmethod
    def transition(
        self, trajectory: Trajectory, step: Int[Tensor, " N"], score: Score
    ) -> Transition:
        """Score step ``step[i]`` of path i: one network row each, with gradients if enabled."""

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Canvases put through the network so far; 0 if nobody counts."""

    @torch.no_grad()
    def sample(self, prompts: Prompts, record: Record, rng: SampleRng) -> P:
        """Draw one path per prompt, recording what ``record`` asks for; a part at a time."""

        def part(rows: Int[Tensor, " n"]) -> P:
            rows = rows.to(prompts.tokens.device)
            return self.draw(prompts.take(rows), record, rng.take(rows))

        return joined(over_rows(part, prompts.n_samples, at_most=self.forward_rows))

    @torch.no_grad()
    def log_probs(
        self, trajectory: Trajectory, step: Int[Tensor, "B K"], score: Score
    ) -> Float[Tensor, "B K"]:
        """Score several steps of each path: B K network rows, a part at a time, no gradients."""
        n_columns = step.shape[1]

        def part(rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            rows = rows.to(step.device)
            paths = trajectory.take(rows // n_columns)
            return self.transition(paths, step.flatten()[rows], score).log_prob

        parts = over_rows(part, step.numel(), at_most=self.forward_rows)
        return torch.cat(parts).view_as(step)


@dataclass(frozen=True)
class MaskedPolicy(Policy[MaskedTrajectory]):
    """pi(x_s | x_t): the law of one reverse step of the masked process."""

    denoiser: Denoiser
    decoder: Decoder
    forward_rows: int = 1024
    """Network rows per forward without gradients; any value gives the same paths and numbers."""

    @property
    def rows(self) -> int:
        return self.denoiser.rows if isinstance(self.denoiser, Counted) else 0

    def draw(self, prompts: Prompts, record: Record, rng: Rng) -> MaskedTrajectory:
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
    ) -> Transition:
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
        return Transition(log_prob=log_prob, log_p=log_p, revealed=rows.place >= 0)

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
class RatePolicy(Policy[RateTrajectory]):
    """pi(x_s | x_t) of the reverse of a process in continuous time, step by step of its grid."""

    network: ScoreNetwork
    decoder: RateDecoder
    forward_rows: int = 1024
    """Network rows per forward without gradients; any value gives the same paths and numbers."""

    @property
    def rows(self) -> int:
        return self.network.rows if isinstance(self.network, CountedScores) else 0

    def draw(self, prompts: Prompts, record: Record, rng: Rng) -> RateTrajectory:
        return sample_rates(self.network, self.decoder, prompts, record, rng)

    def transition(
        self, trajectory: Trajectory, step: Int[Tensor, " N"], score: Score
    ) -> Transition:
        assert isinstance(trajectory, RateTrajectory)
        before, after = trajectory.move(step)
        probs = self.law(before, step, trajectory.prompts.attend)
        editable = trajectory.prompts.editable
        possible = probs > 0  # the logarithm of 0 would have a gradient that is not finite
        log_p = torch.where(possible, torch.where(possible, probs, 1.0).log(), -torch.inf)
        log_prob = tokens_log_prob(probs, after, editable)
        return Transition(log_prob=log_prob, log_p=log_p, revealed=editable)

    def law(
        self, x: Int[Tensor, "N L"], step: Int[Tensor, " N"], attend: Bool[Tensor, "N L"] | None
    ) -> Float[Tensor, "N L S"]:
        """The law of every token after step ``step[i]`` from state i: one network row each."""
        moves = self.decoder.moves()
        numbers = torch.tensor([move[1:] for move in moves], device=x.device)
        level, length = numbers[step].unbind(1)
        log_score = self.network.log_score(x, level, attend=attend)
        laws = torch.zeros_like(log_score)
        kinds: dict[Move, None] = dict.fromkeys(move[0] for move in moves)
        for kind in kinds:
            of_kind = torch.tensor([move[0] == kind for move in moves], device=x.device)[step]
            law = move_probs(
                self.network.process, x, log_score, kind, length, self.decoder.predictor
            )
            laws = torch.where(of_kind[:, None, None], law, laws)
        return laws


def policy_of(network: Denoiser | ScoreNetwork, decoder: Decoding, forward_rows: int) -> Policy:
    """The policy of a network under a decoder; its network rows are counted.

    A masked denoiser serves processes in continuous time too: its predictions are concrete scores
    (``SubsScores``).

    Raises:
        ValueError: the decoder cannot be used with this network.
    """
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
    critic: Critic | None = None
    """Predicts the reward of a prompt; None when the algorithm uses none."""
