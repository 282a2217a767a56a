"""The usual formats of alignment data, found by their columns.

{column: value} -> Example | Pair | Labelled | Prompt, or why the row cannot be used.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from alignlab.conversation import turn_error
from alignlab.data.files import Record, joined, kind_of
from alignlab.data.source import DataSource, Format
from alignlab.errors import UserError
from alignlab.registry import did_you_mean
from alignlab.types import Example, Labelled, Message, Pair, Prompt

Kind = Literal["examples", "pairs", "labelled", "prompts"]

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
    "label": "whether the completion is desirable: true or false, 1 or 0, 1 or -1",
}
"""What columns can be mapped to."""
ALIASES = {"prompt": ("question",), "system": ("system_prompt",), "id": ("ID",)}
"""Columns that are read as a field without being mapped."""
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "input", "query", "intent", "goal", "dialogue", "prompts_final", "article", "context"),
    "completion": ("response", "output", "summary", "section_text", "target", "snippet", "code"),
    "chosen": ("chosen_response", "preferred", "preferred_output", "better", "winner", "accepted"),
    "rejected": ("rejected_response", "non_preferred_output", "dispreferred", "worse", "loser"),
    "label": ("labels", "desirable", "is_desirable", "thumbs_up", "liked", "feedback", "rating", "kto_tag"),
}
"""Other people's names for a field; they suggest a mapping and are never guessed."""
EXPECTED: Mapping[Kind, str] = {
    "examples": "prompt and completion, question and answer, messages, conversations, or text",
    "pairs": "chosen and rejected, and prompt unless they are whole dialogues",
    "labelled": "prompt, completion and label, or pairs: prompt, chosen and rejected",
    "prompts": "prompt, question, messages or conversations",
}
UNPAIRED = {"completion", "label"}
"""Columns of completions with a verdict of their own; without them pairs are taken apart where these are wanted."""
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

_ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_GOLD = re.compile(r"####[ \t]*([^\n]*\S)\s*\Z")
_LABELS = {"true": True, "1": True, "+1": True, "false": False, "0": False, "-1": False}
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
"""A literal brace, written twice, or a field."""
_CONVERSATIONS = ("messages", "conversations")


class Unusable(Exception):
    """A row that is left out and counted under this reason."""


