"""KL estimates on log-ratios whose exponentials are fractions."""

import math
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from alignlab.functional import kl as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT32, FLOAT64, TWO_DIGITS

LN2 = math.log(2)


@pytest.fixture
def kl() -> ModuleType:
    return module


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def doubles2(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def twice_and_half() -> tuple[Tensor, Tensor]:
    """The policy gives the first token twice the reference's probability (d = ln 2), the second half (d = -ln 2)."""
    return doubles(-1 + LN2, -1 - LN2), doubles(-1, -1)


def test_k1(kl: ModuleType) -> None:
    """d itself: ln 2 and -ln 2."""
    assert_close(kl.kl_estimate(*twice_and_half(), "k1"), doubles(LN2, -LN2), **FLOAT64)
    assert_close(kl.kl_estimate(*twice_and_half()), doubles(LN2, -LN2), **FLOAT64)


def test_k2(kl: ModuleType) -> None:
    """d^2 / 2, the same for both: (ln 2)^2 / 2."""
    assert_close(kl.kl_estimate(*twice_and_half(), "k2"), doubles(LN2**2 / 2, LN2**2 / 2), **FLOAT64)


def test_k3(kl: ModuleType) -> None:
    """e^-d - 1 + d: 1/2 - 1 + ln 2 = ln 2 - 1/2, and 2 - 1 - ln 2 = 1 - ln 2."""
    assert_close(kl.kl_estimate(*twice_and_half(), "k3"), doubles(LN2 - 0.5, 1 - LN2), **FLOAT64)


def test_k3_of_nearly_equal_policies(kl: ModuleType) -> None:
    """d^2 / 2 - d^3 / 6 + ... = 5e-9 for d = 1e-4, far below the rounding of e^-d in float32."""
    estimate = kl.kl_estimate(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    assert_close(estimate, torch.tensor([5e-9]), **TWO_DIGITS)


def test_gradients(kl: ModuleType) -> None:
    """By the policy's logprob: k1 1; k2 d; k3 1 - e^-d, that is 1/2 for d = ln 2 and -1 for d = -ln 2."""
    expected: dict[Literal["k1", "k2", "k3"], Tensor] = {
        "k1": doubles(1, 1),
        "k2": doubles(LN2, -LN2),
        "k3": doubles(0.5, -1),
    }
    for kind, gradient in expected.items():
        logprobs, reference = twice_and_half()
        kl.kl_estimate(logprobs.requires_grad_(), reference, kind).sum().backward()
        assert logprobs.grad is not None
        assert_close(logprobs.grad, gradient, **FLOAT64)


def test_k3_far_away(kl: ModuleType) -> None:
    """d = -1000 is held at -20, without a pull; d = 1000 needs no bound: e^-1000 - 1 + 1000 = 999, with slope 1."""
    logprobs = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    estimate = kl.kl_estimate(logprobs, torch.zeros(2), "k3")
    assert_close(estimate.detach(), torch.tensor([math.exp(20) - 21, 999.0]), **FLOAT32)
    estimate.sum().backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, torch.tensor([0.0, 1.0]), **EXACT)


def test_k1_and_k3_average_to_the_divergence(kl: ModuleType) -> None:
    """sum_v p_v k(v) over p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) is KL = ln 2 / 2 - ln 2 / 4 = ln 2 / 4 for both."""
    policy, reference = doubles(0.5, 0.25, 0.25), doubles(0.25, 0.25, 0.5)
    for kind in ("k1", "k3"):
        average = (policy * kl.kl_estimate(policy.log(), reference.log(), kind)).sum()
        assert_close(average, torch.tensor(LN2 / 4, dtype=torch.float64), **FLOAT64)


def test_where_each_estimator_belongs(kl: ModuleType) -> None:
    """Expected gradients by the logits, over p and q as above, with d = (ln 2, 0, -ln 2) and KL = ln 2 / 4.

    That of KL(p || q) is p (d - KL) = (.375, -.0625, -.3125) ln 2; that of KL(q || p) is p - q = (.25, 0, -.25).
    As a loss, sum_v p_v grad k(v): k1 nothing; k2 the first; k3 the second, which is the first to first order.
    In the reward, sum_v p_v k(v) grad log p_v: k1 the first; k2 p (k2 - mean) = (.0625, -.09375, .03125) ln^2 2, which
    vanishes to first order; and so does k3, whose is the first minus the second.
    """
    policy, reference = doubles(0.5, 0.25, 0.25), doubles(0.25, 0.25, 0.5)
    first, second = LN2 * doubles(0.375, -0.0625, -0.3125), policy - reference
    in_the_loss = {"k1": 0 * first, "k2": first, "k3": second}
    in_the_reward = {"k1": first, "k2": LN2**2 * doubles(0.0625, -0.09375, 0.03125), "k3": first - second}
    for kind in ("k1", "k2", "k3"):
        logits = policy.log().requires_grad_()
        logprobs = logits.log_softmax(0)
        estimate = kl.kl_estimate(logprobs, reference.log(), kind)
        (gradient,) = torch.autograd.grad((policy * estimate).sum(), logits, retain_graph=True)
        assert_close(gradient, in_the_loss[kind], **FLOAT64)
        (gradient,) = torch.autograd.grad((policy * estimate.detach() * logprobs).sum(), logits)
        assert_close(gradient, in_the_reward[kind], **FLOAT64)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-60, 0, width=32), st.floats(-60, 0, width=32))
