"""The Sudoku task: its puzzles, its splits, its rewards and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from rescore.tasks.sudoku import Sudoku, cell_accuracy, solve_rate
from rescore.tasks.sudoku_grids import BOXES, SPLITS, completions, determined, grids_4x4, split_of

TASKS = [
    pytest.param(Sudoku(seed=3, pool=700, validation_pool=90, test_pool=80), id="4x4"),
    pytest.param(
        Sudoku(side=6, blanks=(10, 20), seed=3, pool=12, validation_pool=7, test_pool=6), id="6x6"
    ),
    pytest.param(
        Sudoku(side=9, blanks=(30, 40), seed=3, pool=12, validation_pool=7, test_pool=6), id="9x9"
    ),
]
FOUR = Sudoku()
PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"  # published with d1, arXiv:2504.12216


def whole(task, split):
    return task.prompts(split, torch.arange(task.size(split)))


def text(tokens):
    """A canvas on one line, 0 for a blank."""
    side = round(len(tokens) ** 0.5)
    return "".join("0" if token == side else str(int(token) + 1) for token in tokens)


def legal(grid, rows, columns):
    """Every row, column and box holds every digit once."""
    side = rows * columns
    grid = np.asarray(grid).reshape(side, side)
    boxes = grid.reshape(columns, rows, rows, columns).transpose(0, 2, 1, 3).reshape(side, side)
    return all((np.sort(unit, axis=1) == range(side)).all() for unit in (grid, grid.T, boxes))


def count_naively(canvas, rows, columns):
    """Number of completions: fill the first blank with everything not seen from it, recurse."""
    side = rows * columns
    if side not in canvas:
        return 1
    at = canvas.index(side)

    def sees(other):
        (r, c), (s, d) = divmod(at, side), divmod(other, side)
        return r == s or c == d or (r // rows, c // columns) == (s // rows, d // columns)

    seen = {canvas[other] for other in range(side**2) if sees(other)}
    return sum(
        count_naively([*canvas[:at], digit, *canvas[at + 1 :]], rows, columns)
        for digit in set(range(side)) - seen
    )


@pytest.fixture(scope="module")
def every_grid():
    """All 4x4 grids: four permutations on top of one another, kept when the result is legal."""
    rows = np.array(list(itertools.permutations(range(4))))
    stacks = rows[np.array(list(itertools.product(range(24), repeat=4)))]
    stacks = stacks[((1 << stacks).sum(1) == 15).all(1)]
    return np.array([stack.reshape(16) for stack in stacks if legal(stack, 2, 2)])


# The search


def test_the_empty_4x4_canvas_has_288_completions(every_grid):
    """The search yields each legal grid once, and nothing else."""
    found = list(completions([4] * 16))
    assert len(found) == len(every_grid) == 288
    assert set(found) == set(map(tuple, every_grid.tolist()))


@pytest.mark.parametrize("clashing", [False, True])
def test_the_search_agrees_with_comparison_to_every_grid(every_grid, clashing):
    """On random 4x4 canvases, solvable or not, it finds exactly the grids that keep the givens."""
    rng = np.random.default_rng(17)
    sizes = set()
    for _ in range(300):
        grid = rng.integers(4, size=16) if clashing else every_grid[rng.integers(288)]
        canvas = np.where(rng.random(16) < rng.uniform(0.1, 0.6), grid, 4)
        expected = every_grid[((canvas == every_grid) | (canvas == 4)).all(1)]
        found = list(completions(canvas.tolist()))
        assert sorted(found) == sorted(map(tuple, expected.tolist()))
        sizes.add(min(len(found), 2))
    assert sizes == ({0, 1, 2} if clashing else {1, 2})


@pytest.mark.parametrize("side", [6, 9])
def test_the_search_counts_larger_grids_built_by_hand(side):
    """A lost row comes back; two lost digits may trade places; a repeated digit leaves nothing."""
    rows, columns = BOXES[side]
    grid = [(columns * (r % rows) + r // rows + c) % side for r in range(side) for c in range(side)]
    assert legal(grid, rows, columns)
    assert list(completions([side] * side + grid[side:])) == [tuple(grid)]

    without = [side if digit in (0, 1) else digit for digit in grid]
    found = list(completions(without))
    swapped = tuple({0: 1, 1: 0}.get(digit, digit) for digit in grid)
    assert {tuple(grid), swapped} <= set(found)
    assert len(found) == len(set(found)) == count_naively(without, rows, columns)

    assert list(completions([grid[1], *grid[1:]])) == []


def test_digits_restrict_the_search():
    """With the true digit of a cell forbidden, a puzzle with one solution has none."""
    canvas = FOUR.parse(PUZZLE).tolist()
    blank = canvas.index(4)
    truth = int(SOLUTION[blank]) - 1
    digits = [list(range(4))] * 16
    digits[blank] = [digit for digit in range(4) if digit != truth]
    assert list(completions(canvas, digits)) == []
    digits[blank] = [truth]
    assert len(list(completions(canvas, digits))) == 1


# Which 4x4 puzzles have one solution


def test_the_4x4_puzzles_with_eight_clues(every_grid):
    """3,326,304 of them are distinct, and 0.80 of (grid, clues) pairs leave one solution."""
    masks = np.array([m for m in range(1 << 16) if m.bit_count() == 8])
    given = (masks[:, None] >> np.arange(16) & 1) * 3
    wide = (given << 2 * np.arange(16)).sum(1)
    code = (every_grid << 2 * np.arange(16)).sum(1)
    puzzles = np.sort(code[:, None] & wide[None, :], axis=0)
    first = np.diff(puzzles, axis=0, prepend=-1) != 0
    last = np.diff(puzzles, axis=0, append=-1) != 0
    assert first.sum() == 3_326_304
    assert determined(every_grid)[:, masks].sum() == (first & last).sum()
    assert (first & last).mean() == pytest.approx(0.80, abs=0.02)


def test_determined_agrees_with_comparison_to_every_grid(every_grid):
    """A set of given cells determines a grid when no other grid agrees on it."""
    rng = np.random.default_rng(5)
    rows = rng.integers(288, size=400)
    masks = rng.integers(1 << 16, size=400)
    table = determined(every_grid[rows])
    kept = masks[:, None] >> np.arange(16) & 1 == 1
    agree = ((every_grid[rows][:, None] == every_grid[None]) | ~kept[:, None]).all(2)
    expected = agree.sum(1) == 1
    assert 0 < expected.sum() < 400
    assert (table[np.arange(400), masks] == expected).all()


# The pools


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_every_puzzle_is_its_legal_solution_with_blanks(task, split):
    """Given cells are clamped and those of a legal grid; blanks are masks, as many as asked."""
    prompts = whole(task, split)
    solution = prompts.info["solution"]
    assert prompts.tokens.shape == (task.size(split), task.length)
    assert all(legal(grid, *BOXES[task.side]) for grid in solution.tolist())
    assert bool((prompts.tokens == solution.where(~prompts.editable, task.vocab_size)).all())
    blanks = prompts.editable.sum(1)
    assert task.blanks[0] <= blanks.min() <= blanks.max() <= task.blanks[1]
    assert len(prompts.tokens.unique(dim=0)) == task.size(split)


@pytest.mark.parametrize("task", TASKS)
def test_every_puzzle_has_one_solution(task):
    """By a count that shares no code with the generator."""
    for split in SPLITS:
        for canvas in whole(task, split).tokens[:60].tolist():
            assert count_naively(canvas, *BOXES[task.side]) == 1


def test_every_4x4_puzzle_has_one_solution(every_grid):
    """All of a large pool, the hardest (12 blanks, 4 clues) included."""
    prompts = whole(Sudoku(blanks=(6, 12), pool=3000), "train")
    canvas = prompts.tokens.numpy()[:, None]
    fits = ((canvas == every_grid[None]) | (canvas == 4)).all(2)
    assert (fits.sum(1) == 1).all()
    assert (every_grid[fits.argmax(1)] == prompts.info["solution"].numpy()).all()
    assert int(prompts.editable.sum(1).max()) == 12


def test_the_number_of_blanks_is_uniform():
    """Each of the seven numbers takes a seventh of the pool, to five standard errors."""
    blanks = whole(Sudoku(blanks=(6, 12), pool=7000), "train").editable.sum(1)
    counts = torch.bincount(blanks, minlength=13)[6:].double()
    assert len(counts) == 7
    assert bool(((counts - 1000).abs() < 5 * (7000 * 6 / 49) ** 0.5).all())


@pytest.mark.parametrize(("side", "blanks"), [(4, 12), (6, 26), (9, 56)])
def test_the_most_blanks_are_reached(side, blanks):
    """The largest number a size admits can be drawn, and one more is refused.

    A third of the 6x6 grids cannot be dug that far; they are passed over.
    """
    task = Sudoku(side=side, blanks=(blanks, blanks), pool=10)
    assert whole(task, "train").editable.sum(1).tolist() == [blanks] * 10
    with pytest.raises(ValueError, match=f"within 1 to {blanks}"):
        Sudoku(side=side, blanks=(blanks, blanks + 1))


# The splits


def test_4x4_grids_are_split_by_rank_of_their_content_hash(every_grid):
    """200 / 32 / 56 grids, in the order of sha256 of the 16 digits."""
    texts = sorted(
        ("".join(str(d + 1) for d in grid) for grid in every_grid.tolist()),
        key=lambda grid: hashlib.sha256(grid.encode()).hexdigest(),
    )
    expected = {"train": texts[:200], "validation": texts[200:232], "test": texts[232:]}
    assert {split: [text(grid) for grid in grids_4x4(split)] for split in SPLITS} == expected
    for split, grids in expected.items():
        assert {split_of(FOUR.parse(grid).tolist()) for grid in grids} == {split}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_solution(task):
    """Each solution belongs to its split by content; so do the clean grids; no two splits meet."""
    seen = {}
    for split in SPLITS:
        pool = {text(grid) for grid in whole(task, split).info["solution"]}
        clean = {text(grid) for grid in task.clean(split).x_0}
        assert pool <= clean
        assert {split_of([int(d) - 1 for d in grid]) for grid in clean} == {split}
        seen[split] = clean
    assert all(not seen[a] & seen[b] for a, b in itertools.combinations(SPLITS, 2))


@pytest.mark.parametrize("side", [6, 9])
def test_larger_grids_are_split_by_their_content_hash(side):
    """sha256 of the digits modulo 288, cut at 200 and 232; the cuts themselves are met."""
    task = Sudoku(side=side, blanks=(10, 10), pool=3)
    parts = set()
    for grid in whole(task, "train").info["solution"].tolist():
        for names in itertools.islice(itertools.permutations(range(side)), 720):
            renamed = [names[digit] for digit in grid]
            line = "".join(str(digit + 1) for digit in renamed)
            part = int(hashlib.sha256(line.encode()).hexdigest(), 16) % 288
            expected = "train" if part < 200 else "validation" if part < 232 else "test"
            assert split_of(renamed) == expected
            parts.add(part)
    assert {199, 200, 231, 232} <= parts


@pytest.mark.parametrize("side, blanks", [(4, (6, 12)), (6, (10, 20))])
def test_clean_limit_shows_fewer_training_grids_and_the_same_puzzles(side, blanks):
    """The first training grids only; validation and test grids and all puzzles stay."""
    all_of_them = Sudoku(side=side, blanks=blanks, pool=64, test_pool=8, validation_pool=8)
    limited = dataclasses.replace(all_of_them, clean_limit=5)
    assert torch.equal(limited.clean("train").x_0, all_of_them.clean("train").x_0[:5])
    for split in ("validation", "test"):
        assert torch.equal(limited.clean(split).x_0, all_of_them.clean(split).x_0)
    index = torch.arange(64)
    same = limited.prompts("train", index).tokens == all_of_them.prompts("train", index).tokens
    assert bool(same.all())


def test_clean_4x4_grids_are_the_whole_split():
    """Pre-training sees every grid of the split, once, however small the pool."""
    task = Sudoku(pool=1, validation_pool=1, test_pool=1)
    assert [len(task.clean(split).x_0) for split in SPLITS] == [200, 32, 56]
    assert len(torch.cat([task.clean(split).x_0 for split in SPLITS]).unique(dim=0)) == 288


# Pure functions


def test_prompts_are_a_pure_function_of_the_index():
    """Any order, any batch: puzzle i is puzzle i; the bookkeeping counts positions in the batch."""
    everything = whole(FOUR, "test")
    index = torch.tensor([5, 3, 3, 511])
    batch = FOUR.prompts("test", index)
    assert torch.equal(batch.tokens, everything.tokens[index])
    assert torch.equal(batch.info["solution"], everything.info["solution"][index])
    assert torch.equal(batch.editable, batch.tokens == 4)
    assert batch.group.tolist() == batch.sample_id.tolist() == [0, 1, 2, 3]
    batch.tokens.fill_(0)
    batch.info["solution"].fill_(0)
    FOUR.clean("test").x_0.fill_(0)
    assert torch.equal(whole(FOUR, "test").tokens, everything.tokens)
    assert torch.equal(whole(FOUR, "test").info["solution"], everything.info["solution"])


def test_pools_follow_from_the_fields_in_any_process():
    """A second interpreter draws the same puzzles."""
    script = (
        "import hashlib, torch\n"
        "from rescore.tasks.sudoku import Sudoku\n"
        "digest = hashlib.sha256()\n"
        "for task in (Sudoku(seed=11), Sudoku(side=9, blanks=(30, 40), seed=11, test_pool=9)):\n"
        "    prompts = task.prompts('test', torch.arange(task.size('test')))\n"
        "    digest.update(prompts.tokens.numpy().tobytes())\n"
        "    digest.update(prompts.info['solution'].numpy().tobytes())\n"
        "digest = digest.hexdigest()\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", script + "print(digest)"], capture_output=True, text=True, check=True
    )
    here: dict = {}
    exec(script, here)
    assert there.stdout.strip() == here["digest"]


@pytest.mark.parametrize("side", [4, 9])
def test_seeds_and_splits_draw_different_puzzles(side):
    """Neither a seed nor a split repeats the stream of another."""
    a, b = (Sudoku(side=side, blanks=(6, 12), pool=30, test_pool=30, seed=seed) for seed in (0, 1))
    blanks = [whole(*pool).editable.sum(1) for pool in [(a, "train"), (b, "train"), (a, "test")]]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(blanks, 2))


# Judging


@pytest.mark.parametrize(
    ("output", "accuracy", "solved"),
    [
        (SOLUTION, 1, 1),
        ("3142243142131321", 7 / 8, 0),  # the last cell is a blank and wrong
        ("1142243142131324", 1, 1),  # the first cell was given: not counted
        ("3112214322124321", 0, 0),  # every blank wrong, every given digit kept
        ("3112214322124324", 1 / 8, 0),  # the same but for the last blank
    ],
)
def test_rewards_by_hand(output, accuracy, solved):
    """Only the eight blanks of the puzzle count, each an eighth."""
    prompts = FOUR.read([PUZZLE])
    outputs = FOUR.parse(output)[None]
    assert cell_accuracy(outputs, prompts).tolist() == [accuracy]
    assert solve_rate(outputs, prompts).tolist() == [solved]


def test_both_terms_are_reported_and_the_weights_choose_what_is_optimised():
    """A term that is not named weighs nothing, and is still there."""
    prompts = FOUR.read([PUZZLE, PUZZLE])
    outputs = torch.stack([FOUR.parse("3142243142131321"), FOUR.parse(SOLUTION)])
    cases = [
        ({"cell_accuracy": 1.0}, [7 / 8, 1.0]),
        ({"solve_rate": 1.0}, [0.0, 1.0]),
        ({"cell_accuracy": 0.25, "solve_rate": 3.0}, [7 / 32, 3.25]),
    ]
    for weights, expected in cases:
        reward = Sudoku(reward_weights=weights).reward
        terms = reward.terms(outputs, prompts)
        assert set(terms) == {"cell_accuracy", "solve_rate"}
        assert reward.total(terms).tolist() == expected
    assert FOUR.reward.total(FOUR.reward.terms(outputs, prompts)).tolist() == [7 / 8, 1.0]


@pytest.mark.parametrize("task", TASKS)
def test_gold_outputs_earn_the_full_reward(task):
    """In every split and every term."""
    task.validate(task.size("train"))


def test_validate_sees_a_wrong_gold_output():
    """One wrong blank in the gold outputs is an error."""

    class Wrong(Sudoku):
        def gold(self, prompts):
            return (super().gold(prompts) + prompts.editable.long()) % 4

    with pytest.raises(ValueError, match="cell_accuracy"):
        Wrong().validate()


# Texts


def test_a_published_puzzle_is_solved():
    """The d1 example has exactly the published solution."""
    prompts = FOUR.read([PUZZLE])
    assert text(prompts.tokens[0]) == PUZZLE
    assert text(FOUR.gold(prompts)[0]) == SOLUTION
    assert [text(row) for row in FOUR.solutions(FOUR.parse(PUZZLE), limit=5)] == [SOLUTION]
    assert len(FOUR.solutions(FOUR.parse("0" * 16))) == 2
    assert len(FOUR.solutions(FOUR.parse("0" * 16), limit=7)) == 7
    assert FOUR.solutions(FOUR.parse("11" + "0" * 14)).shape == (0, 16)


def test_show_draws_the_boxes():
    """Masks are dots; lines stand between boxes of two rows and two or three columns."""
    assert FOUR.show(FOUR.parse(PUZZLE)) == (
        "3 1 | . 2\n2 . | . .\n----+----\n. 2 | 1 .\n. 3 | 2 ."
    )
    six = Sudoku(side=6, blanks=(10, 20))
    assert six.show(six.parse("123456" + "0" * 30)).splitlines()[:3] == [
        "1 2 3 | 4 5 6",
        ". . . | . . .",
        "------+------",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_layout_and_symbols_describe_what_show_prints(task):
    """A drawing made from them has the digits and the boxes of the text."""
    canvas = whole(task, "test").tokens[0]
    layout = task.layout
    assert layout.rows * layout.columns == task.length
    symbols = [task.symbol(token) for token in range(task.vocab_size)]
    assert len(set(symbols)) == task.vocab_size
    assert task.mask_id == task.vocab_size
    bands = [band.splitlines() for band in re.split(r"\n[-+]+\n", task.show(canvas))]
    assert [len(band) for band in bands] == [layout.box_rows] * (layout.rows // layout.box_rows)
    boxes = [box.split() for band in bands for line in band for box in line.split(" | ")]
    assert {len(box) for box in boxes} == {layout.box_columns}
    cells = list(itertools.chain.from_iterable(boxes))
    assert cells == [[*symbols, "."][token] for token in canvas]


@pytest.mark.parametrize("task", TASKS)
def test_parse_reads_what_show_prints(task):
    """And the same digits on one line, with 0 for a blank."""
    for canvas in whole(task, "test").tokens:
        assert torch.equal(task.parse(task.show(canvas)), canvas)
        assert torch.equal(task.parse(text(canvas)), canvas)


# Bad input


@pytest.mark.parametrize(
    ("puzzle", "reason"),
    [
        ("3102200002100325", r"characters \['5'\]"),
        ("310220000210032x", r"characters \['x'\]"),
        ("310220000210032", "15 cells; expected 16"),
        ("31022000021003200", "17 cells; expected 16"),
        ("3302200002100320", "no solution"),
        ("1230000400000000", "no solution"),
        ("3102200000000000", "more than one solution"),
        (SOLUTION, "no blank"),
    ],
)
def test_a_puzzle_that_cannot_be_posed_is_refused(puzzle, reason):
    """The message says which puzzle, quotes it and says why."""
    with pytest.raises(ValueError, match=f"number 1 .*'{puzzle}'.*{reason}"):
        FOUR.read([PUZZLE, puzzle])


def test_no_puzzle_at_all_is_refused():
    """An empty list is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one"):
        FOUR.read([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 5}, "side is 5; expected one of"),
        ({"blanks": (0, 8)}, r"blanks is \(0, 8\).* within 1 to 12"),
        ({"blanks": (9, 8)}, r"blanks is \(9, 8\)"),
        ({"blanks": (30, 40)}, r"4x4 puzzle takes a range"),
        ({"pool": 0}, "pool is 0"),
        ({"validation_pool": -1}, "validation_pool is -1"),
        ({"test_pool": 0}, "test_pool is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"reward_weights": {"speed": 1.0}}, r"unknown terms \['speed'\]"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    """At construction, before any puzzle is drawn."""
    with pytest.raises(ValueError, match=message):
        Sudoku(**fields)


def test_a_pool_larger_than_the_puzzles_there_are_is_refused():
    """32 validation grids with one blank make 32 * 16 puzzles, all of which can be drawn."""
    exact = Sudoku(blanks=(1, 1), validation_pool=512)
    assert len(whole(exact, "validation").tokens.unique(dim=0)) == 512
    with pytest.raises(ValueError, match=r"has 512 4x4 puzzles with 1 blanks.* 513 are wanted"):
        whole(Sudoku(blanks=(1, 1), validation_pool=513), "validation")


@pytest.mark.parametrize("index", [[0, 512], [-1], [3, 10_000]])
def test_an_index_outside_the_split_is_refused(index):
    """The message names the index and the valid range."""
    with pytest.raises(ValueError, match=f"puzzle {index[-1]} of split 'test'.*0 to 511"):
        FOUR.prompts("test", torch.tensor(index))
