"""Data as a recipe may name them, opened to be looked at: a task, a file or a folder -> its parts.

A part is one file's rows: demonstrations and prompts, pairs, or labelled completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import registry, starter
from alignlab.data.examples import parse_rows
from alignlab.data.files import Record, read_rows
from alignlab.data.formats import Kind
from alignlab.data.prepared import SPLITS, data_files
from alignlab.data.sets import kind_of_rows, split_of_name
from alignlab.data.source import DataSource, Location
from alignlab.errors import UserError
from alignlab.types import Example, Labelled, Pair, Prompt

Item = Example | Pair | Labelled | Prompt


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file."""

    name: str
    """Of its file: `pairs.train.jsonl`."""
    split: str
    """`train`, `validation`, `test`; `all` of a file by itself."""
    kind: Kind
    rows: int
    items: tuple[Item, ...]
    """What could be read; of kind `examples`, prompts without a demonstration too."""
    dropped: Mapping[str, int]
    """Reason -> rows."""
    scores: tuple[tuple[float, float] | None, ...] = ()
    """Of pairs: (score of chosen, of rejected), where both have one."""


def find(where: str) -> str:
    """The path of what is named: a file, a folder, a URL, or a task's data, those prepared here before the starter's.

    Raises:
        UserError: it is none of them.
    """
    if "://" in where or Path(where).expanduser().exists():
        return where
    folder = folder_of_task(where)
    if folder is not None:
        return str(folder)
    if where in registry.names("tasks"):
        raise UserError(
            f"{where}: its data are not here; `alignlab data prepare {where}` fetches them, and --from takes a copy"
        )
    hint = registry.did_you_mean(where, registry.names("tasks"))
    raise UserError(f"{where}: no such file or folder, and no task" + (f"; {hint}" if hint else ""))


def folder_of_task(task: str) -> Path | None:
    """A task's data: `data/TASK`, where `alignlab data prepare` puts them, else the starter's; None without either."""
    folders = (Path("data") / task, starter.DATA / task)
    return next((folder for folder in folders if task and folder.is_dir()), None)


def open_parts(where: str, *, source: DataSource | None = None, split: str | None = None) -> list[Part]:
    """The parts of a file or folder, or of a task's data.

    Args:
        source: how rows are read: columns, format, system prompt, template.
        split: only this one's files, of a folder; `train[:20]` or `[:20]` of a file, which is all train, or what its
            name says.

    Raises:
        UserError: unreadable data, or no such split.
    """
    source, path = source or DataSource(), find(where)
    folder = Path(path).expanduser()
    if "://" in path or not folder.is_dir():
        name = (split or "").partition("[")[0]
        known = dict.fromkeys(("train", *filter(None, [split_of_name(Path(path).name)])))
        if name and name not in known:
            raise UserError(
                f"{path}: has no split {name!r}: a file by itself has only {' or '.join(known)}, which is all of it; a "
                "part of its rows is [5:9], and `alignlab data prepare` divides them"
            )
        rows = read_rows(path, split=split)
        return [_part(source, Path(path).name, "all", path, rows)]
    files = data_files(folder)
    if not files:
        raise UserError(
            f"{path}: is a folder that nobody prepared: `alignlab data prepare TASK --from {path}`, or name one file"
        )
    parts = [_part(source, file.name, file.name.split(".")[-2], str(file), read_rows(file)) for file in files]
    there = [part for part in parts if split in (None, part.split)]
    if not there:
        raise UserError(f"{path}: has no split {split!r}; it has {', '.join(sorted({p.split for p in parts}))}")
    return sorted(there, key=lambda part: (SPLITS.index(part.split), part.name))


def _part(source: DataSource, name: str, split: str, where: str, rows: list[Record]) -> Part:
    back = {column: ours for ours, column in source.columns.items()}
    kind = kind_of_rows([{back.get(c, c): v for c, v in row.items()} for row in rows])
    if source.prompt_template is not None and kind == "prompts" and "completion" in source.columns:
        kind = "examples"
    answered, asked = dict(enumerate(rows)), dict[int, Record]()
    column = source.columns.get("completion", "completion")
    if kind == "examples" and any(column in row for row in rows):
        asked = {i: row for i, row in answered.items() if row.get(column) is None and "messages" in row}
        answered = {i: row for i, row in answered.items() if i not in asked}
    items: dict[int, Item] = {}
    dropped: dict[str, int] = {}
    for some, of_kind in ((answered, kind), (asked, "prompts")):
        if some:
            read, tally = parse_rows(source, of_kind, Location(where, False, None, None), some)
            items |= read
            for reason, positions in tally.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + len(positions)
    scores = tuple(_scores(rows[i]) for i in sorted(items)) if kind == "pairs" else ()
    return Part(
        name=name,
        split=split,
        kind=kind,
        rows=len(rows),
        items=tuple(items[i] for i in sorted(items)),
        dropped=dropped,
        scores=scores,
    )


def _scores(row: Record) -> tuple[float, float] | None:
    values: list[Any] = [row.get("score_chosen"), row.get("score_rejected")]
    try:
        chosen, rejected = map(float, values)
    except (TypeError, ValueError):
        return None
    return chosen, rejected


def prompt_of(item: Item) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def completions_of(item: Item) -> tuple[str, ...]:
    """The texts that a row gives as answers; none of a bare prompt."""
    if isinstance(item, Pair):
        return item.chosen, item.rejected
    return () if isinstance(item, Prompt) else (item.completion,)
