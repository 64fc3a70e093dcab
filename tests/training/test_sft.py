"""The warm start: demonstrations in, a checkpoint out that RL starts from."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rescore import cli
from rescore.models.language import load_language_model
from rescore.models.miniature import write_miniature
from rescore.tasks.text import Problem, TextTask
from rescore.training.log import read
from rescore.training.recipes import run_of
from rescore.training.sft import demonstrations
from rescore.training.supervised import Row, Supervised, fit

RECIPE = """
from dataclasses import dataclass, replace
from rescore import Decoder, Egspo, Evaluate, Lora, Run
from rescore.models.language import ALL_LINEARS
from rescore.tasks.text import Problem, TextTask
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.pretrained import Pretrained

def vowels(texts, facts):
    return [sum(c in "aeiou" for c in text[:8]) / 8 for text in texts]

@dataclass(frozen=True, kw_only=True)
class Vowels(TextTask):
    prompt_length: int = 24
    completion_length: int = 8

    def problems(self, split):
        return [self.problem(f"{split} {n}") for n in range(16)]

    @property
    def functions(self):
        return {"vowels": vowels}

    @property
    def default_weights(self):
        return {"vowels": 1.0}

    def problem(self, text):
        return Problem(question=text, gold="aeiouaei", facts={})

def warm() -> Run:
    return Run(
        task=Vowels(tokenizer=PretrainedTokenizer(path="FOLDER")),
        base=Pretrained(dtype="float32"),
        decoder=Decoder(steps=4, blocks=2, order="low_confidence"),
        algorithm=Egspo(n_steps=4, beta=0.01),
        lora=Lora(rank=4, alpha=8, targets=ALL_LINEARS),
        steps=1,
        batch_size=16,
        evaluate=Evaluate(every=1, n=16, n_test=4),
    )

def whole() -> Run:
    return replace(warm(), lora=None)
