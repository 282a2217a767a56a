"""The clipped losses on ratios chosen outright, one for each branch."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.functional import surrogate as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT64

CLIP = (0.2, 0.3)  # ratios stop counting below .8 and above 1.3


@pytest.fixture
def surrogate() -> ModuleType:
    return module


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def six_tokens() -> tuple[Tensor, Tensor]:
    """Ratios below, inside and above the range, for an advantage of 2 and one of -3."""
    return doubles(0.5, 1.1, 1.5, 0.5, 1.1, 1.5).log(), doubles(2, 2, 2, -3, -3, -3)


def test_clipped_surrogate(surrogate: ModuleType) -> None:
    """A = 2:  ratio .5: max(-1, -1.6) = -1;   1.1: -2.2;   1.5: max(-3, -2.6) = -2.6, clipped
    A = -3: ratio .5: max(1.5, 2.4) = 2.4, clipped;   1.1: 3.3;   1.5: max(4.5, 3.9) = 4.5
    """
    expected = doubles(-1, -2.2, -2.6, 2.4, 3.3, 4.5)
    assert_close(surrogate.clipped_surrogate(*six_tokens(), *CLIP), expected, **FLOAT64)


def test_clipped(surrogate: ModuleType) -> None:
    """Only the two tokens that moved the way their advantage asks for, and too far."""
    expected = torch.tensor([False, False, True, True, False, False])
    assert_close(surrogate.clipped(*six_tokens(), *CLIP), expected, **EXACT)
    assert not surrogate.clipped(six_tokens()[0], torch.zeros(6), *CLIP).any()


def test_gradient(surrogate: ModuleType) -> None:
    """-A * ratio by the log-ratio, and nothing where the clip holds: -1, -2.2, 0, 0, 3.3, 4.5."""
    log_ratio, advantages = six_tokens()
    surrogate.clipped_surrogate(log_ratio.requires_grad_(), advantages, *CLIP).sum().backward()
    assert log_ratio.grad is not None
    assert_close(log_ratio.grad, doubles(-1, -2.2, 0, 0, 3.3, 4.5), **FLOAT64)
    without_gradient = surrogate.clipped(log_ratio.detach(), advantages, *CLIP)
    assert_close(log_ratio.grad == 0, without_gradient, **EXACT)


@pytest.mark.parametrize("clip", [CLIP, (0.0, 0.0)])
def test_at_ratio_one_the_gradient_is_reinforce(clip: tuple[float, float]) -> None:
    """d/d logprobs of sum(-A * exp(logprobs - old)) at logprobs = old is that of sum(-A * logprobs): -A, whole."""
    logprobs = doubles(-0.1, -2.0, -7.0).requires_grad_()
    advantages = doubles(1.5, -0.5, 0.0)
    loss = module.clipped_surrogate(logprobs - logprobs.detach(), advantages, *clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    (reinforce,) = torch.autograd.grad((-advantages * logprobs).sum(), logprobs)
    assert_close(loss.detach(), -advantages, **EXACT)
    assert_close(gradient, reinforce, **EXACT)


def test_absurd_ratios_stay_finite(surrogate: ModuleType) -> None:
    log_ratio = torch.tensor([500.0, 500.0, -500.0, -500.0], requires_grad=True)
    loss = surrogate.clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), *CLIP)
    loss.sum().backward()
    assert log_ratio.grad is not None
    assert loss.isfinite().all() and log_ratio.grad.isfinite().all()


def test_clipped_value_loss(surrogate: ModuleType) -> None:
    """V = 1, V_old = 0, held to .5:  R = 2: max(1, 1.5^2) / 2 = 1.125;  R = 0: max(1, .25) / 2 = .5
    V = .25, V_old = 0, inside:       R = 1: .75^2 / 2 = .28125
    V = -1, V_old = 0, held to -.5:   R = -2: max(1, 1.5^2) / 2 = 1.125
    """
    values, returns = doubles(1, 1, 0.25, -1), doubles(2, 0, 1, -2)
    expected = doubles(1.125, 0.5, 0.28125, 1.125)
    assert_close(surrogate.clipped_value_loss(values, torch.zeros_like(values), returns, 0.5), expected, **FLOAT64)


def test_unclipped_value_loss(surrogate: ModuleType) -> None:
    """(1 - 3)^2 / 2 = 2, however far V came."""
    assert_close(surrogate.clipped_value_loss(doubles(1), doubles(-9), doubles(3), None), doubles(2), **FLOAT64)


def test_value_gradient_stops_where_the_held_value_is_worse() -> None:
    """The tokens above: held at .5 or -.5, so 0; V - R = 1; inside, V - R = -.75; held, 0."""
    values, returns = doubles(1, 1, 0.25, -1).requires_grad_(), doubles(2, 0, 1, -2)
    module.clipped_value_loss(values, torch.zeros(4, dtype=torch.float64), returns, 0.5).sum().backward()
    assert values.grad is not None
    assert_close(values.grad, doubles(0, 1, -0.75, 0), **FLOAT64)


def test_errors() -> None:
    for low, high in ((-0.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match="clip_low and clip_high must be >= 0"):
            module.clipped_surrogate(*six_tokens(), low, high)
    with pytest.raises(ValueError, match="clip must be > 0, or None"):
        module.clipped_value_loss(doubles(1), doubles(1), doubles(1), 0.0)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("torch.maximum(-adv", "torch.minimum(-adv", test_clipped_surrogate),
        ("torch.maximum(-advantages * ratio", "torch.maximum(advantages * ratio", test_clipped_surrogate),
        ("1.0 - clip_low, 1.0 + clip_high", "1.0 - clip_high, 1.0 + clip_low", test_clipped_surrogate),
        ("-advantages * ratio.clamp(low, high)", "-advantages * ratio", test_clipped_surrogate),
        (".clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)", "", test_absurd_ratios_stay_finite),
        ("ratio.clamp(low, high))", "ratio.clamp(low, high).detach())", test_gradient),
        ("(ratio > high) & (advantages > 0)", "(ratio > high)", test_clipped),
        ("(ratio < low) & (advantages < 0)", "(ratio < low)", test_clipped),
        ("torch.maximum(plain", "torch.minimum(plain", test_clipped_value_loss),
        ("old_values - clip, old_values + clip", "-clip, clip / 2", test_clipped_value_loss),
        ("return 0.5 * torch", "return torch", test_clipped_value_loss),
        ("return 0.5 * plain", "return plain", test_unclipped_value_loss),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
