"""Is the answer given in the reasoning/answer format?

completion text -> 1.0 if it is `<reasoning>..</reasoning><answer>..</answer>` and stopped by itself, else 0.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignlab.types import Completion, Prompt

NEEDS = "a column `format` that is reasoning_answer"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def format(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """1.0 for a well-formed completion that ended with its stop token, else 0.0.

    None where `meta["format"]` does not ask for "reasoning_answer".
    """
    return [
        float(completion.finish_reason == "stop" and well_formed(completion.text))
        if prompt.meta.get("format") == "reasoning_answer"
        else None
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def well_formed(text: str) -> bool:
    """Whether the text is one reasoning block, then one answer block, neither blank, with only white space around."""
    match = _SHAPE.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
    return match is not None and all(block.strip() for block in match.groups())
