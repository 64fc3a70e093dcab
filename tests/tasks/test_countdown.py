"""The Countdown task: its problems, its splits, its rewards and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rescore.rewards.arithmetic import evaluate, numbers_in
from rescore.rewards.text import FACTS, unpack
from rescore.tasks.countdown import Countdown
from rescore.tasks.countdown_problems import SPLITS, needed_lengths, solve, split_of, written
from rescore.tasks.tokenizers import Characters

TASKS = [
    pytest.param(
        Countdown.bare(
            count=2, numbers=(1, 30), seed=3, pool=400, validation_pool=60, test_pool=90
        ),
        id="two",
    ),
    pytest.param(Countdown(seed=3, pool=1000, validation_pool=100, test_pool=150), id="three"),
    pytest.param(
        Countdown.bare(
            count=4,
            numbers=(2, 9),
            targets=(10, 1200),
            seed=3,
            pool=1000,
            validation_pool=100,
            test_pool=150,
        ),
        id="four",
    ),
]
THREE = Countdown()
CHARACTERS = Characters(alphabet="".join(map(chr, range(32, 127))) + "\n")
WORDED = Countdown(
    wording="instructions",
    tokenizer=CHARACTERS,
    prompt_length=700,
    completion_length=120,
    prefill="<reasoning>",
    pool=50,
    validation_pool=20,
    test_pool=20,
)


def values(numbers, operators):
    """Every value of the numbers, each used once, in any order and any brackets."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            rest = [n for i, n in enumerate(numbers) if i not in chosen]
            left, right = values([numbers[i] for i in chosen], operators), values(rest, operators)
            for a, b in itertools.product(left, right):
                found |= {a + b, a - b}
                found |= {a * b} if "*" in operators else set()
                found |= {a / b} if "/" in operators and b else set()
    return found


def facts(task, text):
    """What the rewards know of a typed problem."""
    return unpack(task.read([text]).info[FACTS])


def judged(task, text, completion):
    """Each term of one completion."""
    terms = task.functions
    return {name: term([completion], facts(task, text))[0] for name, term in terms.items()}


# The problems


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_every_gold_expression_solves_its_problem(task, split):
    """By the evaluator: the numbers of the question, each once, and the target, within ranges."""
    problems = task.problems(split)
    assert len(problems) == task.size(split)
    for problem in problems:
        *numbers, target = map(int, re.findall(r"\d+", problem.question))
        assert problem.question == f"{','.join(map(str, numbers))}={target}"
        assert numbers == sorted(numbers_in(problem.gold)) == sorted(problem.facts["numbers"])
        assert evaluate(problem.gold) == target == problem.facts["target"]
        assert len(numbers) == task.count
        assert task.numbers[0] <= numbers[0] <= numbers[-1] <= task.numbers[1]
        assert task.targets[0] <= target <= task.targets[1]


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_distinct(task):
    """No set of numbers comes twice with the same target, even in another order."""
    for split in SPLITS:
        problems = task.problems(split)
        keys = {(*sorted(p.facts["numbers"]), "=", p.facts["target"]) for p in problems}
        assert len(keys) == len(problems)


def test_the_mix_of_problems_is_that_of_random_expressions():
    """+ and - are enough for 85 %, x is needed by 7.5 %, a division by 7.3 %, each to 2 %.

    The figures were measured with another program that draws from the same law.
    """
    problems = Countdown(pool=4000).problems("train")
    kinds = dict.fromkeys(["+-", "+-*", "+-*/"], 0)
    for problem in problems:
        numbers, target = problem.facts["numbers"], problem.facts["target"]
        kinds[next(kind for kind in kinds if target in values(numbers, kind))] += 1
    share = {kind: count / len(problems) for kind, count in kinds.items()}
    assert share == pytest.approx({"+-": 0.853, "+-*": 0.075, "+-*/": 0.073}, abs=0.02)


