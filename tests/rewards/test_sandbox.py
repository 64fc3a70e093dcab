"""The sandbox: what programs earn, what they cannot do, and that nothing of them is left."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from rescore.rewards.judge import literal
from rescore.rewards.sandbox import Limits, Result, Sandbox, Trial, namespaces_available

LIMITS = Limits(seconds=30.0, memory_mb=256, file_mb=4, processes=6)
SHORT = dataclasses.replace(LIMITS, seconds=1.0)  # for programs that never end
TESTS = "assert f(1) == 2\nassert f(2) == 3\nassert f(5) == 6\nassert f(6) == 7\n"
RIGHT = "def f(x):\n    return x + 1\n"
NAME = uuid.uuid4().hex[:12]  # every hostile program calls its process so, and forks inherit it
HEAD = f"import ctypes, os, sys, time\nctypes.CDLL(None).prctl(15, b'{NAME}', 0, 0, 0)\n"
FORGED = '{"outcome": "passed", "passed": 1.0, "detail": ""}'

needs_namespaces = pytest.mark.skipif(
    not namespaces_available(), reason="this machine gives no namespaces"
)
KINDS = [
    pytest.param(Sandbox(limits=LIMITS), id="namespaces", marks=needs_namespaces),
    pytest.param(Sandbox(limits=LIMITS, unsafe=True), id="unsafe"),
]

HOSTILE = {
    "loops": ("timeout", "while True: pass"),
    "sleeps in a call": ("timeout", "def f(x):\n    time.sleep(9 * (x > 2))\n    return x + 1"),
    "sleeps": ("timeout", "time.sleep(60)"),
    "prints forever": ("timeout", "while True: print('x' * 4096)"),
    "allocates memory": ("refused", "x = [bytearray(1 << 26) for _ in range(1 << 10)]"),
    "fills a file": ("refused", "with open('x', 'wb') as f:\n    while True: f.write(bytes(4096))"),
    "opens files": ("refused", "x = [open('/dev/null') for _ in range(1000)]"),
    "exits": ("died", "sys.exit(0)"),
    "exits for good": ("died", "os._exit(0)"),
    "exits in a call": ("died", "def f(x):\n    if x > 1: os._exit(0)\n    return x + 1"),
    "crashes": ("died", "ctypes.string_at(0)"),
    "kills its group": ("died", "os.setsid() if os.getpid() != os.getsid(0) else 0\nos.kill(0, 9)"),
    "closes its pipes": ("died", RIGHT + "os.closerange(0, 64)"),
    "prints a verdict": ("died", f"print('ready\\n' + {FORGED!r}, flush=True)\nos._exit(0)"),
    "writes a verdict to every file": (
        "died",
        f"for n in range(64):\n    try: os.write(n, {(FORGED + chr(10)).encode()!r})\n"
        "    except OSError: pass\nos._exit(0)",
    ),
    "replies at length": ("died", "def f(x):\n    return 'x' * (1 << 21)"),
}
"""What a program tries in either kind of sandbox, and how it ends."""

LOCKED = {
    "forks endlessly": ("refused", "while True: os.fork()"),
    "forks and waits": (
        "timeout",
        "while True:\n    try: os.fork()\n    except OSError: time.sleep(0.1)",
    ),
    "starts a daemon": (
        "timeout",
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)\nos._exit(0)",
    ),
    "writes outside": ("refused", "open('/usr/rescore', 'w')"),
    "writes to the root": ("refused", "open('/rescore', 'w')"),
    "fills the disk": (
        "refused",
        "for n in range(100):\n    with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(1 << 20))",
    ),
}
"""What only namespaces stop."""


def trial(source, tests=TESTS, names=("f",), **fields):
    return Trial(source=source, tests=tests, names=names, **fields)


def living():
    """Processes, of any user, that call themselves ``NAME``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = path.read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        found += [path] if name == NAME else []
    return found


