"""Checkpoints: models, optimisers, LoopState and every RNG <-> a folder of safetensors and JSON, bit for bit.

A checkpoint is written beside its final place, fsynced file by file, listed with hashes in `manifest.json`, and renamed;
what has no valid manifest does not exist. They are taken between phases only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.errors import UserError
from alignlab.models import load_weights, save_model
from alignlab.types import LoopState

FORMAT = 1
MANIFEST = "manifest.json"


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
    """Writes `folder/phase-NNNNNN` and removes all but the newest `keep` checkpoints.

    Args:
        models: the trained roles; a trunk shared with another role is saved with the first.
        contract: what a resume must find unchanged.
    """
    final = folder / f"phase-{state.phase:06d}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, model in models.items():
        save_model(model, partial / name)
    for name, optimizer in optimizers.items():
        _save_optimizer(optimizer, partial / f"optimizer.{name}")
    _save_rng(partial)
    _write_json(partial / "state.json", {"format": FORMAT, "state": asdict(state), "contract": dict(contract)})
    seal(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _fsync(folder)
    for old in sorted(folder.glob("phase-*"))[: -max(1, keep)]:
        shutil.rmtree(old)
    return final


def seal(folder: Path) -> None:
    """Fsyncs every file of a folder and writes its manifest of sizes and sha256 sums last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        _fsync(path)
    listing = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": file_hash(p)} for p in files}
    _write_json(folder / MANIFEST, {"format": FORMAT, "files": listing})
    _fsync(folder / MANIFEST)
    for directory in {p.parent for p in files} | {folder}:
        _fsync(directory)


def verify(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; empty if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable manifest ({type(error).__name__})"
    for name, expected in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or path.is_symlink():
            return f"{name} points outside the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or file_hash(path) != expected["sha256"]:
            return f"{name} is damaged"
    return ""


def find_checkpoint(folder: Path) -> Found:
    """The newest checkpoint that verifies; damaged ones are skipped and named."""
    skipped: list[str] = []
    for candidate in sorted(folder.glob("phase-*"), reverse=True):
        problem = verify(candidate)
        if not problem:
            return Found(candidate, tuple(skipped))
        skipped.append(f"{candidate.name}: {problem}")
    return Found(None, tuple(skipped))


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
    differing = [k for k in sorted({*contract, *saved["contract"]}) if contract.get(k) != saved["contract"].get(k)]
    if differing:
        what = "; ".join(f"{k}: {saved['contract'].get(k)!r} -> {contract.get(k)!r}" for k in differing)
        raise UserError(f"{folder}: cannot resume, this run is not the one saved ({what}); use another --output")
    for name, model in models.items():
        load_weights(model, folder / name)
    for name, optimizer in optimizers.items():
        _load_optimizer(optimizer, folder / f"optimizer.{name}")
    _load_rng(folder)
    return LoopState(**saved["state"])


# ---- parts -----------------------------------------------------------------------------------------------------------


def _save_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    tensors: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, f"{stem}.safetensors")
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    _write_json(Path(f"{stem}.json"), {"param_groups": groups})


def _load_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    tensors = load_file(f"{stem}.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    own = optimizer.state_dict()
    groups = json.loads(Path(f"{stem}.json").read_text("utf-8"))["param_groups"]
    merged = [{**old, **new, "betas": tuple(new["betas"])} for old, new in zip(own["param_groups"], groups, strict=True)]
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
