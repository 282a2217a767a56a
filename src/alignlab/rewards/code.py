"""Does the completion do what was asked: is it the wanted Python expression, or does its program pass the tests?

completion text -> syntax tree -> 1.0 if equal to the tree of the prompt's answer, else 0.0; nothing is run.
completion text -> program -> its prompt's unit tests, in child processes -> 1.0 if all pass, else 0.0. That is off
unless the environment has ALIGNLAB_RUN_CODE=1, whoever asks: reward, grade or evaluation.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from alignlab.errors import UserError
from alignlab.rewards import _sandbox
from alignlab.rewards._sandbox import TestResult
from alignlab.types import Completion, Prompt

NEEDS = "columns `answer` and `grading` (expression), or `tests` and `grading` (tests)"
SWITCH = "ALIGNLAB_RUN_CODE"
LONGEST_EXPRESSION = 400
"""Characters; longer text is no expression. Bounds the depth of what the parser meets."""
LONGEST_STATEMENTS = 20_000
"""Characters of a program; a longer one counts as none."""
DEEPEST_NESTING = 50
"""Levels of the syntax tree; deeper ones are no expression."""
LONGEST_PROGRAM = 50_000
"""Characters; a longer one passes no test."""
AT_ONCE = 8
"""Programs that run side by side, where there are as many cores."""
_FENCED = re.compile(r"```[ \t]*(?:(?:[Pp]ython3?|py)[ \t]*)?\n(.*?)(?:```|\Z)", re.DOTALL)
_DEFINES = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)


def code(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    seconds: float = 5.0,
    memory_mb: int = 512,
    partial: bool = False,
) -> list[float | None]:
    """1.0 where the text is the expression that was asked for, or its program passes all tests of its prompt.

    `meta["grading"]` "expression": the same syntax tree as `prompt.answer` (spacing, quotes, spare brackets aside).
    "tests": `meta["tests"]`, after `meta["test_setup"]`. None where it is neither.

    Args:
        seconds: for one program with its tests; `memory_mb`: its address space.
        partial: the share of tests that pass, instead of all or nothing.

    Raises:
        UserError: programs would have to be run and may not be, or cannot be run safely here.
        ValueError: unless seconds > 0 and memory_mb >= 64.
    """
    if not seconds > 0 or memory_mb < 64:
        raise ValueError(f"rewards.code: needs seconds > 0 and memory_mb >= 64, got {seconds} and {memory_mb}")

    def judged(prompt: Prompt, completion: Completion) -> float | None:
        if not applies(prompt):
            return None
        if prompt.meta["grading"] == "expression":
            return float(same_expression(completion.text, prompt.answer or ""))
        result = passes(prompt, completion.text, timeout=seconds, memory_mb=memory_mb)
        return result.num_passed / result.num_tests if partial else float(result.passed)

    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(judged, prompts, completions))


def applies(prompt: Prompt, **_: object) -> bool:
    """Whether completions of this prompt are judged.

    Raises:
        UserError: they would have to be run, which is off, or the row's `tests` are no list of text.
    """
    kind, tests = prompt.meta.get("grading"), prompt.meta.get("tests")
    if kind != "tests":
        return kind == "expression" and prompt.answer is not None
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(
            f"prompt {prompt.id!r}: `grading` is tests, but `tests` is {str(tests)[:60]!r}, no list of text"
        )
    _require_running()
    return True


# ---- expressions -----------------------------------------------------------------------------------------------------


def same_expression(text: str, answer: str) -> bool:
    """Whether both are single Python expressions with equal syntax trees; of an answer in statements, both programs."""
    wanted = parse_expression(answer)
    if wanted is None:
        wanted = parse_program(answer)
        return wanted is not None and parse_program(text) == wanted
    return parse_expression(text) == wanted


def parse_expression(text: str) -> str | None:
    """The syntax tree of one expression, written out (`ast.dump`); None for anything else, however hostile."""
    return _parse(text, "eval") if len(text.strip()) <= LONGEST_EXPRESSION else None


def parse_program(text: str) -> str | None:
    """The syntax tree of statements, written out; None for what is empty, no Python, or longer than is asked for."""
    return _parse(text, "exec") if text.strip() and len(text) <= LONGEST_STATEMENTS else None


def _parse(text: str, mode: Literal["eval", "exec"]) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes and literals warn while they are parsed
        try:
            tree = ast.parse(text.strip(), mode=mode)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return ast.dump(tree) if _depth(tree) <= DEEPEST_NESTING else None


def _depth(tree: ast.AST) -> int:
    """Levels of the tree, level by level instead of by recursion."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


# ---- programs --------------------------------------------------------------------------------------------------------


def running_allowed() -> bool:
    """Whether programs that a model wrote may be run: ALIGNLAB_RUN_CODE is 1 in the environment."""
    return os.environ.get(SWITCH) == "1"


def run_tests(
    program: str,
    tests: Sequence[str],
    *,
    setup: str = "",
    entry_point: str | None = None,
    timeout: float = 5.0,
    memory_mb: int = 512,
) -> TestResult:
    """Runs a program's unit tests (Python source, one or more asserts each) in isolated child processes.

    Example: `run_tests("def double(x): return 2 * x", ["assert double(4) == 8"]).passed`.

    Args:
        setup: runs before the program, and again before the tests: imports, for the most part.
        entry_point: the name that is asked for, where it is known.
        timeout: seconds for everything together; `memory_mb`: address space of each child.

    Raises:
        UserError: running is off, or this machine cannot isolate a process.
    """
    _require_running()
    if len(program) > LONGEST_PROGRAM:
        return TestResult(False, 0, len(tests), f"longer than {LONGEST_PROGRAM} characters")
    return _sandbox.run(program, tests, setup=setup, entry_point=entry_point, timeout=timeout, memory_mb=memory_mb)


def passes(prompt: Prompt, text: str, *, timeout: float = 5.0, memory_mb: int = 512) -> TestResult:
    """The tests of a prompt (`meta`: tests, test_setup, entry_point) on what a completion says.

    A completion that does not define what is asked for, where the setup does, is its continuation (HumanEval).
    """
    setup, entry = str(prompt.meta.get("test_setup") or ""), prompt.meta.get("entry_point")
    program = program_of(text)
    if entry and entry not in _DEFINES.findall(program) and entry in _DEFINES.findall(setup):
        program = setup + text
    return run_tests(
        program, prompt.meta["tests"], setup=setup, entry_point=entry, timeout=timeout, memory_mb=memory_mb
    )


def program_of(text: str) -> str:
    """The program in an answer: its first fenced block that defines something, else its first one, else all of it."""
    blocks: list[str] = _FENCED.findall(text)
    return next((block for block in blocks if _DEFINES.search(block)), blocks[0] if blocks else text)


def _require_running() -> None:
    if not running_allowed():
        raise UserError(
            f"code: running programs that a model wrote is off; {SWITCH}=1 in the environment turns it on, in children "
            "without network, files or secrets (docs/rewards.md says what that is worth)"
        )