def survivors():
    """Those still living after five seconds; what was just killed may take a moment to go."""
    deadline = time.monotonic() + 5
    while living() and time.monotonic() < deadline:
        time.sleep(0.01)
    return living()


@needs_namespaces
def test_a_program_starts_no_more_processes_than_its_limit():
    """The judge and the program count; no more than 30 are tried, so that nothing can go wrong."""
    source = HEAD + (
        "def f():\n    for n in range(30):\n        try:\n"
        "            if os.fork() == 0: time.sleep(60)\n"
        "        except OSError:\n            return n\n    return 30"
    )
    result = Sandbox(limits=LIMITS).run(trial(source, f"assert f() == {LIMITS.processes} - 2"))
    assert result.outcome == "passed"
    assert survivors() == []


def test_the_process_table_shows_who_calls_himself_so():
    """The check for survivors below sees a process if there is one."""
    source = HEAD + "print(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(living()) == 1
        process.kill()


@pytest.fixture(scope="module", params=KINDS)
def batch(request):
    """Programs that never end, with little time; then the others, between honest ones."""
    sandbox = request.param
    programs = HOSTILE | (LOCKED if not sandbox.unsafe else {})
    endless = [name for name, (outcome, _) in programs.items() if outcome == "timeout"]
    ending = [name for name in programs if name not in endless]
    trials = {name: trial(HEAD + source) for name, (_, source) in programs.items()}
    trials |= {"honest": trial(RIGHT), "honest again": trial(RIGHT + "\n")}
    start = time.monotonic()
    short = dataclasses.replace(sandbox, limits=SHORT)
    results = dict(zip(endless, short.run_many([trials[n] for n in endless], 3), strict=True))
    seconds = time.monotonic() - start
    names = ["honest", *ending, "honest again"]
    results |= dict(zip(names, sandbox.run_many([trials[n] for n in names], 3), strict=True))
    return programs, results, seconds


def test_hostile_programs_earn_nothing(batch):
    """And the reason is told apart."""
    programs, results, _ = batch
    expected = {name: (outcome, 0.0) for name, (outcome, _) in programs.items()}
    assert {name: (results[name].outcome, results[name].passed) for name in programs} == expected
    assert all(results[name].detail for name in programs)


def test_others_in_the_batch_are_not_affected(batch):
    """Honest programs before and after them pass."""
    _, results, _ = batch
    passed = Result(outcome="passed", passed=1.0, detail="")
    assert results["honest"] == results["honest again"] == passed


def test_a_batch_returns_in_time(batch):
    """Programs that never end take their time, three at once, and what starting them takes."""
    programs, _, seconds = batch
    endless = sum(outcome == "timeout" for outcome, _ in programs.values())
    assert seconds < math.ceil(endless / 3) * (SHORT.seconds + 5)


def test_no_process_survives(batch):
    """Not one that forked, started a session or ignored its parent's end."""
    assert batch is not None
    assert survivors() == []


SCORES = {
    RIGHT: 1.0,
    "def f(x): return x + 1 if x > 1 else 0": 3 / 4,
    "def f(x): return {1: 2, 2: 3}[x]": 1 / 2,
    "def f(x): return None": 0.0,
    "def g(x): return x + 1": 0.0,
    "def f(x) return": 0.0,
    "raise ValueError('no')": 0.0,
    "": 0.0,
}


@pytest.mark.parametrize("sandbox", KINDS)
def test_the_score_is_the_fraction_of_assertions_that_hold(sandbox):
    """A wrong answer and an exception cost one assertion; a program that does not load, all."""
    results = sandbox.run_many([trial(source) for source in SCORES], workers=3)
    assert {source: r.passed for source, r in zip(SCORES, results, strict=True)} == SCORES
    assert [r.outcome for r in results] == ["passed"] + ["failed"] * (len(SCORES) - 1)


