"""Metrics files survive kills and full disks; the display shows what it is given, at any width."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import resource

import pytest
from rich.console import Console as Terminal

from rescore.training import log
from rescore.training.checkpoint import StorageError
from rescore.training.log import HEADLINES, Console, MetricsFile, TensorBoard

ROW = {name: 0.25 + i for i, name in enumerate(HEADLINES)}


def screen(width: int = 100, height: int = 40, *, kind: str | None = "xterm") -> Terminal:
    """A terminal in memory; a pipe where ``kind`` is None."""
    return Terminal(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=kind is not None,
        _environ={"TERM": kind or ""},
    )


def raw(terminal: Terminal) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def printed(terminal: Terminal) -> str:
    """What was printed, without escape sequences."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", raw(terminal))


def test_rows_come_back_bitwise(tmp_path):
    """Each row is in the file when ``log`` returns, and a second object appends."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    assert log.read(path) == []
    rows = [
        {"step": 1, "reward": 0.1 + 0.2, "split": "validation é", "n": 2**60},
        {"step": 2, "metrics": {"reward": {"mean": 5e-324}}},
    ]
    metrics.log(rows[0])
    assert log.read(path) == rows[:1]
    MetricsFile(path).log(rows[1])
    assert log.read(path) == rows
    metrics.close()


def test_non_finite_values_become_null_and_are_counted(tmp_path):
    """Every line is strict JSON, nested values included."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    row = {"step": 1, "a": math.nan, "b": {"c": -math.inf, "d": 1.0}}
    metrics.log(row)
    assert metrics.n_non_finite == 2
    assert math.isnan(row["a"])  # the row itself is left alone

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": {"c": None, "d": 1.0}}


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "rew', b"{", b'{"a": "\xc3', b'{"step": 9}'])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path, torn):
    """Rows after the checkpoint and a torn line go; the rest and what follows is bitwise equal."""
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    rows = [{"step": k, "reward": k / 3} for k in (1, 2, 2, 3, 4)]
    for path in (straight, killed):
        for row in rows:
            MetricsFile(path).log(row)
    with open(killed, "ab") as file:
        file.write(torn)
    kept = 6 if torn.endswith(b"}") else 5  # only the newline was lost
    assert len(log.read(killed)) == kept
    resumed = MetricsFile(killed)
    resumed.truncate_after(2)
    assert log.read(killed) == rows[:3]
    for row in rows[3:]:
        resumed.log(row)
    assert killed.read_bytes() == straight.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["killed.jsonl", "straight.jsonl"]


def test_a_complete_row_without_its_newline_is_kept_whole(tmp_path):
    """The next row starts on a line of its own."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}')
    metrics = MetricsFile(path)
    metrics.truncate_after(1)
    metrics.log({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    """Only the last line can be torn by a kill; anything else is not ours to guess."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: got .* remove that line"):
        log.read(path)


