"""What the preference methods share: (B, T) logprobs -> one number a completion; metrics of pairs; the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from alignlab.algorithms import Models
from alignlab.forward import score
from alignlab.functional.masked import keep
from alignlab.timing import span
from alignlab.types import Batch

TIE = 1e-4
"""Rewards this close are equal: before the first update they differ by rounding alone."""

LOSS_AT_START = "the loss over its value at policy = reference, minus 1, per token"
"""What a method with a reference declares to be 0 before the first update."""


def row_sums(per_token: Tensor, batch: Batch) -> Tensor:
    """(B, T) -> (B,) sums over each completion's tokens."""
    return keep(per_token, batch.completion_mask).sum(-1)


def row_tokens(batch: Batch) -> Tensor:
    """(B,) how many tokens each completion has."""
    return batch.completion_mask.sum(-1)


def halves(per_row: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) of a pair batch -> its chosen and its rejected half."""
    return cast(tuple[Tensor, Tensor], per_row.chunk(2))


def referenced(models: Models, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The microbatches with the reference's logprobs, where they do not bring them along already."""
    return tuple(b if b.reference_logprobs is not None else _referenced(models, b) for b in batches)


@span("reference")
@torch.no_grad()
def _referenced(models: Models, batch: Batch) -> Batch:
    return replace(batch, reference_logprobs=score(models["reference"], batch).logprobs)


def pair_metrics(
    chosen: Tensor, rejected: Tensor, reward_chosen: Tensor, reward_rejected: Tensor
) -> dict[str, tuple[float, float]]:
    """Contributions of a microbatch's P pairs to the metrics that all pair methods have.

    Args:
        chosen, rejected: (P,) logprobs, summed over each completion's tokens.
        reward_chosen, reward_rejected: (P,) the method's implicit rewards.
    """
    margin = (reward_chosen - reward_rejected).detach()
    right = (margin > TIE).double() + 0.5 * (margin.abs() <= TIE).double()
    values = {
        "preference/accuracy": right,
        "preference/margin": margin,
        "preference/reward_chosen": reward_chosen,
        "preference/reward_rejected": reward_rejected,
        "policy/logprobs_chosen": chosen,
        "policy/logprobs_rejected": rejected,
    }
    return {name: (value.detach().sum().item(), float(len(margin))) for name, value in values.items()}
