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


def test_long_hostile_text_is_quick() -> None:
    assert format([ASKED, ASKED], [completion("<reasoning>" * 20_000), completion(" " * 200_000)]) == [0.0, 0.0]
