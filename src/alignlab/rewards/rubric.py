"""Rubric as a reward: how well an answer meets weighted criteria, each scored by an LLM judge (RaR, arXiv 2507.17746).

prompt, completion, criteria -> a score in [0, 1] for each criterion -> their weighted mean.

score = clip(sum_i w_i s_i / sum_{w_i > 0} w_i + sum_j points_j m_j, 0, 1), with s_i the judge's score of criterion i,
m_j that of modifier j. A criterion of negative weight is a pitfall: meeting it takes away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from alignlab.errors import UserError
from alignlab.rewards import Detailed, _judging
from alignlab.rewards._judging import JudgeOptions
from alignlab.types import Completion, Prompt

NEEDS = "a column `criteria`, or a rubric file in its option `file`"
FILES = ("file",)
ONLY_HOW = _judging.ONLY_HOW
LARGEST_FILE = 1_000_000
"""Bytes."""


@dataclass(frozen=True)
class Criterion:
    """One thing to judge: `Criterion("facts", "Every statement is true.", 2.0)`."""

    name: str
    description: str
    weight: float = 1.0
    levels: tuple[tuple[str, str], ...] = ()
    """What a score means: (`5`, "all of them")."""

    def __str__(self) -> str:
        levels = "".join(f"\n{level}: {meaning}" for level, meaning in self.levels)
        steps = f"\nIts own scale, of which the lowest is 0 here and the highest 10:{levels}" if levels else ""
        return f"{self.name}: {self.description}{steps}"


@dataclass(frozen=True)
class Rubric:
    """Criteria, and modifiers: what adds to the score, or takes from it, where it is so."""

    criteria: tuple[Criterion, ...]
    modifiers: tuple[Criterion, ...] = ()
    """Their weights are points on the scale from 0 to 1."""

    def combine(self, scores: Sequence[float]) -> float:
        """Scores of all criteria, then of all modifiers -> the score."""
        positive = sum(c.weight for c in self.criteria if c.weight > 0)
        base = sum(c.weight * s for c, s in zip(self.criteria, scores, strict=False)) / positive
        extra = sum(m.weight * s for m, s in zip(self.modifiers, scores[len(self.criteria) :], strict=True))
        return min(1.0, max(0.0, base + extra))


def rubric(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    file: str = "",
    reference: bool = False,
    **judge: Unpack[JudgeOptions],
) -> list[float | None]:
    """The weighted score of each completion; None where the prompt has no criteria or any of its scores is unreadable.

    Each criterion is a question of its own to the judge. With a file, whose criteria are the same for all prompts, each
    one's score is logged (`reward/rubric/NAME`).

    Args:
        file: YAML with `criteria` and `modifiers`; empty = `meta["criteria"]` of each prompt.
        reference: shows the judge `prompt.answer`, where there is one.
        judge: the endpoint, see `alignlab.judge.Endpoint`.

    Raises:
        UserError: a rubric that cannot be used; the endpoint cannot be, its budget is used up, or most of its replies
            hold no score.
    """
    client = _judging.client_of(judge)
    shared = read_rubric(file) if file else None
    rubrics = [shared or rubric_of(prompt) for prompt in prompts]
    asked = [(i, c) for i, r in enumerate(rubrics) if r for c in (*r.criteria, *r.modifiers)]
    numbers = [i for i, _ in asked]
    found = _judging.scores(
        client,
        [prompts[i] for i in numbers],
        [completions[i] for i in numbers],
        [str(criterion) for _, criterion in asked],
        [prompts[i].answer if reference else None for i in numbers],
    )
    of_each: list[list[float | None]] = [[] for _ in prompts]
    for i, score in zip(numbers, found, strict=True):
        of_each[i].append(score)
    return [_total(r, scores, named=shared is not None) for r, scores in zip(rubrics, of_each, strict=True)]


def _total(rubric: Rubric | None, scores: Sequence[float | None], *, named: bool) -> float | None:
    known = [score for score in scores if score is not None]
    if rubric is None or len(known) < len(scores):
        return None
    total = rubric.combine(known)
    names = [c.name for c in (*rubric.criteria, *rubric.modifiers)]
    return Detailed(total, dict(zip(names, known, strict=True))) if named else total


def applies(prompt: Prompt, *, file: str = "", **_: object) -> bool:
    """Whether completions of this prompt are judged: there is a file, or it brings criteria along."""
    return bool(file) or rubric_of(prompt) is not None


# ---- reading ---------------------------------------------------------------------------------------------------------


def rubric_of(prompt: Prompt) -> Rubric | None:
    """The criteria that a prompt brings along; None where it has none."""
    given = prompt.meta.get("criteria")
    return Rubric(_criteria(f"prompt {prompt.id!r}: criteria", given, "weight")) if given else None


@lru_cache(maxsize=16)
def read_rubric(file: str) -> Rubric:
    """A rubric file: a list `criteria` of {name, weight, description, levels}, and a list `modifiers` of {name, points,
    description}.

    Raises:
        UserError: it is not there, no YAML, or no rubric; names the place.
    """
    path = Path(file).expanduser()
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file}: larger than {LARGEST_FILE} bytes, which no rubric is")
        found = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"rubric.file {file!r}: cannot be read ({error.strerror})") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: no YAML ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(found, Mapping) or set(found) - {"criteria", "modifiers"} or not found.get("criteria"):
        raise UserError(f"{file}: a rubric is `criteria`, a list, and perhaps `modifiers`; nothing else")
    modifiers = found.get("modifiers") or []
    rubric = Rubric(
        _criteria(f"{file}: criteria", found["criteria"], "weight"),
        _criteria(f"{file}: modifiers", modifiers, "points") if modifiers else (),
    )
    names = [c.name for c in (*rubric.criteria, *rubric.modifiers)]
    if len(set(names)) < len(names):
        raise UserError(f"{file}: a name stands twice among {', '.join(names)}")
    return rubric


def _criteria(where: str, given: Any, worth: str) -> tuple[Criterion, ...]:
    """Criteria, or modifiers, as they stand in a row or file; `worth` is what their weight is called."""
    if not isinstance(given, list | tuple):
        raise UserError(f"{where}: a list is needed, not {str(given)[:60]!r}")
    made = tuple(_criterion(f"{where}[{i}]", one, worth) for i, one in enumerate(given))
    if worth == "weight" and not any(c.weight > 0 for c in made):
        raise UserError(f"{where}: none has a weight above 0")
    return made


def _criterion(where: str, given: Any, worth: str) -> Criterion:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: {{name, {worth}, description}} is needed, not {str(given)[:60]!r}")
    name, description = str(given.get("name") or "").strip(), str(given.get("description") or "").strip()
    weight, levels = given.get(worth, 1.0 if worth == "weight" else None), given.get("levels") or {}
    if not description or not name:
        raise UserError(f"{where}: needs a name and a description")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"{where}: {worth} is {weight!r}, but must be a number")
    if not isinstance(levels, Mapping):
        raise UserError(f"{where}: levels are a mapping of a score to its meaning, not {str(levels)[:60]!r}")
    return Criterion(name, description, float(weight), tuple((str(k), str(v)) for k, v in levels.items()))
