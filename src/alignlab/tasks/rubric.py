"""Open questions with a rubric: weighted criteria, and a reference answer (OpenRubrics, RaR; BiGGen-Bench).

prompt, criteria {name, weight, description, levels?}, reference -> overlap; a judge who reads the criteria is better.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from alignlab.data.files import Record, kind_of
from alignlab.data.formats import Unusable
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked, text_of
from alignlab.tasks import Task
from alignlab.tasks._text import OVERLAP, category_of, grade_by_overlap

_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*])\s+(.+)$", re.MULTILINE)
_TAG = re.compile(r"\s*\[([^\]]+)\]\s*$")
_LEVEL = re.compile(r"score(\d+)_description")


def read_biggen(row: Record) -> Iterator[Entry]:
    """One criterion with five levels, and a reference answer."""
    rubric = row["score_rubric"]
    if not isinstance(rubric, Mapping):
        raise ValueError(f"score_rubric holds {kind_of(rubric)}, expected an object")
    levels = {match[1]: str(text) for key, text in rubric.items() if (match := _LEVEL.fullmatch(key))}
    description = str(rubric.get("criteria") or "").strip()
    if not description:
        raise Unusable("no criteria")
    criterion = {"name": str(row["task"]), "weight": 1.0, "description": description, "levels": levels}
    reference = text_of(row, "reference_answer")
    prompt = asked(
        text_of(row, "input"),
        system=str(row.get("system_prompt") or ""),
        answer=reference,
        category=str(row["capability"]),
        criteria=[criterion],
    )
    yield Entry(prompt=prompt, completion=reference)


def read_rubric(row: Record) -> Iterator[Entry]:
    """Several weighted criteria: a list of objects or of texts, or one text with an item a line."""
    question = text_of(row, "prompt", "question", "instruction")
    given = next(row[name] for name in ("criteria", "rubric", "rubrics") if name in row)
    criteria = to_criteria(given)
    if not criteria:
        raise Unusable("no criteria")
    named = [name for name in ("reference", "reference_answer", "answer") if row.get(name)]
    reference = text_of(row, named[0]) if named else None
    category = str(row.get("category") or row.get("domain") or row.get("question_source") or category_of(question))
    prompt = asked(
        question, system=str(row.get("system") or ""), answer=reference, category=category, criteria=criteria
    )
    yield Entry(prompt=prompt, completion=reference)


def to_criteria(given: Any) -> list[dict[str, Any]]:
    """Other people's rubrics as {name, weight, description, levels?}.

    Weights are kept as they are, negative ones (pitfalls) too, and 1 where there is none. `Hard Rule` or `Principle` in
    brackets at the end of an item becomes its name.

    Raises:
        ValueError: what is no rubric.
    """
    if isinstance(given, str):
        given = _ITEM.findall(given) or [line for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"a rubric is {kind_of(given)}, expected a list of criteria or a text with one a line")
    return [found for i, item in enumerate(given) if (found := _criterion(item, i))["description"]]


def _criterion(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, str):
        tag = _TAG.search(item)
        name = tag[1] if tag else f"criterion {number + 1}"
        return {"name": name, "weight": 1.0, "description": _TAG.sub("", item).strip()}
    if not isinstance(item, Mapping):
        raise ValueError(f"a criterion is {kind_of(item)}, expected an object or text")
    texts = (item.get(key) for key in ("description", "criterion", "criteria", "text"))
    weight = item.get("weight", item.get("points", 1.0))
    found: dict[str, Any] = {
        "name": str(item.get("name") or item.get("title") or f"criterion {number + 1}"),
        "weight": float(1.0 if weight is None else weight),
        "description": str(next(filter(None, texts), "")).strip(),
    }
    levels = item.get("levels")
    return found | ({"levels": dict(levels)} if isinstance(levels, Mapping) else {})


TASK = Task(
    name="rubric",
    description="Answer an open question that a rubric of weighted criteria says how to judge.",
    grade=grade_by_overlap,
    default_reward={"learned": 1.0},
    metrics={"score": OVERLAP},
    sources=(
        Source(
            name="BiGGen-Bench",
            licence="Apache-2.0 (repository), CC BY-SA 4.0 (data card); Kim et al. 2024",
            columns=(("input", "reference_answer", "score_rubric"),),
            read=read_biggen,
            hub={"train": Hub("prometheus-eval/BiGGen-Bench", None, "test")},
        ),
        Source(
            name="rubrics",
            licence="as their owner says; OpenRubrics and Rubrics-as-Rewards rows are read with --from",
            columns=tuple(
                (question, rubric)
                for question in ("prompt", "question", "instruction")
                for rubric in ("criteria", "rubric", "rubrics")
            ),
            read=read_rubric,
        ),
    ),
    measures=("rouge", "verbosity", "distinct", "perplexity"),
)
