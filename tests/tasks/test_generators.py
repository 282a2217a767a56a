"""What all generated tasks promise: seeded, split by content, clean where clean, messy where messy."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from alignlab.tasks import Split, Task, demonstrations, get_task, pairs, pretraining, split_of
from alignlab.types import Completion, Prompt

GENERATED = ("reasoning", "safety", "clinical", "code")
SPLITS = cast(tuple[Split, ...], ("train", "validation", "test"))
COUNTS: dict[Split, int] = {"train": 600, "validation": 150, "test": 250}
LONGEST_PROMPT = 420
LONGEST_COMPLETION = 140
"""Characters; short texts are what makes a demo on two cores possible."""


def said(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), finish_reason="stop", text=text)


def score(task: Task, prompt: Prompt, text: str) -> float:
    return task.grade(prompt, said(text))["score"]


@pytest.fixture(params=GENERATED)
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


def test_a_task_is_found_by_its_file_name() -> None:
    assert get_task("gsm8k").name == "gsm8k"
    with pytest.raises(ValueError, match="reasoning"):
        get_task("resoning")


def test_a_task_without_generator_says_so() -> None:
    with pytest.raises(ValueError, match=r"data\.path"):
        demonstrations(get_task("gsm8k"), "train", 1, 0)


@pytest.mark.parametrize("make", [demonstrations, pairs])
def test_the_seed_decides_everything(task: Task, make: Callable[..., list[object]]) -> None:
    assert make(task, "train", 20, 3) == make(task, "train", 20, 3)
    assert make(task, "train", 20, 3) == make(task, "train", 40, 3)[:20]
    assert make(task, "train", 20, 3) != make(task, "train", 20, 4)


def test_pretraining_is_seeded_too(task: Task) -> None:
    assert pretraining(task, 20, 3) == pretraining(task, 40, 3)[:20]
    assert pretraining(task, 20, 3) != pretraining(task, 20, 4)


def test_splits_share_no_content_and_no_text(task: Task) -> None:
    """Over different seeds, over demonstrations, pairs and the pretraining corpus."""
    keys: dict[Split, set[str]] = {}
    texts: dict[Split, set[str]] = {}
    for split in SPLITS:
        prompts = [item.prompt for item in demonstrations(task, split, COUNTS[split], 1)]
        if split != "test":
            prompts += [item.prompt for item in pairs(task, split, COUNTS[split], 2)]
        keys[split] = {prompt.meta["key"] for prompt in prompts}
        texts[split] = {prompt.messages[0].content for prompt in prompts}
        assert all(split_of(key) == split for key in keys[split])
    corpus = pretraining(task, 2000, 5)
    texts["train"] |= {item.prompt.messages[0].content for item in corpus}
    keys["train"] |= {item.prompt.meta["key"] for item in corpus if "key" in item.prompt.meta}
    for of in (keys, texts):
        assert not of["train"] & of["test"]
        assert not of["train"] & of["validation"]
        assert not of["validation"] & of["test"]


def test_ids_and_prompts_are_distinct(task: Task) -> None:
    items = [item for split in SPLITS for item in demonstrations(task, split, COUNTS[split], 1)]
    more = pairs(task, "train", 300, 1) + pairs(task, "validation", 100, 1)
    ids = [item.prompt.id for item in items] + [pair.prompt.id for pair in more]
    assert len(set(ids)) == len(ids)
    assert f"{task.name}/test/00012" in ids
    texts = [item.prompt.messages[0].content for item in items]
    assert len(set(texts)) == len(texts)


def test_texts_are_short(task: Task) -> None:
    for item in [*demonstrations(task, "train", 300, 1), *pretraining(task, 300, 1)]:
        assert item.prompt.task == task.name
        assert 0 < len(item.completion) <= LONGEST_COMPLETION
        assert len(item.prompt.messages[0].content) <= LONGEST_PROMPT


def test_every_demonstration_is_perfect(task: Task) -> None:
    assert all(score(task, item.prompt, item.completion) == 1 for item in demonstrations(task, "train", 300, 1))


def test_every_grade_is_in_the_glossary(task: Task) -> None:
    for item in [*demonstrations(task, "test", 100, 1), *pretraining(task, 100, 1)]:
        if item.prompt.meta:
            grade = task.grade(item.prompt, said(item.completion))
            assert set(grade) <= set(task.metrics)
            assert all(0 <= value <= 1 for value in grade.values())


def test_chosen_is_perfect_and_rejected_is_not_the_same(task: Task) -> None:
    for pair in pairs(task, "train", 300, 1):
        assert score(task, pair.prompt, pair.chosen) == 1
        assert pair.chosen != pair.rejected
        style_only = pair.prompt.meta["contrast"] == "concise" and task.name == "reasoning"
        assert (score(task, pair.prompt, pair.rejected) < 1) is not style_only


def test_the_corpus_is_competent_but_not_aligned(task: Task) -> None:
    """As written, between a third and two thirds of it would score, so a model of it has much to gain."""
    graded = [item for item in pretraining(task, 2000, 1) if item.prompt.meta]
    perfect = sum(score(task, item.prompt, item.completion) == 1 for item in graded) / len(graded)
    assert 0.3 < perfect < 0.67


def test_too_many_prompts_asked_for_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"'safety' has fewer than 20000 distinct validation prompts"):
        demonstrations(get_task("safety"), "validation", 20_000, 1)