def test_a_full_disk_is_a_storage_error(tmp_path):
    """The file keeps its earlier rows, and can be read and cut."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.log({"step": 1})
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            metrics.log({"step": 2, "text": "x" * 1000})
        except StorageError as error:
            os._exit(3 if "metrics.jsonl: File too large" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert log.read(path) == [{"step": 1}]
    with pytest.raises(StorageError, match="Not a directory"):
        MetricsFile(path / "below")


def test_plain_lines_where_there_is_no_terminal():
    """About twenty lines for a run of any length, each whole on its line, without escapes."""
    terminal = screen(width=40, kind=None)
    with Console("a [run]", 1003, terminal=terminal) as console:
        console.evaluation({"reward": 0.5})
        for step in range(1, 1004):
            console.update(step, {**ROW, "step": step, "unwatched": 1.0})
            if step == 700:
                console.note("saved [x] at 700")
                console.evaluation({"reward": 0.75, "n": 512})
    lines = raw(terminal).splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert "\x1b" not in raw(terminal) and "unwatched" not in raw(terminal)
    assert len(steps) == 22 and steps[0].startswith("step 1/1003  reward 0.2500  solve_rate 1.250")
    assert steps[-1].startswith("step 1003/1003  ") and "  eta " in steps[-2]
    assert all(name in steps[3] for name in HEADLINES)
    assert lines[0] == "validation at step 0  reward 0.5000"
    assert lines[lines.index("saved [x] at 700") + 1] == (
        "validation at step 700  reward 0.7500  n 512"
    )


def test_a_dumb_terminal_gets_plain_lines():
    """Nothing is redrawn where the cursor cannot move."""
    terminal = screen(kind="dumb")
    with Console("run", 1, terminal=terminal) as console:
        console.update(1, ROW)
    assert printed(terminal).startswith("step 1/1  reward 0.2500")


def test_the_live_display():
    """Bar, training beside validation, the other metrics, and notes that stay above."""
    terminal = screen()
    with Console("a [run]", 60, terminal=terminal) as console:
        console.start_at(20)
        console.evaluation({"solve_rate": 0.125})
        console.update(21, {**ROW, "step": 21, "ratio_max": math.inf})
        console.note("saved [x]")
    text = printed(terminal)
    last = text[text.rindex("a [run]") :]
    assert "21/60" in last and "eta" in last
    assert re.search(r"training +validation at 20", last)
    assert re.search(r"solve_rate +1\.250 +0\.1250", last)
    assert re.search(r"reward +0\.2500", last) and re.search(r"ratio_max +inf", last)
    assert all(name in last for name in HEADLINES) and "step" not in last
    assert last.count("solve_rate") == 1
    assert "saved [x]" in text[: text.rindex("a [run]")]
    assert raw(terminal).endswith("\x1b[?25h")  # the cursor is visible again


def test_the_cursor_comes_back_after_an_error():
    """An exception, Ctrl-C included, leaves the terminal as it was and is passed on."""
    terminal = screen()
    with pytest.raises(KeyboardInterrupt), Console("run", 9, terminal=terminal):
        raise KeyboardInterrupt
    assert raw(terminal).endswith("\x1b[?25h")


def test_the_estimate_does_not_count_steps_of_an_earlier_run():
    """Resumed at 500 of 1000 with 100 steps a second, the other 499 take 5 s."""
    now = 0.0
    console = Console("run", 1000, terminal=screen())
    console._progress.get_time = lambda: now
    console.start_at(500)
    now += 0.01
    console.update(501, ROW)
    assert console._progress.tasks[0].time_remaining == 5


def test_slow_steps_have_an_estimate_too():
    """At a step in two minutes, after three steps, 14 minutes are left for the other seven."""
    now = 0.0
    console = Console("run", 10, terminal=screen())
    console._progress.get_time = lambda: now
    for step in range(1, 4):
        now += 120
        console.update(step, ROW)
    assert console._progress.tasks[0].time_remaining == 7 * 120


def test_only_the_enabled_process_prints():
    """Nothing at all from the others, on a terminal or off it."""
    for terminal in (screen(), screen(kind=None)):
        with Console("run", 2, enabled=False, terminal=terminal) as console:
            console.note("note")
            console.evaluation(ROW)
            console.update(2, ROW)
        assert printed(terminal) == ""


@pytest.mark.parametrize("width", [1, 2, 5, 13, 20, 40, 300])
def test_any_width_and_height(width):
    """The display never crashes and no line is wider than the terminal."""
    terminal = screen(width=width, height=3)
    with Console("a long title of a run", 60, terminal=terminal) as console:
        console.update(1, ROW)
        console.evaluation({"solve_rate": 0.5})
        console.update(60, ROW)
    assert max(map(len, printed(terminal).replace("\r", "\n").splitlines())) <= width


def test_tensorboard_is_optional(tmp_path):
    """Without it, the message says what to install."""
    if importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed")
    with pytest.raises(ValueError, match=r"pip install 'rescore\[logging\]'"):
        TensorBoard(tmp_path)


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path):
    """Points of the earlier attempt after the checkpoint are hidden; only numbers are drawn."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoard(tmp_path)
    for step in range(6):
        first.log({"step": step, "reward": step / 4, "text": "a", "nested": {"b": 1.0}})
    first.close()
    second = TensorBoard(tmp_path, start=3)
    second.log({"step": 4, "reward": 9})
    second.close()
    read = events.EventAccumulator(str(tmp_path)).Reload()
    assert read.Tags()["scalars"] == ["reward"]
    points = [(e.step, e.value) for e in read.Scalars("reward")]
    assert points == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 9.0)]
