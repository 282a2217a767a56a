r"""GSM8K's grading: what a solution answers with, whoever wrote it and in whatever dress."""

from __future__ import annotations

import json
import re
import time
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.rewards._answers import answered_number, marked_number, read
from alignlab.rewards.exact import exact
from alignlab.tasks.gsm8k import formatted, grade, within
from alignlab.types import Completion, Prompt

CASES: list[tuple[str, Fraction | int | None, Fraction | int | None]] = [
    ("#### 18", 18, 18),
    ("x <<16-3-4=9>>9 eggs\n#### 18", 18, 18),
    ("The answer is 18.", 18, 18),
    ("**18**", None, 18),
    ("x = 18", None, 18),
    (r"\boxed{18}", 18, 18),
    (r"so $\boxed{\$18}$ it is", 18, 18),
    (r"\boxed{18\%}", 18, 18),
    (r"\boxed{\frac{1}{2}}", Fraction(1, 2), Fraction(1, 2)),
    (r"\boxed{18 \text{ dollars}}", 18, 18),
    (r"\boxed{1{,}234}", 1234, 1234),
    ("#### $1,234.50.", Fraction(2469, 2), Fraction(2469, 2)),
    ("#### 18 dollars", 18, 18),
    ("#### 5 km/h", 5, 5),
    ("#### 3 apples", 3, 3),
    ("#### -10", -10, -10),
    ("#### −10", -10, -10),
    ("#### 1 1/2", Fraction(3, 2), Fraction(3, 2)),
    ("#### 3/4", Fraction(3, 4), Fraction(3, 4)),
    ("#### 1½ cups", Fraction(3, 2), Fraction(3, 2)),
    ("#### 18.00", 18, 18),
    ("#### 18%", 18, 18),
    ("#### €18", 18, 18),
    ("#### 1 000 000", 1000000, 1000000),
    ("#### 18\n\nQuestion: A\nAnswer: 5\n#### 5", 18, 18),
    ("#### 18\n\nTom has 5.\n#### 5", 18, 18),
    ("She has 18.\n\nQuestion: Bob has 4 and 5?\nAnswer: 9", None, 18),
    ("#### Step 1: 3+4\nfoo 7\n#### 18", 18, 18),
    ("#### 1. Compute\nfoo\n#### 2. Add\n So it's 18.", None, 18),
    ("so 18.\n#### 18. She makes $18.", 18, 18),
    ("### Answer\n\nFinal Answer: **18**", 18, 18),
    ("**Answer:** 18", 18, 18),
    ("**Final Answer**: $18", 18, 18),
    ("Answer:\n\n18", 18, 18),
    ("The final answer is: $\\boxed{18}$.", 18, 18),
    ("The answer is $18$.", 18, 18),
    ("The answer is 9 * 2 = $18.", 18, 18),
    ("the answer is \\(18\\)", 18, 18),
    ("The answer is 18 or 20.", None, 20),
    ("#### 18-20", None, 20),
    ("#### 5:30", None, None),
    ("<answer>18</answer>", 18, 18),
    ("<answer>Janet makes $18 every day.</answer>", 18, 18),
    ("<answer>\n18\n</answer>", 18, 18),
    ("<answer>16-3-4=9, 9*2=18\n#### 18</answer>", 18, 18),
    ("<answer>18 19 20</answer>", None, 20),
    ("Janet makes $18 every day at the farmers' market.", None, 18),
    ("Janet makes **$18** in 2 days.", None, 18),
    ("Steps:\n1. 3+4=7\n2. 7*2=14\n3. ", None, 14),
    ("#### 2 million", 2000000, 2000000),
    ("#### 1.8e1", 18, 18),
    ("#### 1.8 \\times 10^{1}", 18, 18),
    ("#### 1.8 × 10^1", 18, 18),
    ("#### 1e999999", None, None),
    ("so 17-9", None, 9),
    ("it is -9", None, -9),
    ("x = -9", None, -9),
    ("- 18 apples", None, 18),
    ("* 18 apples", None, 18),
    ("#### - 18", -18, -18),
    ("no number", None, None),
    ("", None, None),
    ("It is 1072, from 48.", None, 48),
    ("Thus she will have 16 - 3 - 4 = 9 eggs left.", None, 9),
    ("The answer is therefore 18", 18, 18),
    ("The answer to the question is 18 eggs.", 18, 18),
    ("So the answer is:\n\n$$18$$", 18, 18),
    ("The answer is 20. Wait, no. The answer is 18.", 18, 18),
    ("5 + 13 = **18 eggs**", None, 18),
    ("#### 18th", 18, 18),
    ("answer: 1,234", 1234, 1234),
    ("#### **18**", 18, 18),
    ("####18", 18, 18),
    ("####\n18", 18, 18),
    ("#### x = 18", 18, 18),
    ("#### 18 dollars and 50 cents", Fraction(37, 2), Fraction(37, 2)),
    ("#### 2 hours and 30 minutes", 2, 2),
    ("<<9*2=18>>", None, 18),
    ("She has $<<9*2=18>>18 left", None, 18),
    ("She has <<9*2=18>>$18 left", None, 18),
    ("The answer is $-5", -5, -5),
    ("The answer is -$5", -5, -5),
    ("the answer isn't 5, it's 18", None, 18),
    ("\\boxed{x=18}", 18, 18),
    ("\\boxed{18}\n\nLet me verify: 2 + 3 = 5", 18, 18),
    ("#### 18 (9 eggs at $2)", 18, 18),
    ("#### 10 apples and 5 pears", 10, 10),
    ("The answer is 100,000.", 100000, 100000),
    ("#### 1/0", None, None),
    ("\\boxed{18", 18, 18),
    ("so 18 apples at 5:30", None, 18),
    ("A1 x2", None, None),
    ("\\boxed{\\dfrac{3}{4}}", Fraction(3, 4), Fraction(3, 4)),
    ("#### 18<|im_end|>\n<|im_start|>user 7", 18, 18),
    ("The total is 1 234 eggs", None, 234),
    ("#### 7.5 hours", Fraction(15, 2), Fraction(15, 2)),
    ("He needs 4.\nHe needs .5", None, Fraction(1, 2)),
    ("cost is 5$", None, 5),
    ("Answer: $18.", 18, 18),
    ("**Answer: Janet makes $18 every day.**", 18, 18),
    ("*Therefore, the answer is* **18**.", 18, 18),
    ("The answer is 18 because 9*2=18.", 18, 18),
    ("The answer is 18 (since 16-7=9).", 18, 18),
    ("Therefore the answer is 2+16=18 eggs in 5 days.", 18, 18),
    ("#### 18\n#### 20", 18, 18),
    ("#### Final answer: 18", 18, 18),
    ("The correct answer is (B) 18", 18, 18),
    ("Answer: 20 - 2 = 18", 18, 18),
    ("**Total: 18 eggs**", None, 18),
    ("3. **18 eggs**", None, 18),
    ("1. **Total eggs:** 16\n2. **Sold**: 9 × $2 = $18", None, 18),
]
"""(completion, marked number, number in flexible reading)."""


