"""The recipe on SEDD-medium, from its dry run to a checkpoint in the published layout."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rescore import cli
from rescore.models.finetune import Lora, add_lora
from rescore.models.importers import load_sedd
from rescore.models.miniature_sedd import write_tiny_sedd
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.reward_models import Conversations
from rescore.tasks.task import TokenTask
from rescore.tasks.text import Problem
from rescore.tasks.tokenizers import AppendedMask, Characters, PretrainedTokenizer, load_tokenizer
from rescore.training import session
from rescore.training.directory import Origin
from rescore.training.dry_run import dry_run
from rescore.training.export import Export, export_run
from rescore.training.log import read
from rescore.training.pretrained_sedd import PretrainedSedd
from rescore.training.recipes import run_of
from rescore.training.rollout import probe, rollout
from rescore.training.session import build_base, start
from rescore.training.world import accelerator_for, build

RECIPE = "sedd_medium_sepo"
SHORT = ["--task.prompt-length", "24", "--task.completion-length", "6"]
WIDE = ["--optim.micro-batch", "8", "--forward-rows", "40"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is looked up on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def short(folder, **changes):
    """The dry run of the recipe with shorter texts."""
    run = dry_run(run_of(RECIPE), folder)
    task = dataclasses.replace(run.task, prompt_length=24, completion_length=6)
    return dataclasses.replace(run, task=task, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return short(tmp_path_factory.mktemp("dry") / "weights")


def saved(out, step, part="model"):
    return load_file(out / "checkpoints" / f"{step:08d}" / f"{part}.safetensors")


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_dry_run_trains_resumes_bitwise_and_reloads(tmp_path, monkeypatch):
    """Three rollouts and a fourth after a resume are four in one go: weights, moments, critic.

    The first of them serves the critic alone.

    The best of them, exported, is a checkpoint with the names, shapes and config of the base."""
    whole, parts, exported = tmp_path / "whole", tmp_path / "parts", tmp_path / "exported"
    cli.main(["train", RECIPE, "--dry-run", "--out", str(whole), *SHORT, *WIDE, "--steps", "4"])
    assert (whole / "report.html").stat().st_size > 10_000
    monkeypatch.setattr(session, "build_report", lambda out: None)  # seconds, and seen above
    cli.main(["train", RECIPE, "--dry-run", "--out", str(parts), *SHORT, *WIDE])
    rows = read(parts / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "ratio_min" not in rows[0]
    assert all(row["ratio_min"] == pytest.approx(1, abs=0.1) for row in rows[1:])
    assert rows[2]["kl_new_ref"] > 0
    assert not equal(saved(parts, 2), saved(parts, 3))
    cli.main(["train", "--resume", str(parts), "--steps", "4"])
    for part in ("model", "optimizer", "critic"):
        assert equal(saved(whole, 4, part), saved(parts, 4, part))

    cli.main(["export", str(parts), "--out", str(exported), "--merged"])
    base = tmp_path / "parts-weights"
    assert json.loads((exported / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()}
        for file in (exported / "model.safetensors", base / "model.safetensors")
    ]
    assert shapes[0] == shapes[1]
    best = json.loads((parts / "checkpoints/00000004/state.json").read_text())["train"]["best_step"]
    assert equal(dict(load_sedd(exported).state_dict()), saved(parts, best))


def world_of(run):
    accelerator = accelerator_for(run)
    return build(run, build_base(run, accelerator, print), accelerator)


def test_at_its_own_lengths_the_recipe_starts_with_a_ratio_of_one(tmp_path):
    """The likelihood of 128 tokens, hundreds of nats, is replayed in the shapes it came from."""
    run = dry_run(run_of(RECIPE), tmp_path / "weights")
    assert isinstance(run.task, TokenTask) and run.task.length == 256
    world = world_of(run)
    scored, _ = rollout(world, 0)
    run.algorithm.fit(world.models, run.algorithm.credit(scored))  # the first is the critic's
    scored, _ = rollout(world, 1)
    assert scored.notes["log_policy_old"].max() < -100
    assert probe(world, run.algorithm.credit(scored)) == 0


def test_only_what_is_read_from_elsewhere_differs_in_a_dry_run(run):
    """Every field of task and method is the recipe's; sizes and steps are smaller."""
    full = run_of(RECIPE)
    assert isinstance(full.task, Conversations) and isinstance(full.base, PretrainedSedd)
    assert (run.algorithm, run.optim, run.lora) == (full.algorithm, full.optim, full.lora)
    assert run.base.process == full.base.process
    elsewhere = ("tokenizer", "source", "reward_model", "reward_device")
    lengths = dict(prompt_length=full.task.prompt_length, completion_length=128)
    there = {name: getattr(full.task, name) for name in elsewhere}
    assert dataclasses.replace(run.task, **lengths, **there) == full.task
    assert type(run.task.tokenizer) is type(full.task.tokenizer)
    assert [run.task.size(split) > 0 for split in ("train", "validation", "test")] == [True] * 3


