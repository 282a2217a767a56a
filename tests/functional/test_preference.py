"""Pairwise losses on numbers whose sigmoid is a fraction: sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.functional import preference as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT64

LN3 = math.log(3)
BETA = LN3 / 2


@pytest.fixture
def preference() -> ModuleType:
    return module


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two pairs, the second the first one swapped:

    chosen - reference_chosen = -1 - (-2) = 1 and rejected - reference_rejected = -6 - (-5) = -1, so h = 2, then -2;
    with beta = ln 3 / 2, beta h = ln 3, then -ln 3.
    """
    return doubles(-1, -6), doubles(-6, -1), doubles(-2, -5), doubles(-5, -2)


def test_sigmoid(preference: ModuleType) -> None:
    """-ln sigmoid(ln 3) = -ln 3/4 = ln 4/3;  -ln sigmoid(-ln 3) = -ln 1/4 = ln 4."""
    assert_close(preference.preference_loss(*pairs(), beta=BETA), doubles(math.log(4 / 3), math.log(4)), **FLOAT64)


def test_label_smoothing(preference: ModuleType) -> None:
    """With a tenth of the labels flipped: .9 ln 4/3 + .1 ln 4, and .9 ln 4 + .1 ln 4/3."""
    expected = doubles(0.9 * math.log(4 / 3) + 0.1 * math.log(4), 0.9 * math.log(4) + 0.1 * math.log(4 / 3))
    assert_close(preference.preference_loss(*pairs(), beta=BETA, label_smoothing=0.1), expected, **FLOAT64)


def test_hinge(preference: ModuleType) -> None:
    """max(0, 1 - ln 3) = 0, for ln 3 > 1;  max(0, 1 + ln 3) = 1 + ln 3."""
    assert_close(preference.preference_loss(*pairs(), beta=BETA, kind="hinge"), doubles(0, 1 + LN3), **FLOAT64)


def test_ipo(preference: ModuleType) -> None:
    """1 / (2 beta) = 1 / ln 3: (2 - 1 / ln 3)^2 and (-2 - 1 / ln 3)^2."""
    expected = doubles((2 - 1 / LN3) ** 2, (2 + 1 / LN3) ** 2)
    assert_close(preference.preference_loss(*pairs(), beta=BETA, kind="ipo"), expected, **FLOAT64)


def test_bradley_terry(preference: ModuleType) -> None:
    """chosen - rejected = ln 3 - 0 and 0 - ln 3: ln 4/3 and ln 4."""
    assert_close(
        preference.bradley_terry_loss(doubles(LN3, 0), doubles(0, LN3)),
        doubles(math.log(4 / 3), math.log(4)),
        **FLOAT64,
    )


def test_bradley_terry_margin(preference: ModuleType) -> None:
    """ln 3 - ln 3 = 0: -ln 1/2 = ln 2;  ln 3 + ln 3 = ln 9: -ln 9/10 = ln 10/9."""
    chosen, rejected = doubles(LN3, LN3), doubles(0, 0)
    expected = doubles(math.log(2), math.log(10 / 9))
    assert_close(preference.bradley_terry_loss(chosen, rejected, margin=doubles(LN3, -LN3)), expected, **FLOAT64)
    assert_close(
        preference.bradley_terry_loss(chosen, rejected, margin=LN3), doubles(math.log(2), math.log(2)), **FLOAT64
    )


def test_bradley_terry_centering(preference: ModuleType) -> None:
    """Rewards 2 + ln 3 and 2 differ by ln 3 and sum to 4 + ln 3: ln 4/3 + .01 (4 + ln 3)^2."""
    loss = preference.bradley_terry_loss(doubles(2 + LN3), doubles(2), centering_coef=0.01)
    assert_close(loss, doubles(math.log(4 / 3) + 0.01 * (4 + LN3) ** 2), **FLOAT64)


@pytest.mark.parametrize("kind, expected", [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_policy_equal_to_reference(kind: Any, expected: float) -> None:
    """h = 0, whatever the logprobs: ln 2, 1, and (1 / (2 * .1))^2 = 25."""
    chosen, rejected = doubles(-3, -40), doubles(-7, -2)
    loss = module.preference_loss(chosen, rejected, chosen, rejected, beta=0.1, kind=kind)
    assert_close(loss, doubles(expected, expected), **FLOAT64)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_gradient_raises_chosen_and_lowers_rejected(kind: Any) -> None:
    chosen, rejected = doubles(-3).requires_grad_(), doubles(-3).requires_grad_()
    module.preference_loss(chosen, rejected, doubles(-3), doubles(-3), beta=0.1, kind=kind).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad < 0 < rejected.grad
    assert_close(chosen.grad, -rejected.grad, **EXACT)


def test_hopeless_pairs_stay_finite() -> None:
    """-log sigmoid(x) -> -x for x -> -inf, where log(sigmoid(x)) would be log 0."""
    loss = module.bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert_close(loss, torch.tensor([1000.0]), **EXACT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"beta": 0.1, "kind": "dpo"}, "unknown kind 'dpo'; choose sigmoid, hinge or ipo"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing must lie in"),
        ({"beta": 0.1, "label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"beta": 0.1, "kind": "ipo", "label_smoothing": 0.1}, "sigmoid only"),
    ],
)
def test_errors(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.preference_loss(*pairs(), **arguments)


def test_a_column_is_not_broadcast_against_a_row() -> None:
    chosen, rejected, *reference = pairs()
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        module.preference_loss(chosen.unsqueeze(1), rejected, *reference, beta=0.1)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        module.bradley_terry_loss(chosen, rejected, margin=doubles(1))
    with pytest.raises(ValueError, match="centering_coef must be >= 0"):
        module.bradley_terry_loss(chosen, rejected, centering_coef=-1)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("margin = (chosen - reference_chosen) - (", "margin = (chosen - reference_rejected) - (", test_sigmoid),
        ("margin = (chosen - reference_chosen) - (", "margin = (chosen - reference_chosen) + (", test_sigmoid),
        ("-(1 - label_smoothing) * F", "(1 - label_smoothing) * F", test_sigmoid),
        ("-(1 - label_smoothing) * F", "-F", test_label_smoothing),
        ("F.logsigmoid(-beta * margin)", "F.logsigmoid(beta * margin)", test_label_smoothing),
        ("(1 - beta * margin)", "(1 + beta * margin)", test_hinge),
        (".relu()", "", test_hinge),
        ("1 / (2 * beta)", "1 / beta", test_ipo),
        ("margin - 1 / (2 * beta)", "margin + 1 / (2 * beta)", test_ipo),
        ("chosen_reward - rejected_reward", "rejected_reward - chosen_reward", test_bradley_terry),
        ("difference - margin", "difference + margin", test_bradley_terry_margin),
        ("(chosen_reward + rejected_reward)", "(chosen_reward - rejected_reward)", test_bradley_terry_centering),
        ("+ centering_coef *", "- centering_coef *", test_bradley_terry_centering),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
