"""What a finished run was: its folder -> the recipe that trained it, and the policy that it started from."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from alignlab.errors import UserError
from alignlab.models import ModelChoice
from alignlab.pipeline.identity import DONE, read_done
from alignlab.pipeline.stage import model_choice
from alignlab.recipe import Recipe, Stage, parse_recipe, read_mapping


def recipe_of(folder: Path, keep: Collection[str] = ()) -> tuple[Recipe, Stage, str | None]:
    """What a finished stage was trained by and what it started from, which need not be there any more.

    Args:
        keep: which of `reward_model` and `teacher` stay in it; what stays has to be there.

    Raises:
        UserError: the recipe is missing, or cannot be read.
    """
    path = folder / "recipe.yaml"
    raw = read_mapping(path)
    start = None
    for stage in raw.get("stages") or [raw]:
        start = stage.pop("start", None)
        for other in {"reward_model", "teacher"} - set(keep):
            stage.pop(other, None)
    recipe = parse_recipe(raw, path)
    return recipe, recipe.stages[-1], start


def start_policy(stage: Stage, start: str | None, folder: Path, cache: Path) -> ModelChoice | str:
    """How to load the policy that a stage started from, or why that cannot be."""
    if start is None:
        return replace(model_choice(stage.model, stage.model.name), adapter=None)
    found = start_folder(start, folder, cache)
    if found is None:
        return "the policy it was trained from is no longer where it was"
    choice = model_choice(stage.model, str(read_done(found).model))
    return replace(choice, adapter=None, revision=None, weights="pretrained", overrides={})


def start_folder(start: str, folder: Path, cache: Path) -> Path | None:
    """The run folder of the policy that the stage in `folder` started from; None if it is gone."""
    return _made_for(folder, "start", "policy", start, cache)


def reward_model_folder(reward_model: str, folder: Path, cache: Path) -> Path | None:
    """The run folder of the reward model that the stage in `folder` used; None if it is gone."""
    return _made_for(folder, "reward_model", "reward_model", reward_model, cache)


def _made_for(folder: Path, role: str, kind: str, named: str, cache: Path) -> Path | None:
    """A finished stage, known by the key that the one in `folder` noted: where it was named, beside it, or cached."""
    key = read_key(folder / "provenance.json", role)
    inside = [Path(named), *Path(named).iterdir()] if Path(named).is_dir() else []
    cached = cache.glob(f"*-{key[:16]}") if cache.is_dir() else ()
    candidates: list[Path] = [*inside, *folder.parent.iterdir(), *cached]
    for candidate in candidates:
        made = (candidate / kind).is_dir() and (candidate / DONE).is_file()
        if made and read_key(candidate / DONE, "key") == key:
            return candidate
    return None


def read_key(path: Path, name: str) -> str:
    """A key that a run left.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return str(json.loads(path.read_text("utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: missing or damaged; train this stage again") from error
