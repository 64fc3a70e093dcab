"""Tiny checkpoints of random weights that are laid out like the published ones: for tests, offline.

    write_miniature("llada-tiny", "llada", seed=0)

Files, fields, names of weights and tokenizer classes are those of LLaDA-8B-Instruct,
Dream-v0-Instruct-7B and ModernBERT; the tokenizers know the special tokens, single bytes and
what they learn from the texts they are given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rescore.models.language import native_class
from rescore.models.layouts import layout_of

Family = Literal["llada", "dream", "masked_lm"]

SPECIAL: dict[Family, dict[str, str]] = {
    "llada": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "": "<|start_header_id|> <|end_header_id|> <|eot_id|> <|mdm_mask|>",
    },
    "dream": {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "": "<|im_start|> <|im_end|>",
        "mask_token": "<|mask|>",
    },
    "masked_lm": {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
    },
}
"""Special tokens by their role in ``tokenizer_config.json``; those without one under ''."""

MASK: dict[Family, str] = {"llada": "<|mdm_mask|>", "dream": "<|mask|>", "masked_lm": "[MASK]"}

LLADA_TURNS = (
    "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>"
    "\n\n{{ turn.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""A chat template with LLaDA's headers."""

DREAM_TURNS = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template with Dream's turns."""


def write_miniature(
    folder: str | Path,
    family: Family,
    *,
    seed: int,
    texts: Sequence[str] = (),
    window: int = 160,
) -> Path:
    """Write a checkpoint of width 32 and depth 2 in two shards, with its tokenizer.

    Args:
        folder: where to; made if it is not there.
        family: whose layout.
        seed: of the weights.
        texts: what the tokenizer learns its merges from; without any it knows bytes only.
        window: the most positions the model takes.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder, family, texts)
    config = {
        "llada": _llada_config,
        "dream": _dream_config,
        "masked_lm": _modernbert_config,
    }[family](tokens, window)
    _write_json(folder / "config.json", config)
    _write_weights(folder, config, seed)
    return folder


def write_gpt2_tokenizer(folder: str | Path, texts: Sequence[str] = ()) -> int:
    """Write a byte-level tokenizer of GPT-2's class: one special token, the last, and no mask.

    Args:
        folder: where to; made if it is not there.
        texts: what it learns its merges from.

    Returns:
        The number of its tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end = "<|endoftext|>"
    tokens, merges = _merges(texts)
    _write_byte_pairs(folder, {**tokens, end: len(tokens)}, merges)
    described = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    _write_json(
        folder / "tokenizer_config.json",
        {**described, "bos_token": end, "eos_token": end, "unk_token": end},
    )
    return len(tokens) + 1


def write_tiny_classifier(
    folder: str | Path, *, seed: int, texts: Sequence[str] = (), window: int = 8192
) -> Path:
    """Write a ModernBERT with one output, a reward model of transformers, with its tokenizer.

    Args:
        folder: where to; made if it is not there.
        seed: of the weights.
        texts: what the tokenizer learns its merges from.
        window: the most positions it takes.

    Returns:
        The folder.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _modernbert_config(_write_tokenizer(folder, "masked_lm", texts), window)
    config["architectures"] = ["ModernBertForSequenceClassification"]
    config["id2label"] = {"0": "reward"}
    _write_json(folder / "config.json", config)
    with torch.device("meta"):
        network = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    _write_random(folder, network, seed)
    return folder


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _special_tokens(family: Family) -> list[str]:
    """Every special token once, in order."""
    return list(dict.fromkeys(" ".join(SPECIAL[family].values()).split()))


def _merges(texts: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level tokens and the merges that make them, learned from texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not texts:
        return {char: i for i, char in enumerate(alphabet)}, []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return learned["vocab"], [(left, right) for left, right in learned["merges"]]


def _write_byte_pairs(
    folder: Path, tokens: dict[str, int], merges: Sequence[tuple[str, str]]
) -> None:
    """Tokens and merges in the two files of GPT-2."""
    _write_json(folder / "vocab.json", tokens)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines)


def _write_tokenizer(folder: Path, family: Family, texts: Sequence[str]) -> dict[str, int]:
    """The files of a byte-level tokenizer; returns its tokens by name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = _special_tokens(family)
    tokens, merges = _merges(texts)
    described: dict[str, Any] = {k: v for k, v in SPECIAL[family].items() if k}
    described["clean_up_tokenization_spaces"] = False
    numbers = {token: len(tokens) + i for i, token in enumerate(special)}
    if family == "dream":
        _write_byte_pairs(folder, tokens, merges)
        described |= {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "chat_template": DREAM_TURNS,
            "additional_special_tokens": SPECIAL[family][""].split(),
            "added_tokens_decoder": {
                str(number): {"content": token, "special": True}
                for token, number in numbers.items()
            },
        }
    else:
        tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
        tokenizer.save(str(folder / "tokenizer.json"))
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        if family == "llada":
            described["chat_template"] = LLADA_TURNS
        else:
            described["model_input_names"] = ["input_ids", "attention_mask"]
    _write_json(folder / "tokenizer_config.json", described)
    return tokens | numbers


def _llada_config(tokens: dict[str, int], window: int) -> dict[str, Any]:
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_layer_norm": False,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "block_type": "llama",
        "d_model": 32,
        "embedding_size": len(tokens) + 5,  # padded, as in the 8B model
        "eos_token_id": tokens["<|endoftext|>"],
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": tokens["<|mdm_mask|>"],
        "max_sequence_length": window,
        "mlp_hidden_size": 48,
        "model_type": "llada",
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "pad_token_id": tokens["<|endoftext|>"],
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": len(tokens) + 5,
        "weight_tying": False,
    }


def _dream_config(tokens: dict[str, int], window: int) -> dict[str, Any]:
    return {
        "architectures": ["DreamModel"],
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "mask_token_id": tokens["<|mask|>"],
        "max_position_embeddings": window,
        "model_type": "Dream",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": tokens["<|endoftext|>"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "vocab_size": len(tokens) + 5,
    }


def _modernbert_config(tokens: dict[str, int], window: int) -> dict[str, Any]:
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "bos_token_id": tokens["[CLS]"],
        "cls_token_id": tokens["[CLS]"],
        "eos_token_id": tokens["[SEP]"],
        "global_attn_every_n_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "local_attention": 8,
        "max_position_embeddings": window,
        "model_type": "modernbert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": tokens["[PAD]"],
        "sep_token_id": tokens["[SEP]"],
        "torch_dtype": "float32",
        "vocab_size": len(tokens),
    }


def _write_weights(folder: Path, config: dict[str, Any], seed: int) -> None:
    """The network of a configuration on disk, weights random, under their original names."""
    from transformers import AutoConfig

    layout = layout_of(config, str(folder))
    kind = native_class(layout)
    with torch.device("meta"):
        if layout.native:
            network = kind(kind.config_class(**layout.native))
        else:
            network = kind.from_config(AutoConfig.from_pretrained(folder))
    _write_random(folder, network, seed, layout.to_original)


def _write_random(
    folder: Path, network: nn.Module, seed: int, name_of: Callable[[str], str] = str
) -> None:
    """Draw every weight from one CPU generator and save them in two shards."""
    from huggingface_hub import save_torch_state_dict

    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 0.1 * value + (1.0 if "norm" in name else 0.0)
        else:
            value = value * parameter.shape[1] ** -0.5
        state[name_of(name)] = value
    size = sum(value.numel() * value.element_size() for value in state.values())
    save_torch_state_dict(state, folder, max_shard_size=int(0.7 * size))
