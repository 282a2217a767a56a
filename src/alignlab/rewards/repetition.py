"""A penalty on saying the same thing again.

completion text -> words -> share of word n-grams that are distinct -> that share minus 1, scaled.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.types import Completion, Prompt


def repetition(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, ngram: int = 3, weight: float = 1.0
) -> list[float | None]:
    """`weight * (distinct n-grams / n-grams - 1)`, between -weight (exclusive) and 0; 0 for fewer than `ngram` words.

    Applies to every prompt; words are split at white space, case is ignored. Raises ValueError unless ngram >= 1 and
    weight >= 0.
    """
    if ngram < 1 or weight < 0:
        raise ValueError(f"rewards.repetition: needs ngram >= 1 and weight >= 0, got {ngram} and {weight}")
    return [
        -weight * repeated_fraction(completion.text, ngram) for _, completion in zip(prompts, completions, strict=True)
    ]


def repeated_fraction(text: str, ngram: int) -> float:
    """1 - distinct / all word n-grams, in [0, 1)."""
    words = text.lower().split()
    grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
