"""Every example runs as a script and shows what it is there to show.

Most are started as a user would; two run in this process, which has imported everything.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = [
    ("your_own_reward", "row_validity"),
    ("your_own_model", "reward"),
    ("your_own_algorithm", "reward"),
]


def output(name: str, directory: Path) -> str:
    """What an example prints, run as a script in an empty directory."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "RESCORE_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys, undrawn):
    """As ``output`` in ``tmp_path``, without another process."""

    def run(name: str) -> str:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", [path])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def before_and_after(text: str, metric: str) -> list[float]:
    """A metric in the rows that a run prints at its end."""
    return [
        float(value) for value in re.findall(rf"^(?:base|after).*? {metric} (\S+) ±", text, re.M)
    ]


def test_every_example_is_tested_here():
    """A new example without a test fails this one."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"loop_by_hand", "enumerate_the_gradient", *(name for name, _ in RECIPES)}


def test_loop_by_hand(tmp_path):
    """RL raises the reward on unseen puzzles."""
    text = output("loop_by_hand", tmp_path)
    before, after = (float(x) for x in re.findall(r"^(?:before|after): +(\S+)", text, re.M))
    assert after > before + 0.02


def test_enumerate_the_gradient(tmp_path):
    """Zero bias where it is claimed; a half for the group mean; more where tokens miss a part."""
    text = output("enumerate_the_gradient", tmp_path)
    assert "sum to 1.000000000000" in text
    by_hand = float(re.findall(r"exact gradient by (\S+)", text)[0])
    assert by_hand < 1e-12
    bias = [float(x) for x in re.findall(r"^  .* (\S+) +\S+ +\S+$", text, re.M)]
    none, leave_one_out, group_mean, top, importance = bias[:5]
    assert max(none, leave_one_out, importance) < 1e-10
    assert group_mean == 0.5 and top > 0.1
    assert min(bias[5:]) > 0.1


@pytest.mark.parametrize(("name", "metric"), RECIPES)
def test_recipes_of_the_user(name, metric, shown, tmp_path):
    """What was brought along is trained with, evaluated on unseen puzzles, and gets better."""
    script = name == "your_own_reward"
    text = output(name, tmp_path) if script else shown(name)
    before, after = before_and_after(text, metric)
    assert after > before
    (report,) = tmp_path.glob(f"runs/{name}-seed0-*/report.html")
    assert ("<svg " in report.read_text()) == script
    if name == "your_own_algorithm":
        bias = [float(x) for x in re.findall(r"bias (\S+),", text)]
        assert bias[0] > bias[1] > 0.1 and bias[2] < 1e-10
