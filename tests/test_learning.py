"""Every method improves what it is for, on held-out prompts of the starter; thresholds lie far below what is usual.

The stages are the shipped recipes, only shorter; all start from one SFT policy that is trained here once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignlab.pipeline import run_recipe
from alignlab.recipe import load_recipe
from alignlab.tracking import HISTORY, read_jsonl

RECIPES = Path(__file__).parents[1] / "recipes" / "starter"
SFT_GAIN = 0.08
REWARD_MODEL_ACCURACY = 0.62
DPO_ACCURACY = 0.70
DPO_GAIN = 0.05
REWARD_GAIN = 0.06
"""Least gain of the mean training reward, last phases over first phases."""


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, its log, and its final evaluation."""

    folder: Path
    log: list[dict[str, Any]]
    metrics: dict[str, float]

    def before(self, metric: str) -> float:
        """The metric of the evaluation before the first phase."""
        return float(next(r[f"evaluation/{metric}"] for r in self.log if r.get("phases_done") == 0))

    def mean(self, metric: str, phases: slice) -> float:
        values = [row[metric] for row in self.log if row.get(metric) is not None][phases]
        return sum(values) / len(values)


def train(folder: Path, recipe: str, *overrides: str) -> Outcome:
    output = folder / recipe
    run_recipe(load_recipe(RECIPES / f"{recipe}.yaml", overrides), output, quiet=True)
    log = read_jsonl(output / HISTORY)
    return Outcome(output, log, json.loads((output / "evaluation.json").read_text("utf-8"))["metrics"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def sft(world: Path) -> Outcome:
    return train(world, "sft", "train.num_phases=50", "evaluation.every=50")


@pytest.fixture(scope="module")
def reward_model(world: Path, sft: Outcome) -> Outcome:
    return train(world, "reward_model", f"start={sft.folder}", "train.num_phases=50")


def test_sft_improves_the_held_out_score(sft: Outcome) -> None:
    assert sft.metrics["score"] > sft.before("score") + SFT_GAIN


def test_the_reward_model_tells_held_out_pairs_apart(reward_model: Outcome) -> None:
    assert reward_model.metrics["preference/accuracy"] > REWARD_MODEL_ACCURACY


def test_dpo_learns_its_pairs_and_their_behaviour(world: Path, sft: Outcome) -> None:
    run = train(world, "dpo", f"start={sft.folder}", "train.num_phases=40", "evaluation.every=40")
    assert run.mean("preference/accuracy", slice(-5, None)) > DPO_ACCURACY
    assert run.metrics["score"] > run.before("score") + DPO_GAIN


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_online_methods_raise_reward_and_held_out_score(
    world: Path, sft: Outcome, reward_model: Outcome, method: str
) -> None:
    run = train(
        world,
        method,
        f"start={sft.folder}",
        f"reward_model={reward_model.folder}",
        "train.num_phases=14",
        "train.schedule.shape=constant",
        "evaluation.every=14",
        "evaluation.prompts_per_task=50",
    )
    assert run.mean("reward/mean", slice(-4, None)) > run.mean("reward/mean", slice(0, 4)) + REWARD_GAIN
    assert run.metrics["score"] > run.before("score")
