"""Whether raters agree beyond chance; labels (n,), ratings (raters, units), discordant counts → κ, α, p.

    κ = (p_o - p_e) / (1 - p_e)        p_o observed agreement, p_e that of two independent raters with these habits
    α = 1 - D_o / D_e                  D_o observed disagreement, D_e that of all values put together at random

Sources: Cohen 1960 (κ), Krippendorff 2011 "Computing Krippendorff's Alpha-Reliability" (α), McNemar 1947. Where all
labels are one and the same there is no chance to agree beyond: κ and α are then NaN, never 0 or 1.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats

from alignlab.statistics.aggregates import FloatArray, tail_probability
from alignlab.statistics.inference import wilson_interval

Level = Literal["nominal", "ordinal", "interval"]
IntArray = npt.NDArray[np.int64]


def cohens_kappa(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Cohen's κ of the labels `a` (n,) and `b` (n,) that two raters gave the same items; NaN where it is undefined.

    Raises:
        ValueError: no items, or not as many labels of one rater as of the other.
    """
    first, second, size = _two_raters(a, b)
    return _kappa(_table(first, second, size))


def kappa_interval(
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `cohens_kappa`, over new items, or over new `clusters` (n,) of them (prompts).

    Where the raters never differ the bootstrap would have width 0. The lower limit is then κ at the lower Wilson limit
    of the agreement. Resamples in which κ is undefined are left out; NaN where more than half of them are.
    """
    first, second, size = _two_raters(a, b)
    group = _groups(clusters, len(first))
    if (first == second).all():
        chance = 1.0 - _chance_agreement(_table(first, second, size))
        return _floor(int(group.max()) + 1, chance, confidence), math.nan if chance == 0 else 1.0
    cells = first * size + second

    def one(weights: FloatArray) -> float:
        table = np.bincount(cells, weights[group], minlength=size * size).astype(np.float64)
        return _kappa(table.reshape(size, size))

    return _bootstrap(one, int(group.max()) + 1, confidence, resamples, seed)


def krippendorff_alpha(ratings: Sequence[Sequence[Any]], level: Level = "nominal") -> float:
    """Krippendorff's α of `ratings`: one row a rater, one column a unit, None or NaN where a rating is missing.

    Units with fewer than two ratings say nothing about agreement and are left out. `level` is how different two values
    are: nominal 0 or 1; interval (c - k)^2; ordinal ((values ranked from c to k) - (n_c + n_k) / 2)^2.

    Raises:
        ValueError: rows of different lengths, no unit with two ratings, or labels that are no numbers where they must
            be.
    """
    counts, values = _counts(ratings, level)
    return _alpha(counts, np.ones(len(counts)), values, level)


def alpha_interval(
    ratings: Sequence[Sequence[Any]],
    level: Level = "nominal",
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `krippendorff_alpha`, over new units.

    Where raters never differ its lower limit is α at the upper Wilson limit of the share of units in which they might.
    """
    counts, values = _counts(ratings, level)
    units = len(counts)
    if (counts.max(1) == counts.sum(1)).all():
        totals = counts.sum(0)
        chance = 1.0 - float((totals * (totals - 1)).sum()) / float(totals.sum() * (totals.sum() - 1))
        return _floor(units, chance, confidence), math.nan if chance == 0 else 1.0
    return _bootstrap(lambda weights: _alpha(counts, weights, values, level), units, confidence, resamples, seed)


def discordant(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[int, int]:
    """(only `a` right, only `b` right) of the paired outcomes `a` (n,) and `b` (n,), each 0 or 1.

    Raises:
        ValueError: other shapes, or an outcome that is neither 0 nor 1.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"paired outcomes are two vectors of one length, not of shapes {first.shape}, {second.shape}")
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("paired outcomes are 0 or 1 (False or True)")
    return int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())


def mcnemar_exact(b: npt.ArrayLike, c: npt.ArrayLike) -> float:
    """Exact two-sided p of McNemar's test from the counts `b` and `c` of the two kinds of discordant pairs.

    p = min(1, 2 P(X <= min(b, c))) with X ~ Binomial(b + c, 1/2); 1 where nothing is discordant. Of two systems on the
    same items: b items that only the first got right, c only the second. Of wins and losses it is the sign test. Two
    vectors are taken as paired outcomes (0 or 1), and counted by `discordant`.

    Raises:
        ValueError: counts that are negative or no whole numbers, or what `discordant` refuses.
    """
    if np.ndim(b) or np.ndim(c):
        return mcnemar_exact(*discordant(b, c))
    counts = [float(np.asarray(count, dtype=np.float64)) for count in (b, c)]
    if not all(count >= 0 and count == int(count) for count in counts if math.isfinite(count)) or not all(
        map(math.isfinite, counts)
    ):
        raise ValueError(f"discordant counts are whole numbers from 0 on, not {counts[0]:g} and {counts[1]:g}")
    total = int(sum(counts))
    if total == 0:
        return 1.0
    return min(1.0, 2.0 * float(stats.binom.cdf(int(min(counts)), total, 0.5)))


# ---- kappa -----------------------------------------------------------------------------------------------------------


def _two_raters(a: Sequence[Any], b: Sequence[Any]) -> tuple[IntArray, IntArray, int]:
    """The labels of both as codes, and how many different ones there are."""
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"{len(a)} labels of one rater and {len(b)} of the other: the same items are needed, some")
    code: dict[Any, int] = {}
    first, second = ([code.setdefault(_plain(label), len(code)) for label in labels] for labels in (a, b))
    return np.array(first), np.array(second), len(code)


def _table(first: IntArray, second: IntArray, size: int) -> FloatArray:
    return np.bincount(first * size + second, minlength=size * size).reshape(size, size).astype(np.float64)


def _chance_agreement(table: FloatArray) -> float:
    return float(table.sum(0) @ table.sum(1)) / float(table.sum()) ** 2


def _kappa(table: FloatArray) -> float:
    observed, chance = float(np.trace(table)) / float(table.sum()), _chance_agreement(table)
    return math.nan if chance == 1.0 else (observed - chance) / (1.0 - chance)


# ---- alpha -----------------------------------------------------------------------------------------------------------


def _counts(ratings: Sequence[Sequence[Any]], level: Level) -> tuple[FloatArray, FloatArray]:
    """(U, K) how often each of K values was given to each unit with at least two ratings, and the values (K,).

    The values are numbers in rising order, but for nominal labels only their positions.
    """
    if level not in get_args(Level):
        raise ValueError(f"level is {level!r}; there are {', '.join(get_args(Level))}")
    rows = [[_plain(label) for label in row] for row in ratings]
    if len({len(row) for row in rows}) != 1:
        raise ValueError("ratings are rows of one length: one row a rater, one column a unit, None where it is missing")
    units = [[label for label in unit if label is not None] for unit in zip(*rows, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        raise ValueError("no unit has two ratings, so there is nothing to agree on")
    known = list(dict.fromkeys(label for unit in units for label in unit))
    if level != "nominal":
        if bad := [label for label in known if not isinstance(label, int | float)]:
            raise ValueError(f"the level {level} needs numbers, but a rating is {bad[0]!r}")
        known.sort()
    code = {label: i for i, label in enumerate(known)}
    counts = np.zeros((len(units), len(known)))
    for row, unit in zip(counts, units, strict=True):
        np.add.at(row, [code[label] for label in unit], 1)
    values = np.arange(len(known)) if level == "nominal" else np.array(known)
    return counts, values.astype(np.float64)


def _alpha(counts: FloatArray, weights: FloatArray, values: FloatArray, level: Level) -> float:
    """α of the units in `counts` (U, K), each taken `weights` (U,) times."""
    raters = counts.sum(1)
    pairs = counts * (weights / (raters - 1))[:, None]
    coincidences = pairs.T @ counts - np.diag(pairs.sum(0))  # (K, K)
    totals = coincidences.sum(1)
    distance = _distance(totals, values, level)
    observed = float((coincidences * distance).sum())
    expected = float(totals @ distance @ totals) / (float(totals.sum()) - 1.0)
    return math.nan if expected == 0.0 else 1.0 - observed / expected


def _distance(totals: FloatArray, values: FloatArray, level: Level) -> FloatArray:
    """(K, K) squared differences between values."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    # How many values lie below the middle of each value's own ones: differences of these are the ordinal ones.
    place = values if level == "interval" else totals.cumsum() - totals / 2
    return np.subtract.outer(place, place) ** 2


# ---- intervals -------------------------------------------------------------------------------------------------------


def _plain(label: Any) -> Any:
    """A label that equals itself: numpy scalars as Python's, NaN as None."""
    label = label.item() if isinstance(label, np.generic) else label
    return None if isinstance(label, float) and math.isnan(label) else label


def _groups(clusters: Sequence[Hashable] | None, size: int) -> IntArray:
    """(n,) the number of each item's cluster, from 0."""
    if clusters is None:
        return np.arange(size)
    if len(clusters) != size:
        raise ValueError(f"{len(clusters)} clusters for {size} items: one each is needed")
    code: dict[Hashable, int] = {}
    return np.array([code.setdefault(cluster, len(code)) for cluster in clusters])


def _floor(units: int, chance: float, confidence: float) -> float:
    """The lower limit where no disagreement was seen; `chance` is the disagreement that chance would make."""
    if chance == 0.0:
        return math.nan
    return 1.0 - (1.0 - wilson_interval(units, units, confidence)[0]) / chance


def _bootstrap(
    statistic: Callable[[FloatArray], float], groups: int, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile limits of a statistic of how often each group is taken."""
    tail = tail_probability(confidence)
    random = np.random.Generator(np.random.Philox(seed))
    draws = (np.bincount(random.integers(groups, size=groups), minlength=groups) for _ in range(resamples))
    found = np.array([statistic(draw.astype(np.float64)) for draw in draws])
    defined = found[~np.isnan(found)]
    if 2 * len(defined) <= resamples:
        return math.nan, math.nan
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return float(low), float(high)
