"""Held-out evaluation: a policy and graded prompts -> completions -> per-prompt scores and metrics.

Scores come from the tasks' graders, not from the reward; `measures` are asked for by name. Decoding is seeded by the
prompt, the same for every model that is compared, so that models differ and dice do not. With `best_of`, the training
reward chooses among several candidates what is graded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from alignlab.conversation import Template
from alignlab.data import collate, plan_microbatches
from alignlab.errors import UserError
from alignlab.evaluation.measures import (
    Answers,
    Estimate,
    Found,
    Settings,
    Values,
    Whole,
    estimate,
    estimates,
    find_all,
)
from alignlab.evaluation.measures.distinct import distinct_whole
from alignlab.forward import rewards, score
from alignlab.generate import Sampling
from alignlab.models import Model, ScalarModel, unwrap
from alignlab.rollout import Reward, Source, combine, sample_prompts
from alignlab.statistics.aggregates import FloatArray
from alignlab.statistics.clustered import clustered_interval, mean_interval, ratio_interval
from alignlab.statistics.inference import wilson_interval
from alignlab.tasks import get_task
from alignlab.types import Completion, Prompt, Row

SCHEMA = 2
"""Of evaluation.json."""
EVALUATION_SEED = 20_250
"""Decoding seed of every evaluation; training never uses it as its phase stays below EVALUATION_PHASE."""
EVALUATION_PHASE = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found; `scores` is what a study's numbers are recomputed from."""

    scores: dict[str, float]
    """Prompt id -> mean score over its samples."""
    tasks: dict[str, str]
    """Prompt id -> its task."""
    metrics: dict[str, float]
    """By name: means over all completions (or pairs), and what measures say of all together."""
    samples: list[dict[str, Any]]
    """One row a completion: prompt id, text, score, finish reason, grade, and what measures say of it."""
    intervals: dict[str, tuple[float, float]]
    """Metric -> 95 % interval over prompts, all the samples of one being a cluster."""
    counts: dict[str, int] = field(default_factory=dict)
    """Metric -> completions that it is of, where that is not all of them."""
    categories: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """Category of a prompt (`meta["category"]`) -> the estimates over its completions alone."""
    found: Found = field(default_factory=Found)
    """What was measured on each completion, for comparisons."""

    def to_json(self) -> dict[str, Any]:
        """What evaluation.json says of it; `evaluation.schema` checks that, docs/evaluation.md describes it."""
        return {
            "schema": SCHEMA,
            "metrics": self.metrics,
            "intervals": {k: list(v) for k, v in self.intervals.items()},
            "counts": self.counts,
            "categories": {
                name: {metric: {"value": e.value, "low": e.low, "high": e.high, "prompts": e.prompts}
                       for metric, e in found.items()}
                for name, found in self.categories.items()
            },
            "scores": self.scores,
            "tasks": self.tasks,
        }  # fmt: skip

    def with_estimates(self, more: Mapping[str, Estimate]) -> Evaluation:
        """The evaluation with numbers that were found otherwise."""
        return replace(
            self,
            metrics={**self.metrics, **{name: e.value for name, e in more.items()}},
            intervals={**self.intervals, **bounded(more)},
        )


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
    measures: Sequence[str] = (),
    references: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> Evaluation:
    """Samples every prompt, grades the completions, and measures lengths, variety and the KL to a reference.

    Args:
        reference: the policy training started from; None leaves the KL out.
        best_of: candidates of each graded completion. The first of them is the one that would be graded without a
            choice, so with an indifferent reward nothing changes.
        rewards: what chooses among them.
        measures: names of `evaluation.measures`, beyond what every evaluation has.
        references: prompt id -> the text that a good answer resembles; without one, the prompt's `answer`.
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
    answers = Answers(
        prompts=[p for p, _, _ in rows],
        completions=[c for _, c, _ in rows],
        references=[(references or {}).get(p.id, p.answer) for p, _, _ in rows],
        grades=[g for _, _, g in rows],
    )
    graded = _grades(answers)
    measured = find_all(measures, answers, settings or Settings())
    usual = _of_completions(answers)
    found = Found(values={**graded, **measured.values, **usual.values}, whole={**measured.whole, **usual.whole})
    known = estimates(found, answers.clusters)
    metrics = {name: e.value for name, e in known.items()}
    intervals = bounded(known)
    scores: dict[str, list[float]] = {}
    for prompt, _, grade in rows:
        if "score" in grade:
            scores.setdefault(prompt.id, []).append(grade["score"])
    per_prompt = {k: float(np.mean(v)) for k, v in scores.items()}
    tasks = {p.id: p.task for p in prompts}
    if per_prompt:
        metrics = {"score": task_mean(per_prompt, tasks), **metrics}
        intervals |= _over_tasks(graded, known, answers.clusters)
    metrics |= completion_metrics(answers.completions) | choice_metrics
    evaluation = Evaluation(
        scores=per_prompt,
        tasks=tasks,
        metrics=metrics,
        samples=[
            {
                "prompt_id": p.id,
                "task": p.task,
                "messages": [{"role": m.role, "content": m.content} for m in p.messages],
                "answer": p.answer,
                "meta": dict(p.meta),
                "text": c.text,
                "score": g.get("score"),
                "finish_reason": c.finish_reason,
                "tokens": len(c.token_ids),
                "grade": g,
                **({"measures": {k: v[i] for k, v in measured.values.items()}} if measured.values else {}),
            }
            for i, (p, c, g) in enumerate(rows)
        ],
        intervals=intervals,
        counts={k: e.completions for k, e in known.items() if e.completions < len(rows)},
        categories=_categories(found, answers),
        found=found,
    )
    if reference is None:  # of the policy: what is chosen by another rule than its own probability is no sample
        return evaluation
    unchosen = [siblings[:samples] for siblings in candidates]
    drifts = kl_drifts(reference, prompt_ids, unchosen, template, sampling)
    return replace(
        evaluation,
        metrics={**evaluation.metrics, **_kl_metrics(drifts, unchosen)},
        intervals={**evaluation.intervals, **_kl_intervals(drifts, prompts, unchosen)},
    )


def bounded(found: Mapping[str, Estimate]) -> dict[str, tuple[float, float]]:
    """The intervals of those estimates that have one."""
    return {name: (e.low, e.high) for name, e in found.items() if math.isfinite(e.low) and math.isfinite(e.high)}


def _grades(answers: Answers) -> dict[str, Values]:
    """`TASK/NAME` -> what the task said of each completion, None of those of other tasks."""
    named = sorted({f"{p.task}/{k}" for p, g in zip(answers.prompts, answers.grades, strict=True) for k in g})
    rows = [{f"{p.task}/{k}": v for k, v in g.items()} for p, g in zip(answers.prompts, answers.grades, strict=True)]
    return {name: [row.get(name) for row in rows] for name in named}


def _over_tasks(
    graded: Mapping[str, Values], known: Mapping[str, Estimate], clusters: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Interval of the mean over tasks of each task's mean score, the prompts of each task drawn by themselves."""
    scored = [name for name in graded if name.endswith("/score")]
    if len(scored) == 1:
        return bounded({"score": known[scored[0]]})
    parts = []
    for name in scored:
        here = [(v, c) for v, c in zip(graded[name], clusters, strict=True) if v is not None]
        if len({c for _, c in here}) < 2:
            return {}
        parts.append(clustered_interval([v for v, _ in here], [c for _, c in here]))
    overall = mean_interval(parts)
    return {"score": (overall.low, overall.high)}


