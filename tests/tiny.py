"""A world that trains in milliseconds: three tokens, three positions, networks in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rescore.algorithms.reinforce import Reinforce
from rescore.models.denoiser import Denoiser
from rescore.models.tiny import MlpDenoiser
from rescore.models.transformer import Transformer, TransformerConfig
from rescore.processes.ctmc import Process
from rescore.rewards.reward import Reward, RewardFunction
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy, Policy
from rescore.tasks.task import Split, Task, TokenTask
from rescore.training import checkpoint, log
from rescore.training.base import Base
from rescore.training.checkpoint import Checkpoint
from rescore.training.optim import Optim
from rescore.training.run import Evaluate, Run
from rescore.training.session import build_base
from rescore.training.world import World, accelerator_for, build
from rescore.types import Examples, MaskedTrajectory, Prompts, Trajectory

V, L = 3, 3
MASK = V
SPLITS = {"train": range(0, 15), "validation": range(15, 21), "test": range(21, 27)}


def matches(outputs: Tensor, prompts: Prompts) -> Tensor:
    """Fraction of positions that equal the target."""
    return (outputs == prompts.info["target"]).double().mean(1)


def solved(outputs: Tensor, prompts: Prompts) -> Tensor:
    """1 where all do."""
    return (outputs == prompts.info["target"]).all(1)


@dataclass(frozen=True, kw_only=True)
class Match(TokenTask):
    """Write the target: the number of the prompt in base 3. Odd prompts give its first digit."""

    functions: dict[str, RewardFunction] = field(
        default_factory=lambda: {"matches": matches, "solved": solved}
    )

    @property
    def vocab_size(self) -> int:
        return V

    def symbol(self, token: int) -> str:
        return "abc"[token]

    @property
    def length(self) -> int:
        return L

    @property
    def reward(self) -> Reward:
        return Reward(self.functions)

    def size(self, split: Split) -> int:
        return len(SPLITS[split])

    def prompts(self, split: Split, index: Tensor) -> Prompts:
        number = index + SPLITS[split][0]
        target = number[:, None] // V ** torch.arange(L - 1, -1, -1) % V
        editable = torch.ones(len(index), L, dtype=torch.bool)
        editable[:, 0] = number % 2 == 0
        row = torch.arange(len(index))
        return Prompts(
            tokens=torch.where(editable, MASK, target),
            editable=editable,
            group=row,
            sample_id=row,
            info={"target": target},
        )

    def clean(self, split: Split) -> Examples:
        prompts = self.prompts(split, torch.arange(self.size(split)))
        return Examples(x_0=prompts.info["target"], editable=prompts.editable)

    def gold(self, prompts: Prompts) -> Tensor:
        return prompts.info["target"]

    def read(self, texts: Sequence[str]) -> Prompts:
        raise NotImplementedError

    def show(self, tokens: Tensor) -> str:
        return "".join("abc."[token] for token in tokens.tolist())


def in_training(prompts: Prompts) -> bool:
    """True where the prompts are of the training split."""
    number = prompts.info["target"] @ V ** torch.arange(L - 1, -1, -1)
    return int(number.max()) in SPLITS["train"]


@dataclass(frozen=True, kw_only=True)
class MlpBase(Base):
    """An untrained MLP."""

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        return MlpDenoiser(V, L, generator=torch.Generator().manual_seed(seed)).to(device)


@dataclass(frozen=True, kw_only=True)
class TransformerBase(Base):
    """An untrained transformer."""

    config: TransformerConfig = TransformerConfig(vocab_size=V, length=L, width=8, depth=1, heads=2)

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        return Transformer(self.config, generator=generator).to(device)


def tiny_run(**changes: Any) -> Run:
    """Four steps of REINFORCE in well under a second."""
    run = Run(
        task=Match(),
        base=MlpBase(),
        decoder=Decoder(steps=3, temperature=0.7),
        algorithm=Reinforce(),
        steps=4,
        batch_size=16,
        group_size=4,
        optim=Optim(lr=0.05, warmup=2, micro_batch=64),
        evaluate=Evaluate(every=2, n=6, n_test=6),
        save_every=2,
        precision="float64",
    )
    return replace(run, **changes)


def tiny_world(run: Run) -> World:
    """What ``run`` is made of, before its first step."""
    accelerator = accelerator_for(run)
    return build(run, build_base(run, accelerator, lambda line: None), accelerator)


class TableScores(nn.Module):
    """Free log-scores for every state, in float64; their noise dependence is a second table.

    Padding (``attend`` False) is read as token 0.
    """

    def __init__(self, process: Process, length: int, *, seed: int = 0) -> None:
        super().__init__()
        self.process = process
        shape = (2, process.n_states**length, length, process.n_states)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2)

    def log_score(
        self, x_t: Tensor, total_noise: Tensor, *, attend: Tensor | None = None
    ) -> Tensor:
        """The rows of both tables at the state, read as a number, first position first."""
        length = x_t.shape[1]
        read = x_t if attend is None else torch.where(attend, x_t, 0)
        state = (read * self.process.n_states ** torch.arange(length - 1, -1, -1)).sum(1)
        level, slope = self.table[:, state]
        log_score = level + slope * torch.tanh(total_noise.double())[:, None, None]
        return log_score.scatter(-1, x_t[..., None], 0.0)


def masked(path: Trajectory) -> MaskedTrajectory:
    """The path of a masked process that it is."""
    assert isinstance(path, MaskedTrajectory)
    return path


def masked_policy(policy: Policy | None) -> MaskedPolicy:
    """The policy of a masked process that it is."""
    assert isinstance(policy, MaskedPolicy)
    return policy


def denoiser(network: object) -> Denoiser:
    """The denoiser that it is."""
    assert isinstance(network, Denoiser)
    return network


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k != "time_s" and not k.startswith("time/")}
        for row in log.read(path)
    ]


def last_checkpoint(out: Path) -> Checkpoint:
    """The latest checkpoint of a run directory, without the clocks in its state."""
    folder = out / "checkpoints"
    saved = checkpoint.load(folder, checkpoint.steps(folder)[-1])
    for name in ("cpu_s", "elapsed_s"):
        saved.state["train"].pop(name)
    return saved


def assert_same_run(one: Path, two: Path) -> None:
    """Two run directories hold the same run, bitwise, but for the clock."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert json.dumps(rows(one / name)) == json.dumps(rows(two / name)), name
    a, b = last_checkpoint(one), last_checkpoint(two)
    assert a.step == b.step
    assert a.state == b.state
    assert a.tensors.keys() == b.tensors.keys()
    for stem, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[stem].keys()
        for name, tensor in tensors.items():
            other = b.tensors[stem][name]
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other), f"{stem}: {name}"
