"""Stages of a recipe: Recipe -> for each stage, models and data -> the loop -> a run folder; resumable.

A run folder holds recipe.yaml (resolved), provenance.json, log_history.jsonl, completions.jsonl, evaluation.json,
checkpoints/ and the result: policy/ or reward_model/. A stage that another stage starts from is trained once and found
again by its key, a hash of everything that decides its weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alignlab.conversation import Template
from alignlab.errors import UserError
from alignlab.models import hush_progress_bars, pick_device
from alignlab.pipeline.check import check_recipe, is_model
from alignlab.pipeline.identity import (
    DONE,
    NotTrained,
    StageResult,
    Teacher,
    finished_folder,
    finished_stage,
    model_fingerprint,
    read_done,
    require_kind,
    stage_key,
)
from alignlab.pipeline.rewards import build_rewards
from alignlab.pipeline.stage import Lock, Session, StageRun, default_cache, learned_reward
from alignlab.recipe import ModelSection, Recipe, Stage, load_recipe
from alignlab.rollout import Reward
from alignlab.tracking import HISTORY


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    debug: bool = False,
    cache: Path | None = None,
    quiet: bool = False,
) -> list[StageResult]:
    """Runs every stage that is not finished, each into a folder of its own (a single stage into `output` itself).

    Raises:
        UserError: `output` holds another run, or something in recipe, data or model cannot be used.
        RunError: the run broke off; its last checkpoint is intact.
    """
    hush_progress_bars()
    session = Session(
        device=pick_device(recipe.device),
        cache=cache or default_cache(),
        debug=debug,
        quiet=quiet,
        tracking=recipe.tracking,
    )
    check_recipe(recipe, debug=debug)
    _claim(output, recipe, resume)
    results: list[StageResult] = []
    for stage in recipe.stages:
        folder = output if len(recipe.stages) == 1 else output / stage.name
        result = run_stage(following(stage, results), recipe.seed, folder, session, resume=resume)
        session.earlier[stage.name] = result
        results.append(result)
    record, text = output / "recipe.yaml", recipe.to_yaml()
    if record.read_text("utf-8") != text:  # resumed with other words or later stages, and every contract has agreed
        record.write_text(text, "utf-8")
    return results


def following(stage: Stage, results: Sequence[StageResult]) -> Stage:
    """The stage, starting from the last policy made before it unless it says otherwise."""
    policies = [result for result in results if result.kind == "policy"]
    if stage.start is not None or not policies:
        return stage
    return stage.model_copy(update={"start": str(policies[-1].folder)})


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Writes the resolved recipe, or refuses a folder that belongs to another run."""
    path, text = output / "recipe.yaml", recipe.to_yaml()
    begun = path.is_file() and any(output.rglob(HISTORY))
    if begun and not resume and (path.read_text("utf-8") != text or not _finished_all(recipe, output)):
        raise UserError(f"{output} already holds a run; add --resume to go on with it, or choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or not any(output.rglob("checkpoints/phase-*")):  # else the checkpoint's contract decides
            path.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be a run folder ({error.strerror}); choose another --output") from error


def _finished_all(recipe: Recipe, output: Path) -> bool:
    folders = [output] if len(recipe.stages) == 1 else [output / s.name for s in recipe.stages]
    return all((folder / DONE).is_file() for folder in folders)


def run_stage(
    stage: Stage, seed: int, folder: Path, session: Session, *, resume: bool, wait: bool = False
) -> StageResult:
    """Trains one stage to its end, or finds it finished; `wait` lets another process that is at it finish first."""
    start, reward_stage = (
        dependency(stage.start, "policy", session),
        dependency(stage.reward_model, "reward_model", session),
    )
    teacher = teacher_of(stage.teacher, session)
    key, contract = stage_key(stage, seed, start, reward_stage, teacher)
    done = finished_stage(folder, key)
    if done is not None:
        _say(session, f"{stage.name}: already complete in {folder}")
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder, wait):
        done = finished_stage(folder, key)
        if done is not None:
            return done
        run = StageRun(stage, seed, folder, session, start, reward_stage, key, contract, teacher)
        return run.go(resume)


def dependency(reference: str | None, kind: str, session: Session) -> StageResult | None:
    """The finished stage a name, recipe or run folder stands for; a recipe is trained into the cache if need be."""
    if reference is None:
        return None
    if reference in session.earlier:
        return session.earlier[reference]
    path = Path(reference)
    return read_done(finished_folder(path, kind)) if path.is_dir() else cached_stage(path, kind, session)


def teacher_of(reference: str | None, session: Session) -> Teacher | None:
    """The same for a teacher, which may also be a model as it is."""
    if reference is None:
        return None
    if reference not in session.earlier and is_model(reference):
        return Teacher(name=reference, model=reference, key=model_fingerprint(ModelSection(name=reference)))
    result = dependency(reference, "policy", session)
    assert result is not None
    return Teacher(name=str(result.folder.resolve()), model=str(result.model), key=result.key)


def stage_rewards(stage: Stage, session: Session, template: Template) -> list[Reward]:
    """The rewards of a stage, its reward model found or trained, for completions of a policy with this template."""
    reward_stage = dependency(stage.reward_model, "reward_model", session)
    return build_rewards(stage, lambda: learned_reward(stage, reward_stage, template, session))


def cached_stage(path: Path, kind: str, session: Session) -> StageResult:
    """The last stage of a recipe file, from the cache or trained into it now."""
    recipe = load_recipe(path, debug=session.debug)
    inner = replace(session, earlier={}, tracking=())
    results: list[StageResult] = []
    for stage in recipe.stages:
        stage = following(stage, results)
        start = dependency(stage.start, "policy", inner)
        reward_stage = dependency(stage.reward_model, "reward_model", inner)
        key, _ = stage_key(stage, recipe.seed, start, reward_stage, teacher_of(stage.teacher, inner))
        folder = session.cache / f"{recipe.name}-{key[:16]}"
        found = finished_stage(folder, key)
        if found is None:
            if session.finished_only:
                raise NotTrained(f"{path.name}: {stage.name} is not trained yet")
            _say(session, f"{path.name}: training {stage.name} first (kept in {folder})")
            found = run_stage(stage, recipe.seed, folder, inner, resume=True, wait=True)
        inner.earlier[stage.name] = found
        results.append(found)
    require_kind(str(path), results[-1].kind, kind)
    return results[-1]


def _say(session: Session, line: str) -> None:
    if not session.quiet:
        print(line, file=sys.stderr)


__all__ = [
    "NotTrained",
    "Session",
    "StageResult",
    "cached_stage",
    "check_recipe",
    "default_cache",
    "dependency",
    "following",
    "run_recipe",
    "run_stage",
    "stage_rewards",
    "teacher_of",
]