@pytest.mark.parametrize(
    ("numbers", "operators", "text"),
    [
        ((7, 12, 30), "++", "30+12+7"),
        ((7, 12, 30), "-+", "30+7-12"),
        ((7, 12, 30, 40), "---", "7-40-30-12"),
        ((2, 12, 3), "/*", "3*2/12"),
        ((2, 12, 3, 5), "+*-", "(12+2)*3-5"),
        ((2, 12, 3, 5), "*+/", "(12*2+3)/5"),
        ((2, 12, 3, 5), "*-+", "12*2+5-3"),
        ((2, 3), "-", "2-3"),
    ],
)
def test_gold_expressions_are_written_in_one_form(numbers, operators, text):
    """No needless bracket; what is added or multiplied comes first, larger numbers before smaller.

    The value is that of the expression worked out from left to right.
    """
    value = Fraction(numbers[0])
    for operator, number in zip(operators, numbers[1:], strict=True):
        value = evaluate(f"({value.numerator}/{value.denominator}){operator}{number}")
    assert written(numbers, operators) == text
    assert evaluate(text) == value


@pytest.mark.parametrize("task", TASKS)
def test_every_bracket_of_a_gold_expression_is_needed(task):
    """It holds a sum that is multiplied or divided."""
    for problem in task.problems("train"):
        gold = problem.gold
        for bracket in re.finditer(r"\(([^()]*)\)", gold):
            assert re.search(r"[+-]", bracket[1]) and gold[bracket.end()] in "*/"


# The windows


@pytest.mark.parametrize("task", TASKS)
def test_needed_lengths_hold_every_problem_and_are_met(task):
    """No prompt or solution is longer, and a prompt of the full length exists."""
    windows = needed_lengths(task.count, task.numbers, task.targets)
    assert windows == (task.prompt_length, task.completion_length)
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    assert max(len(problem.question) for problem in problems) <= windows[0]
    assert max(len(problem.gold) for problem in problems) <= windows[1]
    alphabet = set(Characters().alphabet)
    assert all(set(problem.question + problem.gold) <= alphabet for problem in problems)


@pytest.mark.parametrize(
    ("count", "numbers", "targets", "longest"),
    [
        (2, (1, 9), (1, 81), ("9,9=81", "9*9")),
        (3, (1, 100), (1, 100), ("100,100,100=100", "(100-100)*100")),
        (4, (1, 20), (1, 999), ("20,20,20,20=999", "(20+20)*(20-10)")),
    ],
)
def test_needed_lengths_by_hand(count, numbers, targets, longest):
    """The longest prompt and the longest solution of a range fit exactly."""
    assert needed_lengths(count, numbers, targets) == tuple(map(len, longest))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=4),
    st.integers(1, 100),
)
def test_solve_finds_a_solution_that_fits_wherever_there_is_one(numbers, target):
    """Compared with every value the numbers can take, by a search that shares no code."""
    found = solve(numbers, target)
    assert (found is not None) == (target in values(numbers, "+-*/"))
    if found is not None:
        assert evaluate(found) == target
        assert sorted(numbers_in(found)) == sorted(numbers)
        assert len(found) <= needed_lengths(len(numbers), (1, 100), (1, 100))[1]
        assert bool(re.search(r"[*/]", found)) == (target not in values(numbers, "+-"))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_solve_reaches_every_value_of_small_numbers(data):
    """Targets drawn among the values themselves, so that none is missed, whatever its form."""
    numbers = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))
    whole = sorted(int(v) for v in values(numbers, "+-*/") if v.denominator == 1 and v > 0)
    target = data.draw(st.sampled_from(whole or [sum(numbers)]))
    found = solve(numbers, target)
    assert found is not None and evaluate(found) == target
    assert len(found) <= needed_lengths(4, (1, 9), (1, 100))[1]


def test_a_window_too_small_is_refused():
    """At construction, with the lengths that would do."""
    windows: list[dict[str, Any]] = [
        {"prompt_length": 14},
        {"completion_length": 12},
        {"numbers": (1, 1000), "targets": (1, 9)},
        {"targets": (1, 1000)},
    ]
    for fields in windows:
        with pytest.raises(ValueError, match="need"):
            Countdown(**fields)


# The splits


def test_numbers_are_split_by_their_content_hash():
    """sha256 of the sorted numbers modulo 10: seven parts train, one validation, two test."""
    parts = set()
    for numbers in itertools.product(range(1, 8), repeat=3):
        text = ",".join(map(str, sorted(numbers)))
        part = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
        expected = "train" if part < 7 else "validation" if part < 8 else "test"
        assert split_of(numbers) == expected
        parts.add(part)
    assert parts == set(range(10))


