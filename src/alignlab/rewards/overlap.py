"""Baseline: how many words of the rubric and of the reference an answer uses. It measures vocabulary, not quality.

completion text -> words shared with the rubric (0 to 10) + with the reference (0 to 5) [+ the target (0 to 5)].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alignlab.errors import UserError
from alignlab.rewards import Detailed
from alignlab.rewards.similarity import words
from alignlab.types import Completion, Prompt

NEEDS = "a column `criteria` or `answer`"
RUBRIC, REFERENCE, TARGET = 10.0, 5.0, 5.0
"""The most points of each part."""


def overlap(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, target: bool = False
) -> list[float | None]:
    """The sum of the parts that a prompt has; None where it has neither criteria nor a reference.

    rubric: 10 x share of the distinct words of `meta["criteria"]` that the completion uses. reference: 5 x F1 of the
    words (a word counts as often as both have it) with `prompt.answer`. Their weaknesses are known, and tested: the
    rubric written off, word by word and in any order, earns all of the first, and the reference all of the second.

    Args:
        target: adds 5 x `meta["target"]`, in [0, 1]. That is the same for every completion of a prompt: where siblings
            are compared (GRPO, RLOO) it changes no gradient, and elsewhere it teaches nothing either.

    Raises:
        UserError: `target` is asked for and a prompt has none in [0, 1].
    """
    return [_judge(prompt, completion.text, target) for prompt, completion in zip(prompts, completions, strict=True)]


def _judge(prompt: Prompt, text: str, with_target: bool) -> float | None:
    rubric, reference, said = set(words(rubric_text(prompt))), words(prompt.answer or ""), words(text)
    parts = {}
    if rubric:
        parts["rubric"] = RUBRIC * len(rubric & set(said)) / len(rubric)
    if reference:
        shared = sum((Counter(said) & Counter(reference)).values())
        parts["reference"] = REFERENCE * 2 * shared / (len(said) + len(reference))
    if not parts:
        return None
    if with_target:
        given = prompt.meta.get("target")
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
            raise UserError(f"prompt {prompt.id!r}: `target` is {given!r}, but must be from 0 to 1")
        parts["target"] = TARGET * given
    return Detailed(sum(parts.values()), parts)


def rubric_text(prompt: Prompt) -> str:
    """Names and descriptions of the criteria that a prompt brings along."""
    criteria = prompt.meta.get("criteria")
    if not isinstance(criteria, list | tuple):
        return ""
    return "\n".join(f"{c.get('name', '')} {c.get('description', '')}" for c in criteria if isinstance(c, dict))
