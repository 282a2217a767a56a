"""Logistic regression over named features and hashed terms: (features, terms) -> probability.

A weight file holds the names of the features it was trained on, so that code and weights cannot drift apart unnoticed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parent / "assets"
NUM_BUCKETS = 4096
"""Hashed terms share this many weights."""


@dataclass(frozen=True)
class Linear:
    """p = sigmoid(bias + sum_f weight_f x_f + hashed weights of the terms). Example: `load("refusal")`."""

    names: tuple[str, ...]
    weights: np.ndarray
    """(len(names),)"""
    hashed: np.ndarray
    """(NUM_BUCKETS,)"""
    bias: float

    def probability(self, features: Mapping[str, float], terms: Iterable[str]) -> float:
        """In (0, 1). Features that are not given count as 0; terms are scaled to unit length together."""
        total = self.bias + sum(
            weight * features.get(name, 0.0) for name, weight in zip(self.names, self.weights.tolist(), strict=True)
        )
        buckets = hashed(terms)
        if buckets:
            total += sum(self.hashed[bucket] for bucket in buckets) / math.sqrt(len(buckets))
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, float(total)))))


def hashed(terms: Iterable[str]) -> list[int]:
    """The buckets of the terms, each once, in order."""
    return sorted({zlib.crc32(term.encode("utf-8", "replace")) % NUM_BUCKETS for term in terms})


@cache
def load(name: str) -> Linear:
    """The weights that ship under that name."""
    with np.load(ASSETS / f"{name}.npz", allow_pickle=False) as stored:
        return Linear(
            names=tuple(stored["names"].tolist()),
            weights=stored["weights"].astype(np.float64),
            hashed=stored["hashed"].astype(np.float64),
            bias=float(stored["bias"]),
        )
