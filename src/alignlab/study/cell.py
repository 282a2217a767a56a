"""One node of a study in its own process: shared stage, baseline or cell -> its run folder and a test evaluation."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from alignlab.conversation import Template
from alignlab.errors import UserError
from alignlab.evaluation import Evaluation, evaluate_policy
from alignlab.generate import Sampling
from alignlab.models import (
    frozen_policy,
    hush_progress_bars,
    load_generation_config,
    load_tokenizer,
    num_parameters,
    pick_device,
)
from alignlab.pipeline import Session, StageResult, cached_stage, following, run_stage, stage_rewards
from alignlab.pipeline.items import validation_prompts
from alignlab.pipeline.stage import model_choice, peak_memory
from alignlab.recipe import ModelSection, Recipe
from alignlab.rollout import Limits
from alignlab.study.plan import Node, Study, arm_recipe, choosing_stage, nodes, start_recipe, teachers
from alignlab.tracking import HISTORY, read_jsonl, write_json
from alignlab.train import RunError

CURVES = {
    "score": "evaluation/score",
    "policy/kl_per_sequence": "evaluation/policy/kl_per_sequence",
    "completion/length": "evaluation/completion/length",
    "reward/mean": "reward/mean",
}
"""Learning curve of the report -> metric of the log."""


def run_node(study: Study, node: Node, folder: Path) -> None:
    """Runs a node and writes `cells/NAME.json`; a node that is finished only finds that out again."""
    session = Session(device=pick_device(), cache=folder / "shared", debug=study.debug, quiet=True)
    base = start_recipe(study)
    if node.kind == "start":
        section = base.stages[0].model
        _write(folder, node, _test(study, section, section.name, session, None), {}, {}, base)
        return
    start = cached_stage(Path(study.start), "policy", session)
    if node.kind == "sft":
        found = _test(study, base.stages[-1].model, str(start.model), session, start)
        _write(folder, node, found, start.ledger, {"key": start.key}, base)
        return
    if node.kind == "reward_model":
        assert study.reward_model
        _write_shared(folder, node, cached_stage(Path(study.reward_model), "reward_model", session))
        return
    if node.kind == "teacher":
        _write_shared(folder, node, cached_stage(Path(teachers(study)[node.name]), "policy", session))
        return
    if study.arms[node.arm].train:
        _cell(study, node, folder, session, start)
    else:
        _untrained_cell(study, node, folder, session, start)


def _untrained_cell(study: Study, node: Node, folder: Path, session: Session, start: StageResult) -> None:
    """The shared policy as it is, best of n: no training cost, and n times the cost of an answer."""
    recipe = arm_recipe(study, node.arm, study.seeds[0])
    found = _test(study, start_recipe(study).stages[-1].model, str(start.model), session, start, node.arm)
    ledger = dict.fromkeys(start.ledger, 0.0) | {"peak_memory_bytes": peak_memory(session.device)}
    shared: dict[str, Any] = {"key": start.key, "start": start.key}
    if recipe.stages[-1].reward_model and study.reward_model:
        shared["reward_model"] = cached_stage(Path(study.reward_model), "reward_model", session).key
    _write(folder, node, found, ledger, shared, recipe)


def _cell(study: Study, node: Node, folder: Path, session: Session, start: StageResult) -> None:
    assert node.seed is not None
    recipe = arm_recipe(study, node.arm, node.seed)
    run = folder / "cells" / node.name
    results: list[StageResult] = []
    for stage in recipe.stages:
        inside = run if len(recipe.stages) == 1 else run / stage.name
        result = run_stage(following(stage, results), node.seed, inside, session, resume=True)
        session.earlier[stage.name] = result
        results.append(result)
    last = results[-1]
    if last.kind != "policy":
        raise UserError(f"{run}: the arm ends with a {last.kind}, but a policy is compared")
    made_from = [json.loads((r.folder / "provenance.json").read_text("utf-8")) for r in results]
    provenance = made_from[0]
    if provenance["start"] != start.key:
        raise UserError(f"{run}: started from {provenance['start'][:12]}, not from the shared policy {start.key[:12]}")
    found = _test(study, recipe.stages[-1].model, str(last.model), session, start, node.arm)
    ledger = {k: sum(r.ledger.get(k, 0.0) for r in results) for k in last.ledger}
    ledger["peak_memory_bytes"] = max(r.ledger["peak_memory_bytes"] for r in results)
    taught = [p["teacher"] for p in made_from if p["teacher"]]
    shared = {"key": last.key, **{k: provenance[k] for k in ("start", "reward_model")}}
    shared["teacher"] = taught[-1] if taught else None
    _write(folder, node, found, ledger, shared, recipe, curves(last.folder))


def _test(
    study: Study, section: ModelSection, model: str, session: Session, start: StageResult | None, arm: str = ""
) -> tuple[Evaluation, int]:
    """The held-out evaluation of a model, and how many parameters it has.

    Prompts and length limits are those of the start recipe for every arm, whatever it was trained with; the KL is to
    the shared starting policy. How many candidates an answer has, and which reward chooses, is the arm's.
    """
    settings, stage = study.evaluation, start_recipe(study).stages[-1]
    template = Template.of(load_tokenizer(model), load_generation_config(model))
    limits = Limits(
        max_prompt_tokens=stage.data.max_prompt_tokens, max_completion_tokens=stage.data.max_completion_tokens
    )
    data = stage.data.model_copy(update={"task": study.tasks})
    stage = stage.model_copy(update={"data": data})
    prompts = validation_prompts(stage, settings.prompts_per_task, template, limits, settings.split)
    policy = frozen_policy(model_choice(section, model), session.device)
    reference = None
    if start is not None and str(start.model) != model:
        reference = frozen_policy(model_choice(section, str(start.model)), session.device)
    sampling = Sampling(temperature=settings.temperature, max_completion_tokens=limits.max_completion_tokens)
    best_of = study.arms[arm].best_of if arm else 1
    found = evaluate_policy(
        policy, prompts, template, sampling, samples=settings.samples, reference=reference, best_of=best_of,
        rewards=stage_rewards(choosing_stage(study, arm), session, template) if best_of > 1 else (),
    )  # fmt: skip
    return found, num_parameters(policy)


def curves(run: Path) -> dict[str, list[list[float]]]:
    """[[finished phases, value], ...] of every learning curve in a run's log."""
    found: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for row in read_jsonl(run / HISTORY):
        for name, metric in CURVES.items():
            if row.get(metric) is not None:
                phase = row["phases_done"] if "phases_done" in row else row["phase"] + 1
                found[name].append([phase, row[metric]])
    return found


