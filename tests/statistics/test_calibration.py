"""Bins, calibration error and temperature against hand arithmetic, and against judges whose fault is known."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
from scipy import special

from alignlab.statistics import calibration
from alignlab.statistics.calibration import (
    TEMPERATURES,
    calibration_error,
    chance_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from tests.statistics.mutants import mutated

ROUNDING = 1e-12
ROOT = 1e-9
"""What is found by bisection rather than by a formula."""


def check_error(module: ModuleType) -> None:
    """.05 lost, .15 won and lost, 1 won: |.05 - 0| + 2 |.15 - 1/2| + |1 - 1| = .75, over four values .1875."""
    bins = module.reliability([0.15, 0.05, 1.0, 0.15], [1, 0, 1, 0])
    assert module.calibration_error(bins) == pytest.approx(0.1875, abs=ROUNDING)


def test_bins_by_hand() -> None:
    check_error(calibration)
    bins = reliability([0.05, 0.15, 0.15, 1.0], [0, 1, 0, 1])
    assert [b.count for b in bins] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert (bins[1].low, bins[1].high, bins[1].observed) == (0.1, 0.2, 0.5)
    assert bins[1].stated == pytest.approx(0.15, abs=ROUNDING)
    assert bins[5].stated is None and bins[5].observed is None


def test_a_boundary_belongs_to_the_bin_above_and_1_to_the_last() -> None:
    assert [b.count for b in reliability([0.0, 0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1, 1], num_bins=4)] == [1, 1, 1, 2]


def check_temperature(module: ModuleType) -> None:
    """Three of four right at a distance of 2: sigmoid(2 / T) = 3/4 at T = 2 / ln 3."""
    assert module.fit_temperature([2.0, 2.0, -2.0, 2.0]) == pytest.approx(2 / math.log(3), rel=ROOT)


def test_temperature_by_hand() -> None:
    check_temperature(calibration)
    assert fit_temperature([0.1, 0.1, -0.1, 0.1]) == pytest.approx(0.1 / math.log(3), rel=ROOT)


def test_negative_log_likelihood_by_hand() -> None:
    """ln(1 + 1/3) and ln(1 + 3) at margins of ln 3 and -ln 3; the same at twice the margins and temperature."""
    expected = (math.log(4 / 3) + math.log(4)) / 2
    assert negative_log_likelihood([math.log(3), -math.log(3)]) == pytest.approx(expected, abs=ROUNDING)
    assert negative_log_likelihood([math.log(9), -math.log(9)], 2.0) == pytest.approx(expected, abs=ROUNDING)
    assert negative_log_likelihood([-1e6]) == pytest.approx(1e6, rel=ROOT)  # no overflow


def test_no_neighbouring_temperature_is_likelier() -> None:
    margins = np.random.default_rng(0).normal(0.4, 2.0, 300)
    best = fit_temperature(margins)
    for factor in (0.99, 1.01):
        assert negative_log_likelihood(margins, best) < negative_log_likelihood(margins, factor * best)


@pytest.mark.parametrize("planted", [0.5, 1.0, 4.0])
def test_a_planted_temperature_is_found(planted: float) -> None:
    """True margins m decide who wins with sigmoid(m); the judge, too sure or not enough, states planted * m."""
    random = np.random.default_rng(1)
    true = random.normal(0.0, 2.0, 20_000)
    won = random.random(true.size) < special.expit(true)
    assert fit_temperature(planted * np.where(won, true, -true)) == pytest.approx(planted, rel=0.05)


def test_margins_that_decide_everything_or_nothing() -> None:
    assert fit_temperature([0.5, 3.0]) == TEMPERATURES[0]
    assert fit_temperature([-0.5, -3.0]) == TEMPERATURES[1]
    assert fit_temperature([0.0, 0.0]) == 1.0


def test_chance_alone() -> None:
    """100 coins: E|share - 1/2| = 50 C(100, 50) / 2^100 / 50 = .0398; certainties are never off."""
    exact = 0.5 * math.comb(100, 50) / 2**100
    assert chance_error([0.5] * 100, draws=4000) == pytest.approx(exact, rel=0.05)
    assert chance_error([0.0, 1.0] * 5) == 0.0
    assert chance_error([0.3, 0.6]) == chance_error([0.3, 0.6])


@pytest.mark.parametrize(
    ("text", "replacement", "check"),
    [
        ("b.count * abs", "abs", check_error),
        ("abs(b.stated - b.observed)", "(b.stated - b.observed)", check_error),
        ("observed[here].mean()", "stated[here].mean()", check_error),
        ("(-array * special", "(array * special", check_temperature),
        ("math.exp(-float(exponent))", "math.exp(float(exponent))", check_temperature),
    ],
)
def test_mutants_are_caught(text: str, replacement: str, check: object) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(mutated(calibration, text, replacement))  # type: ignore[operator]


def test_what_is_no_probability_is_refused() -> None:
    for probabilities, outcomes in (([1.2], [1]), ([-0.1], [0]), ([0.5], [0.5]), ([0.5], [1, 0]), ([], [])):
        with pytest.raises(ValueError):
            reliability(probabilities, outcomes)
    with pytest.raises(ValueError, match="all bins are empty"):
        calibration_error([])
