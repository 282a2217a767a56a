"""From finished cells to what a study says: cells/*.json -> comparisons with intervals -> results.json.

Every number is recomputed from per-prompt scores: D[s, p] = score of an arm minus score of what it is compared with,
seed s, prompt p; intervals by the crossed seed x prompt method.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import alignlab
from alignlab.pipeline.items import load_items
from alignlab.pipeline.rewards import reward_entries
from alignlab.recipe import Recipe, Stage, load_recipe
from alignlab.statistics.effects import effect
from alignlab.statistics.inference import (
    EQUIVALENCE_CONFIDENCE,
    ONE_RUN,
    crossed_interval,
    prompt_interval,
    seeds_all_above,
    verdict,
)
from alignlab.study.plan import Study, arm_recipe, arm_teachers, choosing_stage, start_recipe, teachers

LABELS = {"start": "untrained model", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO",
          "rejection": "rejection sampling", "distill": "distillation"}  # fmt: skip
GRADERS = {"reasoning": "exact", "gsm8k": "exact", "code": "code"}
"""Task -> the reward that is its grader."""
NOT_TRAINED = "not trained: no training seed varies, and the interval is over prompts and their samples"
SAMPLE_PROMPTS = 8
"""Prompts of each task whose completions the report shows."""


def collect_results(study: Study, folder: Path, failed: Mapping[str, str], wall_seconds: float) -> dict[str, Any]:
    """Reads the cells of a study and computes everything its report says."""
    sft, reward_model = (_read(folder / "cells" / f"{name}.json") for name in ("sft", "reward_model"))
    arms: list[dict[str, Any]] = [
        {"name": name, "label": _label(study, name), "kind": "baseline", "runs": [_run(folder, name, None, failed)]}
        for name in ("start", "sft")
    ]
    taught = {node: _read(folder / "cells" / f"{node}.json") for node in teachers(study)}
    for name, arm in study.arms.items():
        shared = {"start": sft.get("key"), "reward_model": reward_model.get("key")}
        if paths := arm_teachers(study, name):
            shared["teacher"] = next(taught[node].get("key") for node, p in teachers(study).items() if p == paths[-1])
        cells = {f"{name}-{seed}": seed for seed in study.seeds} if arm.train else {name: None}
        runs = [_only_shared(_run(folder, node, seed, failed), shared) for node, seed in cells.items()]
        facts = {"trained": arm.train, "best_of": arm.best_of, "planned": len(cells)}
        arms.append({"name": name, "label": _label(study, name), "kind": "arm", **facts, "runs": runs})
    notes = [f"{name}: {error}" for name, error in failed.items()] + _choice_notes(study)
    if study.debug:
        notes.insert(0, "a --debug study: two phases of every stage and two prompts a task, so its numbers say nothing")
    prompts = _prompts(study)
    samples = _samples(study, arms, folder, prompts)
    return {
        "schema": 1,
        "alignlab_version": alignlab.__version__,
        "name": study.name,
        "title": study.title,
        "plan": _plan(study, arms),
        "environment": {
            "cores": os.cpu_count(),
            "workers": study.workers,
            "platform": platform.platform(),
            "versions": {p: metadata.version(p) for p in ("torch", "transformers", "peft", "numpy", "scipy")},
            "wall_seconds": wall_seconds,
        },
        "shared": {
            "sft": {"hash": sft.get("key"), "ledger": sft.get("ledger", {})},
            **({"reward_model": {"hash": reward_model.get("key"), "ledger": reward_model.get("ledger", {}),
                                 "metrics": reward_model.get("metrics", {}),
                                 "intervals": reward_model.get("intervals", {})}} if study.reward_model else {}),
            **{node: {"hash": found.get("key"), "ledger": found.get("ledger", {})} for node, found in taught.items()},
        },
        "arms": arms,
        "comparisons": comparisons(study, arms),
        "samples": samples,
        "notes": notes,
    }  # fmt: skip


def _label(study: Study, name: str) -> str:
    given = study.arms[name].label if name in study.arms else ""
    return given or LABELS.get(name, name)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _run(folder: Path, node: str, seed: int | None, failed: Mapping[str, str]) -> dict[str, Any]:
    found = _read(folder / "cells" / f"{node}.json")
    if not found:
        return {"seed": seed, "status": "failed", "error": failed.get(node, "not run"), "folder": f"cells/{node}"}
    return {
        "seed": seed,
        "status": "finished",
        "error": None,
        "folder": f"cells/{node}",
        "hashes": {k: found.get(k) for k in ("key", "start", "reward_model", "teacher") if found.get(k)},
        "scores": {"score": found["scores"]},
        "tasks": found["tasks"],
        "metrics": found["metrics"],
        "intervals": found["intervals"],
        "ledger": found["ledger"],
        "curves": found["curves"],
        "parameters": found["parameters"],
        "phase_label": _phase_label(found["recipe"]["stages"][-1]["algorithm"]),
    }


def _only_shared(run: dict[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The run, or a failed one if it was made from another policy or reward model than the study's."""
    others = [k for k, key in run.get("hashes", {}).items() if k in shared and key != shared[k]]
    if not others:
        return run
    error = f"its {others[0]} is not the one the study shares; delete {run['folder']}* and start the study again"
    return {"seed": run["seed"], "status": "failed", "error": error, "folder": run["folder"]}


