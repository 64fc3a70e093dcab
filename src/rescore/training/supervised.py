"""Supervised training of a network on finished sequences: for bases, and for warm starts.

Denoisers minimise the masked cross-entropy (MDLM, arXiv:2406.07524), score networks the denoising
score entropy (SEDD, arXiv:2310.16834), networks for Gaussian noise the squared error of their own
output (DDPM, arXiv:2006.11239), over stratified times. Noise goes to the positions that the model
writes, prompts stay as they are. All randomness comes from seeded generators; noise is drawn on the
CPU in float64, whatever the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rescore.models.denoiser import Denoiser, ScoreNetwork
from rescore.models.gaussian_network import GaussianNetwork
from rescore.objectives.denoising import masked_cross_entropy
from rescore.objectives.score_entropy import score_entropy
from rescore.processes.convert import convert_prediction
from rescore.processes.masked import mask_tokens
from rescore.processes.schedules import Linear, LogLinear, Noise, Schedule
from rescore.types import Clean, Examples, Points, State

MIN_T = 1e-3
"""Training times lie in [MIN_T, 1], as in MDLM's code: keeps the weight 1 / t finite."""


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """How a network is trained on finished sequences."""

    steps: int
    """Optimiser steps."""
    batch: int = 128
    """Sequences per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; falls to 0 along a half cosine."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    clip: float = 1.0
    """Largest norm of the gradient of the mean loss per position."""
    schedule: Schedule = dataclasses.field(default_factory=Linear)
    """Law of the training times of a denoiser."""
    noise: Noise = dataclasses.field(default_factory=LogLinear)
    """Law of the noise levels of a score network."""
    validate_every: int = 50
    """Steps between two rows of the log."""
    validation_rows: int = 1024
    """Sequences in the validation loss, the same ones under the same masks every time. Best a
    multiple of the length."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the log of a pre-training."""

    step: int
    """Optimiser steps taken."""
    train: float | None
    """Mean bound over the batches since the last row, nats per sequence; None at step 0."""
    validation: float
    """The bound on the validation sequences, nats per sequence."""


