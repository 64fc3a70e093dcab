"""SEDD: a transformer that predicts concrete scores.

Source: Lou, Meng and Ermon 2024, arXiv:2310.16834, and the code published with it
(github.com/louaaron/Score-Entropy-Discrete-Diffusion), whose checkpoints load
(``rescore.models.importers.load_sedd``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from rescore.models.inputs import check_canvas, check_total_noise
from rescore.processes.ctmc import Absorbing, Process, Uniform


@dataclass(frozen=True, kw_only=True)
class SeddConfig(DiffusionTransformerConfig):
    """The shape of a ``Sedd``."""

    process: Literal["absorbing", "uniform"] = "absorbing"
    """The forward process of one token."""
    scale_by_sigma: bool | None = None
    """Subtract log(e^total_noise - 1) + log V from the outputs. None: for ``absorbing`` only, as
    in the published models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.process not in ("absorbing", "uniform"):
            raise ValueError(f"process is '{self.process}'; choose 'absorbing' or 'uniform'")
        if self.process == "uniform" and self.scale_by_sigma:
            raise ValueError("scale_by_sigma is for the absorbing process; leave it out")

    @property
    def uniform(self) -> bool:
        return self.process == "uniform"

    def network(self, generator: torch.Generator) -> Sedd:
        """A new network; ``generator`` draws its weights."""
        return Sedd(self, generator=generator)


class Sedd(DiffusionTransformer):
    """A ``ScoreNetwork`` on the transformer that is told the noise.

    Args:
        config: its shape.
        generator: see ``DiffusionTransformer``.
    """

    def __init__(self, config: SeddConfig, *, generator: torch.Generator | None) -> None:
        V = config.vocab_size
        absorbing = config.process == "absorbing"
        process: Process = Absorbing(V + 1, mask_id=V) if absorbing else Uniform(V)
        super().__init__(config, process.n_states, generator=generator)
        self.config = config
        self.process = process
        self.scaled = absorbing if config.scale_by_sigma is None else config.scale_by_sigma

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        r"""The output $o$, less $\log(e^{n} - 1) + \log V$ if it is scaled; 0 at the token itself.

        With that offset $o = 0$ gives every token at a masked position the score
        $k / V$, $k = e^{-n} / (1 - e^{-n})$: a uniform guess.

        Args:
            x_t: the state.
            total_noise: n, positive.
            attend: False at padding, which influences no other position.

        Returns:
            Log-scores in float32 or better.

        Raises:
            TypeError: ``total_noise`` is of an integer type.
            ValueError: the canvas is too long, ``total_noise`` is not [B], or (checked on the CPU
                only, see ``inputs.check_tokens``) a token is no state.
        """
        check_canvas(x_t, length=self.config.length, n_states=self.process.n_states)
        check_total_noise(total_noise, x_t)
        output = self.outputs(x_t, total_noise, attend=attend)
        log_score = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.scaled:
            noise = total_noise.to(torch.promote_types(total_noise.dtype, log_score.dtype))
            offset = log_expm1(noise) + math.log(self.config.vocab_size)
            log_score = log_score - offset.to(log_score.dtype)[:, None, None]
        return log_score.scatter(-1, x_t[..., None], 0.0)


def log_expm1(x: Tensor) -> Tensor:
    """log(e^x - 1) for x > 0, without overflow."""
    return x + (-torch.expm1(-x)).log()
