"""The contract between a network and everything above it."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rescore.processes.convert import log_probs_from_score, score_from_log_probs
from rescore.processes.ctmc import Absorbing, Process
from rescore.processes.layout import log_softmax, softmax


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts clean tokens from a partly masked canvas.

    It is time-agnostic: the number of masks on the canvas already tells the time of the absorbing
    process. Any object with these three members serves; nothing has to be subclassed.
    """

    @property
    def vocab_size(self) -> int:
        """V: columns of the logits."""
        ...

    @property
    def mask_id(self) -> int:
        """The token that means "not yet revealed"; never predicted."""
        ...

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Unnormalised log p(x_0 | x_t) at ``positions`` (all positions when None).

        Args:
            x_t: canvas, the mask token at unrevealed positions.
            attend: False at padding, which must not influence any other position.
            positions: rows wanted. A model that can, sends only these through its vocabulary head.

        Returns:
            Logits; the column of ``mask_id``, if there is one, is -inf.
        """
        ...


@runtime_checkable
class ScoreNetwork(Protocol):
    """A network that predicts concrete scores, for processes in continuous time.

    Any object with these two members serves; nothing has to be subclassed.
    """

    @property
    def process(self) -> Process:
        """The forward process of one token whose ratios are predicted."""
        ...

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """log s_{l, v} = log p_t(x_t with token l replaced by v) - log p_t(x_t).

        Args:
            x_t: the state.
            total_noise: integral of the noise rate up to t.
            attend: False at padding, which must not influence any other position.

        Returns:
            Log-scores over the S states of a token; the entry at ``x_t`` itself is 0.
        """
        ...


@runtime_checkable
class KnownLikelihood(Protocol):
    """A network that knows the probability of a finished sample, as small energy models do."""

    def log_likelihood(self, x_0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """log pi(x_0), nats."""
        ...


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(abc.ABC):
    """The shape of a network that the project can train from nothing."""

    @property
    def uniform(self) -> bool | None:
        """Whether noise replaces tokens by others; False: by the mask; None: there are none."""
        return None

    @abc.abstractmethod
    def network(self, generator: torch.Generator) -> nn.Module:
        """The network with initial weights from this CPU generator."""


@dataclass(frozen=True, kw_only=True)
class TokenConfig(NetworkConfig):
    """The shape of a ``Denoiser`` or ``ScoreNetwork``."""

    vocab_size: int
    """V: ordinary tokens, without the mask."""
    length: int
    """The longest canvas."""

    @property
    def uniform(self) -> bool:
        return False


@dataclass
class Counted:
    """A denoiser that counts its network rows: canvases that went through the network."""

    network: Denoiser
    rows: int = 0

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Pass the call on and count its rows."""
        logits = self.network.predict(x_t, attend=attend, positions=positions)
        self.rows += len(x_t)
        return logits


@dataclass
class CountedScores:
    """A score network that counts its rows: states that went through the network."""

    network: ScoreNetwork
    rows: int = 0

    @property
    def process(self) -> Process:
        return self.network.process

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """Pass the call on and count its rows."""
        log_score = self.network.log_score(x_t, total_noise, attend=attend)
        self.rows += len(x_t)
        return log_score

    def clean_log_probs(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """log p(x_0 | x_t) at masked positions; a denoiser is not taken round by its scores."""
        if isinstance(self.network, SubsScores):
            self.rows += len(x_t)
            return self.network.clean_log_probs(x_t, attend=attend)
        log_score = self.log_score(x_t, total_noise, attend=attend)
        mask_id = self.process.mask_id
        assert mask_id is not None
        return log_probs_from_score(log_score, mask_id)

    def clean_probs(
        self, x_t: Int[Tensor, "B L"], *, attend: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L S"]:
        """p(x_0 | x_t) of the denoiser behind the scores, which must be ``SubsScores``."""
        assert isinstance(self.network, SubsScores)
        self.rows += len(x_t)
        return self.network.clean_probs(x_t, attend=attend)


@dataclass(frozen=True)
class SubsScores:
    """The concrete scores that a masked denoiser implies; see ``score_from_log_probs``."""

    network: Denoiser

    @property
    def process(self) -> Absorbing:
        n_tokens, mask_id = self.network.vocab_size, self.network.mask_id
        return Absorbing(max(n_tokens, mask_id + 1), mask_id)

    def log_score(
        self,
        x_t: Int[Tensor, "B L"],
        total_noise: Float[Tensor, " B"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L S"]:
        """log s at ``x_t``; only its masked positions depend on the network."""
        process, log_p = self.process, self.clean_log_probs(x_t, attend=attend)
        return score_from_log_probs(log_p, x_t, total_noise, process.mask_id, process.n_states)

    def clean_log_probs(
        self, x_t: Int[Tensor, "B L"], *, attend: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L S"]:
        """log p(x_0 | x_t) over all states, -inf for the mask; meant for masked positions."""
        return log_softmax(self._logits(x_t, attend))

    def clean_probs(
        self, x_t: Int[Tensor, "B L"], *, attend: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L S"]:
        """The same as probabilities."""
        return softmax(self._logits(x_t, attend))

    def _logits(
        self, x_t: Int[Tensor, "B L"], attend: Bool[Tensor, "B L"] | None
    ) -> Float[Tensor, "B L S"]:
        """Logits of all states, -inf for the mask, which is last where no logit stands for it."""
        process, logits = self.process, self.network.predict(x_t, attend=attend)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        absent = process.n_states - logits.shape[-1]
        if absent:
            return functional.pad(logits, (0, absent), value=-torch.inf)
        state = torch.arange(process.n_states, device=logits.device)
        return logits.masked_fill(state == process.mask_id, -torch.inf)
