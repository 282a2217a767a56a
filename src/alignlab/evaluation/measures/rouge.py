"""Shared words with a reference (ROUGE, Lin 2004): completion, reference -> ROUGE-1, -2 and -L, by rouge-score.

Lower-cased words without stemming; F1 in [0, 1] is what evaluations report.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.evaluation.measures import Answers, Found, Measure, Settings
from alignlab.evaluation.measures._references import on_references

KINDS = {"1": "rouge1", "2": "rouge2", "L": "rougeL"}
METRICS = {"rouge/1": "1", "rouge/2": "2", "rouge/L": "L"}
PARTS = {"precision": "precision", "recall": "recall", "f1": "fmeasure"}


def rouge(texts: Sequence[str], references: Sequence[str], part: str = "f1") -> dict[str, list[float]]:
    """`{"1": [..], "2": [..], "L": [..]}`, one number in [0, 1] a text; an empty text scores 0.

    Args:
        part: `f1`, `precision` (of the text's words) or `recall` (of the reference's).
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS.values()), use_stemmer=False)
    scored = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: [float(getattr(s[name], PARTS[part])) for s in scored] for kind, name in KINDS.items()}


def _find(answers: Answers, settings: Settings) -> Found:
    def measured(texts: list[str], references: list[str]) -> dict[str, list[float]]:
        found = rouge(texts, references)
        return {metric: found[kind] for metric, kind in METRICS.items()}

    return Found(values=on_references(answers, measured))


MEASURE = Measure(
    says="words, word pairs and the longest common subsequence shared with the reference, F1",
    find=_find,
    applies=lambda prompt, reference: bool(reference),
    needs="a reference text (column `answer`, or the demonstration's `completion`)",
    package="rouge_score",
)
