"""The report of a study: results.json -> a table for the terminal and one self-contained report.html.

The page needs no network and no JavaScript; it shows failed and missing runs as such, and every text that came from a
model, a file or a user is escaped (and would find no script allowed to run: the page's policy names its one script by
hash). Numbers are read from the results, never estimated again here; scores are in [0, 1], shown as points (x 100).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jinja2
from rich.table import Table
from rich.text import Text

from alignlab.statistics.inference import NO_SPREAD, permutation_floor
from alignlab.study.plots import MARK, Curve, Gain, curve_plot, gain_plot
from alignlab.study.reading import (
    KL,
    LENGTH,
    NONE,
    PERCENT,
    Arm,
    StudyResults,
    bracket,
    count,
    decimal,
    duration,
    gain,
    join,
    number,
    numbers,
    points,
    reason,
    run_name,
    short,
)
from alignlab.study.verdicts import WORDS, VerdictLine, headline, verdict_lines

__all__ = ["VerdictLine", "headline", "render_report", "terminal_table", "verdict_lines", "write_report"]

DISAGREE = 0.5  # methods disagree on a prompt where their mean scores are at least this far apart
SIZES = {"wide": 892, "narrow": 368}  # pixels of the gain plot; the page shows the one that fits

CURVES = {  # recorded quantity: (title, what it is multiplied by)
    "score": ("Held-out score, points", 100.0),
    "reward/mean": ("Training reward", 1.0),
    "policy/kl_per_sequence": ("KL to the starting policy, nats per completion", 1.0),
    "completion/length": ("Completion length, tokens", 1.0),
}
LEDGER = {
    "prompts": "prompts",
    "completions": "completions",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "optimizer_steps": "optimizer steps",
    "evaluation_generated_tokens": "evaluation tokens",
    "seconds": "seconds",
    "peak_memory_bytes": "peak GB",
}
COSTS = ("completions", "generated_tokens", "trained_tokens", "seconds", "peak_memory_bytes")


def terminal_table(results: Mapping[str, Any]) -> Table:
    """The table of arms within 80 characters: estimates, and under them how sure they are."""
    study = StudyResults(results)
    table = Table(title=Text(study.name), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    titles = {
        "arm": "arm",
        "score": "score\n± sd",
        "gain": f"gain over {study.reference.label}\n[{study.level}]",
        "verdict": "verdict",
        "length": "len.",
        "kl": "KL,\nnats",
        "completions": "comple-\ntions",
        "generated_tokens": "gen.\ntokens",
        "seconds": "s",
        "peak_memory_bytes": "peak\nGB",
    }
    for name, title in titles.items():
        if name == "arm":
            table.add_column(title, min_width=8, max_width=30)
        else:
            table.add_column(Text(title), justify="right", no_wrap=True)
    for row in _arm_rows(study):
        cells = {**row, **row["cost"], "gain": f"{row['gain']}\n{row['interval']}".strip()}
        cells["length"] = f"{row['length']}\n({row['sampled']})" if row["sampled"] else row["length"]
        cells |= {"arm": f"{row['label']}\n{row['runs']}".strip(), "score": f"{row['score']}\n{row['spread']}".strip()}
        table.add_row(*(Text(cells[name]) for name in titles))
    return table


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the report of `results` (the content of results.json) to `path` as one self-contained HTML file.

    Raises:
        ValueError: the results have another schema than this version writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(results), encoding="utf-8", newline="\n")


def render_report(results: Mapping[str, Any]) -> str:
    """The report's HTML as text; same errors as `write_report`."""
    study = StudyResults(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        study=study,
        headline=headline(results),
        subtitle=_subtitle(study),
        verdicts=verdict_lines(results),
        gains=_gain_plots(study),
        arms=_arm_rows(study),
        tasks=_task_rows(study),
        behaviours=_behaviour_rows(study),
        pairs=[_pair_row(study, *pair) for pair in itertools.combinations(study.ranked, 2) if study.comparison(*pair)],
        curves=_curves(study),
        samples=_samples(study),
        ledger=_ledger_rows(study),
        ledger_columns=LEDGER,
        costs=COSTS,
        marked=any(study.trained_on(arm, task) for arm in study.methods for task in study.tasks),
        facts=list(_facts(study)),
        recipes=[(study.label(name), _dump(recipe)) for name, recipe in study.plan.get("arm_recipes", {}).items()],
    )


