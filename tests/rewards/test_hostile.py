"""No text breaks a reward: every value is finite or None, and comes soon; what reads facts gives nothing away."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from alignlab import registry
from alignlab.conversation import Template
from alignlab.models import load_generation_config, load_tokenizer
from alignlab.rewards.code import SWITCH, code
from alignlab.rewards.exact import exact
from alignlab.rewards.format import format
from alignlab.rewards.hybrid import hybrid
from alignlab.rewards.judged import judged
from alignlab.rewards.learned import learned
from alignlab.rewards.length import length
from alignlab.rewards.overlap import overlap
from alignlab.rewards.repetition import repetition
from alignlab.rewards.rubric import rubric
from alignlab.rewards.similarity import similarity
from alignlab.rewards.toxicity import toxicity
from alignlab.rollout import Reward, combine
from alignlab.types import Prompt
from tests.rewards.samples import HOSTILE, FakeJudge, completion, prompt, tiny_encoder
from tests.rewards.test_learned import judge

HAS_JUDGE = importlib.util.find_spec("alignlab.judge") is not None
CRITERIA = [{"name": "facts", "description": "the cat sat on the mat", "weight": 2}]
ASKED: dict[str, Prompt] = {
    "exact": prompt(answer="7"),
    "format": prompt(format="reasoning_answer"),
    "code": prompt(answer="x", grading="expression"),
    "tests": prompt(grading="tests", tests=["assert f(1) == 2"]),
    "similarity": prompt(answer="the cat sat on the mat"),
    "overlap": prompt(answer="the cat sat", criteria=CRITERIA),
    "rubric": prompt(criteria=CRITERIA),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Any]]:
    """Name -> reward with the options it needs."""
    folder = tmp_path_factory.mktemp("models")
    toxic = tiny_encoder(folder / "toxic", labels=("fine", "toxic"))
    encoder = tiny_encoder(folder / "encoder")
    return {
        "exact": exact,
        "format": format,
        "graded format": partial(format, mode="graded"),
        "length": length,
        "repetition": repetition,
        "code": code,
        "tests": partial(code, seconds=2.0),
        "similarity": similarity,
        "cosine": partial(similarity, measure="mean", model=encoder),
        "overlap": overlap,
        "toxicity": partial(toxicity, model=toxic),
        "hybrid": partial(hybrid, kind="heuristic", toxicity_model=toxic),
        "judged": partial(judged, client=FakeJudge("Score: 3")),
        "rubric": partial(rubric, client=FakeJudge("Score: 3")),
    }


NAMES = ("exact", "format", "graded format", "length", "repetition", "code", "tests", "similarity", "cosine", "overlap",
         "toxicity", "hybrid", "judged", "rubric")  # fmt: skip


def test_every_reward_is_put_to_it() -> None:
    assert set(registry.names("rewards")) - {"learned"} <= set(NAMES)  # learned: below


@pytest.mark.parametrize("name", NAMES)
def test_values_are_finite_or_none_and_come_soon(
    name: str, built: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("judged", "rubric") and not HAS_JUDGE:
        pytest.skip("alignlab.judge is not there")
    monkeypatch.setenv(SWITCH, "1")
    asked = ASKED.get({"graded format": "format", "cosine": "similarity"}.get(name, name), prompt())
    completions = [completion(text) for text in HOSTILE.values()]
    started = time.perf_counter()
    found = combine([Reward(name=name, function=built[name], weight=1.0)], [asked] * len(completions), completions)
    assert time.perf_counter() - started < 20
    assert all(name in judged.breakdown for judged in found)
    if name in ("exact", "code", "tests"):
        assert {judged.reward for judged in found} == {0.0}


def test_learned_reads_hostile_text_as_text() -> None:
    template = Template.of(load_tokenizer("starter"), load_generation_config("starter"))
    model = judge(len(template.tokenizer), context=2048)  # type: ignore[arg-type]
    texts = [text[:200] for text in HOSTILE.values() if "\ud800" not in text]  # no tokenizer decodes to such
    found = learned([prompt()] * len(texts), [completion(t) for t in texts], reward_model=model, template=template)
    assert all(isinstance(value, float) and abs(value) < 1e6 for value in found)


def test_the_shipped_classifier_is_what_toxicity_asks_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in says what it is given, and what becomes of what it says."""
    shipped = ModuleType("alignlab.classifiers")
    given: list[str] = []

    def probability(texts: list[str]) -> list[float]:
        given.extend(texts)
        return [0.9 if "bad" in text else 0.2 for text in texts]

    shipped.toxicity = probability  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "alignlab.classifiers", shipped)
    completions = [completion(text) for text in ("so bad", "good", " ")]
    assert toxicity([prompt("you are bad")] * 3, completions) == [-0.9, -0.2, 0.0]
    assert given == ["so bad", "good"]  # not the prompt, and nothing where nothing is said
    assert toxicity([prompt()] * 3, completions, threshold=0.3) == [-0.9, 0.0, 0.0]
