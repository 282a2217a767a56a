"""Win rates with ties and at equal length: numbers by hand, identities, coverage, mutants."""

from __future__ import annotations

import importlib.util
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from alignlab.statistics import wins
from alignlab.statistics.inference import wilson_interval
from alignlab.statistics.wins import design_effect, length_controlled, trinomial_interval, win_rate
from tests.statistics.mutants import mutated

Z = 1.959963984540054
ROUNDING = 1e-9


def profiled_limits(b: int, t: int, c: int) -> tuple[float, float]:
    """The score interval from scratch: the likelihood maximised numerically at each difference."""
    n = b + t + c

    def statistic(difference: float) -> float:
        def cost(q: float) -> float:
            shares = (q + difference, 1 - 2 * q - difference, q)
            return -sum(k * math.log(max(p, 1e-300)) for k, p in zip((b, t, c), shares, strict=True) if k)

        low, high = max(0.0, -difference), (1 - difference) / 2
        q = optimize.minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (b - c - n * difference) / math.sqrt(n * (2 * q + difference * (1 - difference)))

    observed = (b - c) / n
    low = optimize.brentq(lambda d: statistic(d) - Z, -0.999, observed - 1e-4)
    high = optimize.brentq(lambda d: statistic(d) + Z, observed + 1e-4, 0.999)
    return (1 + low) / 2, (1 + high) / 2


def check_trinomial(module: ModuleType) -> None:
    """Without ties it is Wilson's; all ties leave +- z^2 / (n + z^2) of the difference; all won n / (n + z^2)."""
    for won, lost in ((7, 3), (1, 40), (195, 105)):
        assert module.trinomial_interval(won, 0, lost) == pytest.approx(
            wilson_interval(won, won + lost), abs=ROUNDING
        ), (won, lost)
    half = Z**2 / (20 + Z**2) / 2
    assert module.trinomial_interval(0, 20, 0) == pytest.approx((0.5 - half, 0.5 + half), abs=ROUNDING)
    assert module.trinomial_interval(12, 0, 0) == pytest.approx((12 / (12 + Z**2), 1.0), abs=1e-6)
    assert module.trinomial_interval(0, 0, 12) == pytest.approx((0.0, Z**2 / (12 + Z**2)), abs=1e-6)
    for counts in ((12, 30, 5), (40, 3, 2), (1, 8, 1), (5, 60, 11)):
        assert module.trinomial_interval(*counts) == pytest.approx(profiled_limits(*counts), abs=1e-5), counts
    # Twice the variance is half the games.
    assert module.trinomial_interval(12, 30, 6, design_effect=2.0) == pytest.approx(
        module.trinomial_interval(6, 15, 3), abs=ROUNDING
    )


def check_design_effect(module: ModuleType) -> None:
    """Values 1 1 0 0 in clusters (1 1) (0 0): centred sums 1 and -1: 2 * 2/1 = 4 over plain 1 * 4/3: 3.

    In clusters (1 0) (1 0) the sums are 0: less than without clusters, which counts as 1.
    """
    assert module.design_effect([1, 1, 0, 0], ["p", "p", "q", "q"]) == pytest.approx(3.0, abs=ROUNDING)
    assert module.design_effect([1, 0, 1, 0], ["p", "p", "q", "q"]) == 1.0
    assert module.design_effect([1, 0, 1, 0], [0, 1, 2, 3]) == 1.0
    assert module.design_effect([1, 1, 1, 1], ["p", "p", "q", "q"]) == 2.0  # no spread: a cluster counts once


def check_length(module: ModuleType) -> None:
    """Half of the games with d = +1, won in 80 %, half with d = -1, won in 40 %: the fit is saturated, so
    theta = (logit .8 + logit .4)/2, rate .6202 where the raw one is .6; phi tanh(1) = (logit .8 - logit .4)/2."""
    outcomes = [1.0] * 80 + [0.0] * 20 + [1.0] * 40 + [0.0] * 60
    differences = [1.0] * 100 + [-1.0] * 100
    found = module.length_controlled(outcomes, differences)
    up, down = math.log(0.8 / 0.2), math.log(0.4 / 0.6)
    assert found.rate == pytest.approx(1 / (1 + math.exp(-(up + down) / 2)), abs=5e-4)
    assert found.coefficient == pytest.approx((up - down) / 2 / math.tanh(1), rel=2e-3)
    # Delta method by hand: theta's variance is (1/(100 .8 .2) + 1/(100 .4 .6))/4; t of 199 degrees of freedom.
    error = math.sqrt((1 / 16 + 1 / 24) / 4)
    theta = (up + down) / 2
    assert found.low == pytest.approx(1 / (1 + math.exp(-(theta - 1.972 * error))), abs=2e-3)
    assert found.high == pytest.approx(1 / (1 + math.exp(-(theta + 1.972 * error))), abs=2e-3)


