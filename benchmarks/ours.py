"""Our side: a recipe for the case, run as users run it, that waits for its turn before every phase."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignlab.pipeline import run_recipe
from alignlab.pipeline import stage as stage_module
from alignlab.recipe import load_recipe
from alignlab.timing import waiting
from alignlab.types import Completion, LoopState, Prompt
from benchmarks.cases import SEED, data, reward_of
from benchmarks.worker import Job, Report, Turn, synchroniser

stage: Any = stage_module  # whose loop is made to wait
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 1e-5},
    "reward_model": {"learning_rate": 1e-5},
    "dpo": {"learning_rate": 1e-6},
    "grpo": {"learning_rate": 1e-6, "aggregation": "token"},
    "ppo": {"learning_rate": 1e-6, "epochs": 1},
}
EACH = {"sft": "examples_per_step", "reward_model": "pairs_per_step", "dpo": "pairs_per_step",
        "grpo": "prompts_per_phase", "ppo": "prompts_per_phase"}  # fmt: skip


def even_words(prompts: list[Prompt], completions: list[Completion]) -> list[float]:
    """The reward, as a function that a recipe names."""
    return [reward_of(completion.text) for completion in completions]


def recipe(job: Job) -> Path:
    """The job's case as a recipe file."""
    case, folder = job.case, job.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows, held_out = folder / "data.jsonl", folder / "held-out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in data(case)), "utf-8")
    other = {key: "w2" if key == "prompt" else f"w{i} w{i}" for i, key in enumerate(data(case)[0], 2)}
    held_out.write_text(json.dumps(other) + "\n", "utf-8")  # a file of its own: all of the others are trained on
    algorithm = {"name": case.method, EACH[case.method]: case.items, **ALGORITHMS[case.method]}
    content: dict[str, Any] = {
        "seed": SEED,
        "model": {"name": str(job.model), "dtype": "bfloat16" if job.precision == "bfloat16" else "float32"},
        "data": {
            "path": str(rows),
            "validation_path": str(held_out),
            "max_prompt_tokens": case.prompt_tokens + 8,
            "max_completion_tokens": case.completion_tokens,
        },
        "algorithm": algorithm,
        "train": {"num_phases": job.steps, "save_every": 10**6, "log_completions": 0},
        "evaluation": {"prompts_per_task": 0},
    }
    if case.adapter:
        content["model"]["adapter"] = {"rank": 8, "alpha": 16}
    if case.sampled:
        algorithm["group_size"] = case.group
        content["reward"] = {"benchmarks.ours:even_words": 1.0}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content), "utf-8")  # JSON is YAML
    return path


def run(job: Job, turn: Turn, report: Report) -> None:
    """Trains; calls `turn` before every phase and `report` with what it measured after it."""
    with gated(turn, report, job.device):
        overrides = [f"device={job.device}", *job.case.ours]
        run_recipe(load_recipe(recipe(job), overrides), job.folder / "run", quiet=True)


@contextmanager
def gated(turn: Turn, report: Report, device: str = "cpu") -> Iterator[None]:
    """The stage's training loop, made to wait.

    A step is all that happens between two turns, preparing data, training, logging; and its share of the reference's
    logprobs, where they were computed for all steps before the first.
    """
    train, fill = stage.train, stage.fill_reference
    shared: dict[str, float] = {}
    synchronise = synchroniser(device)

    def filling(*args: Any, num_phases: int, **kwargs: Any) -> Any:
        filled = fill(*args, num_phases=num_phases, **kwargs)
        shared["reference"] = filled.seconds / num_phases
        return filled

    def gating(*args: Any, **kwargs: Any) -> Iterator[Any]:
        loop, answer = train(*args, **kwargs), None
        before: dict[str, float] = {}
        while True:
            exact = turn()
            started = time.perf_counter()
            try:
                with waiting(synchronise if exact else None):
                    finished = loop.send(answer)
            except StopIteration:
                return
            synchronise()
            seconds = time.perf_counter() - started + sum(shared.values())
            parts = {k.removeprefix("time/"): v for k, v in finished.metrics.items() if k.startswith("time/")}
            parts = {k: v for k, v in parts.items() if k not in ("collect", "step")}  # sums of others
            tokens, before = consumed(finished.state, before), dict(finished.state.counters)
            report({"seconds": seconds, **parts, **shared, **tokens}, finished.metrics)
            answer = yield finished

    stage.train, stage.fill_reference = gating, filling
    try:
        yield
    finally:
        stage.train, stage.fill_reference = train, fill


def consumed(state: LoopState, before: dict[str, float]) -> dict[str, float]:
    """Tokens and rows of a step, from the ledger after it and before it."""
    names = {"trained_tokens": "trained_tokens", "generated_tokens": "sampled_tokens", "completions": "sampled_rows"}
    return {ours: state.counters[name] - before.get(name, 0.0) for name, ours in names.items()
            if name in state.counters}  # fmt: skip
