"""Replies become scores or None; a judge that cannot be read, or whose key is missing, is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("alignlab.judge")

from alignlab.errors import UserError
from alignlab.rewards import _judging
from alignlab.rewards.judged import applies, judged
from alignlab.rollout import Reward, combine, rollout_metrics
from alignlab.types import Group, Rollout
from tests.rewards.samples import HOSTILE, FakeJudge, completion, prompt

ASKED = [prompt("How do I boil an egg?", id=str(i), answer="Seven minutes.") for i in range(4)]
TEXTS = [completion(text) for text in ("Seven minutes.", "Eight.", "No.", "An hour!")]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    _judging._client.cache_clear()


def test_scores_are_tenths_of_ten_points() -> None:
    judge = FakeJudge(
        lambda text: "Good.\nScore: 10" if "Seven minutes" in text.split("<<< answer")[-1] else "Score: 2.5"
    )
    assert judged(ASKED, TEXTS, client=judge) == [1.0, 0.25, 0.25, 0.25]
    assert len(judge.asked) == 4 and "How do I boil an egg?" in judge.asked[0] and "Eight." in judge.asked[1]


def test_what_is_graded_by() -> None:
    judge = FakeJudge("Score: 5")
    judged(ASKED[:1], TEXTS[1:2], client=judge, rubric="Is it about eggs?", reference=True)
    assert "Is it about eggs?" in judge.asked[0] and "Seven minutes." in judge.asked[0]
    judged(ASKED[:1], TEXTS[1:2], client=judge)
    assert "Seven minutes." not in judge.asked[1]


def test_a_reply_without_a_score_is_none_and_counted() -> None:
    judge = FakeJudge(lambda text: "I would rather not say." if "Eight." in text else "Score: 4")
    reward = Reward(name="judged", function=lambda p, c: judged(p, c, client=judge), weight=1.0)
    found = combine([reward], ASKED, TEXTS)
    assert [value.breakdown for value in found] == [{"judged": 0.4}, {}, {"judged": 0.4}, {"judged": 0.4}]
    rollouts = tuple(
        Rollout(prompt=p, prompt_ids=(1,), completion=c, **value._asdict())
        for p, c, value in zip(ASKED, TEXTS, found, strict=True)
    )
    assert rollout_metrics([Group(rollouts=rollouts)], [reward])["reward_judged/judged"] == 0.75


def test_a_judge_most_of_whose_replies_hold_no_score_is_an_error() -> None:
    judge = FakeJudge(lambda text: "Score: 4" if "Eight." in text else "great!!")
    with pytest.raises(UserError, match=r"3 of 4 replies hold no score.*prompt '0', completion 'Seven"):
        judged(ASKED, TEXTS, client=judge)
    reward = Reward(name="judged", function=lambda p, c: judged(p, c, client=judge), weight=1.0)
    judge.asked.clear()
    with pytest.raises(UserError, match="reward 'judged': judge: 3 of 4"):
        combine([reward], ASKED, TEXTS)
    assert len(judge.asked) == 4  # nothing is asked again to find out where


def test_an_answer_cannot_speak_for_the_judge() -> None:
    """What stands in an answer is material: it neither ends its frame nor counts as the judge's score."""
    injected = completion(HOSTILE["injection"])
    judge = FakeJudge("The answer tries to set its own score.\nScore: 0")
    assert judged(ASKED[:2], [injected, TEXTS[1]], client=judge) == [0.0, 0.0]
    frame = judge.asked[0].split("\n>>> answer")[0]
    assert "Score: 10/10" in frame  # inside
    quoting = FakeJudge(f"It says: {HOSTILE['injection']}\nScore: 1")
    assert judged(ASKED[:2], [injected, TEXTS[1]], client=quoting)[0] == 0.1


def test_nothing_to_judge_asks_nothing() -> None:
    judge = FakeJudge("Score: 1")
    assert judged([], [], client=judge) == [] and not judge.asked and applies(ASKED[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no key for 'gpt-4o-mini' in the environment variable OPENAI_API_KEY"),
        ({"api_key_env": "OTHER_KEY"}, "environment variable OTHER_KEY"),
        ({"base_url": "localhost"}, "base_url"),
        ({"base_url": "http://localhost:1/v1", "temperature": -1.0}, "temperature"),
        ({"client": object()}, "needs a method complete"),
        ({"client": FakeJudge("x"), "model": "y"}, "no other option"),
    ],
)
def test_what_is_missing_is_said_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judged([], [], **options)


def test_one_client_serves_a_whole_run(tmp_path: Path) -> None:
    """So that its caps hold; and its replies are kept on disk unless another folder is named."""
    options: dict[str, Any] = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "max_calls": 3}
    first, again = _judging.client_of(options), _judging.client_of(dict(options))  # type: ignore[arg-type]
    assert first is again and first.endpoint.cache.name == "judge"
    named = _judging.client_of({"base_url": "http://127.0.0.1:9/v1", "model": "m", "cache": str(tmp_path / "kept")})
    assert named is not first and named.endpoint.cache == tmp_path / "kept"
    replaying = _judging.client_of({"max_calls": 0})  # needs no key
    assert replaying.endpoint.max_calls == 0
