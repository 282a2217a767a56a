"""Plots as SVG text that needs no library to be looked at: names, attributes and numbers -> one escaped element.

Colours, type sizes and the dark theme belong to the page: marks carry class names only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup


def element(name: str, *children: str, **attributes: object) -> Markup:
    """One SVG element; children that are not `Markup` and all attribute values are escaped, `class_` means class."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    shown = Markup("").join(
        Markup(' {}="{}"').format(key, f"{value:.1f}" if isinstance(value, float) else value) for key, value in pairs
    )
    return Markup("<{}{}>{}</{}>").format(name, shown, Markup("").join(children), name)


def drawing(width: float, height: float, title: str, marks: Sequence[Markup]) -> Markup:
    """The whole picture; `title` says in words what it shows, for those who cannot see it."""
    return element("svg", *marks, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", aria_label=title)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The `points` attribute of a polyline or polygon."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def nice_ticks(low: float, high: float, most: int = 6, slack: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that span `low` to `high` in about `most` steps.

    `slack` is the share of a step by which the data may reach beyond the outer ticks: no tick at -2 for a band at -0.1.
    """
    span, slack = (high - low, slack) if high > low else (abs(high) or 1.0, 0.0)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(unit * power for unit in (1, 2, 5, 10, 20) if span / (unit * power) <= most)
    first, last = math.floor(low / step + slack + 1e-9), math.ceil(high / step - slack - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def tick_text(value: float, step: float, *, signed: bool = False) -> str:
    """A tick with as many decimals as its axis's step needs, a true minus sign, and a plain 0."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:+.{decimals}f}" if signed and round(value, decimals) else f"{value + 0.0:.{decimals}f}"
    return text.replace("-", "−")
