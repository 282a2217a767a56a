"""The plan of a study, declared before it runs: YAML -> arms x seeds from the same start -> nodes with what they wait
for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from alignlab import registry
from alignlab.errors import UserError
from alignlab.pipeline import check_recipe
from alignlab.pipeline.identity import code_fingerprint
from alignlab.pipeline.rewards import check_rewards
from alignlab.recipe import (
    FolderName,
    Names,
    Recipe,
    Section,
    Stage,
    _beside,
    apply_overrides,
    load_recipe,
    read_mapping,
    validate,
)


class StudyEvaluation(Section):
    """The held-out prompts every arm answers; decoding dice are the same for all."""

    split: Literal["test", "validation"] = "test"
    """Which split; tuning uses validation, the study test."""
    prompts_per_task: int = Field(60, ge=2)
    """Prompts of each task; equal numbers, so the mean over prompts is the mean over tasks."""
    samples: int = Field(4, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""


class Arm(Section):
    """One method of the comparison."""

    recipe: str
    """Its recipe file; all arms must start from the study's shared policy."""
    label: str = ""
    """How the report calls it."""
    behaviours: Names = ()
    """Tasks its training signal is about, where these are not all."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, key=value."""
    best_of: int = Field(1, ge=1)
    """Candidates of each evaluated completion: the one with the highest reward of the recipe's last stage is graded."""
    train: bool = True
    """false: the shared policy itself under this sampling. It has no training seed to vary, so it is run once."""

    @model_validator(mode="after")
    def _is_something(self) -> Arm:
        if not self.train and self.best_of == 1:
            raise ValueError("train: false without best_of is the shared policy itself, which every study shows anyway")
        return self


