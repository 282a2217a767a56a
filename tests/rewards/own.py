"""A reward of a user's own."""

from collections.abc import Sequence

from alignlab.types import Completion, Prompt


def brief(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [float(len(completion.text) < 9) for completion in completions]
