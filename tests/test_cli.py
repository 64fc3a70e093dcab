"""The command line: every command, every mistake that can be made with it, every exit code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rescore import cli

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = shlex.split(
    "--base.steps 2 --base.model.width 16 --base.model.depth 1 --base.model.heads 2 --steps 2 "
    "--batch-size 16 --evaluate.n 16 --evaluate.n-test 16 --task.pool 64"
)
PUZZLE = "3102200002100320"
RECIPE = """
from dataclasses import dataclass, replace
from rescore import Reward, Run, Sudoku
from rescore_recipes.sudoku import sudoku_reinforce  # imported, so not a recipe of this file

def ones(outputs, prompts):
    return (outputs == 0).float().mean(1)

@dataclass(frozen=True, kw_only=True)
class Ones(Sudoku):
    @property
    def reward(self):
        return Reward({"ones": ones})

def recipe() -> Run:
    run = sudoku_reinforce()
    task = Ones(pool=64)
    return replace(run, task=task, evaluate=replace(run.evaluate, by="ones"))
"""


def ok(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints, which must succeed."""
    capsys.readouterr()
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says on stderr about a mistake of the user's: exit 2, nothing else printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in err and out == ""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())  # as if tyro's boxes were one line


def metrics(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the times."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Bases are trained into a cache of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps; tests that change it must copy it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    cli.main(["train", "sudoku_egspo", "--out", str(out), *TINY])
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


# Commands -----------------------------------------------------------------------------------------


def test_train_writes_a_run_directory_with_report(run):
    """Everything that the later commands read is there."""
    for name in ("run.json", "environment.json", "metrics.jsonl", "result.json", "report.html"):
        assert (run / name).stat().st_size > 0
    assert [row["step"] for row in metrics(run)] == [1, 2]


def test_the_default_directory_names_recipe_and_seed(tmp_path, monkeypatch, capsys):
    """runs/RECIPE-seedN-TIME under the working directory."""
    monkeypatch.chdir(tmp_path)
    assert "report: runs/sudoku_egspo-seed3-" in ok(
        capsys, "train", "sudoku_egspo", *TINY, "--seed", 3
    )
    assert len(list(Path("runs").glob("sudoku_egspo-seed3-*/report.html"))) == 1


def test_pretrain_fills_the_cache_once(capsys):
    """The second time there is nothing to train; --seed is another base."""
    options = [*TINY, "--base.lr", "0.002"]
    assert "pre-training step 2" in ok(capsys, "pretrain", "sudoku_egspo", *options)
    again = ok(capsys, "pretrain", "sudoku_egspo", *options)
    assert "pre-training" not in again and "parameters" in again
    assert "pre-training step 2" in ok(capsys, "pretrain", "sudoku_egspo", *options, "--seed", 1)


def numbers(line: str) -> dict[str, float]:
    return {n: float(v) for n, v in re.findall(r"(\w+) (\d\.\d+) ±", line)}


def test_eval_repeats_the_numbers_of_the_run(run, capsys):
    """Same checkpoint, prompts and noise as the last row of the run's own table."""
    found = numbers(ok(capsys, "eval", run, "--n", 16))
    table = json.loads((run / "result.json").read_text())["rows"][-1]["metrics"]
    assert found == {name: round(m["mean"], 3) for name, m in table.items()}


def test_eval_with_another_decoder_split_seed_and_precision(run, capsys):
    """Each option changes what it names; the noise of another seed is other noise."""
    line = ok(capsys, "eval", run, "--split", "validation", "--n", 64)
    assert "validation, 4 steps, random order, temperature 1" in line
    other = ok(
        capsys, "eval", run, "--n", 64, "--steps", 2, "--order", "max_prob", "--temperature", 0
    )
    assert "test, 2 steps, max prob order, temperature 0" in other
    plain = numbers(ok(capsys, "eval", run, "--n", 64))
    assert numbers(ok(capsys, "eval", run, "--n", 64, "--seed", 5)) != plain
    assert numbers(ok(capsys, "eval", run, "--n", 64, "--seed", 0)) == plain
    double = numbers(ok(capsys, "eval", run, "--n", 64, "--precision", "float64"))
    assert double == pytest.approx(plain, abs=0.02)


def test_sample_completes_a_given_puzzle(run, capsys):
    """Given cells stay, blanks are filled, and the reward terms stand between the two grids."""
    text = ok(capsys, "sample", run, "--prompts", PUZZLE)
    before, terms, after = re.split(r"(.*cell_accuracy.*\n)", text)
    given, filled = (re.sub(r"[^\d.]", "", grid) for grid in (before, after))
    assert given == PUZZLE.replace("0", ".")
    assert "solve_rate" in terms and len(filled) == 16 and "." not in filled
    assert all(a in (".", b) for a, b in zip(given, filled, strict=True))


def test_sample_draws_test_prompts(run, capsys):
    """--n of them, from the first again after the last; another seed gives other samples."""
    many = ok(capsys, "sample", run, "--split", "validation", "--n", 257)
    entries = many.split("\n\n")
    assert len(entries) == 257 and entries[0][:20] == entries[256][:20]
    text = ok(capsys, "sample", run, "--n", 3)
    assert text.count("cell_accuracy") == 3
    assert ok(capsys, "sample", run, "--n", 3, "--seed", 1) != text


def test_report_is_written_again(copy, tmp_path, capsys):
    """By default where it was, else where --out says."""
    (copy / "report.html").unlink()
    assert ok(capsys, "report", copy).strip() == str(copy / "report.html")
    ok(capsys, "report", copy, "--out", tmp_path / "elsewhere.html")
    assert "<svg" in (tmp_path / "elsewhere.html").read_text()


def test_list_and_cite(capsys):
    """Every recipe and algorithm with one line each; the citation is BibTeX."""
    text = ok(capsys, "list")
    for name in ("sudoku_egspo", "sudoku_reinforce", "egspo", "reinforce"):
        assert re.search(rf"^  {name} +\S", text, re.M)
    assert "replace" not in text  # a helper that recipes import is no recipe
    assert "2603.12554" in ok(capsys, "cite", "egspo")


def test_bench_writes_its_rows(tmp_path, capsys):
    """The JSON has the documented keys, for a recipe from a file too."""
    small = tmp_path / "small.py"
    small.write_text(
        "from dataclasses import replace\nfrom rescore_recipes.sudoku import sudoku_egspo\n"
        "def small():\n    run = sudoku_egspo()\n"
        "    model = replace(run.base.model, width=16, depth=1, heads=2)\n"
        "    return replace(run, base=replace(run.base, steps=2, model=model), batch_size=16)\n"
    )
    rows = tmp_path / "rows.json"
    ok(capsys, "bench", small, "--repeats", 5, "--json", rows, "--precision", "float64")
    (row,) = json.loads(rows.read_text())
    keys = {"recipe", "overhead", "rollout_s", "reward_s", "update_s", "bare_s", "rows", "peak_mb"}
    assert keys <= set(row) and row["overhead"] > 0


def test_verify_writes_its_rows_and_fails_with_them(tmp_path, monkeypatch, capsys):
    """Exit 0 when every row is ok; exit 1, with the rows written, when one is not."""
    import rescore.proof.verify as proof
    from rescore.proof.cases import Claim

    cases = list(proof.CASES["reinforce"]())
    kept: list[Claim] = [case for case in cases if case.factor == 0.5][:1]
    monkeypatch.setattr(proof, "CASES", {"reinforce": lambda: iter(kept)})
    file = tmp_path / "rows.json"
    assert "1 rows, 1 ok" in ok(capsys, "verify", "reinforce", "--json", file)
    (row,) = json.loads(file.read_text())
    assert row["claimed"] == "scaled" and row["factor"] == 0.5 and row["ok"] is True
    kept[0] = proof.replace(kept[0], factor=1.0)  # a false claim
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", "reinforce", "--json", str(file)])
    assert stop.value.code == 1
    assert json.loads(file.read_text())[0]["ok"] is False


# Resuming -----------------------------------------------------------------------------------------


def test_resume_needs_only_the_directory_and_equals_the_longer_run(copy, tmp_path, capsys):
    """Two steps and two more give the metrics of four, but for the times."""
    ok(capsys, "train", "--resume", copy, "--steps", 4)
    ok(capsys, "train", "sudoku_egspo", *TINY, "--steps", 4, "--out", tmp_path / "four")
    assert metrics(copy) == metrics(tmp_path / "four")
    assert len(metrics(copy)) == 4
    assert json.loads((copy / "run.json").read_text())["config"]["steps"] == 4


def test_resume_into_another_configuration_shows_the_fields(copy, capsys):
    """Both values of each field that differs."""
    said = mistake(capsys, "train", "--resume", copy, "--optim.lr", "0.5", "--group-size", 4)
    assert re.search(r"optim.lr: [0-9.]+ in the run, 0.5 now", said)
    assert "group_size: 8 in the run, 4 now" in said
    said = mistake(capsys, "train", "sudoku_reinforce", "--resume", copy)
    assert "is a run of 'sudoku_egspo', not of 'sudoku_reinforce'" in said
    assert "leave --out away" in mistake(capsys, "train", "--resume", copy, "--out", "x")


def test_a_recipe_file_serves_after_it_is_gone(tmp_path, monkeypatch, capsys):
    """The copy in the run directory evaluates, samples and resumes, also when moved."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("alone.py", "alone.py"), ("two.py", "two.py:recipe")):
        Path(name).write_text(RECIPE + ("\ndef other(): ...\n" if name == "two.py" else ""))
        out = name.removesuffix(".py")
        ok(capsys, "train", source, "--out", out, *TINY)
        Path(name).unlink()
        assert " ones 0." in ok(capsys, "eval", out, "--n", 16)
        before = json.loads(Path(out, "run.json").read_text())
        ok(capsys, "train", "--resume", out, "--steps", 3)
        after = json.loads(Path(out, "run.json").read_text())
        assert after["recipe"] == before["recipe"] == source
        Path(out).rename("moved-" + out)
        assert "ones 0." in ok(capsys, "sample", f"moved-{out}")


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", ["unknown command 'trian'", "did you mean 'train'?"]),
        ("train sudoku_egpso", ["unknown recipe 'sudoku_egpso'", "did you mean 'sudoku_egspo'?"]),
        ("train sudoku_egspo --optim.rl 1", ["--optim.rl", "--optim.lr FLOAT"]),
        ("train sudoku_egspo --batchsize 8", ["--batchsize", "--batch-size INT"]),
        ("train sudoku_egspo --steps many", ["--steps", "many"]),
        ("train sudoku_egspo --precision float8", ["float8", "bfloat16"]),
        ("train", ["first argument is missing", "rescore train RECIPE|FILE.py"]),
        ("eval", ["first argument is missing", "rescore eval RUN"]),
        ("cite egpso", ["unknown algorithm 'egpso'", "did you mean 'egspo'?"]),
        ("verify reinforc", ["unknown algorithm 'reinforc'", "did you mean 'reinforce'?"]),
        ("bench sudoku_egsp", ["unknown recipe", "did you mean 'sudoku_egspo'?"]),
        ("bench sudoku_egspo --repeats 1", ["repeats=1", "at least 5"]),
        ("list all", ["all"]),
        ("train nowhere.py", ["nowhere.py is not a file"]),
        ("eval nowhere", ["nowhere is not a run directory"]),
        ("report nowhere", ["nowhere"]),
        ("train --resume nowhere", ["nowhere is not a run directory"]),
        ("train sudoku_egspo --group-size 1", ["group_size=1", "baseline='group_mean'"]),
        ("train sudoku_egspo --batch-size 12", ["batch_size=12", "group_size=8"]),
        ("train sudoku_egspo --decoder.blocks 3", ["steps=4 does not split into blocks=3"]),
        ("train sudoku_egspo --decoder.temperature 0", ["temperature=0", "deterministic"]),
        ("train sudoku_egspo --device warp", ["device 'warp' cannot be used here"]),
        ("pretrain sudoku_egspo --batch-size 12", ["batch_size=12"]),
    ],
)
def test_a_mistake_costs_one_message(arguments, words, tmp_path, monkeypatch, capsys):
    """Exit 2 and, on stderr alone, what was wrong and what to do; nothing is written."""
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, *arguments.split())
    for word in words:
        assert word in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts", "1100" + "0" * 12], ["number 0 of the given puzzles", "no solution"]),
        (["--prompts", PUZZLE, "0" * 16], ["number 1 of the given puzzles", "more than one"]),
        (["--prompts", "12"], ["2 cells; expected 16"]),
        (["--n", "0"], ["n must be at least 1, got 0"]),
        (["--order", "backwards"], ["backwards", "left_to_right"]),
        (["--steps", "0"], ["steps"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--device", "warp"], ["device 'warp' cannot be used here"]),
        (["--split", "tset"], ["tset", "validation"]),
        (["--out", "sheet.png"], ["no pictures to write to sheet.png"]),
    ],
)
def test_mistakes_about_a_finished_run(run, options, words, capsys):
    """A puzzle without solution, and every option of `sample` (`eval` shares them)."""
    said = mistake(capsys, "sample", run, *options)
    for word in words:
        assert word in said


def test_the_output_directory_must_be_empty_and_writable(run, tmp_path, capsys):
    """Neither an earlier run nor a path below a regular file is touched."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "empty" in mistake(capsys, "train", "sudoku_egspo", *TINY, "--out", run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "below"
    assert str(below) in mistake(capsys, "train", "sudoku_egspo", *TINY, "--out", below)
    assert str(below.parent) in mistake(capsys, "report", run, "--out", below)


def test_several_processes_need_a_common_directory(monkeypatch, capsys):
    """Each would make up a directory of its own from the time of day."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--out DIR" in mistake(capsys, "train", "sudoku_egspo", *TINY)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1 / 0\n", ["my.py, line 1: ZeroDivisionError"]),
        ("def recipe(:\n", ["my.py: SyntaxError", "line 1"]),
        ("import nowhere_to_be_found\n", ["my.py, line 1: ModuleNotFoundError"]),
        ("def recipe():\n    x = {}\n    return x['a']\n", ["my.py, line 3: KeyError: 'a'"]),
        ("def recipe():\n    return 7\n", ["returned int; expected a Run"]),
        ("def _private(): ...\ndef f(x): ...\nfrom os import getcwd\n", ["my.py has no recipe"]),
        ("def a(): ...\ndef b(): ...\n", ["several recipes", "my.py:a, my.py:b"]),
        (
            "from rescore import Decoder\ndef recipe():\n    Decoder(steps=4, blocks=3)\n",
            ["my.py, line 3: ValueError: decoder: steps=4 does not split into blocks=3"],
        ),
    ],
)
def test_a_faulty_recipe_file_is_named_with_its_line(source, words, tmp_path, monkeypatch, capsys):
    """Whatever a recipe file does wrong, the message says where."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(source)
    said = mistake(capsys, "train", "my.py")
    for word in words:
        assert word in said


def test_the_closest_recipe_of_a_file(tmp_path, monkeypatch, capsys):
    """`FILE.py:function` is looked up in the file."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("def small(): ...\ndef large(): ...\n")
    assert "did you mean 'small'?" in mistake(capsys, "train", "my.py:smal")


def test_a_failing_reward_stops_with_the_sample_and_keeps_the_checkpoint(tmp_path, capsys):
    """The term, the sample and the exception in one message; the run can be looked at."""
    source = RECIPE.replace(
        "(outputs == 0).float().mean(1)",
        "(outputs == 0).float().mean(1) / (0 if int(prompts.sample_id[0]) >= 16 else 1)",
    )
    (tmp_path / "my.py").write_text(source)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(tmp_path / "my.py"), "--out", str(tmp_path / "out"), *TINY])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert "reward term 'ones' returned" in said and "sample_id 16" in said
    assert (tmp_path / "out" / "checkpoints" / "00000001" / "manifest.json").exists()


# Bugs, and the process as a whole -----------------------------------------------------------------


def test_a_bug_is_not_mistaken_for_a_mistake(monkeypatch):
    """Only what we raise on purpose becomes a message; anything else keeps its traceback."""
    for bug in (lambda _: int("x"), lambda _: list(zip([1], [], strict=True)), lambda _: {}[1]):
        monkeypatch.setitem(cli.COMMANDS, "list", bug)
        with pytest.raises((ValueError, KeyError)):
            cli.main(["list"])


def test_ctrl_c_before_training_exits_130(monkeypatch, capsys):
    """Also where there is nothing to save."""

    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.main(["list"])
    assert stop.value.code == 130 and "stopped" in capsys.readouterr().err


def test_every_command_explains_itself(capsys):
    """--help lists all commands; COMMAND --help exits 0 and prints to stdout."""
    text = ok(capsys, "--help")
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +\S", text, re.M)
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code in (0, None)
        assert f"rescore {name}" in capsys.readouterr().out


def test_the_options_of_a_recipe_are_its_fields(capsys):
    """Field names with their docstrings, --seed, --device and --precision among them."""
    with pytest.raises(SystemExit):
        cli.main(["train", "sudoku_egspo", "--help"])
    text = capsys.readouterr().out
    for option in ("--seed", "--device", "--precision", "--algorithm.n-steps", "--out", "--resume"):
        assert option in text
    assert "Samples per prompt" in text


def python_m(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rescore", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_exit_codes_of_the_process():
    """0 for what works; 2, one line and no traceback for a mistake."""
    good = python_m("--version")
    assert (good.returncode, good.stderr) == (0, "") and good.stdout.strip() == "0.1.0"
    bad = python_m("cite", "egpso")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: unknown algorithm") and bad.stderr.count("\n") == 1


def test_help_does_not_wait_for_torch():
    """Neither the package nor the command line imports torch before it must."""
    code = "import sys, rescore.cli as c; c.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_exists():
    """`from rescore import X` works for each name announced, and for no other."""
    import rescore

    for name in rescore._MODULE:
        assert getattr(rescore, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = rescore.Nonsense
