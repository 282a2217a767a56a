"""python -m benchmarks: see the package."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import BY_NAME, Case, make_model
from benchmarks.floor import Machine, floor, measure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: make bench -->", "<!-- /measured -->"
PEERLESS = {"ppo": "grpo"}
"""Methods that the peer has dropped, and ours that they are held against."""


class Worker:
    """One side in its own process."""

    def __init__(self, side: str, case: Case, folder: Path, steps: int, device: str, threads: int) -> None:
        self.log = folder / f"{case.name}-{side}.log"
        model = make_model(case.shape, folder / "models" / case.shape)
        place = folder / case.name / side
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.worker", side, case.to_json(), str(model), str(place), str(steps),
                   device]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
                       "ALIGNLAB_CACHE": str(place / "cache"), "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1"}  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("wb"), env=environment,
            cwd=ROOT, text=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SystemExit(f"a worker failed; its log is {self.log}:\n{self.log.read_text('utf-8')[-2000:]}")
        content: dict[str, float] = json.loads(line)
        return content

    def step(self) -> dict[str, float]:
        """Takes one turn: the numbers of its step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        numbers = self._read()
        self._read()  # ready for the next
        return numbers

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(case: Case, folder: Path, rounds: int, warmup: int, device: str, threads: int) -> dict[str, Any]:
    """Both sides step in turn; medians over the rounds after the first `warmup`."""
    against = case if case.method not in PEERLESS else BY_NAME[f"{PEERLESS[case.method]}-{case.shape}"]
    other = "trl" if case.method not in PEERLESS else "ours"
    steps = rounds + warmup + 1
    sides = {
        "ours": Worker("ours", case, folder, steps, device, threads),
        "peer": Worker(other, against, folder, steps, device, threads),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for _ in range(warmup + rounds):
            for name, worker in sides.items():
                found[name].append(worker.step())
    finally:
        for worker in sides.values():
            worker.close()
    kept = {name: rows[warmup:] for name, rows in found.items()}
    ratios = [p["seconds"] / o["seconds"] for o, p in zip(kept["ours"], kept["peer"], strict=True)]
    memory = "cuda_mb" if "cuda_mb" in kept["ours"][-1] else "rss_mb"
    return {
        "case": json.loads(case.to_json()),
        "against": f"ours, {against.name}" if other == "ours" else "trl",
        **{name: _medians(rows) for name, rows in kept.items()},
        "ratio": median(ratios),
        "ratios": ratios,
        "memory_ratio": kept["ours"][-1][memory] / kept["peer"][-1][memory],
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(row[key] for row in rows if key in row) for key in rows[-1]}


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}


def table(results: dict[str, Any]) -> str:
    """The rows of the docs' page."""
    lines = ["| step | ours, s | peer, s | **ratio** | range | floor, s | memory, MB | memory ratio |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in results["cases"].items():
        o, p = r["ours"], r["peer"]
        memory = "cuda_mb" if "cuda_mb" in o else "rss_mb"
        lines.append(
            f"| {name} | {o['seconds']:.3g} | {p['seconds']:.3g} | **{r['ratio']:.2f}** | "
            f"{min(r['ratios']):.2f} to {max(r['ratios']):.2f} | {r['floor']:.3g} | "
            f"{o[memory]:.0f} / {p[memory]:.0f} | {r['memory_ratio']:.2f} |"
        )
    m = results["machine"]
    about = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines += ["", f"{m['name']}, {m['threads']} thread(s), {m['gflops']:.0f} Gflop/s in matrix products, "
              f"{m['gbytes']:.1f} GB/s read; {about}; {results['rounds']} rounds in turn."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="alignlab beside trl")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(BY_NAME)}; all when none is named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="for models, data and logs")
    parser.add_argument("--write", action="store_true", help="results.json and the table in docs/performance.md")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in BY_NAME]
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(BY_NAME)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    machine = measure(torch.device(arguments.device))
    path = Path(__file__).with_name(f"results-{arguments.device}.json")
    results: dict[str, Any] = {
        "versions": versions(),
        "rounds": arguments.rounds,
        "machine": {"name": platform.processor() or platform.machine(), "threads": arguments.threads,
                    "gflops": machine.flops / 1e9, "gbytes": machine.bandwidth / 1e9},
        "cases": {},
    }  # fmt: skip
    for name in arguments.cases or BY_NAME:
        case = BY_NAME[name]
        found = compare(case, folder, arguments.rounds, arguments.warmup, arguments.device, arguments.threads)
        results["cases"][name] = {**found, "floor": floor(case, Machine(machine.flops, machine.bandwidth))}
        print(table({**results, "cases": {name: results["cases"][name]}}).splitlines()[2], flush=True)
        print("   ", {k: round(v, 3) for k, v in found["ours"].items()}, flush=True)
        print("   ", {k: round(v, 3) for k, v in found["peer"].items()}, flush=True)
    if arguments.write:
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        page = PAGE.read_text("utf-8")
        block = f"{BEGIN}\n{table(results)}\n{END}"
        PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, page, flags=re.S), "utf-8")


if __name__ == "__main__":
    main()
