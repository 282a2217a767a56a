"""ORPO against the paper's formula, with odds computed from probabilities themselves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from alignlab.algorithms import orpo as module
from tests.algorithms.world import (
    collect,
    flat,
    formula_value,
    loss_and_gradient,
    mutant,
    pair_inputs,
    raw_logprobs,
    start_run,
)
from tests.tolerances import FLOAT64

EIGHT = {"pairs_per_step": 8, "odds_ratio_coef": 0.4}


@pytest.fixture
def orpo() -> Any:
    return module.ALGORITHM


def geometric_means(run: Any, step: Any) -> tuple[np.ndarray, np.ndarray]:
    """P(y|x) of eq. 3, the geometric mean of a completion's token probabilities, of chosen and of rejected."""
    inputs = pair_inputs(run, step)
    return tuple(np.exp(inputs[k] / inputs[f"{k}_tokens"]) for k in ("chosen", "rejected"))  # type: ignore[return-value]


def test_loss(orpo: Any) -> None:
    """Eq. 6 and 7: mean of -ln P_w - lambda ln sigmoid(ln(odds_w / odds_l)), odds = P / (1 - P).

    sigmoid(ln q) = q / (1 + q), so the second term is ln(1 + odds_l / odds_w).
    """
    run = start_run(orpo(**EIGHT))
    (step,) = collect(run)
    chosen, rejected = geometric_means(run, step)
    odds = chosen / (1 - chosen), rejected / (1 - rejected)
    expected = -np.log(chosen) + 0.4 * np.log(1 + odds[1] / odds[0])
    assert len(chosen) == 8 and np.ptp(odds[0] / odds[1]) > 0.1
    assert_close(loss_and_gradient(run, step)[0], float(expected.mean()), **FLOAT64)


def test_gradient(orpo: Any) -> None:
    """Eq. 8: grad L_OR = -(1 + odds_w/odds_l)^-1 (grad m_w / (1 - P_w) - grad m_l / (1 - P_l)), m = ln P."""
    run = start_run(orpo(**EIGHT))
    (step,) = collect(run)
    _, gradient = loss_and_gradient(run, step)
    for batch in step.microbatches:
        means = [x.mean() for x in raw_logprobs(run.models["policy"], batch)]
        for chosen, rejected in ((means[0], means[2]), (means[1], means[3])):
            p, q = chosen.exp().item(), rejected.exp().item()
            pull = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
            term = -chosen - 0.4 * pull * (chosen / (1 - p) - rejected / (1 - q))
            (term / 8).backward(retain_graph=True)
    by_hand = {name: p.grad for name, p in run.models["policy"].named_parameters()}
    assert_close(flat(gradient), flat(by_hand), **FLOAT64)


def test_without_the_odds_ratio_it_is_fine_tuning(orpo: Any) -> None:
    """lambda = 0: the mean over pairs of each chosen completion's mean negative logprob."""
    run = start_run(orpo(pairs_per_step=8, odds_ratio_coef=0.0))
    (step,) = collect(run)
    means = [x.mean().item() for b in step.microbatches for x in raw_logprobs(run.models["policy"], b)[: len(b) // 2]]
    assert_close(loss_and_gradient(run, step)[0], -float(np.mean(means)), **FLOAT64)


@pytest.mark.parametrize("options", [{}, {"odds_ratio_coef": 1.0}, {"preset": "trl"}, {"preset": "paper"}], ids=str)
def test_the_printed_formula_is_the_executed_loss(orpo: Any, options: dict[str, Any]) -> None:
    run = start_run(orpo(**{"pairs_per_step": 8} | options))
    step = collect(run)[0]
    expected = formula_value(run.algorithm.formula(), pair_inputs(run, step))
    assert_close(loss_and_gradient(run, step)[0], expected, **FLOAT64)


def test_metrics(orpo: Any) -> None:
    run = start_run(orpo(**EIGHT))
    step = collect(run)[0]
    chosen, rejected = geometric_means(run, step)
    log_odds = np.log(chosen / (1 - chosen)), np.log(rejected / (1 - rejected))
    metrics = run.go(1)[0].metrics
    assert_close(metrics["preference/reward_chosen"], log_odds[0].mean(), **FLOAT64)
    assert_close(metrics["preference/margin"], (log_odds[0] - log_odds[1]).mean(), **FLOAT64)
    assert_close(metrics["preference/accuracy"], (chosen > rejected).mean(), **FLOAT64)
    assert_close(metrics["policy/nll_chosen"], -np.log(chosen).mean(), **FLOAT64)
    assert_close(metrics["policy/logprobs_chosen"], pair_inputs(run_again(run), step)["chosen"].mean(), **FLOAT64)


def run_again(run: Any) -> Any:
    """The run as it was before its first step."""
    fresh = start_run(run.algorithm)
    assert not torch.equal(fresh.models["policy"].lm_head.weight, run.models["policy"].lm_head.weight)
    return fresh


def test_needs_no_reference_and_learns_both_terms(orpo: Any) -> None:
    run = start_run(orpo(**EIGHT, learning_rate=3e-3))
    assert set(run.models) == {"policy"}
    run.go(20)
    nll, margin = run.column("policy/nll_chosen"), run.column("preference/margin")
    assert nll[-1] < nll[0] - 0.3 and margin[-1] > margin[0] + 0.3


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("halves(totals / row_tokens(batch))", "halves(totals)", test_loss),
        ("chosen, rejected = halves", "rejected, chosen = halves", test_loss),
        ("terms = -chosen +", "terms =", test_loss),
        ("-chosen + self.odds_ratio_coef", "-chosen - self.odds_ratio_coef", test_gradient),
        ("self.odds_ratio_coef * odds_ratio_loss", "odds_ratio_loss", test_loss),
        ("LossOutput(terms.sum()", "LossOutput(-terms.sum()", test_gradient),
        ("completion_rows(batches) / 2", "completion_rows(batches)", test_loss),
        ("log_odds(chosen), log_odds(rejected))", "chosen, rejected)", test_metrics),
        ("(-chosen.sum().item(), float", "(chosen.sum().item(), float", test_metrics),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutant(module, text, replacement))
