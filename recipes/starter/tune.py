"""The same number of trials for every method, on validation prompts: settings -> one run each -> a table.

    python recipes/starter/tune.py dpo grpo ppo        # four trials a method, seed 7, two at a time

The seed is none of the study's, the prompts are the validation split, and what is compared is the mean graded score; the
test split is never touched. Each method's best setting goes into its recipe.
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
    f"seed={SEED}", "evaluation.prompts_per_task=50", "evaluation.samples=4", "evaluation.every=0", "train.save_every=1000"
)  # fmt: skip
TRIALS: dict[str, list[list[str]]] = {
    "dpo": [
        ["algorithm.learning_rate=1e-5", "algorithm.beta=0.1"],
        ["algorithm.learning_rate=3e-5", "algorithm.beta=0.1"],
        ["algorithm.learning_rate=3e-5", "algorithm.beta=0.5"],
        ["algorithm.learning_rate=1e-4", "algorithm.beta=0.5"],
    ],
    "grpo": [
        ["algorithm.learning_rate=5e-5", "algorithm.scale=group"],
        ["algorithm.learning_rate=1e-4", "algorithm.scale=group"],
        ["algorithm.learning_rate=1e-4", "algorithm.scale=none"],
        ["algorithm.learning_rate=2e-4", "algorithm.scale=group"],
    ],
    "ppo": [
        ["algorithm.learning_rate=5e-5", "algorithm.kl_coef=0.02"],
        ["algorithm.learning_rate=1e-4", "algorithm.kl_coef=0.02"],
        ["algorithm.learning_rate=2e-4", "algorithm.kl_coef=0.02"],
        ["algorithm.learning_rate=1e-4", "algorithm.kl_coef=0.1"],
    ],
}
"""Equally many a method: three or four learning rates and one more knob of its own."""


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
