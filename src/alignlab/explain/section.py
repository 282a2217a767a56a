"""What an explanation is made of: lines in sections, sections of a stage, stages of a recipe; all frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Value = str | int | float | bool | None


class Line(NamedTuple):
    """A name or a keyword, and what there is to say about it."""

    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, lines below it, and honest remarks on what the numbers mean in practice."""

    title: str
    lines: tuple[Line, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Where this recipe's numbers are not those of the method's presets."""

    columns: tuple[str, ...]
    """`here`, then the presets."""
    rows: Mapping[str, tuple[str, ...]]
    """Field -> a cell for each column; in brackets what a preset leaves to alignlab's default."""
    departures: tuple[str, ...]
    """What no field says, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class StageExplained:
    """One stage of a recipe."""

    name: str
    method: str
    summary: str
    """The method in a sentence."""
    preset: str | None
    variant: str | None
    changed: Mapping[str, tuple[str, str]]
    """Field -> its value in this recipe, and what preset, variant and defaults alone would give."""
    idle: Mapping[str, str]
    """Key that the recipe sets and nothing reads -> why."""
    formula: tuple[str, ...]
    """The loss of an optimiser step as assignments in Python's syntax."""
    inputs: Mapping[str, tuple[str, str]]
    """Name in the formula -> its shape, and what it is."""
    sections: Mapping[str, Section]
    numbers: Mapping[str, Value]
    """The arithmetic of the batch; None where a number is not known before the data are read."""
    differences: Differences


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A whole recipe."""

    name: str
    seed: int
    stages: tuple[StageExplained, ...]


def number(value: object) -> str:
    """A value as people read it: 4,800, 0.0004, 1e-06, none, yes."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if value.is_integer() and 1e3 <= abs(value) < 1e15 else f"{value:.6g}"
        case list() | tuple():
            return ", ".join(number(item) for item in value) or "none"
    return str(value)


def lines(*pairs: tuple[str, str] | None) -> tuple[Line, ...]:
    """The pairs that are there, as lines."""
    return tuple(Line(*pair) for pair in pairs if pair is not None)


def said(*remarks: tuple[object, str]) -> tuple[str, ...]:
    """The remarks whose condition holds."""
    return tuple(text for holds, text in remarks if holds)


def count(amount: int, what: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{amount:,} {what}{'s' * (amount != 1)}"


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    known = list(words)
    return f"{', '.join(known[:-1])} and {known[-1]}" if len(known) > 1 else "".join(known)
