"""What is measured on a reward model; scores of pairs (P, 2), chosen first → accuracy, calibration, bias, stability.

Pure numbers: no model, no text. Scores are normalised (the reference's standard deviation is 1) but for calibration,
which needs the raw scores that the loss was about: sigmoid(r_chosen - r_rejected).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from alignlab.statistics.aggregates import FloatArray, is_constant
from alignlab.statistics.calibration import (
    Bin,
    calibration_error,
    chance_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from alignlab.statistics.inference import wilson_interval

NUM_BINS = 20
"""Bars of the margin histogram."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often the chosen completion scores higher, a tie counting one half."""

    name: str
    """A task, `task/category`, or `all`."""
    pairs: int
    ties: int
    value: float
    low: float
    """Wilson's 95 % interval, at (wins + ties / 2) of `pairs`: with ties if anything too wide."""
    high: float


def accuracies(margins: FloatArray, groups: Mapping[str, Sequence[int]]) -> tuple[Accuracy, ...]:
    """Of each group of pairs, by their indices into the margins (P,), chosen minus rejected."""
    found = []
    for name, index in groups.items():
        here = margins[list(index)]
        wins, ties = int((here > 0).sum()), int((here == 0).sum())
        right = wins + ties / 2
        low, high = wilson_interval(right, len(here))
        found.append(Accuracy(name=name, pairs=len(here), ties=ties, value=right / len(here), low=low, high=high))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether sigmoid(r_first - r_second) is the share in which the first one wins, on randomly oriented pairs.

    The temperature is fitted on one half of the prompts; everything else is measured on the other half. It is never
    applied to a score: rewards are normalised by their own affine.
    """

    fitted_pairs: int
    held_out_pairs: int
    temperature: float
    """T: margins divided by it are likeliest; above 1 the model is too sure of itself."""
    nll: float
    """Mean negative log-likelihood of the held-out labels, in nats a pair; ln 2 = .693 is a coin."""
    nll_at_temperature: float
    error: float
    """Expected calibration error over 10 bins of equal width."""
    error_at_temperature: float
    error_by_chance: float
    """What a perfectly calibrated model with the same probabilities would have on so few pairs."""
    bins: tuple[Bin, ...]
    bins_at_temperature: tuple[Bin, ...]


def calibration(raw_margins: FloatArray, prompts: npt.NDArray[np.int64], seed: int) -> Calibration:
    """Of raw margins (P,), chosen minus rejected; pairs of one prompt (same number in `prompts`) stay in one half.

    Raises:
        ValueError: the pairs have fewer than two prompts, so that nothing can be held out.
    """
    random = np.random.Generator(np.random.Philox(seed))
    different = np.unique(prompts)
    if len(different) < 2:
        raise ValueError("calibration needs pairs of at least 2 prompts: one half of them is held out")
    fitting = np.isin(prompts, random.permutation(different)[: len(different) // 2])
    turned = random.random(len(raw_margins)) < 0.5
    temperature = fit_temperature(raw_margins[fitting])
    held_out, outcomes = raw_margins[~fitting], ~turned[~fitting]
    oriented = np.where(outcomes, held_out, -held_out)
    stated, cooled = special.expit(oriented), special.expit(oriented / temperature)
    bins, bins_at_temperature = reliability(stated, outcomes), reliability(cooled, outcomes)
    return Calibration(
        fitted_pairs=int(fitting.sum()),
        held_out_pairs=len(held_out),
        temperature=temperature,
        nll=negative_log_likelihood(held_out),
        nll_at_temperature=negative_log_likelihood(held_out, temperature),
        error=calibration_error(bins),
        error_at_temperature=calibration_error(bins_at_temperature),
        error_by_chance=chance_error(stated, seed=seed),
        bins=bins,
        bins_at_temperature=bins_at_temperature,
    )


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Chosen minus rejected, in normalised units: mean, standard deviation, and a histogram."""

    mean: float
    sd: float
    edges: tuple[float, ...]
    """One more than `counts`."""
    counts: tuple[int, ...]


