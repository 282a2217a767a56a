"""Is the answer given in the reasoning/answer format?

completion text -> 1.0 if it is `<reasoning>..</reasoning><answer>..</answer>` and stopped by itself, else 0.0; graded:
-2 to 3 points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from alignlab.types import Completion, Prompt

NEEDS = "a column `format` that is reasoning_answer"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def format(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, mode: Literal["strict", "graded"] = "strict"
) -> list[float | None]:
    """What the form of a completion is worth; None where `meta["format"]` does not ask for "reasoning_answer".

    strict: 1.0 for a well-formed completion that ended with its stop token, else 0.0. graded: for each of the four tags
    0.5 where it stands once and behind those before it, -0.5 where not, and 1 more for what is 1.0 in strict: from -2
    for text without tags to 3.
    """
    return [
        _judge(completion, mode) if prompt.meta.get("format") == "reasoning_answer" else None
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _judge(completion: Completion, mode: str) -> float:
    whole = float(completion.finish_reason == "stop" and well_formed(completion.text))
    return whole if mode == "strict" else whole + tag_points(completion.text)


def tag_points(text: str) -> float:
    """0.5 for every tag that stands exactly once and behind all places of the tags before it, -0.5 for every other."""
    points, behind = 0.0, -1
    for tag in TAGS:
        in_order = text.count(tag) == 1 and text.find(tag) > behind
        points += 0.5 if in_order else -0.5
        behind = max(behind, text.rfind(tag))
    return points


def well_formed(text: str) -> bool:
    """Whether the text is one reasoning block, then one answer block, neither blank, with only white space around."""
    match = _SHAPE.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
    return match is not None and all(block.strip() for block in match.groups())
