"""How varied answers are: completions -> different n-grams of words over all n-grams, n = 1, 2, 3 (Li et al. 2016).

It falls with the amount of text, so only evaluations of as many completions of like length can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alignlab.evaluation.measures import Answers, Found, Measure, Settings, Whole
from alignlab.statistics.clustered import IntArray

ORDERS = {"distinct/1": 1, "distinct/2": 2, "distinct/3": 3}


def distinct(texts: Sequence[str], order: int) -> float:
    """Different over all n-grams of all texts together, in (0, 1]; NaN where no text has as many words."""
    return _share(_codes(texts, order))


def _codes(texts: Sequence[str], order: int) -> list[np.ndarray]:
    """The n-grams of each text as numbers; equal ones have the same."""
    numbers: dict[tuple[str, ...], int] = {}
    found = []
    for text in texts:
        words = text.split()
        grams = zip(*(words[i:] for i in range(order)), strict=False)
        found.append(np.array([numbers.setdefault(gram, len(numbers)) for gram in grams], dtype=np.int64))
    return found


def _share(codes: Sequence[np.ndarray]) -> float:
    together = np.concatenate(codes) if codes else np.zeros(0)
    return np.unique(together).size / together.size if together.size else math.nan


def distinct_whole(texts: Sequence[str], order: int) -> Whole:
    """The same as a number of many completions together."""
    codes = _codes(texts, order)

    def share(index: IntArray) -> float:
        return _share([codes[i] for i in index])

    return Whole(statistic=share)


def _find(answers: Answers, settings: Settings) -> Found:
    return Found(whole={metric: distinct_whole(answers.texts, order) for metric, order in ORDERS.items()})


MEASURE = Measure(says="different words, pairs and triples of words over all of them", find=_find)
