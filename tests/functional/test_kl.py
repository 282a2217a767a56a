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


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-60, 0, width=32), st.floats(-60, 0, width=32))
def test_k2_and_k3_are_never_negative(logprob: float, reference: float) -> None:
    for kind in ("k2", "k3"):
        assert module.kl_estimate(torch.tensor([logprob]), torch.tensor([reference]), kind) >= 0


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind 'k4'; choose k1, k2 or k3"):
        module.kl_estimate(*twice_and_half(), "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("logprobs - reference_logprobs", "reference_logprobs - logprobs", test_k1),
        ("logprobs - reference_logprobs", "reference_logprobs - logprobs", test_k3),
        ("0.5 * difference", "difference", test_k2),
        ("torch.expm1(-bounded)", "torch.expm1(bounded)", test_k3),
        ("torch.expm1(-bounded) + bounded", "torch.expm1(-bounded) - bounded", test_k3),
        ("torch.expm1(-bounded)", "torch.exp(-bounded)", test_k3),
        ("torch.expm1(-bounded)", "(torch.exp(-bounded) - 1)", test_k3_of_nearly_equal_policies),
        ("clamp(min=K3_MIN_LOG_RATIO)", "clamp(min=-1000)", test_k3_far_away),
        ("clamp(min=K3_MIN_LOG_RATIO)", "clamp(-20, 20)", test_k3_far_away),
        ("return 0.5 * difference.square()", "return 0.5 * difference * difference.detach()", test_gradients),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
