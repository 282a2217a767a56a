"""KTO against the paper's formula: log ratios, the mismatched rows and their reference point, all from raw logprobs."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import kto as module
from alignlab.data import collate, take
from alignlab.rollout import LabelledRow
from alignlab.train import RunError
from alignlab.types import LoopState, Row, Step
from tests.algorithms.world import (
    Run,
    collect,
    flat,
    formula_value,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    raw_logprobs,
    start_run,
)
from tests.tolerances import EXACT, FLOAT64

EIGHT = {"examples_per_step": 8, "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
SEED = 42


@pytest.fixture
def kto() -> Any:
    return module.ALGORITHM


def moved_run(algorithm: Any, **changes: Any) -> Run:
    """A run whose policy has left the reference."""
    run = start_run(algorithm, **changes)
    nudge(run.models["policy"], 0.1)
    run.state = replace(run.state, step=3)
    return run


def total(run: Run, role: str, row: Row) -> float:
    """log probability of a row's completion under a role, the row by itself."""
    return float(numbers(raw_logprobs(run.models[role], collate([row])))[0].sum())


def phase_items(run: Run) -> list[LabelledRow]:
    return [run.source.labelled[i] for i in take(len(run.source.labelled), 8, SEED, run.state.phase)]


def drift(run: Run, row: Row) -> float:
    return total(run, "policy", row) - total(run, "reference", row)


