"""The arithmetic of a stage: sizes in the recipe -> rows, microbatches and steps a phase -> totals of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from alignlab.data import Kind
from alignlab.explain.facts import Facts
from alignlab.explain.section import Line, Section, Value, count, lines, listed, number, said
from alignlab.optim import Schedule
from alignlab.pipeline.items import READABLE, load_items, local_file

PER_STEP = ("examples_per_step", "pairs_per_step", "completions_per_step", "prompts_per_phase")
"""Fields that say how many items of the data a phase uses."""
ITEMS = {"examples": "demonstrations", "pairs": "pairs", "labelled": "labelled completions", "prompts": "prompts"}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a phase does. `units` are rows, or pairs of rows that share a microbatch."""

    unit: str
    items: int
    """Items of the data a phase uses."""
    completions: int
    """Completions sampled a phase, without redraws."""
    redrawn: int
    """The most that redraws can add."""
    steps: tuple[int, ...]
    """Units of each optimiser step of one pass over the phase's rows."""
    passes: int
    units_per_microbatch: int
    at_most: bool
    """Whether a phase may turn out smaller: what says nothing is left out."""

    @property
    def steps_per_phase(self) -> int:
        return self.passes * len(self.steps)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(units * (2 if self.unit == "pairs" else 1) for units in self.steps)

    @property
    def microbatches(self) -> tuple[int, ...]:
        """Of each step of a pass."""
        return tuple(math.ceil(units / self.units_per_microbatch) for units in self.steps)


