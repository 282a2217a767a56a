"""Shared word sequences with a reference (BLEU, Papineni 2002): completions, references -> 0 to 100, by sacrebleu.

`bleu/corpus` is the one people report: counts of all completions together, then one brevity penalty. `bleu/sentence` is
the mean of sentence scores (effective order), another number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignlab.evaluation.measures import Answers, Found, Measure, Settings, Whole
from alignlab.evaluation.measures._references import on_references
from alignlab.statistics.clustered import IntArray


def sentence_bleu(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """0 to 100, one a text: 13a words, exponential smoothing, effective order."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    return [metric.sentence_score(t, [r]).score for t, r in zip(texts, references, strict=True)]


def bleu_counts(texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(N, 10) of each text: matching n-grams of orders 1 to 4, its n-grams of these orders, its length, the other's."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    scored = [metric.sentence_score(t, [r]) for t, r in zip(texts, references, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scored], dtype=np.int64).reshape(-1, 10)


def corpus_bleu(counts: np.ndarray) -> float:
    """0 to 100, of the texts whose `bleu_counts` (N, 10) are given: sacrebleu's corpus score with its defaults."""
    from sacrebleu.metrics.bleu import BLEU

    total = counts.sum(0).tolist()
    return float(BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score)


def _find(answers: Answers, settings: Settings) -> Found:
    counts = np.zeros((len(answers), 10), dtype=np.int64)  # without a reference: nothing to add
    pairs = zip(answers.texts, answers.references, strict=True)
    here = [(i, t, r) for i, (t, r) in enumerate(pairs) if r]
    counts[[i for i, _, _ in here]] = bleu_counts([t for _, t, _ in here], [r for _, _, r in here])

    def corpus(index: IntArray) -> float:
        return corpus_bleu(counts[index])

    sentences = on_references(answers, lambda t, r: {"bleu/sentence": sentence_bleu(t, r)})
    has_reference = [bool(reference) for reference in answers.references]
    return Found(values=sentences, whole={"bleu/corpus": Whole(statistic=corpus, applies=has_reference)})


MEASURE = Measure(
    says="word sequences shared with the reference, with a penalty for brevity, 0 to 100",
    find=_find,
    applies=lambda prompt, reference: bool(reference),
    needs="a reference text (column `answer`, or the demonstration's `completion`)",
    package="sacrebleu",
)
