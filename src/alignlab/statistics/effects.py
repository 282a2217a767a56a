"""Standardised differences between two arms, and how little few runs know about them; runs (n1,), (n2,) → `Effect`.

    d = (mean(a) - mean(b)) / s_pooled        g = J d,   J = 1 - 3 / (4 df - 1),   df = n1 + n2 - 2

Positive means that `a` scored higher. With 3 runs an arm |d| > 0.8 turns up in 38 % of comparisons of an arm with
itself, so a d is read together with its interval or not at all. Sources: Cohen 1988 (d), Hedges 1981 (J),
Steiger & Fouladi 1997 (the interval).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from alignlab.statistics.aggregates import RELATIVE_ROUNDING, FloatArray, finite_array, tail_probability


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The difference between two arms in units of their run-to-run spread; all four numbers or none of them."""

    d: float | None
    """Cohen's d."""
    g: float | None
    """Hedges' g: d without its small-sample bias."""
    low: float | None
    """Lower confidence limit of the population d."""
    high: float | None
    """Upper confidence limit of the population d."""
    n1: int
    """Runs of the first arm."""
    n2: int
    """Runs of the second arm."""
    note: str = ""
    """Why the numbers are None, in words; empty where they exist."""


def effect(a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95) -> Effect:
    """d, g and the interval of d for the runs `a` (n1,) against `b` (n2,), or the reason why there are none.

    Raises:
        ValueError: `a` or `b` is empty, not a vector, or holds NaN or infinity.
    """
    first, second = _arms(a, b)
    note = _undefined(first, second)
    if note:
        return Effect(d=None, g=None, low=None, high=None, n1=first.size, n2=second.size, note=note)
    low, high = effect_interval(first, second, confidence)
    return Effect(
        d=cohens_d(first, second), g=hedges_g(first, second), low=low, high=high, n1=first.size, n2=second.size
    )


def cohens_d(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """(mean(a) - mean(b)) / s_pooled of the runs `a` (n1,) and `b` (n2,), both variances with ddof 1.

    Raises:
        ValueError: an arm has fewer than 2 runs, no arm varies at all (never an infinite d), or a value is not finite.
    """
    first, second = _arms(a, b)
    if note := _undefined(first, second):
        raise ValueError(f"Cohen's d is undefined: {note}; use effect(), which reports this instead of raising")
    return float(first.mean() - second.mean()) / _pooled_sd(first, second)


def hedges_g(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """J d: `cohens_d` (same errors) shrunk by J = 1 - 3 / (4 df - 1), which is 0.80 at 3 + 3 runs, 0.96 at 10 + 10."""
    d = cohens_d(a, b)
    df = np.size(a) + np.size(b) - 2
    return (1.0 - 3.0 / (4.0 * df - 1.0)) * d


def effect_interval(a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence limits of the population d, exact for normal runs with one variance; same errors as `cohens_d`.

    t = d sqrt(n1 n2 / (n1 + n2)) is noncentral t with df = n1 + n2 - 2; the limits are the two noncentralities under
    which a t at least this large has probability (1 - confidence) / 2 and (1 + confidence) / 2, on the scale of d.
    """
    d = cohens_d(a, b)
    n1, n2 = np.size(a), np.size(b)
    scale = math.sqrt(n1 * n2 / (n1 + n2))
    tail = tail_probability(confidence)
    low, high = (_noncentrality(d * scale, n1 + n2 - 2, probability) for probability in (tail, 1.0 - tail))
    return low / scale, high / scale


def _noncentrality(t: float, df: int, probability: float) -> float:
    """The noncentrality under which a noncentral t exceeds `t` with this probability (0 to 1, rising with it)."""

    def excess(noncentrality: float) -> float:
        upper_tail = float(stats.nct.sf(t, df, noncentrality))
        # Hazard: far out scipy's nct can answer NaN (its cdf does for (-2.1, 18, 8.8)); the tail is 0 or 1 there.
        if math.isnan(upper_tail):
            upper_tail = float(noncentrality > t)
        return upper_tail - probability

    reach = 1.0
    while excess(t - reach) > 0.0 or excess(t + reach) < 0.0:
        reach *= 2.0
    return float(optimize.brentq(excess, t - reach, t + reach))


def _arms(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    return finite_array(a, name="first arm", ndim=1), finite_array(b, name="second arm", ndim=1)


def _undefined(first: FloatArray, second: FloatArray) -> str:
    """Why a standardised difference does not exist, in words; empty where it does."""
    if min(first.size, second.size) < 2:
        return f"at least 2 runs in each arm are needed, here are {first.size} and {second.size}"
    largest = max(np.abs(first).max(), np.abs(second).max())
    if _pooled_sd(first, second) <= RELATIVE_ROUNDING * largest:
        return "the runs of each arm all scored the same, so there is no spread to measure the difference in"
    return ""


def _pooled_sd(first: FloatArray, second: FloatArray) -> float:
    squares = (first.size - 1) * first.var(ddof=1) + (second.size - 1) * second.var(ddof=1)
    return math.sqrt(float(squares) / (first.size + second.size - 2))
