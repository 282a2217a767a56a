"""Results as JSON beside the code, a file for each device and precision: written after every case, so a run cut short
loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

Kind = Literal["cases", "defaults", "scaling"]
"""cases: beside the tuned peer; defaults: beside the peer as it comes; scaling: series of ours, or of the peer's."""
DEVICES = ("cpu", "cuda")


def device_kind(device: str) -> str:
    """`cuda:1` -> `cuda`."""
    return device.partition(":")[0]


def usual_precision(device: str) -> str:
    """What is measured on a device unless another is asked for."""
    return "bfloat16" if device_kind(device) == "cuda" else "float32"


def title(device: str, precision: str) -> str:
    """`cpu`, or `cpu-bfloat16` where the precision is not the device's usual one: what results are known by."""
    kind = device_kind(device)
    return kind if precision == usual_precision(device) else f"{kind}-{precision}"


def path(title: str, folder: Path | None = None) -> Path:
    """The file of these results; beside the code unless a folder is given."""
    return (folder or Path(__file__).parent) / f"results-{title}.json"


def load(file: Path) -> dict[str, Any]:
    """What the file holds; empty where there is none."""
    content: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {kind: content.get(kind, {}) for kind in ("cases", "defaults", "scaling")}


def merged(results: dict[str, Any], kind: Kind, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """The results with one record in place of the one of that name; all others as they were."""
    return {**results, kind: {**results[kind], name: record}}


def save(file: Path, kind: Kind, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Adds one record to the file, whole or not at all, and gives what the file then holds."""
    results = merged(load(file), kind, name, record)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    os.replace(partial, file)
    return results