"""

SHORT = "--steps 100 --batch 8 --lr 0.03 --warmup 5 --held-out 0.3 --validation-rows 16"
NARROW = "--precision bfloat16 --base.dtype bfloat16 --base.gradient-checkpointing"


@pytest.fixture(scope="module", autouse=True)
def offline_and_without_report():
    """Nothing is looked up on the hub; drawing takes longer than training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("rescore.training.session.build_report", lambda out: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """base/, a recipe in warm.py, demonstrations in data.jsonl and what they gave in tuned/."""
    root = tmp_path_factory.mktemp("warm")
    texts = ["user assistant system train validation test"] * 4
    folder = write_miniature(root / "base", "llada", seed=0, texts=texts, window=32)
    (root / "warm.py").write_text(RECIPE.replace("FOLDER", str(folder)))
    rows = [{"question": f"train {n}", "completion": "aeiouaei"} for n in range(24)]
    write_rows(root / "data.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def tuned(root) -> tuple[Path, str]:
    """The merged checkpoint of a warm start, and what the command printed."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        cli.main(command(root, root / "tuned"))
    return root / "tuned", "\n".join(said)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(root: Path, out: Path, *options: str, recipe: str = "warm") -> list[str]:
    data = str(root / "data.jsonl")
    source = f"{root / 'warm.py'}:{recipe}"
    return ["sft", source, "--data", data, "--out", str(out), *SHORT.split(), *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says about a mistake of the user's: exit 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    out, said = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in said
    assert "validation bound" not in out  # refused before, and not after hours of training
    return " ".join(said.split())


class Witness(nn.Module):
    """A denoiser that remembers what it was shown."""

    def __init__(self, vocab_size: int, mask_id: int) -> None:
        super().__init__()
        self.vocab_size, self.mask_id = vocab_size, mask_id
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def predict(self, x_t, *, attend=None, positions=None):
        assert attend is not None
        self.shown.append((x_t, attend))
        return self.table(x_t)


def test_noise_goes_to_completions_only(root):
    """Prompts are shown as they are and padding is not attended to; completions at many rates,
    their end tokens among them."""
    task = run_of(f"{root / 'warm.py'}:warm").task
    assert isinstance(task, TextTask)
    problems = [Problem(question=q, gold="aei", facts={}) for q in ("train 1", "validation 12")]
    examples = task.examples(problems)
    witness = Witness(300, task.mask_id)
    config = Supervised(steps=20, batch=4, validation_rows=8, warmup=0)
    fit(witness, examples, examples, config, torch.Generator().manual_seed(0))
    assert examples.attend is not None
    clean = {
        tuple(row[:24].tolist()): keep
        for row, keep in zip(examples.x_0, examples.attend, strict=True)
    }
    counts = []
    for x_t, attend in witness.shown:
        for row, seen in zip(x_t, attend, strict=True):
            prompt = tuple(row[:24].tolist())
            assert prompt in clean
            assert torch.equal(seen, clean[prompt])
            counts.append(row[24:] == task.mask_id)
    rates = torch.stack(counts).float()
    assert (rates.mean(0) > 0.3).all() and (rates.mean(0) < 0.7).all()
    assert set(rates.sum(1).tolist()) == set(range(9)) | {0.0}


def test_the_bound_falls_on_demonstrations_that_can_be_learnt(tuned):
    """All completions are one word: the validation bound goes to less than half of random
    weights'."""
    bounds = [float(b) for b in re.findall(r"validation bound ([\d.]+) nats", tuned[1])]
    assert len(bounds) == 3  # at steps 0, 50 and 100
    assert bounds[-1] < bounds[0] / 2
    assert tuned[1].splitlines()[-1].endswith(f"warm.py:warm --base.weights {tuned[0]}")


def test_the_result_takes_the_place_of_the_base(root, tuned, tmp_path):
    """Same files, layout, names, shapes and dtypes, other linear layers; RL starts from it with a
    reward that the base does not have, and from a KL of 0."""
    folder = tuned[0]
    assert {f.name for f in root.glob("base/*.json") if "index" not in f.name} <= {
        f.name for f in folder.iterdir()
    }
    before, after = weights(root / "base"), weights(folder)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if ".blocks." in n and "norm" not in n}
    assert load_language_model(str(folder)).layout == load_language_model(str(root / "base")).layout

    rewards = []
    for number, option in enumerate(([], ["--base.weights", str(folder)])):
        out = tmp_path / str(number)
        cli.main(["train", f"{root / 'warm.py'}:warm", *option, "--out", str(out)])
        assert read(out / "metrics.jsonl")[0]["kl_new_ref"] == pytest.approx(0, abs=1e-9)
        rewards.append(read(out / "evaluations.jsonl")[0]["metrics"]["reward"]["mean"])
    assert rewards[1] > rewards[0] + 0.2


def test_the_same_arguments_give_the_same_bits(root, tmp_path):
    """Also with guidance, which belongs to sampling; another seed gives other weights."""
    changes = {"one": [], "guided": ["--base.guidance", "0.5"], "other": ["--seed", "1"]}
    for name, options in changes.items():
        cli.main(command(root, tmp_path / name, "--steps", "3", *options))
    one, guided, other = (weights(tmp_path / name) for name in changes)
    assert all(torch.equal(one[name], guided[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_warm_start_in_bfloat16(root, tmp_path, capsys):
    """Under autocast with narrow frozen weights and checkpointed activations it learns, too."""
    options = [*NARROW.split(), "--micro-batch", "5", "--steps", "30"]
    cli.main(command(root, tmp_path / "out", *options))
    bounds = re.findall(r"validation bound ([\d.]+) nats", capsys.readouterr().out)
    assert float(bounds[-1]) < 0.8 * float(bounds[0])
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_parts_of_the_data_are_told_apart_by_the_question(root):
    """Both are there and share none; a completion is the gold of its problem."""
    parts = demonstrations(str(root / "data.jsonl"), 0.3)
    questions = {name: {p.question for p in part} for name, part in parts.items()}
    assert questions["train"] | questions["held_out"] == {f"train {n}" for n in range(24)}
    assert not questions["train"] & questions["held_out"]
    assert {p.gold for part in parts.values() for p in part} == {"aeiouaei"}


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("whole", "", ["adapters (lora)", "this recipe has something else"]),
        ("warm", "--base.quantize nf4", ["nothing exact to merge", "quantize=None"]),
        ("warm", "--base.weights nowhere", ["there is no folder nowhere"]),
        ("warm", "--data nowhere.jsonl", ["'nowhere.jsonl' does not exist"]),
        ("warm", "--held-out 1.5", ["held_out must lie in (0, 1), got 1.5"]),
        ("warm", "--held-out 1e-9", ["of 24 records none fell to 'held_out'"]),
        ("warm", "--steps 0", ["steps must be at least 1, got 0"]),
        ("warm", "--micro-batch 0", ["micro_batch must be at least 1, got 0"]),
        ("warm", "--task.completion-length 2", ["completion_length=2; raise it", "'aeiouaei'"]),
        ("warm", "--task.prompt-length 3", ["prompt_length=3; raise prompt_length"]),
        ("warm", "--task.prefill x", ["expected the prefill 'x' first"]),
        ("warm", "--lora.targets qkv", ["LoRA target 'qkv' names no linear layer"]),
        ("warm", "--learning-rate 1", ["--learning-rate"]),
    ],
)
def test_a_mistake_costs_one_message(root, recipe, options, words, tmp_path, capsys):
    """Exit 2 with what was wrong; nothing is written."""
    said = mistake(capsys, *command(root, tmp_path / "out", *options.split(), recipe=recipe))
    for word in words:
        assert word in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"question": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}],
            ["row 1 of", "rows.jsonl", "['completion', 'prompt']", "expected 'question' and"],
        ),
        ([{"question": "a", "completion": 7}], ["row 0 of", "both texts"]),
        ([{"question": "a", "completion": "b"}], ["of 1 records none fell to"]),
        ([], ["rows.jsonl' has no records"]),
    ],
)
def test_rows_that_are_no_demonstrations(root, rows, words, tmp_path, capsys):
    """The row and the file are named."""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    said = mistake(capsys, *command(root, tmp_path / "out", "--data", str(data)))
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(root, tuned, capsys):
    """Whatever is in it."""
    before = weights(tuned[0])
    assert "exists; choose a new folder" in mistake(capsys, *command(root, tuned[0]))
    assert weights(tuned[0]).keys() == before.keys()


def test_a_small_model_has_no_warm_start(root, tmp_path, capsys):
    """Its base is trained by the recipe."""
    data, out = str(root / "data.jsonl"), str(tmp_path / "out")
    said = mistake(capsys, "sft", "sudoku_egspo", "--data", data, "--out", out)
    assert "pretrained language model" in said


def test_a_row_of_the_log_is_told_at_both_ends(root):
    """``fit`` reports before the first and after the last step."""
    task = run_of(f"{root / 'warm.py'}:warm").task
    assert isinstance(task, TextTask)
    examples = task.examples([Problem(question="train 1", gold="aei", facts={})])
    told: list[Row] = []
    config = Supervised(steps=3, batch=2, validate_every=2, validation_rows=8)
    fit(
        Witness(300, task.mask_id),
        examples,
        examples,
        config,
        torch.Generator().manual_seed(0),
        progress=told.append,
    )
    assert [row.step for row in told] == [0, 2, 3]
