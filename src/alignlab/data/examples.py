"""A source as demonstrations, pairs, labelled completions or prompts, its rows split into train and validation.

DataSource, kind, side -> items, and a report of what could not be used.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from alignlab.data.files import Record
from alignlab.data.formats import Kind, Reader, Unusable
from alignlab.data.source import DataSource, Location, train_location, validation_location
from alignlab.errors import UserError
from alignlab.types import Example, Labelled, Pair, Prompt

Side = Literal["train", "validation"]
Item = TypeVar("Item", bound=Example | Pair | Labelled | Prompt)

NUM_SHOWN = 3
"""Rows named for each reason why rows were dropped."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the rows."""

    name: str
    format: str
    num_rows: int
    side: Side
    num_items: int
    """Items of this side."""
    num_other: int
    """Usable rows that went to the other side."""
    num_beyond: int
    """Usable rows of this side beyond the limit."""
    num_duplicates: int
    """Items equal to an earlier one in all but id; they are kept."""
    dropped: Mapping[str, int]
    """Reason -> rows that could not be used."""
    shown: Mapping[str, tuple[int, ...]]
    """Reason -> the first such rows, counted from 1."""
    fingerprint: str
    """Of the items."""

    def __str__(self) -> str:
        text = f"{self.name} ({self.format}): {self.num_items} of {self.num_rows} rows"
        other = "held back for validation" if self.side == "train" else "for training"
        text += f", {self.num_other} {other}" if self.num_other else ""
        text += f", {self.num_beyond} beyond the limit" if self.num_beyond else ""
        text += f", {self.num_duplicates} duplicates" if self.num_duplicates else ""
        return text + (f"; dropped {_reasons(self.dropped, self.shown)}" if self.dropped else "")


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[Item]):
    """One side of a source."""

    items: tuple[Item, ...]
    report: Report


@overload
def load_examples(source: DataSource, kind: Literal["examples"], side: Side = "train") -> Loaded[Example]: ...
@overload
def load_examples(source: DataSource, kind: Literal["pairs"], side: Side = "train") -> Loaded[Pair]: ...
@overload
def load_examples(source: DataSource, kind: Literal["labelled"], side: Side = "train") -> Loaded[Labelled]: ...
@overload
def load_examples(source: DataSource, kind: Literal["prompts"], side: Side = "train") -> Loaded[Prompt]: ...
def load_examples(source: DataSource, kind: Kind, side: Side = "train") -> Loaded[Any]:
    """One side of a source as demonstrations, preference pairs, labelled completions or prompts.

    Where labelled completions are wanted and the rows are pairs, each gives two: chosen desirable, rejected
    undesirable. The report and `limit` then count pairs.

    Where validation has rows of its own, those whose prompt is also in train are dropped from it; where it has none,
    the hash of each prompt says its side. Empty rows, pairs of equal completions and the like are dropped and counted.

    Raises:
        UserError: unreadable data, unknown columns (with the nearest), a value of the wrong type, more than
            `max_dropped_fraction` unusable rows, or none left.
    """
    own = validation_location(source)
    location = own if own is not None and side == "validation" else train_location(source)
    kept, tally = _parse(source, kind, location)
    if own is None:
        held_out = _held_out({_key(item) for item in kept.values()}, source)
        mine = {i: item for i, item in kept.items() if (_key(item) in held_out) == (side == "validation")}
    elif side == "validation":
        train = {_key(item) for item in _parse(source, kind, train_location(source))[0].values()}
        mine = {i: item for i, item in kept.items() if _key(item) not in train}
        for i in kept.keys() - mine.keys():
            tally.drop(i, "prompt is also in train")
        kept = mine
    else:
        mine = kept
    tally.check(source.max_dropped_fraction)
    items = tuple(mine.values())[: source.limit]
    if not items:
        raise UserError(f"{location.where}: no row is left for {side}; of {tally.num_rows} rows {len(kept)} are usable")
    report = Report(
        name=location.where,
        format=tally.format,
        num_rows=tally.num_rows,
        side=side,
        num_items=len(items),
        num_other=len(kept) - len(mine),
        num_beyond=len(mine) - len(items),
        num_duplicates=len(items) - len({_content(item) for item in items}),
        dropped={reason: len(rows) for reason, rows in tally.dropped.items()},
        shown=tally.shown(),
        fingerprint=fingerprint(items),
    )
    if kind == "labelled":
        items = tuple(verdict for item in items for verdict in _verdicts(item))
    return Loaded(items=items, report=report)


