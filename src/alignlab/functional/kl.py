"""How far the policy is from the reference: logprobs of sampled tokens under both -> a KL estimate for each token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alignlab.functional.masked import keep

K3_MIN_LOG_RATIO = -20.0
"""Below this log-ratio k3 stays what it is there (4.9e8) and pulls no more: e^-d would overflow next."""


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) in nats, on tokens the policy sampled (joschu.net/blog/kl-approx).

    With d = logprob - reference logprob:

        k1 = d                  unbiased, either sign: for the reward (detached); as a loss its gradient averages to 0
        k2 = d^2 / 2            biased, >= 0: as a loss it has the gradient of the true KL (arXiv:2510.01555)
        k3 = exp(-d) - 1 + d    unbiased, >= 0: GRPO's term in the loss, with a gradient that is only nearly the KL's

    Args:
        logprobs, reference_logprobs: one shape, usually (B, T); finite, so `keep` what the mask selects first.
        kind: which estimate. k3 alone is bounded, and only where d < -20.

    Returns:
        The shape of the inputs; means and sums are the caller's.

    Raises:
        ValueError: an unknown kind.
    """
    difference = logprobs - reference_logprobs
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            bounded = difference.clamp(min=K3_MIN_LOG_RATIO)
            return torch.expm1(-bounded) + bounded
        case _:
            raise ValueError(f"kl_estimate: unknown kind {kind!r}; choose k1, k2 or k3")


def above_threshold(kl: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """A hinge on each completion's mean KL: kl_t - threshold in rows whose mean is above it, 0 in all others.

    Summed over a row of N tokens that is N * max(0, mean KL - threshold): a policy within the threshold pays nothing.

    Args:
        kl: (B, T) per-token estimates in nats.
        mask: (B, T).
        threshold: nats a token, >= 0.

    Returns:
        (B, T), 0 outside the mask.
    """
    means = keep(kl, mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return keep(kl - threshold, mask & (means > threshold))