@pytest.mark.parametrize("task", TASKS)
def test_no_two_splits_share_numbers(task):
    """Under any seed: the numbers of a problem alone say to which split it belongs."""
    seen = {}
    for split in SPLITS:
        seen[split] = {tuple(sorted(p.facts["numbers"])) for p in task.problems(split)}
        assert {split_of(numbers) for numbers in seen[split]} == {split}
    assert not any(seen[a] & seen[b] for a, b in itertools.combinations(SPLITS, 2))


def test_a_pool_larger_than_the_problems_there_are_is_refused():
    """Every problem of a small range can be drawn; one more cannot."""
    ranges = {"count": 2, "numbers": (1, 6), "targets": (1, 36)}
    exist = sum(
        value.denominator == 1 and 1 <= value <= 36
        for numbers in itertools.combinations_with_replacement(range(1, 7), 2)
        if split_of(numbers) == "train"
        for value in values(numbers, "+-*/")
    )
    assert len(Countdown.bare(**ranges, pool=exist).problems("train")) == exist
    with pytest.raises(ValueError, match=f"'train' has {exist} problems.* {exist + 1} are wanted"):
        Countdown.bare(**ranges, pool=exist + 1).problems("train")


# Pure functions


def test_pools_follow_from_the_fields_in_any_process():
    """A second interpreter draws the same problems; the first of a pool are those of a smaller."""
    script = (
        "import hashlib\n"
        "from rescore.tasks.countdown import Countdown\n"
        "lines = [p.question + p.gold for p in Countdown(seed=11, pool=200).problems('train')]\n"
        "print(hashlib.sha256('\\n'.join(lines).encode()).hexdigest())\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    problems = Countdown(seed=11, pool=300).problems("train")[:200]
    lines = [problem.question + problem.gold for problem in problems]
    assert there == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_seeds_draw_different_problems():
    """Neither a seed nor a split repeats the stream of another."""
    tasks = [Countdown(seed=seed, pool=99, test_pool=99) for seed in (0, 1)]
    drawn = [tasks[0].problems("train"), tasks[1].problems("train"), tasks[0].problems("test")]
    pools = [[len(problem.gold) for problem in problems] for problems in drawn]
    assert not any(a == b for a, b in itertools.combinations(pools, 2))


def test_clean_limit_shows_fewer_training_problems():
    """The first of them, with their solutions; the other splits and all the prompts stay."""
    task = Countdown(pool=40, validation_pool=8, test_pool=8, clean_limit=5)
    shown = task.clean("train")
    every = task.prompts("train", torch.arange(40))
    assert task.size("train") == 40
    assert torch.equal(shown.x_0, task.gold(every)[:5])
    assert torch.equal(shown.editable, every.editable[:5])
    assert shown.attend is not None and every.attend is not None
    assert torch.equal(shown.attend, every.attend[:5])
    assert len(task.clean("test").x_0) == len(task.clean("validation").x_0) == 8
    assert len(Countdown(pool=40).clean("train").x_0) == 40


# Judging


@pytest.mark.parametrize(
    ("completion", "solved", "used", "formed"),
    [
        ("2*4-3", 1, 1, 1),
        ("4*2-3", 1, 1, 1),
        ("(2*4)-3", 1, 1, 1),  # needless brackets, all the same a solution
        ("-3+4*2", 1, 1, 1),
        ("2*(4-3)", 0, 1, 1),  # 2
        ("3/(4-2*2)", 0, 0, 1),  # a number twice
        ("2+3", 0, 0, 1),  # 5, but one number is missing
        ("1+4", 0, 0, 1),
        ("2+4-3+2", 0, 0, 1),  # 5, with a number twice
        ("5", 0, 0, 1),
        ("24-3", 0, 0, 1),  # digits glued together
        ("2*4-3=5", 0, 0, 0),
        ("2**4-3", 0, 0, 0),
        ("4**3**2", 0, 0, 0),
        ("9**9", 0, 0, 0),
        ("4//2+3", 0, 0, 0),  # 5 in Python
        ("2*4-", 0, 0, 0),
        ("", 0, 0, 0),
        ("((2*4-3", 0, 0, 0),
    ],
)
def test_rewards_by_hand(completion, solved, used, formed):
    """Of the numbers 2, 3, 4 make 5."""
    terms = judged(THREE, "2,3,4=5", completion)
    assert terms == {"solve_rate": solved, "numbers_used": used, "well_formed": formed}


def test_a_division_by_zero_solves_nothing():
    """The expression is one and uses the numbers; it has no value."""
    terms = judged(THREE, "3,3,6=3", "6/(3-3)")
    assert terms == {"solve_rate": 0, "numbers_used": 1, "well_formed": 1}


def test_values_are_exact():
    """A value off by less than rounding is no solution; a fraction on the way is none the worse."""
    assert judged(THREE, "3,7,21=9", "21/7*3")["solve_rate"] == 1
    assert judged(THREE, "3,7,21=9", "3/7*21")["solve_rate"] == 1
    big = "999999999999/999999999998"
    known = [{"numbers": [999999999999, 999999999998], "target": 1}]
    assert THREE.functions["solve_rate"]([big], known) == [0.0]


@pytest.mark.parametrize(
    ("completion", "solved", "formed"),
    [
        ("<reasoning>\nx\n</reasoning>\n<answer>\n2 * 4 - 3\n</answer>", 1, 1),
        ("<answer>2*4-3</answer>", 1, 1),  # the format is not judged here
        ("<answer>2+4-3</answer> wait <answer>2*4-3</answer>", 1, 1),  # the last answer counts
        ("<answer>2*4-3</answer> wait <answer>2+4-3</answer>", 0, 1),
        ("<reasoning>2*4-3</reasoning>", 0, 0),  # no answer at all
        ("2*4-3", 0, 0),
        ("<answer>2*4-3", 0, 0),
        ("<answer></answer>", 0, 0),
        ("<answer>2*4-3=5</answer>", 0, 0),
        ("<answer>\\boxed{2*4-3}</answer>", 1, 1),
        ("<answer>__import__('os')</answer>", 0, 0),
        ("<answer>9**9**9</answer>", 0, 0),
    ],
)
def test_worded_answers_by_hand(completion, solved, formed):
    """Only what stands in the last answer block is judged."""
    terms = judged(WORDED, "2,3,4=5", completion)
    assert (terms["solve_rate"], terms["well_formed"]) == (solved, formed)


def test_solving_is_what_is_optimised_unless_the_weights_say_otherwise():
    """The other terms are reported."""
    prompts = THREE.read(["2,3,4=5"])
    wrong = THREE.tokenizer.encode("2+3+4")
    fill = [THREE.tokenizer.end_id] * (THREE.completion_length - len(wrong))
    outputs = torch.cat(
        [prompts.tokens[:, : THREE.prompt_length], torch.tensor([[*wrong, *fill]])], 1
    )
    for weights, expected in [({}, 0.0), ({"numbers_used": 0.25}, 0.25)]:
        reward = Countdown(reward_weights=weights).reward
        terms = reward.terms(outputs, prompts)
        assert {name: value.item() for name, value in terms.items()} == {
            "solve_rate": 0,
            "numbers_used": 1,
            "well_formed": 1,
        }
        assert reward.total(terms).item() == expected
        assert reward.total(reward.terms(THREE.gold(prompts), prompts)).item() == 1 + expected


@pytest.mark.parametrize("task", [*TASKS, pytest.param(WORDED, id="worded")])
def test_gold_completions_earn_the_full_reward(task):
    """In every split and every term."""
    task.validate(300)


# Files


def rows_of(numbers, forms=0):
    """Two rows for each set of numbers, in one of the public forms."""
    rows = [(list(n), sum(n)) for n in numbers] + [(list(n), max(n)) for n in numbers]
    if forms:
        return [{"input": ",".join(map(str, n)), "output": str(target)} for n, target in rows]
    return [{"nums": n, "target": target} for n, target in rows]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("forms", [0, 1])
def test_one_file_is_split_by_numbers(tmp_path, forms):
    """Whatever its form, every solvable row of three numbers comes back in the split of its own."""
    numbers = [(a, a, b) for a in range(2, 30) for b in range(30, 34)]  # b = b + a - a
    save(tmp_path / "all.jsonl", rows_of([*numbers, (1, 2, 3, 4)], forms))
    task = Countdown(source=str(tmp_path / "all.jsonl"))
    seen = []
    for split in SPLITS:
        for problem in task.problems(split):
            assert split_of(problem.facts["numbers"]) == split
            assert evaluate(problem.gold) == problem.facts["target"]
            seen.append((tuple(problem.facts["numbers"]), problem.facts["target"]))
    assert sorted(seen) == sorted((n, f(n)) for n in numbers for f in (sum, max))
    task.validate()


def test_files_of_a_folder_are_their_splits_but_for_numbers_held_out(tmp_path):
    """The test file is taken as it is; its numbers, in any order, are kept from training."""
    save(tmp_path / "test.jsonl", rows_of([(5, 5, 30), (6, 6, 30)]))
    save(tmp_path / "validation.jsonl", rows_of([(30, 6, 6), (7, 7, 30)], 1))
    save(tmp_path / "train.jsonl", rows_of([(5, 30, 5), (7, 30, 7), (8, 8, 30), (30, 8, 8)]))
    task = Countdown(source=str(tmp_path))
    asked = {split: [p.question for p in task.problems(split)] for split in SPLITS}
    assert asked == {
        "test": ["5,5,30=40", "6,6,30=42", "5,5,30=30", "6,6,30=30"],
        "validation": ["7,7,30=44", "7,7,30=30"],
        "train": ["8,8,30=46", "8,8,30=30"],
    }
    smaller = Countdown(source=str(tmp_path), test_pool=3)
    assert [p.question for p in smaller.problems("test")] == asked["test"][:3]
    with pytest.raises(ValueError, match=r"no problem of 4 numbers for split 'test'"):
        Countdown.bare(count=4, source=str(tmp_path)).problems("test")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"nums": [3, 5, 7]}, r"a record is \{'nums': \[3, 5, 7\]\}"),
        ({"nums": "3,5,7", "target": 22}, "a record is"),
        ({"nums": [3, 5, 7.5], "target": 22}, "'3,5,7.5=22' is no problem"),
        ({"input": "3,5,7", "output": "many"}, "'3,5,7=many' is no problem"),
        ({"nums": [3, 5, 7], "target": 99}, "row 1 of .*: 99 cannot be made"),
    ],
)
def test_a_row_that_is_no_problem_is_refused(tmp_path, row, reason):
    """It is shown, with what is wrong."""
    split = split_of((3, 5, 7))
    save(tmp_path / "all.jsonl", [{"nums": [3, 7, 5], "target": 15}, row])
    with pytest.raises(ValueError, match=reason):
        Countdown(source=str(tmp_path / "all.jsonl")).problems(split)


