"""Win rates with ties, and at equal length; outcomes (n,) of games in {0, 1/2, 1} → rates with intervals.

A game is one prompt answered by two systems; 1 = the first won, 1/2 = a tie. Several games of one prompt are no
independent evidence, so every interval takes `clusters` (n,), the prompt of each game.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from alignlab.statistics.aggregates import FloatArray, finite_array, tail_probability
from alignlab.statistics.agreement import IntArray, mcnemar_exact
from alignlab.statistics.inference import wilson_interval

FEWEST_FOR_LENGTH = 20
"""Prompts below which no win rate at equal length is given: its interval would promise more than it holds."""
LENGTH_PRIOR_SD = 10.0
"""Standard deviation of the prior on the length coefficient, in logits; it only keeps a separated fit finite."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often the first system wins, in [0, 1], with ties as halves and without them."""

    games: int
    prompts: int
    wins: int
    ties: int
    losses: int
    rate: float
    """(wins + ties / 2) / games."""
    low: float
    high: float
    decisive_rate: float | None
    """wins / (wins + losses); None where every game is a tie."""
    decisive_low: float | None
    decisive_high: float | None
    p: float | None
    """Exact sign test of wins against losses; None where a prompt has several games, which it would take as many."""
    design_effect: float
    """By how much repeated prompts inflate the variance; the intervals count games / design_effect games."""


def win_rate(outcomes: npt.ArrayLike, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95) -> WinRate:
    """The win rate of `outcomes` (n,) with a score interval of the trinomial, and of the decisive games with Wilson's.

    Raises:
        ValueError: no games, an outcome that is not 0, 1/2 or 1, or not one cluster for each.
    """
    array = finite_array(outcomes, name="outcomes", ndim=1)
    if not np.isin(array, (0.0, 0.5, 1.0)).all():
        raise ValueError("outcomes of games are 0 (lost), 1/2 (tie) or 1 (won)")
    group = _cluster_codes(clusters, array.size)
    effect = design_effect(array, group)
    wins, ties, losses = (int((array == value).sum()) for value in (1.0, 0.5, 0.0))
    low, high = trinomial_interval(wins, ties, losses, confidence, effect)
    decisive = array != 0.5
    decided: tuple[float, float] | None = None
    if decisive.any():
        inflation = design_effect(array[decisive], _cluster_codes(group[decisive].tolist(), int(decisive.sum())))
        decided = _wilson(wins / (wins + losses), (wins + losses) / inflation, confidence)
    repeated = int(group.max()) + 1 < array.size
    return WinRate(
        games=array.size,
        prompts=int(group.max()) + 1,
        wins=wins,
        ties=ties,
        losses=losses,
        rate=(wins + ties / 2) / array.size,
        low=low,
        high=high,
        decisive_rate=wins / (wins + losses) if decided else None,
        decisive_low=decided[0] if decided else None,
        decisive_high=decided[1] if decided else None,
        p=None if repeated else mcnemar_exact(wins, losses),
        design_effect=effect,
    )


def trinomial_interval(
    wins: float, ties: float, losses: float, confidence: float = 0.95, design_effect: float = 1.0
) -> tuple[float, float]:
    """Score interval of the rate (wins + ties / 2) / n, in [0, 1]; never of width 0.

    With D = 2 rate - 1 the limits solve |wins - losses - n D| = z sqrt(n (2 q + D (1 - D))), q being the likeliest
    share of losses given D (Tango 1998, where it is the difference of paired proportions). Without ties it is Wilson's.
    Where all n games are ties, D still ranges over +- z^2 / (n + z^2).

    Args:
        design_effect: factor on the variance for games that are not independent.

    Raises:
        ValueError: a negative count, no games, or a design effect that is not positive.
    """
    if min(wins, ties, losses) < 0 or wins + ties + losses <= 0 or not 0 < design_effect < math.inf:
        raise ValueError(f"{wins:g} wins, {ties:g} ties and {losses:g} losses with {design_effect=} make no win rate")
    z = float(stats.norm.isf(tail_probability(confidence)))
    b, c, n = (count / design_effect for count in (wins, losses, wins + ties + losses))
    observed = (b - c) / n

    def excess(difference: float, side: float) -> float:
        linear = difference * (2 * n - b + c) - (b + c)
        root = math.sqrt(max(0.0, linear**2 + 8 * n * c * difference * (1 - difference)))
        q = min(max((root - linear) / (4 * n), 0.0, -difference), (1 - difference) / 2)
        variance = n * (2 * q + difference * (1 - difference))
        return b - c - n * difference - side * z * math.sqrt(max(0.0, variance))

    off = 1e-9  # beside the observed difference, where variance 0 makes a root of its own
    low = -1.0 if observed - off <= -1 else optimize.brentq(excess, -1.0, observed - off, args=(1.0,), xtol=1e-12)
    high = 1.0 if observed + off >= 1 else optimize.brentq(excess, observed + off, 1.0, args=(-1.0,), xtol=1e-12)
    return (1.0 + float(low)) / 2, (1.0 + float(high)) / 2