def batch_of(facts: Facts) -> Batch | None:
    """The sizes of a phase; None where a method has none of the fields that say them (a user's own)."""
    items = next((int(facts.get(name)) for name in PER_STEP if facts.get(name) is not None), None)
    if items is None:
        return None
    rows = facts.stage.train.microbatch_rows
    paired = facts.kind == "pairs" or facts.get("loss_kind") is not None
    group = int(facts.get("group_size", 1)) if facts.samples else 1
    completions = items * group if facts.samples else 0
    kept = facts.get("keep", group) if facts.get("drop_constant") is not None else group
    trained = items if paired or not facts.samples else items * min(group, kept or group)
    splits = min(int(facts.get("minibatches", 1)), trained)
    selective = facts.samples and (paired or facts.get("drop_constant") is not None or facts.get("mask_truncated"))
    return Batch(
        unit="pairs" if paired else "rows",
        items=items,
        completions=completions,
        redrawn=completions * int(facts.get("max_redraws", 0)),
        steps=tuple(trained // splits + (i < trained % splits) for i in range(splits)),
        passes=int(facts.get("epochs", 1)) if facts.samples else 1,
        units_per_microbatch=max(1, rows // 2) if paired else rows,
        at_most=bool(selective or facts.get("stop_epochs_above_kl") is not None),
    )


def data_size(facts: Facts) -> tuple[int | None, str]:
    """Items of the training data before any is left out as too long, or None; and where the number is from.

    Raises:
        UserError: the data are here, and unusable.
    """
    data, what = facts.stage.data, ITEMS.get(facts.kind, facts.kind)
    local = local_file(data.path)
    if data.hub and not data.path:
        return None, f"hub set {data.hub}: the number of {what} is not known before it is downloaded"
    if data.path and local is None:
        return None, f"{data.path}: the number of {what} is not known before it is downloaded"
    if local is not None and local.is_file() and local.stat().st_size > READABLE:
        return None, f"{local.name} is too large to count its {what} here"
    where = local.name if local is not None else f"the starter's {', '.join(data.task)}"
    size = len(load_items(facts.stage, cast(Kind, facts.kind), "train"))
    return size, f"{where}: {number(size)} {what}, before those that are too long are left out"


def phases_of(facts: Facts, batch: Batch | None, items: int | None) -> int | None:
    """Phases of the run; None where they follow from data that are not here."""
    epochs = facts.stage.train.epochs
    if epochs is None:
        return facts.stage.train.num_phases
    return None if batch is None or not items else math.ceil(epochs * items / batch.items)


def batch_section(facts: Facts) -> tuple[Section, dict[str, Value]]:
    """The arithmetic in words, and as numbers."""
    batch = batch_of(facts)
    items, where = data_size(facts)
    phases = phases_of(facts, batch, items)
    if batch is None:
        known = lines(("a phase", "the method alone knows how many items it uses"), ("data", where))
        return Section(title="Batch", lines=known), {"phases": phases, "items": items}
    run = _run_lines(facts, batch, phases)
    section = Section(
        title="Batch",
        lines=(*_phase_lines(facts, batch), *run, *_data_lines(facts, batch, phases, items, where),
               *_rate_lines(facts, batch, phases)),
        remarks=_remarks(facts, batch, phases),
    )  # fmt: skip
    return section, _numbers(facts, batch, phases, items)


def _phase_lines(facts: Facts, batch: Batch) -> tuple[Line, ...]:
    most = "at most " if batch.at_most else ""
    rows, microbatches = batch.rows, batch.microbatches
    each = number(batch.steps[0]) if len(set(batch.steps)) == 1 else f"{min(batch.steps):,} to {max(batch.steps):,}"
    cut = f"{number(batch.steps[0])} {batch.unit} / {number(batch.units_per_microbatch)} a microbatch"
    parts = number(microbatches[0])
    if (budget := facts.stage.train.max_tokens_per_microbatch) is not None:
        parts = f"at least {parts}, more where {budget:,} tokens are too few"
    if batch.unit == "pairs":
        cut += f" (2 rows each, {facts.stage.train.microbatch_rows} rows)"
    steps = f"{count(batch.steps_per_phase, 'optimiser step')} a phase"
    if facts.samples:
        group, made = batch.completions // batch.items, number(batch.completions)
        sampled = f"{number(batch.items)} prompts x {count(group, 'completion')} = {made} completions"
        if batch.steps_per_phase > 1:
            steps = f"{count(batch.passes, 'epoch')} x {_minibatches(batch)} = {steps}"
    redrawn = f"+ at most {number(batch.redrawn)} of prompts drawn again"
    return lines(
        ("sampled a phase", sampled) if facts.samples else None,
        ("drawn again", redrawn) if batch.redrawn else None,
        ("steps", f"{most}{steps}"),
        ("a step", f"{most}{each} {batch.unit}"
                   + (f" = {number(rows[0])} rows" if batch.unit == "pairs" else "")),
        ("microbatches", f"{most}{cut} = {parts}; their gradients add up to the step's, exactly"),
    )  # fmt: skip


def _minibatches(batch: Batch) -> str:
    return f"{len(batch.steps)} minibatch{'es' * (len(batch.steps) != 1)}"


def _run_lines(facts: Facts, batch: Batch, phases: int | None) -> tuple[Line, ...]:
    if phases is None:
        epochs = facts.stage.train.epochs
        told = f"passes over the data: {number(epochs)}; phases = passes x items / {number(batch.items)}, rounded up"
        return lines(("the run", told))
    most = "at most " if batch.at_most else ""
    steps = phases * batch.steps_per_phase
    told = number(phases)
    if epochs := facts.stage.train.epochs:
        told = f"passes over the data: {number(epochs)} = at most {told}"
    parts = [f"{told} phases x {batch.steps_per_phase} = {most}{number(steps)} optimiser steps"]
    limit = facts.stage.data.max_completion_tokens
    if facts.samples:
        completions = phases * batch.completions
        parts.append(f"{number(completions)} completions of at most {limit} tokens = at most "
                     f"{number(completions * limit)} generated tokens")  # fmt: skip
        if batch.redrawn:
            parts.append(f"with every redraw {number(phases * (batch.completions + batch.redrawn))} completions")
    return lines(("the run", "; ".join(parts)), *_end_lines(facts))


def _end_lines(facts: Facts) -> tuple[Line, ...]:
    """What may end the run early, and which of its policies is the result."""
    stops, best = facts.stage.train.diagnosis.stop_on, facts.stage.evaluation.best
    found = f"a finding of {listed(stops)} (train.diagnosis.stop_on)" if stops else ""
    chosen = ""
    if best is not None:
        metric = {"perplexity": "the lowest perplexity of held-out demonstrations", "score": "the highest score"}
        chosen = (
            f"not the last policy, but the one with {metric[best.metric]} among evaluations in which its KL to the "
            f"start is at most {number(best.kl_per_token_limit)} nats a token (k1)"
        )
    return lines(("ends early at", found) if found else None, ("result", chosen) if chosen else None)


def _data_lines(facts: Facts, batch: Batch, phases: int | None, items: int | None, where: str) -> tuple[Line, ...]:
    if not items or phases is None:
        return lines(("data", where))
    used = phases * batch.items
    what = ITEMS.get(facts.kind, facts.kind)
    return lines(
        ("data", where),
        ("passes", f"{number(phases)} x {number(batch.items)} = {number(used)} {what} = {used / items:.3g} passes"),
    )


def _rate_lines(facts: Facts, batch: Batch, phases: int | None) -> tuple[Line, ...]:
    """Schedule and roles: whose learning rate is what, when, and who starts late."""
    schedule = Schedule(**facts.stage.train.schedule.model_dump())
    adamw = facts.stage.train.adamw
    found = []
    for name, role in facts.roles.items():
        if not role.trained:
            continue
        text = f"learning rate: peak {number(role.learning_rate)}"
        if phases is not None:
            first, last = (schedule.factor(p, phases) * role.learning_rate for p in (0, phases - 1))
            text += f", first phase {first:.3g}, last {last:.3g}"
        text += f"; gradient norm above {number(role.max_grad_norm)} is scaled down to it"
        if role.start_step:
            phase = role.start_step // batch.steps_per_phase
            text += (
                f"; starts at optimiser step {role.start_step}, in phase {phase} (both counted from 0), and is not "
                "stepped at all before"
            )
        found.append((name.replace("_", " "), text))
    optimiser = (
        f"betas {number(adamw.beta1)}, {number(adamw.beta2)}, eps {number(adamw.eps)}, decay of matrices "
        f"{number(adamw.weight_decay)}"
    )
    return lines(*found, ("AdamW", optimiser), ("schedule", _schedule(schedule, phases)))


def _schedule(schedule: Schedule, phases: int | None) -> str:
    floor = f" towards {number(schedule.floor)} of the peak" if schedule.shape != "constant" else ""
    text = f"{schedule.shape}{floor}, a step a phase"
    if not schedule.warmup:
        return f"{text}, no warm-up"
    share = f"{number(schedule.warmup)} of the phases"
    if phases is None:
        return f"{text}, after a linear warm-up over {share}"
    warm = sum(phase < schedule.warmup * phases for phase in range(phases))
    return f"{text}, after a linear warm-up in the first {number(warm)} of {number(phases)} phases ({share})"


def _remarks(facts: Facts, batch: Batch, phases: int | None) -> tuple[str, ...]:
    late = [
        name
        for name, role in facts.roles.items()
        if role.trained and phases is not None and role.start_step >= phases * batch.steps_per_phase
    ]
    uneven = batch.steps[0] % batch.units_per_microbatch and batch.microbatches[0] > 1
    return said(
        (late, f"The {', '.join(late)} never learns: it would start after the last optimiser step."),
        (uneven, "The last microbatch of a step is smaller than the others. That costs time and changes no gradient."),
        (facts.get("stop_epochs_above_kl") is not None,
         "A phase ends early where the approximate KL to the sampling policy goes over stop_epochs_above_kl."),
    )  # fmt: skip


def _numbers(facts: Facts, batch: Batch, phases: int | None, items: int | None) -> dict[str, Value]:
    def total(a_phase: int) -> int | None:
        return None if phases is None else phases * a_phase

    limit = facts.stage.data.max_completion_tokens
    return {
        "phases": phases,
        "items": items,
        "items_per_phase": batch.items,
        "passes_over_the_data": None if phases is None or not items else phases * batch.items / items,
        "prompts": total(batch.items) if facts.samples else 0,
        "completions_per_phase": batch.completions,
        "completions": total(batch.completions),
        "completions_with_every_redraw": total(batch.completions + batch.redrawn),
        "generated_tokens_at_most": total((batch.completions + batch.redrawn) * limit),
        "steps_per_phase": batch.steps_per_phase,
        "optimizer_steps": total(batch.steps_per_phase),
        "rows_per_step": batch.rows[0],
        "microbatches_per_step": batch.microbatches[0],
        "microbatches": total(batch.passes * sum(batch.microbatches)),
        "trained_rows": total(batch.passes * sum(batch.rows)),
        "may_be_less": batch.at_most or facts.stage.train.epochs is not None,
        "max_completion_tokens": limit,
        "max_prompt_tokens": facts.stage.data.max_prompt_tokens,
    }
