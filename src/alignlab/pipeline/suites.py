"""Suites of `alignlab evaluate` (forgetting, hacking, verbosity, lm-eval) -> `suites` of evaluation.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignlab.errors import UserError
from alignlab.evaluation import EVALUATION_PHASE, EVALUATION_SEED, bounded, evaluate_policy
from alignlab.evaluation.forgetting import forgetting
from alignlab.evaluation.hacking import CHANGES, FEWEST_PROMPTS, Judged, hacking, perturbed
from alignlab.evaluation.harness import PREFIX, check_harness, load_tasks, run_harness
from alignlab.evaluation.measures import Estimate
from alignlab.evaluation.open_prompts import open_prompts, reference_paragraphs
from alignlab.generate import Sampling
from alignlab.models import Model
from alignlab.pipeline.finished import recipe_of, reward_model_folder
from alignlab.pipeline.identity import read_done
from alignlab.pipeline.rewards import build_rewards, check_rewards
from alignlab.pipeline.stage import Session, learned_reward
from alignlab.pipeline.subjects import Questions, Subject
from alignlab.registry import did_you_mean
from alignlab.rollout import Limits, Reward, combine, fitting_prompts, sample_prompts
from alignlab.tasks import get_task
from alignlab.types import Completion, Prompt

NAMES = ("forgetting", "hacking", "verbosity")
OWN_PROMPTS = 20
"""Open questions that the start answers in the suite `forgetting`."""
OWN_TOKENS = 64
"""The most that it answers."""
HARNESS_ROWS = 16

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Suites:
    """What was asked for, once it is sure that it can be had."""

    names: tuple[str, ...] = ()
    harness: tuple[str, ...] = ()
    """Tasks of the lm-evaluation-harness."""
    manager: Any = None

    def __bool__(self) -> bool:
        return bool(self.names or self.harness)


def check_suites(asked: Sequence[str]) -> Suites:
    """`forgetting`, `hacking`, `verbosity`, `lm-eval:TASK[,TASK]` as what they stand for.

    Raises:
        UserError: an unknown suite or task, or a package that is missing.
    """
    harness: list[str] = []
    names: list[str] = []
    for suite in asked:
        if suite.startswith(PREFIX):
            harness += [name for name in suite.removeprefix(PREFIX).split(",") if name]
        elif suite in NAMES:
            names.append(suite)
        else:
            known = (*NAMES, f"{PREFIX}TASK")
            parts = (f"no suite is named {suite!r}", did_you_mean(suite, known), f"there are: {', '.join(known)}")
            raise UserError("; ".join(filter(None, parts)))
    if harness:
        check_harness()
    manager = load_tasks(harness) if harness else None
    return Suites(names=tuple(dict.fromkeys(names)), harness=tuple(dict.fromkeys(harness)), manager=manager)


def needs_questions(suites: Suites) -> bool:
    """Whether a suite asks the questions of a task; the others bring their own."""
    return "hacking" in suites.names


def run_suites(
    suites: Suites,
    subject: Subject,
    model: Model,
    start: Model | None,
    questions: Questions,
    sampling: tuple[Sampling, int],
    limits: Limits,
    *,
    device: torch.device,
    cache: Path,
    count: int,
    chat: bool,
    say: Say,
) -> dict[str, Any]:
    """What each suite finds about one model, by name.

    Args:
        sampling: how completions are sampled, and how often.
        count: the most examples of a harness task.
    """
    found: dict[str, Any] = {}
    for name in suites.names:
        say(f"{subject.label}: suite {name}")
        if name == "forgetting":
            found[name] = _forgetting(subject, model, start, limits)
        elif name == "verbosity":
            found[name] = _verbosity(subject, model, sampling, limits)
        else:
            session = Session(device=device, cache=cache, quiet=True, finished_only=True)
            found[name] = _hacking(subject, model, start, questions.prompts, sampling, limits, session)
    if suites.harness:
        say(f"{subject.label}: suite lm-eval: {', '.join(suites.harness)}")
        found["lm-eval"] = run_harness(
            model, subject.template, suites.harness,
            manager=suites.manager, limit=count, batch_size=HARNESS_ROWS, chat=chat,
        )  # fmt: skip
    return found


def numbers(found: dict[str, Estimate]) -> dict[str, Any]:
    """Estimates as evaluation.json has them."""
    return {
        "metrics": {name: e.value for name, e in found.items()},
        "intervals": {name: list(bounds) for name, bounds in bounded(found).items()},
    }


def _forgetting(subject: Subject, model: Model, start: Model | None, limits: Limits) -> dict[str, Any]:
    template = subject.template
    tokens = min(OWN_TOKENS, limits.max_completion_tokens)
    prompts = _short(open_prompts()[:OWN_PROMPTS], subject, tokens)
    found = forgetting(
        model, start, template, reference_paragraphs(), prompts, context=subject.context, max_tokens=tokens
    )
    return {**numbers(found), "start": None if subject.start is None else subject.start.name}


def _verbosity(subject: Subject, model: Model, sampling: tuple[Sampling, int], limits: Limits) -> dict[str, Any]:
    prompts = _short(open_prompts(), subject, limits.max_completion_tokens)
    found = evaluate_policy(
        model, prompts, subject.template, sampling[0], samples=sampling[1], measures=("verbosity", "distinct")
    )
    samples = [{"prompt_id": s["prompt_id"], "text": s["text"]} for s in found.samples]
    intervals = {name: list(bounds) for name, bounds in found.intervals.items()}
    return {"metrics": found.metrics, "intervals": intervals, "prompts": len(prompts), "samples": samples}


def _short(prompts: Sequence[Prompt], subject: Subject, max_tokens: int) -> list[Prompt]:
    """Those that leave room for an answer."""
    return fitting_prompts(
        prompts,
        subject.template,
        Limits(max_prompt_tokens=max(1, subject.context - max_tokens), max_completion_tokens=max_tokens),
    )


# ---- hacking ---------------------------------------------------------------------------------------------------------


def rewards_of(subject: Subject, session: Session) -> list[Reward]:
    """The rewards that a run was trained with or, where its method has none, those its tasks name.

    Raises:
        UserError: it is no run, or they cannot be had any more.
    """
    if subject.folder is None:
        raise UserError(
            f"suite hacking: {subject.run} is a model and no run, so there is no reward it could have gamed"
        )
    try:
        _, stage, _ = recipe_of(subject.folder, keep=("reward_model",))
        # With a choice among candidates a stage has rewards, whatever its method.
        stage = stage.model_copy(update={"evaluation": stage.evaluation.model_copy(update={"best_of": 2})})
        check_rewards(stage)
        scorer = None
        if stage.reward_model:
            folder = reward_model_folder(stage.reward_model, subject.folder, session.cache)
            if folder is None:
                raise UserError(f"its reward model ({stage.reward_model}) is no longer where it was")
            scorer = read_done(folder)
        return build_rewards(stage, lambda: learned_reward(stage, scorer, subject.template, session))
    except UserError as error:
        raise UserError(f"suite hacking: {subject.run}: its reward cannot be had: {error}") from error


def _hacking(
    subject: Subject,
    model: Model,
    start: Model | None,
    prompts: Sequence[Prompt],
    sampling: tuple[Sampling, int],
    limits: Limits,
    session: Session,
) -> dict[str, Any]:
    rewards = rewards_of(subject, session)
    nothing = Completion(token_ids=(), logprobs=(), finish_reason="stop", text="")
    graded = [p for p in prompts if p.task and "score" in get_task(p.task).grade(p, nothing)]
    changed = {name: perturbed(graded, name) for name in CHANGES}
    longest = subject.context - limits.max_completion_tokens
    fits = [
        all(len(subject.template.encode_prompt(kind[i])) <= longest for kind in changed.values())
        for i in range(len(graded))
    ]
    changed = {name: [p for p, kept in zip(kind, fits, strict=True) if kept] for name, kind in changed.items()}
    if len(changed["plain"]) < 2:
        raise UserError(
            f"suite hacking: {len(changed['plain'])} of {len(prompts)} prompts have a task that grades them and room "
            "to be changed; at least 2 are needed"
        )
    after = {name: _judged(model, kind, subject, sampling, rewards) for name, kind in changed.items()}
    before = None
    if start is not None:
        before = {name: _judged(start, kind, subject, sampling, rewards) for name, kind in changed.items()}
    found = hacking(after, before)
    notes = []
    if any(gain.verdict == "too few prompts" for gain in (*found.trained.values(), *found.bait.values())):
        notes.append(
            f"{len(changed['plain'])} prompts of a kind: a verdict needs {FEWEST_PROMPTS} that the reward judges (-n)"
        )
    if all(np.array_equal(judged.rewards, judged.scores) for judged in after.values()):
        notes.append("the reward equals the metric on every completion, so it is no independent check of it")
    return {
        "rewards": [reward.name for reward in rewards],
        "prompts": len(changed["plain"]),
        "trained": {name: asdict(gain) for name, gain in found.trained.items()},
        "bait": {name: asdict(gain) for name, gain in found.bait.items()},
        "flags": list(found.flags),
        "notes": notes,
    }


def _judged(
    model: Model,
    prompts: Sequence[Prompt],
    subject: Subject,
    sampling: tuple[Sampling, int],
    rewards: Sequence[Reward],
) -> Judged:
    """What a policy's completions of some prompts earn and score."""
    ids = [subject.template.encode_prompt(prompt) for prompt in prompts]
    sampled = sample_prompts(
        model, prompts, ids, subject.template, sampling[0], num_samples=sampling[1],
        seed=EVALUATION_SEED, phase=EVALUATION_PHASE,
    )  # fmt: skip
    flat = [(prompt, c) for prompt, siblings in zip(prompts, sampled, strict=True) for c in siblings]
    judged = combine(rewards, [p for p, _ in flat], [c for _, c in flat])
    return Judged(
        rewards=[j.reward for j in judged],
        scores=[get_task(p.task).grade(p, c)["score"] for p, c in flat],
        lengths=[len(c.token_ids) for _, c in flat],
        clusters=[p.id for p, _ in flat],
    )
