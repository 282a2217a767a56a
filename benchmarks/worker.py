"""One side of one case in a process of its own: a line on standard input is its turn, a line of JSON its answer.

python -m benchmarks.worker JOB-AS-JSON
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cases import Case
from benchmarks.floor import allow

Side = Literal["ours", "trl", "trl defaults"]
Turn = Callable[[], bool]
"""Waits for the side's turn; whether the step that follows is to be split exactly, at the price of some speed."""
Report = Callable[[dict[str, float], Iterable[str]], None]
"""What a step measured, and the names of what it logged."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told to do."""

    side: Side
    case: Case
    model: Path
    folder: Path
    """For whatever the side writes."""
    steps: int
    """More than it will ever be given turns for, so that no side comes to its end."""
    device: str = "cpu"
    precision: str = "float32"

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "model": str(self.model), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        content: dict[str, Any] = json.loads(text)
        case = Case.from_json(json.dumps(content["case"]))
        return cls(**{**content, "case": case, "model": Path(content["model"]), "folder": Path(content["folder"])})


def peak_rss_mb() -> float:
    """The largest resident size of this very process, in MB.

    `ru_maxrss` starts at what the parent had before this program began, so it only stands in where /proc is missing.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def synchroniser(device: str) -> Callable[[], None]:
    """What waits until the device has done all that it was given; nothing to do on a CPU."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def main() -> None:
    job = Job.from_json(sys.argv[1])
    cuda = job.device.startswith("cuda")
    answers = os.fdopen(os.dup(1), "w")  # the trainers may print; what they print goes to standard error
    os.dup2(2, 1)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    allow(job.precision)
    if job.side == "ours":
        from benchmarks.ours import run
    else:
        from benchmarks.peer import run

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    def turn() -> bool:
        answer({"ready": True})
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return line.strip() == "split"

    def report(numbers: dict[str, float], logged: Iterable[str]) -> None:
        memory = {"rss_mb": peak_rss_mb()}
        if cuda:
            memory["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
        answer({"numbers": {**numbers, **memory}, "logged": sorted(logged)})

    run(job, turn, report)


if __name__ == "__main__":
    main()
