"""Intervals and verdicts against hand algebra and t tables, and their coverage by simulation."""

import math
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from alignlab.statistics import inference
from alignlab.statistics.inference import (
    NO_SPREAD,
    ONE_RUN,
    Interval,
    Verdict,
    crossed_interval,
    permutation_floor,
    prompt_interval,
    seeds_all_above,
    verdict,
    wilson_interval,
)
from tests.statistics.mutants import mutated

ROUNDING = 1e-12
T_TABLE_ROUNDING = 1e-4  # t quantiles to five decimals, times standard errors below 3
WILSON_ROUNDING = 5.1e-4  # three decimals
FLOOR_ROUNDING = 1e-4

# Student's t, 97.5 % quantiles at 1 and 2 degrees of freedom; and the 95 % quantile at 2.
T_1, T_2, T_2_OF_90 = 12.70620, 4.30265, 2.91999

# The method's coverage at .95 was found within this band; a simulation of NUM_STUDIES adds three Monte-Carlo sd.
COVERAGE_BAND = (0.93, 0.97)
NUM_STUDIES = 4000
MONTE_CARLO = 3.0 * math.sqrt(0.95 * 0.05 / NUM_STUDIES)
PROMPT_CLUSTERS_COVER_AT_MOST = 0.70

BOTH_TERMS = [[0.0, 1.0, 5.0], [2.0, 7.0, 9.0]]
SEEDS_ALONE = [[0.0, 4.0, 2.0], [6.0, 4.0, 8.0]]
PROMPTS_ALONE = [[2.0, 0.0, 7.0], [0.0, 8.0, 7.0]]

FloatArray = npt.NDArray[np.float64]


def check_crossed(module: ModuleType) -> None:
    """Three 2 x 3 matrices by hand, with mean 4, one for each term that can be the maximum.

    BOTH_TERMS, rows (0, 1, 5) and (2, 7, 9): row means 2, 6; column means 1, 4, 7.
        MS_s = 3 (4 + 4) / 1 = 24, MS_p = 2 (9 + 0 + 9) / 2 = 18; residuals row 1: 0-2-1+4 = 1, 1-2-4+4 = -1,
        5-2-7+4 = 0, row 2 the negatives: MS_e = 4 / 2 = 2. Sum 24 + 18 - 2 = 40 is the largest:
        Var = 40 / 6, df = 40^2 / (24^2/1 + 18^2/2 + 2^2/2) = 1600 / 740.
    SEEDS_ALONE, rows (0, 4, 2) and (6, 4, 8): row means 2, 6; column means 3, 4, 5.
        MS_s = 24, MS_p = 2 (1 + 0 + 1) / 2 = 2; residuals row 1: -1, 2, -1: MS_e = 12 / 2 = 6.
        Sum 24 + 2 - 6 = 20 < 24: Var = 24 / 6 = 4, df = 1.
    PROMPTS_ALONE, rows (2, 0, 7) and (0, 8, 7): row means 3, 5; column means 1, 4, 7.
        MS_s = 3 (1 + 1) / 1 = 6, MS_p = 18; residuals row 1: 2, -3, 1: MS_e = 28 / 2 = 14.
        Sum 6 + 18 - 14 = 10 < 18: Var = 18 / 6 = 3, df = 2.
    """
    both = module.crossed_interval(BOTH_TERMS)
    assert both.mean == pytest.approx(4.0, abs=ROUNDING)
    assert both.standard_error == pytest.approx(math.sqrt(40 / 6), abs=ROUNDING)
    assert both.df == pytest.approx(80 / 37, abs=ROUNDING)
    half = float(stats.t.ppf(0.975, 80 / 37)) * math.sqrt(40 / 6)
    assert (both.low, both.high) == pytest.approx((4 - half, 4 + half), abs=ROUNDING)

    seeds = module.crossed_interval(SEEDS_ALONE)
    assert (seeds.mean, seeds.standard_error, seeds.df) == pytest.approx((4.0, 2.0, 1.0), abs=ROUNDING)
    assert (seeds.low, seeds.high) == pytest.approx((4 - 2 * T_1, 4 + 2 * T_1), abs=T_TABLE_ROUNDING)

    prompts = module.crossed_interval(PROMPTS_ALONE)
    assert (prompts.mean, prompts.standard_error, prompts.df) == pytest.approx((4.0, 3**0.5, 2.0), abs=ROUNDING)
    assert (prompts.low, prompts.high) == pytest.approx((4 - T_2 * 3**0.5, 4 + T_2 * 3**0.5), abs=T_TABLE_ROUNDING)


