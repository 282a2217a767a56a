"""results.json as its report reads it: JSON -> arms, comparisons in either direction, and numbers as words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

SCHEMA = 1
REFERENCE = "sft"  # gains are over this arm; where a study has none, over the last of its baselines
NUM_TONES = 6  # colours of the page
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LENGTH = ("completion/length", "length")
KL = ("policy/kl_per_sequence", "kl_per_sequence")
NONE = "—"
SPACE = "\N{NO-BREAK SPACE}"
PERCENT = f"{SPACE}%"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method or a baseline with its finished and its failed runs; a method that is not trained has one, no seed."""

    name: str
    label: str
    is_baseline: bool
    tone: str
    planned: int
    trained: bool = True
    finished: tuple[Mapping[str, Any], ...]
    failed: tuple[Mapping[str, Any], ...]

    def __hash__(self) -> int:
        return hash(self.name)

    def values(self, metric: str) -> list[float]:
        """The metric of every finished run that has it."""
        return numbers(run.get("metrics", {}).get(metric) for run in self.finished)

    def mean(self, metric: str) -> float | None:
        """Mean over the finished runs; None where none has the metric."""
        return fmean(values) if (values := self.values(metric)) else None

    def spread(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; None below two runs."""
        return stdev(values) if len(values := self.values(metric)) > 1 else None

    @property
    def length(self) -> float | None:
        """Mean length of its held-out completions (tokens)."""
        return next((mean for metric in LENGTH if (mean := self.mean(metric)) is not None), None)

    @property
    def sampled(self) -> float | None:
        """Tokens generated for one answer, where it was chosen among several candidates."""
        return self.mean("inference/tokens_per_answer") if self.values("inference/candidates") else None

    @property
    def kl(self) -> float | None:
        """KL to the policy its runs started from (nats a completion)."""
        return next((mean for metric in KL if (mean := self.mean(metric)) is not None), None)

    @property
    def shortfall(self) -> str:
        """How many of the planned runs finished; empty where all did."""
        return "" if len(self.finished) >= self.planned else f"{len(self.finished)} of {self.planned} runs"

    @property
    def failures(self) -> str:
        """The shortfall with the reasons of the failed runs, equal reasons once; empty where all finished."""
        if not self.shortfall:
            return ""
        reasons: dict[str, list[str]] = {}
        for run in self.failed:
            reasons.setdefault(reason(run), []).append(run_name(run))
        finished = f"only {self.shortfall} finished" if self.finished else f"none of {self.planned} runs finished"
        causes = "; ".join(f"{join(runs)} failed: {error}" for error, runs in reasons.items())
        return f"{finished} ({causes})" if causes else finished


class StudyResults:
    """The content of results.json with the look-ups that every part of the report shares.

    Raises:
        ValueError: another schema than this version writes, or no baseline to measure a gain over.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        if results.get("schema") != SCHEMA:
            raise ValueError(
                f"results.json has schema {results.get('schema')!r}, this version reads {SCHEMA}; run the study again"
            )
        self.results: Mapping[str, Any] = visible(results)
        self.plan: Mapping[str, Any] = self.results["plan"]
        self.shared: Mapping[str, Mapping[str, Any]] = self.results.get("shared", {})
        self.name = str(self.results.get("title") or self.results["name"])
        self.primary = str(self.plan["primary"])
        self.tasks = [str(task) for task in self.plan["tasks"]]
        self.level = f"{100 * self.plan['confidence']:g}{PERCENT}"
        self.arms = self._arms()
        self.methods = [arm for arm in self.arms if not arm.is_baseline]
        self.reference = self._reference()

    def _arms(self) -> list[Arm]:
        arms, num_methods = [], 0
        for arm in self.results["arms"]:
            is_baseline = arm["kind"] == "baseline"
            num_methods += not is_baseline
            arms.append(
                Arm(
                    name=arm["name"],
                    label=str(arm.get("label") or arm["name"]),
                    is_baseline=is_baseline,
                    tone="k0" if is_baseline else f"k{1 + (num_methods - 1) % NUM_TONES}",
                    planned=1 if is_baseline else arm.get("planned", len(self.plan["seeds"])),
                    trained=not is_baseline and arm.get("trained", True),
                    finished=tuple(run for run in arm["runs"] if run["status"] == "finished"),
                    failed=tuple(run for run in arm["runs"] if run["status"] != "finished"),
                )
            )
        return arms

    def _reference(self) -> Arm:
        baselines = [arm for arm in self.arms if arm.is_baseline]
        if not baselines:
            raise ValueError("results.json names no baseline arm, so there is nothing to measure a gain over")
        return next((arm for arm in baselines if arm.name == REFERENCE), baselines[-1])

    @cached_property
    def comparisons(self) -> dict[tuple[str, str, str | None], Mapping[str, Any]]:
        """(arm, against, task or None for all) -> comparison of the primary metric."""
        rows = [row for row in self.results["comparisons"] if row["metric"] == self.primary]
        return {(row["arm"], row["against"], row.get("task")): row for row in rows if number(row["mean"]) is not None}

    def comparison(self, arm: Arm, against: Arm, task: str | None = None) -> Mapping[str, Any] | None:
        """The comparison in this direction, turned round where the study has only the other one."""
        if row := self.comparisons.get((arm.name, against.name, task)):
            return row
        row = self.comparisons.get((against.name, arm.name, task))
        return None if row is None else turned(row)

    def verdict(self, arm: Arm, against: Arm, task: str | None = None) -> str:
        """The comparison's verdict, empty where there is no comparison."""
        return str((self.comparison(arm, against, task) or {}).get("verdict", ""))

    def tasks_with(self, arm: Arm, verdict: str, against: Arm | None = None) -> list[str]:
        """The tasks on which the arm has this verdict against another (the reference), in the plan's order."""
        return [task for task in self.tasks if self.verdict(arm, against or self.reference, task) == verdict]

    def is_mixed(self, arm: Arm) -> bool:
        """Better than the reference on some tasks and worse on others."""
        return bool(self.tasks_with(arm, "better")) and bool(self.tasks_with(arm, "worse"))

    @cached_property
    def ranked(self) -> list[Arm]:
        """The methods that could be compared with the reference, largest gain first."""
        rows = [(arm, self.comparison(arm, self.reference)) for arm in self.methods if arm.finished]
        gains = [(float(row["mean"]), arm) for arm, row in rows if row is not None]
        return [arm for _, arm in sorted(gains, key=lambda pair: -pair[0])]

    def label(self, name: str) -> str:
        """How the report calls an arm or a shared stage."""
        return next((arm.label for arm in self.arms if arm.name == name), name.replace("_", " "))

    def trained_on(self, arm: Arm, task: str) -> bool:
        """Whether the arm's training reward contains this task's own grader."""
        return arm.name in self.plan.get("trained_on", {}).get(task, ())


def turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison of b with a, from one of a with b: every difference and its interval change sign."""

    def negative(value: Any) -> float | None:
        return None if (known := number(value)) is None else -known

    seeds = {seed: negative(value) for seed, value in row.get("per_seed", {}).items()}
    effect = dict(row.get("effect") or {})
    signs = {"d": "d", "g": "g", "low": "high", "high": "low"}
    effect |= {name: negative((row.get("effect") or {}).get(source)) for name, source in signs.items()}
    return {
        **row,
        "arm": row["against"],
        "against": row["arm"],
        "mean": negative(row["mean"]),
        "low": negative(row.get("high")),
        "high": negative(row.get("low")),
        "per_seed": seeds,
        "every_seed_above": bool(seeds) and all(value is not None and value > 0 for value in seeds.values()),
        "verdict": {"better": "worse", "worse": "better"}.get(row["verdict"], row["verdict"]),
        "effect": effect,
    }


# ---- values ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything else (null, NaN, text)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def numbers(values: Iterable[Any]) -> list[float]:
    """The finite numbers among `values`."""
    return [known for value in values if (known := number(value)) is not None]


def visible(value: Any) -> Any:
    """`value` (JSON) with every invisible control character in its texts replaced by a picture or its code.

    Hazard: escaping is not enough. A right-to-left override in a label would mirror the numbers after it, an escape
    sequence would reach the terminal, and half a surrogate pair cannot be written as UTF-8.
    """
    if isinstance(value, str):
        return HIDDEN.sub(lambda match: _picture(ord(match[0])), value)
    if isinstance(value, Mapping):
        return {visible(key): visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list | tuple) else value


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩"


# ---- words -----------------------------------------------------------------------------------------------------------


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """A number with a true minus sign, and none before a zero."""
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}".replace("-", "−")


def decimal(value: float) -> str:
    return fixed(value, 2)


def points(value: float) -> str:
    """A score or a difference in [-1, 1] as points: 0.7312 -> 73.1."""
    return fixed(100 * value, 1)


def gain(row: Mapping[str, Any], unit: str = "") -> str:
    """A comparison's mean and interval in points: +15.5 [12.0, 19.0]."""
    return f"{fixed(100 * row['mean'], 1, '+')}{unit}{bracket(row, 100.0, 1)}"


def bracket(row: Mapping[str, Any], scale: float, decimals: int) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    if low is None or high is None:
        return " [no interval]"
    if low == high:
        return " [no spread]"
    return f" [{fixed(scale * low, decimals)},{SPACE}{fixed(scale * high, decimals)}]"


def count(value: float) -> str:
    """A whole number with thin gaps between its thousands."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def short(value: float) -> str:
    """A large count in two or three digits: 1234567 -> 1.2 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{SPACE}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{SPACE}min {rest}{SPACE}s" if minutes else f"{rest}{SPACE}s"


def join(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def run_name(run: Mapping[str, Any]) -> str:
    return "single run" if run.get("seed") is None else f"seed {run['seed']}"


def reason(run: Mapping[str, Any]) -> str:
    """Why a run failed, in one line."""
    return str(run.get("error") or "no reason recorded")
