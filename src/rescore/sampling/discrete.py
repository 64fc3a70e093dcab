"""The masked sampling loop: denoiser x decoder -> trajectory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.denoiser import Denoiser
from rescore.processes import masked
from rescore.sampling.decoder import Decoder
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng, Stream
from rescore.sampling.slots import StepSlots
from rescore.types import MaskedTrajectory, Prompts


@dataclass(frozen=True)
class StepRows:
    """One step of N samples as rows of the canvas: those revealed, or all it chose from."""

    position: Int[Tensor, "N R"]
    token: Int[Tensor, "N R"]
    place: Int[Tensor, "N R"]
    """Order of the reveal within the step; -1 for rows not revealed."""
    n_candidates: Int[Tensor, " N"]
    """How many positions the step chose from; where all are listed, their rows come first."""
    log_time: Float[Tensor, "N R"] | None = None
    """Logarithm of when each row was revealed, for ``soft_low_confidence``."""


def step_log_prob(
    logits: Float[Tensor, "N R V"], rows: StepRows, decoder: Decoder, score: Score
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N R V"]]:
    """Log-probability of a step in the named form, and the law its tokens are scored under.

    Sampler and loss both call this, so they cannot disagree. ``tokens_and_selection`` needs
    ``rows`` to list every candidate for the orders whose choice of positions depends on the
    network.
    """
    temperature = score.score_temperature or decoder.temperature
    log_p = masked.token_log_probs(logits, temperature)
    revealed = rows.place >= 0
    log_prob = masked.tokens_log_prob(log_p, rows.token, revealed)
    if score.form == "tokens":
        return log_prob, log_p
    selection = _selection_log_prob(logits, log_p, rows, decoder)
    if selection is not None:
        log_prob = log_prob + score.selection_weight * selection.to(log_prob.dtype)
    return log_prob, log_p


def _selection_log_prob(
    logits: Float[Tensor, "N R V"], log_p: Float[Tensor, "N R V"], rows: StepRows, decoder: Decoder
) -> Float[Tensor, " N"] | None:
    """Log-probability of the positions given the tokens; None where the state decides them."""
    revealed = rows.place >= 0
    candidate = torch.arange(rows.place.shape[1], device=log_p.device) < rows.n_candidates[:, None]
    if decoder.order == "random":
        return masked.random_order_log_prob(rows.n_candidates, revealed.sum(1))
    if decoder.order == "plackett_luce":
        log_weight = masked.confidence_log_probs(logits).amax(-1) / decoder.position_temperature
        return masked.plackett_luce_log_prob(log_weight, rows.place, candidate)
    if decoder.order == "low_confidence":
        return masked.low_confidence_log_prob(logits, log_p, rows.token, rows.place, candidate)
    if decoder.order == "soft_low_confidence":
        assert rows.log_time is not None
        return masked.race_log_prob(
            logits,
            log_p,
            rows.token,
            rows.log_time,
            rows.place,
            candidate,
            decoder.position_temperature,
        )
    return None


def sample_masked(
    denoiser: Denoiser, decoder: Decoder, prompts: Prompts, record: Record, rng: Rng
) -> MaskedTrajectory:
    """Fill the editable positions of every canvas in ``decoder.steps`` steps.

    Network rows: T forwards of B canvases. The vocabulary head sees only the rows a step may write,
    unless completions are recorded: then every row that may be written. Memory: the canvas, one
    rank per position, the steps kept, and scalars per step. The caller decides about gradients:
    ``MaskedPolicy.sample`` disables them, the proofs keep them.
    """
    n_samples, length = prompts.tokens.shape
    block = masked.blocks_of(prompts.editable, decoder.blocks)
    quota, candidates = masked.reveal_quota(block, decoder.blocks, decoder.steps)
    most = [*quota.amax(0), *candidates.amax(0), prompts.editable.sum(1).amax()]
    numbers: list[int] = torch.stack(most).tolist()  # the one host synchronisation
    widths, spans = numbers[: decoder.steps], numbers[decoder.steps : -1]
    everywhere = torch.arange(length, device=block.device).expand(n_samples, -1)
    writable = columns_of(prompts.editable, numbers[-1])
    row_of = (prompts.editable.cumsum(1) - 1).clamp(min=0)  # the inverse of ``writable``

    x_t = prompts.tokens
    rank = torch.full_like(x_t, -1)
    plan = record.slots
    slots = None if plan is None else StepSlots(plan, x_t, quota > 0, rng)
    by_entropy = plan is not None and plan.by in ("top", "bottom", "importance")
    log_probs, entropies, log_time = [], [], None
    for k in range(decoder.steps):
        open_here = (rank < 0) & (block == k // decoder.steps_per_block)
        width, n_revealed = widths[k], quota[:, k]

        # Rows of the canvas that need logits: the positions themselves where the choice does not
        # depend on the network, else everything the step may choose from.
        if decoder.order == "random":
            log_weight = torch.where(open_here, 0.0, masked.FAR_BELOW)
            position = rng.ordered(log_weight, width, k, everywhere)
        elif decoder.order == "left_to_right":
            position = columns_of(open_here, width)
        else:
            position = columns_of(open_here, spans[k])
        if plan is None or not plan.completions:
            completion = None
            logits = denoiser.predict(x_t, attend=prompts.attend, positions=position)
        else:  # a completion needs the logits of every masked position
            everything = denoiser.predict(x_t, attend=prompts.attend, positions=writable)
            logits = everything.gather(1, _columns(row_of.gather(1, position), everything))
            completion = fill_in(x_t, (rank < 0) & prompts.editable, writable, everything)

        law = masked.token_log_probs(logits, decoder.temperature)
        rows = _act(logits, law, position, width, n_revealed, candidates[:, k], decoder, rng, k)
        log_prob, _ = step_log_prob(logits, rows, decoder, record.score)
        log_probs.append(log_prob)
        revealed = rows.place >= 0
        entropy = None
        if record.entropy or by_entropy:
            entropy = torch.where(revealed, masked.entropy(law.detach()), 0.0).sum(1)
            entropies += [entropy] if record.entropy else []
        if slots is not None:
            slots.offer(k, completion, entropy)

        written = torch.where(revealed, rows.token, x_t.gather(1, rows.position))
        x_t = x_t.scatter(1, rows.position, written)
        ranks = torch.where(revealed, k * length + rows.place, rank.gather(1, rows.position))
        rank = rank.scatter(1, rows.position, ranks)
        if rows.log_time is not None:
            log_time = rows.log_time.new_zeros(rank.shape) if log_time is None else log_time
            known = torch.where(revealed, rows.log_time, log_time.gather(1, rows.position))
            log_time = log_time.scatter(1, rows.position, known)

    return MaskedTrajectory(
        prompts=prompts,
        x_0=x_t,
        rank=rank,
        log_prob=torch.stack(log_probs, 1),
        max_revealed=max(widths),
        max_candidates=max(spans),
        entropy=torch.stack(entropies, 1) if record.entropy else None,
        log_time=log_time,
        kept=None if slots is None else slots.kept(log_probs[0].dtype),
    )


def columns_of(chosen: Bool[Tensor, "B L"], width: int) -> Int[Tensor, "B R"]:
    """The first ``width`` chosen positions of each row, left to right, then any others."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def fill_in(
    x_t: Int[Tensor, "B L"],
    still: Bool[Tensor, "B L"],
    position: Int[Tensor, "B R"],
    logits: Float[Tensor, "B R V"],
) -> Int[Tensor, "B L"]:
    """x_hat_0: the most probable token at every position where ``still`` holds.

    Source: the one-step completion of EGSPO-SA, arXiv:2603.12554. ``position`` names the rows of
    the logits, distinct ones, all that are still masked among them.
    """
    return torch.where(still, x_t.scatter(1, position, logits.argmax(-1)), x_t)


