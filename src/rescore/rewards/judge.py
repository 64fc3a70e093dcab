"""What runs inside the sandbox: a judge that tests a program without sharing a process with it.

``sandbox.py`` starts the text of this file as the *judge*. The judge holds the tests, starts the
same text again as the *player*, which loads the untrusted program, and calls the program's
functions through two pipes. Arguments and answers cross as literals (numbers, strings, lists, ...),
so what a test compares is data: there is no object whose ``__eq__`` could lie, no frame to read, no
``assert`` to patch, and only the judge has the pipe that takes the verdict.

Standard library only, and little of it: it starts twice for every program.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import importlib.abc
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import FrameType, ModuleType
from typing import Any, NoReturn

REPLY = 1 << 20
"""Longest reply of a program, bytes."""
DETAIL = 300
"""Longest message of a verdict, characters."""
PR_SET_DUMPABLE = 4
"""From ``linux/prctl.h``."""


class Text(importlib.abc.InspectLoader):
    """Loads a module from its text, so that there is no file to exchange."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, fullname: str) -> str:
        """The text, whatever the name."""
        return self.text


def load(name: str, text: str, given: Mapping[str, Any]) -> ModuleType:
    """Run a program as the module ``name``, whose names start as ``given``."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(given)
    Text(text).exec_module(module)
    return module


def literal(value: Any) -> str:
    """The value as the text of a Python literal.

    Raises:
        TypeError: it is not made of None, numbers except NaN, strings, bytes, lists, tuples, sets
            and dicts.
    """
    if isinstance(value, float) and value != value:
        raise TypeError("nan is not plain data")
    if isinstance(value, float):
        return repr(float(value)).replace("inf", "1e999")
    if value is None or isinstance(value, (int, complex, str, bytes)):
        return ascii(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(literal(item) + ", " for item in value) + ")"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(map(literal, value)) + "}" if value else "set()"
    raise TypeError(f"a {type(value).__name__} is not plain data")


def restrict(limits: Mapping[str, int], *names: str) -> None:
    """Set these resource limits for good, on this process and all that it starts."""
    for name in names:
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = limits[name] if hard == resource.RLIM_INFINITY else min(limits[name], hard)
        resource.setrlimit(number, (value, value))


def silence() -> tuple[int, int]:
    """Standard input and output under new numbers; the old ones, and errors, lead nowhere."""
    kept = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return kept


# The player


def reply(action: Callable[[], Any]) -> bytes:
    """What came of an action: a kind, a value or the name of an exception, and a message."""
    try:
        answer = literal(("value", action(), ""))
    except Exception as error:  # whatever the program raises is its answer
        kind = "refused" if isinstance(error, (OSError, MemoryError)) else "raised"
        answer = literal((kind, type(error).__name__, str(error)[:DETAIL]))
    return answer.encode() + b"\n"


def play() -> None:
    """Load the program, then answer calls: one literal a line in, one a line out."""
    from_judge, to_judge = silence()
    with open(from_judge, "rb") as calls, open(to_judge, "wb", buffering=0) as replies:
        source, limits = ast.literal_eval(calls.readline().decode())
        restrict(limits, "CPU", "NPROC")  # the others are inherited from the judge

        def start() -> None:
            load("solution", source, {})

        def call(line: bytes) -> Any:
            name, args, kwargs = ast.literal_eval(line.decode())
            return getattr(sys.modules["solution"], name)(*args, **kwargs)

        replies.write(reply(start))
        for line in calls:
            replies.write(reply(lambda line=line: call(line)))


# The judge


class Ended(BaseException):
    """The program will answer no more; not an ``Exception``, so that no test takes it for one."""


class Player:
    """The program in its own process, as the judge sees it."""

    def __init__(self, new_session: bool) -> None:
        text = sys.orig_argv[sys.orig_argv.index("-c") + 1]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", text, "play"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=new_session,
        )
        self.end: tuple[str, str] | None = None  # once it has ended: how, and why

    def ask(self, message: Any) -> Any:
        """The value of a call, or the built-in exception that it raised.

        Raises:
            Ended: there is no answer, or one that only a broken or dishonest program gives.
        """
        if self.end is None:
            answer = self._answer(literal(message).encode() + b"\n")
            match answer:
                case ("value", value, str()):
                    return value
                case ("raised", str(name), str(text)):
                    kind = getattr(builtins, name, None)
                    if isinstance(kind, type) and issubclass(kind, Exception):
                        raise kind(text)
                    raise RuntimeError(f"{name}: {text}")
                case ("refused", str(name), str(text)):
                    self.end = "refused", f"{name}: {text}"
                case _:
                    self.end = "died", "the program ended before its tests, or broke the pipe"
        raise Ended(self.end)

    def stub(self, name: str) -> Callable[..., Any]:
        """A function of the program, called over there."""
        return lambda *args, **kwargs: self.ask((name, args, kwargs))

    def _answer(self, line: bytes) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return ast.literal_eval(self.process.stdout.readline(REPLY).decode())
        except (BrokenPipeError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


class Assertions(ast.NodeTransformer):
    """Rewrites ``assert`` so that it reports whether it held, and the test goes on."""

    def __init__(self) -> None:
        self.written = 0
        self.held: dict[int, bool] = {}  # those reached: whether each held every time

    def report(self, number: int, held: bool) -> None:
        """Note an assertion that was reached."""
        self.held[number] = held and self.held.get(number, True)

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        """The same assertion, followed by its report; ``assert True`` says nothing and is left."""
        if isinstance(node.test, ast.Constant) and node.test.value:
            return node
        number, self.written = self.written, self.written + 1
        name = "__report__"
        frame = f"try:\n assert 0\nexcept Exception:\n {name}({number}, False)\n"
        (wrapped,) = ast.parse(frame + f"else:\n {name}({number}, True)").body
        assert isinstance(wrapped, ast.Try)
        wrapped.body = [node]
        return wrapped


def judge() -> None:
    """Test one program, described on standard input; the verdict goes to standard output."""
    task = json.loads(sys.stdin.buffer.read())
    verdict = silence()[1]

    def finish(outcome: str, passed: float, detail: str) -> NoReturn:
        result = {"outcome": outcome, "passed": passed, "detail": detail[:DETAIL]}
        os.write(verdict, json.dumps(result).encode())
        player.process.kill()
        player.process.wait()
        os._exit(0)  # as the first process of a namespace, with all others in it

    def out_of_time(number: int, frame: FrameType | None) -> None:
        finish("timeout", 0.0, f"not finished in {task['seconds']} s")

    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("the judge cannot hide its memory from the program")
    restrict(task["limits"], "AS", "FSIZE", "NOFILE", "CORE")
    player, assertions = Player(new_session=task["isolated"]), Assertions()
    os.write(verdict, b"ready\n")
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, task["seconds"])
    complaint = ""
    try:
        player.ask((task["source"], task["limits"]))
        complaint = examine(task, player, assertions)
    except (Ended, Exception) as error:  # a test may fail in any way; it says how
        complaint = f"{type(error).__name__}: {error}"
    if player.end is not None:
        finish(player.end[0], 0.0, player.end[1])
    held = sum(assertions.held.values())
    counted = assertions.written if complaint else len(assertions.held)
    if counted and held == counted and not complaint:
        finish("passed", 1.0, "")
    reason = complaint or f"{held} of {counted} assertions held"
    finish("failed", held / max(counted, 1), reason)


def examine(task: Mapping[str, Any], player: Player, assertions: Assertions) -> str:
    """Run the tests with the program's functions in place of the reference's.

    Returns:
        The first exception that ended a ``test_`` function early, or an empty text.
    """
    tree = ast.fix_missing_locations(assertions.visit(ast.parse(task["tests"])))
    reference = vars(load("solution", task["reference"], {}))
    reference |= {name: player.stub(name) for name in task["names"]}
    given = {name: value for name, value in reference.items() if not name.startswith("__")}
    tests = load("tests", ast.unparse(tree), {**given, "__report__": assertions.report})
    complaint = ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            try:
                vars(tests)[node.name]()
            except Exception as error:  # the other functions count all the same
                complaint = complaint or f"{node.name}: {type(error).__name__}: {error}"
    return complaint


if __name__ == "__main__":
    {"judge": judge, "play": play}[sys.argv[1]]()