def test_k2_and_k3_are_never_negative(logprob: float, reference: float) -> None:
    for kind in ("k2", "k3"):
        assert module.kl_estimate(torch.tensor([logprob]), torch.tensor([reference]), kind) >= 0


def test_above_threshold(kl: ModuleType) -> None:
    """Threshold .25. (.1, .7) has mean .4, above: -.15 and .45, in sum 2 (.4 - .25) = .3. (.1, .2, .3) has mean .2,
    within: nothing, though one token is above. (.25, .25) is not above. (-1, 3) has mean 1: -1.25 and 2.75."""
    nan = math.nan
    estimates = doubles2([[0.1, nan, 0.7, nan], [0.1, 0.2, 0.3, 9], [0.25, 0.25, nan, nan], [-1, 3, nan, nan]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    expected = doubles2([[-0.15, 0, 0.45, 0], [0, 0, 0, 0], [0, 0, 0, 0], [-1.25, 2.75, 0, 0]])
    found = kl.above_threshold(estimates, mask, 0.25)
    assert_close(found, expected, **FLOAT64)
    assert_close(found.sum(-1), doubles(0.3, 0, 0, 1.5), **FLOAT64)
    assert_close(kl.above_threshold(estimates, torch.zeros_like(mask), 0.25), torch.zeros_like(expected), **EXACT)


def test_gradient_above_the_threshold(kl: ModuleType) -> None:
    """1 at each token of a row that pays, the negative one too, or the sum would not be the mean's; else 0."""
    estimates = doubles2([[0.1, math.nan, 0.7], [0.1, 0.2, 0.3], [-1, 3, math.inf]]).requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    kl.above_threshold(estimates, mask, 0.25).sum().backward()
    assert estimates.grad is not None
    assert_close(estimates.grad, doubles2([[1, 0, 1], [0, 0, 0], [1, 1, 0]]), **FLOAT64)


def test_no_threshold_is_the_estimate_itself_where_it_is_positive() -> None:
    estimates = doubles2([[0.2, 0.0, 0.1]])
    assert_close(module.above_threshold(estimates, torch.ones(1, 3, dtype=torch.bool), 0.0), estimates, **FLOAT64)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind 'k4'; choose k1, k2 or k3"):
        module.kl_estimate(*twice_and_half(), "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("logprobs - reference_logprobs", "reference_logprobs - logprobs", test_k1),
        ("logprobs - reference_logprobs", "reference_logprobs - logprobs", test_k3),
        ("logprobs - reference_logprobs", "reference_logprobs - logprobs", test_where_each_estimator_belongs),
        ("0.5 * difference", "difference", test_k2),
        ("torch.expm1(-bounded)", "torch.expm1(bounded)", test_k3),
        ("torch.expm1(-bounded) + bounded", "torch.expm1(-bounded) - bounded", test_k3),
        ("torch.expm1(-bounded)", "torch.exp(-bounded)", test_k3),
        ("torch.expm1(-bounded)", "(torch.exp(-bounded) - 1)", test_k3_of_nearly_equal_policies),
        ("clamp(min=K3_MIN_LOG_RATIO)", "clamp(min=-1000)", test_k3_far_away),
        ("clamp(min=K3_MIN_LOG_RATIO)", "clamp(-20, 20)", test_k3_far_away),
        ("return 0.5 * difference.square()", "return 0.5 * difference * difference.detach()", test_gradients),
        ("mask & (means > threshold)", "mask & (means < threshold)", test_above_threshold),
        ("mask & (means > threshold)", "mask & (kl > threshold)", test_above_threshold),
        ("mask & (means > threshold)", "means > threshold + 0 * mask", test_above_threshold),
        ("keep(kl - threshold,", "keep(kl,", test_above_threshold),
        ("keep(kl, mask).sum(-1, keepdim=True)", "kl.sum(-1, keepdim=True)", test_above_threshold),
        ("mask.sum(-1, keepdim=True)", "(0 * mask + 1).sum(-1, keepdim=True)", test_above_threshold),
        ("keep(kl - threshold,", "keep((kl - threshold).clamp(min=0),", test_above_threshold),
        (
            "keep(kl - threshold,",
            "keep(kl.detach() - threshold + 2 * (kl - kl.detach()),",
            test_gradient_above_the_threshold,
        ),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
