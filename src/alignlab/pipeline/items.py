"""The data of a stage: recipe section -> examples, pairs, labelled completions or prompts of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from alignlab import starter
from alignlab.conversation import Template
from alignlab.data import DataSource, Kind, Report, Side, load_examples
from alignlab.errors import UserError
from alignlab.recipe import Stage
from alignlab.rollout import Limits, encode_pairs, fitting_prompts
from alignlab.types import Pair, Prompt

Split = Literal["train", "validation", "test"]


def load_items(stage: Stage, kind: Kind, split: Split) -> list[Any]:
    """Items of a kind from a stage's split; files and hub sets have no test split of their own."""
    return load_reported(stage, kind, split)[0]


def load_reported(stage: Stage, kind: Kind, split: Split) -> tuple[list[Any], list[Report]]:
    """The same, with what became of the rows of each source."""
    side: Side = "train" if split == "train" else "validation"
    loaded = [load_examples(source, kind, side) for source in _data_sources(stage, kind, split)]
    return [item for found in loaded for item in found.items], [found.report for found in loaded]


def _data_sources(stage: Stage, kind: Kind, split: Split) -> list[DataSource]:
    data = stage.data
    if data.path is None and data.hub is None:
        if not data.task:
            raise UserError(f"stage {stage.name}: data names neither a task of the starter, nor a path, nor a hub set")
        return [_starter_source(stage.name, task, kind, split, data.limit) for task in data.task]
    if len(data.task) > 1:
        raise UserError(
            f"stage {stage.name}: one file or hub set is one task, not {', '.join(data.task)}; set data.task to the "
            "one that grades its prompts, or data.task=[] where none does or the rows name their own"
        )
    ours = {"task", "max_prompt_tokens", "max_completion_tokens"}
    return [DataSource(task=data.task[0] if data.task else "", **data.model_dump(exclude=ours))]


def _starter_source(stage: str, task: str, kind: Kind, split: Split, limit: int | None) -> DataSource:
    prefix = "pairs." if kind in ("pairs", "labelled") else ""
    train, held_out = (
        starter.DATA / task / f"{prefix}{s}.jsonl" for s in ("train", "validation" if split == "train" else split)
    )
    for path in (train, held_out):
        if not path.is_file():
            raise UserError(
                f"stage {stage}: the starter has no {path.stem} data for {task!r}; name a file in data.path"
            )
    return DataSource(path=str(train), validation_path=str(held_out), task=task, limit=limit)


def validation_prompts(
    stage: Stage, per_task: int, template: Template, limits: Limits, split: Split = "validation"
) -> list[Prompt]:
    """The first `per_task` held-out prompts of every task, those that fit."""
    prompts = cast(list[Prompt], load_items(stage, "prompts", split))
    return first_of_each_task(fitting_prompts(prompts, template, limits), per_task)


def first_of_each_task(items: Sequence[Any], count: int) -> list[Any]:
    taken: dict[str, int] = {}
    kept = []
    for item in items:
        task = item.task if isinstance(item, Prompt) else item.prompt.task
        taken[task] = taken.get(task, 0) + 1
        if taken[task] <= count:
            kept.append(item)
    return kept


def pair_fits(pair: Pair, template: Template, limits: Limits) -> bool:
    """Whether a pair fits the limits and stays two different rows."""
    try:
        return bool(encode_pairs([pair], template, limits))
    except UserError:
        return False
