"""The report shows the numbers of a run, all of them and nothing else, in one file."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image as plt_image

from rescore.evaluation import plots
from rescore.evaluation.plots import sheet
from rescore.evaluation.report import Estimate, build_report, cell_state

NASTY = """<script>alert('1')</script>&amp;"$x_$"""
TRAINING, VALIDATION = "#2b6cb0", "#c05621"


def estimates(solve_rate: float, se: float) -> dict[str, dict[str, float]]:
    return {
        "solve_rate": {"mean": solve_rate, "se": se},
        "reward": {"mean": solve_rate + 0.25, "se": se / 2},
    }


def step(number: int, reward: float, seconds: float) -> dict[str, Any]:
    return {
        "step": number,
        "reward": reward,
        "solve_rate": reward - 0.25,
        "kl_old_new": 0.001 * number,
        "kl_new_ref": None,
        "entropy": 1.5,
        "clip_fraction": 0.25,
        "ratio_min": 0.75,
        "ratio_max": 1.5,
        "gradient_norm": 0.5,
        "zero_variance_groups": 3,
        "samples": 1024 * number,
        "time/step_s": 2.0,
        "time/elapsed_s": seconds,
    }


def evaluation(number: int, weights: str, mean: float, se: float) -> dict[str, Any]:
    metrics = estimates(mean, se)
    return {"step": number, "split": "validation", "weights": weights, "n": 64, "metrics": metrics}


# A 2x4 puzzle of two boxes, side by side. The solution is 1234 over 3412.
PUZZLE = {
    "title": "one puzzle",
    "puzzle": {"rows": 2, "columns": 4, "box_rows": 2, "box_columns": 2},
    "strips": [
        {
            "label": "before",
            "note": "1 of 3 blanks right",
            "given": [True, True, True, False, True, True, False, False],
            "solution": list("12343412"),
            "frames": [
                {"step": 0, "cells": ["1", "2", "3", "", "3", "4", "", ""]},
                {"step": 1, "cells": ["1", "2", "3", "4", "3", "4", "2", ""]},
                {"step": 2, "cells": ["1", "2", "3", "4", "3", "4", "2", "1"]},
            ],
        }
    ],
}

FILES: dict[str, Any] = {
    "run.json": {
        "recipe": "sudoku_egspo",
        "command": "rescore train sudoku_egspo --out runs/demo",
        "config": {
            "class": "rescore.training.run.Run",
            "steps": 3,
            "algorithm": {"class": "rescore.algorithms.egspo.Egspo", "clip_low": 0.2},
            "terms": [{"class": "a.Term", "weight": 0.125}],
        },
        "seed": 17,
    },
    "environment.json": {"python": "3.11.2", "device": "cpu", "threads": 1},
    "metrics.jsonl": [step(1, 0.5, 2.0), step(2, 0.8, 10.0), step(4, 0.6, 12.0)],
    "evaluations.jsonl": [evaluation(0, "base", 0.3, 0.02), evaluation(4, "trained", 0.5, 0.04)],
    "result.json": {
        "n": 512,
        "split": "test",
        "protocol": "4 steps, random order",
        "rows": [
            {"label": "base model", "metrics": estimates(0.3, 0.03), "cpu_s": 41.0},
            {"label": "the control", "metrics": estimates(0.35, 0.03), "cpu_s": 99.5},
            {"label": "after RL", "metrics": estimates(0.5, 0.04), "cpu_s": 100.5},
        ],
    },
    "samples/film.json": PUZZLE,
}


