"""Statistics over the tokens that count: values (B, T), mask (B, T) -> mean, whitened values, summed loss terms.

What stands where the mask is False reaches neither a result nor a gradient, not even when it is NaN: the values are
selected, never multiplied by the mask (0 * NaN is NaN).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_VARIANCE_EPSILON = 1e-8


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, 0 elsewhere, in value and in gradient; x and mask of one shape.

    Functions without a mask (`kl_estimate`, `clipped_surrogate`) are given inputs that went through this, wherever
    padding may hold anything but finite numbers: a later mask saves the value, yet not the gradient (0 * inf).
    """
    if x.shape != mask.shape:
        raise ValueError(f"mask must have the shape of the values, {tuple(x.shape)}; got {tuple(mask.shape)}")
    return torch.where(mask.bool(), x, 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x over all entries where the mask is True, a scalar.

    Raises:
        ValueError: an empty mask, which has no mean (a silent 0 would pass for a loss), or shapes that differ.
    """
    total, count = keep(x, mask).sum(), mask.bool().sum()
    if not count:
        raise ValueError("masked_mean: the mask is False everywhere, so there is nothing to average; skip such a batch")
    return total / count


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all masked entries at once, 0 elsewhere; var with Bessel's n - 1.

    Args:
        x: any shape, usually (B, T): the whole rollout batch, for a part of it has another mean.
        mask: the shape of x.
        shift_mean: True for mean 0 (advantages); False adds the mean back (rewards, whose sign has a meaning).

    Returns:
        The shape of x. A single entry has no variance: it becomes 0, or stays itself without the shift.
    """
    count = mask.bool().sum()
    mean = keep(x, mask).sum() / count.clamp(min=1)
    centred = keep(x - mean, mask)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + _VARIANCE_EPSILON)
    return whitened if shift_mean else keep(whitened + mean, mask)


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    kind: Literal["token", "sequence", "constant"] = "token",
    normaliser: float = 1.0,
) -> Tensor:
    """Sums per-token terms (B, T) where the mask is True and divides by the normaliser: a scalar.

    `token` and `constant` sum the terms, `sequence` sums the rows' means; a row without tokens adds 0. What to divide
    by belongs to the whole optimiser step, so that any split into microbatches adds up to the same number:

    | kind       | terms     | normaliser of the step            | known from               |
    |------------|-----------|-----------------------------------|--------------------------|
    | `token`    | sum       | tokens under the mask             | DAPO, arXiv:2503.14476   |
    | `sequence` | row means | rows                              | GRPO, arXiv:2402.03300   |
    | `constant` | sum       | rows * the completion limit       | Dr. GRPO, arXiv:2503.20783 |

    Raises:
        ValueError: an unknown kind, a normaliser <= 0, or shapes that differ.
    """
    if not normaliser > 0:
        raise ValueError(f"aggregate: normaliser must be > 0; got {normaliser} (a step without tokens has no loss)")
    terms = keep(per_token, mask)
    match kind:
        case "token" | "constant":
            return terms.sum() / normaliser
        case "sequence":
            return (terms.sum(-1) / mask.bool().sum(-1).clamp(min=1)).sum() / normaliser
        case _:
            raise ValueError(f"aggregate: unknown kind {kind!r}; choose token, sequence or constant")
