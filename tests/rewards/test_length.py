"""Zero up to the limit, then a straight line to -1."""

from __future__ import annotations

import pytest

from alignlab.rewards.length import length
from alignlab.types import Completion, Prompt


def completion(num_tokens: int) -> Completion:
    return Completion(token_ids=(7,) * num_tokens, logprobs=(0.0,) * num_tokens, finish_reason="stop", text="")


def test_by_hand() -> None:
    """limit 10, buffer 4: 11 tokens are a quarter over, 12 half, 14 and more all the way."""
    counts = [0, 1, 10, 11, 12, 14, 15, 100]
    rewards = length([Prompt(messages=(), id="p")] * 8, [completion(n) for n in counts], limit=10, buffer=4)
    assert rewards == [0.0, 0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(("limit", "buffer"), [(-1, 4), (4, 0), (4, -1)])
def test_senseless_options_are_refused(limit: int, buffer: int) -> None:
    with pytest.raises(ValueError, match=r"rewards\.length"):
        length([], [], limit=limit, buffer=buffer)