def test_crossed_interval_by_hand() -> None:
    check_crossed(inference)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("seed_square + prompt_square - error_square", "seed_square + prompt_square + error_square"),
        ("seed_square + prompt_square - error_square", "seed_square + prompt_square"),
        ("max(total, seed_square, prompt_square)", "total"),
        ("max(total, seed_square, prompt_square)", "max(total, seed_square)"),
        ("max(total, seed_square, prompt_square)", "max(total, prompt_square)"),
        ("df = float(seed_df)", "df = float(prompt_df)"),
        ("df = float(prompt_df)", "df = float(seed_df)"),
        ("+ error_square**2 /", "- error_square**2 /"),
        ("(seed_df * prompt_df)", "(seed_df + prompt_df)"),
        ("math.sqrt(largest / array.size)", "math.sqrt(largest) / array.size"),
        ("num_prompts * float(seed_means.var(ddof=1))", "num_seeds * float(seed_means.var(ddof=1))"),
        ("num_seeds * float(prompt_means.var(ddof=1))", "num_prompts * float(prompt_means.var(ddof=1))"),
        ("prompt_means.var(ddof=1)", "prompt_means.var()"),
        ("prompt_means + array.mean()", "prompt_means - array.mean()"),
        ("((num_seeds - 1) * (num_prompts - 1))", "array.size"),
        ("low=mean - half", "low=mean + half"),
        ("stats.t.isf(tail_probability(confidence), df)", "stats.norm.isf(tail_probability(confidence))"),
    ],
)
def test_mutants_of_the_crossed_interval_are_caught(text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check_crossed(mutated(inference, text, replacement))


def test_ordinary_intervals_carry_no_note_and_their_confidence() -> None:
    assert crossed_interval(BOTH_TERMS).note == ""
    assert crossed_interval(BOTH_TERMS).confidence == 0.95
    assert crossed_interval(BOTH_TERMS, 0.9).confidence == 0.9


def test_order_of_seeds_and_prompts_and_sign() -> None:
    array = np.array(BOTH_TERMS)
    one, shuffled, negated = (crossed_interval(a) for a in (array, array[::-1, [2, 0, 1]], -array))
    limits = (one.low, one.high, one.df)
    assert (shuffled.low, shuffled.high, shuffled.df) == pytest.approx(limits, abs=ROUNDING)
    assert (-negated.high, -negated.low, negated.df) == pytest.approx(limits, abs=ROUNDING)


def test_identical_seeds_count_once() -> None:
    """MS_s = MS_e = 0: what is left is the t interval over prompts, as narrow as one seed's and no narrower."""
    one = prompt_interval([1.0, 2.0, 6.0])
    three = crossed_interval([[1.0, 2.0, 6.0]] * 3)
    assert (three.low, three.high, three.df) == pytest.approx((one.low, one.high, one.df), abs=ROUNDING)


def test_prompt_interval_by_hand() -> None:
    """(1, 2, 3): mean 2, sd 1, standard error 1/sqrt 3, df 2."""
    for confidence, quantile in ((0.95, T_2), (0.90, T_2_OF_90)):
        interval = prompt_interval([1.0, 2.0, 3.0], confidence)
        assert (interval.mean, interval.df) == (2.0, 2.0)
        assert interval.standard_error == pytest.approx(3**-0.5, abs=ROUNDING)
        half = quantile * 3**-0.5
        assert (interval.low, interval.high) == pytest.approx((2 - half, 2 + half), abs=T_TABLE_ROUNDING)
        assert interval.note == ONE_RUN


def test_one_seed_is_an_interval_over_prompts_that_says_so() -> None:
    interval = crossed_interval([[1.0, 2.0, 3.0]], 0.9)
    assert interval == prompt_interval([1.0, 2.0, 3.0], 0.9)
    assert "over prompts only" in interval.note


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_equal_differences_have_width_zero_and_a_note(value: float) -> None:
    several, one = crossed_interval(np.full((3, 4), value)), prompt_interval(np.full(4, value))
    for interval in (several, one):
        assert (interval.mean, interval.low, interval.high, interval.standard_error) == (value, value, value, 0.0)
        assert NO_SPREAD in interval.note
    assert ONE_RUN in one.note
    assert (several.df, one.df) == (2.0, 3.0)


def test_bad_differences_are_refused() -> None:
    for bad, message in (
        ([[1.0, float("nan")], [1.0, 2.0]], "1 NaN"),
        ([[1.0, float("inf")]], "infinite"),
        ([1.0, 2.0], "shape"),
        ([[1.0], [2.0]], "at least 2"),
        ([[1.0]], "at least 2"),
        (np.zeros((0, 3)), "at least one value"),
    ):
        with pytest.raises(ValueError, match=message):
            crossed_interval(bad)
    with pytest.raises(ValueError, match="at least 2"):
        prompt_interval([1.0])
    with pytest.raises(ValueError, match="confidence"):
        crossed_interval(BOTH_TERMS, 95.0)


def interval(low: float, high: float, confidence: float = 0.95) -> Interval:
    return Interval(
        mean=(low + high) / 2, low=low, high=high, standard_error=1.0, df=2.0, confidence=confidence, note=""
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.2, "better"),
        (-0.2, -0.01, "worse"),
        (-0.1, 0.2, "inconclusive"),
        (0.0, 0.2, "inconclusive"),
        (-0.2, 0.0, "inconclusive"),
        (0.0, 0.0, "inconclusive"),
        (1.0, 1.0, "inconclusive"),  # two prompts that agree: no spread was seen to judge by
        (-0.5, -0.5, "inconclusive"),
    ],
)
def test_verdict_without_a_margin(low: float, high: float, expected: Verdict) -> None:
    assert verdict(interval(low, high)) == expected


