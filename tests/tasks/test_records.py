"""Records: every kind of source gives the same rows, and splits share no content."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys

import pytest

from rescore.tasks.records import read_records, split_by_content, without

ROWS = [
    {"question": "What is 2 + 3, written\nas a number?", "answer": "5"},
    {"question": 'Half of "ten", please', "answer": "5"},
    {"question": "½ of 8 — naïvely", "answer": "4"},
]
KINDS = ["jsonl", "json", "csv", "parquet"]


def write(path, rows=ROWS):
    """The rows in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {"question": pyarrow.string(), "answer": pyarrow.string()}
        parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(columns)), path)
    return str(path)


# Sources


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_split_itself(tmp_path, kind):
    """The same rows in the same order from every kind, with line breaks, quotes and accents."""
    source = write(tmp_path / f"problems.{kind}")
    assert read_records(source, "train") == read_records(source, "test") == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_a_file_per_split(tmp_path, kind):
    """Named like the split; other files are left alone."""
    write(tmp_path / f"train.{kind}")
    write(tmp_path / f"test.{kind}", ROWS[:1])
    (tmp_path / "train.md").write_text("what this is")
    assert read_records(str(tmp_path), "train") == ROWS
    assert read_records(str(tmp_path), "test") == ROWS[:1]


def test_a_line_is_what_a_line_break_ends(tmp_path):
    """Other separators of Unicode belong to the text; blank lines and a byte order mark do not."""
    path, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    row = {"question": "one\u2028two\x85three"}
    text = json.dumps(row, ensure_ascii=False)
    path.write_text(f"\ufeff{text}\r\n\n{text}\n\n", encoding="utf-8")
    assert read_records(str(path), "train") == [row, row]
    table.write_text(f"\ufeffquestion\r\n{row['question']}\r\n", encoding="utf-8")
    assert read_records(str(table), "train") == [row]


