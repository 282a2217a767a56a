"""What `alignlab evaluate` is given: names of runs and models, of tasks and files -> subjects, and questions for them.

Every subject is asked the same questions: those that are short enough for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import transformers

from alignlab import starter
from alignlab.conversation import Template
from alignlab.data import DataSource, Kind, load_examples
from alignlab.data.parts import folder_of_task
from alignlab.errors import UserError
from alignlab.models import ModelChoice, load_generation_config, load_tokenizer, location
from alignlab.models.choice import location_of
from alignlab.pipeline.finished import recipe_of, start_folder, start_policy
from alignlab.pipeline.identity import DONE, finished_folder, read_done
from alignlab.pipeline.items import demonstrations_of, first_of_each_task, load_items
from alignlab.pipeline.stage import model_choice
from alignlab.recipe import ModelSection, Stage
from alignlab.rollout import Limits
from alignlab.tasks import get_task
from alignlab.types import Pair, Prompt

Split = Literal["train", "validation", "test"]
UNLIMITED = 1_000_000_000
"""Tokens of a context whose length a configuration does not say."""
SHOWN_OVERLAP = 5
Load = Callable[[Kind], Sequence[Any]]
"""Rows of a source as items of a kind."""


# ---- what is evaluated -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate, and what is known of how it came to be."""

    label: str
    run: str
    """As it was named."""
    choice: ModelChoice
    template: Template
    folder: Path | None = None
    """The finished stage that made it; None for a model as it is."""
    stage: Stage | None = None
    start: ModelChoice | None = None
    """The policy its training started from, where that is still there."""
    no_start: str = "it is a model as it is, not a run"
    """Why there is none."""
    seed: int = 0

    @cached_property
    def context(self) -> int:
        """Tokens it can read at once."""
        where = location_of("config.json", self.choice.name)
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        return int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)


def find_subject(run: str, cache: Path) -> Subject:
    """A run folder, the policy folder inside one, a model folder, `starter` or a hub id.

    Raises:
        UserError: none of these, a run that is not finished, or one that trained no policy.
    """
    path = Path(run).expanduser()
    if path.is_dir() and path.name == "policy" and (path.parent / DONE).is_file():
        path = path.parent
    if not path.is_dir() or not any((path / name).is_file() for name in (DONE, "recipe.yaml")):
        where = location(run)
        choice = replace(model_choice(ModelSection(name=run), run), adapter=None)
        return Subject(label=_label(run), run=run, choice=choice, template=_template(where))
    if (path / "reward_model").is_dir() and not (path / "policy").is_dir():
        raise UserError(f"{run}: made a reward model, which writes nothing; alignlab doctor reward {run} examines it")
    folder = finished_folder(path, "policy")
    made = read_done(folder)
    recipe, stage, start = recipe_of(folder)
    choice = replace(
        model_choice(stage.model, str(made.model)), adapter=None, revision=None, weights="pretrained", overrides={}
    )
    begun = start_policy(stage, start, folder, cache)
    return Subject(
        label=_label(str(path)),
        run=run,
        choice=choice,
        template=_template(str(made.model)),
        folder=folder,
        stage=stage,
        start=begun if isinstance(begun, ModelChoice) else None,
        no_start="" if isinstance(begun, ModelChoice) else begun,
        seed=recipe.seed,
    )


def _label(run: str) -> str:
    """The last part of a path, or the name of a model."""
    return Path(run).resolve().name if Path(run).exists() else run.rsplit("/", 1)[-1]


def distinct_labels(subjects: Sequence[Subject]) -> list[Subject]:
    """The same with labels that differ: `dpo`, `dpo-2`, ..."""
    seen: dict[str, int] = {}
    named = []
    for subject in subjects:
        seen[subject.label] = times = seen.get(subject.label, 0) + 1
        named.append(subject if times == 1 else replace(subject, label=f"{subject.label}-{times}"))
    return named


def _template(name: str) -> Template:
    return Template.of(load_tokenizer(name), load_generation_config(name))


# ---- what on ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is evaluated on."""

    source: str
    split: str
    prompts: list[Prompt]
    references: dict[str, str]
    """Prompt id -> its demonstration, where there is one."""
    pairs: list[Pair] = field(default_factory=list)
    left_out: int = 0


def load_questions(
    subjects: Sequence[Subject], tasks: Sequence[str], data: Path | None, split: Split, count: int, *, pairs: bool
) -> Questions:
    """Prompts of a file, a prepared folder, tasks or, where nothing is named, those that the first run was made with.

    Args:
        count: the most prompts (and pairs) of each task.
        pairs: whether held-out preference pairs are needed as well.

    Raises:
        UserError: nothing there, or nothing that can be used.
    """
    prompts: list[Prompt] = []
    references: dict[str, str] = {}
    held_out: list[Pair] = []
    sources = _sources(subjects, tasks, data, split)
    for source, load in sources:
        here = cast(list[Prompt], list(load("prompts")))
        prompts += here
        references |= demonstrations_of(here, partial(load, "examples"))
        if pairs:
            held_out += _pairs(source, load)
    return Questions(
        source=", ".join(source for source, _ in sources),
        split=split,
        prompts=first_of_each_task(prompts, count),
        references=references,
        pairs=first_of_each_task(held_out, count),
    )


