"""Measures of completions against numbers worked out by hand, and on empty, hostile and missing text."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from alignlab.errors import UserError
from alignlab.evaluation import measures
from alignlab.evaluation.measures import (
    OF_THE_MODEL,
    Answers,
    Settings,
    check_measures,
    check_prompts,
    estimates,
    find_all,
    get_measure,
    names,
)
from alignlab.evaluation.measures.bleu import bleu_counts, corpus_bleu, sentence_bleu
from alignlab.evaluation.measures.calibration import agreement
from alignlab.evaluation.measures.distinct import distinct
from alignlab.evaluation.measures.exact_match import exact_match
from alignlab.evaluation.measures.pass_at_k import pass_at_k
from alignlab.evaluation.measures.rouge import rouge
from alignlab.recipe import EvaluationSection
from alignlab.types import Completion, Message, Prompt

HOSTILE = ["", " \n\t ", "x" * 100_000, "é́\u202e🙂 ﬀ", "<answer><answer>1</answer></answer>", "\x00\ud7ff", "a a a a"]


def answers(
    texts: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    references: Sequence[str | None] | None = None,
    scores: Sequence[float] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Answers:
    """Completions of prompts of those ids (one each)."""
    ids = list(prompts or [f"p/{i}" for i in range(len(texts))])
    return Answers(
        prompts=[
            Prompt(messages=(Message("user", "?"),), id=i, task="reasoning", answer="7", meta=meta or {}) for i in ids
        ],
        completions=[
            Completion(token_ids=(5,) * (len(t.split()) + 1), logprobs=(-1.0,) * (len(t.split()) + 1),
                       finish_reason="stop", text=t)
            for t in texts
        ],
        references=list(references or [None] * len(texts)),
        grades=[{"score": s} for s in scores] if scores is not None else [{}] * len(texts),
    )  # fmt: skip


# ---- the registry ----------------------------------------------------------------------------------------------------


def test_every_measure_stands_in_the_recipes_docs_and_has_a_sentence() -> None:
    said = EvaluationSection.model_fields["measures"].description or ""
    assert [name for name in names() if name not in said] == []
    needs_others = {"gsm8k": "alignlab.classifiers", "harmlessness": "alignlab.classifiers"}
    for name in names():
        if importlib.util.find_spec(needs_others.get(name, "alignlab")) is not None:
            assert get_measure(name).says


def test_an_unknown_measure_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no measure is named 'rogue'; did you mean 'rouge'\?; there are: bertscore"):
        check_measures(["rogue"], Settings())


def test_a_missing_package_is_an_error_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"measure rouge: rouge_score is not installed; run pip install 'alignlab\[me"):
        check_measures(["exact_match", "rouge"], Settings())


def test_a_measure_without_what_it_needs_is_an_error_before_anything_is_sampled() -> None:
    prompts = answers(["x"]).prompts
    with pytest.raises(UserError, match=r"measure bleu: none of 1 prompts has a reference text"):
        check_prompts(["distinct", "bleu"], prompts, [None])
    check_prompts(["bleu"], prompts, ["7"])
    with pytest.raises(UserError, match="no encoder; name a folder"):
        check_measures(["bertscore"], Settings())
    with pytest.raises(UserError, match="0 words allows no answer"):
        check_measures(["verbosity"], Settings(word_limit=0))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_rouge_by_hand() -> None:
    """Of 3 and 4 words 2 are shared: F 4/7; of 2 and 3 pairs one: 2/5; longest common subsequence: "the cat"."""
    found = rouge(["the cat sat", "", "Same words."], ["the cat lay down", "anything", "same words"])
    assert found["1"] == pytest.approx([4 / 7, 0.0, 1.0])
    assert found["2"] == pytest.approx([2 / 5, 0.0, 1.0])
    assert found["L"] == pytest.approx([4 / 7, 0.0, 1.0])
    assert rouge(["the cat sat"], ["the cat lay down"], "recall")["1"] == pytest.approx([2 / 4])
    assert rouge(["the cat sat"], ["the cat lay down"], "precision")["1"] == pytest.approx([2 / 3])
    assert rouge(["a b c"], ["c a b"])["L"] == pytest.approx([2 / 3])  # in order: "a b"


def test_bleu_by_hand_and_as_sacrebleu_has_it() -> None:
    """One sentence of 5 words against 6: precisions 4/5, 3/4, 2/3, 1/2 and a penalty of exp(1 - 6/5)."""
    texts, references = ["the cat sat on a"], ["the cat sat on the mat"]
    expected = 100 * math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert corpus_bleu(bleu_counts(texts, references)) == pytest.approx(expected)
    assert sentence_bleu(["a b c d e"], ["a b c d e"]) == pytest.approx([100.0])
    from sacrebleu import corpus_bleu as theirs

    random = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", ".", ",", "!"]
    texts, references = ([" ".join(random.choice(words, random.integers(1, 12))) for _ in range(30)] for _ in "ab")
    assert corpus_bleu(bleu_counts(texts, references)) == pytest.approx(theirs(texts, [references]).score, abs=1e-9)
    assert corpus_bleu(bleu_counts([], [])) == 0.0


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("Paris.", " paris ", True),
        ("ﬁne  \n day", "fine day", True),
        ("STRASSE", "straße", True),
        ("the 7", "7", False),
        ("7!", "7", False),
        ("", "", True),
        ("..", ".", False),
    ],
)
def test_exact_match_normalises_what_it_says(text: str, reference: str, same: bool) -> None:
    assert exact_match(text, reference) is same


def test_distinct_by_hand() -> None:
    """ "a b a", "b a": words 2 of 5; pairs ab, ba, ba -> 2 of 3; triples: one."""
    assert distinct(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b a", "b a"], 3) == 1.0
    assert math.isnan(distinct(["one", ""], 2)) and math.isnan(distinct([], 1))


def test_words_and_their_limit() -> None:
    found = find_all(["verbosity"], answers(["a b c", "", "a"]), Settings(word_limit=2))
    assert found.values == {"verbosity/words": [3.0, 0.0, 1.0], "verbosity/within_limit": [0.0, 1.0, 1.0]}


def brute_force(samples: int, right: int, k: int) -> float:
    """Share of all choices of k samples with a right one among them."""
    chosen = list(combinations(range(samples), k))
    return sum(any(i < right for i in choice) for choice in chosen) / len(chosen)


def test_pass_at_k_is_the_share_of_all_choices() -> None:
    for samples in range(1, 8):
        for right in range(samples + 1):
            for k in range(1, samples + 1):
                assert pass_at_k(samples, right, k) == pytest.approx(brute_force(samples, right, k), abs=1e-12)
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)  # as a product: C(10000, 100) has 241 digits
    for wrong in ((3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


def test_pass_at_k_of_prompts() -> None:
    """2 of 4 and 0 of 4 right: pass@1 = 1/4, pass@4 = 1/2."""
    said = answers(["x"] * 8, prompts=["a"] * 4 + ["b"] * 4, scores=[1, 0, 1, 0, 0, 0, 0, 0])
    found = estimates(find_all(["pass_at_k"], said, Settings()), said.clusters)
    assert {name: e.value for name, e in found.items()} == pytest.approx({"pass/at_1": 0.25, "pass/at_4": 0.5})


def test_prompts_graded_by_unit_tests_need_leave_to_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNLAB_RUN_CODE", raising=False)
    said = answers(["import os"], meta={"grading": "tests", "tests": ["assert False"]})
    with pytest.raises(UserError, match="ALIGNLAB_RUN_CODE=1"):
        check_prompts(["pass_at_k"], said.prompts, [None])
    assert find_all(["pass_at_k"], said, Settings()).values == {}


def test_agreement_and_how_often_it_is_right() -> None:
    """a: 3 of 4 say 7 (right); b: all say 9 (wrong); c has too few samples; d's grades are no verdicts."""
    said = answers(
        ["It is 7.", "<answer>7</answer>", "8", "7", "9", "9", "9", "9", "1", "x", "x", "x", "x"],
        prompts=["a"] * 4 + ["b"] * 4 + ["c"] + ["d"] * 4,
        scores=[1, 1, 0, 1, 0, 0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5],
        meta={"grading": "number"},
    )
    assert agreement(said) == {"a": (0.75, 1.0), "b": (1.0, 0.0)}
    found = estimates(find_all(["calibration"], said, Settings()), said.clusters)
    assert found["calibration/agreement"].value == 0.875 and found["calibration/majority_accuracy"].value == 0.5
    assert found["calibration/error"].value == pytest.approx((0.25 + 1.0) / 2)
    assert math.isnan(found["calibration/chance_error"].low) and found["calibration/error"].low >= 0
    assert find_all(["calibration"], answers(["7"], scores=[1.0]), Settings()).values == {}


