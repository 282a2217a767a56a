"""One side of one case in a process of its own: a line on standard input is its turn, a line of JSON its answer.

python -m benchmarks.worker SIDE CASE-AS-JSON MODEL FOLDER STEPS DEVICE
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch

from benchmarks.cases import Case


def main() -> None:
    side, case, model, folder, steps, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # the trainers may print; what they print goes to standard error
    os.dup2(2, 1)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    if side == "ours":
        from benchmarks.ours import run
    else:
        from benchmarks.peer import run

    def answer(content: dict[str, float | str]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    def turn() -> None:
        answer({"ready": 1.0})
        if not sys.stdin.readline():
            raise SystemExit(0)

    def report(numbers: dict[str, float]) -> None:
        numbers["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if torch.cuda.is_available():
            numbers["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
        answer(dict(numbers))

    run(Case.from_json(case), Path(model), Path(folder), int(steps), turn, report, device)


if __name__ == "__main__":
    main()
