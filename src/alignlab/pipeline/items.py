"""The data of a stage: recipe section -> examples, pairs, labelled completions or prompts of a split.

A prepared folder and the starter's data have a file for each split; a file or hub set is divided when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from alignlab import starter
from alignlab.conversation import Template
from alignlab.data import DataSource, Kind, Report, Side, load_examples
from alignlab.data.files import read_file
from alignlab.data.prepared import Split, is_folder, require_split, split_file
from alignlab.errors import UserError
from alignlab.evaluation import check_gradable
from alignlab.evaluation.measures import Settings, check_measures
from alignlab.pipeline.identity import makes
from alignlab.recipe import Stage
from alignlab.rollout import Limits, encode_pairs, fitting_prompts
from alignlab.types import Example, Pair, Prompt

READING = ("columns", "format", "system_prompt", "prompt_template", "split", "validation_path", "validation_split")
"""How rows are read; the starter's are as they should be."""
OF_FILES = ("columns", "format", "split", "validation_path", "validation_split")
"""Keys that say how a file is read and divided; a prepared folder's is already."""
READABLE = 10_000_000
"""Bytes of a data file up to which it is read to check it and to count its rows: a second or two."""


def limits_of(stage: Stage) -> Limits:
    """Lengths, and how much meets the model at once."""
    data, train = stage.data, stage.train
    return Limits(
        max_prompt_tokens=data.max_prompt_tokens,
        max_completion_tokens=data.max_completion_tokens,
        microbatch_rows=train.microbatch_rows,
        microbatch_tokens=train.max_tokens_per_microbatch,
        sampling_rows=train.sampling_rows,
        sampling_cache_mb=train.sampling_cache_mb,
    )


def load_items(stage: Stage, kind: Kind, split: Split) -> list[Any]:
    """Items of a kind from a stage's split; files and hub sets have no test split, and validation stands for it."""
    return load_reported(stage, kind, split)[0]


def load_reported(stage: Stage, kind: Kind, split: Split) -> tuple[list[Any], list[Report]]:
    """The same, with what became of the rows of each source."""

    def side(source: DataSource) -> Side:
        return "train" if split == "train" or not source.validation_fraction else "validation"

    loaded = [load_examples(source, kind, side(source)) for source in data_sources(stage, kind, split)]
    return [item for found in loaded for item in found.items], [found.report for found in loaded]


def data_sources(stage: Stage, kind: Kind, split: Split) -> list[DataSource]:
    data = stage.data
    if data.path is None and data.hub is None:
        if not data.task:
            raise UserError(f"stage {stage.name}: data names neither a task of the starter, nor a path, nor a hub set")
        given = [key for key in READING if getattr(data, key) != type(data).model_fields[key].default]
        if given:
            raise UserError(
                f"stage {stage.name}: data.{given[0]} is for data of path or hub, and the starter's are read as they "
                "are; name a path or hub, or drop it"
            )
        return [_starter_source(stage.name, task, kind, split, data.limit) for task in data.task]
    if len(data.task) > 1:
        raise UserError(
            f"stage {stage.name}: one file or hub set is one task, not {', '.join(data.task)}; set data.task to the "
            "one that grades its prompts, or data.task=[] where none does or the rows name their own"
        )
    if data.task and data.path and not Path(data.path).suffix and not Path(data.path).expanduser().exists():
        raise UserError(
            f"stage {stage.name}: {data.path}: no such file or folder; `alignlab data prepare {data.task[0]} --output "
            f"{data.path}` makes one (--from takes a copy of the data)"
        )
    if is_folder(data.path):
        return [_folder_source(stage, kind, split)]
    ours = {"task", "max_prompt_tokens", "max_completion_tokens"}
    return [DataSource(task=data.task[0] if data.task else "", **data.model_dump(exclude=ours))]


def _starter_source(stage: str, task: str, kind: Kind, split: Split, limit: int | None) -> DataSource:
    folder = starter.DATA / task
    if not folder.is_dir():
        raise UserError(
            f"stage {stage}: the starter has no data for {task!r}; run `alignlab data prepare {task}` and set "
            f"data.path=data/{task}, or name a file there"
        )
    train, held_out = (split_file(folder, kind, s) for s in _both(split))
    for path in (train, held_out):
        if not path.is_file():
            raise UserError(
                f"stage {stage}: the starter has no {path.stem} data for {task!r}; name a file in data.path"
            )
    return DataSource(path=str(train), validation_path=str(held_out), task=task, limit=limit)