@pytest.mark.parametrize(("text", "strict", "flexible"), CASES)
def test_the_number_a_solution_answers_with(
    text: str, strict: Fraction | int | None, flexible: Fraction | int | None
) -> None:
    assert marked_number(text) == strict
    assert answered_number(text) == flexible


def rows(shared_data: Path) -> list[tuple[str, int]]:
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    return [(answer, int(answer.rpartition("#### ")[2].replace(",", ""))) for answer in answers]


def test_every_reference_answer_is_right_and_none_is_once_its_number_is_changed(shared_data: Path) -> None:
    answers = rows(shared_data)
    assert len(answers) == 1319
    for answer, number in answers:
        working = answer.rpartition("####")[0]
        for mode in ("strict", "flexible"):
            assert grade(answer, answer, mode)
            assert grade(answer, str(number), mode)
            assert grade(f"{working}#### {number:,}.00", answer, mode)
            for wrong in {number + 1, number - 1, number * 10 + 1, -number or 1}:
                assert not grade(f"{working}#### {wrong}", answer, mode)
                assert not grade(f"{working}#### {wrong:,}", answer, mode)


@pytest.mark.parametrize(
    "ending",
    [
        "The answer is {n}.",
        "So the answer is ${n:,}.",
        "**Answer: {n:,} apples**",
        "\\[ \\boxed{{{n}}} \\]",
        "$\\boxed{{\\$ {n}}}$",
        "<answer>{n}</answer>",
        "#### {n}\n\nQuestion: Tim has 3 pens and buys 4. How many has he?\nAnswer: 3 + 4 = 7\n#### 7",
        "The answer is {n}.\n\nQ: Tim has 3 pens and buys 4. How many has he?\nA: The answer is 7.",
    ],
)
def test_other_systems_endings_are_read_on_every_row(shared_data: Path, ending: str) -> None:
    for answer, number in rows(shared_data):
        working = answer.rpartition("\n####")[0]
        assert grade(f"{working}\n{ending.format(n=number)}", answer)
        assert not grade(f"{working}\n{ending.format(n=number + 1)}", answer)


