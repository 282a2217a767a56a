"""Tokens that mean the same as the reference's (BERTScore, arXiv 1904.09675): completion, reference -> P, R, F1.

Each token's vector is compared with all of the other text, and its best cosine counts:

    precision = mean over the completion's tokens of max over the reference's tokens of cos
    recall    = the same with the two exchanged;  F1 = 2 P R / (P + R)

Without weights of rarity and without rescaling, as the bert-score package does by default; that package itself fails on
an empty completion with transformers 5, so the few lines are here. Numbers of different encoders do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.errors import UserError
from alignlab.evaluation.measures import Answers, Found, Measure, Settings
from alignlab.evaluation.measures._references import on_references
from alignlab.rewards._texts import Reader, find, read

ROWS = 64
"""Texts in one forward pass."""


class BertScore(NamedTuple):
    """Of one completion; all within [-1, 1], in practice well above 0."""

    precision: float
    recall: float
    f1: float


def bertscore(
    texts: Sequence[str], references: Sequence[str], encoder: str, layer: int | None = None
) -> list[BertScore]:
    """One score a text; (0, 0, 0) where the text or its reference is empty.

    Args:
        encoder: folder or hub id of an encoder (a `transformers` model with its tokenizer), or `minilm`.
        layer: which hidden layer's vectors; 1 is the first, None the last.

    Raises:
        UserError: the encoder cannot be loaded, or has no such layer.
    """
    vectors = dict(_embed(sorted({*texts, *references}), encoder, layer))
    return [_match(vectors[text], vectors[reference]) for text, reference in zip(texts, references, strict=True)]


class Vectors(NamedTuple):
    """A text's tokens as unit vectors."""

    all: Tensor  # (N, H) with the tokens at start and end of the text, which may be what another token matches
    own: Tensor  # (N,) bool, without them: what the means are over


def _match(text: Vectors, reference: Vectors) -> BertScore:
    if not text.own.any() or not reference.own.any():
        return BertScore(0.0, 0.0, 0.0)
    cosines = text.all @ reference.all.T
    precision = cosines.max(1).values[text.own].mean().item()
    recall = cosines.max(0).values[reference.own].mean().item()
    total = precision + recall
    return BertScore(precision, recall, 2 * precision * recall / total if total else 0.0)


@torch.no_grad()
def _embed(texts: Sequence[str], encoder: str, layer: int | None) -> list[tuple[str, Vectors]]:
    reader = load_encoder(encoder)
    tokenizer, model, longest = reader.tokenizer, reader.model, reader.window
    found: list[tuple[str, Vectors]] = []
    by_length = sorted(texts, key=len)
    for start in range(0, len(by_length), ROWS):
        here = by_length[start : start + ROWS]
        batch = tokenizer(
            [text.strip() for text in here], padding=True, truncation=True, max_length=longest,
            return_tensors="pt", return_special_tokens_mask=True,
        )  # fmt: skip
        special = batch.pop("special_tokens_mask").bool()
        layers = model(**batch, output_hidden_states=True).hidden_states
        if layer is not None and not 1 <= layer < len(layers):
            raise UserError(f"measure bertscore: encoder {encoder!r} has layers 1 to {len(layers) - 1}, not {layer}")
        states = torch.nn.functional.normalize(layers[-1 if layer is None else layer].double(), dim=-1)
        for i, text in enumerate(here):
            attended = batch["attention_mask"][i].bool()
            found.append((text, Vectors(states[i, attended], ~special[i, attended])))
    return found


def load_encoder(name: str) -> Reader:
    """Tokenizer and model, from a folder or the hub, or `minilm`, as rewards have it; on the CPU.

    Raises:
        UserError: there is none, or it is no encoder that can be used.
    """
    try:
        return read(find(name), "encoder", "cpu")
    except UserError as error:
        raise UserError(f"measure bertscore: encoder: {error}") from error


def _check(settings: Settings) -> None:
    if not settings.encoder:
        raise UserError(
            "measure bertscore: no encoder; name a folder, a hub id or minilm (--encoder, evaluation.encoder)"
        )
    load_encoder(settings.encoder)


def _find(answers: Answers, settings: Settings) -> Found:
    def measured(texts: list[str], references: list[str]) -> dict[str, list[float]]:
        scored = bertscore(texts, references, settings.encoder, settings.layer)
        return {
            "bertscore/precision": [s.precision for s in scored],
            "bertscore/recall": [s.recall for s in scored],
            "bertscore/f1": [s.f1 for s in scored],
        }

    return Found(values=on_references(answers, measured))


MEASURE = Measure(
    says="similarity of each token's vector to its best match in the reference: precision, recall, F1",
    find=_find,
    applies=lambda prompt, reference: bool(reference),
    needs="a reference text (column `answer`, or the demonstration's `completion`)",
    check=_check,
)
