"""Agreement beyond chance: numbers by hand and from the literature, identities, intervals, mutants."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alignlab import statistics
from alignlab.statistics import agreement
from alignlab.statistics.agreement import (
    alpha_interval,
    cohens_kappa,
    kappa_interval,
    krippendorff_alpha,
    mcnemar_exact,
)
from tests.statistics.mutants import mutated

ROUNDING = 1e-12

# Krippendorff 2011, section C: four observers, twelve units, values missing; published α .743 nominal, .815 ordinal,
# .849 interval.
PUBLISHED: list[list[Any]] = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def check_kappa(module: ModuleType) -> None:
    """By hand, 50 items: both yes 20, only a 5, only b 10, both no 15.

    p_o = 35/50 = .7; a says yes 25/50, b 30/50: p_e = .5 * .6 + .5 * .4 = .5; κ = .2 / .5 = .4. Three labels:
    a = x x y z, b = x y y y: p_o = 2/4; p_e = (2*1 + 1*3 + 1*0)/16 = 5/16; κ = (8 - 5)/(16 - 5) = 3/11.
    """
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert module.cohens_kappa(a, b) == pytest.approx(0.4, abs=ROUNDING)
    assert module.cohens_kappa("xxyz", "xyyy") == pytest.approx(3 / 11, abs=ROUNDING)
    assert module.cohens_kappa([0, 1], [1, 0]) == pytest.approx(-1.0, abs=ROUNDING)


def check_alpha(module: ModuleType) -> None:
    """Published, and by hand with two raters: units (1, 1), (1, 2), (4, 4), (2, 4), and one with a single rating.

    Coincidences: 11: 2, 12 and 21: 1 each, 44: 2, 24 and 42: 1 each; n_1 = 3, n_2 = 2, n_4 = 3, n = 8.
    Nominal: disagreeing pairs 4 of 8; by chance (64 - 9 - 4 - 9)/(8*7) = 42/56; α = 1 - .5/.75 = 1/3.
    Interval: (1^2 * 2 + 2^2 * 2)/8 = 10/8; chance 2 (3*2*1 + 3*3*9 + 2*3*4)/56 = 222/56; α = 1 - (10*7)/222.
    Ordinal, ranks 1: 0..3, 2: 3..5, 4: 5..8, middles 1.5, 4, 6.5: d 2.5, 5, 2.5: (6.25 * 4)/8 = 25/8;
    chance 2 (6*6.25 + 9*25 + 6*6.25)/56 = 600/56; α = 1 - 25*7/600.
    """
    for level, published in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        assert module.krippendorff_alpha(PUBLISHED, level) == pytest.approx(published, abs=0.0005), level
    two = [[1, 1, 4, 2, 9], [1, 2, 4, 4, None]]
    assert module.krippendorff_alpha(two) == pytest.approx(1 / 3, abs=ROUNDING)
    assert module.krippendorff_alpha(two, "interval") == pytest.approx(1 - 70 / 222, abs=ROUNDING)
    assert module.krippendorff_alpha(two, "ordinal") == pytest.approx(1 - 175 / 600, abs=ROUNDING)


def check_mcnemar(module: ModuleType) -> None:
    """By hand: 1 and 5: 2 (1 + 6)/64; 0 and 4: 2/16; equal counts: more than 1, so 1; none: 1."""
    assert module.mcnemar_exact(1, 5) == pytest.approx(14 / 64, abs=ROUNDING)
    assert module.mcnemar_exact(5, 1) == pytest.approx(14 / 64, abs=ROUNDING)
    assert module.mcnemar_exact(0, 4) == pytest.approx(1 / 8, abs=ROUNDING)
    assert module.mcnemar_exact(3, 3) == 1.0
    assert module.mcnemar_exact(0, 0) == 1.0
    # a right, b wrong in 3 items; the other way round in 1: 2 (1 + 4)/16 = 5/8
    assert module.mcnemar_exact([1, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 0]) == pytest.approx(5 / 8, abs=ROUNDING)
    assert module.discordant([True, True, False], [False, False, True]) == (2, 1)


@pytest.mark.parametrize("check", [check_kappa, check_alpha, check_mcnemar])
def test_numbers(check: Any) -> None:
    check(agreement)


@pytest.mark.parametrize(
    ("check", "text", "replacement"),
    [
        (check_kappa, "(observed - chance) / (1.0 - chance)", "observed - chance"),
        (check_kappa, "table.sum(0) @ table.sum(1)", "table.sum(0) @ table.sum(0)"),
        (check_kappa, "first * size + second, minlength", "first * size + first, minlength"),
        (check_alpha, "(float(totals.sum()) - 1.0)", "float(totals.sum())"),
        (check_alpha, "(weights / (raters - 1))", "(weights / raters)"),
        (check_alpha, "- np.diag(pairs.sum(0))", ""),
        (check_alpha, "totals.cumsum() - totals / 2", "totals.cumsum()"),
        (check_alpha, "np.subtract.outer(place, place) ** 2", "abs(np.subtract.outer(place, place))"),
        (check_alpha, "if len(unit) > 1]", "]"),
        (check_alpha, 'place = values if level == "interval" else', 'place = values if level == "ordinal" else'),
        (check_mcnemar, "2.0 * float", "1.0 * float"),
        (check_mcnemar, "int(min(counts))", "int(min(counts)) - 1"),
        (check_mcnemar, "(first == 1) & (second == 0)", "(first == 1) & (second == 1)"),
    ],
)
def test_mutants_are_caught(check: Any, text: str, replacement: str) -> None:
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check(mutated(agreement, text, replacement))


def test_exported_at_package_level() -> None:
    assert statistics.cohens_kappa is cohens_kappa
    assert statistics.mcnemar_exact is mcnemar_exact
    assert statistics.krippendorff_alpha is krippendorff_alpha
    low, high = statistics.wilson_interval(195, 300)
    assert (low, high) == pytest.approx((0.594, 0.702), abs=0.0005)


def test_undefined_is_nan_and_never_a_number() -> None:
    assert math.isnan(cohens_kappa(["a"] * 5, ["a"] * 5))
    assert math.isnan(krippendorff_alpha([[1, 1, 1], [1, 1, 1]]))
    assert all(map(math.isnan, kappa_interval(["a"] * 5, ["a"] * 5)))
    assert all(map(math.isnan, alpha_interval([[1, 1, 1], [1, 1, 1]])))


def test_perfect_agreement_has_an_interval_of_its_own() -> None:
    """Two labels, ten items each: chance agreement 1/2; the lower Wilson limit of 20 of 20 is 20/(20 + z^2)."""
    labels = ["a"] * 10 + ["b"] * 10
    low, high = kappa_interval(labels, labels)
    wilson = 20 / (20 + 1.959964**2)
    assert high == 1.0
    assert low == pytest.approx((wilson - 0.5) / 0.5, abs=1e-6)
    below, above = alpha_interval([labels, labels])
    assert above == 1.0
    assert 0.5 < below < 0.8
    assert kappa_interval(labels, labels, clusters=[0, 1] * 10)[0] < low  # two prompts know less than twenty items


def test_intervals_hold_the_value_and_depend_on_the_seed_alone() -> None:
    rng = np.random.default_rng(3)
    a = rng.integers(0, 3, 200)
    b = np.where(rng.random(200) < 0.6, a, rng.integers(0, 3, 200))
    value, (low, high) = cohens_kappa(a.tolist(), b.tolist()), kappa_interval(a.tolist(), b.tolist())
    assert low < value < high
    assert kappa_interval(a, b) == (low, high)
    assert kappa_interval(a, b, seed=1) != (low, high)
    narrow = kappa_interval(a, b, confidence=0.5)
    assert low < narrow[0] < value < narrow[1] < high
    # Fleiss, Cohen & Everitt's large-sample standard error, near enough: sqrt(p_o (1 - p_o)) / ((1 - p_e) sqrt(n))
    table = np.array([[((a == i) & (b == j)).mean() for j in range(3)] for i in range(3)])
    observed, chance = np.trace(table), table.sum(0) @ table.sum(1)
    error = math.sqrt(observed * (1 - observed) / 200) / (1 - chance)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    found = alpha_interval([a.tolist(), b.tolist()])
    assert found == pytest.approx((low, high), abs=0.02)


def test_clusters_of_copies_are_worth_one_item_each() -> None:
    rng = np.random.default_rng(5)
    a = rng.integers(0, 2, 60)
    b = np.where(rng.random(60) < 0.7, a, 1 - a)
    copies = [np.repeat(x, 4).tolist() for x in (a, b)]
    alone, naive = kappa_interval(a, b), kappa_interval(*copies)
    grouped = kappa_interval(*copies, clusters=np.repeat(np.arange(60), 4).tolist())
    assert grouped == pytest.approx(alone, abs=1e-9)
    assert naive[1] - naive[0] < 0.6 * (alone[1] - alone[0])


def test_raters_and_items_may_be_permuted_and_labels_renamed() -> None:
    shuffled = [[row[i] for i in (3, 0, 7, 11, 2, 5, 1, 4, 6, 8, 9, 10)] for row in reversed(PUBLISHED)]
    for level in ("nominal", "ordinal", "interval"):
        assert krippendorff_alpha(shuffled, level) == pytest.approx(krippendorff_alpha(PUBLISHED, level), abs=ROUNDING)
    renamed = [[None if v is None else "abcde"[v - 1] for v in row] for row in PUBLISHED]
    assert krippendorff_alpha(renamed) == pytest.approx(krippendorff_alpha(PUBLISHED), abs=ROUNDING)
    gaps = [[math.nan if v is None else float(v) for v in row] for row in PUBLISHED]
    for level in ("nominal", "interval"):
        expected = krippendorff_alpha(PUBLISHED, level)
        assert krippendorff_alpha(gaps, level) == pytest.approx(expected, abs=ROUNDING)
        assert krippendorff_alpha(list(np.array(gaps)), level) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(("b", "c"), [(0, 1), (2, 9), (10, 3), (7, 7), (0, 30), (120, 90)])
def test_mcnemar_is_the_binomial_tail_twice(b: int, c: int) -> None:
    tail = sum(Fraction(math.comb(b + c, k)) for k in range(min(b, c) + 1)) / Fraction(2) ** (b + c)
    assert mcnemar_exact(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cohens_kappa([1], [1, 2]), "1 labels of one rater and 2"),
        (lambda: cohens_kappa([], []), "0 labels"),
        (lambda: kappa_interval([1, 2], [1, 2], clusters=[1]), "1 clusters for 2 items"),
        (lambda: krippendorff_alpha([[1, 2], [1]]), "rows of one length"),
        (lambda: krippendorff_alpha([[1, None], [None, 2]]), "no unit has two ratings"),
        (lambda: krippendorff_alpha([["x"], ["y"]], "interval"), "needs numbers"),
        (lambda: krippendorff_alpha([[1], [2]], "ratio"), "level is 'ratio'"),  # type: ignore[arg-type]
        (lambda: mcnemar_exact(-1, 2), "whole numbers"),
        (lambda: mcnemar_exact(1.5, 2), "whole numbers"),
        (lambda: mcnemar_exact(math.nan, 2), "whole numbers"),
        (lambda: mcnemar_exact([1, 2], [0, 1]), "0 or 1"),
        (lambda: mcnemar_exact([1, 0], [0]), "one length"),
    ],
)
def test_what_makes_no_sense_is_said(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no scikit-learn")
@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learns(seed: int) -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, (2, 80))
    assert cohens_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=ROUNDING)


@pytest.mark.skipif(importlib.util.find_spec("statsmodels") is None, reason="no statsmodels")
def test_mcnemar_is_statsmodels() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    assert mcnemar_exact(4, 11) == pytest.approx(mcnemar([[9, 4], [11, 2]], exact=True).pvalue, abs=ROUNDING)


def slow_alpha(ratings: Sequence[Sequence[Any]]) -> float:
    """The definition, pair by pair."""
    units = [[v for v in unit if v is not None] for unit in zip(*ratings, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    values = [v for unit in units for v in unit]
    observed = sum(
        sum(x != y for i, x in enumerate(unit) for j, y in enumerate(unit) if i != j) / (len(unit) - 1)
        for unit in units
    )
    chance = sum(x != y for i, x in enumerate(values) for j, y in enumerate(values) if i != j) / (len(values) - 1)
    return 1 - observed / chance


def test_alpha_is_its_definition_on_random_gaps() -> None:
    rng = np.random.default_rng(11)
    for _ in range(20):
        table = [[int(v) if v < 4 else None for v in row] for row in rng.integers(0, 6, (4, 15))]
        assert krippendorff_alpha(table) == pytest.approx(slow_alpha(table), abs=ROUNDING)
