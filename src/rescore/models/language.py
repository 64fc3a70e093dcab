"""Pretrained masked-diffusion language models: LLaDA, Dream, and masked language models.

The networks are those of transformers, so padding is masked out, positions count from the first
token that is attended to, and peft, SDPA and gradient checkpointing work as everywhere else. In
bfloat16 the rotary angles are rounded as in every Llama of transformers, where LLaDA's own code
keeps them in float32.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rescore.models.layouts import Layout, read_layout

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a block of LLaDA or Dream: targets for ``Lora``."""

Dtype = Literal["bfloat16", "float32"]
"""Of the weights."""

Quantization = Literal["nf4"]
"""4-bit normal floats with doubly quantised scales and bfloat16 arithmetic (arXiv:2305.14314)."""


class LanguageModel(nn.Module):
    r"""A ``Denoiser`` around a bidirectional network of transformers.

    With a guidance scale $w > 0$ the logits are $u + (1 + w)(c - u)$, where $c$ reads the whole
    canvas and $u$ a canvas with the mask token in place of the prompt (unsupervised classifier-free
    guidance as in LLaDA, arXiv:2502.09992); both in one batch of twice the size.

    Args:
        network: a network with full attention, such as ``load_language_model`` makes.
        layout: what kind of network it is.
        mask_id: the mask token.
        prompt_length: columns of the prompt; what guidance hides.
        guidance: w; 0 turns guidance off.

    Raises:
        ValueError: the guidance is negative, or there is no prompt that it could hide.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout,
        mask_id: int,
        prompt_length: int = 0,
        guidance: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= guidance < float("inf"):
            raise ValueError(f"guidance must be finite and not negative, got {guidance}")
        if guidance and prompt_length < 1:
            raise ValueError(
                f"guidance hides the prompt, but prompt_length is {prompt_length}; set guidance=0 "
                f"or use a task with prompts"
            )
        self.network = network
        self.layout = layout
        self.vocab_size = layout.vocab_size
        self.mask_id = mask_id
        self.prompt_length = prompt_length
        self.guidance = guidance
        self.eval()

    def train(self, mode: bool = True) -> LanguageModel:
        """As for every module, but layers with gradient checkpointing stay in training mode.

        Outside of it they would not checkpoint. The mode of a layer does nothing else: dropout
        has modules of its own, which obey ``mode``.
        """
        super().train(mode)
        for layer in checkpointed_layers(self.network):
            layer.training = True
        return self

    def predict(
        self,
        x_t: Int[Tensor, "B L"],
        *,
        attend: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B R"] | None = None,
    ) -> Float[Tensor, "B R V"]:
        """Logits at ``positions`` (all when None), in the dtype of the network.

        Raises:
            ValueError: the canvas is longer than the network's window.
        """
        if x_t.shape[1] > self.layout.window:
            raise ValueError(
                f"canvas of {x_t.shape[1]} positions; this model takes at most {self.layout.window}"
            )
        if self.guidance:
            x_t = torch.cat([x_t, self._without_prompt(x_t, attend)])
            attend = None if attend is None else torch.cat([attend, attend])
            positions = None if positions is None else torch.cat([positions, positions])
        logits = self._logits(x_t, attend, positions)
        if self.guidance:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, 1 + self.guidance)
        logits[..., self.mask_id] = -torch.inf
        return logits

    def _without_prompt(
        self, x_t: Int[Tensor, "B L"], attend: Bool[Tensor, "B L"] | None
    ) -> Int[Tensor, "B L"]:
        """The canvas with the mask token at every prompt column that is attended to."""
        prompt = torch.arange(x_t.shape[1], device=x_t.device) < self.prompt_length
        if attend is not None:
            prompt = prompt & attend
        return torch.where(prompt, self.mask_id, x_t)

    def _logits(
        self,
        x_t: Int[Tensor, "B L"],
        attend: Bool[Tensor, "B L"] | None,
        positions: Int[Tensor, "B R"] | None,
    ) -> Float[Tensor, "B R V"]:
        given = torch.ones_like(x_t, dtype=torch.bool) if attend is None else attend
        place = (given.cumsum(1) - 1).clamp(min=0) + self.layout.first_position
        inputs = {"input_ids": x_t, "attention_mask": attend, "position_ids": place}
        rows = positions
        if self.layout.shifted:
            every = torch.arange(x_t.shape[1], device=x_t.device).expand_as(x_t)
            first = given.int().argmax(1, keepdim=True)  # the row before it is padding
            rows = torch.maximum((every if positions is None else positions) - 1, first)
        if self.layout.family == "masked_lm":
            return _at(self.network(**inputs).logits, rows)
        hidden = self.network.get_submodule("model")(**inputs).last_hidden_state
        return self.network.get_submodule("lm_head")(_at(hidden, rows))


def _at(table: Float[Tensor, "B L D"], rows: Int[Tensor, "B R"] | None) -> Float[Tensor, "B R D"]:
    """The wanted rows (all when None)."""
    return table if rows is None else table.take_along_dim(rows[..., None], dim=1)


def checkpointed_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of a network of transformers whose activations are recomputed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        layer
        for layer in network.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]


def load_language_model(
    weights: str,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = "bfloat16",
    quantize: Quantization | None = None,
    gradient_checkpointing: bool = False,
    prompt_length: int = 0,
    guidance: float = 0.0,
) -> LanguageModel:
    """A pretrained network from safetensors, read shard by shard; no code of the checkpoint runs.

    Args:
        weights: a folder or the name of a repository on the hub.
        device: where to put it.
        dtype: of the weights; what ``quantize`` leaves alone stays in it too.
        quantize: store the linear layers in 4 bits; needs a GPU.
        gradient_checkpointing: recompute the activations of each block in the backward pass.
        prompt_length: as for ``LanguageModel``.
        guidance: as for ``LanguageModel``.

    Raises:
        ValueError: a package, a file or a weight is missing, the model is not supported, or the
            device cannot do what is asked.
    """
    check_installed(torch.device(device), quantize)
    from safetensors import SafetensorError
    from transformers import BitsAndBytesConfig

    layout = read_layout(weights)
    mask_id = read_mask_id(weights, layout)
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device_map": {"": device},
        "use_safetensors": True,
        "trust_remote_code": False,
        "key_mapping": layout.patterns() or None,
        "output_loading_info": True,
    }
    if quantize is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    kind = native_class(layout)
    if layout.native:
        options["config"] = kind.config_class(**layout.native)
    try:
        network, report = kind.from_pretrained(weights, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the weights of {weights}: {error}") from error
    problems = ["missing_keys", "mismatched_keys"]
    if layout.native:  # a masked language model may come with other heads of its pre-training
        problems.append("unexpected_keys")
    for problem in problems:
        if report[problem]:
            raise ValueError(
                f"the weights of {weights} do not match its config.json: {len(report[problem])} "
                f"{problem.replace('_', ' ')}, such as {min(map(str, report[problem]))}"
            )
    if gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
        network.disable_input_require_grads()  # only reentrant checkpoints need it
    return LanguageModel(
        network, layout=layout, mask_id=mask_id, prompt_length=prompt_length, guidance=guidance
    )


def native_class(layout: Layout) -> Any:
    """The class of transformers that computes a layout."""
    from transformers import AutoModelForMaskedLM, LlamaForCausalLM, Qwen2ForCausalLM

    classes = {
        "llada": LlamaForCausalLM,
        "dream": Qwen2ForCausalLM,
        "masked_lm": AutoModelForMaskedLM,
    }
    return classes[layout.family]


def check_installed(device: torch.device, quantize: Quantization | None) -> None:
    """Refuse what this machine cannot do, before anything is read.

    Raises:
        ValueError: transformers is missing, or quantisation is asked for without a GPU or without
            bitsandbytes.
    """
    require("transformers", "pretrained language models", "language")
    if quantize is None:
        return
    if device.type != "cuda":
        raise ValueError(
            f"quantize='{quantize}' needs a CUDA device, got '{device}'; set quantize=None"
        )
    require("bitsandbytes", f"quantize='{quantize}'", "quantized")


def require(package: str, purpose: str, extra: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{purpose} needs {package}, which cannot be imported ({error}): pip install "
            f"'rescore[{extra}]'"
        ) from error


def read_mask_id(weights: str, layout: Layout) -> int:
    """The mask token that the configuration names, or else the tokenizer.

    Raises:
        ValueError: neither names one.
    """
    if layout.mask_id is not None:
        return layout.mask_id
    from transformers import AutoTokenizer

    try:
        mask_id = AutoTokenizer.from_pretrained(weights, trust_remote_code=False).mask_token_id
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {weights}: {error}") from error
    if mask_id is None:
        raise ValueError(
            f"{weights} names no mask token; a masked language model has 'mask_token' in "
            f"tokenizer_config.json"
        )
    return mask_id
