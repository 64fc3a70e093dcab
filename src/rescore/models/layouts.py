"""What the published checkpoints look like: fields of ``config.json`` and names of weights.

LLaDA (arXiv:2502.09992) is a Llama and Dream (arXiv:2508.15487) a Qwen2, both without the causal
mask, so their weights load into the classes of transformers; the code they ship is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
"""Parts of a block: LLaDA's name to Llama's."""

LLADA_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    **{
        f"model.transformer.blocks.#.{original}": f"model.layers.#.{native}"
        for original, native in LLADA_BLOCK.items()
    },
}
"""Modules: LLaDA's name to Llama's; # stands for the number of the block."""

LLADA_REQUIRES = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}
"""Fields of LLaDA's configuration without which it is not a Llama."""

DREAM_REQUIRES = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False}
"""Fields of Dream's configuration that have other values in no published checkpoint."""

MASKED_LM = ("bert", "modernbert", "roberta", "xlm-roberta")
"""Types of masked language models whose padding is known to influence nothing."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one ``config.json`` says about its network."""

    family: str
    """``llada``, ``dream`` or ``masked_lm``."""
    vocab_size: int
    """Columns of the logits."""
    window: int
    """The longest canvas."""
    mask_id: int | None
    """The mask token; None where only the tokenizer knows it."""
    first_position: int = 0
    """Number of the first position embedding."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Modules whose original name differs: original to native, # for the number of a block."""
    native: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration of the native class; empty where it is the file's own."""

    @property
    def shifted(self) -> bool:
        """Whether row l - 1 of the output predicts position l, as in next-token models."""
        return self.family == "dream"

    def patterns(self) -> dict[str, str]:
        """Original to native names as regular expressions, for ``from_pretrained``."""
        return _patterns(self.names)

    def to_native(self, name: str) -> str:
        """The native name of a weight; names of neither layout stay as they are."""
        return _renamed(name, self.patterns())

    def to_original(self, name: str) -> str:
        """The name that a weight has in the published checkpoint."""
        return _renamed(name, _patterns({new: old for old, new in self.names.items()}))


def _patterns(names: Mapping[str, str]) -> dict[str, str]:
    pairs = ((re.escape(old).replace(r"\#", r"(\d+)"), new) for old, new in names.items())
    return {rf"^{old}\.": new.replace("#", r"\1") + "." for old, new in pairs}


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        renamed, n_matches = re.subn(pattern, new, name)
        if n_matches:
            return renamed
    return name


def read_layout(weights: str) -> Layout:
    """The layout of a checkpoint, from its ``config.json``; on the hub that file is fetched.

    Raises:
        ValueError: there is no complete checkpoint at this place, or it is not supported.
    """
    folder = Path(weights)
    if folder.is_dir():
        missing = missing_files(folder)
        if missing:
            raise ValueError(
                f"{weights} is not a complete checkpoint: it has no {', '.join(missing)}; expected "
                f"are config.json and either model.safetensors or model.safetensors.index.json "
                f"with the files it names"
            )
        file = folder / "config.json"
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            file = Path(hf_hub_download(weights, "config.json"))
        except (OSError, EntryNotFoundError) as error:
            raise ValueError(
                f"'{weights}' is no folder here and its config.json cannot be had from the hub "
                f"({type(error).__name__}); check the name and the connection, or give the folder "
                f"of a downloaded copy"
            ) from error
    else:
        raise ValueError(
            f"there is no folder {weights}; expected one with config.json and *.safetensors, or "
            f"the name of a repository on the hub such as 'GSAI-ML/LLaDA-8B-Instruct'"
        )
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the checkpoint again") from error
    return layout_of(config, weights)


def missing_files(folder: Path) -> list[str]:
    """Files without which a folder is no checkpoint; empty if it is one."""
    index = folder / "model.safetensors.index.json"
    names = {"config.json"}
    if index.exists():
        names |= set(json.loads(index.read_text())["weight_map"].values())
    else:
        names.add("model.safetensors")
    return sorted(name for name in names if not (folder / name).exists())


def layout_of(config: Mapping[str, Any], source: str) -> Layout:
    """The layout that a checkpoint's ``config.json`` describes.

    Args:
        config: the file's content.
        source: names the checkpoint in messages.

    Raises:
        ValueError: the family is not supported, or a field is missing or has a value that the
            native class does not have.
    """
    kind = config.get("model_type")
    try:
        if kind == "llada":
            return _llada(config, source)
        if kind in ("Dream", "dream"):
            return _dream(config, source)
        if kind in MASKED_LM:
            first = config["pad_token_id"] + 1 if "roberta" in kind else 0
            return Layout(
                family="masked_lm",
                vocab_size=config["vocab_size"],
                window=config["max_position_embeddings"] - first,
                mask_id=config.get("mask_token_id"),
                first_position=first,
            )
    except KeyError as error:
        raise ValueError(f"the config.json of {source} has no field {error}") from None
    raise ValueError(
        f"{source} is a model of type '{kind}'; supported are 'llada', 'Dream' and the masked "
        f"language models {MASKED_LM}"
    )


def _llada(config: Mapping[str, Any], source: str) -> Layout:
    _require(config, LLADA_REQUIRES, source)
    heads, size = config["n_heads"], config.get("embedding_size") or config["vocab_size"]
    native = {
        "vocab_size": size,
        "hidden_size": config["d_model"],
        "intermediate_size": config["mlp_hidden_size"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or heads,
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config["rms_norm_eps"],
        "tie_word_embeddings": config["weight_tying"],
    }
    return _decoder("llada", config, native, LLADA_NAMES)


def _dream(config: Mapping[str, Any], source: str) -> Layout:
    _require(config, DREAM_REQUIRES, source)
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return _decoder("dream", config, {name: config[name] for name in same}, {})


def _decoder(
    family: str, config: Mapping[str, Any], native: dict[str, Any], names: Mapping[str, str]
) -> Layout:
    """The layout of a decoder without its causal mask; it never generates token by token."""
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    plain = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False)
    return Layout(
        family=family,
        vocab_size=native["vocab_size"],
        window=native["max_position_embeddings"],
        mask_id=config["mask_token_id"],
        names=names,
        native={**native, **plain, "rope_parameters": rope, "is_causal": False},
    )


def _require(config: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> None:
    for name, value in fields.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{source} has {name}={config[name]!r} in its config.json; only {value!r} is "
                f"supported"
            )