def design_effect(values: npt.ArrayLike, clusters: Sequence[Hashable] | IntArray) -> float:
    """Variance of the mean of `values` (n,) with clusters over that without, at least 1.

    Where the values have no spread to see this in, a cluster counts once: n / clusters.
    """
    array = finite_array(values, name="values", ndim=1)
    group = _cluster_codes([*clusters], array.size)
    number = int(group.max()) + 1
    centred = array - array.mean()
    plain = float((centred**2).sum()) * array.size / max(array.size - 1, 1)
    if number == array.size:
        return 1.0
    if plain <= 1e-15 or number == 1:
        return array.size / number
    clustered = float((np.bincount(group, centred) ** 2).sum()) * number / (number - 1)
    return max(1.0, clustered / plain)


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """The win rate at equal length, or why there is none."""

    rate: float | None
    low: float | None
    high: float | None
    coefficient: float | None
    """Logits that a longer answer (by very much) gains; positive = length wins."""
    note: str = ""


def length_controlled(
    outcomes: npt.ArrayLike,
    differences: npt.ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> LengthControlled:
    """The win rate that is left when both answers are of one length, after AlpacaEval 2 (arXiv:2404.04475).

        P(first wins) = sigmoid(theta + phi tanh(d / sd(d)))        rate = sigmoid(theta)

    with d the length of the first answer minus that of the second; a tie counts as half a win. Left out of AlpacaEval's
    model is how hard a prompt is, which takes a leaderboard of systems to know. The interval is theta's, from the
    variance that stays right under clustering (Liang & Zeger 1986).

    Raises:
        ValueError: shapes that differ, an outcome outside [0, 1], or a number that is not finite.
    """
    won = finite_array(outcomes, name="outcomes", ndim=1)
    longer = finite_array(differences, name="differences of length", ndim=1)
    if won.shape != longer.shape or won.min() < 0 or won.max() > 1:
        raise ValueError(f"{won.size} outcomes in [0, 1] and as many differences of length are needed")
    group, rate = _cluster_codes(clusters, won.size), float(won.mean())
    none = LengthControlled(rate=None, low=None, high=None, coefficient=None)
    if rate in (0.0, 1.0):
        return _noted(none, "one system won every game, at any length")
    spread = float(longer.std())
    if int(group.max()) + 1 < FEWEST_FOR_LENGTH:
        return _noted(none, f"fewer than {FEWEST_FOR_LENGTH} prompts")
    if spread == 0.0:
        return _noted(none, "the lengths always differ by the same")
    features = np.stack([np.ones(won.size), np.tanh(longer / spread)], 1)  # (n, 2)
    penalty = np.diag([0.0, LENGTH_PRIOR_SD**-2])
    beta = _logistic(features, won, penalty)
    stated = special.expit(features @ beta)
    bread = np.linalg.inv((features * (stated * (1 - stated))[:, None]).T @ features + penalty)
    scores = np.stack([np.bincount(group, column) for column in (features * (won - stated)[:, None]).T], 1)
    number = len(scores)
    variance = bread @ (scores.T @ scores) @ bread * number / (number - 1)
    half = float(stats.t.isf(tail_probability(confidence), number - 1)) * math.sqrt(variance[0, 0])
    return LengthControlled(
        rate=float(special.expit(beta[0])),
        low=float(special.expit(beta[0] - half)),
        high=float(special.expit(beta[0] + half)),
        coefficient=float(beta[1]),
    )


def _logistic(features: FloatArray, won: FloatArray, penalty: FloatArray) -> FloatArray:
    """The coefficients (2,) of a logistic regression with a quadratic penalty."""

    def cost(beta: FloatArray) -> tuple[float, FloatArray]:
        margin = features @ beta
        value = float((np.logaddexp(0.0, margin) - won * margin).sum()) + float(beta @ penalty @ beta) / 2
        return value, features.T @ (special.expit(margin) - won) + penalty @ beta

    found = optimize.minimize(cost, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9})
    return np.asarray(found.x, dtype=np.float64)


def _noted(found: LengthControlled, note: str) -> LengthControlled:
    return LengthControlled(rate=found.rate, low=found.low, high=found.high, coefficient=found.coefficient, note=note)


def _wilson(rate: float, trials: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a rate seen in a number of trials that need not be whole."""
    whole = math.ceil(trials)
    if whole == trials:
        return wilson_interval(rate * whole, whole, confidence)
    z2 = float(stats.norm.isf(tail_probability(confidence))) ** 2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def _cluster_codes(clusters: Sequence[Hashable] | None, size: int) -> IntArray:
    """(n,) the number of each game's cluster, from 0; every game its own where none are given."""
    if clusters is None:
        return np.arange(size)
    if len(clusters) != size:
        raise ValueError(f"{len(clusters)} clusters for {size} games: one each is needed")
    code: dict[Hashable, int] = {}
    return np.array([code.setdefault(cluster, len(code)) for cluster in clusters])
