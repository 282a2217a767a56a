"""Where memory goes: a thread that looks at it -> its course and peak; models -> what must be in it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from alignlab.models import AdapterOff
from alignlab.timing import Clock, by_part, clock

LOOK_EVERY = 0.005
"""Seconds between two looks. What is shorter may be missed; an accelerator's own count misses nothing."""
MOST_POINTS = 400
"""Points of the course that are kept; more only make a thick line."""


@dataclass
class Watch:
    """What has been seen since the last `restart`: the resident memory, or the accelerator's."""

    device: torch.device
    course: list[tuple[float, int, str]] = field(default_factory=list)
    """(seconds, bytes, the part of the phase that was running)."""
    peak: int = 0

    def restart(self) -> None:
        self.course, self.peak = [], in_use(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def look(self, seconds: float, part: str) -> None:
        now = in_use(self.device)
        self.course.append((seconds, now, part))
        self.peak = max(self.peak, now)

    def highest(self) -> int:
        """The peak since the last restart; of an accelerator by its own count."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return max(self.peak, in_use(self.device))

    def thinned(self) -> list[tuple[float, int]]:
        """The course, each of its points the highest of those that it stands for."""
        step = max(1, -(-len(self.course) // MOST_POINTS))
        pieces = (self.course[i : i + step] for i in range(0, len(self.course), step))
        return [(piece[0][0], max(used for _, used, _ in piece)) for piece in pieces]

    def peak_part(self) -> str:
        """What was going on at the highest point."""
        return max(self.course, key=lambda point: point[1])[2] if self.course else ""


def settle(device: torch.device) -> None:
    """Gives back what has been freed, so that what is in use is what is needed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only the C library of most Linux systems has it
        ctypes.CDLL(None).malloc_trim(0)


def in_use(device: torch.device) -> int:
    """Bytes that tensors take up on an accelerator, or that the process has resident."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident()


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def capacity(device: torch.device) -> int:
    """Bytes there are at all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


@contextmanager
def watching(device: torch.device) -> Iterator[Watch]:
    """Looks at the memory from a thread of its own until the end of the block."""
    watch, over, of = Watch(device), threading.Event(), clock()
    thread = threading.Thread(target=_look_on, args=(watch, over, of), daemon=True)
    watch.restart()
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _look_on(watch: Watch, over: threading.Event, of: Clock) -> None:
    started = time.perf_counter()
    while not over.wait(LOOK_EVERY):
        (part,) = by_part({of.path: 0.0})
        watch.look(time.perf_counter() - started, part)


# ---- what must be there ----------------------------------------------------------------------------------------------


def weight_bytes(models: Mapping[str, Any], device: torch.device) -> dict[str, int]:
    """Role -> bytes of its weights on the device, without those that an earlier role shares."""
    seen: set[int] = set()
    found = {}
    for role, model in models.items():
        module = model.policy if isinstance(model, AdapterOff) else model
        if isinstance(module, nn.Module):
            found[role] = _own_bytes([*module.parameters(), *module.buffers()], device, seen)
    return found


def training_bytes(
    optimizers: Mapping[str, torch.optim.Optimizer], models: Mapping[str, Any], device: torch.device
) -> dict[str, int]:
    """Bytes on the device that training adds to weights: gradients, and AdamW's moments and copies of weights.

    Of optimisers that have taken a step. A role that has not started has no moments yet.
    """
    held = {id(p) for m in models.values() if isinstance(m, nn.Module) for p in m.parameters()}
    stepped = [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    moments = [t for o in optimizers.values() for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
    copies = [p for p in stepped if id(p) not in held]
    return {
        "gradients": _own_bytes(stepped, device, set(), shared=True),
        "optimiser": _own_bytes([*moments, *copies], device, set()),
    }


def _own_bytes(tensors: list[Any], device: torch.device, seen: set[int], *, shared: bool = False) -> int:
    """Bytes of tensors on a device, each memory once; `shared`: counted by their shape, as their like will be."""
    total = 0
    for tensor in tensors:
        if tensor.device.type != device.type:
            continue
        storage = tensor.untyped_storage()
        if shared:
            total += tensor.numel() * tensor.element_size()
        elif storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
