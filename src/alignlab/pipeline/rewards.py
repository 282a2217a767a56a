"""The reward of a stage: recipe section, or the defaults of its tasks -> bound functions with weights and tasks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

from alignlab import registry
from alignlab.errors import UserError
from alignlab.recipe import RewardEntry, Stage
from alignlab.rollout import Reward, why_silent
from alignlab.tasks import get_task
from alignlab.types import Completion, Prompt

DOCTOR_FILE = "doctor.json"
"""What `alignlab doctor reward` leaves beside a reward model it examined."""
FIT, UNFIT = "fit for RL", "not fit for RL"
LONGEST_CALL = 600.0
"""Seconds that a function of one's own may take for a call, unless the recipe says otherwise."""


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


def uses_rewards(stage: Stage) -> bool:
    """Whether anything asks for a reward: the method, the choice among candidates, or the recipe, for the log."""
    asked = stage.algorithm.needs_reward and stage.method.data_kind == "prompts"
    return asked or stage.evaluation.best_of > 1 or bool(stage.reward)


def check_rewards(stage: Stage) -> None:
    """Says what is wrong with a stage's rewards before anything is loaded or trained.

    Raises:
        UserError: no such reward or task (with the nearest name), an option it does not take, or `learned` without a
            model.
    """
    if not uses_rewards(stage):
        return
    for name, entry in reward_entries(stage):
        _check_tasks(stage, name, entry)
        if name == "learned":
            if stage.reward_model is None:
                raise UserError(f"stage {stage.name}: reward `learned` needs `reward_model: RECIPE or RUN`")
            _force(entry)
        _without_model(name, entry)


def build_rewards(stage: Stage, learned: Callable[[], Mapping[str, Any]]) -> list[Reward]:
    """The components ready to be called; none where the stage uses none.

    Args:
        learned: loads what the reward `learned` needs: the reward model and its template.
    """
    rewards: list[Reward] = []
    if not uses_rewards(stage):
        return rewards
    for name, entry in reward_entries(stage):
        function = _bind(name, {**_options(name, entry), **(learned() if name == "learned" else {})})
        rewards.append(_reward(name, entry, function))
    return rewards


def _reward(name: str, entry: RewardEntry, function: Callable[..., Any]) -> Reward:
    needs = str(getattr(registry.resolve("rewards", name), "NEEDS", ""))
    timeout = entry.timeout or (None if is_own(name) else LONGEST_CALL)
    return Reward(name=name, function=function, weight=entry.weight, tasks=entry.tasks, needs=needs, timeout=timeout)


def is_own(name: str) -> bool:
    """Whether a reward is one of alignlab's."""
    return name in registry.names("rewards")


def check_judged(stage: Stage, prompts: Sequence[Prompt]) -> None:
    """Says that nothing will be judged before anything is sampled: rules of alignlab's own see that in a prompt alone.

    Raises:
        UserError: no component judges any of the prompts.
    """
    nothing = Completion(token_ids=(), logprobs=(), finish_reason="length", text="")
    rewards, judged = [], False
    for name, entry in reward_entries(stage):
        here = [prompt for prompt in prompts if not entry.tasks or prompt.task in entry.tasks]
        function = _without_model(name, entry)
        applies = getattr(registry.resolve("rewards", name), "applies", None) if is_own(name) else None
        if applies is not None:
            judged |= True in [applies(prompt, **entry.options) for prompt in here]  # all: it may refuse one
        elif here and not judged:
            judged = not is_own(name) or any(v is not None for v in function(here, [nothing] * len(here)))
        rewards.append(_reward(name, entry, function))
    if judged:
        return
    names = ", ".join(repr(reward.name) for reward in rewards)
    raise UserError(
        f"reward: no function ({names}) judges any of {len(prompts)} prompts; {why_silent(rewards, prompts)}"
    )


