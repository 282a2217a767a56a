"""Criteria times weights by hand; a rubric that cannot be used is said with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import UserError
from alignlab.rewards import Detailed
from alignlab.rewards.rubric import Criterion, Rubric, applies, read_rubric, rubric, rubric_of
from tests.rewards.samples import FakeJudge, completion, prompt

FACTS = {"name": "facts", "weight": 3, "description": "Every statement is true."}
TONE = {"name": "tone", "weight": 1, "description": "It is friendly.", "levels": {"1": "rude", "5": "warm"}}
PITFALL = {"name": "padding", "weight": -2, "description": "It repeats the question."}
YAML_TEXT = """
criteria:
  - {name: facts, weight: 3, description: Every statement is true.}
  - {name: tone, description: It is friendly.}
modifiers:
  - {name: sources, points: 0.2, description: It names its sources.}
"""
SCORES = {"Every statement": 8.0, "friendly": 4.0, "repeats": 5.0, "sources": 10.0}


def by_criterion(text: str) -> str:
    return f"Score: {next(score for key, score in SCORES.items() if key in text):g}"


def test_the_sum_by_hand() -> None:
    three = Rubric(tuple(Criterion(c["name"], "d", c["weight"]) for c in (FACTS, TONE, PITFALL)))  # type: ignore[arg-type]
    assert three.combine([0.8, 0.4, 0.5]) == pytest.approx((3 * 0.8 + 0.4 - 2 * 0.5) / 4)
    assert three.combine([0.0, 0.0, 1.0]) == 0.0  # a pitfall takes no more than there is
    bonus = Rubric((Criterion("a", "d"),), (Criterion("b", "d", 0.5), Criterion("c", "d", -0.2)))
    assert bonus.combine([0.4, 0.5, 1.0]) == pytest.approx(0.4 + 0.25 - 0.2)
    assert bonus.combine([1.0, 1.0, 0.0]) == 1.0


def test_weights_beyond_one_are_shares() -> None:
    assert Rubric((Criterion("a", "d", 30.0), Criterion("b", "d", 10.0))).combine([1.0, 0.0]) == 0.75


def test_where_it_applies() -> None:
    assert applies(prompt(criteria=[FACTS])) and applies(prompt(), file="rubric.yaml")
    assert not applies(prompt()) and not applies(prompt(criteria=[]))
    assert rubric_of(prompt(criteria=[TONE])) == Rubric(
        (Criterion("tone", "It is friendly.", 1.0, (("1", "rude"), ("5", "warm"))),)
    )
    assert "5: warm" in str(rubric_of(prompt(criteria=[TONE])).criteria[0])  # type: ignore[union-attr]


def test_each_criterion_is_a_question_of_its_own() -> None:
    pytest.importorskip("alignlab.judge")
    judge = FakeJudge(by_criterion)
    prompts = [prompt(id="a", criteria=[FACTS, TONE]), prompt(id="b"), prompt(id="c", criteria=[FACTS, PITFALL])]
    found = rubric(prompts, [completion("x")] * 3, client=judge)
    assert found == pytest.approx([(3 * 0.8 + 0.4) / 4, None, (3 * 0.8 - 2 * 0.5) / 3])
    assert len(judge.asked) == 4 and "It is friendly." not in judge.asked[0]
    assert not isinstance(found[0], Detailed)  # every prompt has other criteria: no curves


def test_a_file_is_the_same_for_all_and_each_criterion_is_logged(tmp_path: Path) -> None:
    pytest.importorskip("alignlab.judge")
    path = tmp_path / "rubric.yaml"
    path.write_text(YAML_TEXT)
    (value,) = rubric([prompt(criteria=[PITFALL])], [completion("x")], file=str(path), client=FakeJudge(by_criterion))
    assert value == pytest.approx((3 * 0.8 + 0.4) / 4 + 0.2)
    assert isinstance(value, Detailed) and value.parts == {"facts": 0.8, "tone": 0.4, "sources": 1.0}


def test_one_unreadable_score_leaves_the_completion_unjudged() -> None:
    """Else siblings would be on other scales."""
    pytest.importorskip("alignlab.judge")
    judge = FakeJudge(lambda text: "no idea" if "friendly" in text and "odd one" in text else "Score: 5")
    prompts = [prompt(criteria=[FACTS, TONE])] * 3
    found = rubric(prompts, [completion(text) for text in ("fine", "odd one", "good")], client=judge)
    assert found == [0.5, None, 0.5]


def test_the_reference_is_shown_where_it_is_asked_for() -> None:
    pytest.importorskip("alignlab.judge")
    judge = FakeJudge("Score: 5")
    for reference in (False, True):
        rubric([prompt(answer="forty-two", criteria=[FACTS])], [completion("x")], client=judge, reference=reference)
    assert ["forty-two" in text for text in judge.asked] == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a rubric is `criteria`"),
        ("- a", "a rubric is `criteria`"),
        ("criteria: []", "a rubric is `criteria`"),
        ("criteria: be kind", "a list is needed, not 'be kind'"),
        ("criteria: [be kind]", r"criteria\[0\]: {name, weight, description} is needed"),
        ("criteria: [{name: a}]", r"criteria\[0\]: needs a name and a description"),
        ("criteria: [{name: a, description: b, weight: high}]", r"weight is 'high'"),
        ("criteria: [{name: a, description: b, weight: .nan}]", r"weight is nan"),
        ("criteria: [{name: a, description: b, weight: true}]", r"weight is True"),
        ("criteria: [{name: a, description: b, weight: -1}]", "none has a weight above 0"),
        ("criteria: [{name: a, description: b, levels: [1]}]", "levels are a mapping"),
        ("criteria: [{name: a, description: b}]\nmodifiers: [{name: c, description: d}]", "points is None"),
        ("criteria: [{name: a, description: b}, {name: a, description: c}]", "a name stands twice"),
        ("criteria: [{name: a, description: b}]\nother: 1", "nothing else"),
        ("criteria: [", "no YAML"),
        ("criteria: !!python/object/apply:os.system ['true']", "a list is needed|no YAML|a rubric is"),
    ],
)
def test_rubrics_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rubric.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rubric(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\0")
    for name, message in (
        ("none.yaml", "cannot be read"),
        ("large.yaml", "larger"),
        ("bytes.yaml", "no YAML"),
        (".", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_rubric(str(tmp_path / name))


@pytest.mark.parametrize(
    "criteria", ["be kind", [3], [{"name": "a", "description": "b", "weight": float("inf")}], {"a": 1}]
)
def test_criteria_of_a_row_that_cannot_be_used(criteria: Any) -> None:
    with pytest.raises(UserError, match="prompt 'p': criteria"):
        applies(prompt(criteria=criteria))
