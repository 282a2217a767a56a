"""`alignlab evaluate`: runs and prompts -> completions under each decoding -> numbers, differences and suites.

Every run sees the same prompts with the same dice. What can be known to be missing is said before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from alignlab.conversation import Template
from alignlab.data import fingerprint
from alignlab.errors import UserError
from alignlab.evaluation import EVALUATION_PHASE, EVALUATION_SEED, Evaluation, check_gradable, evaluate_policy
from alignlab.evaluation.compare import Difference, compare, of_interval, over_tasks
from alignlab.evaluation.measures import (
    OF_THE_MODEL,
    Estimate,
    Found,
    Settings,
    check_measures,
    check_prompts,
    estimates,
    get_measure,
)
from alignlab.evaluation.perplexity import preferred, surprise, token_nats
from alignlab.generate import Sampling
from alignlab.models import Model, frozen_policy, hush_progress_bars, pick_device
from alignlab.pipeline.stage import default_cache
from alignlab.pipeline.subjects import (
    Questions,
    Split,
    Subject,
    distinct_labels,
    find_subject,
    fitting,
    known_task,
    load_questions,
    overlap,
)
from alignlab.pipeline.suites import check_suites, needs_questions, run_suites
from alignlab.rollout import Limits
from alignlab.statistics.clustered import ratio_interval
from alignlab.tasks import get_task
from alignlab.tracking import write_json
from alignlab.types import Prompt

USUAL = ("verbosity", "distinct")
"""Measured of every task, beside what it names itself."""
MAX_ROWS = 64
MAX_TOKENS = 128
"""The most that is sampled where neither the command nor a recipe says."""
MAX_PROMPT_TOKENS = 1024
"""Of a prompt, where neither says."""


# ---- how -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured, and how completions are sampled."""

    decodings: tuple[str, ...] = ("sampled",)
    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    measures: tuple[str, ...] | None = None
    """None = what the tasks name, and the usual."""
    settings: Settings = field(default_factory=Settings)
    suites: tuple[str, ...] = ()
    max_tokens: int | None = None
    """The most that is sampled; None = as the first run's recipe, else 128."""
    max_prompt_tokens: int | None = None
    """Longer prompts are left out; None = as the first run's recipe, else 1,024."""
    chat: bool = True
    """lm-eval: ask in the model's chat template."""

    def sampling(self, decoding: str, max_tokens: int) -> tuple[Sampling, int]:
        """How a decoding samples, and how often."""
        if decoding == "greedy":
            return Sampling(greedy=True, max_completion_tokens=max_tokens), 1
        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, max_completion_tokens=max_tokens)
        return sampling, self.samples


@dataclass(frozen=True, kw_only=True)
class Given:
    """How likely a model finds texts that it is given; what was not asked for is empty."""

    demonstrations: tuple[tuple[float, ...], ...] = ()
    """Nats of each, token by token."""
    texts: Sequence[str] = ()
    asked: Sequence[str] = ()
    """The prompt of each."""
    preferences: Found = field(default_factory=Found)
    """Of each pair, whether the chosen answer is the likelier one."""
    pair_prompts: Sequence[str] = ()

    def estimates(self) -> dict[str, Estimate]:
        surprised = surprise(self.demonstrations, self.texts, self.asked) if self.demonstrations else {}
        return {**surprised, **estimates(self.preferences, self.pair_prompts)}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model under one decoding, and what comparisons need."""

    subject: Subject
    decoding: str
    evaluation: Evaluation
    record: dict[str, Any]
    clusters: tuple[str, ...]
    given: Given = field(default_factory=Given)


def measures_of(tasks: Sequence[str], plan: Plan) -> tuple[str, ...]:
    """Names of measures, those of the model itself included, in order."""
    if plan.measures is not None:
        return tuple(dict.fromkeys(plan.measures))
    named = [name for task in tasks if task for name in getattr(get_task(task), "measures", ())]
    return tuple(dict.fromkeys([*named, *USUAL]))


def split_measures(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of completions, and those of the model itself."""
    return tuple(n for n in names if n not in OF_THE_MODEL), tuple(n for n in names if n in OF_THE_MODEL)


