"""What a step costs as one thing grows: an axis -> cases of growing size, in turn -> seconds, memory, exponents.

cost ~ size^exponent; 1 is proportional, 0 is no matter, and a fixed cost beside it makes an exponent look smaller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, nan, sqrt
from typing import Any

from benchmarks.cases import Case, shorter
from benchmarks.floor import weights
from benchmarks.runner import Measured, Setting, interleave, job, kernels
from benchmarks.worker import Side

BASE = Case(method="grpo", shape="tiny", items=4, group=4)
PEER_LOGITS = 2**28
"""Bytes of logits of a step beyond which the peer is left out: it holds them whole, several times over."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that grows while everything else is as in `BASE`."""

    field: str
    """Of the case."""
    values: tuple[int, ...]
    title: str


AXES = {
    "completion": Axis(field="completion_tokens", values=(32, 64, 128, 256), title="completion length, mean tokens"),
    "group": Axis(field="group", values=(2, 4, 8, 16), title="group size, completions a prompt"),
    "vocabulary": Axis(field="vocabulary", values=(512, 4096, 32_768, 262_144), title="vocabulary, tokens"),
    "batch": Axis(field="items", values=(2, 4, 8, 16), title="batch, prompts a step"),
    "size": Axis(field="width", values=(64, 128, 256, 512), title="model size, weights in products"),
}
"""Name -> axis; the model grows in width, from which its weights follow."""


@dataclass(frozen=True)
class Fit:
    """cost ~ size^exponent."""

    exponent: float
    error: float
    """Standard error of the exponent; nan for two points."""


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Least squares on the logarithms.

    Raises:
        ValueError: fewer than two different sizes, or something that is not above 0.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError("an exponent needs at least two different sizes, and sizes and costs above 0")
    x, y = [log(s) for s in sizes], [log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return Fit(slope, sqrt(left / (len(x) - 2) / spread) if len(x) > 2 else nan)


def last_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent between the two largest sizes alone, where fixed costs weigh least."""
    return fit(sizes[-2:], costs[-2:]).exponent


def growth(sizes: Sequence[float], memory_mb: Sequence[float]) -> float:
    """MB that the last doubling of the size adds, from the line through the two largest sizes."""
    return (memory_mb[-1] - memory_mb[-2]) / (sizes[-1] - sizes[-2]) * sizes[-1] / 2


def cases(axis: Axis) -> dict[int, Case]:
    """The axis' values and their cases."""
    return {value: shorter(BASE, **{axis.field: value}) for value in axis.values}


def cheap(case: Case) -> bool:
    """Whether the peer's logits of a step stay small."""
    tokens = case.rows * (case.prompt_tokens + case.completion_tokens)
    return 4 * tokens * (case.vocabulary or 512) <= PEER_LOGITS


def series(name: str, setting: Setting, side: Side = "ours") -> dict[str, Any]:
    """The axis' points, all in turn, as the results hold them."""
    points = {v: case for v, case in cases(AXES[name]).items() if side == "ours" or cheap(case)}
    jobs = {f"{name} {value}, {side}": job(side, case, f"scaling-{name}-{value}", setting)
            for value, case in points.items()}  # fmt: skip
    found = interleave(jobs, setting).values()
    return {
        "base": json.loads(BASE.to_json()),
        "kernels": side == "ours" and kernels(next(iter(jobs.values()))),
        "points": [point(name, value, case, m) for (value, case), m in zip(points.items(), found, strict=True)],
    }


def point(name: str, value: int, case: Case, measured: Measured) -> dict[str, Any]:
    """One point: the size it counts as, and what it cost, by part too."""
    found = measured.to_json()
    size = float(value)
    if name == "completion":  # some end before the limit
        size = found["sampled_tokens"] / found["sampled_rows"]
    elif name == "size":
        size = float(sum(weights(case)))
    return {"value": value, "size": size, **{k: found[k] for k in ("seconds", "parts", "memory_mb", "rounds")}}
