"""What two splits share, and what comes twice: texts -> exact, n-gram and near duplicates."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NGRAMS = (8, 13)
"""Words of the n-grams that are compared; 13 is GPT-3's rule of contamination (arXiv 2005.14165), 8 a stricter one."""
COMMON_SHARE, COMMON_ROWS = 0.05, 20
"""An n-gram in more of the train rows than this (share, and rows at the least) is the set's own phrasing, as in
"Summarise the visit for the section", and says nothing."""
NEAR = 0.8
"""Jaccard similarity of their word triples from which two texts are near duplicates."""
SHINGLE = 3
FAMILY = 4
"""Members of a bucket that each later one is compared with."""
BANDS, ROWS = 8, 4
"""MinHash bands and rows: texts of similarity s are compared with probability 1 - (1 - s^4)^8, 98 % at 0.8."""
_PRIME = np.uint64((1 << 61) - 1)
_WORD = re.compile(r"\w+")


def normalise(text: str) -> str:
    """Lower case, compatible characters made one (NFKC), single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How many rows of a held-out split share an n-gram with train."""

    n: int
    """Words."""
    rows: int
    """Held-out rows with at least one n-gram that a train row has too."""
    of: int
    """Held-out rows."""
    common: int
    """Distinct n-grams left out as the set's own phrasing."""
    examples: tuple[int, ...] = ()
    """The first such held-out rows, counted from 0."""


def shared_ngrams(train: Sequence[Sequence[str]], held_out: Sequence[Sequence[str]], n: int) -> Shared:
    """Held-out texts that share an n-gram with any train text, each text as its `words`.

    Memory grows with the held-out texts alone.
    """
    ours = [set(_ngrams(said, n)) for said in held_out]
    wanted = set().union(*ours)
    times: Counter[tuple[str, ...]] = Counter()
    for said in train:
        times.update(wanted.intersection(_ngrams(said, n)))
    most = max(COMMON_ROWS, COMMON_SHARE * len(train))
    common = {gram for gram, count in times.items() if count > most}
    telling = times.keys() - common
    rows = [i for i, grams in enumerate(ours) if not grams.isdisjoint(telling)]
    return Shared(n=n, rows=len(rows), of=len(held_out), common=len(common), examples=tuple(rows[:3]))


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs i < j of texts whose word triples have a Jaccard similarity of at least NEAR; equal texts are among them.

    Candidates are found by MinHash, so 2 in 100 pairs just at the limit are missed, and none is wrongly reported. Of
    many copies of one text not all pairs are named, but every copy is in one.
    """
    shingles = [_shingles(text) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for i, grams in enumerate(shingles):
        signature = _minhash(grams)
        for band in range(BANDS):
            buckets.setdefault((band, signature[band * ROWS : (band + 1) * ROWS].tobytes()), []).append(i)
    found: set[tuple[int, int]] = set()
    for members in buckets.values():
        for place, other in enumerate(members[1:], 1):
            for first in members[: min(place, FAMILY)]:  # of n copies not all n squared pairs
                pair = (first, other)
                if pair not in found and _jaccard(shingles[first], shingles[other]) >= NEAR:
                    found.add(pair)
    return sorted(found)


def _ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _shingles(text: str) -> set[int]:
    """Checksums of a text's word triples, the same in every process; of a shorter text, of all of it."""
    grams = {" ".join(gram) for gram in _ngrams(words(text), SHINGLE)} or {normalise(text)}
    return {zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams}


def _minhash(grams: set[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 1 << 29, BANDS * ROWS, dtype=np.uint64)[:, None]  # products stay below 2^61
    offsets = rng.integers(0, 1 << 60, BANDS * ROWS, dtype=np.uint64)[:, None]
    values = np.fromiter(grams, dtype=np.uint64)[None]
    least: np.ndarray[tuple[int], np.dtype[np.uint64]] = ((factors * values + offsets) % _PRIME).min(1)
    return least


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