@pytest.mark.parametrize("check", [check_trinomial, check_design_effect, check_length])
def test_numbers(check: Any) -> None:
    check(wins)


@pytest.mark.parametrize(
    ("check", "text", "replacement"),
    [
        (check_trinomial, "difference * (2 * n - b + c) - (b + c)", "difference * (2 * n + b - c) - (b + c)"),
        (check_trinomial, "8 * n * c * difference", "4 * n * c * difference"),
        (check_trinomial, "n * (2 * q + difference * (1 - difference))", "n * 2 * q"),
        (check_trinomial, "(count / design_effect for count", "(count for count"),
        (check_trinomial, "off = 1e-9", "off = 0.0"),
        (check_trinomial, "(1.0 + float(low)) / 2, (1.0 + float(high)) / 2", "float(low), float(high)"),
        (check_design_effect, "* number / (number - 1)\n    return max", "\n    return max"),
        (check_design_effect, "return max(1.0, clustered / plain)", "return clustered / plain"),
        (check_design_effect, "return array.size / number", "return 1.0"),
        (check_length, "np.tanh(longer / spread)", "longer / spread"),
        (check_length, "rate=float(special.expit(beta[0])),", "rate=rate,"),
        (check_length, "variance[0, 0]", "variance[1, 1]"),
        (check_length, "bread @ (scores.T @ scores) @ bread", "bread @ bread"),
    ],
)
def test_mutants_are_caught(check: Any, text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check(mutated(wins, text, replacement))


def test_win_rate_counts() -> None:
    """5 won, 2 tied, 3 lost: (5 + 1)/10; 5/8 of the decisive; sign test 2 (1 + 8 + 28 + 56)/256."""
    found = win_rate([1] * 5 + [0.5] * 2 + [0] * 3)
    assert (found.wins, found.ties, found.losses, found.games, found.prompts) == (5, 2, 3, 10, 10)
    assert found.rate == pytest.approx(0.6)
    assert (found.low, found.high) == trinomial_interval(5, 2, 3)
    assert found.decisive_rate == pytest.approx(5 / 8)
    assert (found.decisive_low, found.decisive_high) == pytest.approx(wilson_interval(5, 8))
    assert found.p == pytest.approx(2 * 93 / 256)


def test_repeated_prompts_widen_the_interval_and_have_no_sign_test() -> None:
    outcomes, prompts = [1.0] * 30 + [0.0] * 10, list(range(10)) * 4
    once, again = win_rate(outcomes), win_rate(outcomes, [i // 4 for i in range(40)])
    assert again.p is None and once.p is not None
    assert again.design_effect > 3
    assert again.high - again.low > 1.5 * (once.high - once.low)
    assert again.decisive_low is not None and again.decisive_low < (once.decisive_low or 0)
    assert win_rate(outcomes, prompts).rate == once.rate


def test_no_interval_has_width_zero() -> None:
    for outcomes in ([1.0] * 5, [0.0] * 5, [0.5] * 5, [1.0]):
        found = win_rate(outcomes)
        assert found.high - found.low > 0.2, outcomes
    ties = win_rate([0.5] * 5)
    assert ties.decisive_rate is None and ties.decisive_low is None


def test_swapping_the_systems_mirrors_everything() -> None:
    rng = np.random.default_rng(2)
    outcomes, lengths = rng.choice([0, 0.5, 1], 60), rng.normal(5, 20, 60)
    prompts = (np.arange(60) // 2).tolist()
    one, other = win_rate(outcomes, prompts), win_rate(1 - outcomes, prompts)
    assert (other.rate, other.low, other.high) == pytest.approx((1 - one.rate, 1 - one.high, 1 - one.low), abs=1e-6)
    equal, mirrored = length_controlled(outcomes, lengths, prompts), length_controlled(1 - outcomes, -lengths, prompts)
    assert equal.rate is not None and equal.low is not None
    assert mirrored.rate == pytest.approx(1 - equal.rate, abs=1e-6)
    assert mirrored.high == pytest.approx(1 - equal.low, abs=1e-6)
    assert mirrored.coefficient == pytest.approx(equal.coefficient, abs=1e-4)


@pytest.mark.parametrize(("games", "win", "tie"), [(20, 0.5, 0.3), (40, 0.85, 0.1), (30, 0.05, 0.9), (60, 0.95, 0.0)])
def test_the_interval_covers(games: int, win: float, tie: float) -> None:
    """95 % intervals of 2,000 simulated studies hold the true rate in 92.5 to 99 % of them."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(games, [win, tie, 1 - win - tie], size=2000)
    distinct, times = np.unique(counts, axis=0, return_counts=True)
    truth = win + tie / 2
    held = sum(n for row, n in zip(distinct, times, strict=True) if _covers(row.tolist(), truth))
    assert 0.925 <= held / 2000 <= 0.995


def _covers(counts: list[int], truth: float) -> bool:
    low, high = trinomial_interval(*counts)
    return low <= truth <= high


def test_clustered_intervals_cover_where_naive_ones_do_not() -> None:
    """40 prompts with 5 games each that nearly always end alike."""
    rng = np.random.default_rng(1)
    prompts, held, naive = np.repeat(np.arange(40), 5).tolist(), 0, 0
    for _ in range(300):
        mood = np.repeat(rng.random(40) < 0.5, 5)
        outcomes = np.where(rng.random(200) < 0.9, mood, ~mood).astype(float)
        clustered, plain = win_rate(outcomes, prompts), win_rate(outcomes)
        held += clustered.low <= 0.5 <= clustered.high
        naive += plain.low <= 0.5 <= plain.high
    assert held / 300 > 0.9
    assert naive / 300 < 0.75


def test_length_control_says_why_there_is_none() -> None:
    assert "every game" in length_controlled([1, 1, 1], [1, 2, 3]).note
    assert "lengths" in length_controlled([1, 0] * 10, [2] * 20).note
    assert "fewer than 20 prompts" in length_controlled([1, 0] * 20, range(40), [i // 3 for i in range(40)]).note
    separated = length_controlled([1] * 15 + [0] * 15, [*range(15, 0, -1), *range(-1, -16, -1)])
    assert separated.rate == pytest.approx(0.5, abs=0.01)  # length alone decides, and the prior keeps it finite
    assert separated.coefficient is not None and 3 < separated.coefficient < 100


def test_a_win_by_length_alone_is_seen() -> None:
    """First answers longer by 100 on average; who is longer tends to win; at equal length nobody is better."""
    rng = np.random.default_rng(4)
    lengths = rng.normal(100, 80, 3000)
    outcomes = (rng.random(3000) < 1 / (1 + np.exp(-2 * np.tanh(lengths / lengths.std())))).astype(float)
    raw, equal = win_rate(outcomes).rate, length_controlled(outcomes, lengths)
    assert raw > 0.7
    assert equal.rate == pytest.approx(0.5, abs=0.05)
    assert equal.low is not None and equal.high is not None and equal.low < 0.5 < equal.high


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no scikit-learn")
def test_length_control_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(9)
    lengths = rng.normal(10, 30, 150)
    outcomes = (rng.random(150) < 0.6 + 0.2 * np.sign(lengths)).astype(float)
    fitted = LogisticRegression(C=wins.LENGTH_PRIOR_SD**2, tol=1e-10, max_iter=1000)
    fitted.fit(np.tanh(lengths / lengths.std())[:, None], outcomes)
    found = length_controlled(outcomes, lengths)
    assert found.rate == pytest.approx(1 / (1 + math.exp(-fitted.intercept_[0])), abs=1e-5)
    assert found.coefficient == pytest.approx(fitted.coef_[0, 0], abs=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: win_rate([]), "at least one"),
        (lambda: win_rate([0.3]), "0 .lost., 1/2"),
        (lambda: win_rate([1, 0], ["p"]), "1 clusters for 2"),
        (lambda: trinomial_interval(-1, 2, 3), "no win rate"),
        (lambda: trinomial_interval(0, 0, 0), "no win rate"),
        (lambda: trinomial_interval(1, 1, 1, 1.0), "confidence"),
        (lambda: trinomial_interval(1, 1, 1, design_effect=0), "design_effect"),
        (lambda: length_controlled([1, 0], [1]), "differences of length"),
        (lambda: length_controlled([2, 0], [1, 2]), "differences of length"),
        (lambda: length_controlled([1, 0], [1, math.nan]), "NaN"),
    ],
)
def test_what_makes_no_sense_is_said(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_design_effect_by_hand() -> None:
    assert design_effect([1.0, 0.0], ["p", "p"]) == 2.0  # one cluster: nothing to compare it with
