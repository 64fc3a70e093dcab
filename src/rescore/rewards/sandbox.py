"""Run programs that nobody has read: in namespaces of their own, within limits, to the end.

A program is loaded in a process that sees the interpreter and the system's libraries, read-only,
an empty ``/tmp`` of limited size, and nothing else: no files of the user, no network, no other
process, no ``/proc``, no privileges, no environment. It is tested from a second process by calls
through a pipe (``judge.py``), so exiting early, printing "passed", patching the tests or answering
with an object that equals everything earns nothing. When the judge is done or the time is over, the
first process of the namespace ends and the kernel ends all others with it.

What this does not protect from:

- errors of the kernel that a process without privileges can reach;
- the program seeing the arguments of the tests, and answering those alone;
- timing and load: programs on the same machine slow each other down;
- a reward that is earned by ``unsafe``: without namespaces a program can read and write what its
  user may, open connections, leave processes behind in a new session, and, where the kernel lets
  it, interfere with its judge. Use it in a container or a virtual machine that may be lost.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["passed", "failed", "refused", "died", "timeout"]
"""``passed`` and ``failed``: the program lived and its tests ran. ``refused``: it met a limit or a
closed door (an ``OSError`` or a ``MemoryError`` that it did not catch). ``died``: it ended before
its tests. ``timeout``: it did not end in time."""

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
GRACE = 5.0
"""Seconds that starting and ending may take beyond the time of the program."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 4.0
    """Wall-clock time, the start of two interpreters (0.1 s) included."""
    memory_mb: int = 512
    """Address space of each process, MiB."""
    file_mb: int = 16
    """Size of each file, and of all files together, MiB."""
    processes: int = 8
    """Processes and threads at once, the judge and the program among them."""

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.1), ("memory_mb", 64), ("file_mb", 1), ("processes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A program and its tests."""

    source: str
    """The program: untrusted."""
    tests: str
    """Assertions in Python, at the top or in functions named ``test_*`` without arguments."""
    names: tuple[str, ...]
    """Functions of the program that the tests call. Arguments and values must be plain data:
    None, numbers, strings, bytes, lists, tuples, sets and dicts."""
    reference: str = ""
    """A trusted program with the other names that the tests use."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a program."""

    outcome: Outcome
    passed: float
    """Fraction of the assertions that held, in [0, 1]; 0 unless ``passed`` or ``failed``."""
    detail: str
    """Why it did not pass."""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A way to run programs. Equal sandboxes share one cache of results."""

    limits: Limits = Limits()
    """What each program may use."""
    unsafe: bool = False
    """Without namespaces: with the limits, and an end to the process group, only."""
    launchers: tuple[str, ...] = ("bwrap", "unshare")
    """Programs that make namespaces, in the order in which they are tried."""

    def check(self) -> None:
        """Refuse where this machine gives no namespaces.

        Raises:
            ValueError: says what was tried and names ``--unsafe-code-rewards``.
        """
        if self.unsafe:
            return
        working, failures = _probe(self.launchers)
        if working is None:
            raise ValueError(
                f"code rewards run programs that nobody has read, and this machine gives no "
                f"namespaces to lock them in. Tried: {'; '.join(failures)}. Install bubblewrap or "
                f"allow user namespaces; where programs may do what you may, in a container that "
                f"holds nothing else, --unsafe-code-rewards runs them without"
            )

    def run(self, trial: Trial) -> Result:
        """Test one program; the same program, tests and limits run once.

        Raises:
            ValueError: see ``check``.
            RuntimeError: the sandbox itself failed.
        """
        return _run(self, trial)

    def run_many(self, trials: Sequence[Trial], workers: int) -> list[Result]:
        """Test programs, at most ``workers`` at a time; equal ones run once."""
        self.check()
        distinct = list(dict.fromkeys(trials))
        with ThreadPoolExecutor(workers) as pool:
            results = dict(zip(distinct, pool.map(self.run, distinct), strict=True))
        return [results[trial] for trial in trials]


def namespaces_available(launchers: tuple[str, ...] = ("bwrap", "unshare")) -> bool:
    """Whether this machine gives namespaces; found out once by trying."""
    return _probe(launchers)[0] is not None


@functools.lru_cache(maxsize=4096)
def _run(sandbox: Sandbox, trial: Trial) -> Result:
    """A verdict, or what its absence means."""
    sandbox.check()
    limits = sandbox.limits
    task = {
        "source": trial.source,
        "tests": trial.tests,
        "reference": trial.reference,
        "names": trial.names,
        "seconds": limits.seconds,
        "isolated": not sandbox.unsafe,
        "limits": {
            "CPU": math.ceil(limits.seconds) + 1,
            "AS": limits.memory_mb << 20,
            "FSIZE": limits.file_mb << 20,
            "NOFILE": 64,
            "NPROC": limits.processes,
            "CORE": 0,
        },
    }
    text = Path(__file__).with_name("judge.py").read_text()
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", text, "judge"]
    launcher = None if sandbox.unsafe else _probe(sandbox.launchers)[0]
    seconds = limits.seconds + GRACE
    output, errors = _execute(launcher, python, limits, json.dumps(task).encode(), seconds)
    ready, _, verdict = output.partition(b"\n")
    if ready != b"ready":
        raise RuntimeError(f"the sandbox did not start: {errors.decode(errors='replace')[-500:]}")
    try:
        return Result(**json.loads(verdict))
    except (ValueError, TypeError):
        return Result(outcome="died", passed=0.0, detail="the judge ended without a verdict")


@functools.cache
def _probe(launchers: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The first launcher that works, and how the ones before it failed."""
    failures = []
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", "print('ready')"]
    for name in launchers:
        launcher = shutil.which(name)
        if launcher is None:
            failures.append(f"{name}: not installed")
        elif os.geteuid() == 0 and Path(launcher).name == "bwrap":
            failures.append(f"{name}: cannot give up the identity of root")
        else:
            output, errors = _execute(launcher, python, Limits(), b"", GRACE)
            if output == b"ready\n":
                return launcher, tuple(failures)
            reason = errors.decode(errors="replace").strip()[-200:] or "no output"
            failures.append(f"{name}: {reason}")
    return None, tuple(failures)


def _execute(
    launcher: str | None, command: list[str], limits: Limits, given: bytes, seconds: float
) -> tuple[bytes, bytes]:
    """Output and errors of a command in a directory of its own; its process group ends with it."""
    with tempfile.TemporaryDirectory(prefix="rescore-") as directory:
        if launcher is not None:
            make = _bwrap if Path(launcher).name == "bwrap" else _unshare
            command = make(launcher, command, limits, directory)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            start_new_session=True,
        )
        try:
            return process.communicate(given, timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):  # as it should be: the group is gone
                os.killpg(process.pid, signal.SIGKILL)


