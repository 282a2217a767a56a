"""Runs for tests: the command line in this process or in its own, a model small enough to train in no time, and what a
run folder holds."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from alignlab import cli, starter

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
SCRIPT = Path(sys.executable).parent / "alignlab"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that say what is wrong."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def alignlab(*arguments: str | Path, cwd: Path | None = None) -> Finished:
    """`alignlab ARGUMENTS` through the real entry point, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler, path = signal.getsignal(signal.SIGTERM), list(sys.path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["alignlab", *map(str, arguments)]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            signal.signal(signal.SIGTERM, handler)
            sys.path[:] = path
    return Finished(code, out.getvalue(), err.getvalue())


def _heed_ctrl_c() -> None:
    """A background job's children ignore SIGINT from birth; the command under test must not inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_alignlab(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """`alignlab ARGUMENTS` as a user starts it: the installed script, in a process of its own."""
    return subprocess.Popen(
        [str(SCRIPT), *map(str, arguments)], cwd=cwd, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        preexec_fn=_heed_ctrl_c,
    )  # fmt: skip


def run_alignlab(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Finished:
    """The same, to its end."""
    process = start_alignlab(*arguments, cwd=cwd, **environment)
    out, err = process.communicate(timeout=300)
    return Finished(process.returncode, out, err)


def small_model(folder: Path) -> Path:
    """A model folder with the starter's tokenizer and a trunk of two tiny layers, random but the same every time."""
    for file in starter.ASSETS.iterdir():
        if file.suffix in (".json", ".jinja"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(starter.ASSETS)
    for name, value in SMALL.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def shared_folder() -> Path:
    """A temporary folder of this test run, the same for all of its workers."""
    own = Path(os.environ["ALIGNLAB_CACHE"]).parent
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared-by-tests"
    folder.mkdir(exist_ok=True)
    return folder


def debug_cache() -> Path:
    """Where the runs of `debug_run` keep the stages that they start from."""
    return shared_folder() / "cache"


@functools.cache
def debug_run(recipe: str, *overrides: str) -> Path:
    """The folder of a finished `alignlab train RECIPE --debug`, made once a test run; leave it as it is."""
    name = "-".join([Path(recipe).stem, *(part.replace("/", "_") for part in overrides)])
    folder = shared_folder() / name
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.done").exists():
            with mock.patch.dict(os.environ, {"ALIGNLAB_CACHE": str(debug_cache())}):
                result = alignlab("train", RECIPES / recipe, *overrides, "--debug", "--output", folder)
            assert result.code == 0, result.err
            Path(f"{folder}.done").touch()
    return folder


def strict_json(text: str) -> Any:
    """JSON as every language reads it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file, strictly."""
    text = path.read_text("utf-8")
    assert not text or text.endswith("\n")
    return [strict_json(line) for line in text.split("\n")[:-1]]


def write_rows(path: Path, content: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def metric_keys(folder: Path) -> Iterator[str]:
    """Every metric name in the logs and evaluations below a folder."""
    for path in [*folder.rglob("log_history.jsonl"), *folder.rglob("ppo_metrics.jsonl")]:
        for row in rows(path):
            yield from row
    for path in folder.rglob("evaluation.json"):
        content = strict_json(path.read_text("utf-8"))
        yield from content.get("metrics", {})
        yield from content.get("intervals", {})
        yield from (f"ledger/{name}" for name in content["ledger"])
