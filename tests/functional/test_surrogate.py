"""The clipped losses on ratios chosen outright, one for each branch."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.functional import surrogate as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FINITE_DIFFERENCE, FLOAT64

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


# ---- dual clip -------------------------------------------------------------------------------------------------------


def ten_tokens() -> tuple[Tensor, Tensor]:
    """The six of before, and ratios 2.5 and 4 for both advantages."""
    ratios = doubles(0.5, 1.1, 1.5, 0.5, 1.1, 1.5, 2.5, 4, 2.5, 4)
    return ratios.log(), doubles(2, 2, 2, -3, -3, -3, 2, 2, -3, -3)


def test_dual_clip(surrogate: ModuleType) -> None:
    """c = 3 holds a ratio of 4 for A = -3: max(3 * 3, 3 * 1.3) = 9 instead of 12. For A = 2 it changes nothing: 4 is
    clipped to 1.3 already, max(-2 * 3, -2.6) = -2.6. arXiv:1912.09729: max(min(rho A, clip(rho) A), c A), negated."""
    expected = doubles(-1, -2.2, -2.6, 2.4, 3.3, 4.5, -2.6, -2.6, 7.5, 9)
    assert_close(surrogate.clipped_surrogate(*ten_tokens(), *CLIP, 3.0), expected, **FLOAT64)
    ratio, a = ten_tokens()[0].exp(), ten_tokens()[1]
    single = torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)
    paper = torch.where(a < 0, torch.maximum(single, 3 * a), single)
    assert_close(expected, -paper, **FLOAT64)


def test_dual_clip_is_the_two_sided_clip(surrogate: ModuleType) -> None:
    """INTELLECT-2, arXiv:2505.07291: -min(min(rho, delta) A, clip(rho) A), for any delta above 1 + clip_high."""
    ratio, a = ten_tokens()[0].exp(), ten_tokens()[1]
    for delta in (1.4, 2.6, 3.9):
        expected = -torch.minimum(ratio.clamp(max=delta) * a, ratio.clamp(0.8, 1.3) * a)
        assert_close(surrogate.clipped_surrogate(*ten_tokens(), *CLIP, delta), expected, **FLOAT64)


def test_where_dual_clip_holds(surrogate: ModuleType) -> None:
    """The two of before, A > 0 above 1.3, and the ratio of 4 with A < 0: exactly where there is no gradient."""
    log_ratio, a = ten_tokens()
    held = surrogate.clipped(log_ratio, a, *CLIP, 3.0)
    expected = torch.tensor([False, False, True, True, False, False, True, True, False, True])
    assert_close(held, expected, **EXACT)
    assert not surrogate.clipped(log_ratio, torch.zeros(10), *CLIP, 3.0).any()
    surrogate.clipped_surrogate(log_ratio.requires_grad_(), a, *CLIP, 3.0).sum().backward()
    assert log_ratio.grad is not None
    assert_close(log_ratio.grad == 0, expected, **EXACT)
    assert_close(log_ratio.grad[8], doubles(7.5)[0], **FLOAT64)


# ---- the whole completion as one ratio -------------------------------------------------------------------------------


def test_sequence_log_ratio(surrogate: ModuleType) -> None:
    """Means over the mask: (.1 + .3) / 2 = .2 with a hole between them, -.6 alone, nothing in an empty row."""
    log_ratio = torch.tensor([[0.1, math.nan, 0.3], [-0.6, math.nan, math.inf], [math.nan] * 3], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, False, False], [False] * 3])
    expected = torch.tensor([[0.2, 0, 0.2], [-0.6, 0, 0], [0, 0, 0]], dtype=torch.float64)
    assert_close(surrogate.sequence_log_ratio(log_ratio, mask), expected, **FLOAT64)


def test_gradient_of_the_sequence_ratio(surrogate: ModuleType) -> None:
    """Of the row mean of s = exp(mean of x): s / N at each of the N tokens, whatever their own ratio is. The tokens of
    the row below, 0, .2 and .4, have s = e^.2 and so e^.2 / 3; what the mask hides has none."""
    x = torch.tensor([[0.0, 0.2, 0.4, math.nan]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    (surrogate.sequence_log_ratio(x, mask).exp()[mask].sum() / 3).backward()
    third = math.exp(0.2) / 3
    assert x.grad is not None
    assert_close(x.grad, torch.tensor([[third, third, third, 0]], dtype=torch.float64), **FLOAT64)


def test_finite_differences() -> None:
    """Of a sequence ratio under both clips, and of the token ratio with the dual clip, away from their corners."""
    x = torch.tensor([[0.05, 0.2, -0.1], [1.0, 1.5, 0.7], [-0.5, -0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    a = torch.tensor([[1.5], [-0.7], [-2.0]], dtype=torch.float64)

    def whole(x: Tensor) -> Tensor:
        return module.clipped_surrogate(module.sequence_log_ratio(x, mask), a, *CLIP, 2.0)[mask].sum()

    def single(x: Tensor) -> Tensor:
        return module.clipped_surrogate(x, a, *CLIP, 2.0)[mask].sum()

    for function in (whole, single):
        assert torch.autograd.gradcheck(function, (x,), eps=1e-6, **FINITE_DIFFERENCE)


# ---- a bounded weight ------------------------------------------------------------------------------------------------


def test_clipped_importance(surrogate: ModuleType) -> None:
    """-min(ratio, 1.4) A log pi: ratio .5, A 2: -.5 * 2 * -1 = 1;  1.1: 2.2;  1.5 counts as 1.4: 2.8;  and the same
    weights times -3 for A = -3, there is no floor."""
    logprobs = torch.full((6,), -1.0, dtype=torch.float64)
    expected = doubles(1, 2.2, 2.8, -1.5, -3.3, -4.2)
    assert_close(surrogate.clipped_importance(logprobs, *six_tokens(), 1.4), expected, **FLOAT64)


def test_gradient_of_clipped_importance(surrogate: ModuleType) -> None:
    """By log pi: -min(ratio, 1.4) A, above the bound as well, and nothing through the ratio."""
    log_ratio, a = six_tokens()
    logprobs = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)
    log_ratio = log_ratio + (logprobs - logprobs.detach())
    surrogate.clipped_importance(logprobs, log_ratio, a, 1.4).sum().backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, doubles(-1, -2.2, -2.8, 1.5, 3.3, 4.2), **FLOAT64)


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
    for function in (module.clipped_surrogate, module.clipped):
        with pytest.raises(ValueError, match=r"dual_clip must be above 1 \+ clip_high = 1\.3; got 1\.3"):
            function(*six_tokens(), *CLIP, 1.3)
    with pytest.raises(ValueError, match=r"ceiling must be > 1; got 1\.0"):
        module.clipped_importance(doubles(1), doubles(1), doubles(1), 1.0)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("torch.maximum(-adv", "torch.minimum(-adv", test_clipped_surrogate),
        ("torch.maximum(-advantages * bounded", "torch.maximum(advantages * bounded", test_clipped_surrogate),
        ("1.0 - clip_low, 1.0 + clip_high", "1.0 - clip_high, 1.0 + clip_low", test_clipped_surrogate),
        ("-advantages * ratio.clamp(low, high)", "-advantages * ratio", test_clipped_surrogate),
        ("return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)", "return log_ratio", test_absurd_ratios_stay_finite),
        ("else ratio.clamp(max=_above", "else ratio.clamp(max=10 * _above", test_dual_clip),
        ("else ratio.clamp(max=_above", "else ratio.clamp(max=10 * _above", test_dual_clip_is_the_two_sided_clip),
        ("else ratio.clamp(max=_above(dual_clip, high))", "else ratio.clamp(max=high)", test_dual_clip),
        ("_above(dual_clip, high)) & (advantages < 0)", "_above(dual_clip, high))", test_where_dual_clip_holds),
        ("held | ((ratio", "held & ((ratio", test_where_dual_clip_holds),
        ("sum(-1) / mask.sum(-1)", "sum(-1) / mask.shape[1] + 0 * mask.sum(-1)", test_sequence_log_ratio),
        ("keep(log_ratio, mask).sum(-1)", "log_ratio.sum(-1)", test_sequence_log_ratio),
        ("means[:, None].expand_as(log_ratio)", "log_ratio", test_gradient_of_the_sequence_ratio),
        ("-weight * advantages", "weight * advantages", test_clipped_importance),
        (".clamp(max=ceiling)", "", test_clipped_importance),
        (".clamp(max=ceiling)", ".clamp(2 - ceiling, ceiling)", test_clipped_importance),
        ("weight = log_ratio.detach()", "weight = log_ratio", test_gradient_of_clipped_importance),
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
