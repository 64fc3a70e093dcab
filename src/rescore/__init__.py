"""RL fine-tuning of diffusion models, with gradients you can trust.

The public names, in the order in which data flows. They are imported on first use, because torch
takes a second to import and ``rescore --help`` should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rescore.algorithms.base import Algorithm as Algorithm
    from rescore.algorithms.ddpo import Ddpo as Ddpo
    from rescore.algorithms.dpok import Dpok as Dpok
    from rescore.algorithms.egspo import Egspo as Egspo
    from rescore.algorithms.flow_grpo import FlowGrpo as FlowGrpo
    from rescore.algorithms.reinforce import Reinforce as Reinforce
    from rescore.algorithms.score_as_action import ScoreAsAction as ScoreAsAction
    from rescore.algorithms.sepo import Sepo as Sepo
    from rescore.models.denoiser import Denoiser as Denoiser
    from rescore.models.denoiser import ScoreNetwork as ScoreNetwork
    from rescore.models.finetune import Lora as Lora
    from rescore.models.gaussian_network import GaussianNetwork as GaussianNetwork
    from rescore.models.transformer import Transformer as Transformer
    from rescore.models.transformer import TransformerConfig as TransformerConfig
    from rescore.rewards.reward import Reward as Reward
    from rescore.sampling.decoder import Decoder as Decoder
    from rescore.sampling.decoder import GaussianDecoder as GaussianDecoder
    from rescore.sampling.decoder import RateDecoder as RateDecoder
    from rescore.sampling.gaussian_policy import GaussianPolicy as GaussianPolicy
    from rescore.sampling.policy import MaskedPolicy as MaskedPolicy
    from rescore.sampling.policy import Models as Models
    from rescore.sampling.policy import RatePolicy as RatePolicy
    from rescore.sampling.record import Record as Record
    from rescore.sampling.record import Score as Score
    from rescore.sampling.rng import SampleRng as SampleRng
    from rescore.tasks.dna import Dna as Dna
    from rescore.tasks.replies import Replies as Replies
    from rescore.tasks.sudoku import Sudoku as Sudoku
    from rescore.tasks.task import ContinuousTask as ContinuousTask
    from rescore.tasks.task import Task as Task
    from rescore.tasks.task import TokenTask as TokenTask
    from rescore.training.base import Base as Base
    from rescore.training.optim import Optim as Optim
    from rescore.training.pretrain import Pretrain as Pretrain
    from rescore.training.run import Evaluate as Evaluate
    from rescore.training.run import Run as Run
    from rescore.types import Actions as Actions
    from rescore.types import Conditions as Conditions
    from rescore.types import Credited as Credited
    from rescore.types import GaussianTrajectory as GaussianTrajectory
    from rescore.types import MaskedTrajectory as MaskedTrajectory
    from rescore.types import Points as Points
    from rescore.types import Prompts as Prompts
    from rescore.types import Scored as Scored
    from rescore.types import Selected as Selected
    from rescore.types import Terms as Terms

__version__ = "0.1.0"

_HOME = {
    "types": "Prompts Conditions Points MaskedTrajectory GaussianTrajectory Selected Scored"
    " Credited Actions Terms",
    "models.denoiser": "Denoiser ScoreNetwork",
    "models.gaussian_network": "GaussianNetwork",
    "models.transformer": "Transformer TransformerConfig",
    "models.finetune": "Lora",
    "rewards.reward": "Reward",
    "tasks.task": "Task TokenTask ContinuousTask",
    "tasks.sudoku": "Sudoku",
    "tasks.dna": "Dna",
    "tasks.replies": "Replies",
    "sampling.decoder": "Decoder RateDecoder GaussianDecoder",
    "sampling.gaussian_policy": "GaussianPolicy",
    "sampling.record": "Record Score",
    "sampling.rng": "SampleRng",
    "sampling.policy": "MaskedPolicy RatePolicy Models",
    "algorithms.base": "Algorithm",
    "algorithms.reinforce": "Reinforce",
    "algorithms.egspo": "Egspo",
    "algorithms.sepo": "Sepo",
    "algorithms.score_as_action": "ScoreAsAction",
    "algorithms.ddpo": "Ddpo",
    "algorithms.dpok": "Dpok",
    "algorithms.flow_grpo": "FlowGrpo",
    "training.base": "Base",
    "training.pretrain": "Pretrain",
    "training.optim": "Optim",
    "training.run": "Run Evaluate",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE:
        raise AttributeError(f"module 'rescore' has no attribute '{name}'")
    return getattr(import_module(f"rescore.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    """The public names, and what a module has anyway."""
    return sorted({*globals(), *_MODULE})
