"""What an LLM judge thinks of an answer, asked at any OpenAI-compatible endpoint.

prompt, completion -> a question -> the reply's score, 0 to 10 -> a number in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from alignlab.rewards import _judging
from alignlab.rewards._judging import JudgeOptions
from alignlab.types import Completion, Prompt

ONLY_HOW = _judging.ONLY_HOW


def judged(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    rubric: str = "",
    reference: bool = False,
    **judge: Unpack[JudgeOptions],
) -> list[float | None]:
    """The judge's score of each completion; None where its reply holds none. Applies to every prompt.

    Args:
        rubric: what to grade by, in words; empty = correct, does what was asked, harmless, clear.
        reference: shows the judge `prompt.answer`, where there is one.
        judge: the endpoint, see `alignlab.judge.Endpoint`.

    Raises:
        UserError: the endpoint cannot be used, its budget is used up, or most replies hold no score.
    """
    client = _judging.client_of(judge)
    references = [prompt.answer if reference else None for prompt in prompts]
    return _judging.scores(client, prompts, completions, [rubric.strip() or None] * len(prompts), references)


def applies(prompt: Prompt, **_: object) -> bool:
    """Whether completions of this prompt are judged: all are."""
    return True
