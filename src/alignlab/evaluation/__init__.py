"""Held-out evaluation: a policy and graded prompts -> completions -> per-prompt scores and metrics.

Scores come from the tasks' graders, not from the reward. Decoding is seeded by the prompt, the same for every model
that is compared, so that models differ and dice do not. With `best_of`, the training reward chooses among several
candidates what is graded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignlab.conversation import Template
from alignlab.data import collate, plan_microbatches
from alignlab.errors import UserError
from alignlab.forward import rewards, score
from alignlab.generate import Sampling
from alignlab.models import Model, ScalarModel, unwrap
from alignlab.rollout import Reward, Source, combine, sample_prompts
from alignlab.statistics.inference import prompt_interval, wilson_interval
from alignlab.tasks import get_task
from alignlab.types import Completion, Prompt, Row

EVALUATION_SEED = 20_250
"""Decoding seed of every evaluation; training never uses it as its phase stays below EVALUATION_PHASE."""
EVALUATION_PHASE = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found; `scores` is what every reported number is recomputed from."""

    scores: dict[str, float]
    """Prompt id -> mean score over its samples."""
    tasks: dict[str, str]
    """Prompt id -> its task."""
    metrics: dict[str, float]
    """Means over all completions (or pairs), by name."""
    samples: list[dict[str, Any]]
    """One row a completion: prompt id, text, score, finish reason, grade."""
    intervals: dict[str, tuple[float, float]]
    """Metric -> 95 % interval over prompts."""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "metrics": self.metrics,
            "intervals": {k: list(v) for k, v in self.intervals.items()},
            "scores": self.scores,
            "tasks": self.tasks,
        }


def evaluate_policy(
    policy: Model,
    prompts: Sequence[Prompt],
    template: Template,
    sampling: Sampling,
    *,
    samples: int = 1,
    reference: Model | None = None,
    best_of: int = 1,
    rewards: Sequence[Reward] = (),
    max_rows: int = 512,
) -> Evaluation:
    """Samples every prompt, grades the completions, and measures lengths, variety and the KL to a reference.

    Args:
        reference: the policy training started from; None leaves the KL out.
        best_of: candidates of each graded completion. The first of them is the one that would be graded without a
            choice, so with an indifferent reward nothing changes.
        rewards: what chooses among them.
    """
    prompt_ids = [template.encode_prompt(prompt) for prompt in prompts]
    candidates = sample_prompts(
        policy, prompts, prompt_ids, template, sampling, num_samples=samples * best_of,
        seed=EVALUATION_SEED, phase=EVALUATION_PHASE, max_rows=max_rows,
    )  # fmt: skip
    chosen, choice_metrics = choose(prompts, candidates, best_of, rewards)
    rows = []
    for prompt, completions in zip(prompts, chosen, strict=True):
        for completion in completions:
            rows.append((prompt, completion, _grade(prompt, completion)))
    scores: dict[str, list[float]] = {}
    details: dict[str, list[float]] = {}
    for prompt, _, grade in rows:
        if "score" in grade:
            scores.setdefault(prompt.id, []).append(grade["score"])
        for name, value in grade.items():
            details.setdefault(f"{prompt.task}/{name}", []).append(value)
    per_prompt = {k: float(np.mean(v)) for k, v in scores.items()}
    metrics = {name: float(np.mean(values)) for name, values in sorted(details.items())}
    completions = [c for _, c, _ in rows]
    if per_prompt:
        metrics["score"] = task_mean(per_prompt, {p.id: p.task for p in prompts})
    metrics |= completion_metrics(completions) | choice_metrics
    if reference is not None:  # of the policy: what is chosen by another rule than its own probability is no sample
        unchosen = [siblings[:samples] for siblings in candidates]
        metrics |= kl_metrics(reference, prompts, prompt_ids, unchosen, template, sampling)
    return Evaluation(
        scores=per_prompt,
        tasks={p.id: p.task for p in prompts},
        metrics=metrics,
        samples=[
            {
                "prompt_id": p.id,
                "task": p.task,
                "text": c.text,
                "score": g.get("score"),
                "finish_reason": c.finish_reason,
                "tokens": len(c.token_ids),
                "grade": g,
            }
            for p, c, g in rows
        ],
        intervals=_intervals(per_prompt, {p.id: p.task for p in prompts}),
    )


def choose(
    prompts: Sequence[Prompt], candidates: Sequence[Sequence[Completion]], best_of: int, rewards: Sequence[Reward]
) -> tuple[list[list[Completion]], dict[str, float]]:
    """The completion of the highest reward among the candidates of each sample, and what the choice cost and gained.

    Of S samples, the candidates of sample s are completions s, s + S, s + 2 S, ... of its prompt. Of equal rewards the
    first one wins; what no reward judged loses against whatever was judged.

    Returns:
        For each prompt its S chosen completions; metrics.
    """
    tokens = float(np.mean([len(c.token_ids) for siblings in candidates for c in siblings])) * best_of
    metrics = {"inference/tokens_per_answer": tokens}
    if best_of == 1:
        return [list(siblings) for siblings in candidates], metrics
    flat = [(prompt, c) for prompt, siblings in zip(prompts, candidates, strict=True) for c in siblings]
    judged = np.array([j.reward for j in combine(rewards, [p for p, _ in flat], [c for _, c in flat])])
    samples = len(candidates[0]) // best_of
    by_sample = judged.reshape(len(prompts), best_of, samples)
    best = np.where(np.isnan(by_sample), -np.inf, by_sample).argmax(1)  # (P, S); the first of the largest
    chosen = [
        [siblings[int(best[p, s]) * samples + s] for s in range(samples)] for p, siblings in enumerate(candidates)
    ]
    picked = np.take_along_axis(by_sample, best[:, None], 1)
    metrics |= {
        "inference/candidates": float(best_of),
        "inference/reward": float(np.nanmean(picked)),
        "inference/reward_gain": float(np.nanmean(picked) - np.nanmean(by_sample)),
        "inference/kl_bound": math.log(best_of) - (best_of - 1) / best_of,
    }
    return chosen, metrics


