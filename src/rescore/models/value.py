r"""Values of noised samples: what reward to expect at the end of a path, seen from its middle.

    V(x_t, t, c) = c_skip(t) r(hat x_0) + c_out(t) F(x_t, t, c)

With u = t, from data at 0 to noise at 1:

    design      c_skip        c_out
    cos_sin     cos(pi u/2)   sin(pi u/2)
    linear      1 - u         u
    constant    1             1 - cos(pi u/2)
    plain       0             1

All but ``plain`` are exact at the data end, V(x_0, 0, c) = r(x_0), whatever F has learned. Source:
the value network of Score as Action, arXiv:2502.01819, and its code (value_network.py), where F is
a copy of the reward model; here it is a small network, of latents where samples are latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rescore.models.critics import Learned
from rescore.types import Conditions, State

Design = Literal["cos_sin", "linear", "constant", "plain"]
States = tuple[State, Float[Tensor, " n"], Mapping[str, Tensor]]
"""States, their times and what the network is told besides."""
SEEDS = 1_000_003
"""Above every number of fits, so that runs of different seeds draw different batches."""


def coefficients(
    design: Design, t: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """c_skip and c_out at times t."""
    angle = math.pi / 2 * t
    if design == "cos_sin":
        return angle.cos(), angle.sin()
    if design == "linear":
        return 1 - t, t
    if design == "constant":
        return torch.ones_like(t), 1 - angle.cos()
    return torch.zeros_like(t), torch.ones_like(t)


class ValueCritic(Learned):
    """V, and the optimiser that fits it.

    Args:
        body: F, called with x_t, t and the inputs of the network, gives a number per sample. Its
            output is shifted and scaled to the first targets it is fitted to.
        design: of c_skip and c_out.
        reward: r, called with outputs and what was given; None for ``plain``.
        seed: of the order in which it sees states.
    """

    level: Tensor
    spread: Tensor
    scaled: Tensor
    """Whether ``spread`` is that of targets which differed."""
    fitted: Tensor
    """How many times it was fitted."""

    def __init__(
        self,
        body: nn.Module,
        design: Design,
        reward: Callable[[State, Conditions], Float[Tensor, " B"]] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (reward is None) != (design == "plain"):
            raise ValueError(
                f"a critic of design '{design}' was given {'no' if reward is None else 'a'} reward;"
                f" 'plain' takes none, all others look at that of what a state stands for"
            )
        self.reward = reward
        self.body = body
        self.seed = seed
        self.design: Design = design
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("scaled", torch.tensor(False))
        self.register_buffer("fitted", torch.tensor(0))
        self.optimizer = torch.optim.Adam(self.parameters())

    def value(
        self,
        x_t: State,
        t: Float[Tensor, " N"],
        inputs: Mapping[str, Tensor],
        skip: Float[Tensor, " N"] | None,
    ) -> Float[Tensor, " N"]:
        """V in float32, reward units, with gradients if they are enabled.

        Args:
            x_t: states, ``n_states`` of ``value_critic_for`` at a time.
            t: their times.
            inputs: what the network is told besides.
            skip: r(hat x_0), the reward of what the policy takes each state for; None for
                ``plain``, which has no use for it.
        """
        c_skip, c_out = coefficients(self.design, t.float())
        with torch.autocast(x_t.device.type, enabled=False):
            inputs = {n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}
            learned = self.level + self.spread * self.body(x_t.float(), t.float(), inputs)
        return c_out * learned if skip is None else c_out * learned + c_skip * skip.float()

    def fit(
        self,
        look: Callable[[Int[Tensor, " n"]], States],
        skip: Float[Tensor, " N"] | None,
        target: Float[Tensor, " N"],
        *,
        lr: float,
        epochs: int,
        batch: int,
    ) -> float:
        """Adam on the mean squared error to ``target``, in batches of an order drawn from the seed.

        Args:
            look: states, their times and what the network is told besides, by their numbers.
            skip: as of ``value``.
            target: of each state, reward units.
            lr: learning rate.
            epochs: passes over all states.
            batch: states per step of Adam.

        Returns:
            The share of the variance of the targets that V explained in the first pass, in which
            every state is judged before it is learned from.

        Raises:
            ValueError: an error is not finite.
        """
        spread = target.std(correction=0)
        if not self.scaled:  # until targets differ there is no scale to take from them
            self.level.copy_(target.mean())
            self.scaled.copy_(spread > 1e-6)
            self.spread.copy_(torch.where(self.scaled, spread, 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        generator = torch.Generator().manual_seed(SEEDS * self.seed + int(self.fitted))
        error = last = torch.zeros((), dtype=torch.float64, device=target.device)
        with torch.enable_grad():
            for epoch in range(epochs):
                for rows in torch.randperm(len(target), generator=generator).split(batch):
                    rows = rows.to(target.device)
                    value = self.value(*look(rows), None if skip is None else skip[rows])
                    squared = (value - target[rows].to(value)).square()
                    self.optimizer.zero_grad()
                    (squared.mean() / self.spread**2).backward()
                    self.optimizer.step()
                    last = squared.detach().double().sum()
                    error = error + last if epoch == 0 else error
        if not (error + last).isfinite():
            raise ValueError(
                f"the critic left the finite numbers while it was fitted; lower its learning rate "
                f"(critic_lr={lr:g}), or look for rewards that are not finite"
            )
        self.fitted += 1
        return float(1 - error / (target - target.mean()).double().square().sum().clamp(min=1e-12))


class ValueMlp(nn.Module):
    """F for points: two hidden layers on the point, on features of the time and on the inputs.

    Args:
        n_dims: of a point.
        inputs: examples of what the network is told, [B], [B d] or [B n d]; numbers of labels are
            given by ``n_labels``.
        n_labels: values of an input of integers.
        width: of the hidden layers.
        generator: a CPU generator; draws the weights.
    """

    def __init__(
        self,
        n_dims: int,
        inputs: Mapping[str, Tensor],
        *,
        n_labels: int,
        width: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.given = InputFeatures(inputs, n_labels=n_labels, width=width, generator=generator)
        self.into = nn.Linear(n_dims + N_TIMES, width)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 1)
        draw_weights(self, generator)

    def forward(
        self, x_t: State, t: Float[Tensor, " N"], inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, " N"]:
        h = self.into(torch.cat([x_t.flatten(1), time_features(t)], 1)) + self.given(inputs)
        return self.out(nn.functional.silu(self.hidden(nn.functional.silu(h)))).squeeze(1)


class ValueConv(nn.Module):
    """F for images and latents [C H W]: convolutions of stride 2 down to at most 4 x 4, a mean.

    Args:
        shape: C, H and W.
        inputs: as of ``ValueMlp``.
        n_labels: as of ``ValueMlp``.
        width: channels.
        generator: a CPU generator; draws the weights.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        inputs: Mapping[str, Tensor],
        *,
        n_labels: int,
        width: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.given = InputFeatures(inputs, n_labels=n_labels, width=width, generator=generator)
        self.time = nn.Linear(N_TIMES, width)
        self.into = nn.Conv2d(shape[0], width, 3, padding=1)
        n_layers = max(1, math.ceil(math.log2(max(shape[1:]) / 4)))
        self.down = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(n_layers)
        )
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 1)
        draw_weights(self, generator)

    def forward(
        self, x_t: State, t: Float[Tensor, " N"], inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, " N"]:
        given = self.time(time_features(t)) + self.given(inputs)
        h = self.into(x_t) + given[..., None, None]
        for layer in self.down:
            h = layer(nn.functional.silu(h))
        h = nn.functional.silu(self.hidden(nn.functional.silu(h).mean((2, 3)) + given))
        return self.out(h).squeeze(1)