def evaluate(
    runs: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    data: Path | None = None,
    split: Split = "test",
    count: int = 100,
    plan: Plan = Plan(),
    device: str = "auto",
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[Evaluated]]:
    """For each decoding, the evaluation of every run, in their order.

    Raises:
        UserError: whatever cannot be used, before a model is loaded where that can be known.
    """
    hush_progress_bars()
    on, cache = pick_device(device), cache or default_cache()
    for task in tasks:
        known_task(task)
    suites = check_suites(plan.suites)
    if plan.measures is not None:
        check_measures(plan.measures, plan.settings)
    subjects = distinct_labels([find_subject(run, cache) for run in runs])
    limits = limits_for(subjects, plan)
    only_suites = bool(plan.suites) and not tasks and data is None and not needs_questions(suites)
    questions = Questions(source="", split=split, prompts=[], references={})
    names: tuple[str, ...] = ()
    if not only_suites:
        of_pairs = plan.measures is not None and "preference" in plan.measures
        questions = load_questions(subjects, tasks, data, split, count, pairs=of_pairs)
        names = measures_of(sorted({prompt.task for prompt in questions.prompts}), plan)
        if plan.measures is None:
            names = _measurable(names, questions, plan.settings, say)
        check_gradable(questions.prompts)
        questions = fitting(subjects, questions, limits)
        text, of_model = split_measures(names)
        check_prompts(text, questions.prompts, [questions.references.get(p.id, p.answer) for p in questions.prompts])
        if "perplexity" in of_model and not questions.references:
            raise UserError("measure perplexity: no demonstration (column `completion`) is short enough; leave it out")
        if "preference" in of_model and not questions.pairs:
            raise UserError("measure preference: no pair is short enough for every model; leave it out")
        if questions.left_out:
            say(
                f"left out {questions.left_out} prompts that are too long, for a model or for --max-prompt-tokens "
                f"({limits.max_prompt_tokens})"
            )
    evaluated: list[list[Evaluated]] = [[] for _ in plan.decodings]
    for subject in subjects:
        say(f"{subject.label}: {subject.run}")
        model = frozen_policy(subject.choice, on, seed=subject.seed)
        start = _start(subject, on, say)
        found = evaluate_subject(subject, model, start, questions, names, plan, limits, cache, say)
        if suites:
            drawn = plan.sampling("sampled", limits.max_completion_tokens)
            done = run_suites(
                suites, subject, model, start, questions, drawn, limits,
                device=on, cache=cache, count=count, chat=plan.chat, say=say,
            )  # fmt: skip
            found[0] = replace(found[0], record={**found[0].record, "suites": done})
        for per_decoding, one in zip(evaluated, found, strict=True):
            per_decoding.append(one)
        del model, start
    return evaluated


