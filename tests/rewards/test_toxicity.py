"""Probabilities are those of the classifier, by hand; names that are wrong are said before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignlab.errors import UserError
from alignlab.rewards import _texts
from alignlab.rewards.toxicity import applies, toxic_probabilities, toxicity
from tests.rewards.samples import completion, prompt, tiny_encoder

TEXTS = ("you are so bad", "the cat sat on the mat", "nice")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("softmax"), labels=("fine", "Toxic", "odd"))


def by_hand(folder: str, text: str) -> torch.Tensor:
    """Logits of one text by itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].double()


def test_softmax_over_the_labels(classifier: str) -> None:
    found = toxicity([prompt()] * 3, [completion(text) for text in TEXTS], model=classifier)
    for value, text in zip(found, TEXTS, strict=True):
        logits = by_hand(classifier, text)
        expected = -(logits[1].exp() / logits.exp().sum()).item()
        assert value == pytest.approx(expected, abs=1e-5)
    assert len({round(value or 0, 4) for value in found}) == 3


def test_another_label(classifier: str) -> None:
    logits = by_hand(classifier, TEXTS[0])
    (odd,) = toxic_probabilities(TEXTS[:1], classifier, "ODD")
    assert odd == pytest.approx((logits[2].exp() / logits.exp().sum()).item(), abs=1e-5)


@pytest.mark.parametrize(("labels", "problem"), [(("toxic", "b"), "multi_label_classification"), (("toxic",), None)])
def test_sigmoid_where_labels_do_not_exclude_each_other(labels: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, labels=labels, problem=problem)
    (value,) = toxicity([prompt()], [completion(TEXTS[0])], model=folder)
    assert value == pytest.approx(-1 / (1 + (-by_hand(folder, TEXTS[0])[0]).exp().item()), abs=1e-5)


def test_the_threshold_keeps_what_is_above_it(classifier: str) -> None:
    plain = [p or 0.0 for p in toxicity([prompt()] * 3, [completion(text) for text in TEXTS], model=classifier)]
    limit = -sorted(plain)[1]
    kept = toxicity([prompt()] * 3, [completion(text) for text in TEXTS], model=classifier, threshold=limit)
    assert kept == [p if -p > limit else 0.0 for p in plain] and sum(value != 0 for value in kept) == 1


def test_rows_together_are_as_rows_alone(classifier: str) -> None:
    texts = [" ".join(["cat sat bad"] * n) for n in range(1, 9)] * 5
    together = toxic_probabilities(texts, classifier)
    assert_close(together, [toxic_probabilities([text], classifier)[0] for text in texts], atol=1e-5, rtol=0)


def test_the_worst_window_counts(classifier: str) -> None:
    """A window is 32 tokens here: what stands behind it is read too."""
    parts = [("the cat " * 10).strip(), ("you are bad " * 5).strip()]
    long = "the cat " * 40 + "you are bad " * 5
    reader = _texts.read(classifier, "classifier")
    ids = reader.tokenizer(long, add_special_tokens=False)["input_ids"]
    room, step = 30, 30 - 4  # without two special tokens; windows overlap by an eighth of 32
    highest = 0.0
    for start in range(0, len(ids), step):
        row = [2, *ids[start : start + room], 3]
        with torch.no_grad():
            highest = max(highest, reader.model(input_ids=torch.tensor([row])).logits.softmax(-1)[0, 1].item())
        if start + room >= len(ids):
            break
    (found,) = toxic_probabilities([long], classifier)
    assert found == pytest.approx(highest, abs=1e-5)
    assert found > toxic_probabilities([parts[0]], classifier)[0] - 1 and applies(prompt())


def test_what_cannot_be_used_is_said_at_the_start(classifier: str, tmp_path: Path) -> None:
    for options, message in [
        ({"model": str(tmp_path / "none")}, "no such folder"),
        ({"model": str(tmp_path)}, "has no config.json"),
        ({"model": classifier, "label": "hate"}, "no label 'hate'; name one of its labels with `label`: fine, T"),
        ({"label": "hate"}, "`label` is of a `model`"),
        ({"threshold": 1.0}, "0 <= threshold < 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            toxicity([], [], **options)  # type: ignore[arg-type]


def test_an_encoder_without_a_trained_head_is_no_classifier(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "fine", "1": "toxic"}}))
    with pytest.raises(UserError, match="no trained classifier, as weights are missing: classifier"):
        toxicity([prompt()], [completion("bad")], model=folder)
