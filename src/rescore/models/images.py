"""Text-to-image pipelines of diffusers: SD 1.5, SDXL, SD3 and Flux, as networks for Gaussian noise.

Of a pipeline its networks, its tokenizers and its table of noise are taken, never its scheduler's
steps: those are of the run's decoder. What classifier-free guidance makes of two outputs is the
prediction, in sampling and in training, of the policy and of its reference alike.

What a network is told of a sample is the number of its prompt, 8 bytes. The embedding of its text
would be 118 kB in SD 1.5 and 2.7 MB in SD3, in 16 bits, once for every sample of a rollout and once
more for every pair of a micro-batch, though all samples of a group share it; here it is kept once
for every text, in the memory of the CPU, and goes to the device for the texts of one forward.
"""

from __future__ import annotations

import abc
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rescore.models.language import Dtype, require
from rescore.processes.convert import Prediction
from rescore.processes.gaussian_schedules import DiscreteTable, GaussianSchedule, RectifiedFlow
from rescore.types import State

Kind = Literal["sd15", "sdxl", "sd3", "flux"]
"""A family of pipelines."""
PIPELINES: dict[Kind, str] = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
"""Names of their classes."""
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
"""The linear layers of every attention: targets for ``Lora``."""
PROMPT = "prompt"
"""Name of the input that holds the numbers of prompts."""
CACHE_BYTES = 4 << 30
"""Embeddings of texts that are kept; the oldest are computed again."""

FLOW = "FlowMatchEulerDiscreteScheduler"
TABLES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of models that were trained under a table of alphas_cumprod."""
FORMS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
NOT_REPLAYED = {
    "clip_sample": "it clips what the network takes x_0 for, so its steps are not affine",
    "thresholding": "it clips what the network takes x_0 for, so its steps are not affine",
    "use_flow_sigmas": "it puts the noise of a flow in the place of its table",
    "invert_sigmas": "its times run from data to noise",
}
"""Settings of a scheduler whose steps no decoder makes, and why."""


def schedule_of(config: Mapping[str, Any]) -> tuple[GaussianSchedule, Prediction]:
    """The noise a model was trained under and what it predicts, from ``scheduler_config.json``.

    Which times a scheduler visits, and by which solver, plays no part: that is the decoder's.

    Raises:
        ValueError: no decoder can replay its steps; says why.
    """
    diffusers: Any = importlib.import_module("diffusers")
    name = str(config.get("_class_name"))
    if name != FLOW and name not in TABLES:
        raise ValueError(
            f"a {name} cannot be replayed: its noise is neither a table of alphas_cumprod nor "
            f"a rectified flow; expected {FLOW} or one of {', '.join(TABLES)}"
        )
    try:
        full = getattr(diffusers, name).from_config(config).config
    except ImportError as error:
        raise ValueError(f"the scheduler cannot be read: {str(error).strip()}") from error
    for setting, reason in NOT_REPLAYED.items():
        if full.get(setting):
            raise ValueError(
                f"this {name} cannot be replayed, {setting}={full[setting]}: {reason}; set it to "
                f"false in scheduler_config.json if the model was not trained for it"
            )
    if name == FLOW:
        return RectifiedFlow(), "flow"
    if full.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"this {name} cannot be replayed: its timestep_type is '{full['timestep_type']}', so "
            f"its network is told the noise, not an entry of a table"
        )
    if full["prediction_type"] not in FORMS:
        raise ValueError(
            f"this {name} cannot be replayed: its prediction_type is '{full['prediction_type']}'; "
            f"expected one of {', '.join(FORMS)}"
        )
    settings = {key: full[key] for key in full if key != "_use_default_values"}
    table = diffusers.DDIMScheduler.from_config(settings)  # with the defaults of the other class
    schedule = DiscreteTable(table.alphas_cumprod, final=float(table.final_alpha_cumprod))
    return schedule, FORMS[full["prediction_type"]]


class Texts:
    """Embeddings of texts, each computed once and kept in the memory of the CPU.

    Args:
        encode: the embeddings of one text, or of no text (None), alone: what else is in the batch
            must not matter.
        limit: bytes that are kept.
    """

    def __init__(
        self, encode: Callable[[str | None], tuple[Tensor, ...]], limit: int = CACHE_BYTES
    ) -> None:
        self._encode, self._limit, self._size = encode, limit, 0
        self._known: OrderedDict[str | None, tuple[Tensor, ...]] = OrderedDict()

    def __call__(
        self, texts: Sequence[str | None], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """Embeddings of all texts, stacked; every different one is moved once."""
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        rows = [self._of(text) for text in place]
        index = torch.tensor([place[text] for text in texts], device=device)
        return [torch.stack(column).to(device, dtype)[index] for column in zip(*rows, strict=True)]

    def _of(self, text: str | None) -> tuple[Tensor, ...]:
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        parts = tuple(part.detach().cpu() for part in self._encode(text))
        self._known[text] = parts
        self._size += _n_bytes(parts)
        while self._size > self._limit and len(self._known) > 1:
            self._size -= _n_bytes(self._known.popitem(last=False)[1])
        return parts


class Frozen:
    """What never trains: the pipeline's text encoders and its decoder; copies share it."""

    def __init__(self, pipeline: Any, texts: Texts, text: Callable[[int], str]) -> None:
        self.pipeline, self.texts, self.text = pipeline, texts, text

    def __deepcopy__(self, memo: object) -> Frozen:
        return self


