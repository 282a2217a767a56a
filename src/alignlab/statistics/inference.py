"""What may be concluded about a gain from few seeds and many prompts; differences (S, P) → `Interval` → `Verdict`.

The crossed model: D[s, p] = mu + seed_s + prompt_p + error_sp, where D is one arm minus its comparison on the same
prompt (and, between two trained arms, the same seed). All statements are conditional on whatever the runs share: the
SFT checkpoint and the reward model they start from.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy.typing as npt
from scipy import stats

from alignlab.statistics.aggregates import RELATIVE_ROUNDING, FloatArray, finite_array, is_constant, tail_probability

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]

EQUIVALENCE_CONFIDENCE = 0.90  # two one-sided tests at .05 each are one 90 % interval

ONE_RUN = "one run: the interval is over prompts only and does not say what another seed would give"
NO_SPREAD = "all differences are equal: the width of 0 shows that no spread was seen, not that there is none"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean difference with its t interval, all in the unit of the differences."""

    mean: float
    low: float
    high: float
    standard_error: float
    df: float
    """Degrees of freedom of the t distribution; about S - 1 where seeds dominate, P - 1 where prompts do."""
    confidence: float
    note: str = ""
    """What a reader must know to not over-read the interval; empty in the ordinary case."""


def crossed_interval(differences: npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """t interval of the mean of `differences` (S seeds, P prompts), over new seeds and new prompts.

    With the mean squares of the two-way layout without replication,

        Var(mean) = max(MS_s + MS_p - MS_e, MS_s, MS_p) / (S P)

    and degrees of freedom S - 1 or P - 1 where MS_s or MS_p alone is the maximum, else Satterthwaite's for the sum
    (Biometrics 1946). Simulated coverage at .95: .93 to .98 from 3 seeds on, down to .89 at 2. Clustering by prompt
    alone would treat the S runs as all the runs there could be. One seed leaves nothing to estimate MS_s from: the
    result is then `prompt_interval`, and its note says so.

    Raises:
        ValueError: no matrix, fewer than 2 prompts, NaN or infinity, or a confidence outside (0, 1).
    """
    array = finite_array(differences, name="differences (seeds x prompts)", ndim=2)
    num_seeds, num_prompts = array.shape
    if num_seeds == 1:
        return prompt_interval(array[0], confidence)
    _at_least_two_prompts(num_prompts)
    if is_constant(array):
        df = float(min(num_seeds, num_prompts) - 1)
        return t_interval(float(array.flat[0]), 0.0, df, confidence, note=NO_SPREAD)
    seed_square, prompt_square, error_square = _mean_squares(array)
    seed_df, prompt_df = num_seeds - 1, num_prompts - 1
    total = seed_square + prompt_square - error_square
    largest = max(total, seed_square, prompt_square)
    if largest == seed_square:
        df = float(seed_df)
    elif largest == prompt_square:
        df = float(prompt_df)
    else:
        df = total**2 / (
            seed_square**2 / seed_df + prompt_square**2 / prompt_df + error_square**2 / (seed_df * prompt_df)
        )
    return t_interval(float(array.mean()), math.sqrt(largest / array.size), df, confidence)


def prompt_interval(differences: npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """t interval of the mean of one run's `differences` (P,), over new prompts; its note says that this is all.

    For the SFT model against the untrained one, and for arms with a single seed. Same errors as `crossed_interval`.
    """
    array = finite_array(differences, name="differences (prompts)", ndim=1)
    _at_least_two_prompts(array.size)
    df = float(array.size - 1)
    if is_constant(array):
        return t_interval(float(array[0]), 0.0, df, confidence, note=f"{ONE_RUN}; {NO_SPREAD}")
    standard_error = float(array.std(ddof=1)) / math.sqrt(array.size)
    return t_interval(float(array.mean()), standard_error, df, confidence, note=ONE_RUN)


def verdict(
    interval: Interval, equivalence_margin: float | None = None, interval_90: Interval | None = None
) -> Verdict:
    """One word for an interval of "arm minus comparison" where more is better.

    In this order: `inconclusive` for an interval of width 0, which has seen no spread to judge by; `equivalent` where a
    margin was declared and the whole 90 % interval lies strictly inside (-margin, margin) (two one-sided tests at .05,
    Schuirmann 1987); `better` where low > 0; `worse` where high < 0; else `inconclusive`. Equivalence comes before
    these because the margin, declared before the runs, says which differences do not matter: a gain shown to be that
    small is not sold as a win. This order can only make `better` and `worse` rarer, so all error rates hold. A margin
    chosen after seeing the results makes the word worthless.

    Raises:
        ValueError: a margin that is not positive, or one without the 90 % interval of the same differences.
    """
    matters = True
    if equivalence_margin is not None:
        if not 0.0 < equivalence_margin < math.inf:
            raise ValueError(f"equivalence_margin is {equivalence_margin}, but must be positive and finite, or None")
        if interval_90 is None or not math.isclose(interval_90.confidence, EQUIVALENCE_CONFIDENCE):
            raise ValueError("an equivalence_margin needs interval_90: pass crossed_interval(differences, 0.90)")
        matters = not -equivalence_margin < interval_90.low <= interval_90.high < equivalence_margin
    if interval.low == interval.high:
        return "inconclusive"
    if not matters:
        return "equivalent"
    if interval.low > 0.0:
        return "better"
    return "worse" if interval.high < 0.0 else "inconclusive"


def seeds_all_above(differences: npt.ArrayLike) -> bool:
    """Whether every seed's mean over the prompts of `differences` (S, P) is above 0; a tie up to rounding is not."""
    array = finite_array(differences, name="differences (seeds x prompts)", ndim=2)
    return bool((array.mean(axis=1) > RELATIVE_ROUNDING * abs(array).max()).all())


def permutation_floor(num_seeds: int, paired: bool) -> float:
    """Smallest two-sided p that an exact permutation test can reach with this many seeds in each arm.

    Paired by seed (sign flips): 2 / 2^S, .25 at 3. Unpaired (relabelling): 2 / C(2S, S), .10 at 3.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds is {num_seeds}, but a permutation test needs at least 1 seed an arm")
    return 2.0 / (2**num_seeds if paired else math.comb(2 * num_seeds, num_seeds))


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), in [0, 1]; never of width 0, also at 0 or all successes.

    For independent outcomes: several samples a prompt break it (`clustered_proportion` is for those). A tie counted as
    half a success varies less than a win or a loss of the same mean, so with ties the interval is, if anything, too
    wide.

    Raises:
        ValueError: no trials, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes:g} successes of {trials} trials is no proportion: give 0 <= successes <= trials, trials >= 1"
        )
    return score_interval(successes / trials, trials, float(stats.norm.isf(tail_probability(confidence))))


def score_interval(rate: float, trials: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a `rate` seen in `trials` (> 0, no whole number needed), z standard errors to each side."""
    centre = rate + z**2 / (2 * trials)
    half = z * math.sqrt(rate * (1.0 - rate) / trials + z**2 / (4 * trials**2))
    low, high = ((centre + side * half) / (1.0 + z**2 / trials) for side in (-1.0, 1.0))
    # The formula gives exactly 0 and 1 at the ends; rounding does not.
    return (0.0 if rate == 0 else low), (1.0 if rate == 1 else high)


def _mean_squares(array: FloatArray) -> tuple[float, float, float]:
    """(MS_s, MS_p, MS_e) of `array` (S, P) >= 2 x 2: the two-way layout without replication."""
    num_seeds, num_prompts = array.shape
    seed_means = array.mean(axis=1, keepdims=True)  # (S, 1)
    prompt_means = array.mean(axis=0, keepdims=True)  # (1, P)
    residual = array - seed_means - prompt_means + array.mean()
    return (
        num_prompts * float(seed_means.var(ddof=1)),
        num_seeds * float(prompt_means.var(ddof=1)),
        float((residual**2).sum()) / ((num_seeds - 1) * (num_prompts - 1)),
    )


def t_interval(mean: float, standard_error: float, df: float, confidence: float, note: str = "") -> Interval:
    """mean -+ Student's quantile x standard error."""
    half = float(stats.t.isf(tail_probability(confidence), df)) * standard_error
    return Interval(
        mean=mean,
        low=mean - half,
        high=mean + half,
        standard_error=standard_error,
        df=float(df),
        confidence=confidence,
        note=note,
    )


def _at_least_two_prompts(num_prompts: int) -> None:
    if num_prompts < 2:
        raise ValueError(f"differences cover {num_prompts} prompt, but an interval over prompts needs at least 2")
