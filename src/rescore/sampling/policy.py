"""A policy: a network and the way it is decoded. Samples paths and scores steps of given paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.denoiser import Denoiser
from rescore.sampling.chunks import over_rows
from rescore.sampling.decoder import Decoder
from rescore.sampling.discrete import StepRows, columns_of, fill_in, sample_masked, step_log_prob
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.types import MaskedTrajectory, Prompts, joined


@dataclass(frozen=True)
class Transition:
    """How a policy sees given steps of given paths."""

    log_prob: Float[Tensor, " N"]
    """Log-probability of each step, nats, summed over what the score counts."""
    log_p: Float[Tensor, "N R V"]
    """The law the tokens are scored under, at the rows that were needed."""
    revealed: Bool[Tensor, "N R"]
    """True for the rows the step revealed."""


@dataclass(frozen=True)
class MaskedPolicy:
    """pi(x_s | x_t): the law of one reverse step of the masked process."""

    denoiser: Denoiser
    decoder: Decoder
    forward_rows: int = 1024
    """Network rows per forward without gradients; any value gives the same paths and numbers."""

    @torch.no_grad()
    def sample(self, prompts: Prompts, record: Record, rng: SampleRng) -> MaskedTrajectory:
        """Draw one path per prompt, recording what ``record`` asks for; a part at a time."""

        def part(rows: Int[Tensor, " n"]) -> MaskedTrajectory:
            rows = rows.to(prompts.tokens.device)
            some = prompts.take(rows)
            return sample_masked(self.denoiser, self.decoder, some, record, rng.take(rows))

        return joined(over_rows(part, prompts.n_samples, at_most=self.forward_rows))

    @torch.no_grad()
    def log_probs(
        self, trajectory: MaskedTrajectory, step: Int[Tensor, "B K"], score: Score
    ) -> Float[Tensor, "B K"]:
        """Score several steps of each path: B K network rows, a part at a time, no gradients."""
        n_columns = step.shape[1]

        def part(rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
            rows = rows.to(step.device)
            paths = trajectory.take(rows // n_columns)
            return self.transition(paths, step.flatten()[rows], score).log_prob

        parts = over_rows(part, step.numel(), at_most=self.forward_rows)
        return torch.cat(parts).view_as(step)

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
        self, trajectory: MaskedTrajectory, step: Int[Tensor, " N"], score: Score
    ) -> Transition:
        """Score step ``step[i]`` of path i: one network row each, with gradients if enabled."""
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
class Models:
    """The policies a loss may ask. The old policy is not among them: what it said is recorded."""

    new: MaskedPolicy
    """The policy being trained."""
    ref: MaskedPolicy | None = None
    """The frozen reference that KL terms refer to; None when the algorithm uses none."""
