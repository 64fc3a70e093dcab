"""MDLM: a masked denoiser on the transformer of SEDD, told that there is no noise.

Source: Sahoo et al. 2024, arXiv:2406.07524, and the code published with it
(github.com/kuleshov-group/mdlm), whose checkpoint without time conditioning loads
(``rescore.models.importers.load_mdlm``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.models.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from rescore.models.inputs import check_canvas


@dataclass(frozen=True, kw_only=True)
class MdlmConfig(DiffusionTransformerConfig):
    """The shape of an ``Mdlm``."""

    def network(self, generator: torch.Generator) -> Mdlm:
        """A new network; ``generator`` draws its weights."""
        return Mdlm(self, generator=generator)


class Mdlm(DiffusionTransformer):
    """A ``Denoiser``: logits over V tokens and the mask, whose column is -inf.

    This is the parameterisation SUBS; that revealed tokens stay is the sampler's doing.

    Args:
        config: its shape.
        generator: see ``DiffusionTransformer``.
    """

    def __init__(self, config: MdlmConfig, *, generator: torch.Generator | None) -> None:
        super().__init__(config, config.vocab_size + 1, generator=generator)
        self.config = config

    @property
    def vocab_size(self) -> int:
        """V + 1: columns of the logits, the mask among them."""
        return self.config.vocab_size + 1

    @property
    def mask_id(self) -> int:
        """V: the last state; its column is -inf."""
        return self.config.vocab_size

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R S"]:
        """Logits at ``positions`` (all when None); only those rows go through the output layer.

        Raises:
            ValueError: the canvas is too long or, checked on the CPU only, a token is no state.
        """
        check_canvas(x_t, length=self.config.length, n_states=self.config.vocab_size + 1)
        no_noise = torch.zeros(1, device=x_t.device)
        logits = self.outputs(x_t, no_noise, attend=attend, positions=positions)
        logits[..., self.mask_id] = -torch.inf
        return logits