def _act(
    logits: Float[Tensor, "B R V"],
    law: Float[Tensor, "B R V"],
    position: Int[Tensor, "B R"],
    width: int,
    n_revealed: Int[Tensor, " B"],
    n_candidates: Int[Tensor, " B"],
    decoder: Decoder,
    rng: Rng,
    k: int,
) -> StepRows:
    """Draw the tokens of a step and, where the order depends on the network, its positions."""
    rank_in_step = torch.arange(width, device=position.device).expand(len(position), -1)
    place = torch.where(rank_in_step < n_revealed[:, None], rank_in_step, -1)
    if decoder.order in ("random", "left_to_right"):
        token = rng.categorical(law.exp(), Stream.TOKEN, k, position)
        return StepRows(position, token, place, n_candidates)

    candidate = torch.arange(position.shape[1], device=position.device) < n_candidates[:, None]
    confidence = masked.confidence_log_probs(logits)
    log_time = None
    if decoder.order in ("low_confidence", "soft_low_confidence"):
        token = rng.categorical(law.exp(), Stream.TOKEN, k, position)
        key = confidence.gather(-1, token[..., None]).squeeze(-1)
        if decoder.order == "soft_low_confidence":
            log_time = rng.log_times(key / decoder.position_temperature, k, position)
            key = -log_time
        chosen = _largest(key.masked_fill(~candidate, -torch.inf), width)
    else:
        key = confidence.amax(-1)
        if decoder.order == "max_prob":
            chosen = _largest(key.masked_fill(~candidate, -torch.inf), width)
        else:
            weight = key / decoder.position_temperature
            weight = torch.where(candidate, weight, masked.FAR_BELOW)
            chosen = rng.ordered(weight, width, k, position)
        chosen_law = law.gather(1, _columns(chosen, law))
        drawn = rng.categorical(chosen_law.exp(), Stream.TOKEN, k, position.gather(1, chosen))
        token = torch.zeros_like(position).scatter(1, chosen, drawn)
    place = torch.full_like(position, -1).scatter(1, chosen, place)
    return StepRows(position, token, place, n_candidates, log_time)


def _largest(key: Float[Tensor, "B R"], n: int) -> Int[Tensor, "B n"]:
    """Rows of the n largest keys, largest first; ties go to the lower row, as the score assumes."""
    return key.argsort(dim=1, descending=True, stable=True)[:, :n]


def _columns(rows: Int[Tensor, "B n"], table: Float[Tensor, "B R V"]) -> Int[Tensor, "B n V"]:
    """Row numbers repeated over the last axis, as ``gather`` wants them."""
    return rows[..., None].expand(-1, -1, table.shape[-1])