# Texts


def test_show_prints_the_problem_as_it_is_typed():
    """Then, a space apart, the completion; what is not yet written is a dot."""
    prompts = THREE.read([" 30, 7,12 =35"])
    assert THREE.show(prompts.tokens[0]) == "7,12,30=35 ............."
    assert THREE.show(THREE.gold(prompts)[0]).startswith("7,12,30=35 30+12-7\N{END OF PROOF}")
    again = THREE.read([THREE.show(prompts.tokens[0]).split()[0]])
    assert torch.equal(again.tokens, prompts.tokens)


def test_instructions_state_the_problem_and_the_form_of_the_reply():
    """The numbers in the order given, the target and all four tags."""
    question = WORDED.problem("30,7,12=35").question
    assert "30, 7, 12" in question and "35" in question
    for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert tag in question
    assert evaluate("6 * 4 - 11") == 13  # the example it gives is right
    assert question.endswith("<answer>\n6 * 4 - 11\n</answer>")


def test_a_prefill_opens_every_completion():
    """The model is given the first tag; the rewards and the gold completions include it."""
    prompts = WORDED.read(["2,3,4=5"])
    gold = WORDED.gold(prompts)
    assert "<reasoning>" not in WORDED.tokenizer.decode(gold[0, WORDED.prompt_length :].tolist())
    assert WORDED.completions(gold)[0].startswith("<reasoning>\n")


