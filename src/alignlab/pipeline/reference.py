"""The reference's logprobs of a run's rows, computed once and kept: reference, rows -> {row: (N,) logprobs} and a file.

What an offline method needs of its reference is known before training: the rows of all its phases, a pure function of
the seed. They are computed for all of them at once, in an order and in microbatches of their own, so a resumed run,
another stage and another process find the same numbers. The file is known by everything that decides them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignlab.algorithms import numbers_dtype
from alignlab.forward import score
from alignlab.models import AdapterOff, Model, unwrap
from alignlab.pipeline.identity import code_fingerprint
from alignlab.rollout import Source
from alignlab.types import LoopState, Row

FORMAT = 1
ADAPTER_PARAMETER = ".lora_"
"""What a name of an adapter's own weights contains; the adapter-off view of a model does not depend on them."""


@runtime_checkable
class UsesReference(Protocol):
    """A method whose reference logprobs can be computed before training."""

    def reference_rows(self, source: Source, state: LoopState) -> Sequence[Row]:
        """The rows of a phase whose reference logprobs it needs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A source that brings reference logprobs along, and what they cost when they were computed."""

    source: Source
    seconds: float


def fill_reference(
    source: Source,
    algorithm: UsesReference,
    reference: Model,
    *,
    seed: int,
    num_phases: int,
    cache: Path,
    say: Callable[[str], None],
) -> Filled:
    """The source with the reference's logprobs of every row of the run's phases, from the cache or computed into it.

    A file that is damaged or belongs to something else is computed again; one that cannot be written is done without.
    """
    rows = run_rows(source, algorithm, seed, num_phases)
    key = reference_key(source, reference, rows)
    path = cache / "reference" / f"{key}.safetensors"
    kept, problem = _read(path, key, rows, numbers_dtype(reference))
    if kept is None:
        say(f"reference: {problem}computing its logprobs of {len(rows)} rows")
        started = time.perf_counter()
        logprobs = compute(source, reference, rows)
        seconds = time.perf_counter() - started
        say(f"reference: took {seconds:.1f} s; {_write(path, key, logprobs, seconds)}")
    else:
        logprobs, seconds = kept
        say(f"reference: its logprobs of {len(rows)} rows are from {path}")
    pieces = torch.split(logprobs, [len(row.completion_ids) for row in rows])
    return Filled(source=replace(source, reference=dict(zip(rows, pieces, strict=True))), seconds=seconds)


def run_rows(source: Source, algorithm: UsesReference, seed: int, num_phases: int) -> list[Row]:
    """Every row of the run once, in the order in which `Source.plan_rows` takes them, whatever order they came in."""
    states = (LoopState(seed=seed, phase=phase) for phase in range(num_phases))
    rows = {row for state in states for row in algorithm.reference_rows(source, state)}
    return sorted(rows, key=lambda row: (-len(row), row.prompt_ids, row.completion_ids))


@torch.no_grad()
def compute(source: Source, reference: Model, rows: Sequence[Row]) -> Tensor:
    """(total completion tokens,) logprobs on the CPU, row after row; the rows have to be as `run_rows` gives them."""
    batches = source.plan_rows(rows)
    return torch.cat([score(reference, batch).logprobs[batch.completion_mask].cpu() for batch in batches])


def reference_key(source: Source, reference: Model, rows: Sequence[Row]) -> str:
    """A hash of everything that decides the numbers: weights, kernels, code, rows (so the template), microbatches."""
    model = unwrap(reference)
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}  # where it lies means nothing
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.prompt_ids}{row.completion_ids}\n".encode())
    parts = {
        "format": FORMAT,
        "weights": weights_fingerprint(reference),
        "class": type(model).__name__,
        "config": config,
        "attention": model.config._attn_implementation,
        "rows": digest.hexdigest(),
        "pad_id": source.template.pad_id,
        "microbatch_rows": source.limits.microbatch_rows,
        "device": source.device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "code": code_fingerprint(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(model: Model) -> str:
    """sha256 over names, types, shapes and bytes of all weights, with the scales of those kept in 4 or 8 bits."""
    module: Any = model.policy if isinstance(model, AdapterOff) else model
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor) or (isinstance(model, AdapterOff) and ADAPTER_PARAMETER in name):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ---- the file --------------------------------------------------------------------------------------------------------


def _read(path: Path, key: str, rows: Sequence[Row], dtype: torch.dtype) -> tuple[tuple[Tensor, float] | None, str]:
    """(logprobs, seconds they took), or None and what is wrong with the file (nothing where there is none)."""
    if not path.is_file():
        return None, ""
    try:
        with safe_open(str(path), framework="pt") as file:
            # a copy: the tensor is a window on the file, and a file that shrinks under it kills the process
            said, logprobs = file.metadata() or {}, file.get_tensor("logprobs").clone()
        seconds, whole = float(said["seconds"]), said["sha256"] == hashlib.sha256(_bytes(logprobs)).hexdigest()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        return None, f"{path} is damaged ({type(error).__name__}); "
    expected = (sum(len(row.completion_ids) for row in rows),)
    if not whole or said.get("key") != key or logprobs.dtype != dtype or tuple(logprobs.shape) != expected:
        return None, f"{path} is damaged; "
    return (logprobs, seconds), ""


def _write(path: Path, key: str, logprobs: Tensor, seconds: float) -> str:
    """Writes the file beside its place and renames it, so that nobody ever reads half of one; what to say about it."""
    partial = path.with_name(f".{path.stem[:16]}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    said = {"key": key, "seconds": repr(seconds), "sha256": hashlib.sha256(_bytes(logprobs)).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": logprobs.contiguous()}, str(partial), metadata=said)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        return f"{path} cannot be written ({error}), so the next run computes them again"
    return f"kept in {path}"
