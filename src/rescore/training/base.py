"""Where a run's network comes from."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rescore.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Base(abc.ABC):
    """A base model. Subclass it to bring your own: ``build`` returns a module, a ``Denoiser``.

    ``Pretrain`` trains a small one; an adapter for large models loads weights.
    """

    @property
    def uniform(self) -> bool | None:
        """Whether noise replaces tokens by others (True) or by the mask (False), if it is known.

        It is asked for before the network is there.
        """
        return None

    def check(self, task: Task, device: str) -> None:
        """Refuse what cannot work on this machine, before anything is loaded or written.

        Raises:
            ValueError: says what is missing and what to do.
        """
        return

    def check_training(self, *, adapters: bool, precision: str) -> None:
        """Refuse weights that cannot be trained, or not in this precision.

        Args:
            adapters: only low-rank adapters are trained, all else is frozen.
            precision: of the run.

        Raises:
            ValueError: says what to set instead.
        """
        return

    @abc.abstractmethod
    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        """The network with its weights, the same ones for the same arguments.

        Args:
            task: what it must fit.
            seed: of the run; for bases that are trained.
            cache: a folder that outlives the run.
            device: where to put it.
            note: shows the user a line of progress.
        """

    def continued(
        self,
        module: nn.Module,
        task: Task,
        *,
        seed: int,
        cpu_s: float,
        note: Callable[[str], None],
    ) -> nn.Module:
        """A copy of ``module`` trained on for about ``cpu_s`` CPU-seconds in the way the base was.

        Raises:
            ValueError: this base is not trained by the project.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be trained further here, so evaluate.control must be off"
        )