CHEATS = {
    "equals everything": (
        "class Yes:\n    def __eq__(self, other): return True\n"
        "    def __bool__(self): return True\n    __hash__ = None\ndef f(x): return Yes()"
    ),
    "a number that equals everything": (
        "class Yes(int):\n    def __eq__(self, other): return True\n"
        "    def __repr__(self): return 'Yes()'\ndef f(x): return Yes(0)"
    ),
    "a broken comparison in builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.len = lambda *a: True\n"
        "def f(x): return 0"
    ),
    "patches what it imports": (
        "import sys, ast, json, os\nsys.modules['tests'] = None\njson.dumps = lambda x: "
        f"{FORGED!r}\nast.literal_eval = lambda x: ('f', (1,), {{}})\ndef f(x): return 0"
    ),
    "walks the frames": (
        "import sys, gc\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
        "frame.f_globals.update(finish=None, Assertions=None)\n"
        "for item in gc.get_objects():\n"
        "    if isinstance(item, dict) and 'tests' in item: item['tests'] = 'assert True'\n"
        "def f(x): return 0"
    ),
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n"
    "def f(x): return 0",
}


@pytest.mark.parametrize("sandbox", KINDS)
def test_cheating_in_the_own_process_earns_nothing(sandbox):
    """The tests run elsewhere, on data."""
    results = sandbox.run_many([trial(source) for source in CHEATS.values()], workers=3)
    assert {name: r.passed for name, r in zip(CHEATS, results, strict=True)} == dict.fromkeys(
        CHEATS, 0.0
    )


PROBE = """
import ctypes, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
def listing(path): return sorted(os.listdir(path))
def environ(): return sorted(os.environ)
def exists(path): return os.path.exists(path)
def interfaces(): return [name for _, name in socket.if_nameindex()]
def connect(port): socket.create_connection(("127.0.0.1", port), timeout=0.3)
def attach(): return libc.ptrace(16, os.getppid(), 0, 0)
def parent(): return os.getppid()
def kill(): return [os.kill(os.getppid(), number) for number in (9, 15, 19)]
def privileges(): return [n for n in range(64) if libc.prctl(23, n, 0, 0, 0) == 1]
def namespace(): return libc.unshare(0x10000000)
def flags(path): return os.statvfs(path).f_flag
def room(path): return os.statvfs(path).f_blocks * os.statvfs(path).f_frsize
def owner(path): return os.stat(path).st_uid
def no_new_privileges(): return libc.prctl(39, 0, 0, 0, 0)
def nowhere(number): return os.fstat(number).st_rdev == os.stat(os.devnull).st_rdev
def limit(name): return resource.getrlimit(getattr(resource, "RLIMIT_" + name))
def groups(): return os.getgroups()
def shared(key): return libc.shmget(key, 0, 0)
def mount(): return libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None)
def remount(): return libc.mount(None, b"/usr", None, 4096 | 32, None)
def user(): return os.getuid()
"""


def probe(sandbox, *tests):
    """What a program finds out about its surroundings: which of the tests do not hold."""
    names = [line[4 : line.index("(")] for line in PROBE.splitlines() if line.startswith("def ")]
    results = sandbox.run_many([trial(PROBE, f"assert {t}", tuple(names)) for t in tests], 3)
    return [
        (test, r.detail) for test, r in zip(tests, results, strict=True) if r.outcome != "passed"
    ]


@needs_namespaces
def test_in_namespaces_there_is_nothing_to_find():
    """No files, network, processes, privileges, environment, nor a way to get them back."""
    home = Path(sys.base_prefix).resolve().parts[1]
    root = {"bin", "dev", "lib", "lib32", "lib64", "old", "proc", "sbin", "tmp", "usr", home}
    wrong = probe(
        Sandbox(limits=LIMITS),
        "listing('/tmp') == [] and listing('/dev') == ['null']",
        f"set(listing('/')) <= {root}",
        f"not exists('/proc/self') and not exists({__file__!r})",
        "set(environ()) <= {'LC_CTYPE'}",
        "interfaces() == ['lo']",
        "parent() == 1",
        "kill() == [None, None, None] and parent() == 1",
        "attach() == -1",
        "privileges() == []",
        "namespace() == -1",
        "mount() == -1 and remount() == -1",
        "no_new_privileges() == 1",
        "owner('/usr') == 65534",  # not the identity of the administrator under another number
        "not exists('/old') or listing('/old') == []",
        f"room('/tmp') == {LIMITS.file_mb << 20}",
        "flags('/') & 1 == 1",
        f"flags('/usr') & 7 == flags({sys.base_prefix!r}) & 7 == 7",  # no writes, setuid, devices
        *(["groups() == []"] if os.geteuid() == 0 else []),
    )
    assert wrong == []


