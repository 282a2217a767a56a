"""Which settings are worth changing: what was measured and the recipe -> overrides, each with its expected effect.

A candidate that costs one more phase to check is tried; what cannot be tried cheaply is estimated from the measured
seconds and bytes of the parts that it does away with, and says so. Memory counts only where it is scarce.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from alignlab.models import hidden_size, trunk, unwrap
from alignlab.models.load import linear_layers
from alignlab.profile.measure import Change, Measured, Tried, mean, threads
from alignlab.recipe import AdapterSection, Stage

LEAST = 0.03
"""Share of a phase, or of the peak, below which nothing is worth a change."""
SCARCE = 0.5
"""Share of the memory from which on saving it counts."""
MOST = 3
TOKENS = 256
"""Rows of the products by which two types are compared."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One setting to change."""

    override: str
    """What to type."""
    why: str
    seconds: float
    """Saved a phase; below 0 it costs time."""
    bytes: float
    """Saved at the peak; below 0 it costs memory."""
    basis: Literal["tried", "estimated"]
    learns: bool
    """Whether it changes what is learned or reported, not only how fast."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What all candidates are judged by."""

    stage: Stage
    measured: Measured
    device: torch.device
    prefix: str
    """In front of every key: `stages.NAME.` in a recipe of several stages."""

    def part(self, *names: str) -> float:
        """Mean seconds of a phase in the given parts."""
        return mean([sum(lap.seconds.get(name, 0.0) for name in names) for lap in self.measured.laps])

    @property
    def phase(self) -> float:
        """Seconds of a phase, with its share of evaluations and checkpoints."""
        return mean([lap.total for lap in self.measured.laps]) + self.evaluation + self.checkpoint

    @property
    def evaluation(self) -> float:
        every = self.stage.evaluation.every
        return (self.measured.once.evaluation or 0.0) / every if every else 0.0

    @property
    def checkpoint(self) -> float:
        return self.measured.once.checkpoint / self.stage.train.save_every

    @property
    def pressure(self) -> float:
        """How full the memory was at the peak."""
        return self.measured.memory.peak / self.measured.memory.capacity

    @property
    def rows(self) -> int:
        """Rows of an optimiser step."""
        work = self.measured.laps[-1].work
        return sum(work.rows) // max(1, work.steps)

    @property
    def lengths(self) -> list[int]:
        return sorted(n for lap in self.measured.laps for n in lap.work.lengths)


# ---- what to try -----------------------------------------------------------------------------------------------------


def candidates(facts: Facts, models: dict[str, Any]) -> list[Change]:
    """Changes that are as right as what the recipe says, and that one more phase tells about."""
    settings, prefix = facts.stage.train, facts.prefix
    found = [
        Change(override=f"{prefix}train.microbatch_rows={rows}", limits={"microbatch_rows": rows})
        for rows in _rows_to_try(settings.microbatch_rows, facts.rows)
    ]
    completions = len(facts.measured.laps[-1].work.lengths)
    if completions > settings.sampling_rows:
        rows = min(4 * settings.sampling_rows, completions)
        found.append(Change(override=f"{prefix}train.sampling_rows={rows}", limits={"sampling_rows": rows}))
    if settings.gradient_checkpointing or facts.pressure > SCARCE:
        on = not settings.gradient_checkpointing
        found.append(Change(override=f"{prefix}train.gradient_checkpointing={str(on).lower()}", recompute=on))
    if facts.pressure > SCARCE and (budget := _token_budget(facts)) is not None:
        found.append(
            Change(override=f"{prefix}train.max_tokens_per_microbatch={budget}", limits={"microbatch_tokens": budget})
        )
    if (limit := _completion_limit(facts)) is not None:
        found.append(Change(override=f"{prefix}data.max_completion_tokens={limit}", completion_tokens=limit))
    if facts.device.type == "cpu":
        found += [Change(override=f"OMP_NUM_THREADS={n}", threads=n) for n in _cores() if _pays(n, facts, models)]
    return found


