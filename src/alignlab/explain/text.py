"""Explained -> JSON, or text for a terminal: every line within its width, colours only where a terminal shows them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Group
from rich.text import Text

from alignlab.explain.section import Differences, Explained, Line, Section, StageExplained

INDENT, LABEL = 2, 16
NARROWEST = 40
"""Columns below which nothing gets narrower."""


def as_json(explained: Explained) -> str:
    """The whole explanation, for machines."""
    stages = [
        {**asdict(stage), "sections": {k: _section_json(s) for k, s in stage.sections.items()}}
        for stage in explained.stages
    ]
    return json.dumps({"name": explained.name, "seed": explained.seed, "stages": stages}, indent=2, allow_nan=False)


def _section_json(section: Section) -> dict[str, object]:
    return {"title": section.title, "lines": dict(section.lines), "remarks": list(section.remarks)}


def render(explained: Explained, width: int) -> Group:
    """The whole explanation, wrapped to `width` columns."""
    width = max(NARROWEST, width)
    count = len(explained.stages)
    head = f"{explained.name}: {count} stage{'s' * (count > 1)}, seed {explained.seed}"
    parts: list[Text] = [Text(line, "bold") for line in textwrap.wrap(head, width)]
    for stage in explained.stages:
        parts += _stage(stage, width)
    return Group(*parts)


def _stage(stage: StageExplained, width: int) -> Iterator[Text]:
    yield Text()
    title = f"== {stage.name} " if stage.name == stage.method else f"== {stage.name} ({stage.method}) "
    yield Text(f"{title:=<{width}}"[:width], "bold cyan")
    yield from _wrapped(stage.summary, width)
    loss = stage.sections["loss"]
    yield from _heading(loss.title)
    for line in stage.formula:
        yield from (Text(part, "green") for part in formula_lines(line, width))
    yield Text()
    for name, (shape, text) in stage.inputs.items():
        yield from _line(Line(name, f"{shape}  {text}"), width, label=max(map(len, stage.inputs)))
    yield Text()
    yield from _body(loss, width)
    for name, section in stage.sections.items():
        if name != "loss":
            yield from _heading(section.title)
            yield from _body(section, width)
    yield from _heading("This recipe and others")
    yield from _origin(stage, width)
    yield from _differences(stage.differences, width)


def _body(section: Section, width: int) -> Iterator[Text]:
    for line in section.lines:
        yield from _line(line, width)
    for remark in section.remarks:
        yield from _wrapped(remark, width, bullet="! ", style="yellow")


def _heading(title: str) -> Iterator[Text]:
    yield Text()
    yield Text(title, "bold")


def _line(line: Line, width: int, label: int = 0) -> Iterator[Text]:
    """The label in a column of its own, the text beside it; a label too long for the column stands above."""
    column = INDENT + max(LABEL, label) + 1
    if column > width // 2:
        column = 2 * INDENT
    first = " " * INDENT + line.label
    if len(first) >= column:
        yield Text(first, "cyan")
        first = ""
    for i, part in enumerate(textwrap.wrap(line.text, width - column, break_on_hyphens=False)):
        text = Text(first.ljust(column) if i == 0 else " " * column, "cyan")
        yield text.append(part, "default")


def _wrapped(text: str, width: int, bullet: str = "", style: str = "") -> Iterator[Text]:
    indent = " " * INDENT
    later = indent + " " * len(bullet)
    for part in textwrap.wrap(text, width, initial_indent=indent + bullet, subsequent_indent=later,
                              break_on_hyphens=False):  # fmt: skip
        yield Text(part, style)


def formula_lines(line: str, width: int) -> list[str]:
    """An assignment within the width, its continuations indented further: joined by spaces they are the line again."""
    return textwrap.wrap(
        line, width, initial_indent=" " * 2 * INDENT, subsequent_indent=" " * 4 * INDENT,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _origin(stage: StageExplained, width: int) -> Iterator[Text]:
    tables = {"preset": stage.preset, "variant": stage.variant}
    used = ", ".join(f"{key} {value}" for key, value in tables.items() if value) or "no preset, no variant"
    yield from _line(Line("starts from", f"{used}, over the method's defaults"), width)
    values = "; ".join(f"{name} {here} (not {below})" for name, (here, below) in stage.changed.items())
    yield from _line(Line("set here", values or "nothing else"), width)
    for key, why in stage.idle.items():
        yield from _wrapped(f"{key} does nothing here: {why}.", width, bullet="! ", style="yellow")


def _differences(table: Differences, width: int) -> Iterator[Text]:
    if table.rows:
        yield Text()
        yield from _table(table, width)
        yield from _wrapped(
            "( ): that preset does not say; alignlab's default, which `preset:` would leave. Rows in which all agree "
            "are left out; schedule and optimiser are the recipe's own (train.schedule, train.adamw).", width,
        )  # fmt: skip
    elif len(table.columns) > 1:
        yield from _line(Line("presets", f"the same as {', '.join(table.columns[1:])}"), width)
    else:
        yield from _line(Line("presets", "this method has none"), width)
    for i, departure in enumerate(table.departures, 1):
        yield from _wrapped(departure, width, bullet=f"{i}. ")


def _table(table: Differences, width: int) -> Iterator[Text]:
    """Columns side by side; where they are too wide, a line a field."""
    rows = [("field", *table.columns), *((name, *cells) for name, cells in table.rows.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if INDENT + sum(widths) + 2 * len(widths) > width:
        for name, cells in table.rows.items():
            told = "; ".join(f"{column} {cell}" for column, cell in zip(table.columns, cells, strict=True))
            yield from _line(Line(name, told), width)
        return
    for i, row in enumerate(rows):
        padded = (cell.ljust(size) for cell, size in zip(row, widths, strict=True))
        yield Text((" " * INDENT + "  ".join(padded)).rstrip(), "bold" if i == 0 else "")