def fit(
    module: nn.Module,
    data: Clean,
    held_out: Clean,
    config: Supervised,
    generator: torch.Generator,
    *,
    micro_batch: int | None = None,
    progress: Callable[[Row], None] = lambda row: None,
) -> None:
    """Train the parameters that require gradients, in place.

    Args:
        module: a ``Denoiser``, a ``ScoreNetwork`` or a ``GaussianNetwork``.
        data: what to learn from.
        held_out: for the validation loss.
        config: how.
        generator: draws the batches and their noise, on the CPU.
        micro_batch: sequences per backward pass; None = the whole batch.
        progress: told the losses at the start, every ``validate_every`` steps and at the end.

    Raises:
        RuntimeError: a gradient is not finite.
    """
    assert isinstance(module, Denoiser | ScoreNetwork | GaussianNetwork)
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    n_written = float(data.x_0[0].numel())
    if isinstance(data, Examples):
        n_written = data.editable.sum(1).double().mean().item()
    shape = (config.batch, *data.x_0.shape[1:])

    def report(step: int, train: float | None) -> None:
        validation = validation_bound(module, held_out, config, device, micro_batch)
        progress(Row(step=step, train=train, validation=validation))

    report(0, None)
    total, since = torch.zeros((), device=device), 0
    for step in range(config.steps):
        row = torch.randint(len(data.x_0), (config.batch,), generator=generator)
        t = stratified_times(torch.rand(config.batch, generator=generator, dtype=torch.float64))
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        for part in torch.arange(config.batch).split(micro_batch or config.batch):
            loss = bound(module, data.take(row[part]), t[part], u[part], config, device)
            loss = loss.sum() / config.batch
            (loss / n_written).backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(parameters, config.clip, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(step, config)
        optimizer.step()
        since += 1
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            report(step + 1, total.item() / since)
            total, since = torch.zeros((), device=device), 0


def bound(
    model: Denoiser | ScoreNetwork | GaussianNetwork,
    examples: Clean,
    t: Float[Tensor, " B"],
    u: State,
    config: Supervised,
    device: torch.device | str = "cpu",
) -> Float[Tensor, " B"]:
    """One-sample estimate of the bound on -log p(x_0), nats; examples and noise on the CPU.

    ``device`` is the model's. That of a score network leaves out the divergence at full noise; that
    of a network for Gaussian noise is half the squared error of its output, all times alike, which
    weights the terms of the bound otherwise ("simple" loss).
    """
    if isinstance(model, GaussianNetwork):
        assert isinstance(examples, Points)
        return _squared_error(model, examples, t, u, device)
    assert isinstance(examples, Examples)
    if isinstance(model, ScoreNetwork):
        return _score_entropy(model, examples, t, u, config.noise, device)
    schedule = config.schedule
    x_t = mask_tokens(examples.x_0, examples.editable, schedule.alpha(t), u, model.mask_id)
    weight = schedule.weight(t).float()
    return _cross_entropy(model, examples, x_t == model.mask_id, weight, device)


def _squared_error(
    model: GaussianNetwork,
    points: Points,
    t: Float[Tensor, " B"],
    u: State,
    device: torch.device | str,
) -> Float[Tensor, " B"]:
    """Half the squared error at x_t = alpha_t x_0 + sigma_t eps, eps from the uniforms ``u``."""
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    per_sample = (-1, *(1,) * (u.ndim - 1))
    eps = torch.special.ndtri(u)
    x_t = alpha.view(per_sample) * points.x_0 + sigma.view(per_sample) * eps
    target = convert_prediction(eps, x_t, alpha, sigma, source="eps", target=model.prediction)
    points, x_t, target = points.to(device), x_t.float().to(device), target.float().to(device)
    error = model.predict(x_t, t.float().to(device), points.inputs).float() - target
    return error.square().flatten(1).sum(1) / 2


def _score_entropy(
    model: ScoreNetwork,
    examples: Examples,
    t: Float[Tensor, " B"],
    u: Float[Tensor, "B L"],
    noise: Noise,
    device: torch.device | str,
) -> Float[Tensor, " B"]:
    """rate(t) times the denoising score entropy, on the model's device."""
    process, total_noise = model.process, noise.total_noise(t)
    x_t = torch.where(
        examples.editable, process.noised(examples.x_0, total_noise, u.double()), examples.x_0
    )
    probs = process.noised_probs(examples.x_0, total_noise)
    ratio = probs / probs.gather(-1, x_t[..., None])
    attend = None if examples.attend is None else examples.attend.to(device)
    log_score = model.log_score(x_t.to(device), total_noise.float().to(device), attend=attend)
    rates = process.backward_rates(x_t).to(device)
    entropy = score_entropy(log_score, ratio.to(log_score), rates, examples.editable.to(device))
    return noise.rate(t).float().to(device) * entropy


def _cross_entropy(
    model: Denoiser,
    examples: Examples,
    hidden: Bool[Tensor, "B L"],
    weight: Float[Tensor, " B"],
    device: torch.device | str,
) -> Float[Tensor, " B"]:
    """The masked cross-entropy of examples with these positions hidden, on the model's device."""
    examples, hidden, weight = examples.to(device), hidden.to(device), weight.to(device)
    x_t = torch.where(hidden, model.mask_id, examples.x_0)
    logits = model.predict(x_t, attend=examples.attend)
    return masked_cross_entropy(logits, examples.x_0, hidden, weight)


def stratified_times(u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """One time in each of B equal parts of [MIN_T, 1], at the fraction ``u`` of its part.

    The low-discrepancy sampler of MDLM (arXiv:2406.07524): the batch covers all times, the mean
    loss stays unbiased and its variance falls.
    """
    part = torch.arange(len(u), dtype=u.dtype)
    return MIN_T + (1 - MIN_T) * (part + u) / len(u)


def rate(step: int, config: Supervised) -> float:
    """Fraction of the peak learning rate: linear warm-up times a half cosine down to 0."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@torch.no_grad()
def validation_bound(
    model: Denoiser | ScoreNetwork | GaussianNetwork,
    examples: Clean,
    config: Supervised,
    device: torch.device | str = "cpu",
    micro_batch: int | None = None,
) -> float:
    """The bound on held-out sequences under fixed masks, nats per sequence.

    Uses its form in the number m of masks, uniform in 1 ... E for E editable positions: the mean of
    E / m times the masked cross-entropy (LLaDA, arXiv:2502.09992, eq. 6). The value is the same as
    over times, for every schedule, with less noise; here the rows take the values of m in equal
    shares.
    """
    rows, shape = config.validation_rows, examples.x_0.shape
    row = torch.arange(rows)
    noise = torch.rand((rows, *shape[1:]), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for part in row.split(micro_batch or config.batch):
        some = examples.take(part % shape[0])
        if isinstance(model, ScoreNetwork | GaussianNetwork):
            t = MIN_T + (1 - MIN_T) * (part.double() + 0.5) / rows
            u = noise[part].double().clamp(1e-7, 1 - 1e-7)  # 0 is drawn once in 2^24
            total += bound(model, some, t, u, config, device).double().sum().item()
            continue
        assert isinstance(some, Examples)
        n_editable = some.editable.sum(1)
        n_masked = 1 + part * n_editable // rows
        u = torch.where(some.editable, noise[part], 2.0)
        hidden = u.argsort(1).argsort(1) < n_masked[:, None]
        weight = n_editable / n_masked
        total += _cross_entropy(model, some, hidden, weight, device).double().sum().item()
    return total / rows