def _measurable(
    names: Sequence[str], questions: Questions, settings: Settings, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Of measures that nobody asked for by name, those that can be had here; what is left out is said."""
    kept = []
    for name in names:
        try:
            check_measures([name], settings)
            if name == "preference":
                raise UserError("measure preference: ask for it by name (--measure preference)")
            if name == "perplexity" and not questions.references:
                raise UserError("measure perplexity: the data have no demonstrations")
            if name not in OF_THE_MODEL:
                references = [questions.references.get(p.id, p.answer) for p in questions.prompts]
                check_prompts([name], questions.prompts, references)
        except UserError as error:
            say(f"not measured: {error}")
            continue
        kept.append(name)
    return tuple(kept)


def limits_for(subjects: Sequence[Subject], plan: Plan) -> Limits:
    """Lengths for all models: those of the first run's recipe, or what the command says."""
    stage = next((subject.stage for subject in subjects if subject.stage is not None), None)
    own = stage.data.max_completion_tokens if stage is not None else MAX_TOKENS
    own_prompt = stage.data.max_prompt_tokens if stage is not None else MAX_PROMPT_TOKENS
    return Limits(
        max_prompt_tokens=plan.max_prompt_tokens or own_prompt,
        max_completion_tokens=plan.max_tokens or own,
    )


def _start(subject: Subject, device: torch.device, say: Callable[[str], None]) -> Model | None:
    if subject.start is None:
        if subject.folder is not None:
            say(f"{subject.label}: {subject.no_start}; the KL to it and forgetting are left out")
        return None
    return frozen_policy(subject.start, device, seed=subject.seed)


def evaluate_subject(
    subject: Subject,
    model: Model,
    start: Model | None,
    questions: Questions,
    names: Sequence[str],
    plan: Plan,
    limits: Limits,
    cache: Path,
    say: Callable[[str], None],
) -> list[Evaluated]:
    """One model under every decoding; without questions, an empty record of each."""
    text, of_model = split_measures(names)
    about: dict[str, Any] = {
        "kind": "policy",
        "run": subject.run,
        "model": subject.choice.name,
        "measures": list(names),
    }
    empty = Evaluation(scores={}, tasks={}, metrics={}, samples=[], intervals={})
    if not questions.prompts:
        record = {**empty.to_json(), **about}
        return [
            Evaluated(subject=subject, decoding=name, evaluation=empty, record=record, clusters=())
            for name in plan.decodings
        ]
    shared = overlap(subject, questions.prompts, cache)
    if shared["exact"]:
        say(
            f"WARNING {subject.label}: {shared['exact']} of {len(questions.prompts)} prompts were trained on "
            f"({', '.join(shared['shown'])}, ..): its numbers are too good"
        )
    about["data"] = {
        "source": questions.source, "split": questions.split, "prompts": len(questions.prompts),
        "left_out": questions.left_out, "fingerprint": fingerprint(questions.prompts), "overlap": shared,
    }  # fmt: skip
    given = given_texts(model, subject.template, questions, of_model)
    results = []
    for decoding in plan.decodings:
        sampling, samples = plan.sampling(decoding, limits.max_completion_tokens)
        found = evaluate_policy(
            model, questions.prompts, subject.template, sampling, samples=samples,
            reference=start if sampling.on_policy else None, measures=text, references=questions.references,
            settings=plan.settings,
        ).with_estimates(given.estimates())  # fmt: skip
        how = {
            "name": decoding, "temperature": sampling.temperature, "top_k": sampling.top_k, "greedy": sampling.greedy,
            "samples": samples, "max_completion_tokens": sampling.max_completion_tokens, "best_of": 1,
            "seed": EVALUATION_SEED, "phase": EVALUATION_PHASE,
        }  # fmt: skip
        results.append(
            Evaluated(
                subject=subject,
                decoding=decoding,
                evaluation=found,
                record={**found.to_json(), **about, "decoding": how},
                clusters=tuple(str(sample["prompt_id"]) for sample in found.samples),
                given=given,
            )
        )
    return results


def given_texts(model: Model, template: Template, questions: Questions, names: Sequence[str]) -> Given:
    """What the model's own probabilities say of demonstrations and pairs."""

    def nats(rows: Sequence[tuple[Prompt, str]]) -> tuple[tuple[float, ...], ...]:
        encoded = [template.row(prompt, text) for prompt, text in rows]
        return tuple(map(tuple, token_nats(model, encoded, pad_id=template.pad_id, max_rows=MAX_ROWS)))

    given = Given()
    if "perplexity" in names:
        known = [(p, questions.references[p.id]) for p in questions.prompts if p.id in questions.references]
        given = replace(given, demonstrations=nats(known), asked=[p.id for p, _ in known], texts=[t for _, t in known])
    if "preference" in names:
        chosen = nats([(pair.prompt, pair.chosen) for pair in questions.pairs])
        rejected = nats([(pair.prompt, pair.rejected) for pair in questions.pairs])
        preferences = Found(values=preferred(chosen, rejected))
        given = replace(given, preferences=preferences, pair_prompts=[pair.prompt.id for pair in questions.pairs])
    return given


# ---- side by side ----------------------------------------------------------------------------------------------------


def differences(model: Evaluated, baseline: Evaluated) -> dict[str, Difference]:
    """The paired difference of every metric that both have."""
    found = compare(model.evaluation.found, baseline.evaluation.found, model.clusters)
    overall = over_tasks(model.evaluation.found, baseline.evaluation.found, model.clusters)
    if overall is not None:
        found = {"score": overall, **found}
    ours, theirs = model.given, baseline.given
    if ours.preferences.values:
        found |= compare(ours.preferences, theirs.preferences, ours.pair_prompts)
    if len(set(ours.asked)) > 1:
        drifts = [math.fsum(a) - math.fsum(b) for a, b in zip(ours.demonstrations, theirs.demonstrations, strict=True)]
        bits = [len(text.encode()) * math.log(2) for text in ours.texts]
        found["policy/bits_per_byte"] = of_interval(ratio_interval(drifts, bits, ours.asked), ours.asked)
    return found


def as_files(evaluated: Sequence[Sequence[Evaluated]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each run's evaluation.json, and the comparisons of every run with the first, decoding by decoding."""
    first, *others = evaluated
    files = [
        {**one.record, "others": [per_decoding[i].record for per_decoding in others]} for i, one in enumerate(first)
    ]
    comparisons = [
        {
            "decoding": model.decoding,
            "model": model.subject.label,
            "against": per_decoding[0].subject.label,
            "differences": {
                name: {**asdict(found), "is_clear": found.is_clear}
                for name, found in differences(model, per_decoding[0]).items()
            },
        }
        for per_decoding in evaluated
        for model in per_decoding[1:]
    ]
    return files, comparisons


def write(evaluated: Sequence[Sequence[Evaluated]], folder: Path) -> list[Path]:
    """evaluation.json and evaluation_samples.json of each run (in a folder of its own where there are several), and
    comparison.json."""
    files, comparisons = as_files(evaluated)
    written = []
    for i, (content, one) in enumerate(zip(files, evaluated[0], strict=True)):
        inside = folder / one.subject.label if len(files) > 1 else folder
        path = inside / "evaluation.json"
        write_json(path, content)
        samples = {per_decoding[i].decoding: per_decoding[i].evaluation.samples for per_decoding in evaluated}
        write_json(inside / "evaluation_samples.json", samples)
        written.append(path)
    if comparisons:
        write_json(folder / "comparison.json", {"schema": 2, "comparisons": comparisons})
        written.append(folder / "comparison.json")
    return written


def described(names: Sequence[str]) -> Mapping[str, str]:
    """What each measure of completions says, in a sentence."""
    return {name: get_measure(name).says for name in names if name not in OF_THE_MODEL}
