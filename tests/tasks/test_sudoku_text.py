"""Sudoku in words: the same puzzles, what a reply earns, and files of puzzles."""

from __future__ import annotations

import itertools

import pytest
import torch

from rescore.tasks.sudoku import Sudoku
from rescore.tasks.sudoku_grids import SPLITS, grids_4x4, split_of
from rescore.tasks.sudoku_text import SudokuText
from rescore.tasks.tokenizers import Characters

CHARACTERS = Characters(alphabet="".join(map(chr, range(32, 127))) + "\n")
PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"  # published with d1, arXiv:2504.12216
TWO_WAYS = "0034340000434300", "1234341221434321"  # 12/21 and 21/12 can change places


def worded(**fields):
    """A task of few puzzles in windows that hold any size."""
    small = {"pool": 30, "validation_pool": 10, "test_pool": 10}
    return SudokuText(
        tokenizer=CHARACTERS, prompt_length=700, completion_length=260, **{**small, **fields}
    )


FOUR = worded()
TASKS = [
    pytest.param(FOUR, id="4x4"),
    pytest.param(worded(side=6, blanks=(10, 20), pool=9, validation_pool=3, test_pool=3), id="6x6"),
    pytest.param(worded(side=9, blanks=(20, 30), pool=4, validation_pool=2, test_pool=2), id="9x9"),
]


def reply(answer):
    """A reply in the form asked for."""
    return f"<reasoning>\nrow by row\n</reasoning>\n<answer>\n{answer}\n</answer>"


def judged(completion, puzzle=PUZZLE, solution=SOLUTION):
    """Cells, solved, valid, format: the terms of one completion."""
    known = {"puzzle": puzzle, "solution": solution}
    terms = FOUR.functions
    assert list(terms) == ["cell_accuracy", "solve_rate", "valid", "format"]
    return [term([completion], [known])[0] for term in terms.values()]


def grid_text(grid):
    return "".join(str(int(digit) + 1) for digit in grid)


# The puzzles


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_the_puzzles_are_those_of_the_task_of_cells(task, split):
    """Number i in words is number i as a canvas, with the same solution, 0 for a blank."""
    fields = {name: getattr(task, name) for name in ("side", "blanks", "pool", "seed", "test_pool")}
    cells = Sudoku(**fields, validation_pool=task.validation_pool)
    prompts = cells.prompts(split, torch.arange(cells.size(split)))
    problems = task.problems(split)
    assert len(problems) == task.size(split) == cells.size(split)
    for problem, canvas, solution in zip(
        problems, prompts.tokens, prompts.info["solution"], strict=True
    ):
        assert torch.equal(cells.parse(problem.facts["puzzle"]), canvas)
        assert torch.equal(cells.parse(problem.facts["solution"]), solution)
        assert "." not in problem.facts["puzzle"]


@pytest.mark.parametrize("task", TASKS)
def test_no_two_splits_share_a_solution(task):
    """The solution alone says to which split a puzzle belongs."""
    for split in SPLITS:
        for problem in task.problems(split):
            assert split_of([int(digit) - 1 for digit in problem.facts["solution"]]) == split


@pytest.mark.parametrize(
    ("side", "blanks", "cells", "box"),
    [(4, (6, 12), 16, "2x2"), (6, (10, 20), 36, "2x3"), (9, (20, 30), 81, "3x3")],
)
def test_the_question_says_what_is_asked(side, blanks, cells, box):
    """The puzzle, the size, the rules and all four tags."""
    problem = worded(side=side, blanks=blanks, pool=2, validation_pool=1, test_pool=1).problems(
        "train"
    )[0]
    question = problem.question
    assert f"\n{problem.facts['puzzle']}\n" in question
    assert problem.facts["solution"] not in question
    assert f"{side}x{side} Sudoku" in question and f"{box} box" in question
    assert f"{cells} digits" in question and f"1 to {side}" in question
    for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert tag in question


# Judging


