"""The same number of trials for every method, on validation prompts: settings -> one run each -> a table.

    python recipes/starter/tune.py dpo grpo ppo        # eight trials a method, two at a time

The seed is none of the study's, the prompts are the validation split, and what is compared is the mean graded score;
the test split is never touched. Each method's best setting goes into its recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SEED = 7
COMMON = (
    f"seed={SEED}",
    "evaluation.prompts_per_task=50",
    "evaluation.samples=4",
    "evaluation.every=0",
    "train.save_every=1000",
)
TRIALS: dict[str, list[list[str]]] = {
    "dpo": [
        [f"algorithm.learning_rate={rate}", f"algorithm.beta={beta}"]
        for rate in ("3e-5", "1e-4", "3e-4", "6e-4")
        for beta in (0.1, 0.5)
    ],
    "grpo": [
        ["train.num_phases=20", f"algorithm.learning_rate={rate}", f"algorithm.scale={scale}"]
        for rate in ("5e-5", "1e-4", "2e-4", "4e-4")
        for scale in ("group", "none")
    ],
    "ppo": [
        ["train.num_phases=20", f"algorithm.learning_rate={rate}", f"algorithm.kl_coef={coef}"]
        for rate in ("5e-5", "1e-4", "2e-4", "4e-4")
        for coef in (0.01, 0.05)
    ],
}
"""Equally many a method: four learning rates by two values of one knob of its own; online methods at half length."""


def trial(method: str, number: int, settings: list[str]) -> tuple[str, dict[str, float], float, str]:
    """Runs one setting and returns its validation metrics and seconds; a failed run says why."""
    output = Path("runs/tune") / f"{method}-{number}"
    command = [
        sys.executable,
        "-m",
        "alignlab.cli",
        "train",
        str(HERE / f"{method}.yaml"),
        "--output",
        str(output),
        "--resume",
        "-q",
    ]
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *COMMON, *settings], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return method, {}, time.monotonic() - started, done.stderr.strip().splitlines()[-1]
    metrics = json.loads((output / "evaluation.json").read_text("utf-8"))["metrics"]
    return method, metrics, time.monotonic() - started, ""


def main(methods: list[str]) -> None:
    """Prints one row a trial as it finishes, and the best of each method at the end."""
    jobs = [(m, i, s) for m in methods or list(TRIALS) for i, s in enumerate(TRIALS[m])]
    best: dict[str, tuple[float, list[str]]] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (method, _, settings), found in zip(jobs, pool.map(lambda job: trial(*job), jobs), strict=True):
            _, metrics, seconds, error = found
            shown = " ".join(f"{k.split('/')[0]} {v:.3f}" for k, v in metrics.items() if k.endswith("/score"))
            kl = metrics.get("policy/kl_per_sequence", float("nan"))
            text = error or f"score {metrics['score']:.3f} ({shown}) KL {kl:.2f}"
            print(
                f"{method:<5} {' '.join(s.removeprefix('algorithm.') for s in settings):<44} {text}  {seconds:.0f} s",
                flush=True,
            )
            if metrics and metrics["score"] > best.get(method, (0.0, []))[0]:
                best[method] = metrics["score"], settings
    for method, (score, settings) in best.items():
        print(f"best {method}: {score:.3f} with {' '.join(settings)}")


if __name__ == "__main__":
    main(sys.argv[1:])
