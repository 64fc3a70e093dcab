"""Records from files and the Hugging Face hub, and splits of them that share no content.

A source is one of

    data/problems.jsonl          a file: .jsonl, .json (a list of objects), .csv or .parquet
    data/                        a folder with one file per split: train.jsonl, test.csv, ...
    hub:owner/name               a data set of the hub, in the split's name
    hub:owner/name:config        the same with a configuration
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

from rescore.tasks.task import Split

T = TypeVar("T")

Record = Mapping[str, Any]
"""One row: column name to value."""

HUB = "hub:"
"""How a source on the hub begins."""


def read_records(source: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split, in the order of the source.

    Args:
        source: a file, a folder or a data set of the hub, as above.
        split: which file of a folder, which split of a data set. A file is the split itself.

    Raises:
        ValueError: the source is missing, empty or cannot be read; the message names it, and the
            line where there is one. Or a package is needed that is not installed.
    """
    if source.startswith(HUB):
        records = _from_hub(source, split)
    else:
        path = _file(source, split)
        records = _READERS[path.suffix](path)
    if not records:
        raise ValueError(f"'{source}' has no records in split '{split}'; expected at least one")
    return records


def read_split(
    source: str,
    split: Split,
    *,
    read: Callable[[Record], T],
    content: Callable[[T], tuple[int, ...]],
    split_of: Callable[[tuple[int, ...]], Split],
) -> list[tuple[str, T]]:
    """The rows of a split, read, each after the place where it stands; splits share no content.

    A folder has a file for each split: of one, what has the content of a row in a later split is
    left out, so that the test file is taken as it is. Anything else is one table, split by content.

    Args:
        source: see ``read_records``.
        split: the split that is asked for.
        read: what a record says; its errors are raised again with the place.
        content: what no two splits may share.
        split_of: the split of a content.

    Raises:
        ValueError: the source cannot be read, or one of its rows.
    """
    if not Path(source).expanduser().is_dir():
        rows = _placed(source, "train", read)
        return [(place, row) for place, row in rows if split_of(content(row)) == split]
    later = get_args(Split)[get_args(Split).index(split) + 1 :]
    held_out = {content(row) for other in later for _, row in _placed(source, other, read)}
    rows = _placed(source, split, read)
    return [(place, row) for place, row in rows if content(row) not in held_out]


def _placed(source: str, split: str, read: Callable[[Record], T]) -> Iterator[tuple[str, T]]:
    for number, record in enumerate(read_records(source, split)):
        place = f"row {number} of '{source}', split '{split}'"
        with located(place):
            row = read(record)
        yield place, row


@contextmanager
def located(place: str) -> Iterator[None]:
    """Put the place in front of the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def split_by_content(
    records: Sequence[Record], key: str, shares: Mapping[str, float]
) -> dict[str, list[Record]]:
    """Parts of the given expected sizes, by a hash of the text in column ``key`` alone.

    Equal texts go to the same part, whatever else is in the file and in which order: adding records
    moves none from one part to another. Case and spacing do not count.

    Args:
        records: rows with a text in column ``key``.
        key: the column that says what a record is about.
        shares: name of each part to its share; positive, sum 1.

    Raises:
        ValueError: the shares are no shares, or a part stays empty.
    """
    if not shares or min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1):
        raise ValueError(f"shares are {dict(shares)}; expected positive numbers with sum 1")
    parts: dict[str, list[Record]] = {name: [] for name in shares}
    for record in records:
        parts[_part(content(record, key), shares)].append(record)
    for name, part in parts.items():
        if not part:
            raise ValueError(
                f"of {len(records)} records none fell to '{name}', whose share is {shares[name]}; "
                f"give more records or a larger share"
            )
    return parts


def without(records: Sequence[Record], held_out: Iterable[Record], key: str) -> list[Record]:
    """The records whose text in column ``key`` is not among those held out for testing.

    Case and spacing do not count.

    Raises:
        ValueError: nothing is left; the message counts.
    """
    secret = {content(record, key) for record in held_out}
    kept = [record for record in records if content(record, key) not in secret]
    if not kept:
        raise ValueError(
            f"all {len(records)} records to train on also stand in the test set, which has "
            f"{len(secret)} distinct texts in column '{key}'; give other training data"
        )
    return kept


def content(record: Record, key: str) -> str:
    """The text of a record without case and spacing, to compare it with others."""
    return "".join(record[key].casefold().split())


def place(text: str) -> float:
    """Where in [0, 1) the hash of a text falls."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _part(text: str, shares: Mapping[str, float]) -> str:
    """The share in which the place of a text lies."""
    end, here = 0.0, place(text)
    for name, share in shares.items():
        end += share
        if here < end:
            return name
    return list(shares)[-1]  # the shares add up to 1 but for rounding


def _file(source: str, split: str) -> Path:
    """The file of a source: itself, or the one of a folder that is named like the split."""
    path = Path(source).expanduser()
    known = ", ".join(_READERS)
    if path.is_dir():
        found = sorted(file for file in path.glob(f"{split}.*") if file.suffix in _READERS)
        if len(found) != 1:
            there = [file.name for file in found] or sorted(file.name for file in path.iterdir())
            raise ValueError(
                f"folder '{source}' has {len(found)} files for split '{split}' ({there[:10]}); "
                f"expected one {split}.* of the kinds {known}"
            )
        return found[0]
    if not path.is_file():
        raise ValueError(
            f"'{source}' does not exist; expected a file, a folder, or a data set as "
            f"'{HUB}owner/name'"
        )
    if path.suffix not in _READERS:
        raise ValueError(f"'{source}' is of no known kind; expected one of {known}")
    return path


def _from_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object per line; blank lines are skipped."""
    records = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            records.append(_object(_json(line, f"{path}:{number}"), f"{path}:{number}"))
    return records


def _from_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects."""
    rows = _json(_text(path), str(path)) if path.stat().st_size else []
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list of objects")
    return [_object(row, f"{path}, entry {number}") for number, row in enumerate(rows)]


def _from_csv(path: Path) -> list[dict[str, Any]]:
    """A header, then one row per record; every value is a string."""
    rows = csv.DictReader(io.StringIO(_text(path)), strict=True)
    records = []
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{rows.line_num} does not have the {len(rows.fieldnames or ())} "
                    f"columns of the header"
                )
            records.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.reader.line_num} is no CSV: {error}") from None
    return records


def _from_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a table."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _not_installed("pyarrow", f"'{path}'") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"'{path}' is no Parquet file: {error}") from error


_READERS = {
    ".jsonl": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
    ".parquet": _from_parquet,
}


def _from_hub(source: str, split: str) -> list[dict[str, Any]]:
    """The rows of a data set, from the cache of the ``datasets`` library or downloaded."""
    name, _, config = source.removeprefix(HUB).partition(":")
    owner, _, repository = name.partition("/")
    if not owner or not repository or ":" in config or "/" in repository:
        raise ValueError(f"'{source}' names no data set; expected '{HUB}owner/name[:config]'")
    try:
        from datasets import exceptions, load_dataset
    except ImportError:
        raise _not_installed("datasets", f"'{source}'") from None
    try:
        rows = load_dataset(name, config or None, split=split)
    except (OSError, ValueError, exceptions.DatasetsError) as error:
        raise ValueError(f"split '{split}' of '{source}' cannot be loaded: {error}") from error
    return [dict(row) for row in rows]


def _not_installed(package: str, source: str) -> ValueError:
    return ValueError(
        f"reading {source} needs the package {package}, which is not installed; "
        f'pip install "rescore[data]"'
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}; expected an object")
    return value