def test_prompts_stay_in_every_state(run):
    """Given tokens never move, nothing stays masked, prompts read as given."""
    prompts = run.task.prompts("train", torch.arange(6))
    with torch.no_grad():
        path = world_of(run).models.new.sample(
            prompts, Record(moves="all"), SampleRng(7, prompts.sample_id)
        )
    given = ~prompts.editable
    assert given.sum() == 6 * 24
    states = torch.cat([path.before, path.after, path.x_0[:, None]], 1)
    assert bool((states == prompts.tokens[:, None]).masked_fill(~given[:, None], True).all())
    assert bool((path.before == run.task.mask_id).any())
    assert not bool((path.x_0 == run.task.mask_id).any())
    asked = [problem.question for problem in run.task.problems("train")[:6]]
    for row, question in zip(path.x_0, asked, strict=True):
        assert run.task.show(row).startswith(question)


def test_room_left_of_a_prompt_changes_nothing(run):
    """The same questions in a wider window: scores of the completion are the same."""
    network = load_sedd(run.base.weights).double()
    rows = []
    for width in (24, 31):
        task = dataclasses.replace(run.task, prompt_length=width)
        prompts = task.prompts("test", torch.arange(2))
        noise = torch.tensor([0.3, 1.2], dtype=torch.float64)
        assert prompts.attend is not None
        scores = network.log_score(prompts.tokens, noise, attend=prompts.attend)
        rows.append(scores[:, width:])
    torch.testing.assert_close(rows[0], rows[1])


LORA = Lora(rank=2, alpha=4, targets=("attn_qkv", "attn_out", "mlp.0", "mlp.2"))


def test_adapters_train_against_the_base(run, tmp_path, monkeypatch):
    """The reference is the network without them; alone they are not exported."""
    monkeypatch.setattr(session, "build_report", lambda out: None)
    optim = dataclasses.replace(run.optim, lr=0.003, warmup=0, micro_batch=8)
    adapted = dataclasses.replace(run, steps=2, lora=LORA, optim=optim, forward_rows=40)
    out, exported = tmp_path / "run", tmp_path / "exported"
    start(adapted, Origin(recipe=RECIPE, arguments=()), out, resume=False)
    first, second = saved(out, 1), saved(out, 2)
    assert all(".lora_" in name for name in first)
    layers = {name.partition(".lora_")[0] for name in first}
    assert "blocks.1.mlp.2" in layers and "sigma_map.mlp.0" in layers
    assert not equal(first, second)
    assert read(out / "metrics.jsonl")[1]["kl_new_ref"] > 1e-4
    with pytest.raises(ValueError, match="adapters of a SEDD .* with --merged"):
        export_run(adapted, out, Export(device="cpu", precision="float32", out=exported))
    assert not exported.exists()


def test_merged_adapters_compute_what_the_network_did(run, tmp_path):
    """What load_sedd reads of an export, and what it had before."""
    base = run.base.build(run.task, seed=0, cache=tmp_path, device="cpu", note=print)
    module, exported = copy.deepcopy(base), tmp_path / "exported"
    add_lora(module, LORA, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=generator)
    x = run.task.prompts("test", torch.arange(2)).tokens
    noise = torch.tensor([0.3, 1.2])
    expected = module.log_score(x, noise)
    assert (base.log_score(x, noise) - expected).abs().max() > 0.1
    run.base.export(module, exported, run.task, None)
    torch.testing.assert_close(load_sedd(exported).log_score(x, noise), expected)
    there = load_file(f"{run.base.weights}/model.safetensors")
    assert set(load_file(exported / "model.safetensors")) == set(there)


def tiny(folder, task, **changes):
    fields = {"vocab_size": task.vocab_size, "length": task.length, "seed": 0, **changes}
    return str(write_tiny_sedd(folder, **fields))


def test_what_does_not_fit_is_refused_before_loading(run, tmp_path):
    """Vocabulary, window, process: each message names both sides and what to do."""
    task = run.task
    tiny_tokens = task.vocab_size
    cases = [
        ({"vocab_size": 9}, rf"has 9 tokens, the task {tiny_tokens}, and a mask at {tiny_tokens}"),
        ({"length": 29}, "the task has 30 positions, .* takes at most 29; make prompt_length"),
        ({"graph": "uniform"}, "is of the uniform process, and this run expects the absorbing one"),
    ]
    for number, (change, message) in enumerate(cases):
        folder = tiny(tmp_path / str(number), task, **change)
        with open(f"{folder}/model.safetensors", "w"):
            pass  # not to be read
        with pytest.raises(ValueError, match=message):
            PretrainedSedd(weights=folder).check(task, "cpu")
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(run, base=PretrainedSedd(weights=folder)).check()
    PretrainedSedd(weights=tiny(tmp_path / "fits", task)).check(task, "cpu")


