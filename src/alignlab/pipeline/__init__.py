"""Stages of a recipe: Recipe -> for each stage, models and data -> the loop -> a run folder; resumable.

A run folder holds recipe.yaml (resolved), provenance.json, log_history.jsonl, completions.jsonl, evaluation.json,
checkpoints/ and the result: policy/ or reward_model/. A stage that another stage starts from is trained once and found
again by its key, a hash of everything that decides its weights.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from alignlab.errors import UserError
from alignlab.models import hush_progress_bars, pick_device
from alignlab.pipeline.identity import DONE, StageResult, finished_stage, read_done, stage_key
from alignlab.pipeline.stage import Lock, Session, StageRun, default_cache
from alignlab.recipe import Recipe, Stage, load_recipe
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
    _claim(output, recipe, resume)
    results: list[StageResult] = []
    for number, stage in enumerate(recipe.stages):
        folder = output if len(recipe.stages) == 1 else output / stage.name
        if stage.start is None and number:
            before = [r for r in results if r.kind == "policy"]
            stage = stage.model_copy(update={"start": str(before[-1].folder)}) if before else stage
        result = run_stage(stage, recipe.seed, folder, session, resume=resume)
        session.earlier[stage.name] = result
        results.append(result)
    return results


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Writes the resolved recipe, or refuses a folder that belongs to another run."""
    path, text = output / "recipe.yaml", recipe.to_yaml()
    begun = path.is_file() and any(output.rglob(HISTORY))
    if begun and not resume and (path.read_text("utf-8") != text or not _finished_all(recipe, output)):
        raise UserError(f"{output} already holds a run; add --resume to go on with it, or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or not any(output.rglob("checkpoints/phase-*")):  # else the checkpoint's contract decides
        path.write_text(text, "utf-8")


def _finished_all(recipe: Recipe, output: Path) -> bool:
    folders = [output] if len(recipe.stages) == 1 else [output / s.name for s in recipe.stages]
    return all((folder / DONE).is_file() for folder in folders)


def run_stage(stage: Stage, seed: int, folder: Path, session: Session, *, resume: bool) -> StageResult:
    """Trains one stage to its end, or finds it finished."""
    start, reward_stage = (
        _dependency(stage.start, "policy", session),
        _dependency(stage.reward_model, "reward_model", session),
    )
    if start is not None and "name" in stage.model.model_fields_set:
        raise UserError(
            f"stage {stage.name}: model.name has no effect, as start: {stage.start} decides the weights; drop one"
        )
    key, contract = stage_key(stage, seed, start, reward_stage)
    done = finished_stage(folder, key)
    if done is not None:
        _say(session, f"{stage.name}: already complete in {folder}")
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        run = StageRun(stage, seed, folder, session, start, reward_stage, key, contract)
        return run.go(resume)


def _dependency(reference: str | None, kind: str, session: Session) -> StageResult | None:
    """The finished stage a name, recipe or run folder stands for; a recipe is trained into the cache if need be."""
    if reference is None:
        return None
    if reference in session.earlier:
        return _of_kind(session.earlier[reference], kind, reference)
    path = Path(reference)
    if path.is_dir():
        for candidate in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
            if (candidate / DONE).is_file() and (candidate / kind).is_dir():
                return read_done(candidate)
        raise UserError(f"{path}: not a finished run with a {kind}; train it first")
    return cached_stage(path, kind, session)


def cached_stage(path: Path, kind: str, session: Session) -> StageResult:
    """The last stage of a recipe file, from the cache or trained into it now."""
    recipe = load_recipe(path, debug=session.debug)
    inner = replace(session, earlier={}, tracking=())
    result: StageResult | None = None
    for stage in recipe.stages:
        if stage.start is None and result is not None and result.kind == "policy":
            stage = stage.model_copy(update={"start": str(result.folder)})
        start = _dependency(stage.start, "policy", inner)
        reward_stage = _dependency(stage.reward_model, "reward_model", inner)
        key, _ = stage_key(stage, recipe.seed, start, reward_stage)
        folder = session.cache / f"{recipe.name}-{key[:16]}"
        found = finished_stage(folder, key)
        if found is None:
            _say(session, f"{path.name}: training {stage.name} first (kept in {folder})")
            found = run_stage(stage, recipe.seed, folder, inner, resume=True)
        inner.earlier[stage.name] = result = found
    assert result is not None
    return _of_kind(result, kind, reference=str(path))


def _of_kind(result: StageResult, kind: str, reference: str) -> StageResult:
    if result.kind != kind:
        raise UserError(f"{reference}: gives a {result.kind}, but a {kind} is needed here")
    return result


def _say(session: Session, line: str) -> None:
    if not session.quiet:
        print(line, file=sys.stderr)


__all__ = ["Session", "StageResult", "cached_stage", "default_cache", "run_recipe", "run_stage"]
