"""SimPO against the paper's formula, from raw log-softmaxes of the policy alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import simpo as module
from tests.algorithms.world import (
    collect,
    flat,
    formula_value,
    loss_and_gradient,
    mutant,
    numbers,
    pair_inputs,
    raw_logprobs,
    start_run,
)
from tests.tolerances import FLOAT64

EIGHT = {"pairs_per_step": 8, "beta": 2.5, "gamma": 0.8}


@pytest.fixture
def simpo() -> Any:
    return module.ALGORITHM


def mean_gaps(run: Any, step: Any) -> np.ndarray:
    """Mean logprob of chosen minus that of rejected, pair by pair."""
    gaps = []
    for batch in step.microbatches:
        means = [x.mean() for x in numbers(raw_logprobs(run.models["policy"], batch))]
        gaps += [means[0] - means[2], means[1] - means[3]]
    return np.array(gaps)


def test_loss(simpo: Any) -> None:
    """Eq. 6: the mean of ln(1 + e^(gamma - beta (m_w - m_l)))."""
    run = start_run(simpo(**EIGHT))
    (step,) = collect(run)
    h = mean_gaps(run, step)
    assert len(h) == 8 and np.ptp(h) > 0.1 and (h > 0).any() and (h < 0).any()
    assert_close(loss_and_gradient(run, step)[0], float(np.log1p(np.exp(0.8 - 2.5 * h)).mean()), **FLOAT64)


def test_gradient(simpo: Any) -> None:
    """-beta sigmoid(gamma - beta h) (grad m_w - grad m_l), averaged over pairs."""
    run = start_run(simpo(**EIGHT))
    (step,) = collect(run)
    _, gradient = loss_and_gradient(run, step)
    for batch in step.microbatches:
        means = [x.mean() for x in raw_logprobs(run.models["policy"], batch)]
        for chosen, rejected in ((means[0], means[2]), (means[1], means[3])):
            weight = torch.sigmoid(0.8 - 2.5 * (chosen - rejected)).item()
            (-2.5 * weight * (chosen - rejected) / 8).backward(retain_graph=True)
    by_hand = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.0}, {"beta": 10.0}, {"preset": "trl"}, {"preset": "paper"}], ids=str
)
def test_the_printed_formula_is_the_executed_loss(simpo: Any, options: dict[str, Any]) -> None:
    run = start_run(simpo(**{"pairs_per_step": 8} | options))
    step = collect(run)[0]
    expected = formula_value(run.algorithm.formula(), pair_inputs(run, step))
    assert_close(loss_and_gradient(run, step)[0], expected, **FLOAT64)


def test_metrics(simpo: Any) -> None:
    run = start_run(simpo(**EIGHT))
    step = collect(run)[0]
    h, sums = 2.5 * mean_gaps(run, step), pair_inputs(run, step)
    metrics = run.go(1)[0].metrics
    assert_close(metrics["preference/margin"], h.mean(), **FLOAT64)
    assert_close(metrics["preference/accuracy"], (h > 0).mean(), **FLOAT64)
    assert_close(metrics["policy/logprobs_chosen"], sums["chosen"].mean(), **FLOAT64)
    assert_close(metrics["policy/logprobs_rejected"], sums["rejected"].mean(), **FLOAT64)
    expected = 2.5 * (sums["chosen"] / sums["chosen_tokens"]).mean()
    assert_close(metrics["preference/reward_chosen"], expected, **FLOAT64)


def test_needs_no_reference_and_prefers_the_chosen_completions(simpo: Any) -> None:
    run = start_run(simpo(**EIGHT, learning_rate=3e-3))
    assert set(run.models) == {"policy"}
    run.go(20)
    losses = run.column("loss/total")
    assert losses[-1] < losses[0] - 0.3
    assert run.column("preference/accuracy")[-1] == 1.0 > run.column("preference/accuracy")[0]


def test_length_alone_is_not_rewarded(simpo: Any) -> None:
    """Twice the tokens at the same mean cost the same: the reward is per token."""
    run = start_run(simpo(**EIGHT))
    step = collect(run)[0]
    inputs = pair_inputs(run, step)
    doubled = {**inputs, "chosen": 2 * inputs["chosen"], "chosen_tokens": 2 * inputs["chosen_tokens"]}
    lines = run.algorithm.formula()
    assert_close(formula_value(lines, doubled), formula_value(lines, inputs), **FLOAT64)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("halves(totals / row_tokens(batch))", "halves(totals)", test_loss),
        ("chosen, rejected = halves", "rejected, chosen = halves", test_loss),
        ("gamma=self.gamma)", "gamma=0.0)", test_loss),
        ("beta=self.beta, gamma", "beta=1.0, gamma", test_gradient),
        ("LossOutput(terms.sum()", "LossOutput(-terms.sum()", test_gradient),
        ("completion_rows(batches) / 2", "completion_rows(batches)", test_loss),
        ("self.beta * chosen, self", "chosen, self", test_metrics),
        ("pair_metrics(*halves(totals)", "pair_metrics(chosen, rejected", test_metrics),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutant(module, text, replacement))
