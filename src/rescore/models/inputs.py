"""What the networks in this folder check about their inputs, before anything is computed."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.denoiser import ScoreNetwork


def check_tokens(x_t: Int[Tensor, "B L"], n_states: int) -> None:
    """Refuse tokens that are no state; on an accelerator this waits for the device.

    Raises:
        ValueError: a token is negative or not below ``n_states``.
    """
    if not x_t.numel():
        return
    low, high = (int(bound) for bound in x_t.aminmax())
    if low < 0 or high >= n_states:
        raise ValueError(
            f"the canvas has tokens from {low} to {high}; the states of this network are 0 to "
            f"{n_states - 1}"
        )


def check_canvas(x_t: Int[Tensor, "B L"], *, length: int, n_states: int) -> None:
    """Refuse a canvas that is too long and, where that needs no wait (on the CPU), its tokens.

    Raises:
        ValueError: more than ``length`` positions, or a token that is no state.
    """
    if x_t.shape[1] > length:
        raise ValueError(f"canvas of {x_t.shape[1]} positions; this model takes at most {length}")
    if x_t.device.type == "cpu":
        check_tokens(x_t, n_states)


def check_total_noise(total_noise: Float[Tensor, " B"], x_t: Int[Tensor, "B L"]) -> None:
    """Refuse a noise level that is not one real number per sample.

    Raises:
        TypeError: it is of an integer type, so a small value would have been rounded to 0.
        ValueError: its shape is not [B].
    """
    if not total_noise.is_floating_point():
        raise TypeError(
            f"total_noise has dtype {total_noise.dtype}; it is a real number, so pass float32 or "
            f"float64"
        )
    if total_noise.shape != x_t.shape[:1]:
        raise ValueError(
            f"total_noise has shape {tuple(total_noise.shape)}; expected one number per sample, "
            f"({x_t.shape[0]},)"
        )


@torch.no_grad()
def check_scores(network: ScoreNetwork, canvas: Int[Tensor, "1 L"], mask_id: int) -> None:
    """Put one canvas to a score network and refuse outputs that are no concrete scores.

    Args:
        network: on the device of the canvas.
        canvas: as a task gives it, the mask token where something is to be written.
        mask_id: of the task: the number of ordinary tokens, where the network knows no mask.

    Raises:
        ValueError: the network knows other tokens than the task; its scores have a wrong shape or
            are NaN or infinite; the entry at the present token is not 0; or a masked position can
            go nowhere, all its entries being -inf.
    """
    process, name = network.process, type(network).__name__
    if process.mask_id is None and process.n_states != mask_id:
        raise ValueError(
            f"{name} knows {process.n_states} tokens and no mask; the task has {mask_id} tokens"
        )
    if process.mask_id not in (None, mask_id):
        raise ValueError(f"{name} has the mask at {process.mask_id}; the task has it at {mask_id}")
    x_t = canvas if process.mask_id is not None else torch.where(canvas == mask_id, 0, canvas)
    noise = torch.full((1,), 0.5, device=canvas.device)
    log_score = network.log_score(x_t, noise)
    shape = (1, x_t.shape[1], process.n_states)
    if log_score.shape != shape:
        raise ValueError(f"{name} gave scores of shape {tuple(log_score.shape)}; expected {shape}")
    if bool((log_score.isnan() | (log_score == torch.inf)).any()):
        raise ValueError(f"{name} gave log-scores that are NaN or infinite; look at its weights")
    at_x = log_score.gather(-1, x_t[..., None]).squeeze(-1)
    if bool((at_x != 0).any()):
        place = int((at_x[0] != 0).nonzero()[0])
        raise ValueError(
            f"{name} gave the log-score {at_x[0, place].item():g} for the token that is there "
            f"already (position {place}); expected 0, as it is the log-ratio of a state to itself"
        )
    others = log_score.scatter(-1, x_t[..., None], -torch.inf)
    stuck = (others == -torch.inf).all(-1) & (canvas == mask_id)
    if bool(stuck.any()):
        raise ValueError(
            f"{name} gave only -inf at position {int(stuck[0].nonzero()[0])}, which is still to be "
            f"written, so no token could come there"
        )
