"""What a run is made of once its weights are loaded, and how that is saved and restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rescore.models.denoiser import Denoiser, ScoreNetwork
from rescore.models.finetune import Ema, add_lora, reference, trainable_state
from rescore.models.gaussian_network import GaussianNetwork
from rescore.models.inputs import check_scores
from rescore.sampling.decoder import Decoding, GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import Models, Network, Policy, policy_of
from rescore.tasks.task import TokenTask
from rescore.training import checkpoint
from rescore.training.checkpoint import Checkpoint
from rescore.training.optim import UpdateCounts, Updater
from rescore.training.run import Run


@dataclass(kw_only=True)
class TrainState:
    """What changes during a run, besides the modules: checkpointed as JSON."""

    step: int = 0
    """Rollouts done."""
    samples: int = 0
    best_step: int | None = None
    best_value: float | None = None
    base_sha256: str | None = None
    cpu_s: float = 0.0
    """CPU-seconds of training, evaluation left out."""
    elapsed_s: float = 0.0
    """Wall seconds of training, evaluation included."""


@dataclass(kw_only=True)
class World:
    """What a run is made of once its weights are loaded."""

    run: Run
    accelerator: Accelerator
    module: nn.Module
    models: Models
    updater: Updater
    state: TrainState = field(default_factory=TrainState)

    def network_rows(self) -> int:
        """Canvases that this process has put through the network so far, with the reference's."""
        policies = [self.models.new, self.models.ref]
        return sum(policy.rows for policy in policies if policy is not None)

    def averaged(self) -> AbstractContextManager[Any]:
        """A context in which the module holds the averaged weights, if the run averages."""
        return nullcontext() if self.updater.ema is None else self.updater.ema.swap()

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Inside the block algorithm and decoder are as their schedules have them at this step."""
        run, models, progress = self.run, self.models, step / max(1, self.run.steps - 1)
        algorithm, decoder = run.algorithm.at(progress), run.decoder.at(progress)
        self.run = dataclasses.replace(run, algorithm=algorithm, decoder=decoder)
        if decoder != run.decoder:
            new, ref = (with_decoder(policy, decoder) for policy in (models.new, models.ref))
            assert new is not None
            self.models = dataclasses.replace(models, new=new, ref=ref)
        try:
            yield
        finally:
            self.run, self.models = run, models

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is up on any process, so that all of them do the same next."""
        return self.over_all(int(flag)) > 0

    def over_all(self, number: int) -> int:
        """The sum of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return number
        own = torch.tensor(number, device=self.accelerator.device)
        total = self.accelerator.reduce(own, "sum")
        assert isinstance(total, Tensor)
        return int(total)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast where the run asks for it."""
        enabled = self.run.precision == "bfloat16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)


def accelerator_for(run: Run) -> Accelerator:
    """Accelerate on the device of the run; under torchrun every process takes its own.

    ``float32`` is float32: without TF32, whose rounding would hide in log-probabilities.
    """
    device = torch.device(run.device)
    if device.type == "cuda" and run.precision == "float32":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return Accelerator(cpu=device.type == "cpu")


def as_network(module: nn.Module, run: Run) -> Network:
    """The module in the run's precision and in evaluation mode, in place.

    Evaluation mode throughout: dropout would make old and new log-probabilities disagree. Under
    ``bfloat16`` frozen weights may be narrow; what trains may not.

    Raises:
        ValueError: the module is no ``Denoiser``, ``ScoreNetwork`` or ``GaussianNetwork``.
    """
    if not isinstance(module, Denoiser | ScoreNetwork | GaussianNetwork):
        raise ValueError(
            f"the base built a {type(module).__name__}, which is no Denoiser (vocab_size, mask_id "
            f"and predict()), no ScoreNetwork (process and log_score()) and no GaussianNetwork "
            f"(schedule, prediction, shape and predict())"
        )
    if run.precision != "bfloat16":
        module.to(getattr(torch, run.precision))
    elif any(p.dtype == torch.float64 for p in module.parameters()):  # which autocast leaves alone
        module.float()
    module.eval()
    return module


