"""How far stated probabilities are from what happens; probabilities and outcomes (n,) → bins → calibration error.

A pairwise judge states P(first wins) = sigmoid(margin), margin = score(first) - score(second). With the chosen one
always first every outcome is 1, so pairs are oriented at random before their calibration is looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from alignlab.statistics.aggregates import FloatArray, finite_array

TEMPERATURES = (0.01, 100.0)
"""A fitted temperature stays within these; margins that are all right (or all wrong) would send it to 0 (infinity)."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bar of a reliability diagram: the probabilities stated in [low, high), the last bin's end included."""

    low: float
    high: float
    count: int
    stated: float | None
    """Mean stated probability; None in an empty bin."""
    observed: float | None
    """Share of outcomes that were 1; None in an empty bin."""


def reliability(probabilities: npt.ArrayLike, outcomes: npt.ArrayLike, num_bins: int = 10) -> tuple[Bin, ...]:
    """Bins of equal width over [0, 1] for `probabilities` (n,) and their `outcomes` (n,), 0 or 1.

    Raises:
        ValueError: no values, other shapes, a probability outside [0, 1], an outcome that is neither 0 nor 1.
    """
    stated, observed = _stated_and_observed(probabilities, outcomes)
    index = np.minimum((stated * num_bins).astype(int), num_bins - 1)
    bins = []
    for i in range(num_bins):
        here = index == i
        count = int(here.sum())
        bins.append(
            Bin(
                low=i / num_bins,
                high=(i + 1) / num_bins,
                count=count,
                stated=float(stated[here].mean()) if count else None,
                observed=float(observed[here].mean()) if count else None,
            )
        )
    return tuple(bins)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error, in [0, 1]: mean over all values of |stated - observed| of their bin.

    Guo et al. 2017 (arXiv:1706.04599). Positive for a perfect judge too, as a bin's share of few outcomes is never
    exactly what was stated: see `chance_error`.

    Raises:
        ValueError: all bins are empty.
    """
    total = sum(b.count for b in bins)
    if not total:
        raise ValueError("all bins are empty, so there is no calibration error")
    return (
        sum(b.count * abs(b.stated - b.observed) for b in bins if b.stated is not None and b.observed is not None)
        / total
    )


def chance_error(probabilities: npt.ArrayLike, num_bins: int = 10, *, draws: int = 200, seed: int = 0) -> float:
    """What chance alone makes of it: mean `calibration_error` if outcomes came from just these `probabilities` (n,)."""
    stated = finite_array(probabilities, name="probabilities", ndim=1)
    random = np.random.Generator(np.random.Philox(seed)).random((draws, stated.size))
    errors = [calibration_error(reliability(stated, row < stated, num_bins)) for row in random]
    return float(np.mean(errors))


def negative_log_likelihood(margins: npt.ArrayLike, temperature: float = 1.0) -> float:
    """Mean of log(1 + exp(-margin / temperature)) over `margins` (n,) of winner minus loser, in nats a pair."""
    array = finite_array(margins, name="margins", ndim=1)
    return float(np.logaddexp(0.0, -array / temperature).mean())


def fit_temperature(margins: npt.ArrayLike) -> float:
    """The T > 0 that makes `margins` (n,) of winner minus loser likeliest under sigmoid(margin / T).

    Above 1: the judge was too sure of itself. Convex in 1 / T, so the one optimum is found exactly; it is kept within
    `TEMPERATURES`, and is 1 where all margins are 0 and say nothing.
    """
    array = finite_array(margins, name="margins", ndim=1)
    if not array.any():
        return 1.0

    def slope(inverse: float) -> float:
        return float((-array * special.expit(-inverse * array)).mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(low) >= 0:
        return TEMPERATURES[1]
    if slope(high) <= 0:
        return TEMPERATURES[0]
    # In logarithms, as the answer may lie anywhere within four orders of magnitude.
    exponent = optimize.brentq(lambda x: slope(math.exp(x)), math.log(low), math.log(high), xtol=1e-12)
    return math.exp(-float(exponent))


def _stated_and_observed(probabilities: npt.ArrayLike, outcomes: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    stated = finite_array(probabilities, name="probabilities", ndim=1)
    observed = finite_array(outcomes, name="outcomes", ndim=1)
    if stated.shape != observed.shape:
        raise ValueError(f"{stated.size} probabilities, but {observed.size} outcomes")
    if not ((stated >= 0) & (stated <= 1)).all() or not np.isin(observed, (0, 1)).all():
        raise ValueError("probabilities lie in [0, 1] and outcomes are 0 or 1")
    return stated, observed