def _visible() -> tuple[list[str], list[tuple[str, str]]]:
    """What a program sees: directories, read-only, and symbolic links as (link, target)."""
    interpreter = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    here = [path for path in SYSTEM if os.path.isdir(path)]
    links = [(path, os.readlink(path)) for path in here if os.path.islink(path)]
    directories = [path for path in here if not os.path.islink(path)]
    extra = [path for path in sorted(interpreter) if not Path(path).is_relative_to("/usr")]
    return directories + extra, links


def _bwrap(launcher: str, command: list[str], limits: Limits, directory: str) -> list[str]:
    """The command under bubblewrap."""
    directories, links = _visible()
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    options += ["--as-pid-1", "--cap-drop", "ALL", "--clearenv"]
    for path in directories:
        options += ["--ro-bind", path, path]
    for link, target in links:
        options += ["--symlink", target, link]
    options += ["--dev-bind", "/dev/null", "/dev/null"]
    options += ["--size", str(limits.file_mb << 20), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [launcher, *options, "--chdir", "/tmp", "--", *command]


def _unshare(launcher: str, command: list[str], limits: Limits, directory: str) -> list[str]:
    """The command under unshare, mount and setpriv of util-linux.

    In new namespaces, the first shell builds a file tree and makes it the root. The second is in a
    user namespace below, from where mounts cannot be undone: it forbids further user namespaces,
    hides ``/proc`` and gives up all privileges. The administrator becomes a user that exists
    nowhere else, because the limit on processes does not hold for root.
    """
    directories, links = _visible()
    root = os.geteuid() == 0
    lines = [
        f"cd {shlex.quote(directory)}",
        "mount -t tmpfs -o mode=755,size=1m tmpfs . && cd .",
        f"cd {shlex.quote(directory)}",
        "mkdir dev proc tmp old",
    ]
    for path in map(shlex.quote, directories):
        lines.append(f"mkdir -p .{path}; mount --bind {path} .{path}")
        lines.append(f"mount -o remount,bind,ro,nosuid,nodev .{path}")
    for link, target in links:
        lines.append(f"ln -s {shlex.quote(target)} .{shlex.quote(link)}")
    options = f"mode=1777,size={limits.file_mb}m,nr_inodes=4096,nosuid,nodev"
    lines += [
        ": > dev/null; mount --bind /dev/null dev/null",
        f"mount -t tmpfs -o {options} tmpfs tmp",
        "mount --rbind /proc proc",
        "pivot_root . old; cd /tmp; umount -l /old; mount -o remount,bind,ro /",
        'exec "$@"',
    ]
    lock = [
        "echo 0 > /proc/sys/user/max_user_namespaces",
        "mount -t tmpfs -o ro,size=4k tmpfs /proc",
        'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- env -i "$@"',
    ]
    nobody = str((1 << 30) + random.SystemRandom().randrange(1 << 28))
    identity = ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups", "--"]
    return [
        *(launcher, "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
        *([] if root else ["--user", "--map-root-user"]),
        *("sh", "-euc", "\n".join(lines), "sh"),
        *(identity if root else []),
        *("unshare", "--user", "--map-root-user", "--mount"),
        *("sh", "-euc", "\n".join(lock), "sh", *command),
    ]
