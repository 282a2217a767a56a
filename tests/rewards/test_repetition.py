"""Share of repeated word n-grams, as a penalty."""

from __future__ import annotations

import pytest

from alignlab.rewards.repetition import repeated_fraction, repetition
from alignlab.types import Completion, Prompt

TOLERANCE = 1e-12


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text)


@pytest.mark.parametrize(
    ("text", "ngram", "fraction"),
    [
        ("", 1, 0.0),
        ("a", 2, 0.0),  # too short to hold one
        ("a b c d", 2, 0.0),
        ("a a a a", 1, 3 / 4),  # one distinct of four
        ("a a a a", 2, 2 / 3),  # one distinct of three
        ("no fever. rest. No fever. ", 2, 1 / 4),  # no-fever twice in four
        ("a b a b a", 3, 1 / 3),  # aba, bab, aba
    ],
)
def test_by_hand(text: str, ngram: int, fraction: float) -> None:
    assert repeated_fraction(text, ngram) == pytest.approx(fraction, abs=TOLERANCE)


def test_is_a_weighted_penalty() -> None:
    rewards = repetition(
        [Prompt(messages=(), id="p")] * 2, [completion("a a a a"), completion("a b")], ngram=1, weight=2
    )
    assert rewards == [-1.5, 0.0]


@pytest.mark.parametrize("options", [{"ngram": 0}, {"weight": -1.0}])
def test_senseless_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"rewards\.repetition"):
        repetition([], [], **options)
