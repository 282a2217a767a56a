"""Clustered intervals against numbers worked out by hand, against the plain cases they contain, and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from alignlab.statistics import (
    Interval,
    bootstrap_interval,
    clustered,
    clustered_interval,
    clustered_proportion,
    clustered_standard_error,
    jackknife_interval,
    mean_interval,
    mean_of_bounds,
    paired_interval,
    paired_proportion,
    prompt_interval,
    ratio_interval,
    trinomial_interval,
    wilson_interval,
)
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT64

RAGGED = [1.0, 2.0, 6.0, 3.0, 8.0], ["a", "a", "b", "c", "c"]
"""Mean 4; residuals sum to a: -3 - 2 = -5, b: 2, c: -1 + 4 = 3 -> squares 25 + 4 + 9 = 38."""


def ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_ragged_clusters_by_hand() -> None:
    """Var = 3/2 * 38 / 25 = 2.28; t(.975, 2) = 4.302653."""
    found = clustered_interval(*RAGGED)
    assert (found.mean, found.df) == (4.0, 2.0)
    assert_allclose(found.standard_error, math.sqrt(2.28), **FLOAT64)
    assert_allclose(ends(found), (4 - 4.302652729911275 * math.sqrt(2.28), 4 + 4.302652729911275 * math.sqrt(2.28)))
    assert clustered_standard_error(*RAGGED) == found.standard_error


def test_a_ratio_by_hand() -> None:
    """sums a: 3 of 4, b: 6 of 2, c: 11 of 4 -> 20 / 10 = 2; residuals 3 - 8 = -5, 6 - 4 = 2, 11 - 8 = 3 -> 38 again:
    Var = 3/2 * 38 / 100."""
    values, clusters = RAGGED
    found = ratio_interval(values, [1.0, 3.0, 2.0, 1.0, 3.0], clusters)
    assert found.mean == 2.0
    assert_allclose(found.standard_error, math.sqrt(1.5 * 38 / 100), **FLOAT64)


def test_a_proportion_by_hand() -> None:
    """Clusters 11, 00, 10, 11: p = 5/8, residual sums .75, -1.25, -.25, .75 -> 2.75; Var (without G / (G - 1)) =
    2.75 / 64; so p (1 - p) / Var = 60 / 11 values that count, at t(.975, 3) standard errors."""
    found = clustered_proportion([1, 1, 0, 0, 1, 0, 1, 1], list("aabbccdd"))
    n, p, t = 60 / 11, 5 / 8, 3.182446305284263
    centre, half = p + t**2 / (2 * n), t * math.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))
    assert found.mean == p
    assert_allclose(ends(found), ((centre - half) / (1 + t**2 / n), (centre + half) / (1 + t**2 / n)), **FLOAT64)


def test_the_mean_of_independent_estimates_by_hand() -> None:
    """Means 1 and 3, errors 3 and 4 with 10 and 20 df: 2, 5/2, df = 625 / (81 / 10 + 256 / 20)."""
    parts = [
        Interval(mean=m, low=0, high=0, standard_error=s, df=d, confidence=0.95) for m, s, d in ((1, 3, 10), (3, 4, 20))
    ]
    found = mean_interval(parts)
    assert (found.mean, found.standard_error) == (2.0, 2.5)
    assert_allclose(found.df, 625 / (8.1 + 12.8), **FLOAT64)
    assert_allclose(found.high - 2.0, stats.t.isf(0.025, found.df) * 2.5, **FLOAT64)


# ---- the plain cases they contain ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(40, 5)) + np.random.default_rng(4).normal(size=(40, 1))


def test_one_value_a_cluster_is_the_interval_over_prompts(drawn: np.ndarray) -> None:
    plain, found = prompt_interval(drawn[:, 0]), clustered_interval(drawn[:, 0], range(40))
    assert_allclose(ends(found), ends(plain), **FLOAT64)
    assert_allclose(ends(ratio_interval(drawn[:, 0], np.ones(40), range(40))), ends(plain), **FLOAT64)
    jackknife = jackknife_interval(lambda i: float(drawn[i, 0].mean()), range(40))
    assert_allclose(ends(jackknife), ends(plain), **FLOAT64)


def test_as_many_values_in_each_cluster_is_that_of_their_means(drawn: np.ndarray) -> None:
    clusters = np.repeat(np.arange(40), 5).tolist()
    found, plain = clustered_interval(drawn.ravel(), clusters), prompt_interval(drawn.mean(1))
    assert_allclose(ends(found), ends(plain), **FLOAT64)
    flat = drawn.ravel()
    assert_allclose(ends(jackknife_interval(lambda i: float(flat[i].mean()), clusters)), ends(plain), **FLOAT64)
    naive = prompt_interval(drawn.ravel())
    assert found.high - found.low > 1.3 * (naive.high - naive.low)


@pytest.mark.parametrize("ones", [0, 1, 17, 40])
def test_single_values_of_a_proportion_are_wilsons(ones: int) -> None:
    found = clustered_proportion([1] * ones + [0] * (40 - ones), range(40))
    assert_allclose(ends(found), wilson_interval(ones, 40), **FLOAT64)


def test_values_that_are_the_same_throughout_a_cluster_count_once() -> None:
    values, clusters = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0], range(10)
    once = clustered_proportion(values, clusters)
    many = clustered_proportion(np.repeat(values, 50), np.repeat(clusters, 50).tolist())
    assert many.standard_error == pytest.approx(once.standard_error)
    assert many.low < once.low and many.high > once.high  # t of 9 df: the variance is estimated


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_proportion_at_its_end_is_not_certain(value: float) -> None:
    found = clustered_proportion([value] * 30, [i // 3 for i in range(30)])
    assert found.high - found.low > 0.2 and 0.0 <= found.low <= found.high <= 1.0


def test_pairs_are_compared_value_by_value(drawn: np.ndarray) -> None:
    """Noise that both share cancels: the difference is known exactly where the two are only shifted."""
    clusters = np.repeat(np.arange(40), 5).tolist()
    found = paired_interval(drawn.ravel() + 0.25, drawn.ravel(), clusters)
    assert found.mean == pytest.approx(0.25) and found.standard_error == pytest.approx(0.0, abs=1e-12)
    turned = paired_interval(drawn.ravel(), (drawn**2).ravel(), clusters)
    assert_allclose(
        ends(turned), [-x for x in ends(paired_interval((drawn**2).ravel(), drawn.ravel(), clusters))[::-1]]
    )


def test_a_difference_of_shares_is_that_of_a_win_rate_and_never_certain() -> None:
    """Three prompts: 2 won, 1 tied, where a t interval reaches 2.10; all tied: +- z^2 / (n + z^2), not +- 0."""
    ones, some = [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]
    assert paired_interval(ones, some, range(3)).high > 2
    found = paired_proportion(ones, some, range(3))
    assert found.mean == pytest.approx(2 / 3) and -1 <= found.low < 0 < found.mean < found.high <= 1
    assert_allclose(ends(found), [2 * end - 1 for end in trinomial_interval(2, 1, 0)], **FLOAT64)
    turned = paired_proportion(some, ones, range(3))
    assert_allclose(ends(turned), [-end for end in ends(found)[::-1]], rtol=0, atol=1e-8)
    z2 = float(stats.norm.isf(0.025)) ** 2
    assert_allclose(ends(paired_proportion(ones, ones, range(3))), [-z2 / (3 + z2), z2 / (3 + z2)], rtol=0, atol=1e-8)
    t2 = float(stats.t.isf(0.025, 2)) ** 2  # 5 samples of each prompt count once, and Student's quantile of 2 df
    repeated = paired_proportion(ones * 5, ones * 5, [0, 1, 2] * 5)
    assert_allclose(ends(repeated), [-t2 / (3 + t2), t2 / (3 + t2)], rtol=0, atol=1e-8)


def test_the_mean_of_bounds_by_hand() -> None:
    """Ends .3 and .4 below, .6 and .8 above: .5 / 2 and 1 / 2 from the mean; parts that are sure stay sure."""

    def part(mean: float, low: float, high: float) -> Interval:
        return Interval(mean=mean, low=low, high=high, standard_error=0.1, df=9.0, confidence=0.95)

    found = mean_of_bounds([part(0.0, -0.3, 0.6), part(0.2, -0.2, 1.0)])
    assert (found.mean, *ends(found)) == pytest.approx((0.1, -0.15, 0.6))
    assert mean_of_bounds([part(0.0, 0.0, 0.0)]).note and not found.note


def test_the_bootstrap_draws_clusters_and_is_the_same_every_time(drawn: np.ndarray) -> None:
    flat, clusters = drawn.ravel(), np.repeat(np.arange(40), 5).tolist()

    def mean(index: np.ndarray) -> float:
        return float(flat[index].mean())

    found, exact = bootstrap_interval(mean, clusters), clustered_interval(flat, clusters)
    assert found == bootstrap_interval(mean, clusters)
    assert found != bootstrap_interval(mean, clusters, seed=1)
    assert found.standard_error == pytest.approx(exact.standard_error, rel=0.1)
    whole: list[int] = []
    bootstrap_interval(lambda i: whole.append(len(i)) or 0.0, clusters, draws=20)  # type: ignore[func-returns-value]
    assert set(whole) == {200}


# ---- coverage --------------------------------------------------------------------------------------------------------


def coverage(interval: Callable[[np.ndarray, Sequence[int]], Interval], binary: bool) -> float:
    """Share of 400 experiments (30 prompts of 1 to 6 samples) whose 95 % interval holds the truth."""
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        sizes = random.integers(1, 7, 30)
        clusters = np.repeat(np.arange(30), sizes).tolist()
        if binary:
            truth = 0.3
            values = (random.random(sizes.sum()) < np.repeat(random.beta(0.6, 1.4, 30), sizes)).astype(float)
        else:
            truth = 0.0
            values = random.normal(size=sizes.sum()) + np.repeat(random.normal(size=30), sizes)
        found = interval(values, clusters)
        hits += found.low <= truth <= found.high
    return hits / 400


def test_simulated_coverage_is_what_is_claimed() -> None:
    """400 experiments: the standard error of a coverage of .95 is .011."""
    assert coverage(clustered_interval, binary=False) == pytest.approx(0.95, abs=0.03)
    assert coverage(clustered_proportion, binary=True) == pytest.approx(0.95, abs=0.03)
    assert coverage(lambda v, c: prompt_interval(v), binary=False) < 0.85  # what ignoring the clusters costs


@pytest.mark.parametrize(("prompts", "samples"), [(6, 1), (40, 1), (10, 4), (30, 4)])
def test_a_difference_of_shares_is_held_as_often_as_claimed(prompts: int, samples: int) -> None:
    """400 experiments each, of prompts that are hard or easy for both; of few prompts a little more often."""
    random = np.random.default_rng(11)
    clusters = np.repeat(np.arange(prompts), samples).tolist()
    hits = 0
    for _ in range(400):
        easy = np.repeat(random.choice([0.1, 0.7], size=prompts), samples)
        first, second = (random.random((2, easy.size)) < np.stack([easy + 0.2, easy])).astype(float)
        found = paired_proportion(first, second, clusters)
        hits += found.low <= 0.2 <= found.high
    assert 0.92 <= hits / 400 <= 0.995


# ---- errors and mutants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: clustered_interval([], []), "at least one value"),
        (lambda: clustered_interval([1.0, math.nan], ["a", "b"]), "NaN"),
        (lambda: clustered_interval([1.0, 2.0], ["a", "a"]), "1 cluster"),
        (lambda: clustered_interval([1.0, 2.0], ["a"]), "2 values, but 1 clusters"),
        (lambda: clustered_proportion([0.5, 1.0], ["a", "b"]), "0 or 1"),
        (lambda: paired_interval([1.0, 2.0], [1.0], ["a", "b"]), "2 values are paired with 1"),
        (lambda: paired_proportion([1.0, 0.0], [0.5, 1.0], ["a", "b"]), "0 or 1"),
        (lambda: paired_proportion([1.0, 0.0], [1.0], ["a", "b"]), "2 values are paired with 1"),
        (lambda: ratio_interval([1.0, 2.0], [0.0, 0.0], ["a", "b"]), "positive sum"),
        (lambda: jackknife_interval(lambda i: math.nan, ["a", "b"]), "NaN"),
        (lambda: mean_interval([]), "one or more"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("num_clusters / (num_clusters - 1) * float((sums**2).sum())", "float((sums**2).sum())"),
        ("sums = np.bincount(codes, weights=residuals, minlength=num_clusters)", "sums = residuals"),
        ("_standard_error(array - mean, codes, num_clusters)", "_standard_error(array, codes, num_clusters)"),
    ],
)
def test_a_wrong_formula_is_noticed(text: str, replacement: str) -> None:
    mutant = mutated(clustered, text, replacement)
    assert not np.allclose(mutant.clustered_interval(*RAGGED).standard_error, math.sqrt(2.28), rtol=1e-6)