class ImageNetwork(nn.Module, abc.ABC):
    r"""A ``GaussianNetwork`` of latents that ``Decodes`` to images [B 3 H W] in [0, 1].

    With a guidance w above 1 the output is u + w (c - u), of c told the prompt and u told none,
    both in one batch of twice the size (Ho & Salimans 2022, arXiv:2207.12598, in diffusers' w).

    Only the denoising network is a part of this module, for adapters, optimisers and checkpoints.

    Args:
        pipeline: of diffusers, loaded.
        network: its denoising network.
        shape: of the latents, [C H W].
        text: the text of a prompt number.
        guidance: w; 1 turns it off.
        text_tokens: positions of the T5 encoder's text; None = as many as the pipeline's own.
    """

    distilled = False
    """True where guidance is an input of the network, so that one output is enough."""

    def __init__(
        self,
        pipeline: Any,
        network: nn.Module,
        *,
        shape: tuple[int, ...],
        text: Callable[[int], str],
        guidance: float,
        text_tokens: int | None = None,
    ) -> None:
        super().__init__()
        config = pipeline.scheduler.config
        described = schedule_of({**config, "_class_name": type(pipeline.scheduler).__name__})
        self.schedule: GaussianSchedule = described[0]
        self.prediction: Prediction = described[1]
        self.network = network
        self.shape = shape
        self.guidance = guidance
        self._window = {} if text_tokens is None else {"max_sequence_length": text_tokens}
        self._frozen = Frozen(pipeline, Texts(self._encode_once), text)
        self.eval()

    @property
    def pipeline(self) -> Any:
        """The pipeline it is made of, whose denoising network this one trains."""
        return self._frozen.pipeline

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        factor = self.pipeline.vae_scale_factor
        return self.shape[-2] * factor, self.shape[-1] * factor

    @abc.abstractmethod
    def encode(self, text: str | None) -> tuple[Tensor, ...]:
        """What the network is told of a text, or of none: tokens [L D], and more of some kinds."""

    @abc.abstractmethod
    def output(self, x_t: State, t: Float[Tensor, " B"], tokens: Tensor, *more: Tensor) -> State:
        """The network called as its pipeline does, without guidance between two outputs.

        Args:
            x_t: latents, in the type of the weights.
            t: times in [0, 1].
            tokens: with ``more``, of ``encode``, stacked.
            more: see ``tokens``.
        """

    def predict(self, x_t: State, t: Float[Tensor, " B"], inputs: Mapping[str, Tensor], /) -> State:
        """The output, guided, in float32 or better.

        Args:
            x_t: latents with noise.
            t: one time per sample.
            inputs: ``prompt``, the number of each sample's prompt.
        """
        texts: list[str | None] = [self._frozen.text(n) for n in inputs[PROMPT].tolist()]
        twice = self.guidance != 1 and not self.distilled
        if twice:
            texts = [None] * len(texts) + texts
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        dtype = next(p.dtype for n, p in self.network.named_parameters() if ".lora_" not in n)
        tokens, *more = self._frozen.texts(texts, x_t.device, dtype)
        a = self.output(x_t.to(dtype), t, tokens, *more)
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        if not twice:
            return a
        without, told = a.chunk(2)
        return without + self.guidance * (told - without)

    def decode(self, x_0: State) -> Float[Tensor, "B 3 height width"]:
        """Images [B 3 H W] in [0, 1], decoded one after the other in float32.

        Raises:
            ValueError: latents that are not finite.
        """
        bad = (~x_0.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the latents of {len(bad)} of {len(x_0)} samples are not finite (rows {bad[:8]}): "
                f"the network's weights or outputs overflow; load the weights in bfloat16 or "
                f"float32, and if it came with training lower optim.lr"
            )
        vae = self.pipeline.vae
        latents = x_0.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        with torch.autocast(x_0.device.type, enabled=False):
            images = vae.decode(latents, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    def _encode_once(self, text: str | None) -> tuple[Tensor, ...]:
        device = self.pipeline.text_encoder.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.encode(text)


class StableDiffusion(ImageNetwork):
    """SD 1.x and 2.x: a UNet, CLIP's tokens."""

    def encode(self, text: str | None) -> tuple[Tensor, ...]:
        pipeline = self.pipeline
        tokens, _ = pipeline.encode_prompt(text or "", pipeline.text_encoder.device, 1, False)
        return (tokens[0],)

    def output(self, x_t: State, t: Float[Tensor, " B"], tokens: Tensor, *more: Tensor) -> State:
        entry = entry_of(self.schedule, t)
        return self.network(x_t, entry, encoder_hidden_states=tokens, return_dict=False)[0]


class StableDiffusionXL(ImageNetwork):
    """SDXL: a UNet, tokens of two CLIPs, a pooled text, sizes and crop of the image."""

    def encode(self, text: str | None) -> tuple[Tensor, ...]:
        pipeline = self.pipeline
        tokens, _, pooled, _ = pipeline.encode_prompt(
            text or "",
            device=pipeline.text_encoder_2.device,
            do_classifier_free_guidance=False,
        )
        if text is None and pipeline.config.force_zeros_for_empty_prompt:
            return torch.zeros_like(tokens[0]), torch.zeros_like(pooled[0])
        return tokens[0], pooled[0]

    def output(self, x_t: State, t: Float[Tensor, " B"], tokens: Tensor, *more: Tensor) -> State:
        sizes = x_t.new_tensor([*self.pixels, 0, 0, *self.pixels]).expand(len(x_t), -1)
        return self.network(
            x_t,
            entry_of(self.schedule, t),
            encoder_hidden_states=tokens,
            added_cond_kwargs={"text_embeds": more[0], "time_ids": sizes},
            return_dict=False,
        )[0]


class StableDiffusion3(ImageNetwork):
    """SD3 and 3.5: a transformer, tokens of two CLIPs and, if it is there, of T5."""

    def encode(self, text: str | None) -> tuple[Tensor, ...]:
        pipeline = self.pipeline
        tokens, _, pooled, _ = pipeline.encode_prompt(
            text or "",
            None,
            None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            **self._window,
        )
        return tokens[0], pooled[0]

    def output(self, x_t: State, t: Float[Tensor, " B"], tokens: Tensor, *more: Tensor) -> State:
        return self.network(
            x_t,
            timestep=1000 * t,
            encoder_hidden_states=tokens,
            pooled_projections=more[0],
            return_dict=False,
        )[0]


class Flux(ImageNetwork):
    """FLUX.1: a transformer of 2 x 2 patches, T5's tokens; dev is told the guidance as a number."""

    distilled = True

    def __init__(self, pipeline: Any, network: nn.Module, **settings: Any) -> None:
        super().__init__(pipeline, network, **settings)
        self._told = bool(pipeline.transformer.config.guidance_embeds)
        if not self._told and self.guidance != 1:
            raise ValueError(
                f"this network is told no guidance, but guidance={self.guidance}; set it to 1"
            )

    def encode(self, text: str | None) -> tuple[Tensor, ...]:
        pipeline = self.pipeline
        tokens, pooled, _ = pipeline.encode_prompt(
            text or "", None, device=pipeline.text_encoder.device, **self._window
        )
        return tokens[0], pooled[0]

    def output(self, x_t: State, t: Float[Tensor, " B"], tokens: Tensor, *more: Tensor) -> State:
        n, channels, height, width = x_t.shape
        rows, columns = height // 2, width // 2
        patches = x_t.view(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        place = torch.zeros(rows, columns, 3, device=x_t.device, dtype=x_t.dtype)
        place[..., 1] = torch.arange(rows, device=x_t.device)[:, None]
        place[..., 2] = torch.arange(columns, device=x_t.device)
        guidance = torch.full((n,), self.guidance, device=x_t.device) if self._told else None
        a = self.network(
            hidden_states=patches.reshape(n, rows * columns, 4 * channels),
            timestep=t.to(x_t.dtype),
            guidance=guidance,
            pooled_projections=more[0],
            encoder_hidden_states=tokens,
            txt_ids=place.new_zeros(tokens.shape[1], 3),
            img_ids=place.view(-1, 3),
            return_dict=False,
        )[0]
        return a.view(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


NETWORKS: dict[Kind, type[ImageNetwork]] = {
    "sd15": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "sd3": StableDiffusion3,
    "flux": Flux,
}


def entry_of(schedule: GaussianSchedule, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The timestep 0 ... M - 1 that a UNet is told at time t; fractions between two entries."""
    assert isinstance(schedule, DiscreteTable)
    place = t.double() * len(schedule.alphas_cumprod) - 1
    entry = place.round()
    place = torch.where((place - entry).abs() < 1e-4, entry, place)  # times from float32
    return place.clamp(min=0).float()


def denoiser_of(pipeline: Any, kind: Kind) -> nn.Module:
    """The network of a pipeline that is trained."""
    return pipeline.unet if kind in ("sd15", "sdxl") else pipeline.transformer


def load_image_network(
    kind: Kind,
    weights: str,
    *,
    shape: tuple[int, ...],
    text: Callable[[int], str],
    guidance: float,
    dtype: Dtype = "bfloat16",
    device: torch.device | str = "cpu",
    text_device: torch.device | str | None = None,
    text_tokens: int | None = None,
    variant: str | None = None,
    gradient_checkpointing: bool = False,
) -> ImageNetwork:
    """A pipeline from safetensors; no code of the checkpoint runs and nothing is unpickled.

    Args:
        kind: of pipeline.
        weights: a folder in diffusers' layout or the name of a repository on the hub.
        shape: of the latents.
        text: the text of a prompt number.
        guidance: see ``ImageNetwork``.
        dtype: of the denoising network and the text encoders; the VAE is in float32.
        device: where to put them.
        text_device: where to put the text encoders instead.
        text_tokens: see ``ImageNetwork``.
        variant: of the files, such as ``fp16``.
        gradient_checkpointing: compute the activations of each block again in the backward pass.

    Raises:
        ValueError: diffusers is missing, or a file is or does not fit.
    """
    require("diffusers", "text-to-image models", "images")
    diffusers: Any = importlib.import_module("diffusers")
    safetensors: Any = importlib.import_module("safetensors")
    precision = getattr(torch, dtype)
    files = {"use_safetensors": True, "variant": variant, "trust_remote_code": False}
    nothing = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    settings: dict[str, Any] = {"sd15": nothing, "sdxl": {"add_watermarker": False}}.get(kind, {})
    family: Any = getattr(diffusers, PIPELINES[kind])
    place = weights
    try:
        encoders = {}
        for name, parts in family.load_config(weights).items():
            if name.startswith("text_encoder") and parts[1] is not None:
                place = f"{weights}/{name}"
                encoders[name] = _text_encoder(parts[1], weights, name, dtype=precision, **files)
        place = weights
        pipeline: Any = family.from_pretrained(
            weights,
            dtype={"vae": torch.float32, "default": precision},
            **encoders,
            **files,
            **settings,
        )
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                _refuse_missing([n for n, p in part.named_parameters() if p.is_meta], name)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{place} cannot be loaded as a {PIPELINES[kind]}: {error}") from error
    pipeline.vae.requires_grad_(False).to(device).enable_slicing()
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.requires_grad_(False).to(text_device or device)
    network: Any = denoiser_of(pipeline, kind).to(device)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return NETWORKS[kind](
        pipeline, network, shape=shape, text=text, guidance=guidance, text_tokens=text_tokens
    )


def _text_encoder(kind: str, weights: str, folder: str, **settings: Any) -> Any:
    """A text encoder of transformers, which draws a weight that its file lacks."""
    transformers: Any = importlib.import_module("transformers")
    encoder, report = getattr(transformers, kind).from_pretrained(
        weights, subfolder=folder, output_loading_info=True, **settings
    )
    _refuse_missing(report["missing_keys"], folder)
    return encoder


def _refuse_missing(keys: Iterable[str], folder: str) -> None:
    names = sorted(keys)
    if names:
        raise ValueError(
            f"the file in its folder {folder} lacks {len(names)} weights, of them '{names[0]}'; "
            f"copy the checkpoint again"
        )


def _n_bytes(parts: Sequence[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts)
