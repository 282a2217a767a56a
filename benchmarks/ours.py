"""Our side: a recipe for the case, run as users run it, that waits for its turn before every phase."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignlab.pipeline import run_recipe, stage
from alignlab.recipe import load_recipe
from alignlab.types import Completion, Prompt
from benchmarks.cases import Case, data, reward_of

Turn = Callable[[], None]
Report = Callable[[dict[str, float]], None]
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


def recipe(case: Case, model: Path, folder: Path, steps: int) -> Path:
    """The case as a recipe file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "data.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in data(case)), "utf-8")
    algorithm = {"name": case.method, EACH[case.method]: case.items, **ALGORITHMS[case.method]}
    content: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {
            "path": str(rows),
            "max_prompt_tokens": case.prompt_tokens + 8,
            "max_completion_tokens": case.completion_tokens,
        },
        "algorithm": algorithm,
        "train": {"num_phases": steps, "save_every": 10**6, "log_completions": 0},
        "evaluation": {"prompts_per_task": 0},
    }
    if case.adapter:
        content["model"]["adapter"] = {"rank": 8, "alpha": 16}
    if case.method in ("grpo", "ppo"):
        algorithm["group_size"] = case.group
        content["reward"] = {"benchmarks.ours:even_words": 1.0}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content), "utf-8")  # JSON is YAML
    return path


def run(case: Case, model: Path, folder: Path, steps: int, turn: Turn, report: Report, device: str = "auto") -> None:
    """Trains; calls `turn` before every phase and `report` with its seconds after it."""
    with gated(turn, report):
        overrides = [f"device={device}", *case.ours]
        run_recipe(load_recipe(recipe(case, model, folder, steps), overrides), folder / "run", quiet=True)


@contextmanager
def gated(turn: Turn, report: Report) -> Iterator[None]:
    """The stage's training loop, made to wait; what the reference cost before it is shared out among the steps."""
    train, fill = stage.train, stage.fill_reference
    before = {"reference": 0.0}

    def filling(*args: Any, num_phases: int, **kwargs: Any) -> Any:
        started = time.perf_counter()
        filled = fill(*args, num_phases=num_phases, **kwargs)
        before["reference"] = (time.perf_counter() - started) / num_phases
        return filled

    def waiting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        loop, answer = train(*args, **kwargs), None
        while True:
            turn()
            started = time.perf_counter()
            try:
                finished = loop.send(answer)
            except StopIteration:
                return
            seconds = time.perf_counter() - started
            split = {k.removeprefix("time/"): v for k, v in finished.metrics.items() if k.startswith("time/")}
            tokens = {k: finished.metrics[k] for k in ("completion/length",) if k in finished.metrics}
            report({"seconds": seconds + before["reference"], **before, **split, **tokens})
            answer = yield finished

    stage.train, stage.fill_reference = waiting, filling  # type: ignore[assignment]
    try:
        yield
    finally:
        stage.train, stage.fill_reference = train, fill
