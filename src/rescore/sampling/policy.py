"""A policy: a network and the way it is decoded. Samples paths and scores steps of given paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.denoiser import Denoiser
from rescore.sampling.decoder import Decoder
from rescore.sampling.discrete import StepRows, sample_masked, step_log_prob
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng
from rescore.types import MaskedTrajectory, Prompts


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

    @torch.no_grad()
    def sample(self, prompts: Prompts, record: Record, rng: Rng) -> MaskedTrajectory:
        """Draw one path per prompt, recording what ``record`` asks for."""
        return sample_masked(self.denoiser, self.decoder, prompts, record, rng)

    def transition(
        self, trajectory: MaskedTrajectory, step: Int[Tensor, " N"], score: Score
    ) -> Transition:
        """Score step ``step[i]`` of path i: one network row each, with gradients if enabled."""
        listing_all = score.form == "tokens_and_selection" and self.decoder.order in (
            "plackett_luce",
            "low_confidence",
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
        )


@dataclass(frozen=True)
class Models:
    """The policies a loss may ask. The old policy is not among them: what it said is recorded."""

    new: MaskedPolicy
    """The policy being trained."""
    ref: MaskedPolicy | None = None
    """The frozen reference that KL terms refer to; None when the algorithm uses none."""
