"""The report's two plots: numbers -> marks and labels -> SVG text.

Colours, type sizes and the dark theme belong to the page: marks carry class names only, an arm its `tone` (`k0`, `k1`).
Every text that is passed in is escaped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from scipy.optimize import isotonic_regression

from alignlab.svg import drawing, element, nice_ticks, path, tick_text

LABEL_GAP = 13.0
"""Smallest distance between the baselines of two labels (px)."""
GLYPH = 7.6
"""Room for one letter of a row label (px): DejaVu Sans at 13 px, the widest face of the page's font stack."""
MARK = " †"
"""Behind the label of an arm whose training reward contains the grader."""
POINTS = 100.0
"""A gain lies in [-100, 100] points; the axis never leaves that range, however wide an interval is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One row of the gain plot, in points. Without a mean, `note` is written where the marks would be."""

    label: str
    tone: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One arm's mean over seeds at each `x`; `error` is one standard error, 0 where there is a single seed."""

    label: str
    tone: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    error: tuple[float, ...]


def spread_labels(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within [low, high], as near (least squares) to the wanted ones as order allows.

    Where they cannot all fit they keep their distance and run over `high`.
    """
    if not wanted:
        return []
    order = np.argsort(np.asarray(wanted), kind="stable")
    steps = gap * np.arange(len(wanted))
    fitted = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    placed = np.maximum(np.minimum(fitted, high - steps[-1]), low) + steps
    positions = np.empty(len(wanted))
    positions[order] = placed
    return [float(value) for value in positions]


def gain_plot(groups: Sequence[tuple[str, Sequence[Gain]]], *, width: int, title: str, axis: str) -> Markup:
    """Gains as a dot plot: a line for the interval, a disc for the mean, small dots for single seeds.

    A narrow plot (below 500 px) gives every group's name a line of its own; a wide one sets it beside the first row.
    """
    stacked, pitch = width < 500, 30.0
    longest = 18 if stacked else 32
    letters = max((len(_clip(row.label, longest)) for _, rows in groups for row in rows), default=0)
    names = 0 if stacked else max((len(_clip(name)) for name, _ in groups), default=0)
    left, right = 18.0 + GLYPH * letters + (GLYPH * names + 22 if names else 0), width - 16.0
    ticks = _gain_ticks([row for _, rows in groups for row in rows], most=5 if stacked else 9)
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    marks: list[Markup] = []
    y = 22.0
    for name, rows in groups:
        marks.append(element("text", _clip(name), x=0, y=y + 4.5, class_="group"))
        y += 24.0 if stacked else 0.0
        for row in rows:
            label = _clip(row.label, longest)
            marks.append(element("text", label, x=left - 14, y=y + 4.5, class_="row", text_anchor="end"))
            marks.extend(_gain_marks(row, across, y, low, high))
            y += pitch
        y += 10.0
    bottom = y - 24.0
    grid = [
        mark
        for tick in ticks
        for mark in (
            element(
                "line",
                x1=across(tick),
                x2=across(tick),
                y1=6.0,
                y2=bottom,
                class_="grid zero" if abs(tick) < 1e-9 else "grid",
            ),
            element(
                "text",
                tick_text(tick, ticks[1] - ticks[0], signed=True),
                x=across(tick),
                y=bottom + 17,
                class_="tick",
                text_anchor="middle",
            ),
        )
    ]
    below = element("text", _clip(axis, 48), x=right, y=bottom + 36, class_="axis", text_anchor="end")
    return drawing(width, bottom + 42, title, [*grid, *marks, below])


def curve_plot(title: str, curves: Sequence[Curve], *, axis: str, width: int = 390, height: int = 218) -> Markup:
    """Mean curves with a band of ± one standard error, each named at its end; labels never overlap."""
    values = [
        mean + side * error
        for curve in curves
        for mean, error in zip(curve.mean, curve.error, strict=True)
        for side in (-1, 1)
    ]
    ticks = nice_ticks(min(values), max(values), most=4, slack=0.2)
    left, top, base = 42.0, 32.0, height - 34.0
    right = width - 18.0 - GLYPH * max(len(_clip(curve.label)) for curve in curves)
    start, end = min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)

    def across(value: float) -> float:
        return left + (value - start) / ((end - start) or 1.0) * (right - left)

    def down(value: float) -> float:
        return base - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (base - top)

    marks = [element("text", title, x=0, y=14, class_="title")]
    for tick in ticks:
        marks.append(element("line", x1=left, x2=right, y1=down(tick), y2=down(tick), class_="grid"))
        text = tick_text(tick, ticks[1] - ticks[0])
        marks.append(element("text", text, x=left - 7, y=down(tick) + 4, class_="tick", text_anchor="end"))
    x_ticks = [tick for tick in nice_ticks(start, end, most=5) if start <= tick <= end]
    for tick in x_ticks:
        text = tick_text(tick, (x_ticks[1] - x_ticks[0]) if len(x_ticks) > 1 else 1.0)
        marks.append(element("text", text, x=across(tick), y=base + 15, class_="tick", text_anchor="middle"))
    marks.append(element("text", axis, x=right, y=base + 31, class_="axis", text_anchor="end"))
    for curve in curves:
        points = [(across(x), mean, error) for x, mean, error in zip(curve.x, curve.mean, curve.error, strict=True)]
        if any(curve.error):
            outline = [(x, down(mean + error)) for x, mean, error in points]
            outline += [(x, down(mean - error)) for x, mean, error in reversed(points)]
            marks.append(element("polygon", points=path(outline), class_=f"band {curve.tone}"))
        line = [(x, down(mean)) for x, mean, _ in points]
        marks.append(element("polyline", points=path(line), class_=f"curve {curve.tone}"))
        marks.append(element("circle", cx=line[-1][0], cy=line[-1][1], r=2.6, class_=f"disc {curve.tone}"))
    ends = [down(curve.mean[-1]) for curve in curves]
    placed = spread_labels(ends, gap=LABEL_GAP, low=top - 6, high=base + 2)
    for curve, end_y, y in zip(curves, ends, placed, strict=True):
        x = across(curve.x[-1])
        if abs(y - end_y) > 3:
            marks.append(element("line", x1=x + 4, x2=x + 9, y1=end_y, y2=y, class_=f"leader {curve.tone}"))
        marks.append(element("text", _clip(curve.label), x=x + 11, y=y + 4, class_=f"end {curve.tone}"))
    return drawing(width, height, f"{title}: {_ends_in_words(curves)}", marks)


def _gain_ticks(rows: Sequence[Gain], most: int) -> list[float]:
    numbers = [0.0]
    for row in rows:
        numbers += [value for value in (row.mean, row.low, row.high, *row.seeds) if value is not None]
    low, high = max(min(numbers), -POINTS), min(max(numbers), POINTS)
    return nice_ticks(low, high, most) if high > low else nice_ticks(-1.0, 1.0, most)


def _gain_marks(row: Gain, across: Callable[[float], float], y: float, low: float, high: float) -> Iterator[Markup]:
    if row.mean is None:
        yield element("text", row.note, x=across(0.0) + 8, y=y + 4.5, class_="tick")
        return
    if row.low is not None and row.high is not None:
        yield element("line", x1=across(row.low), x2=across(row.high), y1=y, y2=y, class_=f"interval {row.tone}")
        for value, beyond, sign in ((row.low, row.low < low, 1), (row.high, row.high > high, -1)):
            if beyond:  # an interval that leaves the axis ends in an arrow head
                x = across(value)
                tip = [(x + sign * 6, y - 5), (x - sign * 2, y), (x + sign * 6, y + 5)]
                yield element("polyline", points=path(tip), class_=f"curve {row.tone}")
    yield element("circle", cx=across(row.mean), cy=y, r=5.5, class_=f"disc {row.tone}")
    for seed in row.seeds:
        yield element("circle", cx=across(seed), cy=y + 10, r=2.2, class_="seed")


def _ends_in_words(curves: Sequence[Curve]) -> str:
    return ", ".join(f"{curve.label} from {curve.mean[0]:.3g} to {curve.mean[-1]:.3g}" for curve in curves)


def _clip(label: str, most: int = 18) -> str:
    """The label within so many letters; a mark behind it (†) is never cut off."""
    name, mark = (label.removesuffix(MARK), MARK) if label.endswith(MARK) else (label, "")
    return name + mark if len(name) <= most else name[: most - 1] + "…" + mark