@pytest.mark.parametrize(
    ("limits", "limits_90", "expected"),
    [
        ((-0.06, 0.04), (-0.04, 0.03), "equivalent"),  # only the 90 % interval must lie inside
        ((-0.06, 0.04), (-0.05, 0.03), "inconclusive"),  # the margin itself is outside
        ((-0.03, 0.06), (-0.02, 0.05), "inconclusive"),
        ((-0.20, 0.30), (-0.10, 0.20), "inconclusive"),
        ((0.01, 0.04), (0.02, 0.03), "equivalent"),  # above 0, and too small to matter
        ((-0.04, -0.01), (-0.03, -0.02), "equivalent"),
        ((0.0, 0.0), (0.0, 0.0), "inconclusive"),
        ((0.01, 0.09), (0.02, 0.08), "better"),
        ((-0.09, -0.01), (-0.08, -0.02), "worse"),
    ],
)
def test_verdict_with_a_margin(limits: tuple[float, float], limits_90: tuple[float, float], expected: Verdict) -> None:
    assert verdict(interval(*limits), 0.05, interval(*limits_90, confidence=0.90)) == expected


def test_a_margin_needs_its_own_interval_and_a_size() -> None:
    with pytest.raises(ValueError, match="interval_90"):
        verdict(interval(0.0, 0.1), 0.05)
    with pytest.raises(ValueError, match="interval_90"):
        verdict(interval(0.0, 0.1), 0.05, interval(0.0, 0.1))
    for margin in (0.0, -0.05, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            verdict(interval(0.0, 0.1), margin, interval(0.0, 0.1, 0.90))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([[0.3, -0.1], [0.1, 0.0]], True),
        ([[0.9, 0.9], [0.1, -0.2]], False),  # the mean of all is above 0, one seed is not
        ([[0.5, 0.5], [0.0, 0.0]], False),
        ([[0.3, -0.2, -0.1], [1.0, 1.0, 1.0]], False),  # sums to 0 but for rounding
        ([[0.1]], True),
    ],
)
def test_seeds_all_above(differences: list[list[float]], expected: bool) -> None:
    assert seeds_all_above(differences) is expected


@pytest.mark.parametrize(
    ("num_seeds", "paired", "floor"),
    [(3, True, 0.25), (3, False, 0.10), (5, True, 0.0625), (5, False, 2 / 252), (1, True, 1.0), (1, False, 1.0)],
)
def test_permutation_floor(num_seeds: int, paired: bool, floor: float) -> None:
    assert permutation_floor(num_seeds, paired) == pytest.approx(floor, abs=FLOOR_ROUNDING)