@pytest.mark.parametrize(
    ("completion", "cells", "solved", "valid", "form"),
    [
        (reply(SOLUTION), 1, 1, 1, 1),
        (f"<answer>{SOLUTION}</answer>", 1, 1, 1, 0),  # no reasoning
        (reply("3142 2431\n4213 1324"), 1, 1, 1, 0),  # spaces are skipped, but were not asked for
        (reply(SOLUTION) + " Done.", 1, 1, 1, 0),
        (reply("3142243142131321"), 7 / 8, 0, 0, 1),  # the last cell is a blank and wrong
        (reply("1142243142131324"), 1, 0, 0, 1),  # a given cell was changed
        (reply(SOLUTION[:-1]), 7 / 8, 0, 0, 0),  # short: the last cell is empty
        (reply(SOLUTION[:4]), 1 / 8, 0, 0, 0),
        (reply(SOLUTION + "1"), 1, 0, 0, 0),  # long: cut for the cells, but no solution
        (reply("1" + SOLUTION), 0, 0, 0, 0),  # shifted by one, every cell is wrong
        (reply(""), 0, 0, 0, 0),
        (reply(PUZZLE), 0, 0, 0, 0),  # nothing filled
        (reply("9" * 16), 0, 0, 0, 1),
        (reply("3x1y4z2" + SOLUTION[4:]), 1, 1, 1, 0),  # other characters are left out
        (SOLUTION, 0, 0, 0, 0),  # no answer at all
        (f"<reasoning>{SOLUTION}</reasoning>", 0, 0, 0, 0),
        (f"<answer>{SOLUTION}", 0, 0, 0, 0),
        (f"<answer>{PUZZLE}</answer> no: <answer>{SOLUTION}</answer>", 1, 1, 1, 0),  # the last
        (f"<answer>{SOLUTION}</answer> no: <answer>{PUZZLE}</answer>", 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_rewards_by_hand(completion, cells, solved, valid, form):
    """Only the eight blanks count for the cells, each an eighth."""
    assert judged(completion) == [cells, solved, valid, form]


def test_another_solution_is_valid_and_not_the_one_asked_for():
    """Of the six blanks of a puzzle with two solutions, two are the same in both."""
    puzzle, solution = TWO_WAYS
    found = [grid_text(row) for row in FOUR.puzzles.solutions(FOUR.puzzles.parse(puzzle), limit=9)]
    assert solution in found and len(found) > 1
    for other in found:
        same = [a == b for a, b, given in zip(other, solution, puzzle, strict=True) if given == "0"]
        expected = [sum(same) / len(same), float(other == solution), 1, 1]
        assert judged(reply(other), puzzle, solution) == expected


def test_valid_means_legal_by_every_rule():
    """All 288 grids answer the empty puzzle; a change of any one cell of a grid is no answer."""
    empty = "0" * 16
    grids = [grid_text(grid) for split in SPLITS for grid in grids_4x4(split)]
    assert all(judged(reply(grid), empty)[2] == 1 for grid in grids)
    for cell, digit in itertools.product(range(16), "12340567"):
        if SOLUTION[cell] != digit:
            changed = SOLUTION[:cell] + digit + SOLUTION[cell + 1 :]
            assert judged(reply(changed), empty)[2] == 0
    assert judged(reply(TWO_WAYS[1]))[2] == 0  # legal, with other given cells
    # every row and column is right, no box is
    assert judged(reply("1234234134124123"), empty)[2] == 0


@pytest.mark.parametrize("task", TASKS)
def test_gold_completions_earn_the_full_reward(task):
    """In every split and every term."""
    task.validate(30)


def test_the_weights_choose_what_is_optimised():
    """Cells by default; the other terms are reported."""
    prompts = FOUR.read([PUZZLE])
    outputs = FOUR.gold(prompts)
    wrong = FOUR.tokenizer.encode(reply("3142243142131321"))
    outputs[0, FOUR.prompt_length :] = FOUR.tokenizer.end_id
    outputs[0, FOUR.prompt_length : FOUR.prompt_length + len(wrong)] = torch.tensor(wrong)
    for weights, expected in [
        ({}, 7 / 8),
        ({"format": 0.25}, 9 / 8),
        ({"cell_accuracy": 0.0, "valid": 2.0, "solve_rate": 3.0}, 0),
    ]:
        reward = worded(reward_weights=weights).reward
        assert reward.total(reward.terms(outputs, prompts)).tolist() == [expected]


def test_a_prefill_opens_every_completion():
    """The model is given the first tag; the rewards see it."""
    task = worded(prefill="<reasoning>")
    task.validate(10)
    prompts = task.read([PUZZLE])
    assert task.completions(task.gold(prompts))[0].count("<reasoning>") == 1


# Texts


def test_a_puzzle_is_read_in_any_form_that_sudoku_reads():
    """On one line or drawn; the same problem comes out."""
    cells = Sudoku()
    drawn = cells.show(cells.parse(PUZZLE))
    assert FOUR.problem(drawn) == FOUR.problem(PUZZLE)
    assert FOUR.problem(PUZZLE).facts == {"puzzle": PUZZLE, "solution": SOLUTION}


@pytest.mark.parametrize(
    ("puzzle", "reason"),
    [
        ("3102200002100325", r"characters \['5'\]"),
        ("310220000210032", "15 cells; expected 16"),
        ("3302200002100320", "has 0 solutions"),
        (TWO_WAYS[0], "has 2 solutions"),
        (SOLUTION, "and 0 blanks"),
    ],
)
def test_a_puzzle_that_cannot_be_posed_is_refused(puzzle, reason):
    """The message says which puzzle and why."""
    with pytest.raises(ValueError, match=f"number 1 .*'{puzzle}'.*{reason}"):
        FOUR.read([PUZZLE, puzzle])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 5}, "side is 5"),
        ({"blanks": (0, 8)}, r"blanks is \(0, 8\)"),
        ({"pool": 0}, "pool is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"reward_weights": {"speed": 1.0}}, r"unknown terms \['speed'\]"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    """At construction, before any puzzle is drawn."""
    with pytest.raises(ValueError, match=message):
        worded(**fields)


# Files


def save(path, rows):
    path.write_text("".join(f"{puzzle},{solution}\n" for puzzle, solution in rows))


def blanked(grid):
    """A grid with its first row left out."""
    return "0000" + grid[4:], grid


def first(split, count):
    return [grid_text(grid) for grid in grids_4x4(split)[:count]]


def test_one_file_is_split_by_solution(tmp_path):
    """Every row comes back once, leading zeros kept, in the split of its solution."""
    rows = [blanked(grid) for split in SPLITS for grid in first(split, 5)]
    save(tmp_path / "all.csv", [("Puzzle", "Solution"), *rows, rows[0]])
    task = worded(source=str(tmp_path / "all.csv"))
    for number, split in enumerate(SPLITS):
        got = [(p.facts["puzzle"], p.facts["solution"]) for p in task.problems(split)]
        assert got == rows[5 * number : 5 * number + 5]
    task.validate()


def test_files_of_a_folder_are_their_splits_but_for_solutions_held_out(tmp_path):
    """The test file is taken as it is, several solutions or not; its solutions are not trained on.

    A pool takes the first of what is left.
    """
    a, b, c, d, e = first("train", 5)
    header = ("Puzzle", "Solution")
    save(tmp_path / "test.csv", [header, blanked(a), TWO_WAYS])
    save(tmp_path / "validation.csv", [header, blanked(a), blanked(b)])
    save(tmp_path / "train.csv", [header, *map(blanked, (a, b, c, d, e))])
    task = worded(source=str(tmp_path), pool=2)
    solutions = {split: [p.facts["solution"] for p in task.problems(split)] for split in SPLITS}
    assert solutions == {"test": [a, TWO_WAYS[1]], "validation": [b], "train": [c, d]}
    with pytest.raises(ValueError, match="no 6x6 puzzle for split 'test'"):
        worded(side=6, blanks=(10, 20), source=str(tmp_path)).problems("test")


@pytest.mark.parametrize(
    "row",
    [
        (PUZZLE, "3142243142131321"),  # illegal
        (PUZZLE, "1234341221434321"),  # legal, and not of this puzzle
        (PUZZLE, SOLUTION[:-1]),
        (PUZZLE[:-1], SOLUTION[:-1]),
        (SOLUTION, SOLUTION),  # nothing to fill
        ("31.2200002100320", SOLUTION),
        (PUZZLE, "solution"),
    ],
)
def test_a_row_that_is_no_puzzle_is_refused(tmp_path, row):
    """It is shown."""
    save(tmp_path / "all.csv", [("Puzzle", "Solution"), (PUZZLE, SOLUTION), row])
    with pytest.raises(ValueError, match=f"row 1 of .*: a record is .*'{row[0]}'.*'{row[1]}'"):
        worded(source=str(tmp_path / "all.csv")).problems("train")


def test_a_file_with_other_columns_is_refused(tmp_path):
    """The row is shown, with the columns that are expected."""
    save(tmp_path / "all.csv", [("quizzes", "solutions"), (PUZZLE, SOLUTION)])
    with pytest.raises(ValueError, match="'quizzes'.*expected a 'Puzzle'"):
        worded(source=str(tmp_path / "all.csv")).problems("train")
