"""What a profile says: Profiled -> tables for the terminal, profile.json, and one self-contained profile.html."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from rich.table import Table
from rich.text import Text

from alignlab.profile.advice import Suggestion
from alignlab.profile.measure import PARTS, mean
from alignlab.profile.plots import memory_bar, memory_course, phase_bars
from alignlab.timing import COLLECT
from alignlab.tracking import write_json

if TYPE_CHECKING:
    from alignlab.profile import Profiled

NUMBERS, PAGE = "profile.json", "profile.html"
LABELS = {
    COLLECT: "preparing data",
    "reference": "reference",
    "scoring": "values, other scores",
    "body": "forward: body",
    "head": "forward: head",
    "loss": "forward: loss",
    "": "other",
}
"""What people call a part where that is not its name."""
NOTHING = "nothing is worth changing: no setting that was tried or estimated saves {least:.0%} of a phase"
NONE = "—"
SHOWN = 4
"""Phases whose seconds are shown one by one; of more, the least and the most."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a phase, over the measured phases."""

    name: str
    label: str
    seconds: float
    share: float
    by_phase: tuple[float, ...]
    """Without evaluations and checkpoints, which the mean has its share of."""
    details: tuple[tuple[str, float], ...]
    tone: int
    """Number of its colour."""


def parts_of(profiled: Profiled) -> list[Part]:
    """Every part that took any time; their seconds add up to the phase's."""
    laps, facts = profiled.measured.laps, profiled.facts
    extra = {"evaluation": facts.evaluation, "checkpoint": facts.checkpoint}
    found = []
    for tone, name in enumerate(PARTS):
        by_phase = tuple(lap.seconds.get(name, 0.0) for lap in laps)
        seconds = mean(list(by_phase)) + extra.get(name, 0.0)
        if seconds > 0:
            inner = {k for lap in laps for k in lap.details.get(name, {})}
            details = [(k, mean([lap.details.get(name, {}).get(k, 0.0) for lap in laps])) for k in sorted(inner)]
            found.append(
                Part(name=name or "other", label=LABELS.get(name, name), seconds=seconds, share=seconds / facts.phase,
                     by_phase=by_phase, details=tuple(details), tone=tone)
            )  # fmt: skip
    return found


def throughput(profiled: Profiled) -> dict[str, float | None]:
    """Tokens a second, of the parts that make and train them; None where a method does not."""
    laps, facts = profiled.measured.laps, profiled.facts

    def rate(counter: str, *parts: str) -> float | None:
        tokens, seconds = mean([lap.counted.get(counter, 0.0) for lap in laps]), facts.part(*parts)
        return tokens / seconds if tokens and seconds else None

    return {
        "sampled_tokens_per_second": rate("generated_tokens", "sampling"),
        "trained_tokens_per_second": rate("trained_tokens", "body", "head", "loss", "backward", "optimiser"),
    }


def batches(profiled: Profiled) -> dict[str, float | None]:
    """How the rows of a phase met the model."""
    works = [lap.work for lap in profiled.measured.laps]
    rows, tokens = sum(sum(w.rows) for w in works), sum(sum(w.tokens) for w in works)
    computed, count = sum(sum(w.computed) for w in works), sum(len(w.rows) for w in works)
    lengths = profiled.facts.lengths
    return {
        "steps_per_phase": mean([float(w.steps) for w in works]),
        "microbatches_per_phase": count / len(works),
        "rows_per_microbatch": rows / count if count else 0.0,
        "tokens_per_phase": tokens / len(works),
        "computed_positions_per_phase": computed / len(works),
        "padding_fraction": max(0.0, 1 - tokens / computed) if computed else 0.0,
        "shared_prompt_fraction": max(0.0, 1 - computed / tokens) if tokens else 0.0,
        "completion_length_mean": sum(lengths) / len(lengths) if lengths else None,
        "completion_length_longest": float(lengths[-1]) if lengths else None,
        "truncated_fraction": sum(w.truncated for w in works) / len(lengths) if lengths else None,
    }


# ---- numbers ---------------------------------------------------------------------------------------------------------


