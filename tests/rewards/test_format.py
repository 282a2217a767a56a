"""The format is all or nothing."""

from __future__ import annotations

from typing import Literal

import pytest

from alignlab.rewards.format import format, well_formed
from alignlab.types import Completion, Prompt

GOOD = "<reasoning>17 - 9 = 8</reasoning><answer>8</answer>"
ASKED = Prompt(messages=(), id="p", meta={"format": "reasoning_answer"})


def completion(text: str, finish_reason: Literal["stop", "length"] = "stop") -> Completion:
    return Completion(token_ids=(), logprobs=(), finish_reason=finish_reason, text=text)


@pytest.mark.parametrize("text", [GOOD, f"\n {GOOD} \n", GOOD.replace("><", ">\n<"), GOOD.replace("17", "17\n")])
def test_well_formed(text: str) -> None:
    assert well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        GOOD + "!",
        "So " + GOOD,
        GOOD + GOOD,
        GOOD.replace("</reasoning>", ""),
        GOOD.replace("</answer>", ""),
        GOOD.replace("</reasoning>", "</reasoning> and "),
        "<answer>8</answer><reasoning>17 - 9 = 8</reasoning>",
        "<reasoning><answer>8</answer></reasoning>",
        "<reasoning>17 - 9</reasoning><answer>8</answer></answer>",
        "<reasoning> </reasoning><answer>8</answer>",
        "<reasoning>17 - 9</reasoning><answer></answer>",
        GOOD.upper(),
    ],
)
def test_not_well_formed(text: str) -> None:
    assert not well_formed(text)


def test_values_and_where_it_applies() -> None:
    other = Prompt(messages=(), id="q", meta={"format": "json"})
    completions = [completion(GOOD), completion(GOOD, "length"), completion("8"), completion(GOOD)]
    assert format([ASKED, ASKED, ASKED, other], completions) == [1.0, 0.0, 0.0, None]
    assert format([Prompt(messages=(), id="r")], [completion(GOOD)]) == [None]


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (GOOD, 3.0),
        (GOOD + "!", 2.0),
        ("", -2.0),
        ("8", -2.0),
        ("<answer>8</answer>", 0.0),  # two tags of four
        ("<answer>8</answer><reasoning>17 - 9 = 8</reasoning>", 2.0 - 1.0 - 1.0),  # both answer tags too early
        ("<reasoning><answer>8</answer></reasoning>", 0.0),  # nested: both answer tags before the reasoning ends
        (GOOD + GOOD, -2.0),  # nothing stands once
        (GOOD + "</answer>", 1.0),
        (GOOD.replace("</reasoning>", ""), 1.0),
        ("<reasoning></reasoning><answer></answer>", 2.0),
        ("</answer><answer></reasoning><reasoning>", 0.5 - 0.5 - 0.5 - 0.5),
        (GOOD.upper(), -2.0),
    ],
)
def test_graded_points_by_hand(text: str, points: float) -> None:
    assert format([ASKED], [completion(text)], mode="graded") == [points]


def test_a_cut_off_has_its_tags_only() -> None:
    assert format([ASKED], [completion(GOOD, "length")], mode="graded") == [2.0]
    assert format([Prompt(messages=(), id="r")], [completion(GOOD)], mode="graded") == [None]


def test_long_hostile_text_is_quick() -> None:
    assert format([ASKED, ASKED], [completion("<reasoning>" * 20_000), completion(" " * 200_000)]) == [0.0, 0.0]
