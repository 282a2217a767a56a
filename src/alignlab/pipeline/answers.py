"""What a run answered when it was evaluated: a run folder, or a file -> prompts and completions to be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignlab.data.files import read_file
from alignlab.errors import UserError
from alignlab.judge.answers import Answers, answers_from_rows, read_answers
from alignlab.pipeline.identity import finished_folder
from alignlab.pipeline.items import held_out_items, load_items
from alignlab.recipe import parse_recipe, read_mapping
from alignlab.types import Prompt

SAMPLES = ("evaluation_samples.json", "samples.jsonl", "evaluation_samples.jsonl")
"""Where an evaluation keeps its completions."""


def read_system(path: Path) -> Answers:
    """The answers of a finished run (its last policy), of a folder with an evaluation's samples, or of a file.

    Raises:
        UserError: there are none, or what was asked is not known any more.
    """
    if not path.is_dir():
        return read_answers(path)
    folder = path if _samples(path) or not (path / "recipe.yaml").is_file() else finished_folder(path, "policy")
    found = _samples(folder)
    if found is None:
        raise UserError(
            f"{path}: no {SAMPLES[0]}, so it has no answers to compare; evaluate it (evaluation.prompts_per_task above "
            "0), or give a file with prompt and completion"
        )
    rows = _rows(found)
    known = {} if all("messages" in row or "prompt" in row for row in rows) else _asked(folder)
    answers = answers_from_rows(rows, path.resolve().name, str(found), known)
    return Answers(
        name=answers.name,
        prompts=answers.prompts,
        completions=answers.completions,
        models=tuple(dict.fromkeys((*answers.models, *origins(folder)))),
        reward_model=str(_record(folder / "provenance.json").get("reward_model") or ""),
    )


def _samples(folder: Path) -> Path | None:
    return next((folder / name for name in SAMPLES if (folder / name).is_file()), None)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Samples of an evaluation; of several decodings the greedy one, or else the first."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}); evaluate again") from error
        if isinstance(content, dict) and content and all(isinstance(rows, list) for rows in content.values()):
            return list(content.get("greedy") or next(iter(content.values())))
    return read_file(path)


def _asked(folder: Path) -> dict[str, Prompt]:
    """The prompts that a run's evaluation may be from, by id; of an evaluation apart, those of the run it was of."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        run = Path(str(_record(folder / "evaluation.json").get("run") or folder))
        return {} if run == folder or not run.is_dir() else _asked(finished_folder(run, "policy"))
    raw = dict(read_mapping(path))
    for stage in raw.get("stages") or [raw]:  # what they depend on may not be there any more
        for other in ("start", "reward_model", "teacher"):
            stage.pop(other, None)
    stage = parse_recipe(raw, path).stages[-1]
    items = list(held_out_items(stage))
    with suppress(UserError):  # most data have no test split of their own
        items += load_items(stage, "prompts", "test")
    return {item.id: item for item in items if isinstance(item, Prompt)}


def origins(folder: Path) -> tuple[str, ...]:
    """The models that a stage and those it started from name, as far as their folders are still there."""
    names: list[str] = []
    for _ in range(20):
        path = folder / "recipe.yaml"
        raw: Mapping[str, Any] = read_mapping(path) if path.is_file() else {}
        raw = (raw.get("stages") or [raw])[-1]
        name = str(_model_name(raw) or "")
        if name:
            names.append(name)
        start = str(raw.get("start") or "")
        if not start or not Path(start).is_dir():
            break
        folder = Path(start)
    return tuple(dict.fromkeys(names))


def _model_name(raw: Mapping[str, Any]) -> Any:
    model = raw.get("model")
    return model.get("name") if isinstance(model, Mapping) else model


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
