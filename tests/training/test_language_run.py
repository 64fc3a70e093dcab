"""Runs of language models from the command line to the adapter on disk, on miniatures."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rescore import cli
from rescore.models.language import LanguageModel, check_installed, load_language_model
from rescore.models.language_files import load_adapter
from rescore.models.miniature import Family, write_miniature
from rescore.training.log import read
from rescore.training.session import Loading, best_world

RECIPE = """
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rescore import Decoder, Egspo, Evaluate, Lora, Optim, Run
from rescore.models.language import ALL_LINEARS
from rescore.rewards.text import TextFunction
from rescore.tasks.task import Split
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.pretrained import Pretrained

def letters(texts, facts):
    return [sum(c.isascii() and c.isalpha() for c in text[:8]) / 8 for text in texts]

@dataclass(frozen=True, kw_only=True)
class Spell(TextTask):
    prompt_length: int = 24
    completion_length: int = 8

    def problems(self, split: Split) -> Sequence[Problem]:
        return [self.problem(f"{split} {n}") for n in range(16 if split == "train" else 64)]

    @property
    def functions(self) -> Mapping[str, TextFunction]:
        return {"letters": letters}

    @property
    def default_weights(self) -> Mapping[str, float]:
        return {"letters": 1.0}

    def problem(self, text: str) -> Problem:
        return Problem(question=text, gold="abcdefgh", facts={})

def spell() -> Run:
    return Run(
        task=Spell(tokenizer=PretrainedTokenizer(path="FOLDER")),
        base=Pretrained(dtype="float32"),
        decoder=Decoder(steps=4, blocks=2, order="low_confidence"),
        algorithm=Egspo(n_steps=4, lam=0.5, beta=0.001),
        lora=Lora(rank=4, alpha=8, targets=ALL_LINEARS),
        optim=Optim(lr=0.02, warmup=0),
        steps=6,
        batch_size=32,
        save_every=3,
        evaluate=Evaluate(every=3, n=64, n_test=8),
    )

def everything() -> Run:
    from dataclasses import replace
    return replace(spell(), lora=None)
"""
"""A task whose reward random weights earn a part of: the share of letters in eight tokens."""

FAMILIES: dict[Family, str] = {
    "llada": "--precision bfloat16 --base.dtype bfloat16 --base.gradient-checkpointing",
    "dream": "--base.guidance 0.5 --algorithm.kl exact",
    "masked_lm": "--lora.targets Wqkv Wo Wi --lora.alpha 16 --optim.lr 0.04 --decoder.order random",
}
"""The settings under which each family is run."""


@pytest.fixture(scope="module", autouse=True)
def offline_and_without_report():
    """Nothing is looked up on the hub; drawing takes longer than training here, so it is left to
    one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("rescore.training.session.build_report", lambda out: None)
        yield


def write_recipe(root: Path, family: Family, *, seed: int = 0) -> str:
    """A miniature in ``root/base`` and a recipe file that starts from it."""
    texts = ["user assistant system train validation test"] * 4
    folder = write_miniature(root / "base", family, seed=seed, texts=texts, window=32)
    (root / "spell.py").write_text(RECIPE.replace("FOLDER", str(folder)))
    return f"{root / 'spell.py'}:spell"


@pytest.fixture(scope="module", params=FAMILIES)
def root(request, tmp_path_factory) -> Path:
    """base/, spell.py and run/, a finished run of six updates; what changes it must copy it."""
    root = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(root, request.param)
    cli.main(["train", recipe, "--out", str(root / "run"), *FAMILIES[request.param].split()])
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """base/ and spell.py of a LLaDA that nothing was done with."""
    root = tmp_path_factory.mktemp("plain")
    write_recipe(root, "llada")
    return root


def family_of(root: Path) -> Family:
    return next(family for family in FAMILIES if root.name.startswith(family))


