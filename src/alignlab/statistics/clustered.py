"""Intervals where values come in clusters (the samples of one prompt); values (N,), clusters (N,) → `Interval`.

Samples of one prompt resemble each other, so counting them as N independent values gives intervals that are too narrow.
Here the clusters are what is drawn: all of a prompt's values come and go together.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from alignlab.statistics.aggregates import FloatArray, finite_array, is_constant, tail_probability
from alignlab.statistics.inference import NO_SPREAD, Interval, score_interval, t_interval
from alignlab.statistics.wins import design_effect, trinomial_interval

IntArray = npt.NDArray[np.intp]
Statistic = Callable[[IntArray], float]
"""Indices of values -> a number of all of them together, such as a corpus BLEU."""

DRAWS = 1000
"""Resamples of a bootstrap."""


def clustered_interval(values: npt.ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """t interval of the mean of all `values` (N,), for new clusters.

        Var(mean) = G / (G - 1) * sum_g (sum_{i in g} (y_i - mean))^2 / N^2,    df = G - 1

    (the cluster-robust variance of Liang & Zeger 1986, corrected for the number of clusters G.) With one value a
    cluster it is `prompt_interval`; with as many values in each, that of the clusters' means.

    Raises:
        ValueError: no values, NaN or infinity, fewer than 2 clusters, or not one cluster a value.
    """
    array, codes, num_clusters = _grouped(values, clusters)
    mean = float(array.mean())
    if is_constant(array):
        return t_interval(float(array[0]), 0.0, num_clusters - 1, confidence, NO_SPREAD)
    return t_interval(mean, _standard_error(array - mean, codes, num_clusters), num_clusters - 1, confidence)


def clustered_standard_error(values: npt.ArrayLike, clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of `values` (N,), in their unit: that of `clustered_interval`."""
    return clustered_interval(values, clusters).standard_error