def write(run: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(json.dumps(content))
    return run


@pytest.fixture
def files() -> dict[str, Any]:
    return copy.deepcopy(FILES)


@pytest.fixture
def unplotted(files) -> dict[str, Any]:
    """The same run without the rows behind the plots, which take the time."""
    return {name: content for name, content in files.items() if not name.endswith(".jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The report of all files, drawn once; not to be written over."""
    return build_report(write(tmp_path_factory.mktemp("whole"), FILES))


class Page(HTMLParser):
    """Every element closes; what is left is the text, the attributes and the cells of boards."""

    VOID = ("meta", "br", "img")

    def __init__(self, report: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.boards: list[list[str]] = []
        self.words: list[str] = []
        self.feed(report.read_text("utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        classes = dict(attrs).get("class") or ""
        if "board" in classes.split():
            self.boards.append([])
        if tag == "i" and self.open[-1] == "div":
            self.boards[-1].append(classes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page(run: Path) -> Page:
    return Page(build_report(run))


def polylines(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The lines of a colour, each a list of its points in the picture."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', svg)
    numbers = [[float(number) for number in re.findall(r"-?[\d.]+", path)] for path in paths]
    return [list(zip(line[::2], line[1::2], strict=True)) for line in numbers]


# --- the page ---------------------------------------------------------------------------------


def test_page_shows_every_number_of_the_result(whole):
    """Means, standard errors, CPU seconds, and differences from the first row with theirs."""
    parsed = Page(whole)
    assert parsed.tags.count("svg") == 2 * 2 + 6  # learning curves on both axes; diagnostics
    text = parsed.text
    for shown in ("0.300 ± 0.030", "0.350 ± 0.030", "0.500 ± 0.040", "0.750 ± 0.020"):
        assert shown in text
    assert "+0.200 ± 0.050 up by more than 2 s.e." in text  # 0.05 = hypot(0.03, 0.04)
    assert "+0.050 ± 0.042 within 2 s.e." in text
    assert "Against the control , solve_rate of after RL differs by +0.150 ± 0.050" in text
    assert "41.0" in text and "99.5" in text and "100.5" in text
    assert "test , n = 512; 4 steps, random order" in text
    assert "seed 17 · 4 RL steps · 4,096 samples · 12 s" in text


@pytest.mark.parametrize("headline", ["solve_rate", "reward"])
def test_every_number_stands_under_its_heading(tmp_path, unplotted, headline):
    """The metric that counts comes first, in the sentence, the heading and every row."""
    unplotted["result.json"]["headline"] = headline
    html = build_report(write(tmp_path, unplotted)).read_text("utf-8")
    assert f"<b>{headline}</b> goes from" in " ".join(html.split())
    names = re.findall(r'<th scope="col">(\w+)</th>', html)[1:]
    assert names[0] == headline
    cells = re.findall(r'<td data-name="(\w+)"><span class="number">([\d.]+)', html)
    assert [name for name, _ in cells] == names * 3
    for row, values in enumerate(unplotted["result.json"]["rows"]):
        for name, shown in cells[row * len(names) : (row + 1) * len(names)]:
            assert float(shown) == pytest.approx(values["metrics"][name]["mean"], abs=5e-4)


def test_page_shows_how_to_reproduce_the_run(tmp_path, unplotted):
    """The command, every leaf of the configuration with its classes, and the environment."""
    text = page(write(tmp_path, unplotted)).text
    assert "rescore train sudoku_egspo --out runs/demo" in text
    for shown in (
        "rescore.training.run.Run steps 3",
        "rescore.algorithms.egspo.Egspo clip_low 0.2",
        "a.Term weight 0.125",
        "python 3.11.2 device cpu threads 1",
    ):
        assert shown in text
    assert text.count("rescore.training.run.Run") == 1


def test_page_needs_nothing_from_outside(whole):
    """No script, no address but the names of the SVG namespaces, no reference but to itself."""
    parsed, html = Page(whole), whole.read_text("utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]*", html))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    references = {value for name, value in parsed.attributes if name in ("src", "xlink:href")}
    assert references and all(value and value.startswith("#") for value in references)
    assert not re.search(r"@import|url\((?!#)", html)


def test_references_inside_the_plots_are_unambiguous(whole):
    """No id is used twice in the page, and each reference finds its target."""
    attributes = Page(whole).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [str(value)[1:] for name, value in attributes if name == "xlink:href"]
    clips = [str(value)[5:-1] for name, value in attributes if name == "clip-path"]
    assert used and clips and {*used, *clips} <= set(ids)


def test_text_from_files_is_text(whole, tmp_path, files):
    """Whatever strings a run holds, they add no element to the page and are shown as they are."""
    plain = Page(whole)
    files["run.json"] |= {"recipe": NASTY, "command": NASTY, "config": {"class": NASTY}}
    files["run.json"]["config"] |= {NASTY: NASTY, "terms": [], "algorithm": {}}
    files["environment.json"] = {NASTY: [NASTY]}
    files["result.json"] |= {"split": NASTY, "protocol": NASTY}
    for row in files["result.json"]["rows"]:
        row |= {"label": NASTY, "metrics": {NASTY: row["metrics"]["solve_rate"]}}
    for row in files["metrics.jsonl"]:
        row[NASTY] = row.pop("entropy")
    for row in files["evaluations.jsonl"]:
        row |= {"weights": NASTY}
    film = files["samples/film.json"]
    film["title"] = film["strips"][0]["label"] = film["strips"][0]["note"] = NASTY
    film["strips"][0]["frames"][2]["cells"][7] = NASTY
    nasty = page(write(tmp_path, files))
    assert "script" not in nasty.tags
    assert "svg" in nasty.tags and nasty.tags.count("svg") == plain.tags.count("svg")
    assert nasty.text.count(NASTY) >= 20
    names = {name for name, _ in nasty.attributes}
    assert names <= {name for name, _ in plain.attributes}


def test_same_files_give_the_same_bytes(whole, tmp_path):
    """Also in a process with another hash seed, where importing the report draws nothing yet."""
    script = (
        "import sys, pathlib; from rescore.evaluation.report import build_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "build_report(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    again = tmp_path / "elsewhere" / "again.html"
    environment = os.environ | {"PYTHONHASHSEED": "12", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(whole.parent), str(again)]
    subprocess.run(command, check=True, env=environment)
    assert again.read_bytes() == whole.read_bytes()


def test_a_report_is_replaced_not_rewritten(tmp_path, unplotted):
    """A reader who has the old file open keeps it whole, and nothing else is left behind."""
    report = build_report(write(tmp_path, unplotted))
    old = tmp_path / "old.html"
    os.link(report, old)
    before = old.read_bytes()
    build_report(write(tmp_path, {"environment.json": {"python": "3.14"}}))
    assert old.read_bytes() == before != report.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


# --- runs that are not finished, or are not runs ----------------------------------------------


ABSENT = {
    "result.json": "There is no result.json: the final evaluation has not been written.",
    "samples/film.json": "There is no samples/film.json: no puzzle has been filmed.",
    "environment.json": "There is no environment.json.",
}
UNDRAWN = (
    "There is nothing to draw yet: metrics.jsonl and evaluations.jsonl hold no rewards.",
    "There is nothing to draw yet: metrics.jsonl holds no step.",
)


@pytest.mark.parametrize("absent", ABSENT)
def test_what_is_not_there_yet_is_said(tmp_path, unplotted, absent):
    """One sentence stands for the missing section; the others are there."""
    del unplotted[absent]
    text = page(write(tmp_path, unplotted)).text
    assert [name for name, sentence in ABSENT.items() if sentence in text] == [absent]


def test_a_run_that_has_just_started_has_a_report(tmp_path, files):
    """run.json alone is enough, and an empty metrics.jsonl is like none."""
    write(tmp_path, {"run.json": files["run.json"]})
    alone = page(tmp_path)
    assert all(sentence in alone.text for sentence in (*ABSENT.values(), *UNDRAWN))
    assert "svg" not in alone.tags and "seed 17 · 0 RL steps" in alone.text
    assert "This run has not been compared with its base yet." in alone.text
    (tmp_path / "metrics.jsonl").touch()
    assert page(tmp_path).text == alone.text


def test_the_base_alone_can_be_drawn(tmp_path, files):
    """Before the first step there is a point at step 0, and no clock to draw it against."""
    files["metrics.jsonl"] = []
    del files["evaluations.jsonl"][1]
    page(write(tmp_path, files))
    panels = plots.learning_panels([], files["evaluations.jsonl"])
    assert [panel.note for panel in panels] == ["against RL steps"] * 2


def test_a_row_being_written_is_not_read(tmp_path, files):
    """A run killed, or looked at, in the middle of a line counts the lines before it."""
    run = write(tmp_path, {"run.json": files["run.json"], "metrics.jsonl": [{"step": 4}]})
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "rew')
    assert "4 RL steps" in page(run).text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    """The message names the directory and what it should have been; nothing is written."""
    with pytest.raises(ValueError, match=r"is not a run directory.*run\.json.*rescore train"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="is not a run directory"):
        build_report(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", '{"recipe": ', r"run\.json is not valid JSON"),
        ("run.json", "[]", r"run\.json holds a list; expected an object"),
        ("run.json", '{"recipe": "r", "seed": 0}', r"lacks \['command', 'config'\]"),
        ("metrics.jsonl", '{"step": 1}\n{"reward": 2}\n', r"line 2 lacks \['step'\]"),
        ("metrics.jsonl", "{}}\n", r"line 1 is not valid JSON"),
        ("result.json", '{"n": 1, "split": "", "protocol": "", "rows": []}', "has no rows"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, unplotted, name, content, message):
    """The message says which file, which line and what is wrong; the old report stays."""
    report = build_report(write(tmp_path, unplotted))
    before = report.read_bytes()
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build_report(tmp_path)
    assert report.read_bytes() == before


def test_rows_that_cannot_be_compared_are_refused(tmp_path, unplotted):
    """Each row needs the metrics of the first, with a finite mean."""
    del unplotted["result.json"]["rows"][2]["metrics"]["reward"]
    with pytest.raises(ValueError, match=r"row 2 has the metrics \['solve_rate'\]; expected"):
        build_report(write(tmp_path, unplotted))
    unplotted["result.json"]["rows"][2]["metrics"] = estimates(float("nan"), 0.1)
    with pytest.raises(ValueError, match="row 2, solve_rate has the mean nan"):
        build_report(write(tmp_path, unplotted))


def test_a_film_that_does_not_fit_its_puzzle_is_refused(tmp_path, unplotted):
    """Eight cells are wanted; seven are counted."""
    unplotted["samples/film.json"]["strips"][0]["frames"][1]["cells"].pop()
    with pytest.raises(ValueError, match="strip 0, frame 1 has 7 cells.*expected 8"):
        build_report(write(tmp_path, unplotted))


# --- differences ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "se", "verdict"),
    [
        (0.25, 0.125, "within"),  # exactly two standard errors do not exceed two
        (0.26, 0.125, "up"),
        (-0.25, 0.125, "within"),
        (-0.26, 0.125, "down"),
        (0.0, 0.0, "within"),
        (9.0, None, "unknown"),
    ],
)
def test_verdict_by_hand(mean, se, verdict):
    """A difference counts when it is more than two standard errors from zero."""
    assert Estimate(mean, se).verdict == verdict


def test_difference_by_hand():
    """Means subtract, standard errors add in squares, and an unknown one stays unknown."""
    difference = Estimate(0.25, 0.03) - Estimate(0.75, 0.04)
    assert difference.mean == -0.5
    assert difference.se == pytest.approx(0.05)
    assert difference.show("+") == "−0.500 ± 0.050"
    assert (Estimate(0.5, None) - Estimate(0.25, 0.1)) == Estimate(0.25, None)
    assert (Estimate(0.5, 0.1) - Estimate(0.25, None)).show("+") == "+0.250"


# --- film -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "before", "given", "state"),
    [
        ("4", "4", True, "given"),
        ("", "", False, "blank"),
        ("4", "", False, "right new"),
        ("4", "4", False, "right"),
        ("1", "", False, "wrong new"),
        ("1", "1", False, "wrong"),
        ("4", "1", False, "right new"),  # a sampler that revises its own token
        ("", "4", False, "blank"),
    ],
)
def test_cell_state_by_hand(cell, before, given, state):
    """With the solution 4: grey if given, else by right and wrong, marked in the step it came."""
    assert cell_state(cell, before, given, "4") == state


def test_film_is_drawn_cell_by_cell(tmp_path, unplotted):
    """Colours follow the solution frame by frame, and a box ends only inside the puzzle."""
    parsed = page(write(tmp_path, unplotted))
    puzzle, first, second = parsed.boards
    left = ["given", "given beside", "given"]  # the first row, and where its left box ends
    low = ["given", "given beside"]
    assert puzzle == [*left, "blank", *low, "blank", "blank"]
    assert first == [*left, "right new", *low, "wrong new", "blank"]
    assert second == [*left, "right", *low, "wrong", "wrong new"]
    assert "the puzzle 3 blanks" in parsed.text
    assert "step 1 1 right, 1 wrong" in parsed.text
    assert "step 2 1 right, 2 wrong" in parsed.text


def test_sheets_of_images_take_the_place_of_a_film(tmp_path, unplotted):
    """Both pictures are in the page, bit by bit; one alone is not shown."""
    del unplotted["samples/film.json"]
    run = write(tmp_path, unplotted)
    (run / "samples").mkdir()
    pictures = {}
    for label, shade in (("before", 0.0), ("after", 1.0)):
        assert "no puzzle has been filmed" in page(run).text
        pictures[label] = sheet(torch.full((3, 1, 8, 8), shade))
        (run / "samples" / f"{label}.png").write_bytes(pictures[label])
    parsed = page(run)
    shown = [value for name, value in parsed.attributes if name == "src"]
    coded = [base64.b64encode(data).decode() for data in pictures.values()]
    assert shown == [f"data:image/png;base64,{code}" for code in coded]
    assert "no puzzle has been filmed" not in parsed.text
    assert coded[0] != coded[1]


def test_a_sheet_has_every_image_in_its_place():
    images = torch.linspace(0, 1, 10)[:, None, None, None].expand(10, 1, 4, 4)
    pixels = plt_image.imread(io.BytesIO(sheet(images, columns=4)))
    assert pixels.shape[:2] == (3 * 66, 4 * 66)
    for number, shade in enumerate(torch.linspace(0, 1, 10).tolist()):
        row, column = divmod(number, 4)
        assert abs(pixels[row * 66 + 33, column * 66 + 33, 0] - shade) < 0.01
    assert (pixels[2 * 66 + 33, 3 * 66 + 33, :3] == 1).all()


def test_boxes_end_below_too(tmp_path, unplotted):
    """Two boxes of 1x4, one above the other: the first row carries the border."""
    unplotted["samples/film.json"]["puzzle"] |= {"box_rows": 1, "box_columns": 4}
    board = page(write(tmp_path, unplotted)).boards[0]
    assert ["below" in classes for classes in board] == [True] * 4 + [False] * 4
    assert not any("beside" in classes for classes in board)


# --- plots ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "across"), [(0, (2 - 1) / (4 - 1)), (2, (10 - 2) / (12 - 2))])
def test_training_curve_is_drawn_to_scale(files, index, across):
    """The picture is an affine image of (step, value), and of (seconds, value)."""
    panels = plots.learning_panels(files["metrics.jsonl"], files["evaluations.jsonl"])
    assert [panel.title for panel in panels] == ["solve_rate", "reward"] * 2
    (a, b, c) = max(polylines(panels[index].svg, TRAINING), key=len)
    assert (b[0] - a[0]) / (c[0] - a[0]) == pytest.approx(across, abs=1e-4)
    assert (b[1] - a[1]) / (c[1] - a[1]) == pytest.approx((0.8 - 0.5) / (0.6 - 0.5), abs=1e-3)
    assert b[1] < c[1] < a[1]  # up is less in a picture


@pytest.mark.parametrize(("index", "last"), [(0, (4 - 0) / (4 - 1)), (2, (12 - 0) / (12 - 2))])
def test_validation_is_drawn_to_scale_with_its_errors(files, index, last):
    """Base and trained weights make one curve; its bars are two standard errors long."""
    panels = plots.learning_panels(files["metrics.jsonl"], files["evaluations.jsonl"])
    a, _, c = max(polylines(panels[index].svg, TRAINING), key=len)
    lines = [line for line in polylines(panels[index].svg, VALIDATION) if len(line) == 2]
    curve = next((p, q) for p, q in lines if p[0] != q[0] and p[1] != q[1])
    assert (curve[1][0] - curve[0][0]) / (c[0] - a[0]) == pytest.approx(last, abs=1e-4)
    unit = (a[1] - c[1]) / 0.1  # picture units per unit of reward: training goes 0.25 -> 0.35
    bars = [abs(p[1] - q[1]) for p, q in lines if p[0] == q[0]]  # the legend has one more
    assert [bar / unit for bar in bars[:2]] == pytest.approx([2 * 0.02, 2 * 0.04], abs=1e-4)
    assert (curve[0][1] - curve[1][1]) / unit == pytest.approx(0.5 - 0.3, abs=1e-4)


def test_only_validation_guides_the_eye(files):
    """Evaluations on the test split are for the table; the curves do not show them."""
    metrics, evaluations = files["metrics.jsonl"], files["evaluations.jsonl"]
    shown = plots.learning_panels(metrics, evaluations)
    test = evaluation(4, "best", 0.9, 0.01) | {"split": "test"}
    assert plots.learning_panels(metrics, [*evaluations, test]) == shown
    best = plots.learning_panels(metrics, [*evaluations, test | {"split": "validation"}])
    assert best != shown and "validation, best" in best[0].svg


def test_every_logged_metric_has_its_panel(files):
    """The ratio's extremes share one; columns of nothing, clocks and learning curves have none."""
    metrics = [row | {"skipped_updates": 0} for row in files["metrics.jsonl"]]
    panels = plots.diagnostic_panels(metrics, files["evaluations.jsonl"])
    assert [panel.title for panel in panels] == [
        "ratio",
        "kl_old_new",
        "entropy",
        "clip_fraction",
        "gradient_norm",
        "zero_variance_groups",
        "skipped_updates",
    ]
    assert "ratio_min" in panels[0].svg and "ratio_max" in panels[0].svg


def test_values_that_cannot_be_drawn_are_counted(files):
    """An infinite ratio leaves the line and is told; null is nothing and is not."""
    metrics = files["metrics.jsonl"]
    metrics[1] |= {"ratio_max": float("inf"), "gradient_norm": None}
    panels = {panel.title: panel for panel in plots.diagnostic_panels(metrics, [])}
    assert "non-finite values not drawn: 1" in panels["ratio"].note
    assert "not drawn" not in panels["gradient_norm"].note
    assert len(max(polylines(panels["gradient_norm"].svg, TRAINING), key=len)) == 2


def test_a_step_without_a_time_is_not_drawn_against_seconds(files):
    """Three steps, two of them timed: three points, and two."""
    files["metrics.jsonl"][1]["time/elapsed_s"] = None
    panels = plots.learning_panels(files["metrics.jsonl"], [])
    assert [len(max(polylines(panel.svg, TRAINING), key=len)) for panel in panels] == [3, 2]


def test_running_mean_by_hand():
    """A window of two: the first value alone, then each with the one before it."""
    assert plots.running_mean([1.0, 3.0, 8.0, 0.0], 2) == [1.0, 2.0, 5.5, 4.0]
    assert plots.running_mean([1.0, 3.0, 8.0], 1) == [1.0, 3.0, 8.0]


def test_long_runs_are_smoothed_over_their_raw_curve():
    """Forty steps alternate between 0 and 1; the mean of two steps is flat after the first."""
    metrics = [{"step": i, "reward": float(i % 2)} for i in range(1, 41)]
    (panel,) = plots.learning_panels(metrics, [])
    smooth = max(polylines(panel.svg, TRAINING), key=len)
    assert len({round(y, 3) for _, y in smooth[1:]}) == 1
    assert "training, mean of 2 steps" in panel.svg
