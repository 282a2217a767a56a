"""What a study found, in plain words: comparisons of results.json -> one headline and a line a finding.

A method is MIXED where tasks disagree: shown better on some and shown worse on others, whatever the mean over all says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignlab.study.reading import (
    PERCENT,
    SPACE,
    Arm,
    StudyResults,
    bracket,
    decimal,
    gain,
    join,
    number,
    numbers,
    points,
)

LONGER = 0.15  # a change of the completions' length from here on is named beside the verdict

Tone = Literal["good", "bad", "open", "even"]

WORDS: dict[str, tuple[str, Tone, str]] = {  # verdict -> label, tone, the word between the two arms
    "better": ("BETTER", "good", "than"),
    "worse": ("WORSE", "bad", "than"),
    "equivalent": ("EQUIVALENT", "even", "and"),
    "inconclusive": ("INCONCLUSIVE", "open", "against"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictLine:
    """One finding: a word, the sentence that carries its numbers, and what a reader must know beside it."""

    label: str
    """BETTER, WORSE, EQUIVALENT, INCONCLUSIVE, MIXED, FAILED (no finished run) or NOT COMPARED."""
    tone: Tone
    text: str
    detail: str

    def __str__(self) -> str:
        return f"{self.label:<12}  {self.text}" + (f" ({self.detail})" if self.detail else "")


def headline(results: Mapping[str, Any]) -> str:
    """The study in one sentence: who beats the SFT model, and the one thing that most qualifies it."""
    study = StudyResults(results)
    if not any(arm.finished for arm in study.methods):
        return "No method finished: there is nothing to compare"
    if not study.ranked:
        return f"No method could be compared with {study.reference.label}"
    better = [arm for arm in study.ranked if study.verdict(arm, study.reference) == "better"]
    overall = " overall" if any(study.is_mixed(arm) for arm in better) else ""
    first = f"{_labels(better)} {_verb(better, 'beats', 'beat')}" if better else "No method is shown to beat"
    trained = [arm for arm in study.ranked if arm.trained]
    scope = "One seed only: " if trained and all(len(arm.finished) == 1 for arm in trained) else ""
    clauses = (f"{first} {study.reference.label}{overall}", _qualification(study, better))
    return scope + "; ".join(filter(None, clauses))


def verdict_lines(results: Mapping[str, Any]) -> list[VerdictLine]:
    """One line a method, largest gain first and failures last; then the two leaders; then SFT against its start."""
    study = StudyResults(results)
    lines = [_arm_line(study, arm) for arm in study.ranked]
    lines += [_missing_line(study, arm) for arm in study.methods if arm not in study.ranked]
    pairs = [(study.ranked[0], study.ranked[1])] if len(study.ranked) > 1 else []
    pairs += [(study.reference, arm) for arm in study.arms if arm.is_baseline and arm != study.reference]
    return lines + [line for pair in pairs if (line := _pair_line(study, *pair))]


# ---- the headline ----------------------------------------------------------------------------------------------------


def _qualification(study: StudyResults, better: Sequence[Arm]) -> str:
    """The headline's second half: harm before failure, failure before what is still open, that before the order."""
    mixed = [arm for arm in study.ranked if study.is_mixed(arm)]
    plain = [arm for arm in study.ranked if arm not in mixed]
    worse, equivalent, still_open = (
        [arm for arm in plain if study.verdict(arm, study.reference) == verdict]
        for verdict in ("worse", "equivalent", "inconclusive")
    )
    failed = [arm for arm in study.methods if not arm.finished]
    if len(mixed) > 1:
        return f"{_labels(mixed)} help on some tasks and hurt on others"
    if mixed:
        helps = "" if mixed[0] in better else f"helps on {join(study.tasks_with(mixed[0], 'better'))} and "
        return f"{_labels(mixed)} {helps}hurts on {join(study.tasks_with(mixed[0], 'worse'))}"
    if worse:
        return f"{_labels(worse)} {_verb(worse, 'is', 'are')} worse than it"
    if failed:
        return f"{_labels(failed)} failed"
    if still_open:
        return f"for {_labels(still_open)} that is still open"
    if equivalent:
        return f"{_labels(equivalent)} {_verb(equivalent, 'is', 'are')} equivalent to it"
    return _order(study, *better[:2]) if len(better) > 1 else ""


def _order(study: StudyResults, first: Arm, second: Arm) -> str:
    match study.verdict(first, second):
        case "better":
            return f"{first.label} beats {second.label} too"
        case "equivalent":
            return f"{first.label} and {second.label} are equivalent"
        case "inconclusive" if len(study.ranked) == 2:
            return "which of the two is better is still open"
        case "inconclusive":
            return f"{first.label} against {second.label} is still open"
        case _:
            return ""


