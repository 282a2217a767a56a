"""A gentle penalty on long completions.

number of completion tokens -> 0 up to `limit`, falling in a straight line to -1 over the next `buffer` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.types import Completion, Prompt


def length(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, limit: int = 48, buffer: int = 16
) -> list[float | None]:
    """Soft over-length punishment (DAPO, arXiv 2503.14476, eq. 13, whose L_max is `limit + buffer` here).

    Applies to every prompt; the stop token counts. Raises ValueError unless limit >= 0 and buffer >= 1.
    """
    if limit < 0 or buffer < 1:
        raise ValueError(f"rewards.length: needs limit >= 0 and buffer >= 1, got {limit} and {buffer}")
    return [
        overlength(len(completion.token_ids), limit, buffer) for _, completion in zip(prompts, completions, strict=True)
    ]


def overlength(num_tokens: int, limit: int, buffer: int) -> float:
    """0 up to `limit` tokens, -1 from `limit + buffer` on, linear in between."""
    return -min(1.0, max(0, num_tokens - limit) / buffer)
