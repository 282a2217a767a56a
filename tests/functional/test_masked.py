"""Masked statistics on rows whose padding holds NaN, inf or junk."""

import math
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from alignlab.functional import masked as module
from tests.statistics.mutants import mutated
from tests.tolerances import EXACT, FLOAT32, FLOAT64

NAN, INF = math.nan, math.inf


@pytest.fixture
def masked() -> ModuleType:
    return module


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ragged() -> tuple[Tensor, Tensor]:
    """Rows [2, 4] (left-padded), [9] and nothing at all; the padding would ruin everything it touched."""
    values = doubles([[NAN, 2, 4], [9, INF, NAN], [NAN, -INF, 7]])
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    return values, mask


def test_masked_mean(masked: ModuleType) -> None:
    """(2 + 4 + 9) / 3 = 5."""
    assert_close(masked.masked_mean(*ragged()), doubles(5), **FLOAT64)


def test_masked_whiten(masked: ModuleType) -> None:
    """2, 4, 9: mean 5, variance (9 + 1 + 16) / (3 - 1) = 13, so (-3, -1, 4) / sqrt(13 + 1e-8)."""
    root = math.sqrt(13 + 1e-8)
    expected = doubles([[0, -3 / root, -1 / root], [4 / root, 0, 0], [0, 0, 0]])
    assert_close(masked.masked_whiten(*ragged()), expected, **FLOAT64)


def test_masked_whiten_keeps_the_mean(masked: ModuleType) -> None:
    """The same plus 5 under the mask, and still 0 outside."""
    root = math.sqrt(13 + 1e-8)
    expected = doubles([[0, 5 - 3 / root, 5 - 1 / root], [5 + 4 / root, 0, 0], [0, 0, 0]])
    assert_close(masked.masked_whiten(*ragged(), shift_mean=False), expected, **FLOAT64)


def test_aggregate_tokens(masked: ModuleType) -> None:
    """2 + 4 + 9 = 15, over 4: 3.75."""
    assert_close(masked.aggregate(*ragged()), doubles(15), **FLOAT64)
    assert_close(masked.aggregate(*ragged(), "token", 4.0), doubles(3.75), **FLOAT64)
    assert_close(masked.aggregate(*ragged(), kind="constant", normaliser=4.0), doubles(3.75), **FLOAT64)


def test_aggregate_sequences(masked: ModuleType) -> None:
    """(2 + 4) / 2 + 9 / 1 + nothing = 12, over 3 rows: 4."""
    assert_close(masked.aggregate(*ragged(), kind="sequence", normaliser=3.0), doubles(4), **FLOAT64)


def test_nothing_leaks_into_the_gradient(masked: ModuleType) -> None:
    """By hand: the mean 1/3 each; row means 1/2, 1/2 and 1; whitening has none along a shift of all its entries."""
    _, mask = ragged()
    for function, expected in (
        (masked.masked_mean, [[0, 1 / 3, 1 / 3], [1 / 3, 0, 0], [0, 0, 0]]),
        (lambda x, m: masked.aggregate(x, m, "sequence"), [[0, 0.5, 0.5], [1, 0, 0], [0, 0, 0]]),
        (lambda x, m: masked.aggregate(x, m, "token"), [[0, 1, 1], [1, 0, 0], [0, 0, 0]]),
        (lambda x, m: masked.masked_whiten(x, m).sum(), [[0, 0, 0]] * 3),
    ):
        values = ragged()[0].requires_grad_()
        function(values, mask).backward()
        assert values.grad is not None
        assert_close(values.grad, doubles(expected), **FLOAT64)


def test_whitened_numbers_have_mean_zero_and_variance_one() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3 + 5 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
    mask = torch.rand(8, 16, generator=generator) < 0.4
    for shift_mean, mean in ((True, doubles(0)), (False, values[mask].mean())):
        whitened = module.masked_whiten(values, mask, shift_mean)
        assert_close(whitened[mask].mean(), mean, **FLOAT64)
        assert_close(whitened[mask].var(), doubles(1), **FLOAT32)
        assert_close(whitened[~mask], torch.zeros_like(whitened[~mask]), **EXACT)


