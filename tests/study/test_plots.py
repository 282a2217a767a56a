"""The plots are well-formed, escaped, readable: scales, marks where the numbers say, labels apart."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from alignlab.study.plots import Curve, Gain, curve_plot, element, gain_plot, nice_ticks, spread_labels, tick_text

EXACT = 1e-9
PIXEL = 0.11  # coordinates are written with one decimal


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def marks(svg: str, tag: str, name: str) -> list[dict[str, str]]:
    """The attributes of all elements of a tag that carry a class."""
    return [node.attrib for node in parsed(svg).iter(tag) if name in node.get("class", "").split()]


def texts(svg: str, name: str) -> list[str]:
    return [node.text or "" for node in parsed(svg).iter("text") if name in node.get("class", "").split()]


def plot(*rows: Gain, width: int = 852) -> str:
    return gain_plot([("all tasks", rows)], width=width, title="Gain over SFT", axis="points")


@pytest.mark.parametrize(
    ("low", "high", "most", "slack", "ticks"),
    [
        (-8.0, 23.0, 7, 0.0, [-10, -5, 0, 5, 10, 15, 20, 25]),  # 31 / 7 is above 2, so steps of 5
        (0.0, 1.0, 5, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.1, 4.2, 4, 0.2, [0, 2, 4]),  # -0.1 and 4.2 are 5 and 10 % of a step beyond 0 and 4: no further ticks ...
        (-0.1, 4.2, 4, 0.0, [-2, 0, 2, 4, 6]),  # ... unless nothing may reach beyond them
        (38.0, 38.0, 4, 0.2, [30, 40]),  # a constant still has an axis
        (0.0, 0.0, 4, 0.2, [0.0, 0.5]),
    ],
)
def test_ticks_are_round_and_span_the_data(
    low: float, high: float, most: int, slack: float, ticks: list[float]
) -> None:
    assert nice_ticks(low, high, most, slack) == pytest.approx(ticks, abs=EXACT)


@pytest.mark.parametrize(
    ("value", "step", "signed", "text"),
    [(-5, 5, True, "−5"), (0, 5, True, "0"), (10, 5, True, "+10"), (0.25, 0.05, False, "0.25"), (-0.0, 1, False, "0")],
)
def test_tick_text(value: float, step: float, signed: bool, text: str) -> None:
    assert tick_text(value, step, signed=signed) == text


def test_labels_that_are_apart_stay_where_they_are() -> None:
    assert spread_labels([40.0, 10.0], gap=13, low=0, high=100) == pytest.approx([40.0, 10.0], abs=EXACT)


def test_labels_that_collide_move_by_the_same_amount_in_their_order() -> None:
    assert spread_labels([50.0, 50.0], gap=13, low=0, high=100) == pytest.approx([43.5, 56.5], abs=EXACT)
    assert spread_labels([51.0, 50.0], gap=13, low=0, high=100) == pytest.approx([57.0, 44.0], abs=EXACT)


def test_labels_stay_inside_and_apart() -> None:
    for wanted in ([99.0, 99.5, 100.0], [0.0, 0.0, 1.0], [5.0, 95.0, 96.0, 97.0]):
        placed = sorted(spread_labels(wanted, gap=13, low=0, high=100))
        assert placed[0] >= -EXACT and placed[-1] <= 100 + EXACT
        assert all(after - before >= 13 - EXACT for before, after in pairwise(placed))
    assert spread_labels([], gap=13, low=0, high=100) == []


def test_a_gain_is_drawn_where_its_numbers_say() -> None:
    svg = plot(Gain(label="GRPO", tone="k3", mean=10.0, low=5.0, high=20.0, seeds=(8.0, 12.0)))
    ticks = {text: float(node["x"]) for text, node in zip(texts(svg, "tick"), marks(svg, "text", "tick"), strict=True)}
    scale = (ticks["+20"] - ticks["0"]) / 20
    (line,), (disc,) = marks(svg, "line", "interval"), marks(svg, "circle", "disc")
    assert float(line["x1"]) == pytest.approx(ticks["0"] + 5 * scale, abs=PIXEL)
    assert float(line["x2"]) == pytest.approx(ticks["0"] + 20 * scale, abs=PIXEL)
    assert float(disc["cx"]) == pytest.approx(ticks["0"] + 10 * scale, abs=PIXEL)
    seeds = [float(seed["cx"]) for seed in marks(svg, "circle", "seed")]
    assert seeds == pytest.approx([ticks["0"] + 8 * scale, ticks["0"] + 12 * scale], abs=PIXEL)
    assert disc["class"] == "disc k3"


def test_the_gain_axis_always_shows_zero() -> None:
    assert len(marks(plot(Gain(label="a", tone="k1", mean=30.0, low=29.0, high=31.0)), "line", "zero")) == 1


def test_an_interval_beyond_100_points_ends_in_an_arrow_instead_of_flattening_the_plot() -> None:
    wide = plot(Gain(label="a", tone="k1", mean=10.0, low=-300.0, high=400.0))
    assert texts(wide, "tick")[0] == "−100" and texts(wide, "tick")[-1] == "+100"
    assert len(marks(wide, "polyline", "curve")) == 2
    assert not marks(plot(Gain(label="a", tone="k1", mean=10.0, low=-30.0, high=40.0)), "polyline", "curve")


def test_a_missing_gain_is_named_not_dropped() -> None:
    svg = plot(Gain(label="PPO", tone="k2", note="no finished run"))
    assert "no finished run" in texts(svg, "tick") and texts(svg, "row") == ["PPO"]
    assert not marks(svg, "circle", "disc")


def test_a_gain_without_an_interval_and_one_of_width_zero() -> None:
    svg = plot(Gain(label="a", tone="k1", mean=1.0), Gain(label="b", tone="k2", mean=2.0, low=2.0, high=2.0))
    assert len(marks(svg, "circle", "disc")) == 2 and len(marks(svg, "line", "interval")) == 1


def test_a_label_has_the_room_that_is_there_and_keeps_its_mark() -> None:
    """On a desk a long label is whole, on a phone it is cut; the mark behind it never is."""
    label = "best of 8 (reward model)"
    for width, shown in ((892, f"{label} †"), (368, f"{label[:17]}… †")):
        svg = gain_plot(
            [("all tasks", [Gain(label=f"{label} †", tone="k1", mean=1.0)])], width=width, title="", axis=""
        )
        assert texts(svg, "row") == [shown]
        (row,) = marks(svg, "text", "row")
        assert float(row["x"]) > 7.6 * len(shown)  # it ends there, and begins within the plot


def test_plots_have_a_name_for_those_who_cannot_see_them() -> None:
    curve = Curve(label="PPO", tone="k2", x=(0.0, 40.0), mean=(0.1, 1.25), error=(0.0, 0.1))
    for svg, name in (
        (plot(), "Gain over SFT"),
        (curve_plot("Reward", [curve], axis="phases"), "Reward: PPO from 0.1"),
    ):
        root = parsed(svg)
        assert root.get("role") == "img" and root.get("aria-label", "").startswith(name)


def test_a_curve_is_a_line_a_band_of_one_standard_error_and_a_label_at_its_end() -> None:
    curve = Curve(label="PPO", tone="k2", x=(0.0, 10.0), mean=(0.0, 10.0), error=(0.0, 5.0))
    svg = curve_plot("Reward", [curve], axis="phases")
    ((line,), (band,)) = marks(svg, "polyline", "curve"), marks(svg, "polygon", "band")
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in line["points"].split())
    outline = [tuple(map(float, point.split(","))) for point in band["points"].split()]
    per_unit = (y0 - y1) / 10
    assert outline == [
        pytest.approx(point, abs=2 * PIXEL)
        for point in [(x0, y0), (x1, y1 - 5 * per_unit), (x1, y1 + 5 * per_unit), (x0, y0)]
    ]
    assert texts(svg, "end") == ["PPO"]


def test_a_single_run_has_no_band() -> None:
    svg = curve_plot("Reward", [Curve(label="a", tone="k1", x=(0.0, 1.0), mean=(0.0, 1.0), error=(0.0, 0.0))], axis="x")
    assert not marks(svg, "polygon", "band")


def test_curves_that_end_together_have_labels_that_do_not_touch() -> None:
    curves = [Curve(label=name, tone="k1", x=(0.0, 1.0), mean=(0.0, 1.0), error=(0.0, 0.0)) for name in "abcd"]
    ys = sorted(float(node["y"]) for node in marks(curve_plot("Reward", curves, axis="phases"), "text", "end"))
    assert all(after - before >= 12.8 for before, after in pairwise(ys))


def test_a_curve_of_one_constant_point_is_drawn() -> None:
    svg = curve_plot("Reward", [Curve(label="a", tone="k1", x=(3.0,), mean=(0.0,), error=(0.0,))], axis="phases")
    assert len(marks(svg, "circle", "disc")) == 1


def test_texts_and_attributes_are_escaped() -> None:
    evil = '"><script>alert(1)</script>'
    assert "<script>" not in plot(Gain(label=evil, tone=evil, note=evil))
    assert "<script>" not in curve_plot(
        evil, [Curve(label=evil, tone=evil, x=(0.0,), mean=(0.0,), error=(0.0,))], axis=evil
    )
    assert element("text", "a < b", class_="x y", text_anchor="end") == (
        '<text class="x y" text-anchor="end">a &lt; b</text>'
    )
