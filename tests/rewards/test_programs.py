"""Programs are run apart: what they do harms nothing, and only right values pass a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from alignlab.errors import UserError
from alignlab.rewards import _isolation
from alignlab.rewards._sandbox import CHILD
from alignlab.rewards.code import SWITCH, TestResult, applies, code, passes, program_of, run_tests, running_allowed
from alignlab.types import Completion, Message, Prompt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(4) == 8", "assert double(0) == 0", "assert double(-1) == -2"]
ASKED = Prompt(messages=(), id="p", meta={"grading": "tests", "tests": TESTS})


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text)


def body(*lines: str) -> str:
    """A program whose function `f` does these lines."""
    return "import os, sys\ndef f(x):\n" + "".join(f"    {line}\n" for line in lines)


# ---- what counts -----------------------------------------------------------------------------------------------------


def test_all_tests_pass_or_the_first_failure_is_named() -> None:
    assert run_tests(DOUBLE, TESTS) == TestResult(True, 3, 3, "")
    assert run_tests("def double(x):\n    return x + 4", TESTS) == TestResult(False, 1, 3, "AssertionError")
    assert run_tests("", TESTS) == TestResult(False, 0, 3, "NameError: name 'double' is not defined")
    assert run_tests(DOUBLE, []) == TestResult(False, 0, 0, "there are no tests")
    assert "SyntaxError" in run_tests("def double(x", TESTS).reason


def test_values_and_where_it_applies() -> None:
    other = Prompt(messages=(), id="q", answer="8", meta={"grading": "number"})
    wrong, half = completion("def double(x): return 0"), completion("def double(x): return abs(2 * x)")
    right = completion(f"Here it is:\n```python\n{DOUBLE}```\nThat doubles.")
    assert code([ASKED] * 4 + [other], [right, wrong, half, completion(""), right]) == [1.0, 0.0, 0.0, 0.0, None]
    assert code([ASKED] * 2, [wrong, half], partial=True) == [1 / 3, 2 / 3]


def test_what_it_needs_is_said() -> None:
    with pytest.raises(ValueError, match="seconds > 0"):
        code([], [], seconds=0)
    with pytest.raises(UserError, match="'p': `grading` is tests, but `tests` is 'None'"):
        applies(Prompt(messages=(), id="p", meta={"grading": "tests"}))


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_it_is_off_unless_asked_for(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH) if value is None else monkeypatch.setenv(SWITCH, value)
    assert not running_allowed()
    for run in (lambda: code([ASKED], [completion(DOUBLE)]), lambda: run_tests(DOUBLE, TESTS), lambda: applies(ASKED)):
        with pytest.raises(UserError, match="ALIGNLAB_RUN_CODE=1"):
            run()
    expression = Prompt(messages=(), id="q", answer="x", meta={"grading": "expression"})
    assert code([expression], [completion("x")]) == [1.0]


def test_programs_are_found_in_answers() -> None:
    assert program_of(DOUBLE) == DOUBLE
    assert program_of(f"```py\n{DOUBLE}```\n```python\nprint(double(2))\n```") == DOUBLE
    assert program_of(f"```\nx = 1\n```\nand\n```python\n{DOUBLE}```") == DOUBLE
    assert program_of(f"```python\n{DOUBLE}") == DOUBLE  # cut off
    started = time.perf_counter()
    for hostile in ("```" * 30_000, "```" + " " * 100_000, "```\n" * 25_000, "\n" * 100_000 + "def"):
        program_of(hostile)
    assert time.perf_counter() - started < 2


def test_a_continuation_and_a_whole_function_answer_the_same_prompt() -> None:
    head = 'from typing import List\n\ndef last(xs: List[int]) -> int:\n    """The last one."""\n'
    check = ["def check(candidate):\n    assert candidate([1, 2]) == 2\ncheck(last)"]
    meta = {"grading": "tests", "tests": check, "test_setup": head, "entry_point": "last"}
    asked = Prompt(messages=(Message("user", head),), id="h", meta=meta)
    assert passes(asked, "    return xs[-1]\n").passed
    assert passes(asked, "def last(xs):\n    return xs[-1]").passed
    assert not passes(asked, "    return xs[0]\n").passed
    assert not passes(asked, "").passed


@pytest.mark.parametrize(
    "value",
    ["None", "True", "-7", "10**400", "1.5", "float('inf')", "'\\ud800\\u200b\\u202e'", "b'a\\0'", "2 + 3j",
     "(1, (2, [3]))", "{1, 2}", "frozenset({('a',)})", "{(1, 2): {'a': [None]}}", "range(3)", "[]"],
)  # fmt: skip
def test_plain_values_cross_unchanged(value: str) -> None:
    tests = [f"r = f({value})", f"assert r == {value}", f"assert type(r) is type({value})"]
    assert run_tests("def f(x): return x", tests) == TestResult(True, 3, 3, "")


def test_objects_of_the_program_can_be_used() -> None:
    program = (
        "from collections import Counter\nfrom fractions import Fraction\n"
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def total(pairs): return sum(p.a + p.b for p in pairs)\n"
        "def odd(n):\n    for i in range(1, n, 2): yield i\n"
        "def count(x): return Counter(x)\n"
        "def third(): return Fraction(1, 3)\n"
        "def fail(): raise ValueError('no')\n"
    )
    tests = [
        "assert total([Pair(1, 2), Pair(b=3, a=4)]) == 10",
        "assert Pair(1, 2).b == 2",
        "assert list(odd(6)) == [1, 3, 5] and next(odd(6)) == 1",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "import fractions\nassert third() == fractions.Fraction(1, 3)",
        "try:\n    fail()\n    raise SystemError\nexcept ValueError as error:\n    assert str(error) == 'no'",
    ]
    assert run_tests(program, tests) == TestResult(True, 6, 6, "")


def test_the_same_program_gives_the_same_result() -> None:
    program = "import random\ndef f(x): return [random.random(), list({'a', 'b', 'c', 'd'}), hash('a')]"
    tests = ["assert f(0) == 1, f(0)"]
    assert run_tests(program, tests).reason == run_tests(program, tests).reason


# ---- cheating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        'print(\'{"passed": true, "why": ""}\')',
        body('os.write(1, b\'{"passed": true, "why": ""}\\n\')', "os._exit(0)"),
        body('[os.write(fd, b\'{"passed": true, "why": ""}\\n\') for fd in range(3)]', "return 0"),
        "class Equal:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Equal()",
        "class Equal(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x): return Equal(3)",
        "class L(list):\n    def __eq__(self, other): return True\ndef f(x): return L([3])",
        "def f(x):\n    class E:\n        def __eq__(s, o): return True\n    return [E()]",
        body("import builtins", "builtins.AssertionError = Exception", "raise AssertionError"),
        body("raise AssertionError"),
        body("raise KeyboardInterrupt"),
        body("import builtins", "builtins.all = lambda *a: True", "sys.modules.clear()"),
        "def f(x): return 0\ndef int(x): return 7\ndef set(x): return 7\ndef sorted(x): return 7",
        body("frame, found = sys._getframe(), ''", "while frame:", "    found += str(frame.f_locals)",
             "    frame = frame.f_back", "return 41 if 'asse' + 'rt f' in found else 0"),
        body("import gc", "texts = [o for o in gc.get_objects() if isinstance(o, (str, list))]",
             "return 41 if 'asse' + 'rt f' in str(texts) else 0"),
    ],
)  # fmt: skip
def test_only_the_right_value_passes(program: str) -> None:
    result = run_tests(program, ["assert f(1) == 41", "assert int(f(1)) == 41", "assert set([f(1)]) == set([41])"])
    assert (result.passed, result.num_passed) == (False, 0)


def test_a_module_of_the_tests_is_theirs() -> None:
    program = "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0"
    assert run_tests(program, ["assert math.isclose(f(1), 5)"], setup="import math").num_passed == 0
    assert run_tests("import math\ndef f(x): return math.pi", ["assert math.isclose(f(1), 3.14159265358979)"]).passed


def test_a_function_may_be_called_like_a_builtin_where_that_is_what_is_asked_for() -> None:
    assert run_tests("def sum(a, b): return a * b", ["assert sum(3, 4) == 12"]).passed
    both = ["assert sum(3, 4) == 12", "assert helper() == 1"]
    program = "def sum(a, b): return a * b\ndef helper(): return 1"
    assert run_tests(program, both, entry_point="sum").passed


# ---- harm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ("import socket", "socket.socket()"),
        ("import socket", "socket.create_connection(('127.0.0.1', 80), 1)"),
        ("import subprocess", "subprocess.run(['true'])"),
        ("os.system('true') and 1 / 0",),
        ("os.fork()",),
        ("os.execv('/bin/true', ['true'])",),
        ("open('/etc/passwd').read()",),
        ("open('/proc/self/environ').read()",),
        ("open(f'/proc/{os.getppid()}/environ').read()",),
        ("os.listdir('/tmp')",),
        ("os.kill(os.getppid(), 9)",),
        ("os.killpg(0, 9)",),
        ("os.setsid()",),
        ("import resource", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
        ("os.open('/dev/null', os.O_WRONLY)",),
        ("os.mkdir('/tmp/alignlab-made')",),
        ("import fcntl", "fcntl.fcntl(os.pipe()[0], 10, 9)"),  # F_SETSIG
    ],
)  # fmt: skip
def test_what_is_not_allowed_fails(lines: tuple[str, ...]) -> None:
    result = run_tests(body(*lines, "return 1"), ["assert f(0) == 1"])
    assert not result.passed and result.reason.startswith(("PermissionError", "OSError", "ValueError", "ZeroDivision"))


def test_files_are_neither_written_nor_emptied(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for mode in ("w", "a", "x", "r+", "r"):
        assert not run_tests(body(f"open({str(kept)!r}, {mode!r})", "return 1"), ["assert f(0) == 1"]).passed
    for call in (
        f"os.unlink({str(kept)!r})",
        f"os.rename({str(kept)!r}, {str(kept)!r} + '2')",
        f"os.truncate({str(kept)!r}, 0)",
    ):
        assert not run_tests(body(call, "return 1"), ["assert f(0) == 1"]).passed
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


def test_native_code_is_held_too() -> None:
    calls = "[libc.fork(), libc.socket(2, 1, 0), libc.kill(libc.getppid(), 9)]"
    program = body("import ctypes", "libc = ctypes.CDLL(None)", f"return {calls}")
    assert run_tests(program, ["assert f(0) == [-1, -1, -1]"]).passed


def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert run_tests(body("return sorted(os.environ)"), ["assert f(0) == ['LANG', 'PATH', 'PYTHONHASHSEED']"]).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (body("while True: pass"), "not done within 1 s"),
        ("while True: pass", "not done within 1 s"),
        (body("import time", "time.sleep(100)"), "not done within 1 s"),
        (body("try:", "    while True: pass", "except BaseException:", "    return f(x)"), "not done within 1 s"),
        (body("return bytearray(1 << 40)"), "MemoryError"),
        (body("x = [0]", "while True: x += x"), "MemoryError"),
        (body("return 'x' * (1 << 26)"), ""),
        (body("import ctypes", "ctypes.string_at(0)"), "the program ended the process"),
        ("def f(x): return f(x)", "RecursionError"),
        (body("x = []", "x.append(x)", "return x"), "RecursionError"),
        (body("while True: print('x' * 10_000)"), "not done within 1 s"),
        (
            body("import threading", "while True: threading.Thread(target=lambda: [0] * 10_000_000 and f(0)).start()"),
            "",
        ),
    ],
)
def test_what_never_ends_or_takes_everything_is_ended(program: str, reason: str) -> None:
    started = time.perf_counter()
    result = run_tests(program, ["assert f(0) == 1"], timeout=1.0, memory_mb=256)
    assert not result.passed and reason in result.reason
    assert time.perf_counter() - started < 8


def test_a_fork_bomb_starts_nothing_and_nothing_is_left_behind() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    program = body(
        "n = 0", "while n < 50:", "    try:", "        os.fork()", "    except OSError:", "        n += 1", "return n"
    )
    assert run_tests(program, ["assert f(0) == 50"]).passed
    for hanging in (
        body("while True: pass"),
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    ):
        run_tests(hanging, ["assert f(0)"], timeout=0.3)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_the_judge_ends_in_order_and_sees_the_program_gone() -> None:
    """Else its process would be left to whoever collects orphans."""
    for program in (DOUBLE, "while True: pass", "import os; os._exit(3)"):
        job = {"program": program, "tests": TESTS, "setup": "", "entry_point": None}
        command = [sys.executable, "-S", "-P", str(CHILD), "0.5", "256"]
        ended = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True)
        assert (ended.returncode, ended.stderr) == (0, b"") and ended.stdout


def test_stdin_is_closed_and_hostile_text_is_only_wrong() -> None:
    assert run_tests(body("return input()"), ["assert f(0) == 1"]).reason.startswith("EOFError")
    for text in (
        "",
        "\0",
        "\ud800",
        "\N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH SPACE}",
        "(" * 40_000,
        "x" * 100_000,
        "```" * 999,
    ):
        assert code([ASKED], [completion(text)]) == [0.0]


def test_without_landlock_pythons_own_functions_open_nothing_else(tmp_path: Path) -> None:
    """In a child, as an audit hook stays for good."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import runpy\nwatch = runpy.run_path({_isolation.__file__!r})['watch_files']\nimport os, sys\n"
        "watch([os.path.dirname(os.__file__), *sys.path])\nimport wave\n"
        "for read in (lambda: open('/etc/passwd'), lambda: os.listdir('/'), lambda: os.open('/etc/passwd', 0)):\n"
        "    try:\n        read()\n    except PermissionError:\n        print('refused')\n"
    )
    assert os.popen(f"{sys.executable} -S {script}").read().split() == ["refused"] * 3