def paired_interval(
    first: npt.ArrayLike, second: npt.ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> Interval:
    """t interval of the mean of `first` minus `second` (N,), value by value on the same prompt with the same dice.

    Errors of `clustered_interval`, and ValueError where the two have different shapes.
    """
    one, other = (finite_array(x, name=name, ndim=1) for x, name in ((first, "first"), (second, "second")))
    if one.shape != other.shape:
        raise ValueError(f"{one.size} values are paired with {other.size}; give the same prompts and samples of both")
    return clustered_interval(one - other, clusters, confidence)


def clustered_proportion(values: npt.ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """Score interval of the share of ones among `values` (N,), each 0 or 1: never of width 0, within [0, 1].

    Wilson's with the number of independent values that would vary as much, p (1 - p) / Var(p), at most N, and Student's
    quantile of G - 1 degrees of freedom, as that variance is estimated from G clusters. With one value a cluster
    nothing is estimated, and it is plain Wilson. Where all values are equal nothing shows how clusters vary, and their
    number counts.

    Raises:
        ValueError: as `clustered_interval`, or a value that is neither 0 nor 1.
    """
    array, codes, num_clusters = _grouped(values, clusters)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError("a proportion is of values that are 0 or 1; take clustered_interval")
    rate = float(array.mean())
    effective = float(num_clusters)
    if 0.0 < rate < 1.0:
        # Without the factor G / (G - 1), so that N single values count as N.
        variance = _standard_error(array - rate, codes, num_clusters) ** 2 * (num_clusters - 1) / num_clusters
        effective = float(array.size) if variance == 0.0 else rate * (1.0 - rate) / variance
        effective = min(max(effective, 1.0), float(array.size))
    estimated = num_clusters < array.size
    normal, student = stats.norm, stats.t(num_clusters - 1)
    quantile = float((student if estimated else normal).isf(tail_probability(confidence)))
    low, high = score_interval(rate, effective, quantile)
    return Interval(
        mean=rate,
        low=low,
        high=high,
        standard_error=math.sqrt(rate * (1.0 - rate) / effective),
        df=float(num_clusters - 1),
        confidence=confidence,
    )


def paired_proportion(
    first: npt.ArrayLike, second: npt.ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> Interval:
    """Score interval of the share of ones in `first` minus that in `second` (N,), paired: never of width 0, in [-1, 1].

    Tango's (1998): with w the rate at which `first` wins, ties counting a half, the difference is 2 w - 1, and the
    limits are those of `trinomial_interval`. Several values of a cluster are inflated by their `design_effect` and,
    as that is estimated from G clusters, by (t / z)^2: Student's quantile of G - 1 degrees of freedom for the normal's.

    Raises:
        ValueError: as `clustered_interval`, other shapes, or a value that is neither 0 nor 1.
    """
    one, other = (finite_array(x, name=name, ndim=1) for x, name in ((first, "first"), (second, "second")))
    if one.shape != other.shape or not np.isin([one, other], (0.0, 1.0)).all():
        raise ValueError(f"{one.size} values are paired with {other.size}; give as many of both, each 0 or 1")
    outcomes, codes, num_clusters = _grouped((one - other + 1.0) / 2.0, clusters)
    effect = design_effect(outcomes, codes)
    if num_clusters < outcomes.size:
        tail = tail_probability(confidence)
        effect *= (float(stats.t.isf(tail, num_clusters - 1)) / float(stats.norm.isf(tail))) ** 2
    wins, ties, losses = (int((outcomes == value).sum()) for value in (1.0, 0.5, 0.0))
    low, high = trinomial_interval(wins, ties, losses, confidence, effect)
    return Interval(
        mean=(wins - losses) / outcomes.size,
        low=2.0 * low - 1.0,
        high=2.0 * high - 1.0,
        standard_error=_standard_error(2.0 * (outcomes - outcomes.mean()), codes, num_clusters),
        df=float(num_clusters - 1),
        confidence=confidence,
    )


def ratio_interval(
    numerators: npt.ArrayLike, denominators: npt.ArrayLike, clusters: Sequence[Hashable], confidence: float = 0.95
) -> Interval:
    """t interval of sum(numerators) / sum(denominators), both (N,), linearised: nats a token, say.

    Var(R) = G / (G - 1) * sum_g (sum_{i in g} (a_i - R b_i))^2 / (sum b)^2; with all denominators 1 it is
    `clustered_interval`.

    Raises:
        ValueError: as `clustered_interval`, other shapes, or denominators that do not sum to something positive.
    """
    above, codes, num_clusters = _grouped(numerators, clusters)
    below = finite_array(denominators, name="denominators", ndim=1)
    if below.shape != above.shape or not below.sum() > 0:
        raise ValueError(
            f"{above.size} numerators need as many denominators, of a positive sum; there are {below.size}"
        )
    ratio = float(above.sum() / below.sum())
    residuals = (above - ratio * below) * above.size / float(below.sum())
    return t_interval(ratio, _standard_error(residuals, codes, num_clusters), num_clusters - 1, confidence)


def jackknife_interval(statistic: Statistic, clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """t interval of a statistic of all values, from leaving out one cluster at a time.

        Var = (G - 1) / G * sum_g (statistic without g - their mean)^2

    For smooth statistics of a whole set (corpus BLEU, distinct-n, a standard deviation), not for medians. For a mean of
    clusters of one size it is `clustered_interval`.

    Raises:
        ValueError: fewer than 2 clusters, or a statistic that is not finite.
    """
    codes, num_clusters = _codes(clusters)
    everything = np.arange(codes.size)
    without = finite_array(
        [statistic(everything[codes != g]) for g in range(num_clusters)], name="statistic without a cluster", ndim=1
    )
    variance = (num_clusters - 1) / num_clusters * float(((without - without.mean()) ** 2).sum())
    note = NO_SPREAD if is_constant(without) else ""
    value = float(finite_array([statistic(everything)], name="statistic", ndim=1)[0])
    return t_interval(value, 0.0 if note else math.sqrt(variance), num_clusters - 1, confidence, note)


def bootstrap_interval(
    statistic: Statistic,
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of all values, from resampling whole clusters (Efron 1979); for medians.

    Not for statistics that see repeats, such as distinct-n: a resample holds clusters twice. `standard_error` is the
    standard deviation over resamples, which are the same every time.

    Raises:
        ValueError: fewer than 2 clusters, or a statistic that is not finite.
    """
    codes, num_clusters = _codes(clusters)
    members = [np.flatnonzero(codes == g) for g in range(num_clusters)]
    random = np.random.Generator(np.random.Philox(seed))
    drawn = random.integers(num_clusters, size=(draws, num_clusters))
    found = finite_array(
        [statistic(np.concatenate([members[g] for g in row])) for row in drawn], name="statistic", ndim=1
    )
    tail = tail_probability(confidence)
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return Interval(
        mean=float(statistic(np.arange(codes.size))),
        low=float(low),
        high=float(high),
        standard_error=float(found.std(ddof=1)),
        df=float(num_clusters - 1),
        confidence=confidence,
        note=NO_SPREAD if low == high else "",
    )


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """t interval of the plain mean of independent estimates, such as that over tasks; df by Satterthwaite (1946).

    Raises:
        ValueError: none, or of different confidences.
    """
    if not parts or len({part.confidence for part in parts}) > 1:
        raise ValueError(f"{len(parts)} estimates: give one or more, all of one confidence")
    variances = [part.standard_error**2 for part in parts]
    each = sum(v**2 / part.df for v, part in zip(variances, parts, strict=True))
    df = sum(variances) ** 2 / each if each > 0 else min(part.df for part in parts)
    mean = sum(part.mean for part in parts) / len(parts)
    note = NO_SPREAD if not any(variances) else ""
    return t_interval(mean, math.sqrt(sum(variances)) / len(parts), df, parts[0].confidence, note)


def mean_of_bounds(parts: Sequence[Interval]) -> Interval:
    """Interval of the plain mean of independent estimates from their own bounds, which need not be symmetric.

    Each end lies from the mean by sqrt(sum of squared distances of the parts' ends) / parts (Newcombe 1998; Zou &
    Donner 2008): within what the parts can be, and of width 0 only where all of theirs are.

    Raises:
        ValueError: none, or of different confidences.
    """
    overall = mean_interval(parts)
    below = math.hypot(*(part.mean - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.mean for part in parts)) / len(parts)
    note = "" if below or above else NO_SPREAD
    return replace(overall, low=overall.mean - below, high=overall.mean + above, note=note)


def _grouped(values: npt.ArrayLike, clusters: Sequence[Hashable]) -> tuple[FloatArray, IntArray, int]:
    array = finite_array(values, name="values", ndim=1)
    if len(clusters) != array.size:
        raise ValueError(f"{array.size} values, but {len(clusters)} clusters; each value has the cluster it is from")
    return array, *_codes(clusters)


def _codes(clusters: Sequence[Hashable]) -> tuple[IntArray, int]:
    """(N,) numbers 0 .. G - 1 in order of appearance, and G."""
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)
    if len(numbers) < 2:
        raise ValueError(f"values come from {len(numbers)} cluster, but an interval over clusters needs at least 2")
    return codes, len(numbers)


def _standard_error(residuals: FloatArray, codes: IntArray, num_clusters: int) -> float:
    """Of a mean whose residuals (N,) are given."""
    sums = np.bincount(codes, weights=residuals, minlength=num_clusters)
    return math.sqrt(num_clusters / (num_clusters - 1) * float((sums**2).sum())) / residuals.size
