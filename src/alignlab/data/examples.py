"""Rows of any of the usual formats as demonstrations, preference pairs or prompts, split into train and validation.

[{column: value}, ..] -> Example | Pair | Prompt, and a report of what could not be used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypeVar, get_args, overload

from alignlab.conversation import turn_error
from alignlab.data.files import Record, joined, kind_of, read_file, read_hub, slice_of
from alignlab.errors import UserError
from alignlab.registry import did_you_mean
from alignlab.types import Example, Message, Pair, Prompt

Kind = Literal["examples", "pairs", "prompts"]
Side = Literal["train", "validation"]
Format = Literal["auto", "chat", "transcript", "text"]
Item = TypeVar("Item", bound=Example | Pair | Prompt)

NUM_SHOWN = 3
"""Rows named for each reason why rows were dropped."""

# ---- what is read, and from where ------------------------------------------------------------------------------------

FIELDS: Mapping[str, str] = {
    "prompt": "the user's message, or a list of messages",
    "messages": "a conversation of {role, content}",
    "conversations": "a conversation of {from, value}",
    "completion": "the answer to learn",
    "chosen": "the better answer, or a whole dialogue",
    "rejected": "the worse answer, or a whole dialogue",
    "text": "plain text, without a conversation",
    "answer": "the reference answer that grading compares with",
    "system": "a system message",
    "id": "the prompt's id",
    "task": "the task that grades it",
    "meta": "what else grading needs",
    "margin": "by how much chosen is better",
    "score_chosen": "score of chosen",
    "score_rejected": "score of rejected",
}
"""What columns can be mapped to."""
ALIASES = {"prompt": ("question",), "system": ("system_prompt",), "id": ("ID",)}
"""Columns that are read as a field without being mapped."""
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "input", "query", "intent", "goal", "dialogue", "prompts_final", "article", "context"),
    "completion": ("response", "output", "summary", "section_text", "target", "snippet", "code"),
    "chosen": ("chosen_response", "preferred", "preferred_output", "better", "winner", "accepted"),
    "rejected": ("rejected_response", "non_preferred_output", "dispreferred", "worse", "loser"),
}
"""Other people's names for a field; they suggest a mapping and are never guessed."""
EXPECTED: Mapping[Kind, str] = {
    "examples": "prompt and completion, question and answer, messages, conversations, or text",
    "pairs": "chosen and rejected, and prompt unless they are whole dialogues",
    "prompts": "prompt, question, messages or conversations",
}
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


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
    """The user's message made from columns, e.g. `Summarise: {dialogue}`; `{prompt}` is the message as it stands."""
    task: str = ""
    """Task that grades the prompts; empty: as the rows say."""
    limit: int | None = None
    """At most so many items of each side, the first ones."""
    max_dropped_fraction: float = 0.5
    """More unusable rows than this are an error."""


class _Location(NamedTuple):
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


def _train(source: DataSource) -> _Location:
    if source.path is None and source.hub is None:
        raise UserError("no data: name a file in data.path or a hub data set in data.hub")
    if source.path is not None:
        return _Location(source.path, False, None, source.split)
    return _Location(str(source.hub), True, source.hub_config, source.split)


def _own_validation(source: DataSource) -> _Location | None:
    """The rows that are validation's alone; None where it gets a part of the train rows."""
    if source.validation_path is not None:
        return _Location(source.validation_path, False, None, source.validation_split)
    if source.validation_split is None or (source.path is not None and "[" not in source.validation_split):
        return None
    return _train(source)._replace(split=source.validation_split)