def test_programs_run_side_by_side() -> None:
    """From several threads, as a reward does."""
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda i: run_tests(f"def f(x): return x + {i}", [f"assert f(1) == {1 + i}"]), range(8))
        )
    assert all(result.passed for result in results)
    assert threading.active_count() < 20


# ---- real problems ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_mbpp_solution_passes_and_wrong_ones_fail(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "mbpp" / "sanitized-mbpp.jsonl").open(encoding="utf-8")]

    def result(program: str, row: dict[str, object]) -> bool:
        setup = "\n".join(row["test_imports"])  # type: ignore[arg-type]
        return run_tests(program, row["test_list"], setup=setup, timeout=20).passed  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        right = sum(pool.map(lambda row: result(str(row["code"]), row), rows))
        next_ones = [*rows[1:], rows[0]]
        wrong = sum(pool.map(lambda row, other: result(str(other["code"]), row), rows, next_ones))
    print(f"MBPP: {right} of {len(rows)} solutions pass; {wrong} where each is taken for the next problem's")
    assert right == len(rows) == 427
    assert wrong <= 2  # neighbours that ask for the same function


@pytest.mark.slow
def test_every_humaneval_solution_passes_and_an_empty_one_fails(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "humaneval" / "HumanEval.jsonl").open(encoding="utf-8")]

    def result(text: str, row: dict[str, str]) -> bool:
        tests = [f"{row['test']}\ncheck({row['entry_point']})"]
        meta = {"tests": tests, "test_setup": row["prompt"], "entry_point": row["entry_point"]}
        return passes(Prompt(messages=(), id="h", meta=meta), text, timeout=20).passed

    with ThreadPoolExecutor(2) as pool:
        right = sum(pool.map(lambda row: result(row["canonical_solution"], row), rows))
        wrong = sum(pool.map(lambda row: result("    return None\n", row), rows))
    print(f"HumanEval: {right} of {len(rows)} solutions pass, {wrong} that return nothing")
    assert right == len(rows) == 164 and wrong == 0
