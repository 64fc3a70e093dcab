"""The loader of measured sequences: what it reads and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from rescore.tasks.dna import Dna
from rescore.tasks.dna_sequences import background, membership
from rescore.tasks.gosai import Gosai

HEADER = "seq,hepg2,k562,sknsh"


def letters(tokens) -> str:
    return "".join("ACGT"[token] for token in tokens)


@pytest.fixture(scope="module")
def rows():
    return background(120, np.random.default_rng(2))


def write(path, lines, separator=","):
    path.write_text("\n".join(line.replace(",", separator) for line in lines) + "\n")
    return str(path)


def good(rows, n=None):
    return [HEADER, *(f"{letters(row)},{i}.5,{-i},{2 * i}" for i, row in enumerate(rows[:n]))]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.txt", "\t")])
def test_letters_and_activities_are_read(tmp_path, rows, name, separator):
    path = write(tmp_path / name, good(rows), separator)
    for cell, expected in (("hepg2", 3.5), ("k562", -3.0), ("sknsh", 6.0)):
        found = Gosai(path=path, cell=cell).everything()
        assert torch.equal(found.tokens, torch.tensor(rows))
        assert found.activity[3] == expected
        assert found.accessible is None


def test_other_columns_order_and_lower_case_do_not_matter(tmp_path, rows):
    """As in a table with an index and a chromosome, written with soft-masked repeats."""
    text = letters(rows[0])
    path = write(tmp_path / "a.csv", [",k562,chr,seq,sknsh,hepg2", f"0,1,7,{text.lower()},2,-3.25"])
    found = Gosai(path=path).everything()
    assert letters(found.tokens[0]) == text and found.activity.tolist() == [-3.25]


def test_a_sequence_counts_once_with_its_first_measurement(tmp_path, rows):
    lines = good(rows, 3)
    path = write(tmp_path / "a.csv", [*lines, f"{letters(rows[1])},9,9,9"])
    assert Gosai(path=path).everything().activity.tolist() == [0.5, 1.5, 2.5]


def test_limit_reads_the_top(tmp_path, rows):
    path = write(tmp_path / "a.csv", [*good(rows, 3), "broken"])
    assert len(Gosai(path=path, limit=2).everything().tokens) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: f"{text[:-1]},1,2,3", "line 4: a sequence of 199 letters; expected 200"),
        (lambda text: f"{text[:7]}N{text[8:]},1,2,3", "line 4: letter 8 is 'N'"),
        (lambda text: f"{text[:7]}é{text[8:]},1,2,3", "line 4: letter 8 is 'é'"),
        (lambda text: f"{text[:7]}Ω{text[8:]},1,2,3", "line 4: letter 8 is 'Ω'"),
        (lambda text: f"{text},high,2,3", "line 4: hepg2 is 'high'; expected a finite number"),
        (lambda text: f"{text},nan,2,3", "line 4: hepg2 is 'nan'; expected a finite number"),
        (lambda text: text, "line 4: hepg2 is ''"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, rows, change, message):
    path = write(tmp_path / "a.csv", [*good(rows, 2), change(letters(rows[2])), *good(rows)[4:]])
    with pytest.raises(ValueError, match=re.escape(f"'{path}', {message}")):
        Gosai(path=path).everything()


def test_missing_columns_are_named(tmp_path):
    path = write(tmp_path / "a.csv", ["sequence,hepg2,k562", "ACGT,1,2"])
    with pytest.raises(
        ValueError, match=re.escape(f"'{path}', line 1: the columns ['seq', 'sknsh'] are")
    ):
        Gosai(path=path).check()


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for path, message in (
        (str(tmp_path / "none.csv"), "cannot be read"),
        (str(tmp_path / "a.parquet"), "ends in '.parquet'; expected one of"),
        (write(tmp_path / "empty.csv", [HEADER]), "a header and no rows"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Dna(library=Gosai(path=path)).check()
    (tmp_path / "b.csv").write_bytes(b"seq,hepg2,k562,sknsh\n\xff\xfe,1,2,3\n")
    with pytest.raises(ValueError, match="is no table of text"):
        Gosai(path=str(tmp_path / "b.csv")).check()
    with pytest.raises(ValueError, match="cell is 'hela'"):
        Gosai(path="a.csv", cell="hela")
    with pytest.raises(ValueError, match="limit is 0"):
        Gosai(path="a.csv", limit=0)


def test_the_task_runs_on_a_file(tmp_path, rows):
    """Splits are by content; no accessibility and no truth are known, so neither is reported."""
    task = Dna(library=Gosai(path=write(tmp_path / "a.csv", good(rows))))
    task.check()
    assert list(task.reward.functions) == ["activity", "eval_activity"]
    for split in ("train", "validation", "test"):
        clean = task.clean(split).x_0
        assert all(membership(row)[0] == split for row in clean.tolist())
    assert sum(len(task.clean(s).x_0) for s in ("train", "validation", "test")) == 120
    with pytest.raises(ValueError, match="accessibility"):
        task.classifier(torch.tensor(rows[:2]))
