"""Expressions are compared as trees, and hostile text is only wrong."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.rewards.code import DEEPEST_NESTING, LONGEST_EXPRESSION, code, same_expression
from alignlab.types import Completion, Prompt

ASKED = Prompt(messages=(), id="p", answer="x + 5 * y", meta={"grading": "expression"})


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x+5*y", "x + 5 * y"),
        ("  x + (5 * y)\n", "x + 5 * y"),
        ('user["age"]', "user['age']"),
        ("names [ : 3 ]", "names[:3]"),
        ("import  os", "import os"),  # where the answer is a statement
    ],
)
def test_the_same_tree(text: str, answer: str) -> None:
    assert same_expression(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("(x + 5) * y", "x + 5 * y"),
        ("5 * y + x", "x + 5 * y"),
        ("x + 5.0 * y", "x + 5 * y"),
        ("names[0:3]", "names[:3]"),
        ("names[:3]; names", "names[:3]"),
        ("x = 1", "1"),
        ("Try names[:3]", "names[:3]"),
        ("`names`", "names"),
        ("", "x"),
        ("x", ""),
        ("import os", "import sys"),
        ("import os", "os"),
    ],
)
def test_another_tree(text: str, answer: str) -> None:
    assert not same_expression(text, answer)


def test_values_and_where_it_applies() -> None:
    number = Prompt(messages=(), id="q", answer="8", meta={"grading": "number"})
    unanswered = Prompt(messages=(), id="r", meta={"grading": "expression"})
    rewards = code([ASKED, ASKED, number, unanswered], [completion(t) for t in ("x + 5 * y", "x", "8", "8")])
    assert rewards == [1.0, 0.0, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "(" * 190 + ")" * 190,
        "-" * (LONGEST_EXPRESSION - 1) + "1",
        "~" * 100_000 + "1",
        "[" * 199 + "]" * 199,
        "not " * 99 + "x",
        "x" + ".a" * 190,
        "x" + "()" * 190,
        "1+" * 190 + "1",
        "lambda:" * 50 + "1",
        "9" * LONGEST_EXPRESSION,
        "9" * 100_000,
        "\0",
        "x\0",
        "\ud800",
        "f'{" * 60,
        "'\\d'",
        "1if 1else 2",
        "x\\",
        "x #" + "\N{GRINNING FACE}" * 50,
    ],
)
def test_hostile_text_is_only_wrong(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code([ASKED], [completion(text)]) == [0.0]


def test_nothing_is_run() -> None:
    """An expression that would stop the interpreter, and one that would fill the memory."""
    for text in ("__import__('os')._exit(1)", "9 ** 9 ** 9 ** 9"):
        assert code([ASKED], [completion(text)]) == [0.0]
        assert same_expression(text, text)


def test_nesting_is_bounded() -> None:
    def signs(count: int) -> str:
        return "-" * count + "x"  # levels: Expression, one a sign, the name, its context

    assert same_expression(signs(10), signs(10))
    assert not same_expression(signs(DEEPEST_NESTING), signs(DEEPEST_NESTING))


@given(st.text(max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    assert code([ASKED], [completion(text)])[0] in (0.0, 1.0)
