"""A foreign program put to its tests: (program, tests) -> how many passed, and what went wrong first.

It happens in child processes without network, files, other processes or secrets (`_isolation`), of which the one that
runs the program knows no test (`_sandboxed`). That makes harm and cheating unlikely; it is no virtual machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import UserError

CHILD = Path(__file__).with_name("_sandboxed.py")
STARTING = 10.0
"""Seconds that a child may take beyond its own time limit, on a busy machine."""


@dataclass(frozen=True, slots=True)
class TestResult:
    """What became of the tests. `passed`: all of them, and there is at least one."""

    __test__ = False  # for pytest

    passed: bool
    num_passed: int
    num_tests: int
    reason: str
    """What went wrong first; empty where all passed."""


def run(
    program: str, tests: Sequence[str], *, setup: str, entry_point: str | None, timeout: float, memory_mb: int
) -> TestResult:
    """Runs a program and its tests, each of them Python source, in a child process.

    Args:
        setup: runs before the program, and again before the tests.
        entry_point: the name that is asked for, where it is known: it may be that of a builtin function.
        timeout: seconds for everything together; `memory_mb`: for each of the two processes.

    Raises:
        UserError: nothing foreign can be run safely on this machine.
    """
    if not tests:
        return TestResult(False, 0, 0, "there are no tests")
    job = {"program": program, "tests": list(tests), "setup": setup, "entry_point": entry_point}
    command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CHILD), str(timeout), str(memory_mb)]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
    ) as child:
        try:
            said, broken = child.communicate(json.dumps(job).encode("ascii"), timeout=timeout + STARTING)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said, broken = child.communicate()
    lines = [json.loads(line) for line in said.splitlines()]
    if any("error" in line for line in lines) or (child.returncode == 1 and not lines):
        told = next(
            (line["error"] for line in lines if "error" in line),
            broken.decode(errors="replace").strip().splitlines()[-1:],
        )
        raise UserError(f"code: cannot run programs safely on this machine ({told}); it takes Linux with seccomp")
    good = sum(line["passed"] for line in lines)
    wrong = next((line["why"] for line in lines if not line["passed"]), "")
    passed = good == len(tests) == len(lines)
    return TestResult(passed, good, len(tests), wrong if wrong or passed else f"not done within {timeout:g} s")