def test_at_least_as_right_as_the_two_usual_readings_where_no_answer_is_marked(shared_data: Path) -> None:
    """The worked text without its last line: how often its end gives the answer, beside lm-evaluation-harness's
    flexible-extract (the last match of its pattern, without commas, `$` and a full stop)."""
    ours = theirs = 0
    for answer, number in rows(shared_data):
        working = answer.rpartition("\n####")[0]
        matches = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", working)
        last = re.sub(r"[,$]|\.$", "", "".join(matches[-1]))
        theirs += last == str(number)
        ours += grade(working, answer, "flexible")
    assert ours > theirs
    assert ours > 0.93 * 1319


def test_where_the_original_pattern_finds_a_number_ours_is_the_same(shared_data: Path) -> None:
    """The first number after `#### `, as grade-school-math and strict-match take it, on solutions that run on."""
    answers = rows(shared_data)
    for (answer, number), (other, _) in pairwise(answers):
        text = f"{answer}\n\n{other}"
        (first, *_) = re.findall(r"#### (-?[0-9.,]+)", text)
        assert int(first.replace(",", "")) == number == marked_number(text)


numbers = st.integers(-(10**9), 10**9)
UNITS = ("", " dollars", " apples", " km/h", "%", ".", " eggs per day.", " cm^2", " hours", "\N{DEGREE SIGN}")
MARKS = (
    "#### {}",
    "The answer is {}",
    "Answer: {}",
    "**Final answer:** {}",
    "<answer>{}</answer>",
    "\\boxed{{{}}}",
    "so x = {}\n#### {}",
)


@given(numbers, st.sampled_from(UNITS), st.sampled_from(MARKS), st.booleans(), st.text("abc 123.\n", max_size=30))
def test_any_whole_number_in_any_dress(number: int, unit: str, mark: str, commas: bool, before: str) -> None:
    shown = f"{number:,}" if commas else str(number)
    text = f"{before}\n" + mark.replace("{}", shown + unit).replace("{{", "{").replace("}}", "}")
    assert grade(text, str(number)), text
    assert grade(text, f"Working.\n#### {number:,}", "flexible")
    assert not grade(text, str(number + 1))
    assert not grade(text, str(-number or 1), "flexible")


@given(numbers, st.integers(0, 99))
def test_decimals_and_fractions_are_exact(number: int, cents: int) -> None:
    sign = "-" if number < 0 else ""
    value = Fraction(abs(number) * 100 + cents, 100) * (-1 if number < 0 else 1)
    assert read(f"${sign}{abs(number)}.{cents:02d}") == value
    assert read(f"{number}/{cents + 1}") == Fraction(number, cents + 1)
    assert read(f"{abs(number)} {cents}/100") == Fraction(abs(number) * 100 + cents, 100)
    assert read(f"\\frac{{{number}}}{{{cents + 1}}}") == Fraction(number, cents + 1)


