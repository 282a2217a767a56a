"""What a stage is: its folder, its cost, and its key, a hash of everything that decides its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import alignlab
from alignlab import registry, starter
from alignlab.checkpoint import file_hash, verify
from alignlab.data.prepared import data_files, is_folder
from alignlab.errors import UserError
from alignlab.models import location
from alignlab.recipe import ModelSection, Stage, read_mapping

DONE = "stage.json"
"""Written last: a folder with it is a finished stage."""
KNOWN_BY_CONTENT = ("model.name", "data.path", "data.validation_path")
"""Settings that are paths: what they lead to is hashed, where it lies does not matter."""
ONLY_WHERE = ("train.offload_optimizer",)
"""Settings that say where something is done: a resumed run may have others."""


class NotTrained(UserError):
    """A stage that another one needs is not there, and nobody is to train it now."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: its folder, its key, and what it cost."""

    folder: Path
    key: str
    kind: str
    """`policy` or `reward_model`."""
    ledger: dict[str, float]
    cached: bool = False

    @property
    def model(self) -> Path:
        return self.folder / self.kind


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen policy that a stage distils: what a stage made, or a model as it is."""

    name: str
    """What a recipe calls it: a run folder, or the model's name."""
    model: str
    """Where its weights are: a folder, or a hub id."""
    key: str
    """The key of the stage that made it, or a hash of the model's files."""


def makes(stage: Stage) -> str:
    """What a stage leaves behind: `policy` or `reward_model`."""
    role = stage.method.models().get("reward_model")
    return "reward_model" if role is not None and role.trained else "policy"


def require_kind(reference: str, made: str, kind: str) -> None:
    """Refuses a stage, recipe or run that does not give what is needed of it."""
    if made != kind:
        raise UserError(f"{reference}: gives a {made}, but a {kind} is needed here")


def finished_folder(run: Path, kind: str) -> Path:
    """The last finished stage of a run folder that made a policy, or a reward model.

    Raises:
        UserError: there is none.
    """
    recipe = run / "recipe.yaml"
    staged = recipe.is_file() and not (run / DONE).is_file()
    folders = [run / str(stage.get("name")) for stage in read_mapping(recipe).get("stages", [])] if staged else [run]
    for folder in reversed(folders):
        if (folder / DONE).is_file() and (folder / kind).is_dir():
            return folder
    raise UserError(f"{run}: not a finished run with a {kind}; train it first (a model folder is named in model)")


def finished_stage(folder: Path, key: str) -> StageResult | None:
    if not (folder / DONE).is_file():
        return None
    result = read_done(folder)
    if result.key != key:
        raise UserError(f"{folder}: holds a finished stage of another recipe, data or model; choose another --output")
    return result


def read_done(folder: Path) -> StageResult:
    """A finished stage as it was recorded.

    Raises:
        UserError: its record or its model is damaged.
    """
    result = read_record(folder)
    if problem := verify(result.model):
        raise UserError(f"{result.model}: {problem}; delete {folder} and train it again")
    return result


def read_record(folder: Path) -> StageResult:
    """The same without a look at the model's files.

    Raises:
        UserError: its record is damaged.
    """
    try:
        done = json.loads((folder / DONE).read_text("utf-8"))
        return StageResult(folder=folder, key=done["key"], kind=done["kind"], ledger=done["ledger"], cached=True)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / DONE}: damaged; delete {folder} and train it again") from error


def stage_key(
    stage: Stage, seed: int, start: StageResult | None, reward_stage: StageResult | None, teacher: Teacher | None = None
) -> tuple[str, dict[str, Any]]:
    """A hash of everything that decides a stage's weights, and the same as named parts (what a resume must find)."""
    dependencies = {"name", "start", "reward_model", "teacher"}
    settings = _flat(stage.model_dump(mode="json", serialize_as_any=True, exclude=dependencies))
    settings = {k: v for k, v in settings.items() if k not in KNOWN_BY_CONTENT}
    settings = rewards_by_content(stage, settings)
    parts = settings | {
        "seed": seed,
        "start": start.key if start else model_fingerprint(stage.model),
        "reward_model": reward_stage.key if reward_stage else None,
        "teacher": teacher.key if teacher else None,
        "data": data_fingerprint(stage),
    }
    full = {**parts, "code": code_fingerprint()}
    parts = {k: v for k, v in parts.items() if k not in ONLY_WHERE}
    return hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest(), parts


def rewards_by_content(stage: Stage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the files that rewards' options name by their content, and without what changes no value."""
    known = dict(settings)
    for name, entry in stage.reward.items():
        module = registry.resolve("rewards", name) if name in registry.names("rewards") else None
        for key in ("timeout", *getattr(module, "ONLY_HOW", ())):
            known.pop(f"reward.{name}.{key}", None)
        for key in getattr(module, "FILES", ()):
            path = Path(str(entry.options.get(key) or "")).expanduser()
            if entry.options.get(key) and path.exists():
                files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
                known[f"reward.{name}.{key}"] = _hash_files(files) if files else file_hash(path)
    return known


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, below in value.items() for k, v in _flat(below, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def model_fingerprint(model: ModelSection) -> str:
    folder = Path(location(model.name))
    if not folder.is_dir():
        return f"{model.name}@{model.revision or 'main'}"
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    if model.weights == "random":
        files = [p for p in files if p.suffix != ".safetensors"]
    return _hash_files(files)


def data_fingerprint(stage: Stage) -> str:
    """sha256 over the data files of a stage; a hub set is known by its name, revision is the hub's."""
    data = stage.data
    if data.path and Path(data.path).expanduser().is_file():
        named = (Path(path).expanduser() for path in (data.path, data.validation_path) if path)
        return _hash_files([path for path in named if path.is_file()])  # what is missing is said when it is read
    if is_folder(data.path):
        return _hash_files(data_files(Path(str(data.path)).expanduser()))
    if data.path or data.hub:
        return f"{data.path or data.hub}/{data.hub_config}/{data.split}"
    return _hash_files(sorted(p for task in data.task for p in (starter.DATA / task).glob("*.jsonl")))


@cache
def code_fingerprint() -> str:
    """sha256 over the package's sources that can change a weight or a score, as they are when a process first asks."""
    root = Path(alignlab.__file__).parent
    outside = {"study", "cli", "serving", "export.py", "doctor", "profile"}
    sources = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c"))
    return _hash_files([p for p in sources if p.relative_to(root).parts[0] not in outside])


def _hash_files(files: Sequence[Path]) -> str:
    joined = "\n".join(f"{p.name} {file_hash(p)}" for p in files)
    return hashlib.sha256(joined.encode()).hexdigest()