def ok(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints, which must succeed."""
    capsys.readouterr()
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says about a mistake of the user's: exit 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    return " ".join(said.split())


def rows(out: Path, name: str = "metrics") -> list[dict]:
    """A log without the times."""
    return [
        {k: v for k, v in row.items() if "time" not in k} for row in read(out / f"{name}.jsonl")
    ]


def best_model(root: Path) -> LanguageModel:
    """The network of the run with its best weights, in the precision it was run in."""
    stored = json.loads((root / "run" / "run.json").read_text())
    run = cli._overridden(f"{root / 'spell.py'}:spell", cli.train, stored["arguments"])
    options = Loading(device=run.device, precision=run.precision)
    module = best_world(run, root / "run", options, run.decoder).module
    assert isinstance(module, LanguageModel)
    return module


def canvases(module: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Three canvases, the second padded on the left."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randint(0, 250, (3, 20), generator=generator)
    x_t[:, 14:18] = module.mask_id
    attend = torch.ones_like(x_t, dtype=torch.bool)
    attend[1, :6] = False
    return x_t, attend


# What a run does ----------------------------------------------------------------------------------


def test_reinforcement_learning_raises_the_reward(root):
    """Every family learns to write letters, in rollouts and on the validation prompts."""
    reward = [row["reward"] for row in rows(root / "run")]
    assert len(reward) == 6
    assert sum(reward[-2:]) / 2 > reward[0] + 0.1
    first, *_, last = rows(root / "run", "evaluations")
    assert last["metrics"]["reward"]["mean"] > first["metrics"]["reward"]["mean"] + 0.1
    assert json.loads((root / "run" / "result.json").read_text())["best_step"] > 0


def test_every_metric_is_finite_and_the_first_ratio_is_one(root):
    """With one update per rollout each starts at the policy that sampled; the KL to the base, which
    is the network with its adapters off, is 0 at first and then is not."""
    for row in rows(root / "run"):
        assert all(math.isfinite(value) for value in row.values())
        assert row["gradient_norm"] > 0 and row["skipped_updates"] == 0
        assert row["ratio_min"] == pytest.approx(1) and row["ratio_max"] == pytest.approx(1)
        assert (row["kl_new_ref"] > 0.01) == (row["step"] > 1)
    assert rows(root / "run")[0]["kl_new_ref"] == pytest.approx(0, abs=1e-9)


def test_only_adapters_are_trained_and_every_one_of_them(root):
    """A checkpoint holds the adapters of all targets in float32, each moved from its start."""
    weights = [
        load_file(root / "run" / "checkpoints" / f"{step:08d}" / "model.safetensors")
        for step in (3, 6)
    ]
    targets = {name.partition(".lora_")[0].rpartition(".")[2] for name in weights[0]}
    assert len(targets) == (3 if family_of(root) == "masked_lm" else 7)
    for name, tensor in weights[1].items():
        assert ".lora_" in name and tensor.dtype == torch.float32
        assert tensor.any() and not torch.equal(tensor, weights[0][name])


def test_resume_equals_the_straight_run(root, tmp_path, capsys):
    """A run whose end is lost and done again gives the same metrics and the same bits."""
    copy = shutil.copytree(root / "run", tmp_path / "copy")
    last = copy / "checkpoints" / "00000006"
    shutil.rmtree(last)
    assert "resumed from step 3" in ok(capsys, "train", "--resume", copy)
    for name in ("metrics", "evaluations"):
        assert rows(copy, name) == rows(root / "run", name)
    for file in last.glob("*.safetensors"):
        assert file.read_bytes() == (root / "run/checkpoints/00000006" / file.name).read_bytes()
    assert (copy / "result.json").exists()


def test_eval_and_sample_read_the_best_checkpoint(root, capsys):
    """eval repeats the number of the run's table; sample shows prompts with their completions."""
    table = json.loads((root / "run" / "result.json").read_text())
    mean = table["rows"][-1]["metrics"]["letters"]["mean"]
    assert f"letters {mean:.3f}" in ok(capsys, "eval", root / "run", "--n", 8)
    text = ok(capsys, "sample", root / "run", "--n", 1, "--prompts", "train 3", "test 5")
    assert len(re.findall(r"^letters [01]\.\d\d:$", text, re.M)) == 2
    assert "train 3" in text and "test 5" in text and "........" in text


def test_the_exported_adapter_is_what_was_trained(root, tmp_path, capsys):
    """Loaded by peft or by us onto the plain base, it gives the logits of the run's best weights,
    which are not those of the base."""
    from peft import PeftModel

    folder = tmp_path / "adapter"
    assert ok(capsys, "export", root / "run", "--out", folder).strip() == str(folder)
    best = best_model(root)
    x_t, attend = canvases(best)
    dtype = "bfloat16" if family_of(root) == "llada" else "float32"
    base, other, ours = (load_language_model(str(root / "base"), dtype=dtype) for _ in range(3))
    for module in (base, ours):
        module.guidance, module.prompt_length = best.guidance, best.prompt_length
    load_adapter(ours, folder)
    peft_model = PeftModel.from_pretrained(other.network, str(folder)).eval()
    theirs = LanguageModel(
        peft_model.get_base_model(),
        layout=best.layout,
        mask_id=best.mask_id,
        prompt_length=best.prompt_length,
        guidance=best.guidance,
    )
    with torch.no_grad():
        expected = best.predict(x_t, attend=attend)
        assert torch.equal(ours.predict(x_t, attend=attend), expected)
        torch.testing.assert_close(theirs.predict(x_t, attend=attend), expected)
        kept = torch.arange(best.vocab_size) != best.mask_id
        far = (base.predict(x_t, attend=attend) - expected)[..., kept].abs().max()
    assert far > 0.1


def test_merged_weights_start_another_run(root, tmp_path, capsys):
    """All weights in the original's layout give what base and adapters gave, and a new run takes
    them as its base."""
    folder = tmp_path / "merged"
    ok(capsys, "export", root / "run", "--out", folder, "--merged")
    assert set(load_file(folder / "model.safetensors")) == {
        name for shard in (root / "base").glob("*.safetensors") for name in load_file(shard)
    }
    family = family_of(root)
    options = [*FAMILIES[family].split(), "--steps", 1, "--base.weights", folder]
    ok(capsys, "train", f"{root / 'spell.py'}:spell", *options, "--out", tmp_path / "again")
    assert rows(tmp_path / "again")[0]["kl_new_ref"] == pytest.approx(0, abs=1e-9)
    if family == "llada":  # rounded to bfloat16 once more
        return
    best, merged = best_model(root), load_language_model(str(folder), dtype="float32")
    merged.guidance, merged.prompt_length = best.guidance, best.prompt_length
    x_t, attend = canvases(best)
    with torch.no_grad():
        torch.testing.assert_close(
            merged.predict(x_t, attend=attend), best.predict(x_t, attend=attend)
        )


def test_all_weights_are_trained_without_adapters(plain, tmp_path, capsys):
    """In float32, against a frozen copy, with a report; only the whole model can be exported."""
    out = tmp_path / "run"
    small = ["--steps", 2, "--batch-size", 16, "--optim.lr", 0.001, "--evaluate.n-test", 4]
    ok(capsys, "train", f"{plain / 'spell.py'}:everything", *small, "--out", out)
    assert rows(out)[1]["kl_new_ref"] > 0
    assert "kl_new_ref" in Path(ok(capsys, "report", out).strip()).read_text()
    assert "export it with --merged" in mistake(capsys, "export", out, "--out", tmp_path / "x")
    ok(capsys, "export", out, "--out", tmp_path / "x", "--merged")
    assert "exists" in mistake(capsys, "export", out, "--out", tmp_path / "x", "--merged")


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("spell", "--task.tokenizer.path no-such-folder", ["there is no folder no-such-folder"]),
        ("spell", "--base.weights no-such-folder", ["there is no folder no-such-folder"]),
        ("spell", "--base.weights some/model", ["'some/model'", "cannot be had from the hub"]),
        ("spell", "--task.prompt-length 40", ["48 positions", "takes at most 32", "smaller"]),
        ("spell", "--base.quantize nf4 --precision bfloat16", ["needs a CUDA device"]),
        ("spell", "--base.quantize nf4", ["got precision=float32 with lora"]),
        (
            "everything",
            "--base.quantize nf4 --precision bfloat16",
            ["got precision=bfloat16 without lora"],
        ),
        (
            "everything",
            "--base.dtype bfloat16 --precision bfloat16",
            ["loses small updates", "set base.dtype to float32"],
        ),
        ("spell", "--evaluate.control", ["which a Pretrained cannot; turn it off"]),
        ("spell", "--base.guidance -1", ["guidance must be finite and not negative"]),
        ("spell", "--base.dtype float16", ["float16", "bfloat16"]),
        ("spell", "--evaluate.by digits", ["'digits' is no reward term", "letters"]),
        ("spell", "--task.reward-weights digits 1", ["digits"]),
    ],
)
def test_a_mistake_costs_one_message(plain, recipe, options, words, tmp_path, capsys):
    """Exit 2 with what was wrong and what to do, before anything is loaded or written."""
    source, out = f"{plain / 'spell.py'}:{recipe}", tmp_path / "run"
    said = mistake(capsys, "train", source, *options.split(), "--out", out)
    for word in words:
        assert word in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("transformers", r"needs? transformers.*rescore\[language\]"),
        ("peft", r"needs? peft.*rescore\[language\]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    plain, package, message, tmp_path, monkeypatch, capsys
):
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "run"
    said = mistake(capsys, "train", f"{plain / 'spell.py'}:spell", "--out", out)
    assert re.search(message, said)
    assert not out.exists()