def _categories(found: Found, answers: Answers) -> dict[str, dict[str, Estimate]]:
    """Estimates of each category alone, where prompts have several."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(answers.prompts):
        if (category := prompt.meta.get("category")) is not None:
            places.setdefault(f"{prompt.task}/{category}" if prompt.task else str(category), []).append(i)
    return {name: estimates(found, answers.clusters, index) for name, index in sorted(places.items())}


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


def _of_completions(answers: Answers) -> Found:
    """What `completion_metrics` says, as what intervals are made from."""
    lengths = np.array([len(c.token_ids) for c in answers.completions], dtype=float)
    return Found(
        values={
            "completion/length": lengths.tolist(),
            "completion/stop_fraction": [float(c.finish_reason == "stop") for c in answers.completions],
        },
        whole={
            "completion/length_median": Whole(statistic=lambda i: float(np.median(lengths[i])), interval="bootstrap"),
            "completion/length_sd": Whole(statistic=lambda i: float(lengths[i].std())),
            "completion/distinct_2": distinct_whole(answers.texts, 2),
        },
    )


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
    return _kl_metrics(kl_drifts(reference, prompt_ids, sampled, template, sampling, max_rows), sampled)


@torch.no_grad()
def kl_drifts(
    reference: Model,
    prompt_ids: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[Completion]],
    template: Template,
    sampling: Sampling,
    max_rows: int = 64,
) -> FloatArray:
    """(N,) log pi - log ref of each completion, in nats, siblings side by side."""
    flat = [(ids, c) for ids, siblings in zip(prompt_ids, sampled, strict=True) for c in siblings]
    rows = [Row(prompt_ids=tuple(ids), completion_ids=c.token_ids) for ids, c in flat]
    device = _device(reference)
    drifts = np.array([math.fsum(completion.logprobs) for _, completion in flat])
    for index in plan_microbatches([len(row) for row in rows], max_rows):
        batch = collate([rows[i] for i in index], pad_id=template.pad_id).to(device)
        known = score(reference, batch, temperature=sampling.temperature).logprobs
        drifts[index] -= known.double().sum(-1).cpu().numpy()
    return drifts


def _kl_metrics(drifts: FloatArray, sampled: Sequence[Sequence[Completion]]) -> dict[str, float]:
    tokens = sum(len(c.token_ids) for siblings in sampled for c in siblings)
    of_prompts = drifts.reshape(len(sampled), -1).mean(1)
    return {
        "policy/kl_per_sequence": float(drifts.mean()),
        "policy/kl_per_token": float(drifts.sum() / tokens),
        "policy/kl_standard_error": float(of_prompts.std(ddof=1) / len(sampled) ** 0.5)
        if len(sampled) > 1
        else math.nan,
    }


def _kl_intervals(
    drifts: FloatArray, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Completion]]
) -> dict[str, tuple[float, float]]:
    if len(prompts) < 2:
        return {}
    clusters = [prompt.id for prompt, siblings in zip(prompts, sampled, strict=True) for _ in siblings]
    tokens = [len(c.token_ids) for siblings in sampled for c in siblings]
    whole, each = clustered_interval(drifts, clusters), ratio_interval(drifts, tokens, clusters)
    return {
        "policy/kl_per_sequence": (whole.low, whole.high),
        "policy/kl_per_token": (each.low, each.high),
    }


def _device(model: Model) -> torch.device:
    return next(unwrap(model).parameters()).device


@torch.no_grad()
def evaluate_reward_model(model: ScalarModel, source: Source, tasks: Sequence[str]) -> Evaluation:
    """Pairwise accuracy on held-out pairs (ties count one half), its interval clustered where pairs share a prompt.

    Args:
        source: its `pairs` are the held-out ones.
        tasks: the task of each pair, in order.
    """
    won: list[float] = []
    asked = [pair.chosen.prompt_ids for pair in source.pairs]
    for pair in source.pairs:
        (batch,) = source.plan_pairs([pair])
        chosen, rejected = rewards(model, batch).tolist()
        won.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name in ["", *sorted(set(tasks) - {""})]:
        here = [(w, ids) for w, task, ids in zip(won, tasks, asked, strict=True) if not name or task == name]
        key = f"{name}/accuracy" if name else "preference/accuracy"
        metrics[key] = float(np.mean([w for w, _ in here]))
        intervals |= _accuracy_interval(key, [w for w, _ in here], [ids for _, ids in here])
    ids = [f"pair/{i}" for i in range(len(won))]
    return Evaluation(
        scores=dict(zip(ids, won, strict=True)),
        tasks=dict(zip(ids, tasks, strict=True)),
        metrics=metrics,
        samples=[],
        intervals=intervals,
    )


def _accuracy_interval(
    name: str, won: Sequence[float], prompts: Sequence[tuple[int, ...]]
) -> dict[str, tuple[float, float]]:
    """Wilson's where every pair has a prompt of its own (with ties it is, if anything, too wide)."""
    if len(set(prompts)) == len(prompts):
        return {name: wilson_interval(sum(won), len(won))}
    return bounded({name: estimate(won, prompts)})
