"""The base of a mixture: nothing to train, its score is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from rescore.models.mixture import MixtureNetwork
from rescore.processes.convert import Prediction
from rescore.processes.gaussian_schedules import GaussianSchedule, VariancePreserving
from rescore.tasks.mixture import Mixture
from rescore.tasks.task import Task
from rescore.training.base import Base


@dataclass(frozen=True, kw_only=True)
class MixtureBase(Base):
    """The exact output for the mixture of the task; a correction that starts at 0 is trained."""

    schedule: GaussianSchedule = field(default_factory=VariancePreserving)
    """The noise."""
    prediction: Prediction = "score"
    """What the network says."""
    width: int = 64
    """Of the two hidden layers of the correction."""

    def check(self, task: Task, device: str) -> None:
        """The task is a mixture.

        Raises:
            ValueError: it is not.
        """
        if not isinstance(task, Mixture):
            raise ValueError(
                f"a MixtureBase knows the score of a Mixture only, but the task is a "
                f"{type(task).__name__}; give the run a base that is trained, such as Pretrain"
            )

    def build(
        self,
        task: Task,
        *,
        seed: int,
        cache: Path,
        device: torch.device | str,
        note: Callable[[str], None],
    ) -> nn.Module:
        self.check(task, str(device))
        assert isinstance(task, Mixture)
        return MixtureNetwork(
            task.mixture,
            schedule=self.schedule,
            prediction=self.prediction,
            width=self.width,
            generator=torch.Generator().manual_seed(seed),
        ).to(device)
