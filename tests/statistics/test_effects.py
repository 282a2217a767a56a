"""Standardised differences against hand algebra, a table for 3 to 20 runs, and an independent noncentral t."""

import math
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate, stats

from alignlab.statistics import effects
from alignlab.statistics.effects import Effect, cohens_d, effect, effect_interval, hedges_g
from tests.statistics.mutants import mutated

ROUNDING = 1e-12
TABLE_ROUNDING = 0.0051  # the table gives two decimals
TAIL_TOLERANCE = 1e-7  # of a tail probability, quadrature against the root found

FloatArray = npt.NDArray[np.float64]


def arm(num_runs: int, mean: float) -> FloatArray:
    """Evenly spaced runs with this mean and sample variance 1."""
    steps = np.arange(num_runs) - (num_runs - 1) / 2
    return np.asarray(mean + steps / steps.std(ddof=1), dtype=np.float64)


def check_hand_examples(module: ModuleType) -> None:
    """Two examples by hand, the second with unequal arms so that the weights of the pooled variance matter.

    (2, 4, 6) against (1, 2, 3): means 4 and 2, variances 4 and 1, pooled (2*4 + 2*1)/4 = 5/2, d = 2/sqrt(5/2);
    df 4, J = 1 - 3/15 = 4/5.
    (0, 2) against (5, 6, 7): means 1 and 6, variances 2 and 1, pooled (1*2 + 2*1)/3 = 4/3, d = -5/sqrt(4/3);
    df 3, J = 1 - 3/11 = 8/11.
    """
    for a, b, d, correction in (
        ([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], 2.0 / 2.5**0.5, 4 / 5),
        ([0.0, 2.0], [5.0, 6.0, 7.0], -5.0 / (4 / 3) ** 0.5, 8 / 11),
    ):
        assert module.cohens_d(a, b) == pytest.approx(d, abs=ROUNDING)
        assert module.hedges_g(a, b) == pytest.approx(correction * d, abs=ROUNDING)


def check_interval_table(module: ModuleType) -> None:
    for num_runs, d, low, high in (
        (3, 0.8, -0.93, 2.44),
        (5, 0.8, -0.52, 2.08),
        (10, 0.8, -0.12, 1.70),
        (20, 0.8, 0.15, 1.44),
        (3, 2.0, -0.15, 4.02),
        (5, 2.0, 0.39, 3.53),
        (10, 2.0, 0.89, 3.07),
        (20, 2.0, 1.23, 2.76),
    ):
        interval = module.effect_interval(arm(num_runs, d), arm(num_runs, 0.0))
        assert interval == pytest.approx((low, high), abs=TABLE_ROUNDING), f"{num_runs} runs, d = {d}"


def test_hand_examples() -> None:
    check_hand_examples(effects)


def test_interval_table() -> None:
    check_interval_table(effects)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("first.mean() - second.mean()", "second.mean() - first.mean()"),
        ("first.var(ddof=1)", "first.var()"),
        ("second.var(ddof=1)", "first.var(ddof=1)"),
        ("first.size + second.size - 2)", "first.size + second.size)"),
        ("* first.var(ddof=1) + (second.size - 1)", "* first.var(ddof=1) + (first.size - 1)"),
        ("df = np.size(a) + np.size(b) - 2", "df = np.size(a) + np.size(b)"),
        ("(4.0 * df - 1.0))", "(4.0 * df - 9.0))"),
    ],
)
def test_mutants_of_d_and_g_are_caught(text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check_hand_examples(mutated(effects, text, replacement))


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("math.sqrt(n1 * n2 / (n1 + n2))", "math.sqrt(n1 + n2)"),
        ("n1 + n2 - 2, probability", "n1 + n2 - 1, probability"),
        ("in (tail, 1.0 - tail)", "in (2 * tail, 1.0 - 2 * tail)"),
        ("return low / scale, high / scale", "return low, high"),
    ],
)
def test_mutants_of_the_interval_are_caught(text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check_interval_table(mutated(effects, text, replacement))


@pytest.mark.parametrize(("num_runs", "correction"), [(3, 0.80), (5, 0.90), (10, 0.96)])
def test_small_sample_correction(num_runs: int, correction: float) -> None:
    a, b = arm(num_runs, 1.0), arm(num_runs, 0.0)
    assert hedges_g(a, b) / cohens_d(a, b) == pytest.approx(correction, abs=TABLE_ROUNDING)


@pytest.mark.parametrize("d", [0.0, 0.3, -4.0])
def test_swapping_the_arms_mirrors_everything(d: float) -> None:
    one, other = effect(arm(3, d), arm(5, 0.0)), effect(arm(5, 0.0), arm(3, d))
    assert one.d is not None and one.g is not None and one.low is not None and one.high is not None
    assert (other.d, other.g) == pytest.approx((-one.d, -one.g), abs=ROUNDING)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=TAIL_TOLERANCE)