# ---- plots -----------------------------------------------------------------------------------------------------------


def _gain_plots(study: StudyResults) -> dict[str, str]:
    """The gain plot for a desk and for a phone; the page shows the one that fits."""
    groups = [("all tasks", [_gain_mark(study, arm, None) for arm in study.methods])]
    if len(study.tasks) > 1:
        groups += [(task, [_gain_mark(study, arm, task) for arm in study.methods]) for task in study.tasks]
    title = f"Gain over {study.reference.label} with {study.level} intervals, by task and arm"
    axis = f"gain over {study.reference.label}, points"
    return {name: gain_plot(groups, width=width, title=title, axis=axis) for name, width in SIZES.items()}


def _gain_mark(study: StudyResults, arm: Arm, task: str | None) -> Gain:
    label = arm.label + (MARK if task is not None and study.trained_on(arm, task) else "")
    row = study.comparison(arm, study.reference, task)
    if row is None:
        return Gain(label=label, tone=arm.tone, note="not compared" if arm.finished else "no finished run")
    return Gain(
        label=label,
        tone=arm.tone,
        mean=100 * row["mean"],
        low=_scaled(row.get("low")),
        high=_scaled(row.get("high")),
        seeds=tuple(100 * seed for seed in numbers(row.get("per_seed", {}).values())),
    )


def _curves(study: StudyResults) -> dict[str, Any]:
    """One plot a recorded quantity, with a sentence for each that some arm or all arms lack."""
    drawn = {
        key: [curve for arm in study.methods if (curve := _curve(arm, key, scale))]
        for key, (_, scale) in CURVES.items()
    }
    ends = {curve.x[-1] for curves in drawn.values() for curve in curves}
    shared_axis = len(ends) < 2
    plots, missing = [], []
    for key, (title, _) in CURVES.items():
        curves = drawn[key] if shared_axis else [_as_share(curve) for curve in drawn[key]]
        if curves:
            plots.append(curve_plot(title, curves, axis="phases" if shared_axis else "share of the run, %"))
        drawn_labels = {curve.label for curve in curves}
        if absent := [arm.label for arm in study.methods if arm.finished and arm.label not in drawn_labels]:
            missing.append(f"{title.split(',')[0]}: not recorded by {join(absent) if curves else 'any run'}.")
    return {"plots": plots, "missing": missing, "lengths": "" if shared_axis else _run_lengths(study, drawn)}


def _curve(arm: Arm, key: str, scale: float) -> Curve | None:
    """Mean and standard error over the finished runs that recorded `key`, at the phases that all of them have."""
    runs = [
        {float(x): scale * float(y) for x, y in points if number(x) is not None and number(y) is not None}
        for run in arm.finished
        if (points := (run.get("curves") or {}).get(key))
    ]
    shared = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not shared:
        return None
    columns = [[run[x] for run in runs] for x in shared]
    return Curve(
        label=arm.label,
        tone=arm.tone,
        x=tuple(shared),
        mean=tuple(fmean(column) for column in columns),
        error=tuple(stdev(column) / math.sqrt(len(column)) if len(column) > 1 else 0.0 for column in columns),
    )


def _as_share(curve: Curve) -> Curve:
    end = curve.x[-1] or 1.0
    x = tuple(100 * value / end for value in curve.x)
    return Curve(label=curve.label, tone=curve.tone, x=x, mean=curve.mean, error=curve.error)


