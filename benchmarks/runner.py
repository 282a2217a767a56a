"""Workers in turn: jobs -> a process each -> their steps one after the other -> medians, ratios and what was logged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import BY_NAME, Case, make_model
from benchmarks.floor import Machine, floor
from benchmarks.worker import Job, Side

ROOT = Path(__file__).resolve().parents[1]
PEERLESS = {"ppo": "grpo"}
"""Methods that the peer has dropped, and ours that they are held against."""
PARTS = ("sampling", "rewards", "reference", "scoring", "loss", "backward", "optimiser")
"""Of a step; what is in none of them is preparing data and logging."""
EXACT_ROUNDS = 3
"""Further rounds on an accelerator, in which parts end only when the device is done: only these are split by part."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How everything of one command is measured."""

    folder: Path
    """For models, data and logs."""
    rounds: int = 7
    warmup: int = 1
    threads: int = 1
    device: str = "cpu"
    precision: str = "float32"

    @property
    def exact_rounds(self) -> int:
        return EXACT_ROUNDS if self.device.startswith("cuda") else 0

    @property
    def steps(self) -> int:
        """Steps of a worker's run: one more than it gets turns for."""
        return self.rounds + self.warmup + self.exact_rounds + 1


class WorkerFailed(RuntimeError):
    """A side that came to no result: where its log is, and how it ends."""


@dataclass
class Measured:
    """What one side's rounds gave, the warm-up left out."""

    rows: list[dict[str, float]] = field(default_factory=list)
    exact: list[dict[str, float]] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """Medians: seconds, seconds by part, tokens, memory; and every round's seconds."""
        found, split = medians(self.rows), medians(self.exact or self.rows)
        return {
            "seconds": found["seconds"],
            "parts": {part: split[part] for part in PARTS if part in split},
            "split_seconds": split["seconds"],
            **{k: v for k, v in found.items() if k.endswith(("_tokens", "_rows"))},
            "memory_mb": max(row.get("cuda_mb", row["rss_mb"]) for row in self.rows),
            "rounds": [row["seconds"] for row in self.rows],
            "logged": sorted(self.logged),
        }


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each number, over the rows that have it."""
    return {
        key: median(row[key] for row in rows if key in row) for key in dict.fromkeys(k for row in rows for k in row)
    }


class Worker:
    """One side in its own process."""

    def __init__(self, job: Job, label: str, threads: int) -> None:
        self.label, self.log = label, job.folder.with_suffix(".log")
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        environment = {**os.environ, **visible(job.device, os.environ.get("CUDA_VISIBLE_DEVICES")),
                       "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
                       "ALIGNLAB_CACHE": str(job.folder / "cache"), "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1"}  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", job.to_json()], env=environment, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            last = self.log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
            raise WorkerFailed(f"{self.label} failed ({''.join(last)[:300]}); its log is {self.log}")
        content: dict[str, Any] = json.loads(line)
        return content

    def step(self, *, exact: bool = False) -> dict[str, Any]:
        """Takes one turn: the numbers of its step, and the names of what it logged."""
        assert self.process.stdin is not None
        self.process.stdin.write("split\n" if exact else "go\n")
        self.process.stdin.flush()
        answer = self._read()
        self._read()  # ready for the next
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def visible(device: str, given: str | None) -> dict[str, str]:
    """Accelerators that a worker sees: none on the CPU, else the measured one (trl takes all it sees)."""
    if not device.startswith("cuda"):
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = int(device.partition(":")[2] or 0)
    return {"CUDA_VISIBLE_DEVICES": given.split(",")[index] if given else str(index)}


def interleave(jobs: Mapping[str, Job], setting: Setting) -> dict[str, Measured]:
    """All jobs side by side, one step of each in every round, in the other order in every other round.

    Raises:
        WorkerFailed: one of them broke off.
    """
    workers: dict[str, Worker] = {}
    found = {name: Measured() for name in jobs}
    try:
        for name, job in jobs.items():
            workers[name] = Worker(job, name, setting.threads)
        for number in range(setting.warmup + setting.rounds + setting.exact_rounds):
            exact = number >= setting.warmup + setting.rounds
            for name in list(jobs) if number % 2 == 0 else reversed(list(jobs)):
                answer, measured = workers[name].step(exact=exact), found[name]
                measured.logged |= set(answer["logged"])
                if number >= setting.warmup:
                    (measured.exact if exact else measured.rows).append(answer["numbers"])
    finally:
        for worker in workers.values():
            worker.close()
    return found


def job(side: Side, case: Case, label: str, setting: Setting) -> Job:
    """The job of one side of a case, its model made if it is not there yet."""
    model = make_model(case, setting.folder / "models" / case.model)
    return Job(
        side=side, case=case, model=model, folder=setting.folder / label / side.replace(" ", "-"), steps=setting.steps,
        device="cuda" if setting.device.startswith("cuda") else setting.device, precision=setting.precision,
    )  # fmt: skip


def compare(case: Case, machine: Machine, setting: Setting, *, defaults: bool = False) -> dict[str, Any]:
    """Both sides of a case in turn: a record as the results hold it.

    Args:
        defaults: the peer with its own defaults.
    """
    against, side = opponent(case, defaults=defaults)
    jobs = {
        f"{case.name}, ours": job("ours", case, case.name, setting),
        f"{against.name}, {side}": job(side, against, f"{case.name}-against-{against.name}", setting),
    }
    ours, peer = (found.to_json() for found in interleave(jobs, setting).values())
    ratios = [p / o for o, p in zip(ours["rounds"], peer["rounds"], strict=True)]
    sampled = ours["sampled_tokens"] / ours["sampled_rows"] if case.sampled else None
    return {
        "case": json.loads(case.to_json()),
        "against": f"ours, {against.name}" if side == "ours" else side,
        "ours": ours,
        "peer": peer,
        "ratio": median(ratios),
        "ratios": ratios,
        "memory_ratio": ours["memory_mb"] / peer["memory_mb"],
        "kernels": kernels(next(iter(jobs.values()))),
        "floor": floor(case, machine, sampled),
    }


def kernels(job: Job) -> bool:
    """Whether our side ran with its loops in C, which float32 on a CPU uses where they can be built."""
    said = job.folder / "run" / "provenance.json"
    there = said.is_file() and json.loads(said.read_text("utf-8"))["machine"]["kernels"]
    return bool(there) and job.device == "cpu" and job.precision == "float32"


def opponent(case: Case, *, defaults: bool = False) -> tuple[Case, Side]:
    """What a case is held against: the peer's case, or our own of another method where the peer has dropped it."""
    if case.method in PEERLESS:
        return BY_NAME[f"{PEERLESS[case.method]}-{case.shape}"], "ours"
    return case, "trl defaults" if defaults else "trl"