@dataclass(frozen=True, kw_only=True)
class Reader:
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
    def of(cls, source: DataSource, kind: Kind, rows: Iterable[Record], name: str) -> Reader:
        """Raises UserError where the columns do not give what `kind` needs."""
        if source.format not in get_args(Format):
            hint = did_you_mean(source.format, get_args(Format))
            raise UserError(joined(f"no format {source.format!r}", hint, f"there are: {_listed(get_args(Format))}"))
        found: Record = {}
        for row in rows:
            found |= {column: value for column, value in row.items() if found.get(column) is None}
        columns = _map_columns(source, found, name)
        if kind == "labelled" and columns.keys() >= {"chosen", "rejected"} and not columns.keys() >= UNPAIRED:
            kind = "pairs"  # taken apart by whoever asked
        order = sorted((*_CONVERSATIONS, "prompt"), key=lambda f: f not in source.columns)  # what is mapped goes first
        prompt = next((f for f in order if f in columns), None)
        has_prompt = prompt is not None or bool(placeholders(source.prompt_template) - {"prompt"})
        options: tuple[str, ...] = ("chosen",) if kind == "pairs" else ("completion", "chosen")
        options = ("completion",) if kind == "labelled" else options
        options += ("answer",) if kind in ("examples", "labelled") and prompt not in _CONVERSATIONS else ()
        outputs = tuple(f for f in options if f in columns)[:1]
        whole = _holds_dialogues(found.get(columns[outputs[0]])) if outputs else ""
        format: str = source.format
        if format == "auto":
            plain = "text" in columns and not has_prompt and not outputs
            format = "text" if plain else "transcript" if whole == "text" and not has_prompt else "chat"
        if format == "text":
            if kind != "examples":
                raise UserError(joined(f"{name}: no {kind} in plain text", *_suggestion("prompt", kind, found)))
            prompt, outputs = None, ("text",)
        elif kind == "pairs":
            outputs = ("chosen", "rejected")
        elif kind == "prompts":
            outputs = () if has_prompt else outputs
        elif prompt not in _CONVERSATIONS:
            outputs = outputs or ("completion",)
        needed = outputs if has_prompt or whole or format == "text" else ("prompt", *outputs)
        needed += ("label",) if kind == "labelled" else ()
        for missing in (field for field in needed if field not in columns):
            raise UserError(joined(f"{name}: no column for {missing}", *_suggestion(missing, kind, found)))
        return cls(source=source, kind=kind, format=format, columns=columns, prompt=prompt, outputs=outputs)

    def item(self, row: Record, where: str, default_id: str) -> Example | Pair | Labelled | Prompt:
        """What a row says. Raises Unusable to leave it out and count it, UserError for what has to be repaired."""
        answers = [self._answer(row, output, where) for output in self.outputs]
        messages, last = ((), "") if self.format == "text" else self._conversation(row, where)
        dialogues = {dialogue for dialogue, _ in answers if dialogue}
        if len(dialogues) > 1:
            raise Unusable("chosen and rejected have different prompts")
        if dialogues and self.prompt not in _CONVERSATIONS:
            messages = dialogues.pop()
        prompt = self._prompt(row, messages, where, default_id)
        texts = [text for _, text in answers] or [last]
        item: Example | Pair | Labelled | Prompt = prompt
        if self.kind == "examples":
            if not texts[0].strip():
                raise Unusable("no completion")
            item = Example(prompt=prompt, completion=texts[0])
        elif self.kind == "pairs":
            if texts[0].strip() == texts[1].strip():
                raise Unusable("chosen equals rejected")
            item = Pair(prompt=prompt, chosen=texts[0], rejected=texts[1], margin=self._margin(row, where))
        elif self.kind == "labelled":
            if not texts[0].strip():
                raise Unusable("no completion")
            item = Labelled(prompt=prompt, completion=texts[0], label=self._label(row, where))
        if any(map(_SURROGATE.search, (*texts, *(message.content for message in prompt.messages)))):
            raise Unusable("half of a surrogate pair")
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
            turns = transcript(value)
        elif self.format == "transcript" and value and self.prompt is None:
            raise UserError(f"{where}: column {column!r} has no Human: and Assistant: turns, and there is no prompt")
        else:
            turns = [Message("assistant", value or "")]
        if not turns or turns[-1].role != "assistant" or not turns[-1].content.strip():
            raise Unusable(f"empty {name}")
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
            turns = transcript(value) if self.format == "transcript" else [Message("user", value)]
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
                raise Unusable("empty prompt")
            system = self._text(row, "system", where) or self.source.system_prompt
            if system and messages[0].role != "system":
                messages = (Message("system", system), *messages)
            if problem := turn_error(messages):
                if self.format == "transcript":
                    raise Unusable("turns do not alternate")
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
                raise Unusable("empty prompt")
            return str(found)

        return _PLACEHOLDER.sub(lambda match: match[0][0] if match[1] is None else value(match[1]), template)

    def _meta(self, row: Record, where: str) -> dict[str, Any]:
        """The row's own meta, and its columns that nothing else reads."""
        own = row.get(self.columns.get("meta", "")) or {}
        if not isinstance(own, dict):
            _wrong_type(where, self.columns["meta"], own, "an object")
        read = {*FIELDS, *self.columns.values(), *placeholders(self.source.prompt_template)}
        read -= {"label"} if self.kind != "labelled" and "label" not in self.source.columns else set()
        return {c: v for c, v in row.items() if c not in read and isinstance(v, str | int | float | list | dict)} | own

    def _margin(self, row: Record, where: str) -> float | None:
        margin, better, worse = (self._number(row, f, where) for f in ("margin", "score_chosen", "score_rejected"))
        if margin is None and better is not None and worse is not None:
            margin = better - worse
        if margin is not None and margin < 0:
            raise Unusable("chosen is scored below rejected")
        return margin

    def _label(self, row: Record, where: str) -> bool:
        value = self._value(row, "label", where)
        whole = isinstance(value, float) and value.is_integer()  # how tables write 1 where the column has an empty row
        label = _LABELS.get(str(int(value) if whole else value).strip().lower())
        if label is None:
            column, expected = self.columns["label"], "true or false, 1 or 0, or 1 or -1"
            raise UserError(f"{where}: column {column!r} holds {value!r}, expected {expected}")
        return label

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
            raise UserError(joined(f"{name}: {key!r} in columns is no field", hint, f"fields: {_listed(FIELDS)}"))
        if column not in found:
            hint = did_you_mean(column, found)
            raise UserError(joined(f"{name}: no column {column!r} for {key}", hint, f"found: {_listed(found)}"))
    columns = {f: next((c for c in (f, *ALIASES.get(f, ())) if c in found), None) for f in FIELDS}
    mapped = {f: c for f, c in columns.items() if c is not None} | dict(source.columns)
    for column in sorted(placeholders(source.prompt_template) - {"prompt", *found, *mapped}):
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


def transcript(text: str) -> list[Message]:
    """A dialogue of Human: and Assistant: turns as messages. Text before the first turn is the human's.

    Turns of one speaker in a row, which hh-rlhf has, are joined.
    """
    if not _TURN.match(text):
        text = f"\n\n{text}" if text.startswith(("Human:", "Assistant:")) else f"\n\nHuman: {text}"
    parts = _TURN.split(text)[1:]
    messages: list[Message] = []
    for name, content in zip(parts[0::2], parts[1::2], strict=True):
        role: Literal["user", "assistant"] = "user" if name == "Human" else "assistant"
        before = messages.pop().content if messages and messages[-1].role == role else ""
        messages.append(Message(role, f"{before}\n\n{content.strip()}".strip()))
    return messages


def placeholders(template: str | None) -> set[str]:
    """The columns that a prompt template names.

    Raises:
        UserError: it names none, or has a brace without its partner.
    """
    if template is None:
        return set()
    names = [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]
    if any(brace in _PLACEHOLDER.sub("", template) for brace in "{}") or not all(name.strip() for name in names):
        raise UserError(
            f"{template!r} is not a prompt template: a field is {{column}}, and a literal brace is written twice"
        )
    if not names:
        raise UserError(f"{template!r} does not name a {{column}}, so all prompts would be the same")
    return set(names)


def _wrong_type(where: str, column: str, value: object, expected: str) -> NoReturn:
    raise UserError(f"{where}: column {column!r} holds {kind_of(value)}, expected {expected}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