# ---- rows -> examples ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the rows."""

    name: str
    format: str
    num_rows: int
    num_items: int
    """Items of this side."""
    num_other: int
    """Usable rows that went to the other side or beyond the limit."""
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
        text += f", {self.num_other} held back" if self.num_other else ""
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
def load_examples(source: DataSource, kind: Literal["prompts"], side: Side = "train") -> Loaded[Prompt]: ...
def load_examples(source: DataSource, kind: Kind, side: Side = "train") -> Loaded[Any]:
    """One side of a source as demonstrations, preference pairs or prompts.

    Where validation has rows of its own, those whose prompt is also in train are dropped from it; where it has none,
    the hash of each prompt says its side. Empty rows, pairs of equal completions and the like are dropped and counted.

    Raises:
        UserError: unreadable data, unknown columns (with the nearest), a value of the wrong type, more than
            `max_dropped_fraction` unusable rows, or none left.
    """
    own = _own_validation(source)
    location = own if own is not None and side == "validation" else _train(source)
    kept, tally = _parse(source, kind, location)
    if own is None:
        held_out = _held_out({_key(item) for item in kept.values()}, source)
        mine = {i: item for i, item in kept.items() if (_key(item) in held_out) == (side == "validation")}
    elif side == "validation":
        train = {_key(item) for item in _parse(source, kind, _train(source))[0].values()}
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
        num_items=len(items),
        num_other=len(kept) - len(items),
        num_duplicates=len(items) - len({_content(item) for item in items}),
        dropped={reason: len(rows) for reason, rows in tally.dropped.items()},
        shown=tally.shown(),
        fingerprint=fingerprint(items),
    )
    return Loaded(items=items, report=report)


def _parse(source: DataSource, kind: Kind, location: _Location) -> tuple[dict[int, Any], _Tally]:
    """All usable rows of a location by position, and what became of the others."""
    rows = location.read()
    reader = _Reader.of(source, kind, rows.values(), location.where)
    tally = _Tally(name=location.where, format=reader.format, num_rows=len(rows))
    items: dict[int, Any] = {}
    times: Counter[str] = Counter()
    for i, row in rows.items():
        try:
            item = reader.item(row, f"{location.where}, row {i + 1}", location.id(i))
        except _Unusable as reason:
            tally.drop(i, str(reason))
            continue
        prompt = _prompt(item)
        times[prompt.id] += 1
        if times[prompt.id] > 1:  # sampling keys are built on ids
            prompt = replace(prompt, id=f"{prompt.id}#{times[prompt.id]}")
        items[i] = prompt if isinstance(item, Prompt) else replace(item, prompt=prompt)
    return items, tally


class _Unusable(Exception):
    """A row that is left out and counted under this reason."""


@dataclass(kw_only=True)
class _Tally:
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
            raise UserError(f"{self.name}: {total} of {self.num_rows} rows cannot be used (more than {limit:.0%}): {reasons}")


def _reasons(dropped: Mapping[str, int], shown: Mapping[str, tuple[int, ...]]) -> str:
    """`3 empty chosen (row 87, 517, 926)`, and so on."""
    return ", ".join(f"{n} {reason} (row {', '.join(map(str, shown[reason]))})" for reason, n in dropped.items())


# ---- one row -> one example ------------------------------------------------------------------------------------------

_ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_GOLD = re.compile(r"####[ \t]*([^\n]*\S)\s*\Z")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_CONVERSATIONS = ("messages", "conversations")


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """How the rows of one file are read; decided once, from all its columns."""

    source: DataSource
    kind: Kind
    format: str
    columns: Mapping[str, str]
    """Field -> column."""
    prompt: str | None
    """Field that holds the prompt; None: the template makes it, or whole dialogues bring it."""
    outputs: tuple[str, ...]
    """Fields that hold completions; empty where only the prompt is wanted, or the conversation ends with the answer."""

    @classmethod
    def of(cls, source: DataSource, kind: Kind, rows: Iterable[Record], name: str) -> _Reader:
        """Raises UserError where the columns do not give what `kind` needs."""
        if source.format not in get_args(Format):
            formats = get_args(Format)
            raise UserError(joined(f"no format {source.format!r}", did_you_mean(source.format, formats), _listed(formats)))
        found: Record = {}
        for row in rows:
            found |= {column: value for column, value in row.items() if found.get(column) is None}
        columns = _map_columns(source, found, name)
        whole = _holds_dialogues(found.get(columns.get("chosen", "")))
        first = sorted(("messages", "conversations", "prompt"), key=lambda f: f not in source.columns)  # mapped ones first
        prompt = next((f for f in first if f in columns), None)
        has_prompt = prompt is not None or bool(_placeholders(source.prompt_template) - {"prompt"})
        format: str = source.format
        if format == "auto":
            only_text = "text" in columns and not has_prompt and not columns.keys() & {"completion", "chosen"}
            format = "text" if only_text else "transcript" if whole == "text" and not has_prompt else "chat"
        if format == "text":
            needed = {"examples": ("text",), "pairs": ("chosen", "rejected"), "prompts": ("prompt",)}[kind]
            prompt, outputs = None, ("text",)
        elif kind == "pairs":
            needed = outputs = ("chosen", "rejected")
        elif kind == "prompts":
            needed = outputs = () if has_prompt or not whole else ("chosen",)
        else:
            options = ("completion", "chosen", *(() if prompt in _CONVERSATIONS else ("answer",)))
            outputs = tuple(f for f in options if f in columns)[:1]
            needed = outputs or (() if prompt in _CONVERSATIONS else ("completion",))
        brought = format == "text" or format == "transcript" or (bool(whole) and "chosen" in outputs)
        for field_name in (*(() if has_prompt or brought else ("prompt",)), *needed):
            if field_name not in columns:
                raise UserError(joined(f"{name}: no column for {field_name}", *_suggestion(field_name, kind, found)))
        return cls(source=source, kind=kind, format=format, columns=columns, prompt=prompt, outputs=outputs)

    def item(self, row: Record, where: str, default_id: str) -> Example | Pair | Prompt:
        """What a row says. Raises _Unusable to leave it out and count it, UserError for what has to be repaired."""
        answers = [self._answer(row, output, where) for output in self.outputs]
        messages, last = ((), "") if self.format == "text" else self._conversation(row, where)
        dialogues = {dialogue for dialogue, _ in answers if dialogue}
        if len(dialogues) > 1:
            raise _Unusable("chosen and rejected have different prompts")
        if dialogues and self.prompt not in _CONVERSATIONS:
            messages = dialogues.pop()
        prompt = self._prompt(row, messages, where, default_id)
        texts = [text for _, text in answers] or [last]
        item: Example | Pair | Prompt = prompt
        if self.kind == "examples":
            if not texts[0].strip():
                raise _Unusable("no completion")
            item = Example(prompt=prompt, completion=texts[0])
        elif self.kind == "pairs":
            if texts[0].strip() == texts[1].strip():
                raise _Unusable("chosen equals rejected")
            item = Pair(prompt=prompt, chosen=texts[0], rejected=texts[1], margin=self._margin(row, where))
        try:
            _content(item)
        except UnicodeEncodeError:
            raise _Unusable("half of a surrogate pair") from None
        return item

    # ---- its parts ---------------------------------------------------------------------------------------------------

    def _answer(self, row: Record, name: str, where: str) -> tuple[tuple[Message, ...], str]:
        """(the dialogue before it where the field holds a whole one, the completion)."""
        value, column = self._value(row, name, where), self.columns[name]
        if name == "answer":
            value = self._text(row, name, where)
        if isinstance(value, list | dict):
            turns = [_message(turn, where) for turn in (value if isinstance(value, list) else [value])]
        elif value is not None and not isinstance(value, str):
            _wrong_type(where, column, value, "text")
        elif self.format == "transcript" and value and _ASSISTANT in value:
            turns = _transcript(value)
        elif self.format == "transcript" and value and self.prompt is None:
            raise UserError(f"{where}: column {column!r} has no Human: and Assistant: turns, and there is no prompt column")
        else:
            turns = [Message("assistant", value or "")]
        if not turns or turns[-1].role != "assistant" or not turns[-1].content.strip():
            raise _Unusable(f"empty {name}")
        return tuple(turns[:-1]), turns[-1].content

    def _conversation(self, row: Record, where: str) -> tuple[tuple[Message, ...], str]:
        """The messages of the prompt field, and the answer after them (empty if there is none)."""
        value = None if self.prompt is None else self._value(row, self.prompt, where)
        if self.prompt is None or value is None:
            return (), ""
        if isinstance(value, list):
            turns = [_message(turn, where) for turn in value]
        elif self.prompt in _CONVERSATIONS or not isinstance(value, str):
            _wrong_type(where, self.columns[self.prompt], value, "a list of messages")
        else:
            turns = _transcript(value) if self.format == "transcript" else [Message("user", value)]
        if turns and turns[-1].role == "assistant":
            return tuple(turns[:-1]), turns[-1].content
        return tuple(turns), ""

    def _prompt(self, row: Record, messages: tuple[Message, ...], where: str, default_id: str) -> Prompt:
        if self.source.prompt_template is not None:
            current = messages[-1].content if messages else ""
            messages = (*messages[:-1], Message("user", self._fill(self.source.prompt_template, row, current, where)))
        messages = tuple(m for m in messages if m.role != "system" or m.content.strip())
        if self.format != "text":
            if not messages or not all(message.content.strip() for message in messages):
                raise _Unusable("empty prompt")
            system = self._text(row, "system", where) or self.source.system_prompt
            if system and messages[0].role != "system":
                messages = (Message("system", system), *messages)
            if problem := turn_error(messages):
                if self.format == "transcript":
                    raise _Unusable("turns do not alternate")
                raise UserError(f"{where}: {problem}")
        answer, meta = self._text(row, "answer", where), self._meta(row, where)
        if answer is not None and (gold := _GOLD.search(answer)):  # GSM8K's worked answers
            answer, meta = gold[1].replace(",", ""), {"grading": "number", **meta}
        return Prompt(
            messages=messages,
            id=self._text(row, "id", where) or default_id,
            task=self.source.task or self._text(row, "task", where) or "",
            answer=answer,
            meta=meta,
        )

    def _fill(self, template: str, row: Record, current: str, where: str) -> str:
        def value(name: str) -> str:
            column = self.columns.get(name, name)
            found = current if name == "prompt" else row.get(column)
            if found is not None and not isinstance(found, str | int | float):
                _wrong_type(where, column, found, "text")
            if found is None or not str(found).strip():
                raise _Unusable("empty prompt")
            return str(found)

        return _PLACEHOLDER.sub(lambda match: value(match[1]), template)

    def _meta(self, row: Record, where: str) -> dict[str, Any]:
        """The row's own meta, and its columns that nothing else reads."""
        own = row.get(self.columns.get("meta", "")) or {}
        if not isinstance(own, dict):
            _wrong_type(where, self.columns["meta"], own, "an object")
        read = {*FIELDS, *self.columns.values(), *_placeholders(self.source.prompt_template)}
        return {c: v for c, v in row.items() if c not in read and isinstance(v, str | int | float | list | dict)} | own

    def _margin(self, row: Record, where: str) -> float | None:
        margin, better, worse = (self._number(row, f, where) for f in ("margin", "score_chosen", "score_rejected"))
        if margin is None and better is not None and worse is not None:
            margin = better - worse
        if margin is not None and margin < 0:
            raise _Unusable("chosen is scored below rejected")
        return margin

    def _value(self, row: Record, name: str, where: str) -> Any:
        column = self.columns[name]
        if column not in row:
            raise UserError(f"{where}: has no column {column!r}, which other rows have; found: {_listed(row)}")
        return row[column]

    def _text(self, row: Record, name: str, where: str) -> str | None:
        """A field that may be missing, as text; numbers are written out."""
        value = row.get(self.columns[name]) if name in self.columns else None
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            _wrong_type(where, self.columns[name], value, "text")
        return str(value)

    def _number(self, row: Record, name: str, where: str) -> float | None:
        text = self._text(row, name, where)
        try:
            number = None if text is None else float(text)
        except ValueError:
            number = float("nan")
        if number is not None and not math.isfinite(number):
            _wrong_type(where, self.columns[name], text, "a finite number")
        return number


