"""Means, spreads and mean curves that claim no spread where one run has none; scores (n,), curves (S, T) → numbers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Scores are sums and means of floats: values this close, relative to the largest, differ by rounding only.
RELATIVE_ROUNDING = 1e-12


def finite_array(values: npt.ArrayLike, *, name: str, ndim: int) -> FloatArray:
    """`values` as float64 of `ndim` dimensions; ValueError where it is empty, of another shape, NaN or infinite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}, but {ndim} dimension(s) and at least one value are needed")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} has {bad} NaN or infinite value(s) of {array.size}: leave out or repair those runs")
    return array


def is_constant(array: FloatArray) -> bool:
    """Whether all values are equal up to floating-point rounding."""
    return bool(np.ptp(array) <= RELATIVE_ROUNDING * np.abs(array).max())


def tail_probability(confidence: float) -> float:
    """Probability in each of the two tails outside an interval of this confidence; ValueError outside (0, 1)."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, but must lie strictly between 0 and 1, such as 0.95")
    return (1.0 - confidence) / 2.0


def spread(values: npt.ArrayLike) -> float | None:
    """Sample standard deviation (ddof 1) of `values` (n,), in their unit; None for a single value, which has none."""
    array = finite_array(values, name="values", ndim=1)
    return float(array.std(ddof=1)) if array.size >= 2 else None


def mean_sd(values: npt.ArrayLike) -> tuple[float, float | None]:
    """Mean and `spread` of `values` (n,), both in their unit."""
    return float(finite_array(values, name="values", ndim=1).mean()), spread(values)


@dataclass(frozen=True, kw_only=True)
class SeedCurve:
    """A learning curve averaged over seeds."""

    mean: FloatArray
    """(T,) mean over the seeds at each point, in the unit of the curves."""
    standard_error: FloatArray | None
    """(T,) sd over seeds / sqrt(num_seeds); None with one seed. At 3 seeds a 95 % band is 4.3 of these, not 2."""
    num_seeds: int


def seed_curve(curves: npt.ArrayLike) -> SeedCurve:
    """Average `curves` (S, T): one row a seed, the columns one grid of steps that all seeds share.

    Raises:
        ValueError: not two-dimensional, empty, or NaN (a seed lacks a point: cut to the grid all seeds reached).
    """
    array = finite_array(curves, name="curves", ndim=2)
    num_seeds = array.shape[0]
    standard_error = array.std(axis=0, ddof=1) / np.sqrt(num_seeds) if num_seeds >= 2 else None
    return SeedCurve(mean=array.mean(axis=0), standard_error=standard_error, num_seeds=num_seeds)
