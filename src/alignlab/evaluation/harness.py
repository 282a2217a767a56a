"""Tasks of the lm-evaluation-harness on a model of ours, through its own API: model, task names -> its numbers.

The harness asks (its prompts, its few shots, its filters), and the model that alignlab loaded answers, adapter and all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from alignlab.conversation import Template
from alignlab.errors import UserError
from alignlab.models import Model, unwrap
from alignlab.registry import did_you_mean

PREFIX = "lm-eval:"


def check_harness() -> None:
    """Says that the harness is missing before a model is loaded.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("suite lm-eval: lm-eval is not installed; run pip install 'alignlab[lm-eval]'")


def load_tasks(names: Sequence[str]) -> Any:
    """The harness's task manager, once it is sure that it knows these tasks.

    Args:
        names: of the harness's own tasks, or paths of YAML files that describe one.

    Raises:
        UserError: an unknown task.
    """
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not os.path.isfile(name):
                raise UserError(f"suite lm-eval: {name}: no such file")
        elif name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks) or "lm-eval ls tasks lists them"
            raise UserError(f"suite lm-eval: the harness has no task {name!r}; {hint}")
    return manager


def run_harness(
    model: Model,
    template: Template,
    names: Sequence[str],
    *,
    manager: Any,
    limit: int | None,
    batch_size: int,
    chat: bool = True,
) -> dict[str, Any]:
    """What the harness says, by task: its metrics with their standard errors, versions and few shots.

    Args:
        limit: examples a task; None = all of them.
        chat: asks in the model's chat template, where it has one.

    Raises:
        UserError: the task's data cannot be had, or the harness fails on it.
    """
    chat = chat and bool(template.tokenizer.chat_template)
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=unwrap(model), tokenizer=template.tokenizer, batch_size=batch_size, backend="causal")
        try:
            found = simple_evaluate(
                lm, tasks=list(names), task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False,
                bootstrap_iters=200,
            )  # fmt: skip
        except Exception as error:  # of the harness, of the hub, of a task's own code
            raise UserError(_reason(error, names)) from error
    return {
        "results": {name: _plain(values) for name, values in found["results"].items()},
        "versions": dict(found.get("versions", {})),
        "num_fewshot": dict(found.get("n-shot", {})),
        "examples": {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()},
        "chat_template": chat,
        "limit": limit,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """`exact_match,strict-match` -> its number; where there is no standard error (N/A), null."""
    return {
        name: (float(value) if isinstance(value, int | float) and value == value else None)
        for name, value in values.items()
        if "," in name  # metric and filter; the others are names and counts
    }


def _reason(error: Exception, names: Sequence[str]) -> str:
    """What went wrong, in one line: mostly that data have to come from the hub and the hub is not there."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    offline = ("ConnectionError", "OfflineMode", "LocalEntryNotFound", "couldn't find", "Couldn't reach", "resolve")
    tasks = ", ".join(names)
    if any(word.lower() in said.lower() for word in offline):
        return (
            f"suite lm-eval: the data of {tasks} are neither on this machine nor is the hub reachable "
            f"({said[:120]}); run it once with a network, or name a task of your own: lm-eval:path/to/task.yaml"
        )
    return f"suite lm-eval: {tasks}: {said[:240]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log and progress bars, which are for its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
