"""The masked sampling loop: denoiser x decoder -> trajectory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.denoiser import Denoiser
from rescore.processes import masked
from rescore.sampling.decoder import Decoder
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng, Stream
from rescore.sampling.slots import CompletionSlots
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
    candidate = torch.arange(rows.place.shape[1], device=log_p.device) < rows.n_candidates[:, None]
    if decoder.order == "random":
        constant = masked.random_order_log_prob(rows.n_candidates, revealed.sum(1))
        log_prob = log_prob + constant.to(log_prob.dtype)
    elif decoder.order == "plackett_luce":
        log_weight = masked.confidence_log_probs(logits).amax(-1) / decoder.position_temperature
        log_prob = log_prob + masked.plackett_luce_log_prob(log_weight, rows.place, candidate)
    elif decoder.order == "low_confidence":
        log_prob = log_prob + masked.low_confidence_log_prob(
            logits, log_p, rows.token, rows.place, candidate
        )
    return log_prob, log_p


def sample_masked(
    denoiser: Denoiser, decoder: Decoder, prompts: Prompts, record: Record, rng: Rng
) -> MaskedTrajectory:
    """Fill the editable positions of every canvas in ``decoder.steps`` steps.

    Network rows: T forwards of B canvases. The vocabulary head sees only the rows a step may write,
    unless completions are recorded. Memory: the canvas, one rank per position, and scalars per
    step. The caller decides about gradients: ``MaskedPolicy.sample`` disables them, the proofs keep
    them.
    """
    n_samples, length = prompts.tokens.shape
    block = masked.blocks_of(prompts.editable, decoder.blocks)
    quota, candidates = masked.reveal_quota(block, decoder.blocks, decoder.steps)
    widths: list[int] = quota.amax(0).tolist()  # the one host synchronisation, before the loop
    spans: list[int] = candidates.amax(0).tolist()
    everywhere = torch.arange(length, device=block.device).expand(n_samples, -1)

    x_t = prompts.tokens
    rank = torch.full_like(x_t, -1)
    slots = CompletionSlots(record.slots, x_t) if record.slots else None
    log_probs, entropies = [], []
    for k in range(decoder.steps):
        open_here = (rank < 0) & (block == k // decoder.steps_per_block)
        width, n_revealed = widths[k], quota[:, k]

        # Rows of the canvas that need logits: the positions themselves where the choice does not
        # depend on the network, else everything the step may choose from.
        if decoder.order == "random":
            log_weight = torch.where(open_here, 0.0, masked.FAR_BELOW)
            position = rng.ordered(log_weight, width, k, everywhere)
        elif decoder.order == "left_to_right":
            position = (~open_here).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        else:
            position = (~open_here).to(torch.uint8).argsort(dim=1, stable=True)[:, : spans[k]]
        if slots is None:
            completion = x_t
            logits = denoiser.predict(x_t, attend=prompts.attend, positions=position)
        else:  # a completion needs the logits of every masked position
            everything = denoiser.predict(x_t, attend=prompts.attend)
            logits = everything.gather(1, _columns(position, everything))
            completion = torch.where((rank < 0) & prompts.editable, everything.argmax(-1), x_t)

        law = masked.token_log_probs(logits, decoder.temperature)
        rows = _act(logits, law, position, width, n_revealed, candidates[:, k], decoder, rng, k)
        log_prob, _ = step_log_prob(logits, rows, decoder, record.score)
        log_probs.append(log_prob)
        revealed = rows.place >= 0
        if record.entropy or slots is not None:
            entropy = torch.where(revealed, masked.entropy(law.detach()), 0.0).sum(1)
            entropies.append(entropy)
        if slots is not None:
            slots.offer(k, completion, entropies[-1], n_revealed > 0, rng)

        written = torch.where(revealed, rows.token, x_t.gather(1, rows.position))
        x_t = x_t.scatter(1, rows.position, written)
        ranks = torch.where(revealed, k * length + rows.place, rank.gather(1, rows.position))
        rank = rank.scatter(1, rows.position, ranks)

    return MaskedTrajectory(
        prompts=prompts,
        x_0=x_t,
        rank=rank,
        log_prob=torch.stack(log_probs, 1),
        max_revealed=max(widths),
        max_candidates=max(spans),
        entropy=torch.stack(entropies, 1) if record.entropy else None,
        completions=slots.completions() if slots is not None else None,
    )


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
    if decoder.order == "low_confidence":
        token = rng.categorical(law.exp(), Stream.TOKEN, k, position)
        key = confidence.gather(-1, token[..., None]).squeeze(-1)
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
    return StepRows(position, token, place, n_candidates)


def _largest(key: Float[Tensor, "B R"], n: int) -> Int[Tensor, "B n"]:
    """Rows of the n largest keys, largest first; ties go to the lower row, as the score assumes."""
    return key.argsort(dim=1, descending=True, stable=True)[:, :n]


def _columns(rows: Int[Tensor, "B n"], table: Float[Tensor, "B R V"]) -> Int[Tensor, "B n V"]:
    """Row numbers repeated over the last axis, as ``gather`` wants them."""
    return rows[..., None].expand(-1, -1, table.shape[-1])
