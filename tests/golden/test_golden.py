"""Twenty steps of each method are what they were when the golden files were recorded (see `record`)."""

import json
from typing import Any

import pytest
from torch.testing import assert_close

from tests.algorithms.world import Run, nudge
from tests.golden.record import FOLDER, METHODS, STEPS, trajectory
from tests.tolerances import Tolerance

GOLDEN = Tolerance(rtol=1e-6, atol=1e-9)
"""Another CPU rounds the last of sixteen digits differently; twenty steps leave ten of them, and a bug none."""


def compare(found: dict[str, Any], name: str) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    assert found["token_ids"] == golden["token_ids"], "other tokens were sampled"
    for key in ("loss", "grad_norm"):
        assert_close(found[key], golden[key], **GOLDEN, msg=lambda text, key=key: f"{key}: {text}")
    assert_close(found["weights"], golden["weights"], **GOLDEN)


@pytest.mark.parametrize("name", METHODS)
def test_trajectory(name: str) -> None:
    compare(trajectory(name), name)


@pytest.mark.parametrize("name", METHODS)
def test_another_cpu_would_not_notice(name: str) -> None:
    """Starting weights that differ in the twelfth digit end within the tolerance, and no token flips."""
    compare(trajectory(name, lambda run: nudge(next(iter(run.models.values())), 1e-13)), name)


def hasty(run: Run) -> None:
    """One part in a thousand more learning rate."""
    role = next(iter(run.algorithm.models()))
    faster = run.algorithm.learning_rate * 1.001
    run.algorithm = run.algorithm.model_copy(update={"learning_rate": faster})
    assert run.algorithm.models()[role].learning_rate == faster


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo"])
def test_a_small_change_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        compare(trajectory(name, hasty), name)


def test_every_file_belongs_to_a_method_and_is_a_real_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(METHODS)
    for name in METHODS:
        golden = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
        assert len(golden["loss"]) == STEPS and len(set(golden["loss"])) > STEPS // 2
        assert bool(golden["token_ids"]) == (METHODS[name].data_kind == "prompts")
