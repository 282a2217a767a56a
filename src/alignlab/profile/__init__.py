"""Where a run's time and memory go: a recipe -> a few of its phases, measured -> parts, and settings worth changing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alignlab.errors import UserError
from alignlab.models import hush_progress_bars, pick_device
from alignlab.pipeline import (
    NotTrained,
    Session,
    StageResult,
    check_recipe,
    default_cache,
    dependency,
    following,
    run_stage,
    teacher_of,
)
from alignlab.pipeline.identity import Teacher, stage_key
from alignlab.profile.advice import Facts, Suggestion, candidates, suggestions
from alignlab.profile.measure import Measured, Trial, Tried
from alignlab.profile.report import NUMBERS, as_json, tables, write
from alignlab.recipe import Recipe, Stage, load_recipe

__all__ = ["Profiled", "as_json", "profile", "tables", "write"]

MADE = "needed"
"""Folder of the stages that were trained, briefly, so that this one has something to start from."""
ROUNDS = 2
"""How often each change is tried, in turn with the phase as it is."""


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What a profile found."""

    recipe: str
    stage: Stage
    device: torch.device
    threads: int
    measured: Measured
    facts: Facts
    tried: tuple[Tried, ...]
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...]


def profile(
    path: Path,
    overrides: Sequence[str],
    output: Path | None = None,
    *,
    stage: str | None = None,
    phases: int = 3,
    try_changes: bool = True,
    debug: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Profiled, Path]:
    """Measures a stage of a recipe for a few phases, after one that warms up; and the folder for what is found.

    Whatever the stage starts from is taken where it is finished, else trained for two short phases below `output`.
    Nothing is written anywhere else.

    Args:
        stage: its name; the last one by default.
        try_changes: run the last phase again with the changes that one phase tells about.

    Raises:
        UserError: the recipe cannot be trained, has no such stage, or `output` holds something else.
    """
    hush_progress_bars()
    recipe = load_recipe(path, overrides, debug=debug)
    output = output or Path("runs") / "profile" / recipe.name
    check_recipe(recipe, debug=debug)
    chosen = _chosen(recipe, stage)
    _claim(output)
    short = load_recipe(path, overrides, debug=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".work-") as folder:
        work = Path(folder)
        trial, notes = _trial(recipe, short, chosen, work, output / MADE, debug, say)
        measured = trial.measure(phases, 1, say)
        several = len(recipe.stages) > 1
        notes += [
            f"the {name.replace('_', ' ')} is not stepped before step {role.start_step}: its AdamW state comes later"
            for name, role in trial.roles.items()
            if role.trained and role.start_step >= trial.state.step
        ]
        facts = Facts(stage=trial.stage, measured=measured, device=trial.session.device,
                      prefix=f"stages.{chosen.name}." if several else "")  # fmt: skip
        if not measured.laps or not measured.laps[-1].work.rows:
            notes.append("the phases took no optimiser step: nothing is known about training")
            tried = list[Tried]()
        else:
            tried = trial.try_out(candidates(facts, dict(trial.models)), ROUNDS, say) if try_changes else []
        found = suggestions(facts, tried, dict(trial.models))
    return (
        Profiled(recipe=recipe.name, stage=trial.stage, device=trial.session.device, threads=torch.get_num_threads(),
                 measured=measured, facts=facts, tried=tuple(tried), suggestions=tuple(found), notes=tuple(notes)),
        output,
    )  # fmt: skip


def _chosen(recipe: Recipe, name: str | None) -> Stage:
    names = [stage.name for stage in recipe.stages]
    if name is not None and name not in names:
        raise UserError(f"--stage {name}: there is none of that name; choose from {', '.join(names)}")
    return recipe.stages[-1 if name is None else names.index(name)]


def _claim(output: Path) -> None:
    """Makes the folder, or refuses one that holds something else."""
    ours = (output / NUMBERS).is_file() or (output / MADE).is_dir()
    if output.is_dir() and any(output.iterdir()) and not ours:
        raise UserError(f"{output}: holds something else than a profile; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be a folder for a profile ({error.strerror}); choose another --output"
        ) from error
    for left_by_a_kill in output.glob(".work-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)


def _trial(
    recipe: Recipe, short: Recipe, chosen: Stage, work: Path, made: Path, debug: bool, say: Callable[[str], None]
) -> tuple[Trial, list[str]]:
    """The stage with all that it needs, and what is to be known about that."""
    session = Session(device=pick_device(recipe.device), cache=default_cache(), debug=debug, quiet=True,
                      finished_only=True)  # fmt: skip
    brief = replace(session, cache=made, debug=True, finished_only=False)
    notes = []
    before: list[StageResult] = []
    for stage in recipe.stages[: recipe.stages.index(chosen)]:
        say(f"{stage.name}: two short phases, as {chosen.name} comes after it")
        quick = next(s for s in short.stages if s.name == stage.name)
        result = run_stage(following(quick, before), recipe.seed, work / stage.name, brief, resume=False)
        brief.earlier[stage.name] = session.earlier[stage.name] = result
        before.append(result)
    if before:
        notes.append(f"{', '.join(r.folder.name for r in before)}: trained for two short phases only, so completions "
                     "may be of other lengths than in the run")  # fmt: skip
    stage = following(chosen, before)
    try:
        needs = _needs(stage, session)
    except NotTrained as missing:
        say(f"{missing}; two short phases of it will do")
        notes.append(f"{missing}; its place is taken by one of two short phases, so completions may be of other "
                     "lengths than in the run")  # fmt: skip
        needs = _needs(stage, brief)
    start, reward_stage, teacher = needs
    key, contract = stage_key(stage, recipe.seed, start, reward_stage, teacher)
    folder = work / "run"
    folder.mkdir()
    own = replace(session, cache=work / "cache")
    return Trial(stage, recipe.seed, folder, own, start, reward_stage, key, contract, teacher), notes


def _needs(stage: Stage, session: Session) -> tuple[StageResult | None, StageResult | None, Teacher | None]:
    return (
        dependency(stage.start, "policy", session),
        dependency(stage.reward_model, "reward_model", session),
        teacher_of(stage.teacher, session),
    )
