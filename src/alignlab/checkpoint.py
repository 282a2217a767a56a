"""Checkpoints: models, optimisers, LoopState and every RNG <-> a folder of safetensors and JSON, bit for bit.

A checkpoint is written beside its final place, fsynced file by file, listed with hashes in `manifest.json`, and
renamed; what has no valid manifest does not exist. They are taken between phases only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.errors import UserError
from alignlab.models import HEAD_FILE, ScalarModel, load_weights, save_model
from alignlab.models.store import load_head
from alignlab.types import LoopState

FORMAT = 1
MANIFEST = "manifest.json"
MASTER = "master"
"""Beside AdamW's own tensors of a parameter: its float32 copy, where it is in half precision."""
IMPLEMENTATION = ("foreach", "fused")
"""Options of AdamW that say how it computes on this machine, not what."""


@dataclass(frozen=True)
class Found:
    """The newest usable checkpoint, and what was wrong with newer ones."""

    folder: Path | None
    skipped: tuple[str, ...] = ()


def save_checkpoint(
    folder: Path,
    *,
    state: LoopState,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    contract: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Writes `folder/phase-NNNNNN` and removes all but the newest `keep` checkpoints up to this phase.

    Args:
        models: the trained roles; of one that shares the trunk of another, only the head is saved.
        contract: what a resume must find unchanged (JSON values).

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints are intact.
    """
    final = folder / f"phase-{state.phase:06d}"
    partial = folder / f".partial-{final.name}"
    for left_by_a_kill in folder.glob(".partial-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, model in models.items():
            _save_role(name, model, models, partial)
        for name, optimizer in optimizers.items():
            _save_optimizer(optimizer, partial / f"optimizer.{name}")
        _save_rng(partial)
        _write_json(partial / "state.json", {"format": FORMAT, "state": asdict(state), "contract": dict(contract)})
        seal(partial)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be here: from a usable one a run goes on
        os.replace(partial, final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: cannot write the checkpoint ({error}); earlier ones are intact. It needs about "
            f"{_tensor_bytes(models, optimizers) / 2**20:.0f} MiB: make room, then go on with --resume"
        ) from error
    for old in [path for path in _candidates(folder) if _phase(path) <= state.phase][max(1, keep) :]:
        shutil.rmtree(old)
    return final


def seal(folder: Path, **notes: Any) -> None:
    """Fsyncs every file of a folder and writes its manifest last: sizes, sha256 sums, and what else is to be noted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        _fsync(path)
    listing = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": file_hash(p)} for p in files}
    _write_json(folder / MANIFEST, {"format": FORMAT, **notes, "files": listing})
    _fsync(folder / MANIFEST)
    for directory in {p.parent for p in files} | {folder, folder.parent}:
        _fsync(directory)


def verify(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; empty if nothing is."""
    try:
        listing = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listing.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    root = folder.resolve()
    for name, (size, sha256) in files.items():
        path = folder / name
        if path.is_symlink() or not path.resolve().is_relative_to(root):
            return f"{name} points outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_hash(path) != sha256:
            return f"{name} is damaged (its sha256 differs)"
    return ""


def find_checkpoint(folder: Path) -> Found:
    """The newest checkpoint that verifies; damaged ones are skipped and named, and nothing is deleted."""
    skipped: list[str] = []
    for candidate in _candidates(folder):
        problem = "is a symbolic link" if candidate.is_symlink() else verify(candidate) or _unlisted(candidate)
        if not problem:
            return Found(candidate, tuple(skipped))
        skipped.append(f"{candidate.name}: {problem}")
    return Found(None, tuple(skipped))


def _candidates(folder: Path) -> list[Path]:
    """What looks like a checkpoint, the newest first."""
    return sorted(
        (p for p in folder.glob("phase-*") if re.fullmatch(r"phase-\d{6,}", p.name)), key=_phase, reverse=True
    )


def _phase(path: Path) -> int:
    return int(path.name.removeprefix("phase-"))


def _unlisted(folder: Path) -> str:
    """A file that the (verified) manifest does not list was put there by somebody else."""
    listed = {MANIFEST, *json.loads((folder / MANIFEST).read_text("utf-8"))["files"]}
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())
    strange = sorted(name for name in set(found) - listed if not name.startswith("."))  # a file manager's own
    return f"{strange[0]} does not belong to it" if strange else ""


def load_checkpoint(
    folder: Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    contract: Mapping[str, Any],
) -> LoopState:
    """Restores models, optimisers and every RNG in place and returns the LoopState.

    Raises:
        UserError: the checkpoint is of another format or another run (recipe, data, model); the differences are named.
    """
    saved = json.loads((folder / "state.json").read_text("utf-8"))
    if saved["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {saved['format']}, this version reads {FORMAT}")
    before, now = saved["contract"], json.loads(json.dumps(dict(contract)))
    differing = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if differing:
        what = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in differing)
        raise UserError(f"{folder}: cannot resume, this run is not the one saved ({what}); use another --output")
    for name, model in models.items():
        _load_role(name, model, models, folder)
    for name, optimizer in optimizers.items():
        _load_optimizer(optimizer, folder / f"optimizer.{name}")
    _load_rng(folder)
    return LoopState(**saved["state"])


# ---- parts -----------------------------------------------------------------------------------------------------------


def _shares_trunk(model: nn.Module, models: Mapping[str, nn.Module]) -> bool:
    return isinstance(model, ScalarModel) and any(model.backbone is other for other in models.values())


def _save_role(name: str, model: nn.Module, models: Mapping[str, nn.Module], folder: Path) -> None:
    if not _shares_trunk(model, models):
        save_model(model, folder / name)
        return
    (folder / name).mkdir()
    tensors = {k: v.detach().cpu().contiguous() for k, v in cast(ScalarModel, model).head_tensors().items()}
    save_file(tensors, str(folder / name / HEAD_FILE))


def _load_role(name: str, model: nn.Module, models: Mapping[str, nn.Module], folder: Path) -> None:
    if _shares_trunk(model, models):
        load_head(cast(ScalarModel, model), folder / name)
    else:
        load_weights(model, folder / name)


def _tensor_bytes(models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> int:
    """Size of a checkpoint but for its small files (an upper bound: of a model with an adapter, all weights count)."""
    tensors = {id(t): t for model in models.values() for t in model.state_dict(keep_vars=True).values()}
    tensors |= {id(t): t for o in optimizers.values() for state in o.state.values() for t in state.values()}
    tensors |= {id(p): p for o in optimizers.values() for p in _masters(o).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _copies(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(what an optimiser steps, the model's parameter) wherever these are two."""
    return cast(list[tuple[nn.Parameter, nn.Parameter]], getattr(optimizer, "masters", []))


def _masters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What an optimiser steps and no model holds, the float32 copies of weights in half precision, by name.

    A copy in the weight's own type is that weight, on another device maybe, and is made from it again.
    """
    finer = {id(copy) for copy, parameter in _copies(optimizer) if copy.dtype != parameter.dtype}
    parameters = enumerate(p for group in optimizer.param_groups for p in group["params"])
    return {f"{index}.{MASTER}": p for index, p in parameters if id(p) in finer}


def _save_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    tensors: dict[str, Tensor] = {name: master.detach().cpu() for name, master in _masters(optimizer).items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, f"{stem}.safetensors")
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    _write_json(Path(f"{stem}.json"), {"param_groups": groups})


def _load_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Of an optimiser whose models have been loaded."""
    tensors, masters = load_file(f"{stem}.safetensors"), _masters(optimizer)
    if not masters.keys() <= tensors.keys():
        raise UserError(f"{stem}.safetensors: saved by a version without float32 copies of weights; start again")
    with torch.no_grad():
        for copy, parameter in _copies(optimizer):
            copy.copy_(parameter)
        for name, master in masters.items():
            master.copy_(tensors.pop(name))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    own = optimizer.state_dict()
    groups = json.loads(Path(f"{stem}.json").read_text("utf-8"))["param_groups"]
    merged = [
        {**old, **{k: v for k, v in new.items() if k not in IMPLEMENTATION}, "betas": tuple(new["betas"])}
        for old, new in zip(own["param_groups"], groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _save_rng(folder: Path) -> None:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    save_file(tensors, str(folder / "rng.safetensors"))
    _write_json(
        folder / "rng.json",
        {
            "python": {"version": version, "internal": list(internal), "gauss": gauss},
            "numpy": {"kind": kind, "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
        },
    )


def _load_rng(folder: Path) -> None:
    tensors, saved = load_file(str(folder / "rng.safetensors")), json.loads((folder / "rng.json").read_text("utf-8"))
    python, numpy_state = saved["python"], saved["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    np.random.set_state(
        (
            numpy_state["kind"],
            tensors["numpy"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached"],
        )
    )
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{i}"] for i in range(sum(k.startswith("cuda.") for k in tensors))]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", "utf-8")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle on a folder to flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
