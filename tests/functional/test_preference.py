"""Pairwise losses on numbers whose sigmoid is a fraction: sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4."""

import math
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from alignlab.functional import preference as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FINITE_DIFFERENCE, FLOAT64

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


def test_robust(preference: ModuleType) -> None:
    """(.9 ln 4/3 - .1 ln 4) / .8 and (.9 ln 4 - .1 ln 4/3) / .8."""
    good, bad = math.log(4 / 3), math.log(4)
    expected = doubles((0.9 * good - 0.1 * bad) / 0.8, (0.9 * bad - 0.1 * good) / 0.8)
    loss = preference.preference_loss(*pairs(), beta=BETA, kind="robust", label_smoothing=0.1)
    assert_close(loss, expected, **FLOAT64)


def test_robust_is_unbiased_under_flips() -> None:
    """The point of rDPO: over labels of which a share e is flipped, its mean is the loss of the true labels."""
    chosen, rejected, *reference = pairs()
    true = module.preference_loss(chosen, rejected, *reference, beta=BETA)
    kept, flipped = (
        module.preference_loss(*p, beta=BETA, kind="robust", label_smoothing=0.2)
        for p in ((chosen, rejected, *reference), (rejected, chosen, *reversed(reference)))
    )
    assert_close(0.8 * kept + 0.2 * flipped, true, **FLOAT64)


def test_hinge(preference: ModuleType) -> None:
    """max(0, 1 - ln 3) = 0, for ln 3 > 1;  max(0, 1 + ln 3) = 1 + ln 3."""
    assert_close(preference.preference_loss(*pairs(), beta=BETA, kind="hinge"), doubles(0, 1 + LN3), **FLOAT64)


def test_ipo(preference: ModuleType) -> None:
    """1 / (2 beta) = 1 / ln 3: (2 - 1 / ln 3)^2 and (-2 - 1 / ln 3)^2."""
    expected = doubles((2 - 1 / LN3) ** 2, (2 + 1 / LN3) ** 2)
    assert_close(preference.preference_loss(*pairs(), beta=BETA, kind="ipo"), expected, **FLOAT64)


def test_simpo(preference: ModuleType) -> None:
    """Means 1 and -1 apart, beta = ln 9, gamma = ln 3: ln 9 - ln 3 = ln 3 -> ln 4/3;  -ln 27 -> ln 28."""
    loss = preference.simpo_loss(doubles(-1, -2), doubles(-2, -1), beta=2 * LN3, gamma=LN3)
    assert_close(loss, doubles(math.log(4 / 3), math.log(28)), **FLOAT64)


def test_odds_ratio(preference: ModuleType) -> None:
    """Probabilities 3/4 and 1/4 have odds 3 and 1/3, a ratio of 9: ln 10/9; turned round 1/9: ln 10."""
    chosen, rejected = doubles(0.75, 0.25).log(), doubles(0.25, 0.75).log()
    assert_close(preference.odds_ratio_loss(chosen, rejected), doubles(math.log(10 / 9), math.log(10)), **FLOAT64)
    assert_close(preference.log_odds(chosen), doubles(LN3, -LN3), **FLOAT64)


def test_kto(preference: ModuleType) -> None:
    """beta (r - z0) = ln 3 twice, then -ln 3 twice; good ones lose w_D times 1/4, 3/4, bad ones w_U times 3/4, 1/4."""
    log_ratio, labels = doubles(2.5, 2.5, -1.5, -1.5), torch.tensor([True, False, True, False])
    loss = preference.kto_loss(
        log_ratio, labels, doubles(0.5, 0.5, 0.5, 0.5), beta=BETA, desirable_weight=2.0, undesirable_weight=3.0
    )
    assert_close(loss, doubles(2 / 4, 3 * 3 / 4, 2 * 3 / 4, 3 / 4), **FLOAT64)