@given(st.text(alphabet="0123456789-+/.,$%#<>=*{}\\boxedfrac answer is\n", max_size=80))
def test_no_text_breaks_it(text: str) -> None:
    for mode in ("strict", "flexible"):
        grade(text, "8", mode)
        grade("#### 8", text, mode)
    within(text, "8")


@given(numbers, numbers)
def test_within_is_a_relative_distance(number: int, other: int) -> None:
    assert within(f"#### {other}", str(number)) == (10 * abs(other - number) <= abs(number))


def test_within_ten_percent() -> None:
    assert within("#### 110", "100") and within("It is 90.", "100") and not within("#### 110.01", "100")
    assert within("#### -95", "-100") and not within("#### 95", "-100")
    assert within("#### 0", "0") and not within("#### 1", "0")
    assert within("#### 149", "100", tolerance=0.5)
    assert not within("no number", "100")
    assert not within("It is 100.", "100", mode="strict")


def test_formatted() -> None:
    assert formatted("<reasoning>3 + 5 = 8</reasoning>\n<answer>8</answer>")
    assert not formatted("<answer>8</answer><reasoning>3 + 5 = 8</reasoning>")
    assert not formatted("<reasoning>r</reasoning><answer> </answer>")
    assert not formatted("<reasoning>r</reasoning><answer>8</answer><answer>8</answer>")


def test_a_reference_without_a_number_makes_nothing_right() -> None:
    assert not grade("#### 8", "eight")
    assert not grade("eight", "eight", "flexible")


def test_the_reward_reads_marks_as_the_grading_does() -> None:
    prompt = Prompt(messages=(), id="p", answer="8", meta={"grading": "number"})
    texts = ["#### 8 coins", "The answer is 8.", "<answer>8 coins</answer>", "It is 8.", "#### 9"]
    completions = [Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text) for text in texts]
    assert exact([prompt] * 5, completions, mode="marked") == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert exact([prompt] * 5, completions) == [0.0, 0.0, 0.0, 0.0, 0.0]


HOSTILE = (
    "<answer>",
    "1,",
    "#",
    "9",
    "$-+",
    "####\n",
    "\\boxed{",
    "answer: ",
    "x1\n",
    "answer is 1:2 ",
    "<<",
    "<<1=",
    "1 ",
    "1/",
    "{",
    "**1",
    "\\frac{",
    " ",
    "\n",
    "\n Q",
    "\nQuestion: ",
    "</s>",
    "=1",
    "1.1.",
    "=:",
    "-",
    "*",
    "_1",
    "1 1/2 ",
    "\\text{",
    "½",
    "\u2009",
    "(",
    "1 or ",
    "\u0663",
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_hundred_kilobytes_take_a_moment(piece: str) -> None:
    """Of one piece over and over, and between two marks."""
    text = piece * (100_000 // len(piece))
    for hostile in (text, f"answer{text}1", f"**{text}", f"#### {text}"):
        start = time.process_time()
        grade(hostile, "8")
        grade(hostile, "8", "flexible")
        grade("8", hostile)
        assert time.process_time() - start < SECONDS


SECONDS = 2.0
"""Quadratic time would be minutes."""


@pytest.mark.parametrize("answer", [18, 18.0, Fraction(18), Decimal("18.0"), np.int64(18), np.float32(18)])
def test_an_answer_may_be_a_number(answer: Any) -> None:
    assert grade("#### 18", answer) and grade("about 18", answer, "flexible") and within("#### 19", answer)
    assert not grade("#### 17", answer)


def test_what_is_neither_text_nor_number_says_so() -> None:
    for answer in (None, True, [18]):
        with pytest.raises(TypeError, match=r"answer is .*, needed is a text or a number"):
            grade("#### 18", answer)  # type: ignore[arg-type]
    for completion in (None, 18, b"#### 18"):
        with pytest.raises(TypeError, match=r"completion is .*, needed is a text"):
            grade(completion, "18")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mode 'lenient'; there are: strict, flexible"):
        grade("#### 18", "18", "lenient")  # type: ignore[arg-type]
    assert not grade("#### nan", float("nan")) and not grade("#### inf", float("inf"))
