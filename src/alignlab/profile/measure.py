"""One stage, run for a few phases as training would run it: StageRun -> seconds and bytes by part, and repeats of it.

Nothing is left behind but numbers: what the phases train stays in this process, and logs go into a folder that the
caller throws away. A repeat runs the last phase once more at a learning rate of 0, with one setting changed, so that
everything it is compared with is the same but for that setting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from alignlab.algorithms import Algorithm, Models
from alignlab.checkpoint import save_checkpoint
from alignlab.diagnosis import DiagnosisLimits
from alignlab.forward.packed import runs_packed
from alignlab.models import keep_activations, num_parameters, recompute_activations, trunk, unwrap
from alignlab.optim import Schedule
from alignlab.pipeline.items import of_evaluation
from alignlab.pipeline.reference import UsesReference, run_rows
from alignlab.pipeline.stage import StageRun
from alignlab.profile.memory import capacity, resident, settle, training_bytes, watching, weight_bytes
from alignlab.rollout import Source
from alignlab.timing import COLLECT, by_part, clock, span, waiting
from alignlab.tracking import Tracker
from alignlab.train import train, trained_modules
from alignlab.types import Batch, LoopState, Phase

PARTS = (COLLECT, "sampling", "rewards", "reference", "scoring", "body", "head", "loss", "backward", "optimiser",
         "logging", "evaluation", "checkpoint", "")  # fmt: skip
"""What a phase's time is divided into, in the order in which it happens; "" is what is in none of them."""
DETAILS = ("prefill", "decode", "draw", "body", "head")
"""What parts are divided into once more."""


HOPELESS = 1.25
"""A change whose first round is so many times as slow is not given another."""


class Still(Schedule):
    """Nothing moves, so that a phase can be run again as it was."""

    def factor(self, phase: int, num_phases: int) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a phase had to do."""

    rows: tuple[int, ...] = ()
    """Of each microbatch."""
    widths: tuple[int, ...] = ()
    """Its longest row."""
    tokens: tuple[int, ...] = ()
    """Its rows' tokens, prompts too."""
    computed: tuple[int, ...] = ()
    """Positions that the model computes: padding included, or shared prompts once."""
    steps: int = 0
    lengths: tuple[int, ...] = ()
    """Of the sampled completions."""
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One phase: seconds by part and detail, what it did, and the most memory that it needed."""

    seconds: Mapping[str, float]
    """By part; together all of it."""
    details: Mapping[str, Mapping[str, float]]
    """Part -> its own parts, where it has some."""
    work: Work
    counted: Mapping[str, float]
    """What the ledger counted: generated_tokens, trained_tokens, trained_rows, ..."""
    peak: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Once:
    """What happens once in a run, or every few phases, in seconds each."""

    models: float
    data: float
    reference: float
    """Estimated for the whole run from the rows of the measured phases."""
    evaluation: float | None
    checkpoint: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, on the device that trains."""

    before: int
    """Resident before anything was loaded."""
    loaded: int
    peak: int
    peak_part: str
    capacity: int
    parts: Mapping[str, int]
    """What the peak is made of; `rest` is what is left: activations, caches, what the allocator holds back."""
    course: tuple[tuple[float, int], ...]
    """Over the measured phases."""
    allocated: int | None = None
    """CUDA: the largest sum of all tensors, and what was reserved for it."""
    reserved: int | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting to try, by the override that sets it."""

    override: str
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the source's limits."""
    threads: int | None = None
    recompute: bool | None = None
    """Activations anew in the backward pass."""
    completion_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a change made of the last phase, beside the same phase without it in the same rounds."""

    change: Change
    seconds: float
    """The best of its rounds."""
    base: float
    noise: float
    """How far apart the rounds without it are."""
    peak: int
    base_peak: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A stage's phases, what surrounds them, and its memory."""

    laps: tuple[Lap, ...]
    warm_up: tuple[Lap, ...]
    in_run: int
    """Phases of the whole run."""
    once: Once
    memory: Memory
    parameters: int
    """Weights of the trained models, and how many of them are trained."""
    trained: int
    packed: bool
    """Whether rows go without padding."""


