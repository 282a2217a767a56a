"""THE loop: phase -> loss -> backward -> step -> observe -> log. It knows no method's name.

1. collect the phase's optimiser steps        3. step every role that has started
2. for each step: loss and backward of its     4. let the method observe, and obey its directive
   microbatches, divided by the step's         5. yield the state: the moment to evaluate and to save
   one normaliser; check the identities
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from alignlab.algorithms import IDENTITY_TOLERANCE, Algorithm, Models, completion_rows, completion_tokens
from alignlab.diagnosis import DiagnosisLimits, diagnose
from alignlab.optim import FIRST_SCALER, LEAST_SCALE, Schedule, clipped_step, next_scaler, unscale
from alignlab.rollout import Source
from alignlab.timing import COLLECT, by_part, clock, span
from alignlab.tracking import Tracker
from alignlab.types import Directive, LoopState, LossOutput, Phase, Role, Step

TIMED = {
    "sampling": "time/sampling",
    "rewards": "time/rewards",
    "reference": "time/reference",
    "scoring": "time/scoring",
    "loss": "time/loss",
    "backward": "time/backward",
    "optimiser": "time/optimiser",
}
"""Span -> the metric under which its seconds are logged, where there are any."""


class RunError(RuntimeError):
    """A run that cannot go on: one line saying what, where, why and what to do; exit code 1."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished phase: the state after it, and its last step's metrics; seconds are those of the whole phase."""

    state: LoopState
    metrics: Mapping[str, float]


def train(
    algorithm: Algorithm,
    models: Models,
    optimizers: Mapping[str, torch.optim.Optimizer],
    source: Source,
    state: LoopState,
    *,
    num_phases: int,
    schedule: Schedule,
    tracker: Tracker,
    log_completions: int = 0,
    limits: DiagnosisLimits | None = None,
) -> Generator[Finished, LoopState | None, None]:
    """Trains until `num_phases` phases are finished or the run is stopped, and yields after every phase.

    Whoever evaluates in between may send the state back with what the evaluation adds to it (`generator.send(state)`).
    With `limits` every row is diagnosed; what is found stands in the log and is said once.

    Everything random in a phase is seeded by (seed, phase) before it starts, so a killed phase replays exactly.

    Raises:
        RunError: an identity is violated, or a loss or gradient is not finite.
    """
    roles = algorithm.models()
    dtype = next(models["policy" if "policy" in models else next(iter(optimizers))].parameters()).dtype
    if dtype == torch.float16 and not state.scaler:
        state = replace(state, scaler=FIRST_SCALER)
    while state.phase < num_phases and not state.stop_reason:
        started, watch = time.perf_counter(), clock()
        at_start = watch.read()
        seed_everything(phase_seed(state))
        with span(COLLECT):
            phase, state = algorithm.collect(models, source, state)
        collected = {"time/collect": time.perf_counter() - started, **_timed(watch.since(at_start))}
        spent = dict(collected)
        factor = schedule.factor(state.phase, num_phases)
        metrics: dict[str, float] = {}
        for index, step in enumerate(phase.steps):
            began, at_step = time.perf_counter(), watch.read()
            outputs = _backward(algorithm, models, step, state)
            metrics = _averaged(outputs, step)
            if index == 0:
                _check_identities(outputs, IDENTITY_TOLERANCE[dtype], state)
                metrics |= {**phase.metrics, **collected}
                state = _counted(state, _consumed(phase))
            _require_finite("loss", metrics["loss/total"], state)
            with span("optimiser"):
                state, stepped = _step_roles(roles, optimizers, state, factor)
            metrics |= stepped
            state = _counted(replace(state, step=state.step + 1), _trained(step))
            of_step = {"time/step": time.perf_counter() - began, **_timed(watch.since(at_step))}
            spent = {name: spent.get(name, 0.0) + of_step.get(name, 0.0) for name in spent | of_step}
            metrics |= of_step
            state, directive = algorithm.observe(state, metrics)
            state = _obeyed(state, directive)
            why = {"ended": directive.reason} if directive.action != "continue" else {}
            state = record(tracker, limits, state, {**metrics, **why})
            if directive.action != "continue" or state.stop_reason:
                break
        if not phase.steps:  # nothing to learn from, e.g. every group agreed: what it cost still counts
            state = _counted(state, _consumed(phase))
            metrics = {**phase.metrics, **collected}
            state = record(tracker, limits, state, metrics)
        with span("logging"):
            tracker.completions(_shown(phase, state.phase, log_completions))
        state = replace(state, phase=state.phase + 1)
        metrics |= {**phase.metrics, **spent}
        tracker.advance(state.phase, metrics, time.perf_counter() - started)
        state = (yield Finished(state, metrics)) or state