class InputFeatures(nn.Module):
    """The sum of a linear map of every input; labels are embedded, tokens averaged first."""

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        n_labels: int,
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.width = width
        self.maps = nn.ModuleDict()
        for name, value in inputs.items():
            if value.is_floating_point():
                self.maps[name] = nn.Linear(value.shape[-1], width, bias=False)
            else:
                self.maps[name] = nn.Embedding(n_labels, width)
        draw_weights(self, generator)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for name, layer in self.maps.items():
            value = inputs[name]
            if value.ndim == 3:
                value = value.mean(1)
            total = total + layer(value)
        return total


N_TIMES = 9
"""Features of a time."""


def time_features(t: Float[Tensor, " N"]) -> Float[Tensor, "N F"]:
    """t, and cosines and sines of pi t 2^k for k = -1, 0, 1, 2."""
    angles = math.pi * t[:, None] * 2.0 ** torch.arange(-1, 3, device=t.device).to(t)
    return torch.cat([t[:, None], angles.cos(), angles.sin()], 1)


def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of variance 1 / fan-in, embeddings of variance 1, biases 0, from the generator."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            scale = layer.weight[0].numel() ** -0.5
            draw = torch.randn(layer.weight.shape, generator=generator) * scale
            layer.weight.data.copy_(draw)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator))


def value_critic_for(
    shape: tuple[int, ...],
    inputs: Mapping[str, Tensor],
    *,
    n_labels: int,
    n_states: int = 1,
    design: Design,
    reward: Callable[[State, Conditions], Float[Tensor, " B"]] | None = None,
    seed: int,
) -> ValueCritic:
    """The critic of a task: convolutions for images [C H W], else a perceptron.

    Args:
        shape: of a state.
        inputs: examples of what the network is told besides.
        n_labels: values of an input of integers.
        n_states: states that it is shown at a time, one after the other in the first dimension: 2
            of two-step solvers, for the one before belongs to what they are in.
        design: of ``ValueCritic``.
        reward: of ``ValueCritic``.
        seed: of the weights, and of the order in which it sees states.
    """
    shape = (n_states * shape[0], *shape[1:])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw weights of their own; they are replaced
        if len(shape) == 3:
            body: nn.Module = ValueConv(shape, inputs, n_labels=n_labels, generator=generator)
        else:
            n_dims = math.prod(shape)
            body = ValueMlp(n_dims, inputs, n_labels=n_labels, generator=generator)
    return ValueCritic(body, design, reward, seed=seed)