def _run_lengths(study: StudyResults, drawn: Mapping[str, Sequence[Curve]]) -> str:
    parts = []
    for arm in study.methods:
        ends = [curve.x[-1] for curves in drawn.values() for curve in curves if curve.label == arm.label]
        unit = next((run["phase_label"] for run in arm.finished if run.get("phase_label")), "phases")
        parts += [f"{arm.label} {count(max(ends))} {unit}"] if ends else []
    return "A whole run is: " + ", ".join(parts) + "."


# ---- tables ----------------------------------------------------------------------------------------------------------


def _arm_rows(study: StudyResults) -> list[dict[str, Any]]:
    return [_arm_row(study, arm) for arm in study.arms]


def _arm_row(study: StudyResults, arm: Arm) -> dict[str, Any]:
    score, spread = arm.mean(study.primary), arm.spread(study.primary)
    row = None if arm.is_baseline else study.comparison(arm, study.reference)
    mixed = not arm.is_baseline and study.is_mixed(arm)
    return {
        "label": arm.label,
        "tone": arm.tone,
        "score": ("failed" if arm.failed else NONE) if score is None else points(score),
        "spread": "" if spread is None else f"±{points(spread)}",
        "runs": arm.shortfall,
        **dict(zip(("gain", "interval"), (NONE, "") if row is None else gain(row).split(" ", 1), strict=True)),
        "verdict": "mixed" if mixed else row["verdict"] if row else NONE,
        "verdict_tone": "bad" if mixed else WORDS[row["verdict"]][1] if row else "",
        "length": NONE if arm.length is None else f"{arm.length:.1f}",
        "sampled": count(arm.sampled) if arm.sampled else "",
        "kl": NONE if arm.kl is None else decimal(arm.kl),
        "cost": {key: _cost(study, arm, key) for key in LEDGER},
    }


def _cost(study: StudyResults, arm: Arm, key: str) -> str:
    """The mean over the arm's finished runs (peak memory: their largest); the SFT model's is its shared stage's."""
    ledgers = [run.get("ledger") or {} for run in arm.finished]
    values = numbers(ledger.get(key) for ledger in ledgers)
    if not values and arm.is_baseline:
        values = numbers([_stage_ledger(study.shared.get(arm.name, {})).get(key)])
    if not values:
        return NONE
    return _ledger_cell(key, max(values) if key == "peak_memory_bytes" else fmean(values))


def _ledger_cell(key: str, value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 1e9:.2f}" if key == "peak_memory_bytes" else count(value)


def _task_rows(study: StudyResults) -> list[dict[str, Any]]:
    return [
        {"label": arm.label, "tone": arm.tone, "cells": [_task_cell(study, arm, task) for task in study.tasks]}
        for arm in study.arms
    ]


def _task_cell(study: StudyResults, arm: Arm, task: str) -> dict[str, str]:
    metric = f"{task}/{study.primary}"
    score, spread = arm.mean(metric), arm.spread(metric)
    row = None if arm.is_baseline else study.comparison(arm, study.reference, task)
    return {
        "score": ("failed" if arm.failed else NONE) if score is None else points(score),
        "spread": "" if spread is None else f"±{points(spread)}",
        "mark": "†" if score is not None and study.trained_on(arm, task) else "",
        "gain": "" if row is None else gain(row),
        "verdict": "" if row is None else row["verdict"],
        "verdict_tone": "" if row is None else WORDS[row["verdict"]][1],
    }


def _behaviour_rows(study: StudyResults) -> list[dict[str, Any]]:
    """Every other metric that evaluation recorded, a row each, over all arms."""
    shown = {study.primary, *LENGTH, *KL, *(f"{task}/{study.primary}" for task in study.tasks)}
    metrics = dict.fromkeys(
        metric for arm in study.arms for run in arm.finished for metric in run.get("metrics", {}) if metric not in shown
    )
    rows = [(metric, [arm.mean(metric) for arm in study.arms]) for metric in metrics]
    return [
        {
            "label": metric.replace("/", " · ").replace("_", " "),
            "cells": [NONE if value is None else _metric(metric, value) for value in values],
        }
        for metric, values in rows
        if any(value is not None for value in values)
    ]