class Counting:
    """A method that is watched: what each of its phases has to do."""

    def __init__(self, algorithm: Algorithm, models: Models) -> None:
        self._algorithm, self.work = algorithm, Work()
        trained = models.get("policy", models.get("reward_model"))
        self._packs = runs_packed(trunk(trained), unwrap(trained))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def collect(self, models: Models, source: Source, state: LoopState) -> tuple[Phase, LoopState]:
        phase, state = self._algorithm.collect(models, source, state)
        batches = [batch for step in phase.steps for batch in step.microbatches]
        done = [r.completion for group in phase.groups for r in group.rollouts]
        self.work = Work(
            rows=tuple(map(len, batches)),
            widths=tuple(batch.input_ids.shape[1] for batch in batches),
            tokens=tuple(int(batch.attention_mask.sum()) for batch in batches),
            computed=tuple(self._positions(batch) for batch in batches),
            steps=len(phase.steps),
            lengths=tuple(len(c.token_ids) for c in done),
            truncated=sum(c.finish_reason == "length" for c in done),
        )
        return phase, state

    def _positions(self, batch: Batch) -> int:
        """Positions of one pass: all of the padded rows, or of packed rows each prompt once."""
        shapes = batch.shapes
        if shapes is None or not self._packs:
            return int(batch.input_ids.numel())
        once = dict(zip(shapes.prompts, shapes.prompt_lengths, strict=True))
        return sum(shapes.lengths) - sum(shapes.prompt_lengths) + sum(once.values())


