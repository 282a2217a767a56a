"""Losses of proximal policy optimisation: log-ratios and advantages, or values and returns -> a loss for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.functional.masked import keep

MAX_LOG_RATIO = 20.0
"""Bound of |log-ratio| before the exponential: ratios stay finite in float32, far beyond any clip range."""


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)) per token: arXiv:1707.06347 eq. 7, negated.

    A loss, to be minimised: a positive advantage makes the token likelier, until the ratio passes 1 + clip_high; a
    negative one less likely, until it passes 1 - clip_low. The worse of the two terms counts, so a ratio that has
    moved the wrong way is never clipped.

    Args:
        log_ratio: (B, T), logprobs - old_logprobs; finite, so `keep` what the mask selects first.
        advantages: (B, T), or a shape that broadcasts to it; without gradient.
        clip_low, clip_high: reach of the clip below and above 1; DAPO (arXiv:2503.14476) takes .2 and .28.
        dual_clip: c > 1 + clip_high: the ratio counts as c where it is larger. That matters for A < 0 alone, where
            the loss is then at most -c A (arXiv:1912.09729, c = 3); the two-sided clip of INTELLECT-2
            (arXiv:2505.07291, delta) is the same function. None for no bound.

    Returns:
        (B, T); at ratio 1 it is -A, with REINFORCE's gradient.

    Raises:
        ValueError: a negative clip, a dual_clip within the range of the other.
    """
    ratio, low, high = _ratio_and_range(log_ratio, clip_low, clip_high)
    bounded = ratio if dual_clip is None else ratio.clamp(max=_above(dual_clip, high))
    return torch.maximum(-advantages * bounded, -advantages * ratio.clamp(low, high))


def clipped(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """Where the clip holds the token back, (B, T) bool; its masked mean is the clip fraction.

    That is where `clipped_surrogate` has no gradient: a ratio above 1 + clip_high with A > 0, or below 1 - clip_low
    with A < 0, or above dual_clip with A < 0. The same arguments and errors.
    """
    ratio, low, high = _ratio_and_range(log_ratio, clip_low, clip_high)
    held = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    return held if dual_clip is None else held | ((ratio > _above(dual_clip, high)) & (advantages < 0))


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean log-ratio of each row, at every one of its tokens: log s of GSPO (arXiv:2507.18071 eq. 7).

    Args:
        log_ratio: (B, T), finite where the mask is True.
        mask: (B, T).

    Returns:
        (B, T), the same number along a row and 0 outside the mask. Its gradient reaches every token of the row alike.
    """
    means = keep(log_ratio, mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return keep(means[:, None].expand_as(log_ratio), mask)


def clipped_importance(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, ceiling: float) -> Tensor:
    """-stop_gradient(min(ratio, ceiling)) * A * logprob per token: CISPO, arXiv:2506.13585 eq. 4, negated.

    REINFORCE with a bounded importance weight: no token ever loses its gradient, however far its ratio has moved.

    Args:
        logprobs, log_ratio, advantages: (B, T), finite.
        ceiling: the largest weight, > 1 (ScaleRL, arXiv:2510.13786, takes 5); there is no floor.

    Returns:
        (B, T). Its value is no measure of progress, only its gradient means something.

    Raises:
        ValueError: a ceiling of 1 or less, which would hold back tokens at ratio 1.
    """
    if not ceiling > 1:
        raise ValueError(f"clipped_importance: ceiling must be > 1; got {ceiling}")
    weight = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=ceiling)
    return -weight * advantages * logprobs


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) per token, to be minimised.

    Args:
        values, old_values, returns: (B, T): V now, V when the completions were sampled, and the target R; finite.
        clip: how far V may move in one phase, in units of the return; None for the plain 0.5 * (V - R)^2.

    Returns:
        (B, T), without the coefficient that weighs it against the policy's loss.

    Raises:
        ValueError: a clip <= 0.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    if not clip > 0:
        raise ValueError(f"clipped_value_loss: clip must be > 0, or None for no clip; got {clip}")
    held = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum(plain, (held - returns).square())


def _above(dual_clip: float, high: float) -> float:
    if not dual_clip > high:
        raise ValueError(f"dual_clip must be above 1 + clip_high = {high}; got {dual_clip}")
    return dual_clip


def _ratio_and_range(log_ratio: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, float, float]:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low and clip_high must be >= 0; got {clip_low} and {clip_high}")
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 1.0 - clip_low, 1.0 + clip_high