@pytest.mark.parametrize("shift_mean, alone", [(True, 0.0), (False, 7.0)])
def test_too_few_to_whiten(shift_mean: bool, alone: float) -> None:
    values = doubles([[NAN, 7]])
    assert_close(
        module.masked_whiten(values, torch.tensor([[False, True]]), shift_mean), doubles([[0, alone]]), **EXACT
    )
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    assert_close(module.masked_whiten(values, nobody, shift_mean), doubles([[0, 0]]), **EXACT)


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_padding_and_microbatches_change_nothing(kind: Literal["token", "sequence", "constant"]) -> None:
    """8 x 1 = 1 x 8 = 4 x 2 rows of unequal length, padded on either side to any width."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 5, 2, 7, 3, 3, 6, 4)]

    def padded(some: list[Tensor], width: int, *, left: bool) -> tuple[Tensor, Tensor]:
        values, mask = torch.full((len(some), width), NAN, dtype=torch.float64), torch.zeros(len(some), width).bool()
        for i, row in enumerate(some):
            where = slice(width - len(row), width) if left else slice(0, len(row))
            values[i, where], mask[i, where] = row, True
        return values, mask

    expected = module.aggregate(*padded(rows, 7, left=False), kind, 11.0)
    for size in (1, 2, 4, 8):
        parts = [rows[i : i + size] for i in range(0, 8, size)]
        for left, width in ((True, 7), (False, 12), (True, 20)):
            total = sum(module.aggregate(*padded(part, width, left=left), kind, 11.0) for part in parts)
            assert_close(total, expected, **FLOAT64)


def test_masks_may_be_numbers() -> None:
    values, mask = ragged()
    assert_close(module.masked_mean(values, mask.long()), doubles(5), **FLOAT64)
    assert_close(module.aggregate(values, mask.float(), "sequence"), doubles(12), **FLOAT64)


def test_errors() -> None:
    values, mask = ragged()
    with pytest.raises(ValueError, match="False everywhere"):
        module.masked_mean(values, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="mask must have the shape of the values"):
        module.masked_mean(values, mask[:, :1])
    with pytest.raises(ValueError, match="unknown kind 'mean'; choose token, sequence or constant"):
        module.aggregate(values, mask, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normaliser must be > 0"):
        module.aggregate(values, mask, normaliser=0.0)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("torch.where(mask.bool(), x, 0)", "x * mask", test_masked_mean),
        ("torch.where(mask.bool(), x, 0)", "torch.where(mask.bool(), x, 0 * x)", test_aggregate_tokens),
        (
            "torch.where(mask.bool(), x, 0)",
            "torch.where(mask.bool(), x, (x - x.detach()).nan_to_num(0))",
            test_nothing_leaks_into_the_gradient,
        ),
        ("return total / count", "return total / x.numel()", test_masked_mean),
        ("(count - 1).clamp(min=1)", "count", test_masked_whiten),
        ("+ _VARIANCE_EPSILON", "+ 1e-4", test_masked_whiten),
        ("keep(x - mean, mask)", "keep(x, mask)", test_masked_whiten),
        ("if shift_mean else", "if not shift_mean else", test_masked_whiten),
        ("keep(whitened + mean, mask)", "whitened + mean", test_masked_whiten_keeps_the_mean),
        ("return terms.sum() / normaliser", "return terms.mean() / normaliser", test_aggregate_tokens),
        ("return terms.sum() / normaliser", "return terms.sum()", test_aggregate_tokens),
        ("terms.sum(-1) / mask.bool().sum(-1).clamp(min=1)", "terms.mean(-1)", test_aggregate_sequences),
        ("mask.bool().sum(-1).clamp(min=1)", "mask.bool().sum(-1)", test_aggregate_sequences),
        (".clamp(min=1)).sum() / normaliser", ".clamp(min=1)).mean() / normaliser", test_aggregate_sequences),
    ],
)
def test_mutants_are_noticed(text: str, replacement: str, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
