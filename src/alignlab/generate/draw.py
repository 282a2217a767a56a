"""One decoding step: hidden states and a uniform number a row -> a token and its logprob."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from alignlab.generate import Sampling

BLOCK = 512
"""Tokens summed together in the first level of the inverse-CDF search."""


def draw(
    states: Tensor, weight: Tensor, uniforms: Tensor, sampling: Sampling, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row.

    Args:
        states: (R, H) hidden states that predict the next token.
        weight: (V, H) output head.
        uniforms: (R,) float64 in [0, 1).

    Returns:
        (R,) token ids, and (R,) their logprobs at the sampling temperature (over all tokens, before any filter).
    """
    logits = states @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / sampling.temperature, -1)
    token = logprobs.argmax(-1) if sampling.greedy else inverse_cdf(_filtered(logprobs, sampling).exp(), uniforms)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _filtered(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logprob of tokens outside top-k, top-p or min-p to minus infinity; the likeliest token always stays."""
    if sampling.top_k > 0:
        kth = logprobs.topk(min(sampling.top_k, logprobs.shape[-1]), -1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logprobs.sort(-1, descending=True)
        probabilities = ordered.exp() / ordered.exp().sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0.0:
        floor = logprobs.max(-1, keepdim=True).values + torch.tensor(sampling.min_p).log().item()
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf)
    return logprobs


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds u times the total; (R, V), (R,) -> (R,).

    Two levels, blocks and then tokens of one block: a cumulative sum over a large vocabulary is read only once. Weights
    need not sum to 1; a token of weight 0 is never drawn.
    """
    rows, size = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -size % BLOCK)).double().view(rows, -1, BLOCK)
    block_ends = padded.sum(-1).cumsum(-1)
    target = uniforms.double() * block_ends[:, -1]
    block = torch.searchsorted(block_ends, target[:, None], right=True)[:, 0].clamp(max=padded.shape[1] - 1)
    index = torch.arange(rows, device=weights.device)
    start = torch.where(block > 0, block_ends[index, (block - 1).clamp(min=0)], 0.0)
    inside = padded[index, block].cumsum(-1)
    token = torch.searchsorted(inside, (target - start)[:, None], right=True)[:, 0].clamp(max=BLOCK - 1)
    token = block * BLOCK + token
    # Rounding can push the target past the last positive weight: step back to the last token that can be drawn.
    missed = weights.gather(-1, token.clamp(max=size - 1)[:, None])[:, 0] <= 0
    if bool(missed.any()):
        last = size - 1 - (weights > 0).flip(-1).float().argmax(-1)
        token = torch.where(missed, last, token)
    return token
