"""What systems answered, to be set side by side: a file of completions -> prompts and one completion of each.

A run folder's answers are read by `alignlab.pipeline.answers`, which knows what its prompts were.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignlab.data.files import read_file
from alignlab.errors import UserError
from alignlab.types import Message, Prompt

PROMPT_IDS, COMPLETIONS = ("prompt_id", "id"), ("completion", "text", "output", "response")
"""What the columns may be called."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One system's answers, by prompt id."""

    name: str
    prompts: Mapping[str, Prompt]
    completions: Mapping[str, str]
    """The first of each prompt, where there are several."""
    models: tuple[str, ...] = ()
    """What the system was made from, as far as that is known: names of models."""
    reward_model: str = ""
    """Key of the reward model it was trained against; empty where there was none."""


def answers_from_rows(
    rows: Sequence[Mapping[str, Any]], name: str, where: str, prompts: Mapping[str, Prompt] | None = None
) -> Answers:
    """Answers from rows with `prompt_id`, `prompt` (text or messages) and `completion`, and perhaps `category`, `task`,
    `answer`, `model`.

    Args:
        prompts: where the rows do not say what was asked.

    Raises:
        UserError: a column is missing or of another type; with the row.
    """
    asked: dict[str, Prompt] = {}
    completions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        here = f"{where}, row {number}"
        text = next((row[column] for column in COMPLETIONS if column in row), None)
        if not isinstance(text, str):
            raise UserError(f"{here}: no text under {' or '.join(COMPLETIONS)}; there are: {', '.join(map(str, row))}")
        given = next((row[column] for column in PROMPT_IDS if row.get(column) not in (None, "")), None)
        if row.get("messages") is not None or row.get("prompt") is not None:
            prompt = _prompt(row, None if given is None else str(given), here)
        elif prompts is not None and str(given) in prompts:
            prompt = prompts[str(given)]
        else:
            raise UserError(f"{here}: says nothing of what was asked; give it a column prompt (text, or messages)")
        if prompt.id in asked and asked[prompt.id].messages != prompt.messages:
            raise UserError(f"{here}: prompt {prompt.id!r} was another one in an earlier row")
        asked.setdefault(prompt.id, prompt)
        completions.setdefault(prompt.id, text)
    models = tuple(sorted({str(row["model"]) for row in rows if row.get("model")}))
    return Answers(name=name, prompts=asked, completions=completions, models=models)


def read_answers(path: Path) -> Answers:
    """The answers of a file (JSONL, JSON, CSV), named after it; see `answers_from_rows`."""
    return answers_from_rows(read_file(path), path.name.partition(".")[0], str(path))


def distinct_names(systems: Sequence[Answers], paths: Sequence[Path]) -> list[Answers]:
    """The same with names that differ: longer ones of their paths where the short ones do not."""
    for length in range(1, 1 + max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    twice = [name for name, count in Counter(system.name for system in systems).items() if count > 1]
    if not twice:
        return list(systems)
    if len(set(names)) < len(names):
        raise UserError(f"{paths[0]}: is named twice; compare two different systems")
    return [replace(system, name=name) for system, name in zip(systems, names, strict=True)]


def common_prompts(systems: Sequence[Answers]) -> list[Prompt]:
    """The prompts that all systems answered, in the order of the first.

    Raises:
        UserError: there are none, or one id stands for different prompts.
    """
    first, *others = systems
    found = []
    for prompt_id, prompt in first.prompts.items():
        if all(prompt_id in other.prompts for other in others):
            for other in others:
                if other.prompts[prompt_id].messages != prompt.messages:
                    raise UserError(
                        f"prompt {prompt_id!r} is one thing to {first.name} and another to {other.name}; compare "
                        "systems on the same prompts"
                    )
            found.append(prompt)
    if not found:
        shown = " and ".join(f"{s.name} has {next(iter(s.prompts), 'none')!r}" for s in systems)
        raise UserError(f"no prompt was answered by all of them: {shown}; compare systems on the same prompts")
    return found


def _prompt(row: Mapping[str, Any], given: str | None, where: str) -> Prompt:
    content = row["messages"] if row.get("messages") is not None else row["prompt"]
    if isinstance(content, str):
        messages: tuple[Message, ...] = (Message("user", content),)
    else:
        try:
            messages = tuple(Message(turn["role"], turn["content"]) for turn in content)
            if not all(isinstance(m.content, str) and m.role in ("system", "user", "assistant") for m in messages):
                raise TypeError
        except (TypeError, KeyError) as error:
            raise UserError(f"{where}: prompt is neither a text nor messages with role and content") from error
    meta = dict(row["meta"]) if isinstance(row.get("meta"), Mapping) else {}
    if row.get("category"):
        meta["category"] = str(row["category"])
    digest = hashlib.sha256(repr(messages).encode("utf-8", "replace")).hexdigest()[:16]
    answer = row.get("answer")
    return Prompt(
        messages=messages,
        id=given or digest,
        task=str(row.get("task") or ""),
        answer=None if answer is None else str(answer),
        meta=meta,
    )