def test_four_bits_need_their_package(monkeypatch):
    """What a machine with a GPU is told."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes.*rescore\[quantized\]"):
        check_installed(torch.device("cuda"), "nf4")


def changed(plain: Path, root: Path, file: str, **fields: object) -> str:
    """A copy of base and recipe with other fields in a JSON file of the base."""
    shutil.copytree(plain / "base", root / "base")
    content = {**json.loads((root / "base" / file).read_text()), **fields}
    content = {name: value for name, value in content.items() if value is not None}
    (root / "base" / file).write_text(json.dumps(content))
    (root / "spell.py").write_text(RECIPE.replace("FOLDER", str(root / "base")))
    return f"{root / 'spell.py'}:spell"


def test_an_unknown_family_is_refused(plain, tmp_path, capsys):
    """With the families that are known."""
    recipe = changed(plain, tmp_path, "config.json", model_type="mamba")
    said = mistake(capsys, "train", recipe, "--out", tmp_path / "run")
    assert "of type 'mamba'; supported are 'llada', 'Dream'" in said
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path, capsys):
    """A model of words in order has none."""
    write_recipe(tmp_path / "masked", "masked_lm")
    recipe = changed(tmp_path / "masked", tmp_path, "tokenizer_config.json", mask_token=None)
    said = mistake(capsys, "train", recipe, "--out", tmp_path / "run")
    assert "no mask token" in said and "tokenizer_config.json" in said
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_all_there_are_refused(plain, tmp_path, capsys):
    """A copy that was cut off."""
    recipe = changed(plain, tmp_path, "config.json")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    shard.unlink()
    said = mistake(capsys, "train", recipe, "--out", tmp_path / "run")
    assert f"it has no {shard.name}" in said
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_its_window_is_refused(plain, tmp_path, capsys):
    """Prompts are never cut; the message says how long this one is."""
    recipe = f"{plain / 'spell.py'}:spell"
    said = mistake(capsys, "train", recipe, "--task.prompt-length", 4, "--out", tmp_path / "run")
    assert re.search(r"a prompt has \d+ tokens, but prompt_length=4; raise prompt_length", said)


def test_adapters_stay_with_their_base(root, tmp_path, capsys):
    """Neither eval, nor export, nor resume puts them onto other weights."""
    shutil.copytree(root / "run", tmp_path / "run")
    shutil.copy(root / "spell.py", tmp_path)
    write_recipe(tmp_path, family_of(root), seed=1)
    shutil.copy(tmp_path / "spell.py", tmp_path / "run" / "recipe.py")
    for command in ("eval", "sample", "export"):
        said = mistake(capsys, command, tmp_path / "run")
        assert "belong to another base" in said and "restore that base" in said
    assert not Path("export").exists()