def mismatched_drift(run: Run) -> float:
    """Mean log ratio of the phase's completions, each behind the next prompt (the world's prompts all differ)."""
    rows = [item.row for item in phase_items(run)]
    following = zip(rows, rows[1:] + rows[:1], strict=True)
    others = [Row(prompt_ids=b.prompt_ids, completion_ids=a.completion_ids) for a, b in following]
    return float(np.mean([drift(run, row) for row in others]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(run: Run, z0: float) -> list[float]:
    """w_D (1 - sigmoid(beta (r - z0))) of the good and w_U (1 - sigmoid(beta (z0 - r))) of the bad."""
    return [
        1.2 * (1 - sigmoid(0.3 * (drift(run, item.row) - z0)))
        if item.label
        else 0.7 * (1 - sigmoid(0.3 * (z0 - drift(run, item.row))))
        for item in phase_items(run)
    ]


UP, DOWN = 3, 2
"""Seeds of moves that make completions behind other prompts likelier, or less likely, than they were."""


def drifting_run(algorithm: Any, seed: int, **changes: Any) -> tuple[Run, float]:
    run = start_run(algorithm, **changes)
    nudge(run.models["policy"], 0.1, seed)
    run.state = replace(run.state, step=3)
    return run, mismatched_drift(run)


@pytest.mark.parametrize("seed", [UP, DOWN])
def test_loss(kto: Any, seed: int) -> None:
    """The reference point is the mean mismatched log ratio where that is positive, and 0 where it is not."""
    run, mean = drifting_run(kto(**EIGHT), seed)
    (step,) = collect(run)
    z0 = max(0.0, mean)
    assert step.normaliser == 8 and (mean > 0.05) == (seed == UP) and abs(mean) > 0.05
    for batch in step.microbatches:
        assert_close(batch.reference_point, torch.full((len(batch),), z0, dtype=torch.float64), **FLOAT64)
    assert_close(loss_and_gradient(run, step)[0], float(np.mean(by_hand(run, z0))), **FLOAT64)


def positive(kto: Any) -> Run:
    """A run whose reference point is above 0."""
    return drifting_run(kto(**EIGHT), UP)[0]


def test_gradient(kto: Any) -> None:
    """-+ w beta s (1 - s) grad log pi(y) with s the sigmoid, z0 a constant: nothing comes from the mismatched rows."""
    run = positive(kto)
    (step,) = collect(run)
    _, gradient = loss_and_gradient(run, step)
    z0 = max(0.0, mismatched_drift(run))
    assert z0 > 0.05
    for item in phase_items(run):
        s = sigmoid(0.3 * (drift(run, item.row) - z0))
        weight = -1.2 if item.label else 0.7
        (logprobs,) = raw_logprobs(run.models["policy"], collate([item.row]))
        (weight * 0.3 * s * (1 - s) * logprobs.sum() / 8).backward()
    expected = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert_close(flat(gradient), flat(expected), **FLOAT64)


def row(prompt: int, completion: int) -> Row:
    return Row(prompt_ids=(2, prompt), completion_ids=(completion, 4))


def test_mismatched_rows(kto: Any) -> None:
    """Completion i goes behind the next prompt that differs, around the end; where there is none it stays."""
    made = module.mismatched([row(7, 20), row(8, 21), row(9, 22)])
    assert made == [row(8, 20), row(9, 21), row(7, 22)]
    twice = module.mismatched([row(7, 20), row(7, 21), row(8, 22)])
    assert twice == [row(8, 20), row(8, 21), row(7, 22)]
    alone = [row(7, 20), row(7, 21)]
    assert module.mismatched(alone) == alone


def test_a_step_of_one_label_is_the_mean_of_its_terms(kto: Any) -> None:
    """Nothing divides by how many of each label there are; metrics of the absent label are null, without a warning."""
    run = positive(kto)
    bad = tuple(replace(item, label=False) for item in run.source.labelled)
    run.source = replace(run.source, labelled=bad)
    z0 = max(0.0, mismatched_drift(run))
    expected = np.mean([0.7 * sigmoid(0.3 * (drift(run, item.row) - z0)) for item in bad])
    assert_close(loss_and_gradient(run, collect(run)[0])[0], float(expected), **FLOAT64)
    metrics = run.go(1)[0].metrics
    assert metrics["kto/desirable_fraction"] == 0 and math.isnan(metrics["kto/reward_desirable"])
    assert math.isfinite(metrics["kto/reward_undesirable"])


def test_metrics(kto: Any) -> None:
    run = positive(kto)
    items, drifts = phase_items(run), [drift(run, item.row) for item in phase_items(run)]
    z0, totals = max(0.0, mismatched_drift(run)), [total(run, "policy", item.row) for item in items]
    good = np.array([item.label for item in items])
    right = np.where(good, np.array(drifts) > z0, np.array(drifts) < z0)
    metrics = run.go(1)[0].metrics
    assert_close(metrics["kto/reference_point"], z0, **FLOAT64)
    assert_close(metrics["kto/accuracy"], right.mean(), **FLOAT64)
    assert_close(metrics["kto/desirable_fraction"], good.mean(), **EXACT)
    assert_close(metrics["kto/reward_desirable"], 0.3 * np.array(drifts)[good].mean(), **FLOAT64)
    assert_close(metrics["kto/reward_undesirable"], 0.3 * np.array(drifts)[~good].mean(), **FLOAT64)
    assert_close(metrics["policy/logprobs_desirable"], np.array(totals)[good].mean(), **FLOAT64)
    assert_close(metrics["policy/logprobs_undesirable"], np.array(totals)[~good].mean(), **FLOAT64)


def inputs(run: Run, step: Step) -> dict[str, Any]:
    """What the formula reads, row by row in the order of the microbatches."""
    found: dict[str, list[float]] = {"completion": [], "reference_completion": [], "labels": [], "reference_point": []}
    for batch in step.microbatches:
        assert batch.labels is not None and batch.reference_point is not None
        for name, role in (("completion", "policy"), ("reference_completion", "reference")):
            found[name] += [x.sum() for x in numbers(raw_logprobs(run.models[role], batch))]
        found["labels"] += batch.labels.tolist()
        found["reference_point"] += batch.reference_point.tolist()
    return {**{name: np.array(values) for name, values in found.items()}, "rows": len(found["labels"])}


@pytest.mark.parametrize(
    "options", [{}, EIGHT, {"preset": "trl"}, {"preset": "openrlhf"}, {"preset": "paper"}], ids=str
)
def test_the_printed_formula_is_the_executed_loss(kto: Any, options: dict[str, Any]) -> None:
    run = moved_run(kto(**options | {"examples_per_step": 8}))
    step = collect(run)[0]
    expected = formula_value(run.algorithm.formula(), inputs(run, step))
    assert_close(loss_and_gradient(run, step)[0], expected, **FLOAT64)


@pytest.mark.parametrize("lora", [False, True])
def test_at_the_start_policy_and_reference_are_one_model(kto: Any, lora: bool) -> None:
    """No drift, so z0 = 0, and every completion costs half its weight: (1.2 + .7) / 4 with as many good as bad."""
    metrics = start_run(kto(**EIGHT), dropout=0.5, lora=lora).go(1)[0].metrics
    assert_close(metrics["loss/total"], (1.2 + 0.7) / 4, **FLOAT64)
    assert_close(metrics["kto/reference_point"], 0.0, rtol=0.0, atol=1e-12)
    assert_close(metrics["kto/accuracy"], 0.5, **EXACT)


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_that_is_another_model_is_found(kto: Any, lora: bool) -> None:
    run = start_run(kto(**EIGHT), lora=lora)
    nudge(run.models["policy"], 0.01)
    with pytest.raises(RunError, match=r"before any update \(tolerance 1e-08\): .* are not the same model"):
        run.go(1)


def test_a_wrong_reference_point_is_found(kto: Any) -> None:
    """The mismatched rows alone under another reference: every row's own KL is 0, the reference point is not."""
    run = start_run(kto(**EIGHT))
    rows = run.algorithm.reference_rows(run.source, run.state)
    with torch.no_grad():
        table = {r: raw_logprobs(run.models["reference"], collate([r]))[0] for r in rows}
    own = {item.row for item in run.source.labelled}
    run.source = replace(run.source, reference={r: x if r in own else x - 0.1 for r, x in table.items()})
    with pytest.raises(RunError, match=r"before any update"):
        run.go(1)


def test_reference_logprobs_that_are_there_are_used(kto: Any) -> None:
    """Those of the mismatched rows too; without a reference model nothing is missing."""
    run = positive(kto)
    loss, _ = loss_and_gradient(run, collect(run)[0])
    rows = run.algorithm.reference_rows(run.source, run.state)
    assert len(rows) == 16 and len(set(rows)) == 16
    with torch.no_grad():
        table = {r: raw_logprobs(run.models["reference"], collate([r]))[0] for r in rows}
    run.source = replace(run.source, reference=table)
    del run.models["reference"]
    assert_close(loss_and_gradient(run, collect(run)[0])[0], loss, **FLOAT64)


def test_tells_good_from_bad(kto: Any) -> None:
    run = start_run(kto(**EIGHT | {"desirable_weight": 1.0, "undesirable_weight": 1.0}, learning_rate=3e-3))
    run.go(30)
    assert run.column("loss/total")[-1] < 0.3 < 0.49 < run.column("loss/total")[0]
    assert run.column("kto/accuracy")[-1] == 1.0
    assert run.column("kto/reward_desirable")[-1] > run.column("kto/reward_undesirable")[-1] + 1


def test_needs_two_completions_a_step(kto: Any) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        kto(examples_per_step=1)


def test_the_reference_point_is_of_the_whole_step(kto: Any) -> None:
    """z0 is of the whole step: one row a microbatch or all eight, it is the same number."""
    points = []
    for rows in (1, 3, 8):
        run, _ = drifting_run(kto(**EIGHT), UP, microbatch_rows=rows)
        run.state = LoopState(seed=SEED, phase=2, step=3)
        step = collect(run)[0]
        assert sum(len(b) for b in step.microbatches) == 8 and len(step.microbatches) == math.ceil(8 / rows)
        points += [x for b in step.microbatches for x in b.reference_point.tolist()]  # type: ignore[union-attr]
    assert points[0] > 0.05
    assert_close(torch.tensor(points), torch.full((24,), points[0]), **FLOAT64)


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("log_ratio, good, batch", "log_ratio, ~good, batch", test_loss, (UP,)),
        (".mean().clamp(min=0)", ".mean()", test_loss, (DOWN,)),
        (".mean().clamp(min=0)", ".mean().abs()", test_loss, (DOWN,)),
        (".mean().clamp(min=0)", ".mean().clamp(max=0)", test_loss, (UP,)),
        ("torch.cat(drifts).mean()", "torch.cat(drifts).sum()", test_loss, (UP,)),
        ("torch.cat(drifts).mean()", "drifts[0].mean()", test_the_reference_point_is_of_the_whole_step, ()),
        ("source.plan_rows(mismatched(self._rows(source, state)))", "source.plan_rows(self._rows(source, state))",
         test_loss, (UP,)),
        ("desirable_weight=self.desirable_weight, ", "", test_loss, (UP,)),
        ("beta=self.beta, desirable", "beta=1.0, desirable", test_gradient, ()),
        (", torch.no_grad():\n            drifts", ":\n            drifts", test_gradient, ()),
        ("LossOutput(terms.sum(), sums)", "LossOutput(-terms.sum(), sums)", test_gradient, ()),
        ("Step(batches, completion_rows(batches))", "Step(batches, completion_rows(batches) / 2)", test_loss, (UP,)),
        ("return rows + mismatched(rows)", "return rows", test_reference_logprobs_that_are_there_are_used, ()),
        ("range(1, len(rows))", "range(2, len(rows))", test_loss, (UP,)),
        ('"kto/reward_undesirable": (rewards, ~good)', '"kto/reward_undesirable": (rewards, good)', test_metrics, ()),
        ("torch.where(good, 1, -1) *", "1 *", test_metrics, ()),
        ("dropout: ClassVar[bool] = False", "dropout: ClassVar[bool] = True",
         test_at_the_start_policy_and_reference_are_one_model, (False,)),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises((AssertionError, RunError, KeyError, RuntimeError)):
        test(changed, *arguments)
