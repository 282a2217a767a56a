"""The baseline by hand, and what is wrong with it."""

from __future__ import annotations

import pytest
import torch

from alignlab.functional.advantages import group_advantages
from alignlab.rewards import Detailed
from alignlab.rewards.overlap import overlap
from tests.rewards.samples import completion, prompt

CRITERIA = [
    {"name": "empathy", "description": "kind words for the user"},
    {"name": "facts", "description": "true facts"},
]
RUBRIC = {"empathy", "kind", "words", "for", "the", "user", "facts", "true"}
REFERENCE = "Many thanks, and take care."
ASKED = prompt(answer=REFERENCE, criteria=CRITERIA, target=0.8)


def test_points_by_hand() -> None:
    (value,) = overlap([ASKED], [completion("The user, the user: thanks!")])
    # rubric: the, user of 8 words; reference: thanks; 5 words here and 5 there
    assert isinstance(value, Detailed)
    assert value == pytest.approx(10 * 2 / 8 + 5 * 2 * 1 / 10)
    assert value.parts == pytest.approx({"rubric": 2.5, "reference": 1.0})


def test_where_it_applies() -> None:
    prompts = [prompt(), prompt(answer=REFERENCE), prompt(criteria=CRITERIA), prompt(criteria="be kind")]
    assert overlap(prompts, [completion("thanks")] * 4) == [None, pytest.approx(5 * 2 / 6), 0.0, None]


def test_the_rubric_written_off_earns_everything_and_an_honest_answer_little() -> None:
    stuffed, honest = " ".join(sorted(RUBRIC)), "I am sorry to hear that. Rest, and drink enough."
    values = overlap([prompt(criteria=CRITERIA)] * 2, [completion(stuffed), completion(honest)])
    assert values == [10.0, 0.0]


def test_copying_the_reference_earns_all_of_its_part_in_any_order() -> None:
    asked = prompt(answer=REFERENCE)
    copied, shuffled = overlap([asked] * 2, [completion(REFERENCE), completion("care take and thanks many")])
    assert copied == shuffled == 5.0


def test_the_target_changes_no_gradient_where_siblings_are_compared() -> None:
    siblings = [completion(text) for text in ("the user", "thanks", "nothing", "true facts, kind words")]
    without, with_target = (overlap([ASKED] * 4, siblings, target=target) for target in (False, True))
    assert [b - a for a, b in zip(without, with_target, strict=True)] == pytest.approx([4.0] * 4)  # type: ignore[operator]
    one, other = (group_advantages(torch.tensor(values, dtype=torch.float64), 4) for values in (without, with_target))
    torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    assert one.abs().max() > 0.1


@pytest.mark.parametrize("target", [None, "0.8", 1.2, True, float("nan")])
def test_a_target_that_is_none_is_said(target: object) -> None:
    with pytest.raises(ValueError, match=r"`target` is .* but must be from 0 to 1"):
        overlap([prompt(answer="a", target=target)], [completion("a")], target=True)