def test_no_seeds_have_no_floor() -> None:
    with pytest.raises(ValueError, match="at least 1 seed"):
        permutation_floor(0, paired=True)


def check_wilson(module: ModuleType) -> None:
    """Also 1 of 2 at z = 1.96: centre 1/2, half width z sqrt(1/8 + z^2/16) / (1 + z^2/2) = .4055."""
    assert module.wilson_interval(195, 300) == pytest.approx((0.594, 0.702), abs=WILSON_ROUNDING)
    assert module.wilson_interval(0, 300) == pytest.approx((0.0, 0.0126), abs=WILSON_ROUNDING)
    assert module.wilson_interval(1, 2) == pytest.approx((0.0945, 0.9055), abs=WILSON_ROUNDING)


def test_wilson_by_hand() -> None:
    check_wilson(inference)


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("centre = rate + z**2 / (2 * trials)", "centre = rate"),
        ("rate * (1.0 - rate) / trials + z**2", "rate * (1.0 - rate) / trials + 0 * z**2"),  # Wald's half width
        ("(1.0 + z**2 / trials)", "1.0"),
        ("rate * (1.0 - rate) / trials", "rate / trials"),
    ],
)
def test_mutants_of_wilson_are_caught(text: str, replacement: str) -> None:
    with pytest.raises(AssertionError):
        check_wilson(mutated(inference, text, replacement))


@pytest.mark.parametrize("trials", [1, 3, 300])
def test_wilson_ends_are_exact_and_mirrored(trials: int) -> None:
    none, every = wilson_interval(0, trials), wilson_interval(trials, trials)
    assert none[0] == 0.0
    assert every[1] == 1.0
    assert every[0] == pytest.approx(1.0 - none[1], abs=ROUNDING)
    assert none[1] > 0.0


def test_wilson_counts_a_tie_one_half() -> None:
    """60 wins and 10 ties of 100 are 65: z = 1.96, centre (.65 + .01921) / 1.03842, half width .09198 (by hand)."""
    assert wilson_interval(65.0, 100) == pytest.approx((0.6445 - 0.0920, 0.6445 + 0.0920), abs=WILSON_ROUNDING)
    assert wilson_interval(0.5, 1) == pytest.approx((0.0546, 0.9454), abs=WILSON_ROUNDING)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(successes, trials)


def studies(num_seeds: int, seed_sd: float, prompt_sd: float, error_sd: float) -> FloatArray:
    """(NUM_STUDIES, S, 40) differences of studies in which the arms do not differ."""
    rng = np.random.default_rng([num_seeds, *(round(100 * sd) for sd in (seed_sd, prompt_sd, error_sd))])
    seeds = seed_sd * rng.standard_normal((NUM_STUDIES, num_seeds, 1))
    prompts = prompt_sd * rng.standard_normal((NUM_STUDIES, 1, 40))
    return np.asarray(seeds + prompts + error_sd * rng.standard_normal((NUM_STUDIES, num_seeds, 40)))


def covers_zero(result: Interval) -> bool:
    return result.low <= 0.0 <= result.high


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize(
    ("seed_sd", "prompt_sd", "error_sd"),
    [(1.0, 0.1, 0.3), (0.05, 1.0, 0.3), (0.15, 1.0, 1.0), (0.2, 1.0, 0.3)],
    ids=["seeds dominate", "prompts dominate", "both, noisy", "both"],
)
def test_coverage(num_seeds: int, seed_sd: float, prompt_sd: float, error_sd: float) -> None:
    covered = np.mean([covers_zero(crossed_interval(d)) for d in studies(num_seeds, seed_sd, prompt_sd, error_sd)])
    assert COVERAGE_BAND[0] - MONTE_CARLO <= covered <= COVERAGE_BAND[1] + MONTE_CARLO


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_clustering_by_prompt_alone_is_no_substitute(num_seeds: int) -> None:
    """The negative control: averaging the seeds away first treats them as all the seeds there could be."""
    covered = np.mean([covers_zero(prompt_interval(d.mean(axis=0))) for d in studies(num_seeds, 1.0, 0.1, 0.3)])
    assert covered < PROMPT_CLUSTERS_COVER_AT_MOST
