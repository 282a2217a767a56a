"""DPO and its relatives against the papers' formulas, from raw log-softmaxes of policy and reference."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import dpo as module
from alignlab.algorithms._preference import pair_metrics
from alignlab.data import collate
from alignlab.models import frozen_copy
from alignlab.train import RunError
from alignlab.types import Batch
from tests.algorithms.world import (
    Run,
    collect,
    flat,
    formula_value,
    loss_and_gradient,
    mutant,
    nudge,
    numbers,
    pair_inputs,
    raw_logprobs,
    start_run,
)
from tests.tolerances import EXACT, FLOAT64

EIGHT = {"pairs_per_step": 8, "beta": 0.4}
KINDS: list[dict[str, Any]] = [
    {"loss_kind": "sigmoid"},
    {"loss_kind": "sigmoid", "label_smoothing": 0.1},
    {"loss_kind": "robust", "label_smoothing": 0.2},
    {"loss_kind": "hinge"},
    {"loss_kind": "ipo"},
    {"loss_kind": "ipo", "average_logprobs": True},
    {"loss_kind": "sigmoid", "average_logprobs": True, "beta": 5.0},
    {"loss_kind": "sigmoid", "rpo_alpha": 0.7},
]


@pytest.fixture
def dpo() -> Any:
    return module.ALGORITHM


def moved_run(algorithm: Any, **changes: Any) -> Run:
    """A run whose policy has left the reference."""
    run = start_run(algorithm, **changes)
    nudge(run.models["policy"], 0.1)
    run.state = replace(run.state, step=3)
    return run


def margins(run: Run, batch: Batch, average: bool = False) -> np.ndarray:
    """h of the two pairs of a microbatch, whose rows are chosen, chosen, rejected, rejected."""
    policy, reference = (
        [x.mean() if average else x.sum() for x in numbers(raw_logprobs(run.models[role], batch))]
        for role in ("policy", "reference")
    )
    drift = np.array(policy) - np.array(reference)
    return drift[:2] - drift[2:]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_loss(dpo: Any, kind: dict[str, Any]) -> None:
    run = moved_run(dpo(**EIGHT | kind))
    (step,) = collect(run)
    h = np.concatenate([margins(run, batch, kind.get("average_logprobs", False)) for batch in step.microbatches])
    e, beta = kind.get("label_smoothing", 0.0), kind.get("beta", 0.4)
    right, flipped = np.log1p(np.exp(-beta * h)), np.log1p(np.exp(beta * h))
    expected = {
        "sigmoid": (1 - e) * right + e * flipped,
        "robust": ((1 - e) * right - e * flipped) / (1 - 2 * e),
        "hinge": np.maximum(0, 1 - beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
    }[kind["loss_kind"]]
    if alpha := kind.get("rpo_alpha"):  # the mean of each chosen completion, then over pairs
        means = [x.mean() for b in step.microbatches for x in numbers(raw_logprobs(run.models["policy"], b))[:2]]
        expected = expected - alpha * np.array(means)
    assert len(h) == 8 and np.ptp(h) > 0.02
    assert_close(loss_and_gradient(run, step)[0], float(expected.mean()), **FLOAT64)


def test_kinds_are_different() -> None:
    """All cases above on one batch: no two of them are the same loss."""
    losses = []
    for kind in KINDS:
        run = moved_run(module.ALGORITHM(**EIGHT | kind))
        losses.append(loss_and_gradient(run, collect(run)[0])[0])
    assert len({round(x, 6) for x in losses}) == len(KINDS)


FORMULAS = [{}, *KINDS, *({"variant": name} for name in module.ALGORITHM.VARIANTS), {"preset": "openrlhf"}]


@pytest.mark.parametrize("options", FORMULAS, ids=str)
def test_the_printed_formula_is_the_executed_loss(dpo: Any, options: dict[str, Any]) -> None:
    run = moved_run(dpo(**{"pairs_per_step": 8} | options))
    step = collect(run)[0]
    assert_close(
        loss_and_gradient(run, step)[0], formula_value(run.algorithm.formula(), pair_inputs(run, step)), **FLOAT64
    )


def test_variants_and_presets_are_rows_of_tables() -> None:
    make = module.ALGORITHM
    assert (make(variant="cdpo").loss_kind, make(variant="cdpo").label_smoothing) == ("sigmoid", 0.1)
    assert make(variant="cdpo", label_smoothing=0.3).label_smoothing == 0.3
    assert make(variant="ipo_average").average_logprobs and not make(variant="ipo").average_logprobs
    both = make(variant="length_normalised", preset="openrlhf")
    assert (both.beta, both.pairs_per_step, both.learning_rate) == (5.0, 128, 1e-5)
    assert (make(preset="trl").pairs_per_step, make(preset="paper").pairs_per_step) == (8, 64)
    with pytest.raises(ValueError, match="no variant 'cpo'; did you mean 'cdpo'"):
        make(variant="cpo")
    with pytest.raises(ValueError, match="no preset 'verl'; there are: trl, openrlhf, paper"):
        make(preset="verl")


def test_the_likelihood_of_the_chosen_is_kept() -> None:
    """rpo_alpha: with a large weight the chosen completions end likelier than without."""
    ends = []
    for alpha in (0.0, 2.0):
        run = start_run(module.ALGORITHM(**EIGHT, learning_rate=3e-3, rpo_alpha=alpha))
        run.go(15)
        ends.append(run.column("policy/logprobs_chosen")[-1])
        assert ("policy/nll_chosen" in run.recorder.rows[0]) == bool(alpha)
    assert ends[1] > ends[0] + 0.5


def test_reference_logprobs_that_are_there_are_used(dpo: Any) -> None:
    """Microbatches that bring them along need no reference model; what they bring decides."""
    run = moved_run(dpo(**EIGHT))
    loss, _ = loss_and_gradient(run, collect(run)[0])
    rows = run.algorithm.reference_rows(run.source, run.state)
    assert len(rows) == 16 and rows[0] == run.source.phase_pairs(8, run.state)[0].chosen
    with torch.no_grad():
        table = {row: raw_logprobs(run.models["reference"], collate([row]))[0] for row in rows}
    run.source = replace(run.source, reference=table)
    reference = run.models.pop("reference")
    assert_close(loss_and_gradient(run, collect(run)[0])[0], loss, **FLOAT64)
    run.source = replace(run.source, reference={row: 2 * x for row, x in table.items()})
    assert abs(loss_and_gradient(run, collect(run)[0])[0] - loss) > 1e-3
    run.source = replace(run.source, reference=dict(list(table.items())[:3]))
    with pytest.raises(KeyError):  # not all are known, and there is no reference
        collect(run)
    run.models["reference"] = reference
    assert_close(loss_and_gradient(run, collect(run)[0])[0], loss, **FLOAT64)


def test_gradient(dpo: Any) -> None:
    """Eq. 7's gradient: -beta sigmoid(-beta h) (grad log pi(y_w) - grad log pi(y_l)), averaged over pairs."""
    run = moved_run(dpo(**EIGHT))
    (step,) = collect(run)
    _, gradient = loss_and_gradient(run, step)
    for batch in step.microbatches:
        weights = torch.from_numpy(0.4 / (1 + np.exp(0.4 * margins(run, batch))))
        sums = [x.sum() for x in raw_logprobs(run.models["policy"], batch)]
        (-(weights[0] * (sums[0] - sums[2]) + weights[1] * (sums[1] - sums[3])) / 8).backward()
    by_hand = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)


