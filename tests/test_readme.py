"""The README's code blocks: Python is executed, commands must exist and parse.

A block after the comment `<!-- not run -->` is left out; a `rescore` command after
`<!-- run -->` is run in an empty directory, on a tiny version of its recipe.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from rescore import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[\w ]+) -->\s*)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
TINY = shlex.split(
    "--base.steps 2 --base.model.width 16 --base.model.depth 1 --base.model.heads 2 --steps 1 "
    "--batch-size 16 --evaluate.n 16 --evaluate.n-test 16 --task.pool 64"
)


class Block(NamedTuple):
    language: str
    code: str
    mark: str | None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text, in order."""
    return [Block(m["language"], m["code"], m["mark"]) for m in BLOCK.finditer(text)]


def commands(text: str) -> list[tuple[list[str], str | None]]:
    """Every line of the shell blocks as words, without comments, with the mark of its block."""
    return [
        (words, block.mark)
        for block in blocks(text)
        if block.language in ("sh", "bash")
        for line in block.code.splitlines()
        if (words := shlex.split(line, comments=True))
    ]


README = (ROOT / "README.md").read_text()
PYTHON = [b for b in blocks(README) if b.language == "python" and b.mark != "not run"]
COMMANDS = commands(README)


def targets() -> set[str]:
    """What the Makefile can make."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless a command exists, its recipe exists and its options parse. Runs nothing."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        assert set(words[1:]) <= targets(), f"no such target: {words}"
    elif program == "rescore":
        check_rescore(words[1:], monkeypatch)


def check_rescore(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `check_command`: everything up to the point where the work would begin."""
    import rescore.evaluation.report
    import rescore.proof.verify
    import rescore.training.bench
    import rescore.training.session
    from rescore.training import directory, recipes
    from rescore.training.pretrain import Pretrain

    reached = []

    def work(*arguments, **options):
        reached.append(words)
        raise KeyboardInterrupt

    original = recipes.run_of
    tiny_run = {"recipe": "sudoku_egspo", "arguments": []}
    with monkeypatch.context() as patch:
        for module, name in (
            (rescore.evaluation.report, "build_report"),
            (rescore.proof.verify, "check"),
            (rescore.training.bench, "measure"),
            (rescore.training.session, "start"),
            (rescore.training.session, "evaluate_run"),
            (rescore.training.session, "sample_run"),
            (Pretrain, "build"),
        ):
            patch.setattr(module, name, work)
        patch.setattr(directory, "read_run", lambda path: tiny_run)
        patch.setattr(
            cli, "run_of", lambda name: original("sudoku_egspo" if ".py" in name else name)
        )
        try:
            cli.main(words)
        except SystemExit as stop:
            assert stop.code == 130, f"rescore {shlex.join(words)} does not parse"
    assert reached or words[0] in ("list", "cite"), words


def test_there_is_something_to_check():
    """An empty list of blocks would pass everything below."""
    assert PYTHON and {words[0] for words, _ in COMMANDS} >= {"make", "rescore"}


def test_python_blocks_run_in_order():
    """In one namespace, from top to bottom, as a reader would paste them."""
    namespace = {"__name__": "readme"}
    for number, block in enumerate(PYTHON):
        exec(compile(block.code, f"README.md, python block {number}", "exec"), namespace)


@pytest.mark.parametrize(("words", "mark"), COMMANDS, ids=lambda x: str(x) and shlex.join(x or []))
def test_commands_exist_and_parse(words, mark, monkeypatch, tmp_path, capsys):
    """Known target, command, recipe and options; marked ones are run too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "cache"))
    check_command(words, monkeypatch)
    if mark == "run":
        cli.main([*words[1:], *(TINY if words[1] in ("train", "pretrain") else [])])


@pytest.mark.parametrize(
    "line",
    [
        "make demos",
        "rescore trian sudoku_egspo",
        "rescore train sudoku_egpso",
        "rescore train sudoku_egspo --optim.rl 1",
        "rescore eval runs/DIR --orders max_prob",
        "rescore cite egpso",
        "rescore verify reinforc",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line, monkeypatch):
    """The check above can fail: for each kind of name in a command."""
    ((words, _),) = commands(f"```sh\n{line}  # comment\n```\n")
    with pytest.raises(AssertionError):
        check_command(words, monkeypatch)


def test_links_to_files_lead_somewhere():
    """Every relative link of the README exists."""
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", README)]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_nothing_is_left_to_be_filled_in():
    """No placeholder in what a stranger reads first."""
    assert "PLACEHOLDER" not in (ROOT / "README.md").read_text()
