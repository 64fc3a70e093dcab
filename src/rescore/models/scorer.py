"""Networks that give a reply to a prompt one number: a small one, and those of transformers.

Shape suffixes: B samples, L positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.language import require
from rescore.models.transformer import Block, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The shape of a ``Scorer``."""

    n_tokens: int
    """Tokens it can read, the separator included."""
    separator: int
    """The token between prompt and reply."""
    length: int
    """Positions of the longest sequence: prompt, separator, reply."""
    width: int = 48
    """D: features per position."""
    kernel: int = 5
    """Neighbouring tokens that the convolution joins, an odd number."""
    depth: int = 1
    """Attention blocks over the whole sequence."""
    heads: int = 4
    """Attention heads of a block, a divisor of the width."""

    def __post_init__(self) -> None:
        for name in ("n_tokens", "length", "width", "kernel", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.separator < self.n_tokens:
            raise ValueError(
                f"separator is {self.separator}; expected one of the {self.n_tokens} tokens"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; change one of them"
            )

    def network(self, generator: torch.Generator) -> Scorer:
        """A new network on the CPU; the generator draws its weights."""
        return Scorer(self, generator=generator)


class Scorer(nn.Module):
    """Attend, compare, aggregate: prompt and reply are laid beside each other, then scored.

    A convolution reads short runs of tokens. Every run attends to the runs like it on the other
    side and is compared with what it finds there, so that words common to prompt and reply show
    before anything is learned. Attention blocks follow, the mean over the reply, two layers.

    Source: the decomposable attention of Parikh et al. 2016, arXiv:1606.01933, on runs of tokens
    and with products for comparison; the blocks are added.

    Args:
        config: its shape.
        generator: a CPU generator, the only source of randomness in the initial weights, which
            are float32 on the CPU; move them with ``.to``.
    """

    def __init__(self, config: ScorerConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        width = config.width
        block = TransformerConfig(
            vocab_size=config.n_tokens,
            length=config.length,
            width=width,
            depth=config.depth,
            heads=config.heads,
        )
        with torch.device("meta"):  # no memory, no draw from the global generator
            self.token = nn.Embedding(config.n_tokens, width)
            self.position = nn.Embedding(config.length, width)
            self.convolution = nn.Conv1d(width, width, config.kernel, padding=config.kernel // 2)
            self.run_norm = nn.LayerNorm(width)
            self.compare = nn.Linear(2 * width, width)
            self.blocks = nn.ModuleList(Block(block) for _ in range(config.depth))
            self.norm = nn.LayerNorm(width)
            self.hidden = nn.Linear(width, width)
            self.head = nn.Linear(width, 1)
        self.to_empty(device="cpu")
        self._initialise(generator)

    def forward(
        self, tokens: Int[Tensor, "B L"], attend: Bool[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """One score per sequence.

        Args:
            tokens: prompt, separator, reply; the first separator counts.
            attend: False at padding, which has no influence.

        Raises:
            ValueError: the sequences are longer than ``config.length``, or one has no separator.
        """
        length = tokens.shape[1]
        if length > self.config.length:
            raise ValueError(
                f"sequences of {length} positions; this scorer takes at most {self.config.length}"
            )
        separator = (tokens == self.config.separator) & attend
        if not bool(separator.any(1).all()):
            raise ValueError(
                f"sequence {int((~separator.any(1)).nonzero()[0])} has no separator "
                f"{self.config.separator} between prompt and reply"
            )
        reply = separator.cumsum(1) > 0
        h_BLD = self.token(tokens) * attend[..., None]
        h_BLD = self.run_norm(F.gelu(self.convolution(h_BLD.mT)).mT)
        h_BLD = h_BLD + self._compared(h_BLD, reply, attend) + self.position.weight[:length]
        for block in self.blocks:
            h_BLD = block(h_BLD, attend[:, None, None, :], None)
        scored = (reply & attend)[..., None]
        h_BD = (self.norm(h_BLD) * scored).sum(1) / scored.sum(1)
        return self.head(F.gelu(self.hidden(h_BD))).squeeze(-1)

    def _compared(
        self, h_BLD: Float[Tensor, "B L D"], reply: Bool[Tensor, "B L"], attend: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        """Every run with the mean of the other side, weighted by likeness.

        An empty side has a mean of 0.
        """
        other = (reply[:, :, None] != reply[:, None, :]) & attend[:, None, :]
        likeness = h_BLD @ h_BLD.mT / math.sqrt(h_BLD.shape[-1])
        likeness = likeness.masked_fill(~other, torch.finfo(likeness.dtype).min)
        found_BLD = (likeness.softmax(-1) * other) @ h_BLD
        return F.gelu(self.compare(torch.cat([h_BLD, h_BLD * found_BLD], dim=-1)))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in; blocks start small."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            std = parameter[0].numel() ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std /= (2 * self.config.depth) ** 0.5
            if name == "token.weight":
                std = 1.0
            if name == "position.weight":
                std = 0.1
            parameter.normal_(0.0, std, generator=generator)


class SequenceClassifier(nn.Module):
    """A sequence classifier of transformers with one output, as a scorer.

    Args:
        network: a network whose ``logits`` are (B, 1).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, tokens: Int[Tensor, "B L"], attend: Bool[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """One score per sequence; ``attend`` is False at padding."""
        return self.network(input_ids=tokens, attention_mask=attend.long()).logits.squeeze(-1)


def load_classifier(path: str) -> SequenceClassifier:
    """A reward model of transformers in a folder or on the hub, in float32, for evaluation.

    No code of the checkpoint runs.

    Raises:
        ValueError: transformers is missing, the model cannot be loaded, has not exactly one
            output, or lacks weights: a base model has no trained head.
    """
    require("transformers", "a reward model", "language")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.num_labels != 1:
            raise ValueError(f"it has {config.num_labels} outputs; a reward model has one")
        network, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a reward model from '{path}': {error}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"the model in '{path}' lacks the weights {sorted(info['missing_keys'])}; expected a "
            f"trained reward model, not a base model"
        )
    return SequenceClassifier(network.eval().requires_grad_(False))
