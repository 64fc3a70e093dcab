"""Tiny text-to-image pipelines of random weights in diffusers' layout: for tests, offline.

    write_tiny_pipeline("sd15-tiny", "sd15", seed=0, texts=["a cat"])

Every component is of the class it has in the published pipeline, and is saved by it. Latents are
8 x 8, images 16 x 16. The tokenizers know the letters and the words of the texts they are given.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rescore.models.images import Kind

SIDE = 8
"""Rows and columns of the latents."""
CHANNELS: dict[Kind, int] = {"sd15": 4, "sdxl": 4, "sd3": 16, "flux": 16}
"""Of the latents, as in the published models."""
WIDTH = 16
"""Of the text encoders."""
SD_TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""The scheduler's configuration of SD 1.5 and SDXL."""


def write_tiny_pipeline(
    folder: str | Path, kind: Kind, *, seed: int, texts: Sequence[str] = ()
) -> Path:
    """Write ``model_index.json`` and a folder for each component, as ``save_pretrained`` does.

    Args:
        folder: where to; made if it is not there.
        kind: of pipeline.
        seed: of the weights; the global generator is left alone.
        texts: what the tokenizers learn their words from.

    Returns:
        The folder.
    """
    makers: dict[Kind, Callable[[list[str]], Any]] = {
        "sd15": _sd15,
        "sdxl": _sdxl,
        "sd3": _sd3,
        "flux": _flux,
    }
    words = sorted({word for text in texts for word in text.lower().split() if word.isalpha()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        makers[kind](words).save_pretrained(folder)
    for file in Path(folder).glob("tokenizer*/tokenizer.json"):
        model = json.loads(file.read_text())["model"]
        if model["type"] == "BPE":  # the published pipelines have CLIP's own two files
            lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
            file.with_name("merges.txt").write_text("#version: 0.2\n" + lines)
            file.with_name("vocab.json").write_text(json.dumps(model["vocab"]))
            file.unlink()
    return Path(folder)


def _sd15(words: list[str]) -> Any:
    tokenizer = _clip_tokenizer(words)
    return _diffusers().StableDiffusionPipeline(
        vae=_vae(CHANNELS["sd15"], scaling_factor=0.18215),
        text_encoder=_clip(tokenizer, projected=False),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=WIDTH),
        scheduler=_diffusers().PNDMScheduler.from_config(SD_TABLE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(words: list[str]) -> Any:
    tokenizer = _clip_tokenizer(words)
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )
    return _diffusers().StableDiffusionXLPipeline(
        vae=_vae(CHANNELS["sdxl"], scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(tokenizer, projected=False),
        text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_diffusers().EulerDiscreteScheduler.from_config(
            {**SD_TABLE, "timestep_spacing": "leading"}
        ),
        add_watermarker=False,
    )


def _sd3(words: list[str]) -> Any:
    tokenizer = _clip_tokenizer(words)
    transformer = _diffusers().SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=CHANNELS["sd3"],
        out_channels=CHANNELS["sd3"],
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE,
    )
    return _diffusers().StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(CHANNELS["sd3"], scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT),
        text_encoder=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        **_t5(words, "_3"),
    )


def _flux(words: list[str]) -> Any:
    tokenizer = _clip_tokenizer(words)
    transformer = _diffusers().FluxTransformer2DModel(
        in_channels=4 * CHANNELS["flux"],
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    return _diffusers().FluxPipeline(
        scheduler=_diffusers().FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True
        ),
        vae=_vae(CHANNELS["flux"], scaling_factor=0.3611, shift_factor=0.1159, **_NO_QUANT),
        text_encoder=_clip(tokenizer, projected=False),
        tokenizer=tokenizer,
        **_t5(words, "_2"),
        transformer=transformer,
    )


_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def _diffusers() -> Any:
    return importlib.import_module("diffusers")


def _transformers() -> Any:
    return importlib.import_module("transformers")


def _unet(**settings: Any) -> Any:
    return _diffusers().UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    )


def _vae(channels: int, **settings: Any) -> Any:
    return _diffusers().AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **settings,
    )


def _clip(tokenizer: Any, *, projected: bool) -> Any:
    config = _transformers().CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(_transformers(), kind)(config)


def _clip_tokenizer(words: list[str]) -> Any:
    """Bytes, bytes at the end of a word, one merge after the other, two special tokens."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1 and all(letter in letters for letter in word):
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += dict.fromkeys(left + right for left, right in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return _transformers().CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def _t5(words: list[str], number: str) -> dict[str, Any]:
    """Encoder and tokenizer by their names in a pipeline."""
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrst"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(letter, -5.0) for letter in letters]
    tokenizer = _transformers().T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = _transformers().T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return {
        f"text_encoder{number}": _transformers().T5EncoderModel(config),
        f"tokenizer{number}": tokenizer,
    }
