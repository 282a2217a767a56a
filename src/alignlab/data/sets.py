"""Public sets as they lie on the hub or on a disk: a name, a file or a folder -> entries.

Source x (hub | files, known by their columns) -> entries with their official split, and what could not be used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from alignlab.data.examples import fingerprint, parse_rows
from alignlab.data.files import SUFFIXES, Record, kind_of, read_file, read_hub, slice_of
from alignlab.data.formats import SYNONYMS, Kind, Unusable
from alignlab.data.prepared import SPLITS, Entry, Split
from alignlab.data.source import DataSource, Location
from alignlab.errors import UserError
from alignlab.registry import did_you_mean
from alignlab.types import Example, Labelled, Message, Pair, Prompt

SHARES: Mapping[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
DEPTH = 2
"""Folders below the one that is named in which files are looked for."""
_NAMED: tuple[tuple[Split, re.Pattern[str]], ...] = (
    ("validation", re.compile(r"(?<![a-z])(validation|valid|val|dev)", re.IGNORECASE)),
    ("test", re.compile(r"(?<![a-z])(test|eval)", re.IGNORECASE)),
    ("train", re.compile(r"(?<![a-z])train", re.IGNORECASE)),
)
"""What a file's name says of its split."""


class Hub(NamedTuple):
    """One split on the hub, or the file of one behind a URL."""

    where: str
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One public set that a task can be prepared from."""

    name: str
    licence: str
    """Licence and whom to cite; a note, no legal advice."""
    columns: tuple[tuple[str, ...], ...]
    """By these columns a file is known; one of several sets of them."""
    without: tuple[str, ...] = ()
    """With any of these it is another's."""
    read: Callable[[Record], Iterable[Entry]]
    """A row -> its entries. Raises Unusable to leave it out and count it, and may find a column missing or odd."""
    hub: Mapping[Split, Hub | tuple[Hub, ...]] = field(default_factory=dict)
    """Official split -> where it is on the network; all that is fetched where nothing local is named."""
    shares: Mapping[Split, float] = field(default_factory=lambda: SHARES)
    """How rows without an official split are divided."""
    built_in: Callable[[], Iterable[Entry]] | None = None
    """Entries that come with alignlab and are added whatever is named."""

    def knows(self, columns: Iterable[str]) -> bool:
        found = set(columns)
        return not found & set(self.without) and any(found >= set(wanted) for wanted in self.columns)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one file, or one split of a hub set, gave."""

    source: str
    where: str
    split: Split | None
    num_rows: int
    entries: tuple[Entry, ...]
    unusable: Mapping[str, int]
    """Reason -> rows left out."""
    fingerprint: str
    """Of the rows."""
    notes: tuple[str, ...] = ()
    """What a reader has to know, in plain words."""


def collect(
    task: str,
    sources: Sequence[Source],
    where: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    splits: Sequence[str] = (),
) -> list[Found]:
    """All entries of a task: from what is named or, where nothing is, from the hub.

    Args:
        where: files, folders (looked through two levels deep), URLs, names of hub sets. Of a folder, files that no
            source knows are passed over; a file that is named has to be known.
        columns: our name -> the file's, before a file is looked at.
        splits: `train[:200]`: slices of the rows of a split; splits that are not named are read whole.

    Raises:
        UserError: nothing to read, an unknown format, unreadable files; that a set is gated or the machine offline.
    """
    slices = _slices(splits)
    found = []
    for source, place, split in _places(task, sources, where, columns or {}):
        rows = _read(place, slices.get(split or "train"), columns or {})
        found.append(_entries(task, source or _known(sources, rows, place.where, task), place.where, split, rows))
    for source in sources:
        if source.built_in is not None and found:
            entries = tuple(_of(entry, source.name, task) for entry in source.built_in())
            found.append(
                Found(source=source.name, where="alignlab", split=None, num_rows=len(entries), entries=entries,
                      unusable={}, fingerprint=fingerprint([entry.prompt for entry in entries]))
            )  # fmt: skip
    return found


def choose(task: str, sources: Sequence[Source], names: Sequence[str]) -> tuple[Source, ...]:
    """The sources of these names, each the beginning of one's own in small letters; all of them where none is named.

    Raises:
        UserError: there is none of a name.
    """
    chosen = []
    for name in names:
        of_name = [source for source in sources if source.name.lower().startswith(name.lower())]
        if not name or not of_name:
            there = [source.name for source in sources]
            hint = did_you_mean(name, [word for source in there for word in (source, source.split()[0])])
            raise UserError(f"{task}: has no set {name!r}; " + (hint or f"there are: {', '.join(there)}"))
        chosen += of_name
    return tuple(source for source in sources if not names or source in chosen)


def _places(
    task: str, sources: Sequence[Source], where: Sequence[str], columns: Mapping[str, str]
) -> Iterator[tuple[Source | None, Hub, Split | None]]:
    """What is to be read: its source where that is known already, its place, and its official split."""
    for name in where:
        path = Path(name).expanduser()
        if path.is_dir():
            yield from _of_folder(task, sources, path, columns)
        elif path.exists() or "://" in name or name.removesuffix(".gz").endswith(SUFFIXES):
            yield None, Hub(name), split_of_name(Path(name).name)
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name):
            known = [source for source in sources if any(p.where == name for s in source.hub.values() for p in _all(s))]
            rest: Mapping[Split, Hub | tuple[Hub, ...]] = {"train": Hub(name, None, "train")}
            splits = known[0].hub if known else rest
            yield from ((None, place, split) for split, places in splits.items() for place in _all(places))
        else:
            raise UserError(f"{name}: no such file or folder, and no name of a hub set (owner/name)")
    if not where:
        for source in sources:
            for split, places in source.hub.items():
                yield from ((source, place, split) for place in _all(places))


def _all(places: Hub | tuple[Hub, ...]) -> tuple[Hub, ...]:
    return (places,) if isinstance(places, Hub) else places


def _of_folder(
    task: str, sources: Sequence[Source], folder: Path, columns: Mapping[str, str]
) -> Iterator[tuple[Source | None, Hub, Split | None]]:
    files = [p for depth in range(DEPTH + 1) for p in sorted(folder.glob("*/" * depth + "*")) if _is_data(p)]
    known = []
    for path in files:
        source = _source_of(sources, _renamed(read_file(path)[:1], columns)[0]) if sources else None
        if source is not None or not sources:
            known.append((source, Hub(str(path)), split_of_name(path.name)))
    if not known:
        there = ", ".join(sorted(path.name for path in files)) or "no data files"
        raise UserError(
            f"{folder}: none of its files is one that {task} knows; found {there}; it reads {_listed(sources)}"
        )
    yield from known


def _is_data(path: Path) -> bool:
    return path.is_file() and path.name.removesuffix(".gz").endswith(SUFFIXES) and not path.name.startswith(".")


def split_of_name(name: str) -> Split | None:
    """The split that a file's name speaks of; None where it speaks of none."""
    stem = name.split(".")[0]
    return next((split for split, pattern in _NAMED if pattern.search(stem)), None)