def test_metrics(dpo: Any) -> None:
    run = moved_run(dpo(**EIGHT))
    (step,) = collect(run)
    h = 0.4 * np.concatenate([margins(run, batch) for batch in step.microbatches])
    metrics = run.go(1)[0].metrics
    assert_close(metrics["preference/margin"], h.mean(), **FLOAT64)
    assert_close(metrics["preference/accuracy"], (h > 0).mean(), **FLOAT64)
    assert_close(metrics["preference/reward_chosen"] - metrics["preference/reward_rejected"], h.mean(), **FLOAT64)
    chosen = [x.sum() for b in step.microbatches for x in numbers(raw_logprobs(run.models["reference"], b))[:2]]
    drift = metrics["preference/reward_chosen"] / 0.4
    assert_close(metrics["policy/logprobs_chosen"] - drift, float(np.mean(chosen)), **FLOAT64)


@pytest.mark.parametrize(
    "kind, expected", [({}, math.log(2)), ({"loss_kind": "hinge"}, 1.0), ({"loss_kind": "ipo"}, 1 / 0.8**2),
                       ({"label_smoothing": 0.1}, math.log(2)), ({"variant": "robust"}, math.log(2)),
                       ({"average_logprobs": True}, math.log(2))], ids=str)  # fmt: skip
@pytest.mark.parametrize("lora", [False, True])
def test_at_the_start_policy_and_reference_are_one_model(
    dpo: Any, kind: dict[str, Any], expected: float, lora: bool
) -> None:
    """With dropout in the configuration, full and with a fresh adapter: the loss is ln 2, 1, (1 / 2 beta)^2."""
    metrics = start_run(dpo(**EIGHT, **kind), dropout=0.5, lora=lora).go(1)[0].metrics
    assert_close(metrics["loss/total"], expected, **FLOAT64)
    assert_close(metrics["preference/margin"], 0.0, **EXACT)
    assert_close(metrics["preference/accuracy"], 0.5, **EXACT)


