"""Five seeds of every method on the starter tasks: runs -> docs/measured.json -> the tables in docs/methods/*.md.

    python recipes/starter/measure.py --run      # about half an hour on two cores, into runs/measure
    python recipes/starter/measure.py            # only writes what is there into the docs

DPO, PPO and GRPO are the arms of the starter study with five seeds instead of three: scores on test prompts. SFT and
the reward model are trained five times by themselves: scores and accuracy on validation prompts and pairs. Intervals
are 95 %, Student's t over the five runs; a gain's is the study's own, crossed over seeds and prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs/measure")
SEEDS = (42, 123, 777, 1, 2)
ALIGNLAB = (sys.executable, "-m", "alignlab.cli")
STUDY = ("study", "recipes/studies/starter.yaml", f"seeds={list(SEEDS)}".replace(" ", ""))
SFT = (
    "train",
    "recipes/starter/sft.yaml",
    "evaluation.prompts_per_task=75",
    "evaluation.samples=4",
    "evaluation.every=40",
)
REWARD_MODEL = ("train", "recipes/starter/reward_model.yaml")
PAGES = ("sft", "reward_model", "dpo", "ppo", "grpo")
BEGIN, END = "<!-- measured: python recipes/starter/measure.py -->", "<!-- /measured -->"


def run(runs: Path) -> None:
    """Trains whatever is not finished."""
    commands = [(*STUDY, "--output", str(runs / "study"))]
    for seed in SEEDS:
        for name, command in (("sft", SFT), ("rm", REWARD_MODEL)):
            commands.append((*command, f"seed={seed}", "-q", "--resume", "--output", str(runs / f"{name}-{seed}")))
    for command in commands:
        print("alignlab", *command, flush=True)
        subprocess.run([*ALIGNLAB, *command], check=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t interval over runs."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "low": mean(values) - half, "high": mean(values) + half, "values": list(values)}


def measured(runs: Path) -> dict[str, Any]:
    """Everything the pages say, from the runs' own files."""
    study = json.loads((runs / "study" / "results.json").read_text("utf-8"))
    found: dict[str, Any] = {"seeds": list(SEEDS), "versions": study["environment"]["versions"]}
    for arm in study["arms"]:
        if arm["kind"] == "arm":
            gain = next(
                c for c in study["comparisons"]
                if (c["arm"], c["against"], c["task"], c["metric"]) == (arm["name"], "sft", None, "score")
            )  # fmt: skip
            scores = [r["metrics"]["score"] for r in arm["runs"]]
            found[arm["name"]] = {"score": spread(scores), "gain": gain}
    log = [
        [json.loads(line) for line in (runs / f"sft-{s}" / "log_history.jsonl").read_text().splitlines()] for s in SEEDS
    ]
    before = [next(r["evaluation/score"] for r in rows if r.get("phases_done") == 0) for rows in log]
    after = [_evaluation(runs / f"sft-{s}")["score"] for s in SEEDS]
    found["sft"] = {"before": spread(before), "score": spread(after)}
    found["reward_model"] = {"accuracy": spread([_evaluation(runs / f"rm-{s}")["preference/accuracy"] for s in SEEDS])}
    return found


def _evaluation(folder: Path) -> dict[str, float]:
    content: dict[str, dict[str, float]] = json.loads((folder / "evaluation.json").read_text("utf-8"))
    return content["metrics"]


def table(method: str, found: dict[str, Any]) -> str:
    """The lines that a method's page shows."""
    mine, versions = found[method], found["versions"]
    seeds = ", ".join(str(seed) for seed in found["seeds"])
    rows = []
    if method == "reward_model":
        rows.append(("accuracy on held-out pairs", mine["accuracy"], 1))
        command = " ".join(("alignlab", *REWARD_MODEL, "seed=S"))
    elif method == "sft":
        rows += [("score before training", mine["before"], 100), ("score after", mine["score"], 100)]
        command = " ".join(("alignlab", *SFT, "seed=S"))
    else:
        rows += [("score", mine["score"], 100), ("gain over SFT", mine["gain"], 100)]
        command = " ".join(("alignlab", *STUDY))
    lines = ["| | mean | 95 % interval |", "|---|---|---|"]
    for name, numbers, factor in rows:
        digits = 1 if factor == 100 else 3
        mean_, low, high = (f"{factor * numbers[k]:.{digits}f}" for k in ("mean", "low", "high"))
        interval = "the same model in every run" if low == high else f"{low} to {high}"
        lines.append(f"| {name} | {mean_} | {interval} |")
    what = "pairs" if method == "reward_model" else "prompts"
    split = "test" if method in ("dpo", "ppo", "grpo") else "validation"
    where = f"{split} {what} of the starter's four tasks; torch {versions['torch']}, CPU"
    note = f"Seeds {seeds}; {where}."
    if method != "reward_model":
        note += " Scores in points of 100, every task counting the same, of completions sampled at temperature 1."
    return "\n".join([f"`{command}`", "", *lines, "", note])


def with_table(page: str, lines: str) -> str:
    """The page with everything between its two marks replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return (
        f"{head}{BEGIN}\n{lines}\n{END}{tail}"
        if rest
        else f"{page.rstrip()}\n\n## Measured\n\n{BEGIN}\n{lines}\n{END}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="train first")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the runs are")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.runs)
    found = measured(arguments.runs)
    (ROOT / "docs" / "measured.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for method in PAGES:
        path = ROOT / "docs" / "methods" / f"{method}.md"
        path.write_text(with_table(path.read_text("utf-8"), table(method, found)), "utf-8")


if __name__ == "__main__":
    main()