class Trial(StageRun):
    """A stage whose phases are measured instead of kept."""

    def measure(self, phases: int, warm_up: int, say: Callable[[str], None]) -> Measured:
        """Loads what training would load, and runs `warm_up` and then `phases` phases."""
        device, watch = self.session.device, clock()
        settle(device)
        with waiting(_waiter(device)), watching(device) as memory:
            before, marks = resident(), [time.perf_counter()]
            models = self._models()
            optimizers = self._optimizers(models)
            marks.append(time.perf_counter())
            with self._tracker() as tracker:
                source = self._source(tracker)
                self.in_run = self._length(source)
                self.num_phases = warm_up + phases
                self._held_out, self._demonstrations = self._load_held_out(), self._load_demonstrations()
                marks.append(time.perf_counter())
                source = self._with_reference(source, models, tracker)
                marks.append(time.perf_counter())
                loaded, evaluation = resident(), None
                if self.stage.evaluation.every and self.kind == "policy":  # its frozen start then stays in memory
                    evaluation = self._seconds_of_evaluation(models)
                counting = Counting(self.algorithm, models)
                self.algorithm = cast(Algorithm, counting)
                state = LoopState(seed=self.seed)
                loop = train(
                    self.algorithm, models, optimizers, source, state, num_phases=self.num_phases,
                    schedule=Schedule(**self.stage.train.schedule.model_dump()), tracker=tracker,
                    log_completions=self.stage.train.log_completions, limits=self._limits_without_a_stop(),
                )  # fmt: skip
                laps: list[Lap] = []
                for phase in range(self.num_phases):
                    say(f"{self.stage.name}: phase {phase + 1} of {self.num_phases}")
                    if phase == warm_up:
                        memory.restart()
                    earlier, seconds = state, watch.read()
                    finished = next(loop, None)
                    if finished is None:
                        break
                    state = finished.state
                    laps.append(_lap(watch.since(seconds), counting.work, earlier, state, memory.highest()))
                peak, peak_part, course = memory.highest(), memory.peak_part(), memory.thinned()
                fixed = self._fixed(models, optimizers, before)
                with span("checkpoint"):
                    started = time.perf_counter()
                    trained = trained_modules(models, self.roles)
                    save_checkpoint(self.folder / "checkpoints", state=state, models=trained, optimizers=optimizers,
                                    contract={})  # fmt: skip
                    checkpoint = time.perf_counter() - started
                if evaluation is None:
                    evaluation = self._seconds_of_evaluation(models)
        on_gpu = device.type == "cuda"
        self.models, self.optimizers, self.source, self.state = models, optimizers, source, state
        return Measured(
            laps=tuple(laps[warm_up:]),
            warm_up=tuple(laps[:warm_up]),
            in_run=self.in_run,
            once=Once(
                models=marks[1] - marks[0],
                data=marks[2] - marks[1],
                reference=(marks[3] - marks[2]) * self._rows_in_run(source),
                evaluation=evaluation,
                checkpoint=checkpoint,
            ),
            memory=Memory(
                before=before, loaded=loaded, peak=peak, peak_part=peak_part, capacity=capacity(device),
                course=tuple(course),
                parts={**fixed, "rest": max(0, peak - sum(fixed.values()))},
                allocated=int(torch.cuda.max_memory_allocated(device)) if on_gpu else None,
                reserved=int(torch.cuda.max_memory_reserved(device)) if on_gpu else None,
            ),
            parameters=sum(num_parameters(m) for m in trained_modules(models, self.roles).values()),
            trained=sum(num_parameters(m, trained_only=True) for m in trained_modules(models, self.roles).values()),
            packed=counting._packs,
        )  # fmt: skip

    def try_out(self, changes: list[Change], rounds: int, say: Callable[[str], None]) -> list[Tried]:
        """The last phase again, without and with each change in turn."""
        nothing = Change(override="")
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for _ in range(rounds):
            for change in (nothing, *changes):
                if change.override in seconds and seconds[change.override][0] > HOPELESS * seconds[""][0]:
                    continue
                say(f"{self.stage.name}: trying {change.override or 'nothing changed'}")
                lap = self._again(change)
                seconds.setdefault(change.override, []).append(lap.total)
                peaks[change.override] = max(lap.peak, peaks.get(change.override, 0))
        base = seconds[""]
        return [
            Tried(change=c, seconds=min(seconds[c.override]), base=min(base), noise=max(base) - min(base),
                  peak=peaks[c.override], base_peak=peaks[""])
            for c in changes
        ]  # fmt: skip

    def _again(self, change: Change) -> Lap:
        device, watch = self.session.device, clock()
        models, state = self.models, self.state
        source = replace(self.source, limits=replace(self.source.limits, **change.limits))
        if change.completion_tokens is not None:
            source = replace(source, sampling=replace(source.sampling, max_completion_tokens=change.completion_tokens))
        settle(device)
        with (
            waiting(_waiter(device)),
            watching(device) as memory,
            self._tracker() as tracker,
            threads(change.threads),
            self._recomputing(models, change.recompute),
        ):
            earlier, seconds = state, watch.read()
            loop = train(
                self.algorithm, models, self.optimizers, source, state, num_phases=state.phase + 1,
                schedule=Still(), tracker=tracker, log_completions=self.stage.train.log_completions,
            )  # fmt: skip
            finished = next(loop)
            work = cast(Counting, self.algorithm).work
            return _lap(watch.since(seconds), work, earlier, finished.state, memory.highest())

    @contextmanager
    def _recomputing(self, models: Mapping[str, Any], recompute: bool | None) -> Iterator[None]:
        """With activations computed anew in the backward pass, or without."""
        if recompute is None:
            yield
            return
        trained = [models[name] for name, role in self.roles.items() if role.trained]
        self._set_recomputing(trained, recompute)
        try:
            yield
        finally:
            self._set_recomputing(trained, self.stage.train.gradient_checkpointing)

    def _set_recomputing(self, trained: list[nn.Module], recompute: bool) -> None:
        for model in trained:
            if recompute:
                recompute_activations(model)
            else:
                keep_activations(model, training=self.stage.method.dropout)

    # ---- parts of it -------------------------------------------------------------------------------------------------

    def _tracker(self) -> Tracker:
        return Tracker(self.folder, num_phases=1, title=self.stage.name, metrics_file=self.algorithm.metrics_file,
                       quiet=True)  # fmt: skip

    def _limits_without_a_stop(self) -> DiagnosisLimits:
        return self.stage.train.diagnosis.model_copy(update={"stop_on": ()})

    def _seconds_of_evaluation(self, models: Models) -> float | None:
        if not self._held_out:
            return None
        started = time.perf_counter()
        with span("evaluation"), of_evaluation():
            self._evaluate(models)
        return time.perf_counter() - started

    def _rows_in_run(self, source: Source) -> float:
        """How many times the rows of the measured phases a whole run asks the reference about."""
        algorithm = self.stage.method
        if not isinstance(algorithm, UsesReference):
            return 1.0
        ask = partial(run_rows, source, algorithm, self.seed)
        return len(ask(self.in_run)) / max(1, len(ask(self.num_phases)))

    def _fixed(self, models: Mapping[str, Any], optimizers: Mapping[str, Any], before: int) -> dict[str, int]:
        """What has to be in memory at the peak, by name."""
        device, roles = self.session.device, dict(models)
        if "learned" in vars(self):
            roles.setdefault("reward_model", self.learned["reward_model"])
        if self._start is not None:
            roles.setdefault("start", self._start)
        found = {"process": before} if device.type != "cuda" else {}
        found |= {f"weights of the {role.replace('_', ' ')}": n for role, n in weight_bytes(roles, device).items() if n}
        return found | training_bytes(optimizers, models, device)


def _lap(seconds: Mapping[tuple[str, ...], float], work: Work, before: LoopState, after: LoopState, peak: int) -> Lap:
    details: dict[str, dict[str, float]] = {}
    flat: dict[tuple[str, ...], float] = {}
    for path, spent in seconds.items():
        forward = next((name for name in path if name in ("body", "head")), None) if path[:1] == ("loss",) else None
        renamed = path if forward is None else (forward,)  # the forward pass of training, in two parts of its own
        flat[renamed] = flat.get(renamed, 0.0) + spent
        (part,) = by_part({renamed: 0.0})
        inner = next((name for name in reversed(path) if name in DETAILS), None)
        if inner is not None and inner != part:
            details.setdefault(part, {})
            details[part][inner] = details[part].get(inner, 0.0) + spent
    counted = {k: v - before.counters.get(k, 0.0) for k, v in after.counters.items()}
    return Lap(seconds=by_part(flat), details=details, work=work, counted=counted, peak=peak)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _waiter(device: torch.device) -> Callable[[], None] | None:
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