@pytest.mark.parametrize("sandbox", KINDS)
def test_limits_are_those_asked_for_and_final(sandbox):
    """Soft and hard, so that a program cannot raise them."""
    expected = {
        "CPU": 31,
        "AS": 256 << 20,
        "FSIZE": 4 << 20,
        "NOFILE": 64,
        "NPROC": 6,
        "CORE": 0,
    }
    tests = [f"limit({name!r}) == ({value}, {value})" for name, value in expected.items()]
    assert probe(sandbox, " and ".join(tests)) == []


@pytest.mark.parametrize("sandbox", KINDS)
def test_standard_streams_lead_nowhere(sandbox):
    """What a program prints, as output or as errors, fills no memory of the trainer."""
    assert probe(sandbox, "nowhere(0) and nowhere(1) and nowhere(2)") == []


@pytest.mark.parametrize("sandbox", KINDS)
def test_the_environment_of_the_user_is_not_passed_on(sandbox, monkeypatch):
    """It may hold keys."""
    monkeypatch.setenv("RESCORE_SECRET", NAME)
    assert probe(sandbox, "'RESCORE_SECRET' not in environ()") == []


@pytest.mark.parametrize("sandbox", KINDS)
def test_shared_memory_is_not_shared_with_namespaces(sandbox):
    """A segment that anybody may use is not there, but for unsafe programs."""
    libc, key = ctypes.CDLL(None, use_errno=True), uuid.uuid4().int & 0x7FFFFFFF
    segment = libc.shmget(key, 4096, 0o1666)  # IPC_CREAT, and all may read and write
    assert segment >= 0
    try:
        wrong = probe(sandbox, f"(shared({key}) >= 0) == {sandbox.unsafe}")
    finally:
        libc.shmctl(segment, 0, None)  # IPC_RMID
    assert wrong == []


@pytest.mark.parametrize("sandbox", KINDS)
def test_a_child_left_behind_is_ended(sandbox):
    """The program passes; what it started ends with it."""
    source = HEAD + "if os.fork() == 0: time.sleep(60)\n" + RIGHT
    assert sandbox.run(trial(source)).outcome == "passed"
    assert survivors() == []


@pytest.mark.parametrize(("number", "name"), [(9, "killed"), (19, "stopped")])
def test_without_a_judge_there_is_no_success(number, name, monkeypatch):
    """Without namespaces a program can kill or stop its judge; the sandbox ends both, in time.

    The program wakes the judge after a while, so that this test ends whatever the sandbox does.
    """
    monkeypatch.setattr("rescore.rewards.sandbox.GRACE", 1.0)
    act = f"os.kill(os.getppid(), {number})\ntime.sleep(12)\nos.kill(os.getppid(), 18)\n"
    sandbox = Sandbox(limits=SHORT, unsafe=True)
    result = sandbox.run(trial(f"{HEAD}# {name}\n{act}{RIGHT}"))
    assert (result.outcome, result.passed) == ("died", 0.0)
    assert "without a verdict" in result.detail


def test_as_many_programs_run_at_once_as_there_are_workers():
    """By their own clocks: some overlap, and never three."""
    source = (
        "import time\nstart = time.monotonic()\ntime.sleep(1)\n"
        "def f(n): raise ValueError(f'{start} {time.monotonic()}')"
    )
    results = PLAIN.run_many([trial(source, f"f({n})") for n in range(5)], workers=2)
    spans = [tuple(map(float, r.detail.partition(": ")[2].split())) for r in results]
    together = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(together) == 2


