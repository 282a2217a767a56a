"""Two models on the same prompts with the same dice: two evaluations -> the paired difference of every metric.

A difference is the model's number minus the baseline's, sample by sample of the same prompt; its 95 % interval is over
prompts, all the samples of one being a cluster. Numbers of a whole set (corpus BLEU, distinct-n, medians) are compared
by leaving out (or drawing) the same prompts of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignlab.evaluation.measures import Found, Whole
from alignlab.statistics.clustered import (
    bootstrap_interval,
    jackknife_interval,
    mean_interval,
    mean_of_bounds,
    paired_interval,
    paired_proportion,
)
from alignlab.statistics.inference import Interval


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Model minus baseline, in the metric's unit."""

    mean: float
    low: float
    high: float
    completions: int
    """Pairs of completions that both were measured on."""
    prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0, and is one: a width of 0 shows that no spread was seen, not that there is
        none. Of twenty metrics that do not differ, one is expected to."""
        return self.low < self.high and (self.low > 0 or self.high < 0)


def compare(model: Found, baseline: Found, clusters: Sequence[str]) -> dict[str, Difference]:
    """Every metric that both have and that at least two prompts have a number of.

    Args:
        clusters: the prompt of each completion; the same of both.
    """
    found = {}
    for name, values in model.values.items():
        others = baseline.values.get(name)
        if others is None:
            continue
        both = [(v, o, c) for v, o, c in zip(values, others, clusters, strict=True) if v is not None and o is not None]
        if len({c for _, _, c in both}) > 1:
            ours, theirs, here = zip(*both, strict=True)
            found[name] = of_interval(_paired(ours, theirs, here), here)
    for name, whole in model.whole.items():
        other = baseline.whole.get(name)
        if other is None or whole.interval == "none":
            continue
        both_apply = np.flatnonzero(_applies(whole, clusters) & _applies(other, clusters))
        of_both = [clusters[i] for i in both_apply.tolist()]
        if interval := _of_whole(whole, other, both_apply, of_both):
            found[name] = of_interval(interval, of_both)
    return found


def over_tasks(model: Found, baseline: Found, clusters: Sequence[str]) -> Difference | None:
    """The difference of the mean over tasks of each task's mean score; None where a task has only one prompt."""
    scored = [name for name in model.values if name.endswith("/score") and name in baseline.values]
    parts, prompts, any_share = [], set(), False
    for name in scored:
        both = [
            (v, o, c)
            for v, o, c in zip(model.values[name], baseline.values[name], clusters, strict=True)
            if v is not None and o is not None
        ]
        if len({c for _, _, c in both}) < 2:
            return None
        ours, theirs, here = zip(*both, strict=True)
        parts.append(_paired(ours, theirs, here))
        prompts |= set(here)
        any_share |= _is_share(ours, theirs)
    if not parts:
        return None
    of_them = [c for c in clusters if c in prompts]
    return of_interval((mean_of_bounds if any_share else mean_interval)(parts), of_them)


def _paired(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Of a difference of shares a score interval, of any other means a t interval."""
    return (paired_proportion if _is_share(ours, theirs) else paired_interval)(ours, theirs, clusters)


def _is_share(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in (*ours, *theirs))


def _applies(whole: Whole, clusters: Sequence[str]) -> np.ndarray:
    return np.ones(len(clusters), dtype=bool) if whole.applies is None else np.array(whole.applies, dtype=bool)


def _of_whole(ours: Whole, theirs: Whole, places: np.ndarray, clusters: Sequence[str]) -> Interval | None:
    def difference(index: np.ndarray) -> float:
        return ours.statistic(places[index]) - theirs.statistic(places[index])

    if len(set(clusters)) < 2 or not math.isfinite(difference(np.arange(len(clusters)))):
        return None
    try:
        return (bootstrap_interval if ours.interval == "bootstrap" else jackknife_interval)(difference, clusters)
    except ValueError:  # without some prompt there is nothing left to say
        return None


def of_interval(interval: Interval, clusters: Sequence[str]) -> Difference:
    """An interval of differences of completions of these prompts."""
    return Difference(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        completions=len(clusters),
        prompts=len(set(clusters)),
    )