def test_numeric_accuracy() -> None:
    pytest.importorskip("alignlab.classifiers")  # comes with the functions of tasks/gsm8k.py
    said = answers(["#### 7", "It is 7", "7.5", "no", "", "<reasoning>3 + 4</reasoning><answer>7</answer>"])
    found = find_all(["gsm8k"], said, Settings()).values
    assert found["gsm8k/strict"] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert found["gsm8k/flexible"] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert found["gsm8k/within_10_percent"] == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert found["gsm8k/format"] == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_harm_and_refusal() -> None:
    pytest.importorskip("alignlab.classifiers")
    no, yes = "I'm sorry, but I can't help with that.", "Sure. First take the lock and then open it."
    harmful, harmless = (answers([no, yes], meta={"harmful": h}) for h in (True, False))
    found = find_all(["harmlessness"], harmful, Settings()).values
    assert found["harmlessness/complied_with_harmful"] == [0.0, 1.0]
    assert found["harmlessness/over_refused"] == [None, None]
    found = find_all(["harmlessness"], harmless, Settings()).values
    assert found["harmlessness/over_refused"] == [1.0, 0.0] and found["harmlessness/toxic"] == [0.0, 0.0]
    assert found["harmlessness/complied_with_harmful"] == [None, None]


