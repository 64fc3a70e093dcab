"""Bases that somebody else trained: what is checked before, and what is built."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch

from rescore.models.miniature import write_miniature
from rescore.rewards.text import TextFunction
from rescore.tasks.sudoku import Sudoku
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import Characters, PretrainedTokenizer
from rescore.training.pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class Echo(TextTask):
    """Say the word again."""

    prompt_length: int = 90
    completion_length: int = 6

    def problems(self, split: Split) -> Sequence[Problem]:
        return [self.problem(word) for word in ("yes", "no")]

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        def same(texts, facts):
            return [float(t == fact["word"]) for t, fact in zip(texts, facts, strict=True)]

        return {"same": same}

    @property
    def default_weights(self) -> Mapping[str, float]:
        return {"same": 1.0}

    def problem(self, text: str) -> Problem:
        return Problem(question=text, gold=text, facts={"word": text})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniatures")
    return {n: str(write_miniature(root / n, n, seed=0)) for n in ("llada", "dream", "masked_lm")}


def echo(folder):
    return Echo(tokenizer=PretrainedTokenizer(path=folder))


@pytest.mark.parametrize("family", ["llada", "dream", "masked_lm"])
def test_the_weights_are_where_the_tokenizer_is(folders, family, tmp_path):
    """A task's prompts go through the network that was built; padding included."""
    task, base, notes = echo(folders[family]), Pretrained(dtype="float32"), []
    task.validate(n=2)
    base.check(task, "cpu")
    module = base.build(task, seed=0, cache=tmp_path, device="cpu", note=notes.append)
    assert notes == [f"loading {folders[family]}"]
    prompts = task.prompts("train", torch.tensor([0, 1]))
    assert prompts.attend is not None
    assert not prompts.attend[:, 0].any()
    logits = module.predict(prompts.tokens, attend=prompts.attend)
    assert logits.shape == (2, task.length, module.vocab_size)
    assert module.mask_id == task.mask_id
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_every_field_reaches_the_network(folders, tmp_path):
    """dtype, guidance with the task's prompt columns, and gradient checkpointing."""
    task = echo(folders["llada"])
    base = Pretrained(gradient_checkpointing=True, guidance=0.5)
    module = base.build(task, seed=0, cache=tmp_path, device="cpu", note=print)
    assert (module.guidance, module.prompt_length) == (0.5, 90)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert any(layer.training for layer in module.modules())


def test_explicit_weights_win(folders, tmp_path):
    """Fine-tuned weights with the tokenizer of the base."""
    other = write_miniature(tmp_path / "other", "llada", seed=1)
    task = echo(folders["llada"])
    base = Pretrained(weights=str(other), dtype="float32")
    base.check(task, "cpu")
    there = base.build(task, seed=0, cache=tmp_path, device="cpu", note=print)
    here = Pretrained(dtype="float32").build(task, seed=0, cache=tmp_path, device="cpu", note=print)
    assert not torch.equal(next(there.parameters()), next(here.parameters()))


@pytest.mark.parametrize(
    ("base", "change", "device", "message"),
    [
        ({"quantize": "nf4"}, {}, "cpu", "needs a CUDA device"),
        ({"weights": "/no/such/place"}, {}, "cpu", "there is no folder /no/such/place"),
        ({}, {"tokenizer": Characters()}, "cpu", "Echo has no pretrained tokenizer .* set weights"),
        ({}, {"completion_length": 71}, "cpu", "161 positions, .* takes at most 160; make"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(folders, base, change, device, message):
    """Each message says what to change."""
    task = dataclasses.replace(echo(folders["llada"]), **change)
    with pytest.raises(ValueError, match=message):
        Pretrained(**base).check(task, device)


def test_a_tokenizer_of_another_model_is_refused(folders):
    """The mask tokens differ, so the model would see ordinary tokens for masks."""
    with pytest.raises(
        ValueError, match=r"mask token 261, the task 260 and 259; use the tokenizer"
    ):
        Pretrained(weights=folders["llada"]).check(echo(folders["dream"]), "cpu")


def test_a_task_with_more_tokens_than_the_model_is_refused(folders, tmp_path):
    """Its tokens would index beyond the embedding."""
    folder = shutil.copytree(folders["llada"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "embedding_size": 261}))
    with pytest.raises(ValueError, match="has 261 tokens and mask token 261, the task 262 and 261"):
        Pretrained().check(echo(str(folder)), "cpu")


def test_guidance_needs_prompt_columns(folders, tmp_path):
    """A negative one is refused at once, one for a task without columns in the check."""
    for guidance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance must be finite and not negative"):
            Pretrained(guidance=guidance)
    folder = shutil.copytree(folders["llada"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    task = Sudoku()
    (folder / "config.json").write_text(json.dumps({**config, "mask_token_id": task.mask_id}))
    Pretrained(weights=str(folder)).check(task, "cpu")
    with pytest.raises(ValueError, match="a Sudoku has no prompt columns; set guidance=0"):
        Pretrained(weights=str(folder), guidance=1.0).check(task, "cpu")