def test_another_tokenizer_is_refused(run):
    """Characters have the mask elsewhere; GPT-2's alone has none, and the message names the way."""
    task = dataclasses.replace(run.task, tokenizer=Characters())
    with pytest.raises(ValueError, match="expected the mask after all tokens, .* AppendedMask"):
        run.base.check(task, "cpu")
    plain = PretrainedTokenizer(path=run.task.tokenizer.path)
    with pytest.raises(ValueError, match="has no mask token; .* make it an AppendedMask"):
        run.base.check(dataclasses.replace(run.task, tokenizer=plain), "cpu")


def test_missing_and_damaged_weights_are_refused(run, tmp_path):
    """Nowhere, not on the hub, incomplete, of another kind, not JSON."""
    whole = tiny(tmp_path / "whole", run.task)

    def refused(weights, message):
        with pytest.raises(ValueError, match=message):
            PretrainedSedd(weights=str(weights)).check(run.task, "cpu")

    refused("/no/such/place", "there is no folder /no/such/place; expected one with config.json")
    refused("some/sedd", "'some/sedd' is no folder here and .* cannot be had from the hub")
    part = shutil.copytree(whole, tmp_path / "part")
    (part / "model.safetensors").unlink()
    refused(part, "not a complete checkpoint: it has no model.safetensors")
    other = shutil.copytree(whole, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({"model_type": "llada"}))
    refused(other, "is no SEDD: its config.json lacks 'graph.type'")
    (other / "config.json").write_text(json.dumps({**config, "graph": {"type": "roulette"}}))
    refused(other, r"graph.type 'roulette'; expected one of \['absorb', 'uniform'\]")
    (other / "config.json").write_text("{")
    refused(other, "is not JSON")
    (other / "config.json").write_text(json.dumps({"config": config}))
    PretrainedSedd(weights=str(other)).check(run.task, "cpu")


def test_a_uniform_checkpoint_needs_another_mode(run, tmp_path):
    """The bound hides tokens behind masks; the algorithm says so before the weights are read."""
    weights = tiny(tmp_path / "uniform", run.task, graph="uniform")
    base = PretrainedSedd(weights=weights, process="uniform")
    uniform = dataclasses.replace(run, base=base)
    with pytest.raises(ValueError, match="mode='elbo' hides tokens behind masks, .* uniform noise"):
        uniform.check()


def test_a_miniature_of_the_other_process_is_refused(run):
    """As after a change of the recipe between two runs with the same --out."""
    full = run_of(RECIPE)
    other = dataclasses.replace(full, base=PretrainedSedd(weights="x/y", process="uniform"))
    with pytest.raises(ValueError, match="holds a miniature of the other process"):
        dry_run(other, Path(run.base.weights))


def test_a_uniform_recipe_gets_a_uniform_miniature(tmp_path):
    full = run_of(RECIPE)
    other = dataclasses.replace(full, base=PretrainedSedd(weights="x/y", process="uniform"))
    small = dry_run(other, tmp_path / "weights")
    small.base.check(small.task, "cpu")
    assert load_sedd(tmp_path / "weights").process.mask_id is None


def test_the_mask_follows_the_tokens_of_gpt2(run):
    """One special token, the last; it ends, fills and pads; text goes there and back."""
    from transformers import GPT2Tokenizer

    tokenizer = run.task.tokenizer
    assert isinstance(run.task, Conversations) and isinstance(tokenizer, AppendedMask)
    assert isinstance(load_tokenizer(tokenizer.path), GPT2Tokenizer)
    assert tokenizer.mask_id == tokenizer.vocab_size == tokenizer.end_id + 1
    assert tokenizer.symbol(tokenizer.end_id) == "<|endoftext|>"
    assert tokenizer.symbol(tokenizer.mask_id) == f"<{tokenizer.mask_id}>"
    text = "Tell me about  the sea, <|endoftext|> \N{SNOWMAN}"
    tokens = tokenizer.encode(text)
    assert len(tokens) < len(text) and tokenizer.end_id not in tokens
    assert tokenizer.decode([*tokens, tokenizer.end_id, 3]) == text
    assert tokenizer.prompt("the sea", " is") == tokenizer.encode("the sea is")


def test_the_tiny_reward_model_reads_prompt_and_reply(run):
    """Random weights give every pair another score; a reply counts, and so does its prompt."""
    replies, questions = ["yes", "no", "yes"], ["the sea?", "the sea?", "rain?"]
    problems = [Problem(question=q, gold="", facts={"prompt": q}) for q in questions]
    scores = run.task.preference(replies, [problem.facts for problem in problems])
    assert len(set(scores.tolist())) == 3