def require_fit(stage: Stage, folder: Path, key: str) -> str:
    """Heeds what the doctor said about the reward model that a stage's `learned` reward scores with.

    Args:
        folder: the reward model's run; `key`: that of its training. What was said about another training is no answer.

    Returns:
        A line to print where it was never examined; else nothing.

    Raises:
        UserError: it is not fit for RL and the recipe does not say `force: true`, or what was said cannot be read.
    """
    path = folder / DOCTOR_FILE
    examine = f"`alignlab doctor reward {folder}` says whether it is fit for RL"
    if not path.is_file():
        return f"{stage.name}: its reward model was never examined; {examine}"
    try:
        said = json.loads(path.read_text("utf-8"))
        of, verdict, reasons = said["key"], said["verdict"], "; ".join(map(str, said["reasons"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; delete it, then {examine}") from error
    if of != key:
        return f"{stage.name}: {path} is about another training of this reward model; {examine}"
    forced = all(_force(entry) for name, entry in reward_entries(stage) if name == "learned")
    if verdict == FIT or forced:
        return ""
    raise UserError(
        f"stage {stage.name}: reward model {folder} is {UNFIT} ({reasons}; see {path}): train a better one, "
        "or write `force: true` beside the weight of reward.learned"
    )


def _without_model(name: str, entry: RewardEntry) -> Callable[..., Any]:
    """The function with its options bound; `learned` cannot be called yet."""
    loaded_later = {"reward_model": None, "template": None, "same_ids": False} if name == "learned" else {}
    return _bind(name, {**_options(name, entry), **loaded_later})


def _options(name: str, entry: RewardEntry) -> dict[str, Any]:
    """What goes to the function itself: `force` is about whether `learned` may be used at all."""
    return {key: value for key, value in entry.options.items() if (name, key) != ("learned", "force")}


def _force(entry: RewardEntry) -> bool:
    force = entry.options.get("force", False)
    if not isinstance(force, bool):
        raise UserError(f"reward.learned.force is {force!r}; it is true or false")
    return force


def _check_tasks(stage: Stage, name: str, entry: RewardEntry) -> None:
    """A task that does not exist would switch the component off; one that exists is just not among the data's."""
    known = (*stage.data.task, *registry.names("tasks"))
    for task in entry.tasks if stage.data.task else ():  # else the rows say their tasks
        if task not in known and not {".", ":"} & set(task):
            hint = registry.did_you_mean(task, known) or "leave `tasks` out for all of them"
            raise UserError(
                f"reward.{name}.tasks: no task {task!r} in data.task ({', '.join(stage.data.task)}); {hint}"
            )


def _bind(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    found = registry.resolve("rewards", name)
    function = getattr(found, name, found)
    if not callable(function):
        what = "a module" if isinstance(found, ModuleType) else f"{found!r}"[:60]
        raise UserError(
            f"reward {name!r} is {what}, not a function of (prompts, completions); name package.module:function"
        )
    bound = partial(function, **options)
    try:
        _check_options(name, function, options)
        inspect.signature(bound).bind([], [])
        if found is not function and name != "learned":  # alignlab's own check their options when they are called
            bound([], [])
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"reward.{name}: {str(error).removeprefix(f'rewards.{name}: ')}") from error
    return bound


PLAIN: Mapping[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("text", (str,)),
    NoneType: ("null", (NoneType,)),
}
"""Type of an option -> what it is in words, and which values are one."""


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Every option is one that the function takes, and of the type it says, where that is a plain one."""
    parameters = list(inspect.signature(function).parameters.values())
    by_place = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = (p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
    takes = {p.name: p.default is p.empty for p in named if p.name not in by_place[:2]}
    try:
        types = get_type_hints(function)
    except Exception:  # whatever a user's annotations refer to
        types = {}
    for further in (p for p in parameters if p.kind is p.VAR_KEYWORD):
        if get_origin(types.get(further.name)) is not Unpack:
            return
        (described,) = get_args(types[further.name])
        types |= get_type_hints(described)
        takes |= dict.fromkeys(get_type_hints(described), False)
    for key, value in options.items():
        if key not in takes:
            raise UserError(f"reward.{name}.{key}: unknown option; {_unknown(key, value, takes)}")
        if wanted := _misfit(value, types.get(key, Any)):
            raise UserError(f"reward.{name}.{key}: {wanted} is needed, not {value!r}")
    for key, is_needed in takes.items():
        if is_needed and key not in options:
            raise UserError(f"reward.{name}.{key}: missing; the function needs it")


def _unknown(key: str, value: object, takes: Collection[str]) -> str:
    if key == "options" and isinstance(value, Mapping):
        beside = ", ".join(f"{k}: {v}" for k, v in value.items())
        return f"options stand beside weight: {{weight: 1, {beside}}}"
    common = ("weight", "tasks", "timeout")
    own = [k for k in takes if k not in common]
    return registry.did_you_mean(key, [*own, *common]) or f"it takes {', '.join(own) or 'none'}"


def _misfit(value: object, kind: Any) -> str:
    """What an option should be, in words, where its value is not; nothing for a type that is not a plain one."""
    words = []
    for one in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if get_origin(one) is Literal:
            fits, word = value in get_args(one), " or ".join(map(str, get_args(one)))
        elif one in PLAIN:
            word, types = PLAIN[one]
            fits = isinstance(value, types) and (one is bool or not isinstance(value, bool))
        else:
            return ""
        if fits:
            return ""
        words.append(word)
    return " or ".join(words)