def _source_of(sources: Sequence[Source], row: Record) -> Source | None:
    return next((source for source in sources if source.knows(row)), None)


def _known(sources: Sequence[Source], rows: Sequence[Record], where: str, task: str) -> Source | None:
    """The source of a file that was named; None where the task reads whatever it is given."""
    if not sources:
        return None
    source = _source_of(sources, rows[0])
    if source is None:
        raise UserError(
            f"{where}: {task} cannot be made of columns {', '.join(rows[0])}; it reads {_listed(sources)}; map a "
            "column with --column OURS=THEIRS, or prepare it as jsonl"
        )
    return source


def _listed(sources: Sequence[Source]) -> str:
    return "; ".join(
        f"{source.name} ({' or '.join(', '.join(wanted) for wanted in source.columns)})"
        for source in sources
        if source.columns
    )


def _read(place: Hub, part: str | None, columns: Mapping[str, str]) -> list[Record]:
    try:
        rows = (
            read_file(place.where)
            if place.split is None
            else read_hub(place.where, place.config, f"{place.split}{part or ''}")
        )
    except UserError as error:
        raise UserError(str(error).replace("can be named in data.path", "is taken with --from PATH")) from error
    rows = rows[slice_of(part if place.split is None else None, len(rows), place.where)]
    if not rows:
        raise UserError(f"{place.where}: the slice {part} holds no rows")
    return _renamed(rows, columns)


def _renamed(rows: Sequence[Record], columns: Mapping[str, str]) -> list[Record]:
    for ours, theirs in columns.items():
        if rows and not any(theirs in row for row in rows):
            hint = did_you_mean(theirs, rows[0])
            raise UserError(f"no column {theirs!r} for {ours}; " + (hint or f"found: {', '.join(rows[0])}"))
    back = {theirs: ours for ours, theirs in columns.items()}
    return [{back.get(column, column): value for column, value in row.items()} for row in rows]


def _slices(splits: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in splits:
        name, bracket, rest = text.partition("[")
        if name not in SPLITS or not bracket:
            raise UserError(f"cannot read the split {text!r}; write train[:200], validation[10%:20%] or test[:50]")
        slice_of(text, 1, "--split")
        found[name] = bracket + rest
    return found


def _entries(task: str, source: Source | None, where: str, split: Split | None, rows: Sequence[Record]) -> Found:
    if source is None:
        entries, unusable = read_any(rows, where)
    else:
        entries, unusable = _read_entries(source, where, rows)
    name = source.name if source else Path(where).name
    kept = [_of(entry, name, task, split) for entry in entries]
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in unusable.items())
        raise UserError(f"{where}: none of {len(rows)} rows is usable: {reasons}")
    return Found(
        source=name,
        where=where,
        split=split,
        num_rows=len(rows),
        entries=tuple(kept),
        unusable=unusable,
        fingerprint=fingerprint(rows),
        notes=_unanswered(name, rows) if source is None else (),
    )


