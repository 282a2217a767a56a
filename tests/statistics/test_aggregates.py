"""Means, spreads and mean curves against hand arithmetic."""

import numpy as np
import numpy.typing as npt
import pytest

from alignlab.statistics.aggregates import is_constant, mean_sd, seed_curve, spread, tail_probability

ROUNDING = 1e-12


def test_mean_and_spread() -> None:
    """(2, 4, 9): mean 5, squares 9 + 1 + 16 = 26, sd = sqrt(26 / 2) = sqrt 13 (with ddof 0 it would be 2.94)."""
    mean, sd = mean_sd([2.0, 4.0, 9.0])
    assert mean == pytest.approx(5.0, abs=ROUNDING)
    assert sd == pytest.approx(13.0**0.5, abs=ROUNDING)
    assert spread([2.0, 4.0, 9.0]) == sd


def test_one_value_has_a_mean_and_no_spread() -> None:
    assert mean_sd([0.7]) == (0.7, None)
    assert spread([0.7]) is None


def test_equal_values_have_spread_zero() -> None:
    assert spread([0.5, 0.5, 0.5]) == 0.0


def test_seed_curve() -> None:
    """Column (1, 3): mean 2, sd sqrt 2, standard error 1. Column (0, 6): mean 3, sd sqrt 18, standard error 3."""
    curve = seed_curve([[1.0, 0.0, 5.0], [3.0, 6.0, 5.0]])
    assert curve.num_seeds == 2
    np.testing.assert_allclose(curve.mean, [2.0, 3.0, 5.0], atol=ROUNDING)
    assert curve.standard_error is not None
    np.testing.assert_allclose(curve.standard_error, [1.0, 3.0, 0.0], atol=ROUNDING)


def test_seed_curve_of_one_seed_has_no_band() -> None:
    curve = seed_curve([[1.0, 2.0]])
    np.testing.assert_array_equal(curve.mean, [1.0, 2.0])
    assert curve.standard_error is None
    assert curve.num_seeds == 1


def test_constant_means_up_to_rounding() -> None:
    assert is_constant(np.array([0.1 + 0.2, 0.3]))
    assert is_constant(np.zeros(3))
    assert not is_constant(np.array([0.3, 0.3001]))


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "at least one value"), ([[1.0]], "shape"), ([1.0, float("nan")], "1 NaN"), ([float("inf")], "infinite")],
)
def test_bad_values_are_refused(values: npt.ArrayLike, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_sd(values)
    with pytest.raises(ValueError, match=message):
        spread(values)


def test_a_curve_with_a_hole_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        seed_curve([[1.0, 2.0], [1.0, float("nan")]])


def test_tail_probability() -> None:
    assert tail_probability(0.95) == pytest.approx(0.025, abs=ROUNDING)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            tail_probability(confidence)
