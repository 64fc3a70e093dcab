"""The sampling loop of processes in continuous time: scores x decoder -> trajectory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.denoiser import CountedScores, ScoreNetwork, SubsScores
from rescore.processes import ctmc
from rescore.processes.ctmc import Absorbing, Law, Process
from rescore.processes.layout import gather
from rescore.sampling.decoder import RateDecoder
from rescore.sampling.record import Record
from rescore.sampling.rng import Rng, Stream
from rescore.sampling.slots import random_steps
from rescore.types import Prompts, RateTrajectory


def laws_of(process: Process, decoder: RateDecoder) -> list[tuple[Law, float, float]]:
    """Every move in turn: its law, the total noise it starts at, and the length of the step.

    The last one is analytic whatever the predictor, and as long as ``denoise_probs`` says.
    """
    laws: list[tuple[Law, float, float]] = []
    for kind, level, length in decoder.moves():
        if kind == "denoise":
            laws.append(("analytic", level, ctmc.denoising_length(process, length)))
        else:
            laws.append((decoder.predictor if kind == "predictor" else kind, level, length))
    return laws


def laws_at(
    network: ScoreNetwork,
    x: Int[Tensor, "B L"],
    total_noise: Float[Tensor, " B"],
    attend: Bool[Tensor, "B L"] | None,
) -> Callable[[Law, Float[Tensor, " B"] | float], Float[Tensor, "B L S"]]:
    """The law of every token after a step of a kind and length; one network row per state.

    Tokens move independently of each other. Sampler and losses both call this, so they cannot
    disagree. Masked denoisers are not taken round by their scores.
    """
    process = network.process
    if isinstance(network, CountedScores) and isinstance(network.network, SubsScores):
        assert isinstance(process, Absorbing)
        clean = network.clean_probs(x, attend=attend)
        return lambda law, length: ctmc.masked_law(process, x, clean, total_noise, law, length)
    log_score = network.log_score(x, total_noise, attend=attend)
    return lambda law, length: move_probs(process, x, log_score, law, length)


def move_probs(
    process: Process,
    x: Int[Tensor, "B L"],
    log_score: Float[Tensor, "B L S"],
    law: Law,
    length: Float[Tensor, " B"] | float,
) -> Float[Tensor, "B L S"]:
    """The law of every token after a step, from scores."""
    if law == "corrector":
        return ctmc.corrector_probs(process, x, log_score, length)
    if law == "euler":
        return ctmc.euler_probs(process, x, log_score, length)
    return ctmc.analytic_probs(process, x, log_score, length)


def tokens_log_prob(
    probs: Float[Tensor, "B L S"], token: Int[Tensor, "B L"], editable: Bool[Tensor, "B L"]
) -> Float[Tensor, " B"]:
    """Sum over the editable positions of the log-probability of the token drawn there, nats."""
    return log_or_impossible(torch.where(editable, gather(probs, token), 1.0)).sum(-1)


def log_or_impossible(probs: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """log p, and -inf without a gradient where p is 0: that of the logarithm is not finite."""
    possible = (probs > 0).to(probs)
    return (probs * possible + (1 - possible)).log() + (1 - 1 / possible)


def start_of(process: Process, prompts: Prompts, rng: Rng) -> Int[Tensor, "B L"]:
    """x_1: the law at infinite noise where the canvas is editable, the prompt elsewhere."""
    canvas = prompts.tokens
    if process.mask_id is not None:
        return torch.where(prompts.editable, process.mask_id, canvas)
    where = torch.arange(canvas.shape[1], device=canvas.device).expand(canvas.shape)
    even = torch.ones((*canvas.shape, process.n_states), device=canvas.device)
    return torch.where(prompts.editable, rng.categorical(even, Stream.START, 0, where), canvas)


def sample_rates(
    network: ScoreNetwork, decoder: RateDecoder, prompts: Prompts, record: Record, rng: Rng
) -> RateTrajectory:
    """Run the reverse chain; given tokens are put back after every step, so they never move.

    Network rows: T + n_c forwards of B canvases. Memory: the canvas, scalars per step, and the
    moves kept. The caller decides about gradients.
    """
    n_samples, length = prompts.tokens.shape
    moves, device = laws_of(network.process, decoder), prompts.tokens.device
    where = torch.arange(length, device=device).expand(n_samples, -1)
    everything = torch.ones((n_samples, len(moves)), dtype=torch.bool, device=device)
    if record.moves == "all":
        kept_step = torch.arange(len(moves), device=device).expand(n_samples, -1)
    elif record.moves:
        kept_step = random_steps(everything, record.moves, rng).sort(1).values
    else:
        kept_step = where[:, :0]
    kept = 0 if record.moves == "all" else kept_step.shape[1]
    before = prompts.tokens.new_zeros(n_samples, kept, length)
    after, path = before.clone(), []

    x = start_of(network.process, prompts, rng)
    log_probs = []
    for k, (law, level, size) in enumerate(moves):
        noise = torch.full((n_samples,), level, dtype=torch.float64, device=device)
        probs = laws_at(network, x, noise, prompts.attend)(law, size)
        drawn = rng.categorical(probs, Stream.TOKEN, k, where)
        moved = torch.where(prompts.editable, drawn, x)
        log_probs.append(tokens_log_prob(probs, moved, prompts.editable))
        path += [x, moved] if record.moves == "all" else []
        if kept:
            now = (kept_step == k)[..., None].to(x)
            before.addcmul_(now, x[:, None])
            after.addcmul_(now, moved[:, None])
        x = moved

    if record.moves == "all":
        before, after = torch.stack(path[::2], 1), torch.stack(path[1::2], 1)
    return RateTrajectory(
        prompts=prompts,
        x_0=x,
        log_prob=torch.stack(log_probs, 1),
        step=kept_step,
        before=before,
        after=after,
    )
