"""Where rows come from, and which of them are validation's own.

DataSource -> location of each side -> rows by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from alignlab.data.files import Record, read_file, read_hub, slice_of
from alignlab.errors import UserError

Format = Literal["auto", "chat", "transcript", "text"]


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where rows come from and how they are read."""

    path: str | None = None
    """A file (JSON, JSONL, CSV, TSV, parquet) or its URL; goes before `hub`."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub."""
    hub_config: str | None = None
    """Its configuration, e.g. `main`."""
    split: str | None = None
    """`train`, `train[:200]`, `train[10%:20%]`; of a file only the slice counts."""
    validation_path: str | None = None
    """A file of its own for validation."""
    validation_split: str | None = None
    """The split used for validation; of a file only a slice counts. Without one, a part of the train rows by hash."""
    validation_fraction: float = 0.1
    """Share of the prompts that goes to validation where it has no rows of its own."""
    split_seed: int = 0
    """Which prompts these are. Not the run's seed: all runs of a study share one split."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> column that holds it, e.g. `{"prompt": "dialogue", "completion": "summary"}`."""
    format: Format = "auto"
    """`transcript`: dialogues as text of Human: and Assistant: turns; `chat`; `text`; `auto`: what the columns say."""
    system_prompt: str | None = None
    """System message of conversations that have none."""
    prompt_template: str | None = None
    """The user's message made from columns, e.g. `Summarise: {dialogue}`; `{prompt}` is the message as it stands, and
    `{{` a brace."""
    task: str = ""
    """Task that grades the prompts; empty: as the rows say."""
    limit: int | None = None
    """At most so many items of each side, the first ones."""
    max_dropped_fraction: float = 0.5
    """More unusable rows than this are an error."""


class Location(NamedTuple):
    """A file or a split of a hub data set."""

    where: str
    hub: bool
    config: str | None
    split: str | None

    def read(self) -> dict[int, Record]:
        """The rows by their position in the file, or in the split."""
        if self.hub:
            return dict(enumerate(read_hub(self.where, self.config, self.split)))
        rows = read_file(self.where)
        return {i: rows[i] for i in range(len(rows))[slice_of(self.split, len(rows), self.where)]}

    def id(self, position: int) -> str:
        """The id of a prompt that has none: `train/17`, `openai/gsm8k/test/17`."""
        return f"{self.where}/{self.split or 'train'}/{position}" if self.hub else f"{Path(self.where).stem}/{position}"


def train_location(source: DataSource) -> Location:
    if source.path is None and source.hub is None:
        raise UserError("no data: name a file in data.path or a hub data set in data.hub")
    if source.path is not None:
        return Location(source.path, False, None, source.split)
    return Location(str(source.hub), True, source.hub_config, source.split)


def validation_location(source: DataSource) -> Location | None:
    """The rows that are validation's alone; None where it gets a part of the train rows."""
    if source.validation_path is not None:
        return Location(source.validation_path, False, None, source.validation_split)
    if source.validation_split is None or (source.path is not None and "[" not in source.validation_split):
        return None
    return train_location(source)._replace(split=source.validation_split)