def margin_histogram(margins: FloatArray) -> Margins:
    """Of margins (P,), in about `NUM_BINS` bars of equal width; 0 is an edge, and a tie stands right of it."""
    low, high = min(0.0, float(margins.min())), max(0.0, float(margins.max()))
    width = (high - low) / NUM_BINS or 1.0
    edges = width * np.arange(math.floor(low / width), math.floor(high / width) + 2)
    counts, _ = np.histogram(margins, bins=edges)
    return Margins(
        mean=float(margins.mean()),
        sd=float(margins.std()),
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Two coefficients in [-1, 1]; None where one side does not vary."""

    pearson: float | None
    spearman: float | None

    @property
    def largest(self) -> float:
        """The larger of the two in size; 0 where there is none."""
        return max((x for x in (self.pearson, self.spearman) if x is not None), key=abs, default=0.0)


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """How scores go with the length of completions, in tokens."""

    overall: Correlation
    """Over all completions."""
    within_prompt: Correlation
    """After each prompt's mean is taken from both: longer than its rival, and better than it?"""
    labels_within_prompt: Correlation
    """The same for the labels (chosen 1, rejected 0): how much of it the data ask for."""


def length_bias(scores: FloatArray, lengths: FloatArray, prompts: npt.NDArray[np.int64]) -> LengthBias:
    """Of scores and lengths (P, 2), and the prompt of each pair (P,) by number."""
    labels = np.tile([1.0, 0.0], (len(scores), 1))
    own = np.repeat(prompts, 2)
    centred = {name: _centred(x.ravel(), own) for name, x in (("s", scores), ("l", lengths), ("y", labels))}
    return LengthBias(
        overall=correlation(scores.ravel(), lengths.ravel()),
        within_prompt=correlation(centred["s"], centred["l"]),
        labels_within_prompt=correlation(centred["y"], centred["l"]),
    )


def correlation(a: FloatArray, b: FloatArray) -> Correlation:
    """Of a (n,) and b (n,)."""
    if len(a) < 2 or is_constant(a) or is_constant(b):
        return Correlation(pearson=None, spearman=None)
    return Correlation(pearson=float(stats.pearsonr(a, b)[0]), spearman=float(stats.spearmanr(a, b)[0]))


def _centred(values: FloatArray, groups: npt.NDArray[np.int64]) -> FloatArray:
    """Values (n,) minus the mean of their group; what is left of rounding is 0."""
    _, index = np.unique(groups, return_inverse=True)
    left: FloatArray = values - (np.bincount(index, values) / np.bincount(index))[index]
    left[np.abs(left) <= 1e-12 * np.abs(values).max()] = 0.0
    return left


@dataclass(frozen=True, kw_only=True)
class Invariance:
    """How far scores are from those of the same rows by themselves, in normalised units."""

    rows: int
    tolerance: float
    differences: dict[str, float]
    """Kind of batch -> the largest difference."""

    @property
    def largest(self) -> float:
        return max(self.differences.values())

    @property
    def holds(self) -> bool:
        return self.largest <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Scores of fresh completions by the policy that training started from; their mean is to be 0 and their sd 1."""

    completions: int
    mean: float
    sd: float


def normalisation(scores: FloatArray) -> Normalisation:
    """Of scores (n,), n > 1."""
    return Normalisation(completions=len(scores), mean=float(scores.mean()), sd=float(scores.std(ddof=1)))


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What one kind of small change to the texts does to scores and rankings."""

    completions: int
    """Completions that the perturbation changed; where nothing could be changed, nothing is counted."""
    pairs: int
    """Pairs in which it changed at least one."""
    mean_change: float | None
    """Mean of new minus old score, in normalised units."""
    sd_change: float | None
    variation: float | None
    """sd_change over the sd of the unchanged scores. (Over their mean, as a coefficient of variation is defined, it
    would mean nothing: normalised scores have a mean near 0.)"""
    max_change: float | None
    """The largest |new - old|."""
    flip_rate: float | None
    """Share of pairs whose preference turns round; one that becomes or stops being a tie counts one half."""
    kendall_tau: float | None
    """Kendall's tau-b between the changed completions' old and new ranking."""
    stability: float | None
    """max(0, kendall_tau) * (1 - flip_rate), in [0, 1]: 1 when nothing moves, about 0 when scores are drawn anew."""


def robustness(before: FloatArray, after: FloatArray, changed: npt.NDArray[np.bool_]) -> Robustness:
    """Of scores before and after (P, 2), and which texts changed (P, 2); elsewhere `after` equals `before`."""
    pairs = changed.any(axis=1)
    change = (after - before)[changed]
    old, new = before[pairs, 0] - before[pairs, 1], after[pairs, 0] - after[pairs, 1]
    flips = np.where(old * new < 0, 1.0, np.where((old == 0) != (new == 0), 0.5, 0.0))
    varies = len(change) > 1 and not is_constant(before[changed]) and not is_constant(after[changed])
    tau = float(stats.kendalltau(before[changed], after[changed])[0]) if varies else None
    sd_change = float(change.std(ddof=1)) if len(change) > 1 else None
    flip_rate = float(flips.mean()) if len(flips) else None
    spread = 0.0 if is_constant(before.ravel()) else float(before.std(ddof=1))
    return Robustness(
        completions=len(change),
        pairs=int(pairs.sum()),
        mean_change=float(change.mean()) if len(change) else None,
        sd_change=sd_change,
        variation=sd_change / spread if sd_change is not None and spread else None,
        max_change=float(np.abs(change).max()) if len(change) else None,
        flip_rate=flip_rate,
        kendall_tau=tau,
        stability=max(0.0, tau) * (1 - flip_rate) if tau is not None and flip_rate is not None else None,
    )
