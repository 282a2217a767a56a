"""Replies on disk: what was asked, of whom and how -> the reply, once and for all.

One JSON file a question, named by the hash of the question. Files appear whole or not at all, whoever is killed when,
and of several processes that ask the same the first answer is everybody's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge said to one conversation."""

    text: str
    finish_reason: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    """Tokens as the endpoint counted them, `input` and `output`; empty where it did not say."""
    model: str = ""
    """What the endpoint calls the model that answered."""


class Cache:
    """Replies in a folder, or where that is None in this process alone."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder.expanduser()
        self._known: dict[str, Reply] = {}
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise UserError(f"{folder}: cannot be the judge's cache ({reason}); name another folder") from error

    def find(self, question: Mapping[str, Any]) -> Reply | None:
        """The reply to this question, if there is one; a damaged file counts as none and is written anew."""
        key = question_key(question)
        return self._known.get(key) if self.folder is None else _read(self._path(key))

    def keep(self, question: Mapping[str, Any], reply: Reply) -> Reply:
        """Keeps a reply, or gives back the one that somebody else kept first.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        key = question_key(question)
        if self.folder is None:
            return self._known.setdefault(key, reply)
        try:
            return _write(self._path(key), question, reply)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"{self.folder}: a reply cannot be kept ({reason}); name another cache") from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"


def question_key(question: Mapping[str, Any]) -> str:
    """The name of a question: a hash of all that a reply may depend on."""
    return hashlib.sha256(json.dumps(question, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _read(path: Path) -> Reply | None:
    try:
        found = json.loads(path.read_text("utf-8"))["reply"]
        usage = {str(name): int(count) for name, count in found["usage"].items()}
        texts = {name: found[name] for name in ("text", "finish_reason", "model")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Reply(usage=usage, **texts) if all(isinstance(text, str) for text in texts.values()) else None


def _write(path: Path, question: Mapping[str, Any], reply: Reply) -> Reply:
    path.parent.mkdir(exist_ok=True)
    said = {"text": reply.text, "finish_reason": reply.finish_reason, "usage": dict(reply.usage), "model": reply.model}
    partial = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            json.dump({"question": question, "reply": said}, stream, ensure_ascii=True, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            first = _read(path)
            if first is not None:
                return first
            os.replace(partial, path)
        except OSError:  # a file system without hard links
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return reply