def _metric(name: str, value: float) -> str:
    if name.endswith(("_rate", "_fraction")):
        return f"{100 * value:.1f}{PERCENT}"
    return decimal(value) if abs(value) < 100 else count(value)


def _pair_row(study: StudyResults, arm: Arm, against: Arm) -> dict[str, str]:
    row = study.comparison(arm, against) or {}
    effect = row.get("effect") or {}
    d, g = number(effect.get("d")), number(effect.get("g"))
    seeds = numbers(row.get("per_seed", {}).values())
    winner = {"better": f"{arm.label} better", "worse": f"{against.label} better"}
    why = effect.get("note") or ("no effect size was computed" if d is None else "")
    return {
        "label": f"{arm.label} − {against.label}",
        "gain": gain(row),
        "verdict": winner.get(row["verdict"], row["verdict"]),
        "verdict_tone": "open" if row["verdict"] == "inconclusive" else "",
        "seeds": f"{sum(seed > 0 for seed in seeds)} of {len(seeds)}" if seeds else NONE,
        "d": NONE if d is None else decimal(d) + bracket(effect, 1.0, 2),
        "g": NONE if g is None else decimal(g),
        "note": "; ".join(filter(None, (row.get("note"), why))),
    }


def _ledger_rows(study: StudyResults) -> list[dict[str, Any]]:
    """The shared stages, then every run, failed ones too, then their sum."""
    entries: list[tuple[str, str, str, Mapping[str, Any]]] = [
        (f"{study.label(name)}, shared", _shared_note(stage), "", _stage_ledger(stage))
        for name, stage in study.shared.items()
    ]
    for arm in study.methods:
        for run in (*arm.finished, *arm.failed):
            failed = run["status"] != "finished"
            note = f"failed: {reason(run)}" if failed else ""
            entries.append((f"{arm.label}, {run_name(run)}", note, "bad" if failed else "", run.get("ledger") or {}))
        if missing := arm.planned - len(arm.finished) - len(arm.failed):
            entries.append((arm.label, f"{missing} planned runs have no record", "bad", {}))
    spent = {key: numbers(ledger.get(key) for *_, ledger in entries) for key in LEDGER}
    total = {key: max(found) if key == "peak_memory_bytes" else sum(found) for key, found in spent.items() if found}
    return [
        {
            "label": label,
            "note": note,
            "tone": tone,
            "cells": [_ledger_cell(key, number(ledger.get(key))) for key in LEDGER],
        }
        for label, note, tone, ledger in [*entries, ("all together", "", "", total)]
    ]