def _phase_label(algorithm: Mapping[str, Any]) -> str:
    """What one phase of a method is, for the axis of its curves."""
    if "pairs_per_step" in algorithm:
        return f"steps of {algorithm['pairs_per_step']} pairs"
    if "prompts_per_phase" in algorithm:
        return f"phases of {algorithm['prompts_per_phase']} prompts x {algorithm['group_size']}"
    return "steps"


def _plan(study: Study, arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    start = start_recipe(study)
    recipes = {arm: arm_recipe(study, arm, study.seeds[0]) for arm in study.arms}
    return {
        "seeds": list(study.seeds),
        "primary": study.primary,
        "confidence": 0.95,
        "equivalence_margin": study.equivalence_margin,
        "tasks": list(study.tasks),
        "behaviour_tasks": {k: list(a.behaviours) for k, a in study.arms.items() if a.behaviours},
        "prompts_per_task": study.evaluation.prompts_per_task,
        "samples_per_prompt": study.evaluation.samples,
        "temperature": study.evaluation.temperature,
        "max_completion_tokens": start.stages[-1].data.max_completion_tokens,
        "split": study.evaluation.split,
        "model": start.stages[0].model.name,
        "num_parameters": _num_parameters(arms),
        "trained_on": trained_on(study),
        "budget_note": study.budget_note,
        "tuning_note": study.tuning_note,
        "arm_recipes": {k: r.model_dump(mode="json", serialize_as_any=True) for k, r in recipes.items()},
    }


def _num_parameters(arms: Sequence[Mapping[str, Any]]) -> int | None:
    return next((run["parameters"] for arm in arms for run in finished(arm)), None)


def trained_on(study: Study) -> dict[str, list[str]]:
    """Task -> arms whose reward contains the very function that grades the task: that which they, or the teacher they
    copy, were trained on, or that which chooses among their candidates."""
    found: dict[str, list[str]] = {}
    for arm, entry in study.arms.items():
        trained = rewarded_stages(arm_recipe(study, arm, study.seeds[0]), study.debug) if entry.train else []
        for task in study.tasks:
            if _graded_by(trained, task) or task in graded_choice(study, arm):
                found.setdefault(task, []).append(arm)
    return found


def rewarded_stages(recipe: Recipe, debug: bool) -> list[Stage]:
    """The stages of a recipe, and of the recipes of its teachers, that learned from a reward."""
    found = [s for s in recipe.stages if s.method.data_kind == "prompts" and s.algorithm.needs_reward]
    own = {stage.name for stage in recipe.stages}
    for teacher in (s.teacher for s in recipe.stages):
        if teacher and teacher not in own and Path(teacher).is_file():
            found += rewarded_stages(load_recipe(Path(teacher), debug=debug), debug)
    return found


def graded_choice(study: Study, arm: str) -> list[str]:
    """The tasks on which the reward that chooses among an arm's candidates contains the task's grader."""
    if study.arms[arm].best_of == 1:
        return []
    return [task for task in study.tasks if _graded_by([choosing_stage(study, arm)], task)]


def _graded_by(stages: Sequence[Stage], task: str) -> bool:
    entries = [e for s in stages for name, e in reward_entries(s) if name == GRADERS.get(task)]
    return any(entry.weight and (not entry.tasks or task in entry.tasks) for entry in entries)


def _choice_notes(study: Study) -> list[str]:
    """What a reader must know of arms that choose among candidates."""
    notes = []
    for name, arm in study.arms.items():
        if arm.best_of == 1:
            continue
        policy = "the arm's policy" if arm.train else "the shared policy, not trained"
        note = (
            f"{_label(study, name)}: {policy}, the best of {arm.best_of} samples by its recipe's reward. An answer "
            f"costs {arm.best_of} times the tokens, which the ledger's training columns do not show."
        )
        if graded := graded_choice(study, name):
            note += (
                f" On {', '.join(graded)} that reward is the grader itself: the score there is pass@{arm.best_of}, for "
                "which the right answer must be known."
            )
        notes.append(note)
    return notes


# ---- comparisons -----------------------------------------------------------------------------------------------------


def comparisons(study: Study, arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every arm against SFT (overall and by task), SFT against the untrained model, and every pair of arms."""
    by_name = {arm["name"]: arm for arm in arms}
    found = []
    for arm in (a for a in arms if a["kind"] == "arm"):
        for task in (None, *study.tasks):
            found.append(compare(study, arm, by_name["sft"], task))
    for task in (None, *study.tasks):
        found.append(compare(study, by_name["sft"], by_name["start"], task))
    methods = [a for a in arms if a["kind"] == "arm"]
    for i, first in enumerate(methods):
        for second in methods[i + 1 :]:
            for task in (None, *study.tasks):
                found.append(compare(study, first, second, task))
    return [c for c in found if c is not None]


def compare(
    study: Study, arm: Mapping[str, Any], against: Mapping[str, Any], task: str | None
) -> dict[str, Any] | None:
    """One comparison of per-prompt scores, paired by seed where both have several runs; None if a side has no run.

    An arm that is not trained has one run and no seed: its difference to a trained arm varies with that one's seeds
    alone, and its difference to the shared policy, whose samples it chooses among, with none.
    """
    ours, theirs = finished(arm), finished(against)
    if not ours or not theirs:
        return None
    single = _is_single(ours) or _is_single(theirs)
    seeds = _common_seeds(ours, theirs)
    if not seeds:
        return None
    prompts = sorted(p for p, t in theirs[0]["tasks"].items() if task is None or t == task)
    mine, other = (
        score_matrix(runs if _is_single(runs) else [r for r in runs if r["seed"] in seeds], prompts)
        for runs in (ours, theirs)
    )
    differences = mine - other  # a single run stands against every seed of the other side
    one_run = differences.shape[0] == 1
    interval = prompt_interval(differences[0]) if one_run else crossed_interval(differences)
    narrow = (
        prompt_interval(differences[0], EQUIVALENCE_CONFIDENCE)
        if one_run
        else crossed_interval(differences, EQUIVALENCE_CONFIDENCE)
    )
    found = {
        "arm": arm["name"],
        "against": against["name"],
        "metric": study.primary,
        "task": task,
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "confidence": interval.confidence,
        "df": interval.df,
        "verdict": verdict(interval, study.equivalence_margin, narrow if study.equivalence_margin else None),
        "every_seed_above": bool(seeds_all_above(differences)),
        "per_seed": {str(s): float(d) for s, d in zip(seeds, differences.mean(1), strict=True)},
        "primary": task is None,
        "note": interval.note.replace(ONE_RUN, NOT_TRAINED) if _untrained(arm, against) else interval.note,
    }
    if not single:
        size = effect(mine.mean(1), other.mean(1))
        found["effect"] = {"d": size.d, "g": size.g, "low": size.low, "high": size.high, "note": size.note}
    return found


def _is_single(runs: Sequence[Mapping[str, Any]]) -> bool:
    return len(runs) == 1 and runs[0]["seed"] is None


def _common_seeds(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """The seeds of the rows of a comparison, in our order; [None] between two single runs."""
    if _is_single(ours):
        return [r["seed"] for r in theirs]
    return [r["seed"] for r in ours if _is_single(theirs) or r["seed"] in {t["seed"] for t in theirs}]


def _untrained(arm: Mapping[str, Any], against: Mapping[str, Any]) -> bool:
    """Whether nothing but the shared policy stands on either side, at least once with another sampling."""
    sides = [side.get("trained", side["name"] != "sft") for side in (arm, against)]
    return not any(sides) and "arm" in (arm["kind"], against["kind"])


def finished(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for run in arm["runs"] if run["status"] == "finished"]


def score_matrix(runs: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> np.ndarray:
    """(S, P) per-prompt scores of runs in order."""
    return np.array([[run["scores"]["score"][p] for p in prompts] for run in runs], dtype=np.float64)


# ---- samples ---------------------------------------------------------------------------------------------------------


def _prompts(study: Study) -> dict[str, Any]:
    stage = start_recipe(study).stages[-1]
    data = stage.data.model_copy(update={"task": study.tasks})
    return {p.id: p for p in load_items(stage.model_copy(update={"data": data}), "prompts", study.evaluation.split)}


def _samples(
    study: Study, arms: Sequence[Mapping[str, Any]], folder: Path, prompts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The first completion of every run for some prompts of each task, those first on which the arms differ most."""
    texts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm in arms:
        for run in finished(arm):
            cell = _read(folder / f"{run['folder']}.json")
            for prompt_id, first in _first_of_each(cell.get("samples", [])):
                shown = {k: first.get(k) for k in ("text", "score", "finish_reason")} | {"seed": run["seed"]}
                texts.setdefault(prompt_id, {}).setdefault(arm["name"], []).append(shown)
    found = []
    for task in study.tasks:
        ids = [i for i in texts if i in prompts and prompts[i].task == task]
        ids.sort(key=lambda i: (-_spread(texts[i]), i))
        for prompt_id in ids[:SAMPLE_PROMPTS]:
            prompt = prompts[prompt_id]
            found.append(
                {
                    "prompt_id": prompt_id,
                    "task": task,
                    "prompt": prompt.messages[-1].content,
                    "answer": prompt.answer,
                    "completions": texts[prompt_id],
                }
            )
    return found


def _first_of_each(samples: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    seen: set[str] = set()
    for sample in samples:
        if sample["prompt_id"] not in seen:
            seen.add(sample["prompt_id"])
            yield sample["prompt_id"], sample


def _spread(completions: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    means = [np.mean([c["score"] or 0.0 for c in runs]) for runs in completions.values()]
    return float(max(means) - min(means))