def with_decoder(policy: Policy | None, decoder: Decoding) -> Policy | None:
    """The same network under another decoder of its kind."""
    if policy is None:
        return None
    assert isinstance(policy, GaussianPolicy) and isinstance(decoder, GaussianDecoder)
    return dataclasses.replace(policy, decoder=decoder)


def policy_with(network: Network, run: Run) -> Policy:
    """The policy of a network under the decoder of a run."""
    return policy_of(network, run.decoder, run.forward_rows)


def build(run: Run, module: nn.Module, accelerator: Accelerator) -> World:
    """Policies and optimiser around a base network."""
    network = as_network(module.to(accelerator.device), run)
    if isinstance(network, ScoreNetwork) and isinstance(run.task, TokenTask):
        prompts = run.task.prompts("train", torch.zeros(1, dtype=torch.long))
        check_scores(network, prompts.tokens.to(accelerator.device), run.task.mask_id)
    if run.lora is not None:
        generator = torch.Generator().manual_seed(run.seed)
        add_lora(module, run.lora, generator=generator)
    ref = None
    if run.algorithm.uses_reference:
        ref = policy_with(reference(module), run)
    narrow = [n for n, p in module.named_parameters() if p.requires_grad and p.itemsize < 4]
    if narrow:
        raise ValueError(
            f"{len(narrow)} weights in 16 bits would be trained, such as {narrow[0]}, which loses "
            f"small updates; train adapters (lora), or load the base in float32"
        )
    ema = Ema(module, decay=run.ema) if run.ema else None
    critic = None
    if run.algorithm.uses_critic:
        critic = run.algorithm.critic(run.task, run.decoder, run.seed)
    if critic is not None:
        critic.to(accelerator.device)
    models = Models(new=policy_with(network, run), ref=ref, critic=critic)
    run.algorithm.check_models(models)
    return World(
        run=run,
        accelerator=accelerator,
        module=module,
        models=models,
        updater=Updater(module, run.optim, accelerator, ema),
    )


def save_state(world: World, directory: Path) -> None:
    """Write a checkpoint of the world; the best on validation is never pruned."""
    updater, state = world.updater, world.state
    tensors = {
        "model": trainable_state(world.module),
        "optimizer": checkpoint.optimizer_tensors(updater.optimizer, updater.named),
    }
    if updater.ema is not None:
        tensors["ema"] = updater.ema.state_dict()
    if world.models.critic is not None:
        tensors["critic"] = world.models.critic.saved()
    keep = [] if state.best_step is None else [state.best_step]
    counters = {"train": dataclasses.asdict(state), "updates": dataclasses.asdict(updater.counts)}
    saved = Checkpoint(state.step, tensors, counters)
    checkpoint.save(directory, saved, keep_last=world.run.keep_last, keep=keep)


def load_state(world: World, directory: Path, step: int) -> None:
    """Put the world into the state of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    saved = checkpoint.load(directory, step, world.accelerator.device)
    updater = world.updater
    load_weights(world.module, saved.tensors["model"])
    checkpoint.load_optimizer_tensors(updater.optimizer, updater.named, saved.tensors["optimizer"])
    if updater.ema is not None:
        updater.ema.load_state_dict(saved.tensors["ema"])
    if world.models.critic is not None:
        world.models.critic.restore(saved.tensors["critic"])
    world.state = TrainState(**saved.state["train"])
    updater.counts = UpdateCounts(**saved.state["updates"])


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy trainable parameters by name.

    Raises:
        CheckpointError: names or shapes differ from the module's.
    """
    own = trainable_state(module)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
        odd = sorted(set(own) ^ set(tensors)) or [
            n for n in own if own[n].shape != tensors[n].shape
        ]
        raise checkpoint.CheckpointError(
            f"the checkpoint is of another model: '{odd[0]}' is missing or has another shape; use "
            f"the recipe it was written with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
