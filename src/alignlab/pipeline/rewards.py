"""The reward of a stage: recipe section, or the defaults of its tasks -> bound functions with weights and tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from alignlab import registry
from alignlab.errors import UserError
from alignlab.recipe import RewardEntry, Stage
from alignlab.rollout import Reward
from alignlab.tasks import get_task


def reward_entries(stage: Stage) -> list[tuple[str, RewardEntry]]:
    """Name and entry of every component: the recipe's or, where it names none, the tasks' defaults, each on its task.

    Raises:
        UserError: there is none.
    """
    entries = list(stage.reward.items())
    if not entries:
        by_name: dict[str, dict[str, float]] = {}
        for task in stage.data.task:
            for name, weight in get_task(task).default_reward.items():
                by_name.setdefault(name, {})[task] = weight
        entries = [
            (name, RewardEntry(weight=weight, tasks=tuple(t for t, w in tasks.items() if w == weight)))
            for name, tasks in by_name.items()
            for weight in sorted(set(tasks.values()))
        ]
    if not entries:
        raise UserError(f"stage {stage.name}: no reward; name one under `reward`, or a task with a default reward")
    return entries


def check_rewards(stage: Stage) -> None:
    """Says what is wrong with a stage's rewards before anything is loaded or trained.

    Raises:
        UserError: no such reward (with the nearest name), an option it does not take, or `learned` without a model.
    """
    for name, entry in reward_entries(stage):
        given: dict[str, Any] = {}
        if name == "learned":
            if stage.reward_model is None:
                raise UserError(f"stage {stage.name}: reward `learned` needs `reward_model: RECIPE or RUN`")
            given = {"reward_model": None, "template": None}
        _bind(name, {**entry.options, **given})


def build_rewards(stage: Stage, learned: Callable[[], Mapping[str, Any]]) -> list[Reward]:
    """The components ready to be called.

    Args:
        learned: loads what the reward `learned` needs: the reward model and its template.
    """
    rewards = []
    for name, entry in reward_entries(stage):
        function = _bind(name, {**entry.options, **(learned() if name == "learned" else {})})
        rewards.append(Reward(name=name, function=function, weight=entry.weight, tasks=entry.tasks))
    return rewards


def _bind(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    found = registry.resolve("rewards", name)
    function = getattr(found, name, found)
    if not callable(function):
        raise UserError(f"reward {name!r}: its module has no function called {name}")
    bound = partial(function, **options)
    try:
        inspect.signature(bound).bind([], [])
        if found is not function and name != "learned":  # alignlab's own check their options when they are called
            bound([], [])
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r}: {error}") from error
    return bound