def as_json(profiled: Profiled) -> dict[str, Any]:
    """Everything that was found, in seconds and bytes."""
    measured, facts = profiled.measured, profiled.facts
    memory, once = measured.memory, measured.once
    return {
        "schema": 1,
        "recipe": profiled.recipe,
        "stage": profiled.stage.name,
        "method": getattr(profiled.stage.algorithm, "name", type(profiled.stage.algorithm).__name__),
        "device": str(profiled.device),
        "threads": profiled.threads,
        "weights": {"all": measured.parameters, "trained": measured.trained},
        "phases": {"warm_up": len(measured.warm_up), "measured": len(measured.laps), "in_run": measured.in_run},
        "phase": {
            "seconds": facts.phase,
            "by_phase": [lap.total for lap in measured.laps],
            "warm_up": [lap.total for lap in measured.warm_up],
            "parts": [
                {"name": p.name, "seconds": p.seconds, "share": p.share, "by_phase": list(p.by_phase),
                 "details": dict(p.details)}
                for p in parts_of(profiled)
            ],
        },
        "once": {"models": once.models, "data": once.data, "reference": once.reference,
                 "evaluation": once.evaluation, "checkpoint": once.checkpoint},
        "run_seconds": run_seconds(profiled),
        **throughput(profiled),
        "batches": batches(profiled),
        "memory": {
            "before": memory.before, "loaded": memory.loaded, "peak": memory.peak, "peak_part": memory.peak_part,
            "capacity": memory.capacity, "parts": dict(memory.parts),
            "max_memory_allocated": memory.allocated, "max_memory_reserved": memory.reserved,
        },
        "tried": [
            {"override": t.change.override, "seconds": t.seconds, "seconds_without": t.base, "noise": t.noise,
             "peak": t.peak, "peak_without": t.base_peak}
            for t in profiled.tried
        ],
        "suggestions": [
            {"override": s.override, "why": s.why, "seconds": s.seconds, "share": s.seconds / facts.phase,
             "bytes": s.bytes, "basis": s.basis, "changes_what_is_learned": s.learns}
            for s in profiled.suggestions
        ],
        "notes": list(profiled.notes),
    }  # fmt: skip


def run_seconds(profiled: Profiled) -> float:
    """The whole stage, at this rate: what happens once, all phases, and the last evaluation."""
    once = profiled.measured.once
    before = once.models + once.data + once.reference
    return before + profiled.measured.in_run * profiled.facts.phase + (once.evaluation or 0.0)


def write(profiled: Profiled, folder: Path) -> tuple[Path, Path]:
    """Writes profile.json and profile.html; their paths. The JSON is what counts, so it comes last."""
    page, numbers = folder / PAGE, folder / NUMBERS
    folder.mkdir(parents=True, exist_ok=True)
    page.write_text(render(profiled), encoding="utf-8", newline="\n")
    write_json(numbers, as_json(profiled))
    return numbers, page


# ---- words -----------------------------------------------------------------------------------------------------------