def test_the_probes_find_what_there_is():
    """Without namespaces the same questions have other answers: the test above can fail."""
    tests = [f"exists({__file__!r})", "'PATH' in environ()", "parent() != 1", "listing('/proc')"]
    assert probe(Sandbox(limits=LIMITS, unsafe=True), *tests) == []


@pytest.mark.parametrize("sandbox", KINDS)
def test_a_socket_reaches_this_machine_only_without_namespaces(sandbox):
    """A server on the same machine hears nothing from a network namespace."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        result = sandbox.run(trial(PROBE, f"assert connect({port}) is None", ("connect",)))
        if sandbox.unsafe:
            assert result.outcome == "passed"
            server.accept()[0].close()
        else:
            assert (result.outcome, result.passed) == ("refused", 0)
            with pytest.raises(TimeoutError):
                server.accept()


def test_the_directory_of_a_program_is_gone_afterwards(tmp_path, monkeypatch):
    """What it wrote is gone with it, in either kind of sandbox."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = "open('kept', 'w').write('x')\nimport os\ndef f(x): return os.path.exists('kept')"
    for sandbox in [param.values[0] for param in KINDS]:
        assert isinstance(sandbox, Sandbox)
        if sandbox.unsafe or namespaces_available():
            assert sandbox.run(trial(source, "assert f(0)  # once")).passed == 1
    assert list(tmp_path.iterdir()) == []


# Refusal


@pytest.fixture
def refusing(tmp_path):
    """A launcher that says what the kernel says where user namespaces are off."""
    launcher = tmp_path / "unshare"
    launcher.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    launcher.chmod(0o755)
    return str(launcher)