def test_a_data_set_is_loaded_through_its_library(tmp_path, monkeypatch):
    """Here one that lies in the working directory, under the name it would have on the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "someone" / "problems" / "train.jsonl")
    write(tmp_path / "someone" / "problems" / "test.jsonl", ROWS[2:])
    assert read_records("hub:someone/problems", "train") == ROWS
    assert read_records("hub:someone/problems", "test") == ROWS[2:]
    assert read_records("hub:someone/problems:default", "test") == ROWS[2:]
    with pytest.raises(ValueError, match="split 'dev' of 'hub:someone/problems' cannot be loaded"):
        read_records("hub:someone/problems", "dev")
    with pytest.raises(ValueError, match="'hub:someone/problems:easy' cannot be loaded.*easy"):
        read_records("hub:someone/problems:easy", "train")


# Bad sources


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"a\.jsonl:3 is no JSON: .*delimiter"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2 is a list; expected an object"),
        ("a.jsonl", "", r"a\.jsonl' has no records in split 'train'"),
        ("a.jsonl", "\n\n", r"a\.jsonl' has no records"),
        ("a.json", "", r"a\.json' has no records"),
        ("a.json", "[]", r"a\.json' has no records"),
        ("a.json", '{"a": 1}', r"a\.json holds a dict; expected a list"),
        ("a.json", '[{"a": 1}, "b"]', r"a\.json, entry 1 is a str; expected an object"),
        ("a.json", "[1,", r"a\.json is no JSON"),
        ("a.csv", "", r"a\.csv' has no records"),
        ("a.csv", "a,b\n", r"a\.csv' has no records"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3 does not have the 2 columns"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2 does not have the 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv:2 is no CSV"),
        ("a.txt", "1", r"a\.txt' is of no known kind; expected one of \.jsonl, "),
        ("a", "1", "is of no known kind"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path, name, text, message):
    """And with what is wrong with it."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(str(tmp_path / name), "train")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_of_other_bytes_is_refused(tmp_path, kind):
    """Neither UTF-8 nor a table."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / f"a.{kind}").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"a.{kind}'? is (not UTF-8|no Parquet)"):
        read_records(str(tmp_path / f"a.{kind}"), "train")


def test_a_missing_source_is_named(tmp_path):
    """A path that is not there, and a folder without the split or with two files for it."""
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' does not exist; expected a file"):
        read_records(str(tmp_path / "nowhere.jsonl"), "train")
    write(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"has 0 files for split 'test' \(\['train\.jsonl'\]\)"):
        read_records(str(tmp_path), "test")
    write(tmp_path / "train.json")
    with pytest.raises(ValueError, match=r"has 2 files for split 'train' \(\['train\.json', "):
        read_records(str(tmp_path), "train")


@pytest.mark.parametrize(
    "source", ["hub:", "hub:name", "hub:owner/", "hub:/name", "hub:a/b/c", "hub:a/b:c:d"]
)
def test_a_name_that_no_data_set_has_is_refused(source):
    """Before anything is looked up."""
    with pytest.raises(ValueError, match=f"'{source}' names no data set; expected 'hub:owner/name"):
        read_records(source, "train")


@pytest.mark.parametrize(("source", "module"), [("hub:a/b", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, source, module):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf'{source}.*{module}.*pip install "rescore\[data\]"'):
        read_records(source, "train")


# Splits

MANY = [{"question": f"What is {n} + 1?", "n": n} for n in range(2000)]
SHARES = {"train": 0.7, "validation": 0.2, "extra": 0.1}


def numbers(parts):
    return {name: [record["n"] for record in part] for name, part in parts.items()}


def test_every_record_goes_to_one_part_in_about_the_asked_sizes():
    """Nothing is lost or doubled, order is kept; sizes are binomial, to five standard errors."""
    parts = numbers(split_by_content(MANY, "question", SHARES))
    assert sorted(itertools.chain.from_iterable(parts.values())) == list(range(2000))
    for name, share in SHARES.items():
        assert parts[name] == sorted(parts[name])
        assert abs(len(parts[name]) - 2000 * share) < 5 * (2000 * share * (1 - share)) ** 0.5


def test_parts_depend_on_content_alone():
    """Not on the order, on other columns or on other records: on sha256 of the question."""
    parts = numbers(split_by_content(MANY, "question", SHARES))
    shuffled = [{**record, "note": "x"} for record in MANY[::-1][:1500]]
    again = numbers(split_by_content(shuffled, "question", SHARES))
    assert all(set(again[name]) == {n for n in parts[name] if n >= 500} for name in SHARES)
    for name, part in parts.items():
        for n in part:
            place = int(hashlib.sha256(f"whatis{n}+1?".encode()).hexdigest(), 16) / 2**256
            assert name == ("train" if place < 0.7 else "validation" if place < 0.9 else "extra")


def test_equal_texts_are_never_on_two_sides():
    """Case and spacing do not make a text another."""
    variants = [
        {"question": text, "n": record["n"]}
        for record in MANY[:300]
        for text in (
            record["question"],
            record["question"].upper(),
            f"  {record['question']}\n".replace(" + ", "\t+  "),
        )
    ]
    parts = numbers(split_by_content(variants, "question", SHARES))
    assert sum(len(set(part)) for part in parts.values()) == 300
    assert all(part.count(n) == 3 for part in parts.values() for n in part)


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}]
)
def test_shares_that_are_none_are_refused(shares):
    """They are positive and add up to one."""
    with pytest.raises(ValueError, match=r"shares are .*; expected positive numbers with sum 1"):
        split_by_content(MANY, "question", shares)


def test_an_empty_part_is_refused():
    """Too few records for the share; the message says which part."""
    with pytest.raises(ValueError, match="of 3 records none fell to 'b', whose share is 1e-06"):
        split_by_content(MANY[:3], "question", {"a": 1 - 1e-6, "b": 1e-6})


def test_what_stands_in_the_test_set_is_dropped():
    """Whatever its case and spacing and its other columns; the rest stays in order."""
    held_out = [{"question": " what is 3+1? "}, {"question": "What is 5 + 1?", "n": 99}]
    assert [record["n"] for record in without(MANY[:8], held_out, "question")] == [0, 1, 2, 4, 6, 7]
    assert without(MANY[:8], [], "question") == MANY[:8]


def test_nothing_left_to_train_on_is_refused():
    """The message counts both sides."""
    with pytest.raises(ValueError, match=r"all 16 records .* test set, which has 9 distinct texts"):
        without(MANY[:8] * 2, MANY[:9], "question")