def _rows_to_try(rows: int, in_step: int) -> list[int]:
    """Four times as many rows in a microbatch, and a quarter, where that makes another number of microbatches."""
    if not in_step:
        return []
    more, fewer = min(4 * rows, in_step + in_step % 2), max(2, min(rows, in_step) // 4)
    return [n for n in dict.fromkeys((more, fewer)) if -(-in_step // n) != -(-in_step // rows)]


def _token_budget(facts: Facts) -> int | None:
    """The mean size of a microbatch, padded, where the largest, which has to fit, is half as large again."""
    work = facts.measured.laps[-1].work
    sizes = [rows * width for rows, width in zip(work.rows, work.widths, strict=True)]
    average = sum(sizes) // max(1, len(sizes))
    return average if sizes and max(sizes) > 1.5 * average else None


def _completion_limit(facts: Facts) -> int | None:
    """The length that 19 of 20 completions keep to, where the longest are more than half as long again."""
    lengths = facts.lengths
    if len(lengths) < 20:
        return None
    limit = lengths[int(0.95 * (len(lengths) - 1))] + 1
    return limit if lengths[-1] > 1.5 * limit else None


def _cores() -> list[int]:
    """One thread, and as many as there are cores for this process."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return sorted({1, min(allowed, physical)})


def _pays(count: int, facts: Facts, models: dict[str, Any]) -> bool:
    """Whether so many threads multiply any faster: where they do not, a whole phase may take them forever."""
    if count == torch.get_num_threads():
        return False
    inner = unwrap(models.get("policy", models.get("reward_model")))
    product = partial(product_seconds, hidden_size(inner), next(inner.parameters()).dtype, facts.device)
    before = product()
    with threads(count):
        return product() < 0.9 * before


# ---- what to say -----------------------------------------------------------------------------------------------------


def suggestions(facts: Facts, tried: list[Tried], models: dict[str, Any]) -> list[Suggestion]:
    """The settings most worth changing, the best first; empty where nothing is worth it."""
    found = [*_from_trials(facts, tried), *_estimates(facts, models)]
    best: dict[str, Suggestion] = {}
    for one in sorted(found, key=lambda s: worth(facts, s), reverse=True):
        if worth(facts, one) >= LEAST:
            best.setdefault(one.override.partition("=")[0], one)  # of two values of a key the better one
    return list(best.values())[:MOST]


def worth(facts: Facts, one: Suggestion) -> float:
    """Share of a phase that it saves, and of the peak where memory is scarce."""
    memory = one.bytes / facts.measured.memory.peak if facts.pressure > SCARCE else 0.0
    return one.seconds / facts.phase + memory


def _from_trials(facts: Facts, tried: list[Tried]) -> Iterator[Suggestion]:
    for one in tried:
        saved, memory = one.base - one.seconds, float(one.base_peak - one.peak)
        why = "the same phase, run again with it and without, in turn"
        if abs(saved) <= max(one.noise, LEAST * one.base):
            saved = 0.0
        if one.change.threads is not None:
            why += "; it is written in front of the command"
        shorter = one.change.completion_tokens is not None
        why = "the same phase, run again with it and without, in turn"
        if shorter:
            cut = sum(n > (one.change.completion_tokens or 0) for n in facts.lengths) / len(facts.lengths)
            why += f"; {cut:.0%} of the completions were longer and would be cut off"
        yield Suggestion(
            override=one.change.override, why=why, seconds=saved, bytes=memory, basis="tried", learns=shorter
        )


def _estimates(facts: Facts, models: dict[str, Any]) -> Iterator[Suggestion]:
    stage, measured, prefix = facts.stage, facts.measured, facts.prefix
    settings, parts = stage.train, measured.memory.parts

    def estimate(override: str, why: str, seconds: float, memory: float = 0.0, learns: bool = False) -> Suggestion:
        return Suggestion(
            override=prefix + override, why=why, seconds=seconds, bytes=memory,
            basis="estimated", learns=learns,
        )  # fmt: skip

    if facts.evaluation:
        every, once = stage.evaluation.every, measured.once.evaluation or 0.0
        yield estimate(
            f"evaluation.every={4 * every}",
            f"an evaluation takes {once:.3g} s and comes every {every} phases",
            0.75 * facts.evaluation,
        )
    yield estimate(
        f"train.save_every={4 * settings.save_every}",
        f"a checkpoint takes {measured.once.checkpoint:.3g} s and comes every {settings.save_every} phases",
        0.75 * facts.checkpoint,
    )
    if settings.log_completions:
        yield estimate("train.log_completions=0", "all that is written to the log", facts.part("logging"))
    if getattr(stage.algorithm, "kl_coef", 0.0) and facts.part("reference"):
        yield estimate(
            "algorithm.kl_coef=0",
            "the reference's pass over every completion; without the KL it is another loss",
            facts.part("reference"),
            float(parts.get("weights of the reference", 0)),
            learns=True,
        )
    if stage.model.adapter is None and (share := adapter_share(models)) is not None:
        freed = (1 - share) * (parts["gradients"] + parts["optimiser"])
        yield estimate(
            "model.adapter=lora",
            f"an adapter trains {share:.1%} of the weights, and needs so much of gradients and AdamW; take about ten "
            "times the learning rate",
            (1 - share) * facts.part("optimiser"),
            freed,
            learns=True,
        )
    yield from _offload(facts, estimate)
    if (faster := faster_type(facts, models)) is not None:
        saved = facts.part("body", "backward") * (1 - 1 / faster.trained)
        saved += facts.part("reference", "scoring") * (1 - 1 / faster.scored)
        saved += facts.part("sampling") * (1 - 1 / faster.decoded)
        yield estimate(
            f"model.dtype={faster.name}",
            f"a copy of the model in it was {faster.trained:.1f} times as fast there and back over whole rows, and "
            f"{faster.decoded:.1f} times token by token; it rounds otherwise",
            saved,
            learns=True,
        )


def _offload(facts: Facts, estimate: Any) -> Iterator[Suggestion]:
    parts, settings = facts.measured.memory.parts, facts.stage.train
    if settings.offload_optimizer and facts.device.type == "cpu":
        copies = 4.0 * facts.measured.trained
        yield estimate("train.offload_optimizer=false", "there is nowhere to go on a CPU, only copies", 0.0, copies)
    elif not settings.offload_optimizer and facts.device.type == "cuda" and facts.pressure > SCARCE:
        moved = parts["gradients"] + parts["optimiser"]
        speed = copy_speed(facts.device)
        steps = facts.measured.laps[-1].work.steps
        yield estimate(
            "train.offload_optimizer=true",
            f"gradients and AdamW's state leave the device, over which {speed / 1e9:.1f} GB a second pass; the CPU's "
            "steps come on top",
            -2 * parts["gradients"] * steps / speed,
            float(moved),
        )


def adapter_share(models: dict[str, Any], section: AdapterSection | None = None) -> float | None:
    """Weights of a default adapter over all weights of the trained model; None where it is not a plain model."""
    section = section or AdapterSection()
    try:
        model = unwrap(models.get("policy", models.get("reward_model")))
    except TypeError:
        return None
    modules = dict(model.named_modules())
    added = sum(section.rank * sum(modules[name].weight.shape[:2]) for name in linear_layers(model))
    return float(added) / sum(p.numel() for p in model.parameters())


class Faster(NamedTuple):
    """Another type of weights, and how many times as fast the model's trunk is in it."""

    name: str
    trained: float
    """Forward and backward over whole rows."""
    scored: float
    """Forward over whole rows."""
    decoded: float
    """Forward over one token of each."""


def faster_type(facts: Facts, models: dict[str, Any]) -> Faster | None:
    """float32 or bfloat16, whichever the model is not in, where a copy of it is faster in that; None where it is not.

    Copies are made only where this device multiplies faster in the other type, and where there is room for them.
    """
    model = unwrap(models.get("policy", models.get("reward_model")))
    now = next(model.parameters()).dtype
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}.get(now)
    if other is None or facts.stage.model.quantization or facts.pressure > SCARCE:
        return None
    width = hidden_size(model)
    if product_seconds(width, other, facts.device) > product_seconds(width, now, facts.device) / 1.2:
        return None
    plain = copy.deepcopy(trunk(model)).eval()
    changed = copy.deepcopy(plain).to(other)
    ratios = _times_as_fast(plain, changed, facts)
    return Faster(str(other).removeprefix("torch."), *ratios) if max(ratios) > 1.1 else None


def _times_as_fast(plain: nn.Module, changed: nn.Module, facts: Facts) -> tuple[float, float, float]:
    """Of training, scoring and decoding the largest microbatch of the last phase: in turn, the best of four."""
    work = facts.measured.laps[-1].work
    rows = torch.ones(max(work.rows), max(work.widths), dtype=torch.long, device=facts.device)

    def trained(decoder: nn.Module) -> None:
        decoder(input_ids=rows, use_cache=False).last_hidden_state.sum().backward()
        decoder.zero_grad(set_to_none=True)

    @torch.no_grad()
    def scored(decoder: nn.Module, ids: Tensor) -> None:
        decoder(input_ids=ids, use_cache=False)

    ratios = []
    for work_of in (trained, partial(scored, ids=rows), partial(scored, ids=rows[:, :1])):
        turns = [[_seconds(partial(work_of, d), facts.device) for d in (plain, changed)] for _ in range(4)]
        ratios.append(min(before for before, _ in turns) / min(after for _, after in turns))
    return ratios[0], ratios[1], ratios[2]


def product_seconds(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The least time of a product like those of a layer."""
    left = torch.ones(TOKENS, width, dtype=dtype, device=device)
    right = torch.ones(width, 4 * width, dtype=dtype, device=device)
    return min(_seconds(lambda: left @ right, device) for _ in range(5))


def copy_speed(device: torch.device) -> float:
    """Bytes a second from the accelerator into pinned memory."""
    there = torch.ones(2**24, device=device)
    here = torch.empty(there.shape, pin_memory=True)
    return 4 * there.numel() / min(_seconds(lambda: here.copy_(there), device) for _ in range(3))


def _seconds(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
