"""`train.epochs`: passes over the items instead of a number of phases."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.pipeline import run_recipe
from alignlab.recipe import load_recipe
from alignlab.tracking import HISTORY, read_jsonl
from tests.runs import RECIPES

SHORT = ("data.limit=10", "data.task=[code]", "train.num_phases=null", "evaluation.prompts_per_task=0", "seed=1")


@pytest.mark.parametrize("epochs, phases", [(1, 3), (1.2, 3), (2, 5), (0.1, 1)])
def test_the_last_pass_ends_with_a_whole_phase(tmp_path: Path, epochs: float, phases: int) -> None:
    """10 items, 4 a step: 10 / 4 -> 3; 12 / 4 = 3; 20 / 4 = 5; 1 / 4 -> 1. The schedule knows the length."""
    overrides = (*SHORT, f"train.epochs={epochs}", "algorithm.examples_per_step=4", "train.schedule.shape=linear",
                 "train.schedule.warmup=0")  # fmt: skip
    run_recipe(load_recipe(RECIPES / "starter/sft.yaml", overrides), tmp_path / "run", quiet=True)
    log = read_jsonl(tmp_path / "run" / HISTORY)
    assert [row["phase"] for row in log] == list(range(phases))
    rates = [row["policy/learning_rate"] / 4e-5 for row in log]
    assert rates == pytest.approx([1 - i / phases for i in range(phases)])


def test_two_lengths_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_phases 7 and epochs 2 both say how long; set one to null"):
        load_recipe(RECIPES / "starter/sft.yaml", ("train.num_phases=7", "train.epochs=2"))


def test_debug_is_two_phases_whatever_the_epochs(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "starter/sft.yaml", (*SHORT, "train.epochs=3"), debug=True)
    assert (recipe.stages[0].train.num_phases, recipe.stages[0].train.epochs) == (2, None)