@span("logging")
def record(
    tracker: Tracker, limits: DiagnosisLimits | None, state: LoopState, row: Mapping[str, Any], *, ends: bool = True
) -> LoopState:
    """Logs a row with what it shows, says what is new, and ends the run on a finding that is to stop it (`ends`)."""
    row = {"phase": state.phase, "step": state.step, **row}
    if limits is None:
        tracker.log(row)
        return state
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
    seen = diagnose(numbers, state.diagnosis, limits, phase=row["phase"])
    tracker.log({**row, **seen.row()})
    for line in seen.lines():
        tracker.say(f"{tracker.title}, phase {row['phase']}: {line}")
    stop = state.stop_reason or (seen.stop_reason if ends else "")
    return replace(state, diagnosis=seen.memory, stop_reason=stop)


def _timed(seconds: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    parts = by_part(seconds)
    return {metric: parts[name] for name, metric in TIMED.items() if name in parts}


def phase_seed(state: LoopState) -> int:
    """What every global generator starts a phase from (dropout draws from torch's)."""
    return (state.seed * 1_000_003 + state.phase * 7_919) % 2**63


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch, numpy and Python, which a reward function may use as well."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _backward(algorithm: Algorithm, models: Models, step: Step, state: LoopState) -> list[LossOutput]:
    """Gradients of the whole step: every microbatch's terms over the step's one normaliser (times the loss scale)."""
    if not step.normaliser > 0:
        raise RunError(f"phase {state.phase}, step {state.step}: nothing to train on in this step (normaliser 0)")
    outputs = []
    for batch in step.microbatches:
        with span("loss"):
            output = algorithm.loss(models, batch, state)
            loss = output.total / step.normaliser
        with span("backward"):
            (loss * state.scaler["scale"] if state.scaler else loss).backward()  # type: ignore[no-untyped-call]
        outputs.append(replace(output, total=output.total.detach()))
    return outputs


def _check_identities(outputs: list[LossOutput], tolerance: float, state: LoopState) -> None:
    """What must hold before the phase's first update does hold, or the run stops and says what is wrong."""
    for output in outputs:
        for name, value in output.identities.items():
            if not abs(value) <= tolerance:
                raise RunError(
                    f"phase {state.phase}: {name} is {value:.2e} before any update (tolerance {tolerance:.0e}): "
                    "sampling and scoring, or policy and reference, are not the same model. Look for dropout that is "
                    "on, a temperature on one side only, padding, a wrong adapter state, or weights that changed"
                )


def _averaged(outputs: list[LossOutput], step: Step) -> dict[str, float]:
    """Metrics of the step: sum over all microbatches divided by the count over all microbatches."""
    sums: dict[str, tuple[float, float]] = {}
    for output in outputs:
        for name, (total, count) in output.sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
    metrics = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
    return {"loss/total": sum(o.total.item() for o in outputs) / step.normaliser, **metrics}


def _step_roles(
    roles: Mapping[str, Role], optimizers: Mapping[str, torch.optim.Optimizer], state: LoopState, factor: float
) -> tuple[LoopState, dict[str, float]]:
    """Steps every role that has started; one that has not is left alone, momentum and decay included.

    In float16, a step in which a gradient overflows is skipped for all of them, and the next ones are scaled less.
    """
    started = {name: optimizer for name, optimizer in optimizers.items() if state.step >= roles[name].start_step}
    state, metrics, finite = _unscaled(started, state)
    for name, optimizer in started.items() if finite else ():
        role = roles[name]
        rate = role.learning_rate * factor * state.learning_rate_factor.get(name, 1.0)
        norm = clipped_step(optimizer, role.max_grad_norm, rate)
        _require_finite(f"gradient of the {name}", norm, state)
        metrics |= {f"{name}/grad_norm": norm, f"{name}/learning_rate": rate}
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return state, metrics


def _unscaled(
    optimizers: Mapping[str, torch.optim.Optimizer], state: LoopState
) -> tuple[LoopState, dict[str, float], bool]:
    """Gradients without the loss scale, and whether they can be stepped; True where there is no loss scale."""
    if not state.scaler:
        return state, {}, True
    finite = unscale(optimizers.values(), state.scaler["scale"])
    metrics = {"loss/scale": state.scaler["scale"]}
    state = replace(state, scaler=next_scaler(state.scaler, finite))
    if state.scaler["scale"] < LEAST_SCALE:
        raise RunError(
            f"phase {state.phase}, step {state.step}: gradients overflow in float16 whatever the loss scale (now "
            f"{state.scaler['scale']:.0e}); the last checkpoint is intact. Set model.dtype to bfloat16 or float32"
        )
    return state, {**metrics, "loss/skipped_steps": state.scaler["skipped_steps"]}, finite


def _require_finite(what: str, value: float, state: LoopState) -> None:
    if not math.isfinite(value):
        raise RunError(
            f"phase {state.phase}, step {state.step}: the {what} is {value}; the last checkpoint is intact. Lower the "
            "learning rate, or look at this phase's rewards and lengths in the log"
        )


def _obeyed(state: LoopState, directive: Directive) -> LoopState:
    factors = dict(state.learning_rate_factor)
    for name, factor in directive.learning_rate_factor.items():
        factors[name] = factors.get(name, 1.0) * factor
    stop = directive.reason or "the method stopped the run" if directive.action == "stop" else state.stop_reason
    return replace(state, learning_rate_factor=factors, stop_reason=stop)


def _counted(state: LoopState, news: Mapping[str, float]) -> LoopState:
    """The ledger: what sampling and training have consumed so far."""
    totals = {name: state.counters.get(name, 0.0) + value for name, value in news.items()}
    return replace(state, counters={**state.counters, **totals})


def _consumed(phase: Phase) -> dict[str, float]:
    return {k.removeprefix("ledger/"): v for k, v in phase.metrics.items() if k.startswith("ledger/")}


def _trained(step: Step) -> dict[str, float]:
    return {"trained_rows": completion_rows(step.microbatches), "trained_tokens": completion_tokens(step.microbatches)}


def _shown(phase: Phase, number: int, limit: int) -> Iterator[dict[str, Any]]:
    """The first rollouts of a phase as rows for completions.jsonl."""
    rollouts = [r for group in phase.groups for r in group.rollouts][:limit]
    for r in rollouts:
        yield {
            "phase": number,
            "prompt_id": r.prompt.id,
            "task": r.prompt.task,
            "prompt": [{"role": m.role, "content": m.content} for m in r.prompt.messages],
            "answer": r.prompt.answer,
            "completion": r.completion.text,
            "token_ids": list(r.completion.token_ids),
            "finish_reason": r.completion.finish_reason,
            "reward": r.reward,
            "breakdown": dict(r.breakdown),
            "logprob": sum(r.completion.logprobs),
        }


def trained_modules(models: Models, roles: Mapping[str, Role]) -> dict[str, nn.Module]:
    """The roles whose weights a checkpoint has to hold."""
    return {name: models[name] for name, role in roles.items() if role.trained}
