"""The recipes of large models run to the end on miniatures, by one flag."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rescore import cli
from rescore.models.language import LanguageModel, load_language_model
from rescore.models.language_files import load_adapter
from rescore.training.log import read
from rescore.training.recipes import run_of

RECIPES = {"llada_sudoku_egspo_sa": "llada", "dream_countdown_egspo_sa": "dream"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is looked up on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_trains_saves_resumes_and_exports(recipe, tmp_path):
    """Two updates of the recipe's own method and adapters, a third after a resume; the adapters
    load in peft's own loader and compute what they compute here."""
    from peft import PeftModel

    out, exported = tmp_path / "run", tmp_path / "adapter"
    cli.main(["train", recipe, "--dry-run", "--out", str(out)])
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


def test_a_small_recipe_needs_no_dry_run(capsys, tmp_path):
    """The flag is refused where there are no weights to replace."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "sudoku_egspo", "--dry-run", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "pretrained weights" in capsys.readouterr().err