# Bad input


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no problem"),
        ("3,5,7", "no problem"),
        ("3,5,7=", "no problem"),
        ("3,5,x=7", "no problem"),
        ("3 5 7=22", "no problem"),
        ("3,5,7=22 3*5+7", "no problem"),
        ("3,-5,7=22", "no problem"),
        ("99999,5,7=22", "no problem"),
        ("22=22", "1 numbers"),
        ("1,2,3,4,5=22", "5 numbers"),
        ("3,5,7=99", r"99 cannot be made from the numbers \[3, 5, 7\]"),
    ],
)
def test_a_problem_that_cannot_be_posed_is_refused(text, reason):
    """The message says which one and why."""
    with pytest.raises(ValueError, match=f"number 1 .*{reason}"):
        THREE.read(["3,5,7=22", text])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 5}, "count is 5; expected one of"),
        ({"numbers": (0, 9)}, r"numbers is \(0, 9\).* within 1 to"),
        ({"numbers": (9, 8)}, r"numbers is \(9, 8\)"),
        ({"numbers": (1, 10_000)}, r"numbers is \(1, 10000\)"),
        ({"targets": (0, 9)}, r"targets is \(0, 9\)"),
        ({"pool": 0}, "pool is 0"),
        ({"validation_pool": -1}, "validation_pool is -1"),
        ({"test_pool": 0}, "test_pool is 0"),
        ({"clean_limit": 0}, "clean_limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"reward_weights": {"speed": 1.0}}, r"unknown terms \['speed'\]"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    """At construction, before any problem is drawn."""
    with pytest.raises(ValueError, match=message):
        Countdown(**fields)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"wording": "instructions"}, r"'\\n\.:<>.*[a-z]'"),
        ({"tokenizer": Characters(alphabet="0123456789+-*,= ")}, "'\\(\\)/'"),
    ],
)
def test_a_tokenizer_that_cannot_write_the_words_is_refused(fields, missing):
    """At construction, with the characters that are missing and what to take instead."""
    with pytest.raises(ValueError, match=f"lacks {missing}, .*PretrainedTokenizer"):
        Countdown(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_length": 400}, "a prompt has .* prompt_length=400"),
        ({"completion_length": 50}, "a completion has .* completion_length=50"),
    ],
)
def test_problems_that_do_not_fit_are_refused_before_anything_is_loaded(fields, message):
    """By ``check``; the message quotes the text."""
    WORDED.check()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WORDED, **fields).check()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": [3, 5, 700], "target": 22}, r"\[3, 5, 700\] is not within numbers=\(2, 100\)"),
        ({"nums": [1, 5, 7], "target": 13}, r"\[1, 5, 7\] is not within numbers=\(2, 100\)"),
        ({"nums": [3, 5, 70], "target": 78}, r"\[78\] is not within targets=\(4, 60\)"),
        ({"nums": [3, 5, 7], "target": 1}, r"\[1\] is not within targets=\(4, 60\)"),
    ],
)
def test_a_row_outside_the_ranges_is_refused(tmp_path, row, message):
    """Before anything is loaded, with its number; rows of other counts are not asked."""
    fine, other = {"nums": [2, 2, 100], "target": 25}, {"nums": [1, 2, 3, 700], "target": 999}
    for name, last in (("validation", 5), ("test", 6)):
        save(tmp_path / f"{name}.jsonl", [{"nums": [2, 2, last], "target": last}])
    task = Countdown(source=str(tmp_path), numbers=(2, 100), targets=(4, 60))
    save(tmp_path / "train.jsonl", [fine, other, row])
    with pytest.raises(ValueError, match=rf"row 2 of .*, split 'train': {message}"):
        task.check()
    dataclasses.replace(task, pool=1).check()  # the row is not among those taken


def test_code_in_an_answer_is_not_run(tmp_path):
    """It earns 0 in every term, the others of the batch what they earn, and nothing happens."""
    path = tmp_path / "x"
    answers = {
        f"open('{path}','w')": 0,
        f"__import__('os').system('touch {path}')": 0,
        "9**9**9": 0,
        "9**9**9**9": 0,
        "exit()": 0,
        "a": 0,
        "()" * 9: 0,
        "((((((((((": 0,
        "1/0": 1,
        "2*4-3": 1,
    }
    task = dataclasses.replace(THREE, tokenizer=CHARACTERS, completion_length=200)
    problem = task.read(["2,3,4=5"]).take(torch.zeros(len(answers), dtype=torch.long))
    rows = [task.tokenizer.encode(answer) for answer in answers]
    rows = [[*row, *[task.tokenizer.end_id] * (200 - len(row))] for row in rows]
    outputs = torch.cat([problem.tokens[:, : task.prompt_length], torch.tensor(rows)], 1)
    terms = task.reward.terms(outputs, problem)
    assert terms["well_formed"].tolist() == list(answers.values())
    assert terms["solve_rate"].tolist() == [0] * (len(answers) - 1) + [1]
    assert terms["numbers_used"].tolist() == [0] * (len(answers) - 1) + [1]
    assert not path.exists()