def test_unit_and_offset_do_not_matter() -> None:
    a, b = np.array([0.61, 0.64, 0.66]), np.array([0.55, 0.60, 0.58])
    assert effect_interval(100.0 * a + 7.0, 100.0 * b + 7.0) == pytest.approx(effect_interval(a, b), abs=TAIL_TOLERANCE)


def upper_tail(t: float, df: int, noncentrality: float) -> float:
    """P(T > t) without scipy's noncentral t: T = (Z + nc) / Y, so the mean of Phi(nc - t Y) over Y = chi / sqrt df."""
    y = np.linspace(0.0, float(stats.chi.isf(1e-14, df)) / math.sqrt(df), 200_001)
    density = stats.chi.pdf(y * math.sqrt(df), df) * math.sqrt(df)
    return float(integrate.simpson(stats.norm.cdf(noncentrality - t * y) * density, x=y))


@pytest.mark.parametrize("num_runs", [2, 3, 10, 60])
@pytest.mark.parametrize("d", [0.0, 0.5, -3.0, 30.0])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_limits_leave_the_stated_tails(num_runs: int, d: float, confidence: float) -> None:
    low, high = effect_interval(arm(num_runs, d), arm(num_runs, 0.0), confidence)
    scale, df = math.sqrt(num_runs / 2), 2 * num_runs - 2
    tail = (1.0 - confidence) / 2.0
    assert upper_tail(d * scale, df, low * scale) == pytest.approx(tail, abs=TAIL_TOLERANCE)
    assert upper_tail(d * scale, df, high * scale) == pytest.approx(1.0 - tail, abs=TAIL_TOLERANCE)


def test_nan_in_the_far_tails_does_not_move_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = effect_interval(arm(10, 0.8), arm(10, 0.0))
    reliable = stats.nct.sf

    def nan_far_out(t: float, df: int, noncentrality: float) -> float:
        return float(reliable(t, df, noncentrality)) if abs(t - noncentrality) < 3.0 else math.nan

    monkeypatch.setattr(stats.nct, "sf", nan_far_out)
    assert effect_interval(arm(10, 0.8), arm(10, 0.0)) == pytest.approx(expected, abs=TAIL_TOLERANCE)


def test_effect_carries_the_functions_and_the_counts() -> None:
    a, b = [2.0, 4.0, 6.0], [1.0, 2.0]
    low, high = effect_interval(a, b, 0.9)
    assert effect(a, b, 0.9) == Effect(d=cohens_d(a, b), g=hedges_g(a, b), low=low, high=high, n1=3, n2=2, note="")


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([1.0], [1.0, 2.0, 3.0], "at least 2 runs"),
        ([1.0, 2.0, 3.0], [1.0], "at least 2 runs"),
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], "no spread"),
        ([0.5, 0.5], [0.5, 0.5], "no spread"),
        ([0.1 + 0.2, 0.3, 0.3], [0.2, 0.2, 0.2], "no spread"),  # a spread of rounding alone would give d of 10^15
    ],
)
def test_undefined_effects_say_why(a: list[float], b: list[float], reason: str) -> None:
    result = effect(a, b)
    assert (result.d, result.g, result.low, result.high) == (None, None, None, None)
    assert (result.n1, result.n2) == (len(a), len(b))
    assert reason in result.note
    for function in (cohens_d, hedges_g, effect_interval):
        with pytest.raises(ValueError, match=reason):
            function(a, b)


def test_one_arm_without_spread_is_enough() -> None:
    """(1, 1) against (0, 2, 4): means 1 and 2, pooled (1*0 + 2*4)/3 = 8/3, d = (1 - 2)/sqrt(8/3)."""
    assert cohens_d([1.0, 1.0], [0.0, 2.0, 4.0]) == pytest.approx(-1.0 / (8 / 3) ** 0.5, abs=ROUNDING)


def test_bad_input_is_refused() -> None:
    for bad in ([1.0, float("nan")], [1.0, float("inf")], [], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="second arm"):
            effect([1.0, 2.0], bad)
    with pytest.raises(ValueError, match="confidence"):
        effect_interval([1.0, 2.0], [0.0, 1.0], 95.0)