def _stage_ledger(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """A shared stage's ledger, which stands in a field of its own or beside its hash."""
    ledger: Mapping[str, Any] = stage.get("ledger") or stage
    return ledger


def _shared_note(stage: Mapping[str, Any]) -> str:
    """The stage's hash, and how often the reward model prefers the better completion, with its interval."""
    parts = [f"hash {str(stage['hash'])[:12]}"] if stage.get("hash") else []
    intervals = stage.get("intervals") or {}
    for name, value in {**stage, **(stage.get("metrics") or {})}.items():
        if name in ("accuracy", "preference/accuracy") and (accuracy := number(value)) is not None:
            low, high = [*(intervals.get(name) or ()), None, None][:2]
            known = number(low) is not None and number(high) is not None
            limits = bracket({"low": low, "high": high}, 1.0, 2) if known else ""
            parts.append(f"accuracy {decimal(accuracy)}{limits}")
    return ", ".join(parts)


# ---- samples ---------------------------------------------------------------------------------------------------------


def _samples(study: StudyResults) -> list[dict[str, Any]]:
    samples = study.results.get("samples", [])
    binary = {task: all(score in (0.0, 1.0) for score in _task_scores(samples, task)) for task in study.tasks}
    shown = []
    for sample in samples:
        cards = [_card(arm, sample["completions"].get(arm.name, []), binary.get(sample["task"])) for arm in study.arms]
        means = [card["mean"] for card in cards if card["mean"] is not None and not card["is_baseline"]]
        shown.append(
            {
                "id": sample["prompt_id"],
                "task": sample["task"],
                "prompt": sample["prompt"],
                "answer": sample.get("answer"),
                "disagree": len(means) > 1 and max(means) - min(means) >= DISAGREE,
                "rows": [[c for c in cards if c["is_baseline"]], [c for c in cards if not c["is_baseline"]]],
            }
        )
    return shown


def _task_scores(samples: Iterable[Mapping[str, Any]], task: str) -> list[float]:
    completions = (c for sample in samples if sample["task"] == task for c in sample["completions"].values())
    return numbers(completion.get("score") for arm in completions for completion in arm)


def _card(arm: Arm, completions: Sequence[Mapping[str, Any]], binary: bool | None) -> dict[str, Any]:
    scores = numbers(completion.get("score") for completion in completions)
    return {
        "label": arm.label,
        "tone": arm.tone,
        "is_baseline": arm.is_baseline,
        "mean": fmean(scores) if scores else None,
        "score": _grade(scores, bool(binary)),
        "score_tone": ("good" if scores[0] == 1 else "bad" if scores[0] == 0 else "") if scores else "",
        "missing": "no completion was kept" if arm.finished else "no finished run",
        "texts": [
            {"text": str(c["text"]), "cut": c.get("finish_reason") == "length", "name": run_name(c)}
            for c in completions
        ],
    }


def _grade(scores: Sequence[float], binary: bool) -> str:
    """The first completion's score in words, and where there are more how all of them did."""
    if not scores:
        return ""
    first = ("right" if scores[0] else "wrong") if binary else f"score {points(scores[0])}"
    if len(scores) == 1:
        return first
    rest = (
        f"{sum(score == 1 for score in scores)} of {len(scores)} right" if binary else f"mean {points(fmean(scores))}"
    )
    return f"{first} · {rest}"


# ---- what it says and does not say -----------------------------------------------------------------------------------


def _subtitle(study: StudyResults) -> str:
    plan, environment = study.plan, study.results.get("environment", {})
    size = number(plan.get("num_parameters"))
    seconds, cores = number(environment.get("wall_seconds")), environment.get("cores")
    prompts = f"{join(study.tasks)}, {count(plan['prompts_per_task'] * len(study.tasks))} held-out prompts"
    machine = [f"{cores} CPU cores" if cores else "", duration(seconds) if seconds is not None else ""]
    parts = (
        f"{plan['model']} model" + (f" ({short(size)} parameters)" if size else ""),
        f"{prompts} × {plan['samples_per_prompt']} samples",
        f"{len(plan['seeds'])} {'seed' if len(plan['seeds']) == 1 else 'seeds'}",
        ", ".join(filter(None, machine)),
    )
    return " · ".join(filter(None, parts))


def _facts(study: StudyResults) -> Iterator[tuple[str, str]]:
    """Terms and sentences of the last section: what was estimated, under which conditions, and what went wrong."""
    plan, reference = study.plan, study.reference.label
    judged = " and this one reward model" if "reward_model" in study.shared else ""
    samples = f"each score is the mean of {plan['samples_per_prompt']} samples at temperature {plan['temperature']:g}"
    yield (
        "Estimand",
        f"The mean gain in {study.primary}, over prompts like these and over training seeds, of applying a method to "
        f"this one {reference} checkpoint{judged}. All arms share them by hash, so every statement here is conditional "
        "on them: others could move all rows at once.",
    )
    yield (
        "Intervals",
        f"{study.level} t intervals of the crossed seed × prompt model; {samples}, at most "
        f"{plan['max_completion_tokens']} tokens. {len(study.comparisons)} comparisons, not corrected for their "
        f"number. {reference} against the untrained model: over prompts only, because each is a single run."
        + (f" [no spread]: {NO_SPREAD}, so its verdict is open." if _has_no_spread(study) else ""),
    )
    yield "Equivalence", _equivalence(study)
    yield "Trained on the metric", _training_overlap(study)
    if behaviours := plan.get("behaviour_tasks"):
        parts = [f"{study.label(name)}'s training signal is about {join(tasks)}" for name, tasks in behaviours.items()]
        yield "What was taught", f"{'; '.join(parts)}. The other tasks show the side effects."
    yield (
        "Effect sizes",
        f"Cohen's d and Hedges' g exist between arms with at least two runs each; against the single {reference} run "
        "they do not exist, so the gain and its interval stand there instead. They compare seed means without pairing "
        "them, and so can be less sure than the paired interval beside them.",
    )
    yield "Permutation tests", _floors(len(plan["seeds"]))
    for term, key in (("Budget", "budget_note"), ("Tuning", "tuning_note")):
        if plan.get(key):
            yield term, str(plan[key])
    yield "Failed runs", "; ".join(f"{arm.label}: {text}" for arm in study.arms if (text := arm.failures)) or "None."
    for note in study.results.get("notes", []):
        yield "Note", str(note)
    yield "Environment", _environment(study)


def _has_no_spread(study: StudyResults) -> bool:
    rows = study.comparisons.values()
    return any(low is not None and low == number(row.get("high")) for row in rows for low in [number(row.get("low"))])


def _equivalence(study: StudyResults) -> str:
    margin = number(study.plan.get("equivalence_margin"))
    if margin is None:
        return "No margin was declared before the runs, so nothing here can be called equivalent."
    return f"Differences within ±{points(margin)} points were declared too small to matter before the runs."


def _training_overlap(study: StudyResults) -> str:
    graded: dict[tuple[str, ...], list[str]] = {}
    for task, names in study.plan.get("trained_on", {}).items():
        graded.setdefault(tuple(study.label(name) for name in names), []).append(task)
    parts = [
        f"The training reward of {join(labels)} contains the {'grader' if len(tasks) == 1 else 'graders'} of "
        f"{join(tasks)} (marked †)."
        for labels, tasks in graded.items()
        if labels
    ]
    free = [task for task in study.tasks if not any(labels and task in tasks for labels, tasks in graded.items())]
    rest = [f"On {join(free)} no arm was trained on the metric."] if free else []
    return " ".join(parts + rest)


def _floors(num_seeds: int) -> str:
    unpaired, paired = (permutation_floor(num_seeds, paired=paired) for paired in (False, True))
    return (
        f"With {num_seeds} seeds an arm an exact p cannot fall below {_probability(unpaired)} (unpaired) or "
        f"{_probability(paired)} (paired by seed), so none is reported."
    )


def _environment(study: StudyResults) -> str:
    environment = study.results.get("environment", {})
    versions = {"alignlab": study.results.get("alignlab_version", "?"), **environment.get("versions", {})}
    parts = (
        f"{environment['cores']} cores" if environment.get("cores") else "",
        f"{environment['workers']} runs at a time" if environment.get("workers") else "",
        str(environment.get("platform") or ""),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"seeds {', '.join(str(seed) for seed in study.plan['seeds'])}",
    )
    return " · ".join(filter(None, parts))


def _scaled(value: Any) -> float | None:
    return None if (known := number(value)) is None else 100 * known


def _probability(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _dump(recipe: Any) -> str:
    return json.dumps(recipe, indent=1, ensure_ascii=False, default=str)