def test_dropout_that_is_on_is_found(dpo: Any) -> None:
    run = start_run(dpo(**EIGHT))
    run.models["policy"].train()
    for layer in run.models["policy"].model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(RunError, match=r"phase 0: (the loss|KL to the reference).* before any update.*dropout"):
        run.go(1)


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_that_is_another_model_is_found(dpo: Any, lora: bool) -> None:
    """Also the classic of staged runs: adapter off as reference where the adapter had been trained before."""
    run = start_run(dpo(**EIGHT), lora=lora)
    nudge(run.models["policy"], 0.01)
    with pytest.raises(RunError, match=r"before any update \(tolerance 1e-08\): .* are not the same model"):
        run.go(1)


def test_after_the_first_update_nothing_is_claimed(dpo: Any) -> None:
    run = start_run(dpo(**EIGHT, learning_rate=1e-3))
    run.go(3)
    assert run.column("loss/total")[2] < math.log(2)


def test_prefers_the_chosen_completions(dpo: Any) -> None:
    run = start_run(dpo(**EIGHT, learning_rate=3e-3))
    frozen = frozen_copy(run.models["reference"]).state_dict()
    run.go(20)
    assert run.column("preference/accuracy")[-1] == 1.0
    assert run.column("loss/total")[-1] < 0.3
    assert all(torch.equal(a, frozen[k]) for k, a in run.models["reference"].state_dict().items())


def test_smoothing_belongs_to_sigmoid(dpo: Any) -> None:
    with pytest.raises(ValueError, match="label_smoothing works with loss_kind sigmoid and robust only, not ipo"):
        dpo(loss_kind="ipo", label_smoothing=0.1)


def test_rounding_is_no_preference() -> None:
    """Rewards that differ by less than single precision can tell count as equal; true margins do not."""
    chosen = torch.tensor([-50.0, -50.0, -50.0, -50.0])
    rewards = torch.tensor([3e-6, -3e-6, 1e-3, -1e-3])
    found = pair_metrics(chosen, chosen, rewards, torch.zeros(4))
    assert found["preference/accuracy"] == (0.5 + 0.5 + 1 + 0, 4.0)


SIGMOID, SMOOTH, ROBUST, _, _, IPO, _, RPO = KINDS


@pytest.mark.parametrize(
    "text, replacement, test, arguments",
    [
        ("chosen, rejected = halves(totals", "rejected, chosen = halves(totals", test_loss, (SIGMOID,)),
        ("halves(totals / divisor)", "halves(totals.flip(0) / divisor)", test_loss, (SIGMOID,)),
        ("return LossOutput(total, sums)", "return LossOutput(-total, sums)", test_gradient, ()),
        ("/ 2),)), state", "),)), state", test_loss, (SIGMOID,)),
        (
            "chosen, rejected, reference_chosen, reference_rejected,",
            "chosen, rejected, reference_rejected, reference_chosen,",
            test_loss,
            (SIGMOID,),
        ),
        ("label_smoothing=self.label_smoothing", "label_smoothing=0.0", test_loss, (SMOOTH,)),
        ("beta=self.beta, kind", "beta=1.0, kind", test_gradient, ()),
        ("if self.average_logprobs else totals", "if False else totals", test_loss, (IPO,)),
        ("kind=self.loss_kind", 'kind="sigmoid"', test_loss, (ROBUST,)),
        ("total + self.rpo_alpha * nll", "total - self.rpo_alpha * nll", test_loss, (RPO,)),
        ("halves(-totals / row_tokens(batch))[0]", "halves(-totals / row_tokens(batch))[1]", test_loss, (RPO,)),
        ("halves(-totals / row_tokens(batch))[0]", "halves(-totals)[0]", test_loss, (RPO,)),
        (
            "row in (pair.chosen, pair.rejected)]",
            "row in (pair.chosen,)]",
            test_reference_logprobs_that_are_there_are_used,
            (),
        ),
        (
            "dropout: ClassVar[bool] = False",
            "dropout: ClassVar[bool] = True",
            test_at_the_start_policy_and_reference_are_one_model,
            ({}, math.log(2), False),
        ),
        ("if state.step > 0:", "if True:", test_dropout_that_is_on_is_found, ()),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any, arguments: tuple[Any, ...]) -> None:
    changed = mutant(module, text, replacement)
    with pytest.raises((AssertionError, RunError, pytest.fail.Exception)):
        test(changed, *arguments)