def _sources(
    subjects: Sequence[Subject], tasks: Sequence[str], data: Path | None, split: Split
) -> list[tuple[str, Load]]:
    """Names of what the questions are from, and how to read it."""
    if data is not None:
        if len(tasks) > 1:
            raise UserError(f"--data is of one task, not {', '.join(tasks)}; name one --task")
        task = tasks[0] if tasks else ""
        return [(str(data), lambda kind: _from_files(data, task, kind, split))]
    if tasks:
        return [_of_task(task, split) for task in tasks]
    of_run = next((subject for subject in subjects if subject.stage is not None), None)
    if of_run is None or of_run.stage is None:
        raise UserError("nothing to evaluate on: name --task TASK or --data FILE")
    stage = of_run.stage
    return [(f"the data of {of_run.run}", lambda kind: load_items(stage, kind, split))]


def _pairs(source: str, load: Load) -> list[Pair]:
    try:
        return cast(list[Pair], list(load("pairs")))
    except UserError as error:
        raise UserError(f"measure preference: {source} has no held-out pairs ({error}); leave it out") from error


def _from_files(where: Path, task: str, kind: Kind, split: Split) -> Sequence[Any]:
    """All rows of a file, or those of a split of a prepared folder."""
    path = where.expanduser()
    if path.is_dir():
        name = f"pairs.{split}.jsonl" if kind == "pairs" else f"{split}.jsonl"
        if not (path / name).is_file():
            there = sorted(file.name for file in path.glob("*.jsonl"))
            raise UserError(f"{where}: no {name} in it; there are {', '.join(there) or 'no .jsonl files'}")
        path = path / name
    most = 1.0 if kind == "examples" else DataSource.max_dropped_fraction  # some prompts have no demonstration
    source = DataSource(path=str(path), validation_fraction=0.0, task=task, max_dropped_fraction=most)
    return load_examples(source, kind, "train").items


def _of_task(task: str, split: Split) -> tuple[str, Load]:
    """What a task's data are called, and how to read them: `data/TASK`, or the starter's where that is not there."""
    known_task(task)
    folder = folder_of_task(task)
    if folder is None:
        raise UserError(
            f"task {task}: there is no {Path('data') / task}, and the starter has no data of it; make them with "
            f"alignlab data prepare {task}, or name --data FILE"
        )

    def load(kind: Kind) -> Sequence[Any]:
        fallback = kind == "pairs" and not (folder / f"pairs.{split}.jsonl").is_file()
        return _from_files(folder, task, kind, "validation" if fallback else split)

    return f"starter: {task}" if folder.parent == starter.DATA else str(folder), load


def known_task(task: str) -> None:
    """Refuses a task that does not exist."""
    try:
        get_task(task)
    except ValueError as error:
        raise UserError(str(error)) from error


def fitting(subjects: Sequence[Subject], questions: Questions, limits: Limits) -> Questions:
    """Without what is too long for any of the models, so that all of them see the same prompts, texts and pairs.

    Raises:
        UserError: none is left.
    """
    kept = questions.prompts
    for subject in subjects:
        longest = min(limits.max_prompt_tokens, subject.context - limits.max_completion_tokens)
        kept = [prompt for prompt in kept if len(subject.template.encode_prompt(prompt)) <= longest]
    if not kept:
        room = min(subject.context for subject in subjects) - limits.max_completion_tokens
        advice = f"raise --max-prompt-tokens, which is {limits.max_prompt_tokens}"
        if limits.max_prompt_tokens >= room:
            advice = f"lower --max-tokens, which leaves {max(room, 0)} tokens for a prompt"
        raise UserError(
            f"{questions.source}: none of {len(questions.prompts)} prompts is short enough for every model; {advice}"
        )

    def readable(prompt: Prompt, *texts: str) -> bool:
        return all(len(s.template.row(prompt, text)) <= s.context for s in subjects for text in texts)

    known = [(p, questions.references[p.id]) for p in kept if p.id in questions.references]
    return replace(
        questions,
        prompts=kept,
        references={prompt.id: text for prompt, text in known if readable(prompt, text)},
        pairs=[pair for pair in questions.pairs if readable(pair.prompt, pair.chosen, pair.rejected)],
        left_out=len(questions.prompts) - len(kept),
    )


def overlap(subject: Subject, prompts: Sequence[Prompt], cache: Path) -> dict[str, Any]:
    """How many of the prompts a run was trained on, in this stage or one before it, as far as its data are known."""
    if subject.folder is None or subject.stage is None:
        return {
            "known": False,
            "exact": 0,
            "shown": [],
            "note": "what a model was trained on is not known",
        }
    trained: set[str] = set()
    folder: Path | None = subject.folder
    note = ""
    while folder is not None:
        try:
            _, stage, start = recipe_of(folder)
            trained |= {_asked(item) for item in load_items(stage, cast(Kind, stage.method.data_kind), "train")}
            folder = start_folder(start, folder, cache) if start else None
            if start and folder is None:
                note = "the run it started from is gone, so what that was trained on is not known"
        except UserError as error:
            note, folder = f"training data not read: {error}", None
    shared = [prompt.id for prompt in prompts if _asked(prompt) in trained]
    return {"known": bool(trained), "exact": len(shared), "shown": shared[:SHOWN_OVERLAP], "note": note}


def _asked(item: Any) -> str:
    """What a prompt asks, whatever its id and white space."""
    prompt = item if isinstance(item, Prompt) else item.prompt
    text = "\n".join(f"{m.role}: {' '.join(m.content.split())}" for m in prompt.messages)
    return text or " ".join(str(getattr(item, "completion", "")).split())