class Study(Section):
    """Several methods x several seeds from the same start, under one plan."""

    name: FolderName
    title: str | None = None
    seeds: tuple[int, ...] = Field((42, 123, 777), min_length=1)
    """Training seeds, the same for every arm, so that arms are paired by seed and prompt."""
    start: str
    """Recipe of the shared starting policy (SFT)."""
    reward_model: str | None = None
    """Recipe of the shared reward model."""
    arms: dict[FolderName, Arm] = Field(min_length=1)
    tasks: Names = ()
    """Tasks of the evaluation; default: those of the start recipe."""
    primary: Literal["score"] = "score"
    """The metric the verdicts are about: mean over tasks of the graded score in [0, 1]."""
    equivalence_margin: float | None = Field(None, gt=0, lt=1)
    """Differences this small do not matter (a score); lets a verdict say `equivalent`. null = never said."""
    evaluation: StudyEvaluation = StudyEvaluation()
    workers: int = Field(2, ge=1)
    """Cells run at a time, each with its share of the cores."""
    budget_note: str = ""
    """What the arms are matched on, in words."""
    tuning_note: str = ""
    """How each arm's hyperparameters were found, in words."""
    debug: bool = False
    """Two phases of every stage and two prompts a task: shows that a plan runs, and nothing else."""

    @field_validator("arms", mode="before")
    @classmethod
    def _recipes_by_name(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {k: {"recipe": v} if isinstance(v, str) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _distinct(self) -> Study:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: the same seed twice is the same run twice")
        taken = sorted({"start", "sft"} & self.arms.keys())
        if taken:
            raise ValueError(f"arms: {', '.join(taken)} is the name of a baseline; call the arm something else")
        taken = sorted({"reward_model", "teacher"} & self.arms.keys())
        if taken:
            raise ValueError(f"arms: {', '.join(taken)} is the name of a shared stage; call the arm something else")
        return self


@dataclass(frozen=True)
class Node:
    """One process of a study: a shared stage, a baseline's evaluation, or a cell."""

    name: str
    kind: Literal["start", "sft", "reward_model", "teacher", "cell"]
    arm: str = ""
    seed: int | None = None
    """Of a cell: the training seed; None where the arm is not trained."""
    needs: tuple[str, ...] = ()


def load_study(path: Path, overrides: tuple[str, ...] = (), *, debug: bool = False) -> Study:
    """Reads and checks a plan; recipes in it are relative to it.

    Raises:
        UserError: with everything that is wrong, one line each.
    """
    raw = apply_overrides(read_mapping(path), overrides)
    if "arms" not in raw and {"algorithm", "stages"} & raw.keys():
        raise UserError(
            f"{path}: this is a recipe, not a study, as it has no `arms`; run it with alignlab train {path}"
        )
    raw.setdefault("name", path.stem)
    study = validate(Study, raw, str(path))
    arms = {k: arm.model_copy(update={"recipe": _beside(arm.recipe, path)}) for k, arm in study.arms.items()}
    reward_model = _beside(study.reward_model, path) if study.reward_model else None
    resolved = {"arms": arms, "start": _beside(study.start, path), "reward_model": reward_model}
    study = study.model_copy(update={**resolved, "debug": debug or study.debug})
    if study.debug:
        few = study.evaluation.model_copy(update={"prompts_per_task": 2, "samples": 1})
        study = study.model_copy(update={"evaluation": few})
    if not study.tasks:
        study = study.model_copy(update={"tasks": start_recipe(study).stages[-1].data.task})
    if not study.tasks:
        raise UserError(f"{path}: tasks: no task to evaluate on; name some")
    for task in study.tasks:
        registry.resolve("tasks", task)
    for name in arms:
        _check_arm(study, name, path)
    return study


def start_recipe(study: Study) -> Recipe:
    """The recipe of the shared starting policy; its data section says how prompts and completions are read and cut."""
    return load_recipe(Path(study.start), debug=study.debug)


def arm_recipe(study: Study, arm: str, seed: int) -> Recipe:
    """The recipe of a cell."""
    entry = study.arms[arm]
    return load_recipe(Path(entry.recipe), [*entry.set, f"seed={seed}"], debug=study.debug)


def _check_arm(study: Study, arm: str, path: Path) -> None:
    """Every arm starts from the study's policy and uses its reward model, or the comparison is not controlled."""
    recipe = arm_recipe(study, arm, study.seeds[0])
    check_recipe(recipe, debug=study.debug)
    if recipe.stages[0].start != study.start:
        raise UserError(f"{path}: arm {arm} starts from {recipe.stages[0].start}, not from the shared {study.start}")
    own = [s.name for s in recipe.stages]
    for stage in recipe.stages:
        if stage.reward_model not in (None, study.reward_model, *own):
            raise UserError(f"{path}: arm {arm} uses {stage.reward_model}, not the shared {study.reward_model}")
    if study.arms[arm].best_of > 1:
        check_rewards(choosing_stage(study, arm))
    if not study.arms[arm].train and recipe.stages[-1].reward_model in own:
        raise UserError(
            f"{path}: arm {arm} is not trained, so there is no {recipe.stages[-1].reward_model} of its own to choose "
            "with; name the study's reward_model in its recipe"
        )


def choosing_stage(study: Study, arm: str) -> Stage:
    """The last stage of an arm, asked for as many candidates as the arm: its reward chooses among them."""
    stage = arm_recipe(study, arm, study.seeds[0]).stages[-1]
    sampling = stage.evaluation.model_copy(update={"best_of": study.arms[arm].best_of})
    return stage.model_copy(update={"evaluation": sampling})


def nodes(study: Study) -> list[Node]:
    """Everything that has to run, in an order that respects what each waits for."""
    found = [Node("start", "start"), Node("sft", "sft")]
    judged: tuple[str, ...] = ("sft",)
    if study.reward_model:
        found.append(Node("reward_model", "reward_model", needs=("sft",)))
        judged = ("sft", "reward_model")
    taught = teachers(study)
    found += [Node(name, "teacher", needs=judged) for name in taught]
    needs: dict[str, tuple[str, ...]] = {}
    for name in study.arms:
        own = arm_teachers(study, name)
        needs[name] = judged if _uses_reward_model(study, name) else ("sft",)
        needs[name] += tuple(node for node, path in taught.items() if path in own)
    for seed in study.seeds:
        for name, arm in study.arms.items():
            if arm.train:
                found.append(Node(f"{name}-{seed}", "cell", name, seed, needs[name]))
            elif seed == study.seeds[0]:
                found.append(Node(name, "cell", name, None, needs[name]))
    return found


def teachers(study: Study) -> dict[str, str]:
    """Node -> recipe of every teacher that arms share; it is trained once, with the seed of its recipe."""
    paths = dict.fromkeys(path for arm in study.arms for path in arm_teachers(study, arm))
    return {"teacher" if i == 0 else f"teacher-{i + 1}": path for i, path in enumerate(paths)}


def arm_teachers(study: Study, arm: str) -> list[str]:
    """The recipes of an arm's teachers; a run folder or a model is there already."""
    if not study.arms[arm].train:
        return []
    stages = arm_recipe(study, arm, study.seeds[0]).stages
    own = {stage.name for stage in stages}
    return [s.teacher for s in stages if s.teacher and s.teacher not in own and Path(s.teacher).is_file()]


def _uses_reward_model(study: Study, arm: str) -> bool:
    stages = arm_recipe(study, arm, study.seeds[0]).stages
    return study.reward_model is not None and any(stage.reward_model == study.reward_model for stage in stages)


def plan_hash(study: Study) -> str:
    """Identity of a plan: what it says, its recipes, and the code; how many workers run it does not matter."""
    recipes = [start_recipe(study), *(arm_recipe(study, arm, study.seeds[0]) for arm in study.arms)]
    if study.reward_model:
        recipes.append(load_recipe(Path(study.reward_model), debug=study.debug))
    recipes += [load_recipe(Path(path), debug=study.debug) for path in teachers(study).values()]
    parts: dict[str, Any] = {
        "study": study.model_dump(mode="json", exclude={"workers"}),
        "recipes": [recipe.model_dump(mode="json", serialize_as_any=True) for recipe in recipes],
        "code": code_fingerprint(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
