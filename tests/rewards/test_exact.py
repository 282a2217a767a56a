"""Numbers are read exactly, and only where a number is asked for."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.rewards.exact import exact, final_number, gold_number, parse_number
from alignlab.types import Completion, Prompt


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text)


def prompt(answer: str | None, **meta: str) -> Prompt:
    return Prompt(messages=(), id="p", answer=answer, meta=meta)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", Fraction(8)),
        (" 8. ", Fraction(8)),
        ("-8", Fraction(-8)),
        ("\N{MINUS SIGN}8", Fraction(-8)),
        ("+8", Fraction(8)),
        ("007", Fraction(7)),
        ("1,234,567", Fraction(1234567)),
        ("$1,000.50", Fraction(2001, 2)),
        ("-$5", Fraction(-5)),
        ("$-5", Fraction(-5)),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6 / 8", Fraction(-3, 4)),
        ("50%", Fraction(50)),
    ],
)
def test_a_number_is_read(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eight",
        "8 coins",
        "1/0",
        "1e9",
        "1e999999999",
        "--8",
        "1,23",
        "12,3456",
        "8 9",
        "9" * 65,
        "²",
        "\u0663",
        "nan",
    ],
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("<reasoning>17 - 9 = 8</reasoning><answer>8</answer>", 8, 8),
        ("<answer>7</answer> no: <answer>8</answer>", 8, 8),
        ("<answer>8</answer> for 17 coins", 8, 17),
        ("<answer>8</answer> and <answer>9", 8, 9),
        ("<answer>7 <answer>8</answer>", 8, 8),
        ("<answer>8 coins</answer>", None, 8),
        ("The answer is 8.", None, 8),
        ("so 17-9", None, 9),
        ("it is -9", None, -9),
        ("worked\n#### 1,008", 1008, 1008),
        ("<answer>5</answer>\n#### 6", 5, 6),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_the_final_number(text: str, strict: int | None, flexible: int | None) -> None:
    assert final_number(text, "strict") == strict
    assert final_number(text, "flexible") == flexible


def test_right_wrong_and_missing_answers() -> None:
    texts = ["<answer>8</answer>", "<answer>8.0</answer>", "<answer>9</answer>", "8", ""]
    rewards = exact([prompt("8", grading="number")] * 5, [completion(text) for text in texts])
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_flexible_takes_the_last_number_anywhere() -> None:
    assert exact([prompt("8", grading="number")], [completion("so it is 8.")], mode="flexible") == [1.0]


def test_a_worked_reference_answer_is_its_last_line() -> None:
    assert gold_number("48/2 = 24\n#### 72") == 72
    assert exact([prompt("48/2 = 24\n#### 72")], [completion("#### 72")]) == [1.0]


def test_does_not_apply_without_a_number_to_find() -> None:
    prompts = [prompt(None, grading="number"), prompt("x + 1", grading="expression"), prompt("Rest.")]
    assert exact(prompts, [completion("<answer>8</answer>")] * 3) == [None, None, None]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact([prompt("8")], [])


@given(st.text(alphabet="0123456789-+/.,$%#<>answer \n", max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    exact([prompt("8"), prompt("8")], [completion(text), completion(f"<answer>{text}</answer>")])
    exact([prompt("8")], [completion(text)], mode="flexible")


@given(st.integers(-(10**9), 10**9), st.integers(1, 999))
def test_any_fraction_round_trips(numerator: int, denominator: int) -> None:
    assert parse_number(f"{numerator}/{denominator}") == Fraction(numerator, denominator)
    assert parse_number(f"{numerator:,}") == numerator


def test_long_hostile_text_is_quick() -> None:
    for text in ("<answer>" * 20_000, "1," * 20_000, "#" * 20_000, "9" * 20_000, "$-+" * 20_000):
        assert exact([prompt("8")], [completion(text)]) == [0.0]
        exact([prompt("8")], [completion(text)], mode="flexible")
