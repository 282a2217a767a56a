"""The profile's pictures: seconds and bytes -> SVG text. Colours and sizes belong to the page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from alignlab.svg import drawing, element, nice_ticks, path, tick_text

WIDTH = 880
LEFT, RIGHT = 62.0, WIDTH - 14.0
BAR, GAP = 26.0, 12.0
LEAST_LABELLED = 46.0
"""Pixels a segment has to be wide to carry its share."""


def phase_bars(laps: Sequence[Sequence[tuple[int, str, float]]]) -> Markup:
    """A bar a phase, cut into its parts: (tone, label, seconds) each."""
    totals = [sum(seconds for _, _, seconds in lap) for lap in laps]
    ticks = nice_ticks(0.0, max(totals, default=1.0), most=8)
    base = len(laps) * (BAR + GAP) + 6.0
    marks = _axis(ticks, base, "seconds")
    for number, (lap, total) in enumerate(zip(laps, totals, strict=True)):
        y, x = 6.0 + number * (BAR + GAP), LEFT
        marks.append(element("text", f"phase {number + 1}", x=LEFT - 8, y=y + 17, class_="tick", text_anchor="end"))
        for tone, label, seconds in lap:
            width = seconds / ticks[-1] * (RIGHT - LEFT)
            if width >= 0.3:
                marks += _segment(x, y, width, f"p{tone}", f"{label}: {seconds:.3g} s", f"{seconds / total:.0%}")
            x += width
    return drawing(WIDTH, base + 40, "Time of each measured phase by part", marks)


def memory_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """What the peak is made of, in one bar."""
    total = sum(size for _, size in parts) or 1
    marks, x = list[Markup](), 0.0
    for number, (name, size) in enumerate(parts):
        width = size / total * WIDTH
        title = f"{name}: {size / 2**20:.0f} MiB"
        marks += _segment(x, 2.0, width, f"m{number}", title, f"{size / total:.0%}")
        x += width
    return drawing(WIDTH, BAR + 4, "Memory at the peak by what it is made of", marks)


def memory_course(course: Sequence[tuple[float, int]], loaded: int | None) -> Markup:
    """Memory in use over the measured phases; the dashed line is where it stood with everything loaded."""
    if len(course) < 2:
        return Markup("")
    height, top = 220.0, 10.0
    start, used = course[0][0], [bytes_ / 2**20 for _, bytes_ in course]
    level = None if loaded is None else loaded / 2**20
    times = nice_ticks(0.0, course[-1][0] - start, most=8)
    sizes = nice_ticks(0.0, max([*used, level or 0.0]), most=5)

    def down(size: float) -> float:
        return height - size / sizes[-1] * (height - top)

    marks = _axis(times, height, "seconds", top)
    for tick in sizes:
        y = down(tick)
        marks.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"))
        text = tick_text(tick, sizes[1] - sizes[0])
        marks.append(element("text", text, x=LEFT - 7, y=y + 4, class_="tick", text_anchor="end"))
    points = [
        (LEFT + (seconds - start) / times[-1] * (RIGHT - LEFT), down(size))
        for (seconds, _), size in zip(course, used, strict=True)
    ]
    floor = [(points[-1][0], height), (points[0][0], height)]
    marks.append(element("polygon", points=path([*points, *floor]), class_="area"))
    marks.append(element("polyline", points=path(points), class_="curve"))
    if level is not None:
        y = down(level)
        marks.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="ideal"))
        marks.append(element("text", "everything loaded", x=RIGHT, y=y - 5, class_="axis", text_anchor="end"))
    marks.append(element("text", "MiB in use", x=LEFT + 6, y=height - 8, class_="axis"))
    return drawing(WIDTH, height + 40, f"Memory in use: {max(used):.0f} MiB at the peak", marks)


def _axis(ticks: Sequence[float], base: float, name: str, top: float = 0.0) -> list[Markup]:
    """Upright grid lines with their numbers below."""
    marks = []
    for tick in ticks:
        x = LEFT + tick / ticks[-1] * (RIGHT - LEFT)
        marks.append(element("line", x1=x, x2=x, y1=top, y2=base, class_="grid"))
        text = tick_text(tick, ticks[1] - ticks[0])
        marks.append(element("text", text, x=x, y=base + 16, class_="tick", text_anchor="middle"))
    marks.append(element("text", name, x=RIGHT, y=base + 33, class_="axis", text_anchor="end"))
    return marks


def _segment(x: float, y: float, width: float, tone: str, title: str, share: str) -> list[Markup]:
    """A piece of a bar; what it is appears under the pointer, its share inside where there is room."""
    marks = [element("rect", element("title", title), x=x, y=y, width=width, height=BAR, class_=f"bar {tone}")]
    if width >= LEAST_LABELLED:
        marks.append(element("text", share, x=x + width / 2, y=y + 17, class_="inside", text_anchor="middle"))
    return marks