def _folder_source(stage: Stage, kind: Kind, split: Split) -> DataSource:
    """A prepared folder's file of the split, and its train rows, which validation and test may not show."""
    data = stage.data
    given = [key for key in OF_FILES if getattr(data, key) != type(data).model_fields[key].default]
    if given:
        raise UserError(
            f"stage {stage.name}: data.{given[0]} is for files, and data.path is a prepared folder; drop it"
        )
    folder = Path(str(data.path)).expanduser()
    train, held_out = (split_file(folder, kind, s) for s in _both(split))
    if split == "train" or not held_out.is_file():
        require_split(folder, kind, split)
    return DataSource(
        path=str(train if train.is_file() else held_out),
        validation_path=str(held_out) if train.is_file() else None,
        validation_fraction=0.1 if train.is_file() else 0.0,  # what is only for testing has no train rows to show
        system_prompt=data.system_prompt,
        prompt_template=data.prompt_template,
        task=data.task[0] if data.task else "",
        limit=data.limit,
        max_dropped_fraction=1.0,  # prompts without a demonstration lie beside those that have one
    )


def _both(split: Split) -> tuple[Split, Split]:
    """Train, and the split that is asked for or, for train, validation."""
    return "train", "validation" if split == "train" else split


def held_out_items(stage: Stage) -> list[Any]:
    """The prompts, or pairs of a reward model, that evaluations are from, before any is left out as too long.

    Raises:
        UserError: there are none, or their task cannot grade them.
    """
    with of_evaluation():
        if makes(stage) == "reward_model":
            return load_items(stage, "pairs", "validation")
        prompts = load_items(stage, "prompts", "validation")
        check_gradable(prompts)
        best = stage.evaluation.best
        if best is not None and best.metric == "score" and not any(prompt.task for prompt in prompts):
            raise UserError("no task grades the data, so best.metric=score has nothing to go by; name data.task")
        return prompts


def measure_settings(stage: Stage) -> Settings:
    """What the recipe tells its measures."""
    evaluation = stage.evaluation
    return Settings(encoder=evaluation.encoder, word_limit=evaluation.word_limit)


def text_measures(stage: Stage) -> tuple[str, ...]:
    """The measures of completions; perplexity is one of the model itself."""
    return tuple(name for name in stage.evaluation.measures if name != "perplexity")


def check_stage_measures(stage: Stage) -> None:
    """Says what the stage's measures lack before anything is loaded.

    Raises:
        UserError: no such measure, a package that is not installed, no encoder, or what only `alignlab evaluate` has.
    """
    try:
        if "preference" in stage.evaluation.measures:
            raise UserError("measure preference: `alignlab evaluate` has it, as it is of pairs")
        check_measures(text_measures(stage), measure_settings(stage))
    except UserError as error:
        raise UserError(f"stage {stage.name}: evaluation.measures: {error}") from error


def demonstrations_of(prompts: Sequence[Prompt], load: Callable[[], Sequence[Example]]) -> dict[str, str]:
    """Prompt id -> the completion of its demonstration, for those prompts that have one in the same data."""
    try:
        examples = {example.prompt.id: example for example in load()}
    except UserError:  # data of prompts alone
        return {}
    found = {}
    for prompt in prompts:
        example = examples.get(prompt.id)
        if example is not None and example.prompt.messages == prompt.messages:
            found[prompt.id] = example.completion
    return found


@contextmanager
def of_evaluation() -> Iterator[None]:
    """Inside, what is wrong with data is said to be about evaluation, and how to do without."""
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluation: {error}; evaluation.prompts_per_task=0 switches evaluation off") from error


@contextmanager
def of_perplexity() -> Iterator[None]:
    """The same for what only perplexity needs."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"evaluation: perplexity needs held-out demonstrations: {error}; or choose evaluation.best.metric="
            "score and leave out evaluation.perplexity"
        ) from error


def check_items(stage: Stage) -> list[Any]:
    """Says what is wrong with a stage's data. Files that lie here are read, unless that takes more than a moment; the
    starter's are known to be good, and what lies elsewhere is not fetched.

    Returns:
        The items it is trained on, where they were read.

    Raises:
        UserError: data that are not here, unusable, or more than one task to a file.
    """
    kind, evaluation = cast(Kind, stage.method.data_kind), stage.evaluation
    items = load_items(stage, kind, "train") if _is_read(stage, kind, "train") else []
    with of_evaluation():
        held_out: Kind = "pairs" if makes(stage) == "reward_model" else "prompts"
        read = evaluation.prompts_per_task > 0 and _is_read(stage, held_out, "validation")
    if read:
        held_out_items(stage)
    with of_perplexity():
        if evaluation.measures_perplexity and _is_read(stage, "examples", "validation"):
            load_items(stage, "examples", "validation")
    return items


def _is_read(stage: Stage, kind: Kind, split: Split) -> bool:
    """Whether a check reads these data: files of one's own that are not too large.

    Raises:
        UserError: a file is not here.
    """
    read = stage.data.path is not None
    for source in data_sources(stage, kind, split):
        for path in filter(None, (source.path, source.validation_path if split != "train" else None)):
            file = local_file(path)
            if file is not None and not file.is_file():
                read_file(path)  # says what is there instead
            read = read and file is not None and file.stat().st_size <= READABLE
    return read


def local_file(path: str | None) -> Path | None:
    """A data file on this machine, which may be missing; None for a URL."""
    return None if path is None or "://" in path else Path(path).expanduser()


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