def _labels(arms: Sequence[Arm]) -> str:
    return join(arm.label for arm in arms)


def _verb(arms: Sequence[Arm], one: str, many: str) -> str:
    return one if len(arms) == 1 else many


# ---- the lines -------------------------------------------------------------------------------------------------------


def _arm_line(study: StudyResults, arm: Arm) -> VerdictLine:
    row = study.comparison(arm, study.reference)
    assert row is not None  # a ranked arm was compared
    against = study.reference.label
    label, tone, link = WORDS[row["verdict"]]
    finding, tasks = gain(row, unit=" points"), _tasks_in_words(study, arm, tuple(WORDS))
    if study.is_mixed(arm):
        label, tone, link = "MIXED", "bad", "against"
        rest = _tasks_in_words(study, arm, ("equivalent", "inconclusive"))  # the sentence names the others
        finding, tasks = _mixed_tasks(study, arm), f"overall {gain(row)}, {row['verdict']}{_after(rest)}"
    details = (tasks, _seeds_in_words(row, against), _margin(study, row), _length_in_words(study, arm), arm.failures)
    text = f"{arm.label} {link} {against}: {finding}"
    return VerdictLine(label=label, tone=tone, text=text, detail="; ".join(filter(None, details)))


def _missing_line(study: StudyResults, arm: Arm) -> VerdictLine:
    if arm.finished:
        text = f"{arm.label} with {study.reference.label}: the study has no comparison"
        return VerdictLine(label="NOT COMPARED", tone="open", text=text, detail=arm.failures)
    return VerdictLine(label="FAILED", tone="bad", text=f"{arm.label} has no finished run", detail=arm.failures)


def _pair_line(study: StudyResults, arm: Arm, against: Arm) -> VerdictLine | None:
    row = study.comparison(arm, against)
    if row is None:
        return None
    label, tone, link = WORDS[row["verdict"]]
    text = f"{arm.label} {link} {against.label}: {gain(row, unit=' points')}{_after(_effect(row))}"
    details = (
        _tasks_in_words(study, arm, tuple(WORDS), against),
        _seeds_in_words(row, against.label),
        _margin(study, row),
    )
    return VerdictLine(label=label, tone=tone, text=text, detail="; ".join(filter(None, details)))


def _mixed_tasks(study: StudyResults, arm: Arm) -> str:
    parts = []
    for verdict in ("better", "worse"):
        rows = [(task, study.comparison(arm, study.reference, task)) for task in study.tasks_with(arm, verdict)]
        parts.append(f"{verdict} on " + ", ".join(f"{task} {gain(row)}" for task, row in rows if row is not None))
    return "; ".join(parts)


def _tasks_in_words(study: StudyResults, arm: Arm, verdicts: Sequence[str], against: Arm | None = None) -> str:
    if len(study.tasks) < 2:
        return ""
    named = [(verdict, study.tasks_with(arm, verdict, against)) for verdict in verdicts]
    all_tasks = len(study.tasks)
    return ", ".join(
        f"{verdict} on {join(tasks) if len(tasks) < all_tasks else 'every task'}" for verdict, tasks in named if tasks
    )


def _seeds_in_words(row: Mapping[str, Any], against: str) -> str:
    seeds, note = numbers(row.get("per_seed", {}).values()), str(row.get("note") or "")
    if len(seeds) < 2:
        return note or "one run: the interval is over prompts only"
    above = sum(seed > 0 for seed in seeds)
    which = "every seed" if row.get("every_seed_above") else f"{above} of {len(seeds)} seeds" if above else "no seed"
    return f"{which} above {against}{_after(note)}"


def _margin(study: StudyResults, row: Mapping[str, Any]) -> str:
    margin = number(study.plan.get("equivalence_margin"))
    if row["verdict"] != "equivalent" or margin is None:
        return ""
    return f"within ±{points(margin)} points, the margin declared before the runs"


def _length_in_words(study: StudyResults, arm: Arm) -> str:
    length, before = arm.length, study.reference.length
    if length is None or not before or abs(length / before - 1) < LONGER:
        return ""
    change = 100 * (length / before - 1)
    how = "longer" if change > 0 else "shorter"
    return f"completions {abs(change):.0f}{PERCENT} {how} than {study.reference.label}"


def _effect(row: Mapping[str, Any]) -> str:
    effect = row.get("effect") or {}
    d, g = number(effect.get("d")), number(effect.get("g"))
    if d is None or g is None:
        return ""
    return f"d{SPACE}={SPACE}{decimal(d)}{bracket(effect, 1.0, 2)}, g{SPACE}={SPACE}{decimal(g)}"


def _after(text: str) -> str:
    return f"; {text}" if text else ""