def _map_columns(source: DataSource, found: Iterable[str], name: str) -> dict[str, str]:
    """Field -> column, for the fields that the file has."""
    for key, column in source.columns.items():
        if key not in FIELDS:
            hint = did_you_mean(key, FIELDS)
            raise UserError(joined(f"{name}: columns maps {key!r}, which is no field", hint, f"fields: {_listed(FIELDS)}"))
        if column not in found:
            hint = did_you_mean(column, found)
            raise UserError(joined(f"{name}: no column {column!r} for {key}", hint, f"found: {_listed(found)}"))
    columns = {f: next((c for c in (f, *ALIASES.get(f, ())) if c in found), None) for f in FIELDS}
    mapped = {f: c for f, c in columns.items() if c is not None} | dict(source.columns)
    for column in sorted(_placeholders(source.prompt_template) - {*found, *mapped}):
        hint = did_you_mean(column, found)
        raise UserError(joined(f"{name}: no column {column!r} for prompt_template", hint, f"found: {_listed(found)}"))
    return mapped


def _suggestion(name: str, kind: Kind, found: Iterable[str]) -> tuple[str, str, str]:
    other_names = [column for column in found if column.lower() in SYNONYMS.get(name, ())]
    near = difflib.get_close_matches(name, list(found), n=1)
    column = next(iter(near + other_names), "COLUMN")
    return f"{kind} need {EXPECTED[kind]}", f"found: {_listed(found)}", f"map it with data.columns.{name}={column}"