def test_log1mexp_keeps_its_digits_everywhere(preference: ModuleType) -> None:
    """log(1 - e^-1e-15) = ln 1e-15 - 5e-16, and log(1 - e^-50) = -e^-50: neither survives 1 - exp(x) in doubles."""
    x = doubles(-1e-15, -math.log(2), -1.0, -50.0)
    expected = doubles(math.log(1e-15), -math.log(2), math.log1p(-math.exp(-1)), -math.exp(-50))
    assert_close(preference.log1mexp(x), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_certain_and_of_impossible_completions_are_finite(dtype: torch.dtype) -> None:
    """A completion that is sure to come (mean logprob 0) has infinite odds; its loss and gradient stay finite."""
    chosen = torch.tensor([0.0, -1e-9, -1e-3, -500.0, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, 0.0, -1e4], dtype=dtype, requires_grad=True)
    loss = module.odds_ratio_loss(chosen, rejected)
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert loss.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert_close(loss[-1].item(), math.log(2), rtol=1e-6, atol=0.0)


def test_kto_is_bounded_and_keeps_small_losses() -> None:
    """1 - sigmoid(80) is e^-80, which 1 - x of floats would call 0; the other side is the whole weight."""
    labels, zero = torch.tensor([True, False]), torch.zeros(2)
    loss = module.kto_loss(torch.tensor([80.0, 80.0]), labels, zero, beta=1.0, undesirable_weight=1.5)
    assert_close(loss, torch.tensor([math.exp(-80), 1.5]), rtol=1e-5, atol=0.0)


def test_finite_differences() -> None:
    """Gradients of every loss, in double precision, at points off their kinks."""
    chosen, rejected, *reference = (x.requires_grad_() for x in pairs())
    for kind in ("sigmoid", "robust", "hinge", "ipo"):
        smoothing = 0.1 if kind in ("sigmoid", "robust") else 0.0
        loss = partial(module.preference_loss, beta=0.3, kind=kind, label_smoothing=smoothing)
        assert gradcheck(loss, (chosen, rejected, *reference), **FINITE_DIFFERENCE)
    assert gradcheck(partial(module.simpo_loss, beta=2.0, gamma=0.7), (chosen, rejected), **FINITE_DIFFERENCE)
    means = doubles(-0.1, -0.9, -3).requires_grad_(), doubles(-1.2, -0.2, -0.6).requires_grad_()
    assert gradcheck(module.odds_ratio_loss, means, **FINITE_DIFFERENCE)

    def kto(log_ratio: Tensor) -> Tensor:
        labels = torch.tensor([True, False, False])
        return module.kto_loss(log_ratio, labels, doubles(0.2, 0.2, 0.2), beta=0.4, undesirable_weight=1.3)

    assert gradcheck(kto, (doubles(0.5, -1, 2).requires_grad_(),), **FINITE_DIFFERENCE)


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


def test_bradley_terry_label_smoothing(preference: ModuleType) -> None:
    """ln 3 apart, margin ln 2, a quarter of the labels wrong: 3/4 ln(1 + 2/3) + 1/4 ln(1 + 6) + .01 (ln 3)^2."""
    smoothed = preference.bradley_terry_loss(
        doubles(LN3), doubles(0), margin=math.log(2), centering_coef=0.01, label_smoothing=0.25
    )
    by_hand = 0.75 * math.log(5 / 3) + 0.25 * math.log(7) + 0.01 * LN3**2
    assert_close(smoothed, doubles(by_hand), **FLOAT64)


def test_smoothing_only_mixes_a_pair_with_its_reverse() -> None:
    """Both directions together cost the same however they are smoothed."""
    a, b, options = doubles(0.3, -2, 5), doubles(1, -1, 4.5), {"margin": 0.4, "centering_coef": 0.1}
    sums = [
        module.bradley_terry_loss(a, b, **options, label_smoothing=e)
        + module.bradley_terry_loss(b, a, **options, label_smoothing=e)
        for e in (0.0, 0.2)
    ]
    assert_close(sums[1], sums[0], **FLOAT64)


@pytest.mark.parametrize(
    "kind, expected", [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)]
)
def test_policy_equal_to_reference(kind: Any, expected: float) -> None:
    """h = 0, whatever the logprobs: ln 2, 1, and (1 / (2 * .1))^2 = 25."""
    chosen, rejected = doubles(-3, -40), doubles(-7, -2)
    loss = module.preference_loss(chosen, rejected, chosen, rejected, beta=0.1, kind=kind)
    assert_close(loss, doubles(expected, expected), **FLOAT64)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo"])
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
        ({"beta": 0.1, "kind": "dpo"}, "unknown kind 'dpo'; choose sigmoid, robust, hinge or ipo"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing must lie in"),
        ({"beta": 0.1, "label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"beta": 0.1, "kind": "ipo", "label_smoothing": 0.1}, "defined for sigmoid and robust"),
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
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        module.simpo_loss(chosen.unsqueeze(1), rejected, beta=1.0, gamma=0.0)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        module.odds_ratio_loss(chosen.unsqueeze(1), rejected)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        module.kto_loss(chosen, torch.tensor([True, False]), doubles(0.0), beta=1.0)
    with pytest.raises(ValueError, match="centering_coef must be >= 0"):
        module.bradley_terry_loss(chosen, rejected, centering_coef=-1)
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        module.bradley_terry_loss(chosen, rejected, label_smoothing=0.5)


def test_arguments_out_of_range() -> None:
    two, labels = doubles(-1, -2), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"beta must be > 0 and gamma >= 0; got 0\.0 and 1\.0"):
        module.simpo_loss(two, two, beta=0.0, gamma=1.0)
    with pytest.raises(ValueError, match=r"beta must be > 0 and gamma >= 0; got 1\.0 and -1\.0"):
        module.simpo_loss(two, two, beta=1.0, gamma=-1.0)
    with pytest.raises(ValueError, match=r"beta and both weights must be > 0; got 1\.0, 0\.0 and 1\.0"):
        module.kto_loss(two, labels, two, beta=1.0, desirable_weight=0.0)
    with pytest.raises(ValueError, match=r"labels must be bool, True = desirable; got torch\.float64"):
        module.kto_loss(two, two, two, beta=1.0)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("margin = (chosen - reference_chosen) - (", "margin = (chosen - reference_rejected) - (", test_sigmoid),
        ("margin = (chosen - reference_chosen) - (", "margin = (chosen - reference_chosen) + (", test_sigmoid),
        ("-(1 - label_smoothing) * F", "(1 - label_smoothing) * F", test_sigmoid),
        ("-(1 - label_smoothing) * F", "-F", test_label_smoothing),
        ("smoothing * F.logsigmoid(-beta", "smoothing * F.logsigmoid(beta", test_label_smoothing),
        ("(1 - beta * margin)", "(1 + beta * margin)", test_hinge),
        (".relu()", "", test_hinge),
        ("label_smoothing * flipped - (", "(", test_robust),
        ("(1 - 2 * label_smoothing)", "(1 - label_smoothing)", test_robust),
        ("right, flipped = F", "flipped, right = F", test_robust),
        (
            "F.logsigmoid(beta * (chosen - rejected) - gamma)",
            "F.logsigmoid(beta * (chosen - rejected) + gamma)",
            test_simpo,
        ),
        (
            "F.logsigmoid(beta * (chosen - rejected) - gamma)",
            "F.logsigmoid(beta * (chosen - rejected - gamma))",
            test_simpo,
        ),
        ("log_odds(chosen) - log_odds(rejected)", "chosen - rejected", test_odds_ratio),
        ("log_odds(chosen) - log_odds(rejected)", "log_odds(rejected) - log_odds(chosen)", test_odds_ratio),
        ("return logprobs - log1mexp", "return logprobs + log1mexp", test_odds_ratio),
        ("near_one = x > -math.log(2)", "near_one = x > 0", test_log1mexp_keeps_its_digits_everywhere),
        ("near_one = x > -math.log(2)", "near_one = x > -100", test_log1mexp_keeps_its_digits_everywhere),
        ("beta * (log_ratio - reference_point)", "beta * log_ratio - reference_point", test_kto),
        ("beta * (log_ratio - reference_point)", "beta * log_ratio", test_kto),
        ("undesirable_weight * torch.sigmoid(gain)", "undesirable_weight * torch.sigmoid(-gain)", test_kto),
        ("desirable_weight * torch.sigmoid(-gain), un", "desirable_weight * torch.sigmoid(gain), un", test_kto),
        ("torch.where(labels, desirable_weight", "torch.where(~labels, desirable_weight", test_kto),
        ("1 / (2 * beta)", "1 / beta", test_ipo),
        ("margin - 1 / (2 * beta)", "margin + 1 / (2 * beta)", test_ipo),
        ("chosen_reward - rejected_reward", "rejected_reward - chosen_reward", test_bradley_terry),
        ("difference - margin", "difference + margin", test_bradley_terry_margin),
        ("(chosen_reward + rejected_reward)", "(chosen_reward - rejected_reward)", test_bradley_terry_centering),
        ("+ centering_coef *", "- centering_coef *", test_bradley_terry_centering),
        ("(1 - label_smoothing) * loss", "loss", test_bradley_terry_label_smoothing),
        (
            "F.logsigmoid(-(difference + margin))",
            "F.logsigmoid(difference + margin)",
            test_bradley_terry_label_smoothing,
        ),
        ("-(difference + margin)", "(margin - difference)", test_bradley_terry_label_smoothing),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
