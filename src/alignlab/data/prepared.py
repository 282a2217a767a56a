"""A task's data split once and for all: entries <-> a folder of train, validation and test files.

The embedded starter's data lie in the same form, so whatever reads one reads the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from alignlab.data.files import Record
from alignlab.data.formats import Kind
from alignlab.data.overlap import normalise
from alignlab.errors import UserError
from alignlab.types import Message, Prompt

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CARD = "card.json"
"""What a prepared folder says about itself."""
PREFIXES = {"examples": ("",), "prompts": ("",), "pairs": ("pairs.",), "labelled": ("labelled.", "pairs.")}
"""Kind -> beginnings of the names of its files, the first that is there."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row on its way into a prepared folder: a prompt, and what there is to learn or to compare with.

    Example: `Entry(prompt=Prompt(messages=(Message("user", "2+3?"),), id=""), completion="5", rejected="6")`.
    """

    prompt: Prompt
    """Its id is given when the folder is written; `meta["category"]` is its stratum."""
    completion: str | None = None
    """A demonstration, or the preferred answer of a pair."""
    rejected: str | None = None
    """The other answer of a pair."""
    label: bool | None = None
    """Whether the completion is desirable, where that is said of it alone."""
    score_chosen: float | None = None
    score_rejected: float | None = None
    split: Split | None = None
    """Where its authors put it; None: its hash decides."""
    group: str = ""
    """Entries of one group stay on one side; empty: those of one prompt."""
    said: str = ""
    """What its authors wrote, for comparison, without the words around it; empty: what the prompt says."""
    source: str = ""
    """Name of the set that it is from."""

    @cached_property
    def key(self) -> str:
        """What the prompt says, normalised and without a system message."""
        said = [f"{m.role}: {normalise(m.content)}" for m in self.prompt.messages if m.role != "system"]
        return "\n".join(said) or normalise(self.completion or "")

    @cached_property
    def unit(self) -> str:
        """What stays on one side."""
        return normalise(self.group) or self.key

    @property
    def text(self) -> str:
        """What is compared with other splits, word by word."""
        asked = "\n".join(m.content for m in self.prompt.messages if m.role != "system")
        return self.said or asked or self.completion or ""

    @property
    def category(self) -> str:
        return str(self.prompt.meta.get("category", ""))

    def under(self, system_prompt: str) -> Entry:
        """The same with a system message, where it has messages and none of them is one."""
        messages = self.prompt.messages
        if not system_prompt or not messages or messages[0].role == "system":
            return self
        return replace(self, prompt=replace(self.prompt, messages=(Message("system", system_prompt), *messages)))


def to_rows(task: str, split: Split, entries: Sequence[Entry]) -> dict[str, list[Record]]:
    """File name -> rows: demonstrations and prompts, pairs, labelled completions; a kind without rows has no file.

    What is undesirable by its label is no demonstration. Ids are numbers in the order of the entries.
    """
    examples: list[Record] = []
    pairs: list[Record] = []
    labelled: list[Record] = []
    seen: set[tuple[str, str | None]] = set()
    for entry in entries:
        if (known := (entry.key, entry.completion)) not in seen and entry.label is not False:
            seen.add(known)
            examples.append(_row(task, split, len(examples), entry, completion=entry.completion))
        if entry.rejected is not None:
            scores = {"score_chosen": entry.score_chosen, "score_rejected": entry.score_rejected}
            given = {name: score for name, score in scores.items() if score is not None}
            answers = {"chosen": entry.completion, "rejected": entry.rejected}
            pairs.append(_row(task, f"{split}-pairs", len(pairs), entry, **answers, **given))
        if entry.label is not None:
            verdict = {"completion": entry.completion, "label": entry.label}
            labelled.append(_row(task, f"{split}-labelled", len(labelled), entry, **verdict))
    files = {"": examples, "pairs.": pairs, "labelled.": labelled}
    return {f"{prefix}{split}.jsonl": rows for prefix, rows in files.items() if rows}


def _row(task: str, where: str, number: int, entry: Entry, **said: Any) -> Record:
    prompt = entry.prompt
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    row: Record = {"id": f"{task}/{where}/{number:05d}", "task": prompt.task}
    row |= {"messages": messages} if messages else {"text": said.pop("completion", None)}
    row |= said | ({} if prompt.answer is None else {"answer": prompt.answer})
    return row | {"meta": dict(prompt.meta)}


def jsonl(rows: Sequence[Record]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_folder(path: str | None) -> bool:
    """Whether data are named by their folder."""
    return path is not None and "://" not in path and Path(path).expanduser().is_dir()


def split_file(folder: Path, kind: Kind, split: Split) -> Path:
    """The file of a prepared folder that holds a split's rows of a kind; it may be missing."""
    names = [f"{prefix}{split}.jsonl" for prefix in PREFIXES[kind]]
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def data_files(folder: Path) -> list[Path]:
    """All files of a prepared folder that hold rows."""
    names = {f"{prefix}{split}.jsonl" for prefix in ("", "pairs.", "labelled.") for split in SPLITS}
    return sorted(path for path in folder.iterdir() if path.name in names)


def require_split(folder: Path, kind: Kind, split: Split) -> Path:
    """The same file, which has to be there.

    Raises:
        UserError: it is missing, with what the folder has instead, or how to make one.
    """
    path = split_file(folder, kind, split)
    if path.is_file():
        return path
    there = [file.name for file in data_files(folder)]
    if not there or (split == "train" and not (folder / CARD).is_file()):
        raise UserError(
            f"{folder}: is a folder that nobody prepared (it has no {path.name}); run `alignlab data prepare TASK "
            f"--from {folder}` and name what it writes, or name one file"
        )
    raise UserError(f"{folder}: has no {path.name}; it has {', '.join(there)}")


def card_of(folder: Path) -> dict[str, Any]:
    """What a prepared folder says about itself; empty where it says nothing that can be read."""
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def overlap_of(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of prompts on two sides; empty where its files are no longer those it speaks of."""
    card = card_of(folder)
    files, overlap = card.get("files"), card.get("overlap")
    if not isinstance(files, dict) or not isinstance(overlap, dict):
        return {}
    now = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in data_files(folder)}
    return overlap if now == {name: file.get("sha256") for name, file in files.items()} else {}
