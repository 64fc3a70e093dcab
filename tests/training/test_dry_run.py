"""The recipes of large models run to the end on miniatures, by one flag."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rescore import cli
from rescore.models.language import LanguageModel, load_language_model
from rescore.models.language_files import load_adapter
from rescore.tasks.sudoku_grids import SPLITS
from rescore.training.dry_run import dry_run
from rescore.training.log import read
from rescore.training.recipes import run_of
from rescore.types import Prompts

pytestmark = pytest.mark.usefixtures("undrawn")

RECIPES = {"llada_sudoku_egspo_sa": 150, "dream_countdown_egspo_sa": 200}
"""With the tokens that their prompts need."""
SHORT = ("--task.completion-length", "64", "--decoder.blocks", "4")  # so 8 steps


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is looked up on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_trains_saves_resumes_and_exports(recipe, short, tmp_path):
    """Two updates of the recipe's own method and adapters, a third after a resume; the adapters
    load in peft's own loader and compute what they compute here. As it is, and on short texts."""
    from peft import PeftModel

    out, exported = tmp_path / "run", tmp_path / "adapter"
    options = ["--task.prompt-length", str(RECIPES[recipe]), *SHORT] if short else []
    cli.main(["train", recipe, "--dry-run", "--out", str(out), *options])
    rows = read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["ratio_min"] == pytest.approx(1, abs=0.1) for row in rows)
    assert "kl_new_ref" in rows[-1]
    first, second = weights(out, 1), weights(out, 2)
    assert all(".lora_" in name for name in first)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in first}
    lora = run_of(recipe).lora
    assert lora is not None and layers == set(lora.targets) and len(layers) == 7
    assert any(not torch.equal(first[name], second[name]) for name in first)

    cli.main(["train", "--resume", str(out), "--steps", "3"])
    assert [row["step"] for row in read(out / "metrics.jsonl")] == [1, 2, 3]

    cli.main(["export", str(out), "--out", str(exported)])
    plain = load_language_model(str(tmp_path / "run-weights"), dtype="float32")
    network = PeftModel.from_pretrained(plain.network, str(exported)).eval()
    ours = load_language_model(str(tmp_path / "run-weights"), dtype="float32")
    load_adapter(ours, exported)
    inner = network.get_base_model()
    assert isinstance(inner, torch.nn.Module)
    adapted = LanguageModel(inner, layout=ours.layout, mask_id=ours.mask_id)
    x_t = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted.predict(x_t), ours.predict(x_t))

    merged = tmp_path / "merged"
    cli.main(["export", str(out), "--out", str(merged), "--merged"])
    assert (merged / "tokenizer_config.json").exists()
    assert load_language_model(str(merged)).layout == ours.layout


@pytest.mark.parametrize("recipe", RECIPES)
def test_at_its_own_lengths_the_network_takes_the_prompts(recipe, tmp_path):
    """Prompts of every split fit into the window of the recipe, and so do their completions."""
    run = dry_run(run_of(recipe), tmp_path / "weights")
    run.check()
    network = run.base.build(run.task, seed=0, cache=tmp_path, device="cpu", note=print)
    assert isinstance(network, LanguageModel)
    for split in SPLITS:
        prompts = run.task.prompts(split, torch.arange(2))
        assert isinstance(prompts, Prompts)
        assert prompts.tokens.shape == (2, 320 + 256)
        with torch.no_grad():
            logits = network.predict(prompts.tokens, attend=prompts.attend)
        assert logits.shape[:2] == prompts.tokens.shape and not bool(logits.isnan().any())


def test_a_small_recipe_needs_no_dry_run(capsys, tmp_path):
    """The flag is refused where there are no weights to replace."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "sudoku_egspo", "--dry-run", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "pretrained weights" in capsys.readouterr().err