def _verdicts(item: Labelled | Pair) -> tuple[Labelled, ...]:
    """A pair as the two verdicts that it implies."""
    if isinstance(item, Labelled):
        return (item,)
    return (
        Labelled(prompt=item.prompt, completion=item.chosen, label=True),
        Labelled(prompt=item.prompt, completion=item.rejected, label=False),
    )


def _parse(source: DataSource, kind: Kind, location: Location) -> tuple[dict[int, Any], Tally]:
    return parse_rows(source, kind, location, location.read())


def parse_rows(
    source: DataSource, kind: Kind, location: Location, rows: Mapping[int, Record]
) -> tuple[dict[int, Any], Tally]:
    """All usable rows of a location by position, and what became of the others.

    Raises:
        UserError: there are no rows, or their columns do not give what `kind` needs.
    """
    if not rows:
        raise UserError(f"{location.where}: the split {location.split!r} holds no rows")
    reader = Reader.of(source, kind, rows.values(), location.where)
    tally = Tally(name=location.where, format=reader.format, num_rows=len(rows))
    items: dict[int, Any] = {}
    times: Counter[str] = Counter()
    for i, row in rows.items():
        try:
            item = reader.item(row, f"{location.where}, row {i + 1}", location.id(i))
        except Unusable as reason:
            tally.drop(i, str(reason))
            continue
        prompt = _prompt(item)
        times[prompt.id] += 1
        if times[prompt.id] > 1:  # sampling keys are built on ids
            prompt = replace(prompt, id=f"{prompt.id}#{times[prompt.id]}")
        items[i] = prompt if isinstance(item, Prompt) else replace(item, prompt=prompt)
    return items, tally


@dataclass(kw_only=True)
class Tally:
    """Rows that cannot be used, by reason."""

    name: str
    format: str
    num_rows: int
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, position: int, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(position + 1)

    def shown(self) -> dict[str, tuple[int, ...]]:
        return {reason: tuple(sorted(rows)[:NUM_SHOWN]) for reason, rows in self.dropped.items()}

    def check(self, limit: float) -> None:
        counts = {reason: len(rows) for reason, rows in self.dropped.items()}
        total = sum(counts.values())
        if total > limit * self.num_rows:
            reasons = _reasons(counts, self.shown())
            raise UserError(f"{self.name}: {total} of {self.num_rows} rows are unusable, over {limit:.0%}: {reasons}")


def _reasons(dropped: Mapping[str, int], shown: Mapping[str, tuple[int, ...]]) -> str:
    """`4 empty chosen (row 87, 517, 926, ..)`, and so on."""

    def rows(reason: str) -> str:
        return ", ".join(map(str, shown[reason])) + (", .." if dropped[reason] > len(shown[reason]) else "")

    return ", ".join(f"{count} {reason} (row {rows(reason)})" for reason, count in dropped.items())


# ---- identity --------------------------------------------------------------------------------------------------------


def fingerprint(data: str | Path | Iterable[object]) -> str:
    """sha256 of a file's bytes, or of rows or items in their order."""
    if isinstance(data, str | Path):
        return hashlib.sha256(Path(data).expanduser().read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for row in data:
        record = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
        digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _prompt(item: Example | Pair | Labelled | Prompt) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def _key(item: Example | Pair | Labelled | Prompt) -> str:
    """What decides the side: the prompt, or the text where there is none."""
    messages = [(message.role, message.content) for message in _prompt(item).messages]
    text = item.completion if isinstance(item, Example) and not messages else ""
    return _hash(messages, text)


def _content(item: Example | Pair | Labelled | Prompt) -> str:
    """What makes two items duplicates: everything but the id."""
    prompt = _prompt(item)
    said = [getattr(item, name, None) for name in ("completion", "label", "chosen", "rejected")]
    return _hash([(message.role, message.content) for message in prompt.messages], prompt.answer, prompt.meta, said)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str).encode()).hexdigest()


def _held_out(keys: set[str], source: DataSource) -> set[str]:
    """The prompts of validation: a share of all, at least one and never all, each chosen by its own hash."""
    draws = {key: int(_hash(source.split_seed, key)[:16], 16) / 2**64 for key in keys}
    count = sum(draw < source.validation_fraction for draw in draws.values())
    count = min(max(count, 1), len(keys) - 1) if source.validation_fraction > 0 else 0
    return set(sorted(keys, key=lambda key: draws[key])[:count])
