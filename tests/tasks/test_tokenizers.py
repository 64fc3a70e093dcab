"""Tokenizers: characters, and those of the pretrained models on miniatures of their files."""

import json
import shutil
import sys

import huggingface_hub.constants
import pytest

from rescore.models.miniature import write_miniature
from rescore.tasks.tokenizers import Characters, PretrainedTokenizer, load_tokenizer

FAMILIES = ("llada", "dream", "masked_lm")
TEXT = "Grüße, 你好!  <|eot_id|>\n2+2=4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniatures")
    return {name: str(write_miniature(root / name, name, seed=0)) for name in FAMILIES}


def named(tokenizer, *names):
    """Tokens by name."""
    vocab = load_tokenizer(tokenizer.path).get_vocab()
    return [vocab[name] for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_comes_back_and_holds_no_special_tokens(folders, family):
    """Every byte is ordinary, also those that spell a special token."""
    tokenizer = PretrainedTokenizer(path=folders[family])
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert max(tokens) < 256 < tokenizer.vocab_size
    assert "".join(tokenizer.symbol(token) for token in tokenizer.encode("2+2")) == "2+2"


@pytest.mark.parametrize(
    ("family", "mask", "end"),
    [
        ("llada", "<|mdm_mask|>", "<|endoftext|>"),  # not declared as the mask token
        ("dream", "<|mask|>", "<|endoftext|>"),
        ("masked_lm", "[MASK]", "[PAD]"),
    ],
)
def test_mask_and_end(folders, family, mask, end):
    """Their names in the vocabulary, inside of it, and shown by name."""
    tokenizer = PretrainedTokenizer(path=folders[family])
    assert [tokenizer.mask_id, tokenizer.end_id] == named(tokenizer, mask, end)
    assert tokenizer.mask_id < tokenizer.vocab_size
    assert (tokenizer.symbol(tokenizer.mask_id), tokenizer.symbol(tokenizer.end_id)) == (mask, end)
    assert tokenizer.symbol(5000) == "<5000>"  # a column of the logits without a text


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        (
            "llada",
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("dream", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("masked_lm", "", ""),
    ],
)
def test_a_prompt_is_a_turn_of_the_chat_then_the_prefill(folders, family, before, after):
    """The model continues the assistant's turn from the prefill; no template, no turns."""
    tokenizer = PretrainedTokenizer(path=folders[family])
    tokens = tokenizer.prompt("What is 2+2?", "It is")
    whole = "".join(tokenizer.symbol(token) for token in tokens)
    assert whole == f"{before}What is 2+2?{after}It is"
    n_special = sum(token >= 256 for token in tokens)
    assert n_special == whole.count("<|")


@pytest.mark.parametrize(
    ("family", "stop"),
    [
        ("llada", "<|endoftext|>"),
        ("llada", "<|eot_id|>"),
        ("dream", "<|endoftext|>"),
        ("dream", "<|im_end|>"),
        ("masked_lm", "[SEP]"),
        ("masked_lm", "[PAD]"),
    ],
)
def test_decoding_stops_at_the_first_end(folders, family, stop):
    """Whichever end comes first; other special tokens leave no text."""
    tokenizer = PretrainedTokenizer(path=folders[family])
    yes, no = tokenizer.encode("yes"), tokenizer.encode("no")
    (end,) = named(tokenizer, stop)
    assert tokenizer.decode([*yes, end, *no, end]) == "yes"
    assert tokenizer.decode([tokenizer.mask_id, *yes, 5000]) == "yes"


def test_dream_needs_no_remote_code(folders):
    """Its own class is written for slow tokenizers; Qwen2's reads the same files."""
    from transformers import Qwen2Tokenizer

    assert isinstance(load_tokenizer(folders["dream"]), Qwen2Tokenizer)


def test_a_tokenizer_is_loaded_once(folders):
    """Two descriptions of one path share it."""
    assert load_tokenizer(folders["llada"]) is load_tokenizer(folders["llada"])


def edited(folder, target, **fields):
    """A copy with other fields in its tokenizer_config.json; None removes one."""
    shutil.copytree(folder, target)
    file = target / "tokenizer_config.json"
    described = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in described.items() if v is not None}))
    return PretrainedTokenizer(path=str(target))


def test_a_tokenizer_without_a_mask_or_end_token_is_refused(folders, tmp_path):
    """The message says which field to add."""
    tokenizer = edited(folders["masked_lm"], tmp_path / "a", mask_token=None, pad_token=None)
    with pytest.raises(ValueError, match="has no mask token; .* under 'mask_token' in a copy"):
        _ = tokenizer.mask_id
    with pytest.raises(ValueError, match="has no end token; name one under 'pad_token'"):
        _ = tokenizer.end_id


def test_without_padding_the_end_of_sequence_fills(folders, tmp_path):
    """eos in the place of a pad token that is not declared."""
    tokenizer = edited(folders["llada"], tmp_path / "a", pad_token=None)
    assert [tokenizer.end_id] == named(tokenizer, "<|endoftext|>")


def test_a_place_without_a_tokenizer_is_refused(tmp_path, monkeypatch):
    """A missing folder, an empty one, and a name that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for path in ("/no/such/place", str(tmp_path), "some/model"):
        with pytest.raises(ValueError, match=f"cannot load a tokenizer from '{path}'"):
            PretrainedTokenizer(path=path).encode("a")


def test_missing_transformers_says_what_to_install(folders, monkeypatch):
    """Without the extra the message is the pip command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'pip install "rescore\[language\]"'):
        PretrainedTokenizer(path="not loaded before").encode("a")


def test_characters_there_and_back():
    """One token each, up to the first end; what has no token is refused."""
    tokenizer = Characters(alphabet="abc")
    assert tokenizer.prompt("ab", "c") == [0, 1, 2]
    assert (tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size) == (3, 4, 4)
    assert tokenizer.decode([2, 0, 3, 1]) == "ca"
    assert [tokenizer.symbol(token) for token in (0, 4)] == ["a", "_"]
    with pytest.raises(ValueError, match=r"'ax' has the characters \['x'\]"):
        tokenizer.encode("ax")
    with pytest.raises(ValueError, match="names a character twice"):
        Characters(alphabet="aba")