def _holds_dialogues(value: object) -> Literal["text", "messages", ""]:
    """Whether a completion column holds whole dialogues, and in which form."""
    if isinstance(value, str):
        return "text" if _ASSISTANT in value else ""
    return "messages" if isinstance(value, list) and len(value) > 1 else ""


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: a message is {kind_of(turn)}, expected an object with role and content")
    keys = ("from", "value") if "from" in turn else ("role", "content")
    role, content = str(turn.get(keys[0])), turn.get(keys[1])
    if role not in ROLES:
        hint = did_you_mean(role, ROLES)
        raise UserError(joined(f"{where}: a message has the unknown role {role!r}", hint, f"known: {_listed(ROLES)}"))
    if content is not None and not isinstance(content, str):
        _wrong_type(where, keys[1], content, "text")
    return Message(ROLES[role], content or "")


def _transcript(text: str) -> list[Message]:
    """`\\n\\nHuman: ..\\n\\nAssistant: ..` as messages. Text before the first name is the human's; turns of one speaker in
    a row, which hh-rlhf has, are joined.
    """
    text = text if text.startswith("\n\n") else f"\n\n{text}" if text.startswith("Human:") else f"\n\nHuman: {text}"
    parts = _TURN.split(text)[1:]
    messages: list[Message] = []
    for name, content in zip(parts[0::2], parts[1::2], strict=True):
        role: Literal["user", "assistant"] = "user" if name == "Human" else "assistant"
        before = f"{messages.pop().content}\n\n" if messages and messages[-1].role == role else ""
        messages.append(Message(role, before + content.strip()))
    return messages


def _placeholders(template: str | None) -> set[str]:
    return set(_PLACEHOLDER.findall(template or ""))


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


def _prompt(item: Example | Pair | Prompt) -> Prompt:
    return item if isinstance(item, Prompt) else item.prompt


def _key(item: Example | Pair | Prompt) -> str:
    """What decides the side: the prompt, or the text where there is none."""
    messages = [(message.role, message.content) for message in _prompt(item).messages]
    text = item.completion if isinstance(item, Example) and not messages else ""
    return _hash(messages, text)


def _content(item: Example | Pair | Prompt) -> str:
    """What makes two items duplicates: everything but the id."""
    prompt, said = _prompt(item), {f: getattr(item, f) for f in ("completion", "chosen", "rejected") if hasattr(item, f)}
    return _hash([(message.role, message.content) for message in prompt.messages], prompt.answer, prompt.meta, said)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str).encode()).hexdigest()


def _held_out(keys: set[str], source: DataSource) -> set[str]:
    """The prompts of validation: a share of all, at least one and never all, each chosen by its own hash."""
    draws = {key: int(_hash(source.split_seed, key)[:16], 16) / 2**64 for key in keys}
    count = sum(draw < source.validation_fraction for draw in draws.values())
    count = min(max(count, 1), len(keys) - 1) if source.validation_fraction > 0 else 0
    return set(sorted(keys, key=lambda key: draws[key])[:count])


# ---- words -----------------------------------------------------------------------------------------------------------


def _wrong_type(where: str, column: str, value: object, expected: str) -> NoReturn:
    raise UserError(f"{where}: column {column!r} holds {kind_of(value)}, expected {expected}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