def _path(folder: Path, node: Node) -> Path:
    return folder / "cells" / f"{node.name}.json"


def _write_shared(folder: Path, node: Node, trained: StageResult) -> None:
    """What a study says of a stage that its arms share."""
    evaluation = json.loads((trained.folder / "evaluation.json").read_text("utf-8"))
    record = {"key": trained.key, **{k: evaluation.get(k, {}) for k in ("metrics", "intervals")}}
    write_json(_path(folder, node), {"node": node.name, **record, "ledger": trained.ledger})


def _write(
    folder: Path,
    node: Node,
    found: tuple[Evaluation, int],
    ledger: dict[str, float],
    shared: dict[str, Any],
    recipe: Recipe,
    learning: dict[str, list[list[float]]] | None = None,
) -> None:
    evaluation, parameters = found
    answers = len(evaluation.samples)
    ledger = {
        **ledger,
        "evaluation_completions": answers * evaluation.metrics.get("inference/candidates", 1.0),
        "evaluation_generated_tokens": answers * evaluation.metrics["inference/tokens_per_answer"],
    }
    write_json(
        _path(folder, node),
        {
            "node": node.name,
            "seed": node.seed,
            "status": "finished",
            **shared,
            "scores": evaluation.scores,
            "tasks": evaluation.tasks,
            "metrics": evaluation.metrics,
            "intervals": evaluation.intervals,
            "samples": evaluation.samples,
            "ledger": ledger,
            "curves": learning or {},
            "parameters": parameters,
            "recipe": recipe.model_dump(mode="json", serialize_as_any=True),
        },
    )


def main(arguments: list[str]) -> int:
    """`python -m alignlab.study.cell FOLDER NODE`: 0 finished, 1 failed (a line on stderr, the traceback in a file)."""
    folder, name = Path(arguments[0]), arguments[1]
    sys.path.append(os.getcwd())  # a user's own rewards and methods are named by import path
    hush_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    study = Study.model_validate(json.loads((folder / "study.json").read_text("utf-8")))
    node = next(n for n in nodes(study) if n.name == name)
    try:
        run_node(study, node, folder)
    except (UserError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        log = folder / "cells" / f"{name}.traceback.txt"
        log.write_text(traceback.format_exc(), "utf-8")
        print(f"{type(error).__name__}: {error} (see {log})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