def time_of(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def size_of(size: float) -> str:
    if abs(size) >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if abs(size) >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def _count(number: float | None, what: str, ending: str = "s") -> str:
    return f"{number:.3g} {what}{ending * (number != 1)}"


def subtitle(profiled: Profiled) -> str:
    measured = profiled.measured
    threads = f", {_count(profiled.threads, 'thread')}" if profiled.device.type == "cpu" else ""
    return (
        f"stage {profiled.stage.name} · {len(measured.laps)} phases after {len(measured.warm_up)} to warm up · "
        f"{profiled.device}{threads} · {measured.trained:,} of {measured.parameters:,} weights trained"
    )


def part_cells(part: Part) -> list[str]:
    phases = " · ".join(time_of(s) for s in part.by_phase) if any(part.by_phase) else NONE
    if len(part.by_phase) > SHOWN:
        phases = f"{time_of(min(part.by_phase))} to {time_of(max(part.by_phase))}"
    details = ", ".join(f"{name} {time_of(seconds)}" for name, seconds in part.details)
    return [part.label, time_of(part.seconds), f"{part.share:.1%}", phases, details]


def facts_of(profiled: Profiled) -> list[tuple[str, str]]:
    """What is one line each."""
    met, rates, once = batches(profiled), throughput(profiled), profiled.measured.once
    how = f"{_count(met['microbatches_per_phase'], 'microbatch', 'es')} of {met['rows_per_microbatch']:.3g} rows a "
    how += f"phase, in {_count(met['steps_per_phase'], 'optimiser step')}"
    packed = (
        "none: rows are packed" if profiled.measured.packed else f"{met['padding_fraction']:.1%} of what is computed"
    )
    shared = f"; prompts that siblings share save {met['shared_prompt_fraction']:.0%} of the tokens"
    lines = [
        ("a phase", f"{time_of(profiled.facts.phase)}, evaluations and checkpoints shared out among the phases"),
        ("the run", f"{profiled.measured.in_run:,} phases: {time_of(run_seconds(profiled))} at this rate"),
        ("tokens a second", ", ".join(f"{value:,.0f} {name.split('_')[0]}" for name, value in rates.items() if value)),
        ("microbatches", how),
        ("padding", packed + (shared if met["shared_prompt_fraction"] else "")),
    ]
    if met["completion_length_mean"] is not None:
        limit = profiled.stage.data.max_completion_tokens
        average, longest = met["completion_length_mean"], met["completion_length_longest"]
        cut = f"{met['truncated_fraction']:.0%} cut off"
        lines.append(("completions", f"{average:.0f} tokens on average, the longest {longest:.0f} of {limit}, {cut}"))
    spent = {"loading": once.models, "data": once.data}
    if once.reference > 0.001:  # else there is none to compute before training
        spent["the reference's logprobs of the whole run"] = once.reference
    if once.evaluation is not None:
        spent["an evaluation"] = once.evaluation
    spent["a checkpoint"] = once.checkpoint
    lines.append(("each time", ", ".join(f"{name} {time_of(s)}" for name, s in spent.items())))
    return lines


def memory_rows(profiled: Profiled) -> list[tuple[str, str, str]]:
    """What the peak is made of: name, size, share."""
    memory = profiled.measured.memory
    names = {"process": "Python and libraries", "rest": "activations and the rest", "optimiser": "AdamW's state"}
    total = max(1, sum(memory.parts.values()))
    return [(names.get(k, k), size_of(v), f"{v / total:.1%}") for k, v in memory.parts.items() if v]


def memory_line(profiled: Profiled) -> str:
    memory = profiled.measured.memory
    where = LABELS.get(memory.peak_part, memory.peak_part)
    line = f"{size_of(memory.before)} before, {size_of(memory.loaded)} with everything loaded, "
    line += f"{size_of(memory.peak)} at the peak (during {where}) of {size_of(memory.capacity)}"
    if memory.allocated is not None and memory.reserved is not None:
        line += f"; allocated {size_of(memory.allocated)}, reserved {size_of(memory.reserved)}"
    return line


def effect(profiled: Profiled, one: Suggestion) -> str:
    """What a suggestion does, with sign."""
    share, memory = one.seconds / profiled.facts.phase, one.bytes / profiled.measured.memory.peak
    parts = []
    if abs(share) >= 0.005:
        parts.append(f"{abs(share):.0%} {'less' if share > 0 else 'more'} time a phase")
    if abs(memory) >= 0.01:
        parts.append(f"{size_of(abs(one.bytes))} {'less' if memory > 0 else 'more'} memory")
    return ", ".join(parts) or "no difference"


def suggestion_cells(profiled: Profiled, one: Suggestion) -> list[str]:
    scope = "; changes what is learned" if one.learns else ""
    return [one.override, effect(profiled, one), one.basis, one.why + scope]


def tables(profiled: Profiled) -> Iterator[Table | Text]:
    """Time, memory, and the settings worth changing."""
    yield Text(subtitle(profiled))
    time_table = _table("part", "a phase", "share", "phase by phase", "of it", title="Time")
    for part in parts_of(profiled):
        time_table.add_row(*part_cells(part))
    yield time_table
    found = _table("", "")
    for row in facts_of(profiled):
        found.add_row(*row)
    yield found
    memory = _table("part", "bytes", "share", title="Memory")
    for cells in memory_rows(profiled):
        memory.add_row(*cells)
    yield memory
    yield Text(memory_line(profiled))
    for note in profiled.notes:
        yield Text(f"note: {note}")
    if not profiled.suggestions:
        yield Text(nothing())
        return
    advice = _table("override", "effect", "known by", "why", title="Settings most worth changing")
    for one in profiled.suggestions:
        advice.add_row(*suggestion_cells(profiled, one))
    yield advice


def nothing() -> str:
    from alignlab.profile.advice import LEAST

    return NOTHING.format(least=LEAST)


def _table(*columns: str, title: str | None = None) -> Table:
    shown = Text(title) if title else None
    table = Table(title=shown, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        right = column in ("a phase", "share", "bytes")
        table.add_column(Text(column), justify="right" if right else "left", overflow="fold", no_wrap=not i)
    return table


# ---- the page --------------------------------------------------------------------------------------------------------


def render(profiled: Profiled) -> str:
    """The page as text; it needs no network and no script, and every name in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts, memory = parts_of(profiled), profiled.measured.memory
    laps = [[(p.tone, p.label, p.by_phase[i]) for p in parts] for i in range(len(profiled.measured.laps))]
    segments = [(name, size) for (name, _, _), size in zip(memory_rows(profiled), filter(None, memory.parts.values()),
                                                           strict=True)]  # fmt: skip
    return environment.get_template("page.html.j2").render(
        name=profiled.recipe,
        subtitle=subtitle(profiled),
        facts=facts_of(profiled),
        parts=[(part.tone, part_cells(part)) for part in parts],
        memory=list(enumerate(memory_rows(profiled))),
        memory_line=memory_line(profiled),
        bars=phase_bars(laps),
        memory_bar=memory_bar(segments),
        course=memory_course(memory.course, memory.loaded if memory.allocated is None else None),
        suggestions=[suggestion_cells(profiled, one) for one in profiled.suggestions],
        nothing=nothing(),
        tried=[(t.change.override, time_of(t.base), time_of(t.seconds), f"{t.seconds / t.base - 1:+.0%}",
                f"{t.noise / t.base:.0%}", size_of(t.peak)) for t in profiled.tried],
        notes=profiled.notes,
    )  # fmt: skip