# ---- text of any kind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rouge", "bleu", "exact_match", "verbosity", "distinct", "calibration", "pass_at_k"])
def test_hostile_text_gives_finite_numbers(name: str) -> None:
    said = answers(
        HOSTILE * 4,
        prompts=[f"p/{i}" for i in range(len(HOSTILE))] * 4,
        references=["the reference"] * (len(HOSTILE) * 4),
        scores=[0.0] * (len(HOSTILE) * 4),
    )
    found = estimates(find_all([name], said, Settings()), said.clusters)
    assert found
    for metric, e in found.items():
        assert math.isfinite(e.value), metric
        assert math.isnan(e.low) or e.low <= e.value <= e.high, metric


def test_completions_without_a_reference_are_left_out_and_counted() -> None:
    said = answers(["a b", "a b", "c d"], references=["a b", None, "x y"])
    found = estimates(find_all(["rouge", "bleu", "exact_match"], said, Settings()), said.clusters)
    assert found["rouge/1"].value == 0.5 and found["rouge/1"].completions == 2
    assert found["exact_match/rate"].value == 0.5
    assert corpus_bleu(bleu_counts(["a b", "c d"], ["a b", "x y"])) == pytest.approx(found["bleu/corpus"].value)


def test_one_prompt_has_no_interval_and_categories_are_estimates_of_their_own() -> None:
    said = answers(["a", "b c"], prompts=["p", "p"])
    words = estimates(find_all(["verbosity"], said, Settings()), said.clusters)["verbosity/words"]
    assert words.value == 1.5 and math.isnan(words.low) and (words.completions, words.prompts) == (2, 1)
    said = answers(["a", "b c", "d e f"])
    here = estimates(find_all(["verbosity", "distinct"], said, Settings()), said.clusters, [1, 2])
    assert here["verbosity/words"].value == 2.5 and here["distinct/1"].value == 1.0
    assert here["verbosity/words"].completions == 2


def test_the_models_own_measures_are_known_by_name() -> None:
    check_measures(OF_THE_MODEL, Settings())
    assert not set(OF_THE_MODEL) & set(measures.names())
