"""Plant classic mistakes in a copy of the source, one at a time: the named test must fail.

Each mistake was made in some public code base for RL on diffusion models, or is one we could make. The
patch is exact text, so a refactoring that moves it makes this test fail loudly and not pass silently.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """A mistake and the test that catches it."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS: list[Mutation] = []


def run_test(source: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run one test against the package in ``source``."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree to spoil."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src"


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_classic_mistake_is_caught(mutation: Mutation, source: Path):
    """The named test passes on our source and fails once the mistake is planted."""
    path = source / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} must occur once in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new))
    result = run_test(source, mutation.test)
    assert result.returncode == 1, f"the mistake survived {mutation.test}:\n{result.stdout}"
    assert " failed" in result.stdout, result.stdout


@pytest.mark.slow
def test_the_named_tests_pass_without_a_mistake(source: Path):
    """A test that always fails would catch every mistake; and the copy must be what is tested."""
    where = [sys.executable, "-c", "import rescore; print(rescore.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(source)}
    found = subprocess.run(where, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(source))
    for test in sorted({mutation.test for mutation in MUTATIONS}):
        result = run_test(source, test)
        assert result.returncode == 0, result.stdout