def test_without_namespaces_nothing_runs(refusing):
    """The message says what was tried, how it failed, and what to do."""
    sandbox = Sandbox(limits=LIMITS, launchers=("no-such-launcher", refusing))
    assert not namespaces_available(sandbox.launchers)
    message = r"no-such-launcher: not installed; .*Operation not permitted.*--unsafe-code-rewards"
    for attempt in (
        sandbox.check,
        lambda: sandbox.run(trial(RIGHT)),
        lambda: sandbox.run_many([trial(RIGHT)], workers=1),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_the_flag_runs_them_all_the_same(refusing):
    """With the same launchers."""
    sandbox = Sandbox(limits=LIMITS, launchers=(refusing,), unsafe=True)
    sandbox.check()
    assert sandbox.run(trial(RIGHT)).outcome == "passed"


def test_a_launcher_that_is_tried_in_vain_does_not_hide_one_that_works(refusing):
    """They are tried in order."""
    assert namespaces_available((refusing, "unshare")) == namespaces_available(("unshare",))


def test_a_sandbox_that_fails_is_an_error_and_not_a_score(tmp_path):
    """A launcher that works once and not again does not make programs fail silently."""
    launcher = tmp_path / "unshare"
    launcher.write_text(f"#!/bin/sh\n[ -e {tmp_path}/x ] && exit 1\n: > {tmp_path}/x\necho ready\n")
    launcher.chmod(0o755)
    sandbox = Sandbox(limits=LIMITS, launchers=(str(launcher),))
    sandbox.check()
    with pytest.raises(RuntimeError, match="did not start"):
        sandbox.run(trial(RIGHT))


# Tests and their forms

PLAIN = Sandbox(limits=LIMITS, unsafe=not namespaces_available())


def test_equal_programs_run_once():
    """Each run draws another number; equal trials share one."""
    draw = (
        "import random, time\ntime.sleep(0.3)\nx = random.SystemRandom().random()\n"
        "def f(): raise ValueError(x)"
    )
    first, second = (trial(draw + "\n" * n, "f()") for n in (0, 1))
    a, b, c, d = PLAIN.run_many([first, second, first, second], workers=4)
    assert a == c != b == d
    assert PLAIN.run(first) == a
    assert "ValueError: 0." in a.detail


COUNTS = {
    "from solution import f\ndef test_a():\n    assert f(1) == 2": 1.0,
    "import solution\ndef test_a():\n    assert solution.f(1) == 2": 1.0,
    "def test_a():\n    assert f(1) == 0\ndef test_b():\n    assert f(1) == 2": 1 / 2,
    "def test_a():\n    f(None)\ndef test_b():\n    assert f(1) == 2": 1.0,
    "def test_a():\n    f('x')\n    assert f(1)\ndef test_b():\n    assert f(1)": 1 / 2,
    "for n in range(3):\n    assert f(n) < 3": 0.0,
    "for n in range(3):\n    assert f(2 - n) < 3": 0.0,
    "for n in range(3):\n    assert f(n) < 4\nassert f(1) == 1": 1 / 2,
    "try:\n    f('x')\n    assert False\nexcept TypeError:\n    assert f(1) == 2": 1.0,
    "try:\n    f(1)\n    assert False\nexcept TypeError:\n    assert f(1) == 2": 0.0,
    "assert True, 'says nothing'\nassert f(1) == 0": 0.0,
    "if f(1) == 2:\n    assert f(2) == 3\nelse:\n    assert f(2) == 4": 1.0,
    "assert f(1) == twice(1)": 1.0,
    "assert f(1) == 2\nf(1, 2, 3)\nassert f(1) == 2": 1 / 2,
    "pass": 0.0,
}


def test_assertions_are_counted_where_they_stand():
    """In functions, loops and branches; one in a loop holds when it holds every time."""
    reference = "def f(x):\n    return 'not this one'\ndef twice(x):\n    return 2 * x\n"
    source = "def f(x):\n    return 0 if x is None else x + 1"
    trials = [trial(source, tests, reference=reference) for tests in COUNTS]
    results = PLAIN.run_many(trials, workers=3)
    assert {tests: r.passed for tests, r in zip(COUNTS, results, strict=True)} == COUNTS


def test_what_ends_the_tests_early_is_no_success():
    """The assertions held that were reached, but the last line failed."""
    result = PLAIN.run(trial(RIGHT, "assert f(1) == 2\nf(1, 2, 3)"))
    assert result.outcome == "failed" and "TypeError" in result.detail


def test_plain_data_crosses_unchanged():
    """There and back; a frozenset comes back as the equal set."""
    values = [
        None,
        True,
        0,
        -7,
        1 << 70,
        0.1,
        -1e-300,
        float("inf"),
        -float("inf"),
        2j,
        "",
        "\ud800",
    ]
    values += ["é\n'", b"\0\xff", [], [1, [2]], (), (1,), (1, (2,)), set(), {1}, frozenset({2})]
    values += [{}, {"a": {1: []}}, values[:]]
    tests = "\n".join(f"x = {literal(value)}\nassert f(x) == x" for value in values)
    assert PLAIN.run(trial("def f(x):\n    return x", tests)).detail == ""


def test_other_objects_do_not_cross():
    """Neither as an argument nor as a value."""
    for value in (object(), range(3), iter([])):
        with pytest.raises(TypeError, match="is not plain data"):
            literal(value)
    assert PLAIN.run(trial("def f(x):\n    return 1", "assert f(object()) == 1")).passed == 0


def test_nan_costs_one_assertion():
    """It is no plain data, whatever holds it; the program lives on."""
    source = "def f(x):\n    return [float('nan')] if x > 4 else x + 1"
    result = PLAIN.run(trial(source))
    assert (result.outcome, result.passed) == ("failed", 1 / 2)


@pytest.mark.parametrize("field", ["seconds", "memory_mb", "file_mb", "processes"])
def test_limits_that_let_nothing_run_are_refused(field):
    """The message names the field."""
    with pytest.raises(ValueError, match=f"{field} is 0"):
        dataclasses.replace(LIMITS, **{field: 0.0 if field == "seconds" else 0})