def check_gradable(prompts: Sequence[Prompt]) -> None:
    """Grades an empty completion of the first prompt of every task, so that a run need not end to find out.

    Raises:
        UserError: a task does not exist, or the prompt lacks what its grading reads.
    """
    first = {prompt.task: prompt for prompt in reversed(prompts)}
    for prompt in first.values():
        _grade(prompt, Completion(token_ids=(), logprobs=(), finish_reason="stop", text=""))


def _grade(prompt: Prompt, completion: Completion) -> dict[str, float]:
    """What the prompt's task says about a completion; nothing where no task grades it."""
    if not prompt.task:
        return {}
    try:
        return dict(get_task(prompt.task).grade(prompt, completion))
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"task {prompt.task!r} cannot grade prompt {prompt.id!r} ({what}); see data.task") from error


def task_mean(scores: dict[str, float], tasks: dict[str, str]) -> float:
    """Mean over tasks of each task's mean over prompts; every task counts the same, however many prompts it has."""
    by_task: dict[str, list[float]] = {}
    for prompt_id, value in scores.items():
        by_task.setdefault(tasks[prompt_id], []).append(value)
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def _intervals(scores: dict[str, float], tasks: dict[str, str]) -> dict[str, tuple[float, float]]:
    """95 % t intervals over prompts, overall and by task (of a single run: they say nothing about training seeds)."""
    by_task: dict[str, list[float]] = {}
    for prompt_id, value in scores.items():
        by_task.setdefault(f"{tasks[prompt_id]}/score", []).append(value)
    if len({len(v) for v in by_task.values()}) == 1:
        by_task["score"] = list(scores.values())
    found = {name: prompt_interval(values) for name, values in by_task.items() if len(values) > 1}
    return {name: (interval.low, interval.high) for name, interval in found.items()}


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Length in tokens (mean, median, sd), share that stopped by itself, and distinct-2 of the words."""
    lengths = np.array([len(c.token_ids) for c in completions], dtype=float)
    pairs = [pair for c in completions for pair in zip(c.text.split(), c.text.split()[1:], strict=False)]
    return {
        "completion/length": float(lengths.mean()),
        "completion/length_median": float(np.median(lengths)),
        "completion/length_sd": float(lengths.std()),
        "completion/stop_fraction": float(np.mean([c.finish_reason == "stop" for c in completions])),
        "completion/distinct_2": len(set(pairs)) / len(pairs) if pairs else math.nan,
    }


@torch.no_grad()
def kl_metrics(
    reference: Model,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[Completion]],
    template: Template,
    sampling: Sampling,
    max_rows: int = 64,
) -> dict[str, float]:
    """KL of the policy to the reference on its own samples (k1): nats a completion, with its standard error over
    prompts, and nats a token."""
    flat = [(ids, c) for ids, siblings in zip(prompt_ids, sampled, strict=True) for c in siblings]
    rows = [Row(prompt_ids=tuple(ids), completion_ids=c.token_ids) for ids, c in flat]
    device = _device(reference)
    drifts = np.array([math.fsum(completion.logprobs) for _, completion in flat])
    tokens = sum(len(completion.token_ids) for _, completion in flat)
    for index in plan_microbatches([len(row) for row in rows], max_rows):
        batch = collate([rows[i] for i in index], pad_id=template.pad_id).to(device)
        known = score(reference, batch, temperature=sampling.temperature).logprobs
        drifts[index] -= known.double().sum(-1).cpu().numpy()
    of_prompts = drifts.reshape(len(sampled), -1).mean(1)
    return {
        "policy/kl_per_sequence": float(drifts.mean()),
        "policy/kl_per_token": float(drifts.sum() / tokens),
        "policy/kl_standard_error": float(of_prompts.std(ddof=1) / len(sampled) ** 0.5)
        if len(sampled) > 1
        else math.nan,
    }


def _device(model: Model) -> torch.device:
    return next(unwrap(model).parameters()).device


@torch.no_grad()
def evaluate_reward_model(model: ScalarModel, source: Source, tasks: Sequence[str]) -> Evaluation:
    """Pairwise accuracy on held-out pairs (ties count one half) with its Wilson interval.

    Args:
        source: its `pairs` are the held-out ones.
        tasks: the task of each pair, in order.
    """
    won: list[float] = []
    for pair in source.pairs:
        (batch,) = source.plan_pairs([pair])
        chosen, rejected = rewards(model, batch).tolist()
        won.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    metrics, intervals = {}, {}
    for name in ["", *sorted(set(tasks) - {""})]:
        here = [w for w, task in zip(won, tasks, strict=True) if not name or task == name]
        key = f"{name}/accuracy" if name else "preference/accuracy"
        metrics[key] = float(np.mean(here))
        intervals[key] = wilson_interval(sum(here), len(here))
    ids = [f"pair/{i}" for i in range(len(won))]
    return Evaluation(
        scores=dict(zip(ids, won, strict=True)),
        tasks=dict(zip(ids, tasks, strict=True)),
        metrics=metrics,
        samples=[],
        intervals=intervals,
    )
