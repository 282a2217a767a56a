"""Measures of completions, one file each: answers -> a number for each, or for all together -> estimates.

`measures/rouge.py` holds `MEASURE` and is asked for by its file name (`evaluation.measures: [rouge]`). What its package
or its prompts lack is said before anything is sampled. Every estimate has a 95 % interval over prompts: all the samples
of a prompt are one cluster.
"""

from __future__ import annotations

import importlib.util
import math
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal

import numpy as np

from alignlab.errors import UserError
from alignlab.registry import did_you_mean
from alignlab.statistics.clustered import (
    Statistic,
    bootstrap_interval,
    clustered_interval,
    clustered_proportion,
    jackknife_interval,
)
from alignlab.types import Completion, Prompt

OF_THE_MODEL = ("perplexity", "preference")
"""Measures that score given texts with the model itself, rather than its completions; `alignlab evaluate` has them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What measures can be told."""

    encoder: str = ""
    """bertscore: folder or hub id of the encoder, or `minilm`."""
    layer: int | None = None
    """bertscore: which of its hidden layers; None = the last."""
    word_limit: int = 60
    """verbosity: words an answer may have."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Completions and what they answer: completion i is one of `prompts[i]`, prompts coming once a sample."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    references: Sequence[str | None]
    """The text that a good answer resembles; None where there is none."""
    grades: Sequence[Mapping[str, float]]
    """What each prompt's task says; empty where none grades it."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]

    @property
    def clusters(self) -> list[str]:
        """The prompt of each completion: what intervals are clustered by."""
        return [prompt.id for prompt in self.prompts]


Values = Sequence[float | None]
"""One number a completion; None where the measure does not apply to it."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A number of many completions together that is no mean of numbers of each."""

    statistic: Statistic
    """Indices of completions -> the number."""
    applies: Sequence[bool] | None = None
    """Which completions it can be of; None = all."""
    interval: Literal["jackknife", "bootstrap", "none"] = "jackknife"
    """`bootstrap` for what is not smooth, such as a median; `none` for what is no estimate of anything."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a measure found, by metric."""

    values: Mapping[str, Values] = field(default_factory=dict)
    whole: Mapping[str, Whole] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure."""

    says: str
    """One sentence."""
    find: Callable[[Answers, Settings], Found]
    applies: Callable[[Prompt, str | None], bool] = lambda prompt, reference: True
    """Whether it can say anything about answers to a prompt with this reference."""
    needs: str = ""
    """What a prompt must have for that, in words."""
    package: str = ""
    """What it imports beyond alignlab's own needs; `pip install alignlab[metrics]` brings it."""
    check: Callable[[Settings], None] = lambda settings: None
    """Raises UserError where a setting is missing or wrong."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval over prompts; NaN bounds where there are fewer than 2 prompts."""

    value: float
    low: float
    high: float
    completions: int
    """How many completions it is of: those that the measure applies to."""
    prompts: int


def names() -> list[str]:
    """Measures of completions, sorted: one a file."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))


def get_measure(name: str) -> Measure:
    """The measure of that name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        known = [*names(), *OF_THE_MODEL]
        parts = (f"no measure is named {name!r}", did_you_mean(name, known), f"there are: {', '.join(known)}")
        raise UserError("; ".join(filter(None, parts)))
    measure: Measure = import_module(f"{__name__}.{name}").MEASURE
    return measure


def check_measures(chosen: Sequence[str], settings: Settings) -> None:
    """Says what is missing for these measures before a model is loaded: a number that cannot be had is no 0.

    Raises:
        UserError: an unknown name, a package that is not installed, a setting that is missing or wrong.
    """
    for name in chosen:
        if name in OF_THE_MODEL:
            continue
        measure = get_measure(name)
        if measure.package and importlib.util.find_spec(measure.package) is None:
            raise UserError(f"measure {name}: {measure.package} is not installed; run pip install 'alignlab[metrics]'")
        measure.check(settings)


def check_prompts(chosen: Sequence[str], prompts: Sequence[Prompt], references: Sequence[str | None]) -> None:
    """Says which measure has nothing to say about any of these prompts, before anything is sampled.

    Raises:
        UserError: a measure applies to none of them.
    """
    for name in chosen:
        measure = get_measure(name)
        if not any(measure.applies(p, reference) for p, reference in zip(prompts, references, strict=True)):
            raise UserError(f"measure {name}: none of {len(prompts)} prompts has {measure.needs}; leave it out")


def find_all(chosen: Sequence[str], answers: Answers, settings: Settings) -> Found:
    """What several measures found."""
    values: dict[str, Values] = {}
    whole: dict[str, Whole] = {}
    for name in chosen:
        found = get_measure(name).find(answers, settings)
        values |= found.values
        whole |= found.whole
    return Found(values=values, whole=whole)


def estimates(found: Found, clusters: Sequence[str], index: Sequence[int] | None = None) -> dict[str, Estimate]:
    """Every metric's estimate over all completions, or those of `index`; without metrics that apply to none of them."""
    chosen = range(len(clusters)) if index is None else index
    result = {}
    for name, values in found.values.items():
        here = [(value, clusters[i]) for i in chosen if (value := values[i]) is not None]
        if here:
            result[name] = estimate([value for value, _ in here], [cluster for _, cluster in here])
    for name, whole in found.whole.items():
        if places := [i for i in chosen if whole.applies is None or whole.applies[i]]:
            result[name] = _of_whole(whole, clusters, places)
    return result


def estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Of a mean: a share of ones where all values are 0 or 1 (Wilson's interval), else a t interval, clustered."""
    counted = {"completions": len(values), "prompts": len(set(clusters))}
    if counted["prompts"] < 2 or not np.isfinite(values).all():
        return Estimate(value=float(np.mean(values)), low=math.nan, high=math.nan, **counted)
    is_share = all(value in (0.0, 1.0) for value in values)
    interval = (clustered_proportion if is_share else clustered_interval)(values, clusters)
    return Estimate(value=interval.mean, low=interval.low, high=interval.high, **counted)


def _of_whole(whole: Whole, clusters: Sequence[str], chosen: Sequence[int]) -> Estimate:
    index = np.array(chosen, dtype=np.intp)
    here = [clusters[i] for i in chosen]
    counted = {"completions": len(here), "prompts": len(set(here))}

    def statistic(positions: np.ndarray) -> float:
        return whole.statistic(index[positions])

    value = statistic(np.arange(len(here)))
    if counted["prompts"] < 2 or not math.isfinite(value) or whole.interval == "none":
        return Estimate(value=value, low=math.nan, high=math.nan, **counted)
    try:
        interval = (bootstrap_interval if whole.interval == "bootstrap" else jackknife_interval)(statistic, here)
    except ValueError:  # without some prompt there is nothing left to say
        return Estimate(value=value, low=math.nan, high=math.nan, **counted)
    return Estimate(value=value, low=interval.low, high=interval.high, **counted)
