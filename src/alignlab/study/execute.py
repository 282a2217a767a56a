"""Runs a study: plan -> one process a node, as many at a time as there are workers -> results.json, report.html."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from alignlab.errors import UserError
from alignlab.study.plan import Node, Study, nodes, plan_hash
from alignlab.tracking import write_json


@dataclass
class _Running:
    node: Node
    process: subprocess.Popen[str]
    log: Path
    started: float


def execute(study: Study, folder: Path, console: Console) -> dict[str, str]:
    """Runs every node that is not finished; returns node -> error line for those that failed.

    A failed cell does not stop the others; what waits for a failed shared stage fails with it. Ctrl-C stops all of
    them; the same command goes on where it stopped.

    Raises:
        UserError: the folder holds a study with another plan.
    """
    _claim(study, folder)
    waiting, finished = list(nodes(study)), set[str]()
    failed: dict[str, str] = {}
    running: list[_Running] = []
    total, began = len(waiting), time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // study.workers)
    try:
        while waiting or running:
            for node in list(waiting):
                broken = [n for n in node.needs if n in failed]
                if broken:
                    waiting.remove(node)
                    failed[node.name] = f"not run: {broken[0]} failed"
                elif (folder / "cells" / f"{node.name}.json").is_file():
                    waiting.remove(node)
                    finished.add(node.name)
                    console.print(f"  {node.name:<16} already finished", highlight=False)
                elif len(running) < study.workers and all(n in finished for n in node.needs):
                    waiting.remove(node)
                    running.append(_launch(node, folder, threads))
            for job in list(running):
                if job.process.poll() is None:
                    continue
                running.remove(job)
                error = _outcome(job, folder)
                if error:
                    failed[job.node.name] = error
                else:
                    finished.add(job.node.name)
                _tell(console, job, error, len(finished) + len(failed), total, time.monotonic() - began)
            time.sleep(0.05)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
    return failed


def _claim(study: Study, folder: Path) -> None:
    """A folder belongs to one plan; a restart with the same plan goes on."""
    path, identity = folder / "plan.json", plan_hash(study)
    if path.is_file() and json.loads(path.read_text("utf-8"))["plan"] != identity:
        raise UserError(
            f"{folder}: holds a study with another plan, or of another version of alignlab; choose another --output"
        )
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    write_json(path, {"plan": identity})
    write_json(folder / "study.json", study.model_dump(mode="json"))


def _launch(node: Node, folder: Path, threads: int) -> _Running:
    # -P: a file of the user's named like a module of ours must not be taken for it
    command = [sys.executable, "-P", "-m", "alignlab.study.cell", str(folder), node.name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    log = folder / "cells" / f"{node.name}.log"
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, text=True
        )  # fmt: skip
    return _Running(node, process, log, time.monotonic())


def _outcome(job: _Running, folder: Path) -> str:
    """Empty if the node finished, else one line saying why not."""
    if job.process.returncode == 0 and (folder / "cells" / f"{job.node.name}.json").is_file():
        return ""
    lines = job.log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {job.process.returncode} without a word"


def _tell(console: Console, job: _Running, error: str, done: int, total: int, elapsed: float) -> None:
    seconds = time.monotonic() - job.started
    left = elapsed / done * (total - done)
    state = f"[red]failed[/red]: {escape(error)}" if error else "finished"
    console.print(
        f"  {job.node.name:<16} {state} in {seconds:4.0f} s   {done}/{total}, about {left / 60:.0f} min left",
        highlight=False,
    )
