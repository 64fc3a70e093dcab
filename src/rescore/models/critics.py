"""Critics: what reward to expect, learned beside the policy.

A baseline may depend on what was given but not on what was sampled: E[grad log pi(x | c) V(c)] = 0,
while V(x) is subtracted from the very reward it predicts and biases the gradient. So a critic sees
the prompt only; a task without prompts has one number.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rescore.types import Prompts


class Learned(nn.Module):
    """A network with an optimiser of its own, checkpointed with it."""

    optimizer: torch.optim.Optimizer

    def saved(self) -> dict[str, Tensor]:
        """Weights and optimiser, for a checkpoint."""
        state = {f"weight.{name}": value.detach() for name, value in self.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"moment.{number}.{name}": value for name, value in moments.items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``saved()``."""
        prefix = "weight."
        self.load_state_dict(
            {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("moment."):
                _, number, kind = name.split(".")
                moments.setdefault(int(number), {})[kind] = value
        plain = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**plain, "state": moments})


class Critic(Learned, abc.ABC):
    """V(c), the expected reward of a prompt, and the optimiser that fits it."""

    level: nn.Parameter
    """What is added to everything else; starts at the mean of the first rewards."""
    fitted: Tensor
    """Whether it has seen any reward."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))
        self.register_buffer("fitted", torch.tensor(False))

    @abc.abstractmethod
    def value(self, prompts: Prompts) -> Float[Tensor, " B"]:
        """V of each prompt, reward units; what was not given plays no part."""

    def fit(
        self, prompts: Prompts, reward: Float[Tensor, " B"], *, lr: float, epochs: int
    ) -> Float[Tensor, ""]:
        """``epochs`` Adam steps on the mean squared error over a batch; returns the first error."""
        if not self.fitted:
            with torch.no_grad():
                self.level.copy_(reward.mean())
                self.fitted.fill_(True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        errors = []
        with torch.enable_grad():
            for _ in range(epochs):
                self.optimizer.zero_grad()
                error = (self.value(prompts) - reward.float()).square().mean()
                error.backward()
                self.optimizer.step()
                errors.append(error.detach())
        return errors[0]


class ScalarCritic(Critic):
    """One learned number, for tasks where nothing is given."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.parameters())

    def value(self, prompts: Prompts) -> Float[Tensor, " B"]:
        return self.level.expand(prompts.n_samples)


class PromptCritic(Critic):
    """A small network on the given tokens: embeddings, their mean, one hidden layer.

    Args:
        n_tokens: rows of the embedding; given tokens are below it.
        length: positions of the canvas.
        width: features.
        generator: a CPU generator; draws the weights.
    """

    def __init__(
        self, n_tokens: int, length: int, *, width: int = 32, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(n_tokens, width, generator=generator))
        self.position = nn.Parameter(torch.randn(length, width, generator=generator))
        self.hidden = nn.Parameter(torch.randn(width, width, generator=generator) * width**-0.5)
        self.out = nn.Parameter(torch.zeros(width))
        self.optimizer = torch.optim.Adam(self.parameters())

    def value(self, prompts: Prompts) -> Float[Tensor, " B"]:
        given = ~prompts.editable if prompts.attend is None else ~prompts.editable & prompts.attend
        seen = given[..., None].float()
        tokens = torch.where(given, prompts.tokens, 0)
        h = nn.functional.gelu(self.token[tokens] + self.position)
        mean = (h * seen).sum(1) / seen.sum(1).clamp(min=1)
        return nn.functional.gelu(mean @ self.hidden) @ self.out + self.level


def critic_for(prompts: Prompts, n_tokens: int, seed: int) -> Critic:
    """The critic of a task, from an example of its prompts.

    Args:
        prompts: at least one.
        n_tokens: a number above every token that may be given.
        seed: of its weights.
    """
    if bool(prompts.editable.all()):
        return ScalarCritic()
    generator = torch.Generator().manual_seed(seed)
    return PromptCritic(n_tokens, prompts.tokens.shape[1], generator=generator)