def _unanswered(name: str, rows: Sequence[Record]) -> tuple[str, ...]:
    """That there are prompts alone, where another column has a name that answers go by."""
    columns = {
        column: None for row in rows for column, value in row.items() if isinstance(value, str) and value.strip()
    }
    if kind_of_rows(rows) != "prompts" or "answer" in columns:
        return ()
    likely = next((column for column in columns if column.lower() in SYNONYMS["completion"]), None)
    if likely is None:
        return ()
    return (
        f"{name}: its rows have no answer column, so they are prompts alone; {likely!r} looks like one "
        f"(--column completion={likely})",
    )


def _of(entry: Entry, source: str, task: str, split: Split | None = None) -> Entry:
    """The entry with its source, task and split, as far as it does not say them itself."""
    prompt = replace(entry.prompt, task=entry.prompt.task or task)
    return replace(entry, prompt=prompt, source=source, split=entry.split or split)


def _read_entries(source: Source, where: str, rows: Sequence[Record]) -> tuple[list[Entry], dict[str, int]]:
    entries, unusable = [], Counter[str]()
    for i, row in enumerate(rows):
        try:
            made = list(source.read(row))
        except Unusable as reason:
            unusable[str(reason)] += 1
            continue
        except KeyError as error:
            missing = f"has no column {error.args[0]!r}, which the first row has or {source.name} needs"
            raise UserError(f"{where}, row {i + 1}: {missing}; found: {', '.join(row)}") from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            what = " ".join(str(error).split())[:160]
            raise UserError(f"{where}, row {i + 1}: is no row of {source.name} ({what})") from error
        origin = f"{Path(where).name}/{i}"
        for entry in made:
            meta = {**entry.prompt.meta, "origin": origin}
            entries.append(replace(entry, prompt=replace(entry.prompt, meta=meta)))
    return entries, dict(unusable)


# ---- whatever it is --------------------------------------------------------------------------------------------------


def read_any(
    rows: Sequence[Record], where: str, source: DataSource | None = None
) -> tuple[list[Entry], dict[str, int]]:
    """The rows of a file of any format that a recipe could name, found by its columns.

    A demonstration or preferred answer is the reference too, where a row has none of its own.
    """
    source = source or DataSource(path=where)
    kind = kind_of_rows(rows)
    items, tally = parse_rows(source, kind, Location(where, False, None, None), dict(enumerate(rows)))
    entries = []
    for i, item in items.items():
        scores = (rows[i].get(name) for name in ("score_chosen", "score_rejected"))
        chosen, rejected = (float(score) if isinstance(score, int | float) else None for score in scores)
        entry = as_entry(item)
        if entry.prompt.answer is None and entry.prompt.messages and entry.label is not False:
            entry = replace(entry, prompt=replace(entry.prompt, answer=entry.completion))
        entries.append(replace(entry, score_chosen=chosen, score_rejected=rejected))
    return entries, {reason: len(dropped) for reason, dropped in tally.dropped.items()}


def as_entry(item: Example | Pair | Labelled | Prompt) -> Entry:
    if isinstance(item, Pair):
        return Entry(prompt=item.prompt, completion=item.chosen, rejected=item.rejected)
    if isinstance(item, Labelled):
        return Entry(prompt=item.prompt, completion=item.completion, label=item.label)
    if isinstance(item, Example):
        return Entry(prompt=item.prompt, completion=item.completion)
    return Entry(prompt=item)


def kind_of_rows(rows: Iterable[Record]) -> Kind:
    """What rows teach, by their columns: pairs, labelled completions, demonstrations, or prompts alone."""
    rows = list(rows)
    columns = {column for row in rows for column, value in row.items() if value is not None}
    talks = ("messages", "conversations")
    if columns >= {"chosen", "rejected"}:
        return "pairs"
    if "label" in columns and columns & {"completion", "prompt", *talks}:
        return "labelled"
    if columns & {"completion", "chosen", "text"} or ("question" in columns and "answer" in columns):
        return "examples"
    if any(_ends_with_answer(row.get(name)) for row in rows for name in talks):
        return "examples"
    return "examples" if columns >= {"prompt", "answer"} else "prompts"


def _ends_with_answer(value: Any) -> bool:
    last = value[-1] if isinstance(value, list) and value else None
    return isinstance(last, dict) and str(last.get("role", last.get("from"))) in ("assistant", "gpt", "model")


# ---- for those who write `read` --------------------------------------------------------------------------------------


def text_of(row: Record, *columns: str) -> str:
    """The text of the first of these columns that is there; of a conversation its last message.

    Raises:
        Unusable: it is empty.
        KeyError: none is there.
    """
    column = next((name for name in columns if name in row), columns[0])
    value = row[column]
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {kind_of(value)}, expected text")
    if not (value or "").strip():
        raise Unusable(f"empty {column}")
    return str(value)


def number_of(row: Record, column: str) -> float | None:
    """A number, also one written as text; None where it is missing."""
    value = row.get(column)
    return None if value is None or value == "" else float(value)


def asked(text: str, *, system: str = "", answer: str | None = None, **meta: Any) -> Prompt:
    """A prompt of one user message."""
    before = (Message("system", system),) if system.strip() else ()
    return Prompt(messages=(*before, Message("user", text)), id="", answer=answer, meta=meta)
