"""The doctor's three pictures: an examination's numbers → SVG text.

A reliability diagram, a histogram of margins, scores against lengths. Colours and sizes belong to the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignlab.doctor.measures import Calibration, Margins
from alignlab.statistics.calibration import Bin
from alignlab.svg import drawing, element, nice_ticks, path, tick_text

WIDTH, HEIGHT = 400, 300
MOST_POINTS = 600
"""Completions drawn in the scatter plot; more only make a blot."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """A frame with ticks: from data to pixels."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    left: float = 46.0
    top: float = 12.0

    @property
    def right(self) -> float:
        return WIDTH - 10.0

    @property
    def base(self) -> float:
        return HEIGHT - 40.0

    def across(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def down(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.base - (value - low) / (high - low) * (self.base - self.top)

    def marks(self, x_name: str, y_name: str) -> list[Markup]:
        """Grid, ticks and the names of both axes."""
        drawn = []
        for tick in self.y_ticks:
            y = self.down(tick)
            drawn.append(element("line", x1=self.left, x2=self.right, y1=y, y2=y, class_="grid"))
            text = tick_text(tick, self.y_ticks[1] - self.y_ticks[0])
            drawn.append(element("text", text, x=self.left - 7, y=y + 4, class_="tick", text_anchor="end"))
        for tick in self.x_ticks:
            text = tick_text(tick, self.x_ticks[1] - self.x_ticks[0])
            x = self.across(tick)
            drawn.append(element("text", text, x=x, y=self.base + 16, class_="tick", text_anchor="middle"))
        drawn.append(element("text", x_name, x=self.right, y=self.base + 34, class_="axis", text_anchor="end"))
        drawn.append(element("text", y_name, x=self.left + 5, y=self.top + 12, class_="axis"))
        return drawn

    def legend(self, *entries: tuple[str, str]) -> list[Markup]:
        """What each tone means, below the axis, where no data are."""
        drawn, x = [], self.left + 4
        for tone, text in entries:
            drawn.append(element("circle", cx=x, cy=self.base + 30, r=4.0, class_=f"disc {tone}"))
            drawn.append(element("text", text, x=x + 9, y=self.base + 34, class_="axis"))
            x += 28 + 6.2 * len(text)
        return drawn


def reliability_plot(calibration: Calibration) -> Markup:
    """Stated against observed shares; on the diagonal they agree. Larger discs are bins of more pairs."""
    fifths = [i / 5 for i in range(6)]
    axes = Axes(x_ticks=fifths, y_ticks=fifths)
    marks = axes.marks("stated P(first wins)", "observed share")
    ends = {"x1": axes.across(0), "y1": axes.down(0), "x2": axes.across(1), "y2": axes.down(1)}
    marks.append(element("line", **ends, class_="ideal"))
    marks += _bins(calibration.bins_at_temperature, axes, "k2")
    marks += _bins(calibration.bins, axes, "k1")
    marks += axes.legend(("k1", "as trained"), ("k2", f"at temperature {calibration.temperature:.2f}"))
    title = (
        f"Reliability: calibration error {calibration.error:.3f}, {calibration.error_at_temperature:.3f} at temperature"
    )
    return drawing(WIDTH, HEIGHT, title, marks)


def _bins(bins: Sequence[Bin], axes: Axes, tone: str) -> list[Markup]:
    most = max(b.count for b in bins)
    points = [
        (axes.across(b.stated), axes.down(b.observed), 2.5 + 5.5 * (b.count / most) ** 0.5)
        for b in bins
        if b.stated is not None and b.observed is not None
    ]
    line = element("polyline", points=path([(x, y) for x, y, _ in points]), class_=f"curve {tone}")
    return [line, *(element("circle", cx=x, cy=y, r=r, class_=f"disc {tone}") for x, y, r in points)]


def margin_plot(margins: Margins) -> Markup:
    """Chosen minus rejected; what lies left of 0 is in the wrong order."""
    edges = margins.edges
    x_ticks = nice_ticks(min(edges[0], 0.0), max(edges[-1], 0.0), most=6)
    axes = Axes(x_ticks=x_ticks, y_ticks=nice_ticks(0.0, float(max(margins.counts)), most=4))
    marks = axes.marks("chosen − rejected, sd of reference scores", "pairs")
    for low, high, count in zip(edges, edges[1:], margins.counts, strict=False):
        if count:
            x, y = axes.across(low), axes.down(count)
            tone = "k1" if low + high > 0 else "k2"
            size = {"width": max(0.5, axes.across(high) - x - 1), "height": axes.base - y}
            marks.append(element("rect", x=x, y=y, **size, class_=f"bar {tone}"))
    zero = axes.across(0.0)
    marks.append(element("line", x1=zero, x2=zero, y1=axes.top, y2=axes.base, class_="zero"))
    return drawing(WIDTH, HEIGHT, f"Margins: mean {margins.mean:.2f}, sd {margins.sd:.2f}", marks)


def length_plot(points: Sequence[tuple[int, float, bool]]) -> Markup:
    """(tokens, score, is chosen) of completions, evenly thinned out where there are too many."""
    some = points[:: max(1, -(-len(points) // MOST_POINTS))]
    axes = Axes(
        x_ticks=nice_ticks(0.0, float(max(tokens for tokens, _, _ in some)), most=6),
        y_ticks=nice_ticks(min(s for _, s, _ in some), max(s for _, s, _ in some), most=5),
    )
    marks = axes.marks("tokens", "score")
    for tokens, score, chosen in some:
        tone = "k1" if chosen else "k2"
        marks.append(element("circle", cx=axes.across(tokens), cy=axes.down(score), r=2.2, class_=f"dot {tone}"))
    marks += axes.legend(("k1", "chosen"), ("k2", "rejected"))
    return drawing(WIDTH, HEIGHT, f"Scores of {len(points)} completions against their length", marks)
