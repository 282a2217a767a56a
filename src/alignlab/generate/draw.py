"""One decoding step: hidden states and a uniform number a row -> a token and its logprob."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab import kernels
from alignlab.forward.fused import product

BLOCK = 256
"""Tokens summed together in the first level of the inverse-CDF search; it divides the usual vocabulary sizes."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Defaults draw from the policy itself, which is what policy-gradient methods need."""

    temperature: float = 1.0
    """Logits are divided by it; recorded logprobs are at this temperature."""
    top_k: int = 0
    """Keep only the k likeliest tokens (and what ties with the last of them); 0 keeps all."""
    top_p: float = 1.0
    """Then keep the smallest set of likeliest tokens with at least this share of what is left."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest token."""
    greedy: bool = False
    """Take the likeliest token; logprobs are still those of the distribution."""
    max_completion_tokens: int = 64
    """Cut-off length, the stop token included."""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": self.temperature > 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "max_completion_tokens": self.max_completion_tokens >= 1,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, fine in ranges.items() if not fine]:
            raise ValueError(f"Sampling: out of range: {', '.join(wrong)}")

    @property
    def on_policy(self) -> bool:
        """Whether samples come from the very distribution that scoring assumes."""
        return not self.greedy and self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0


def draw_tokens(
    states: Tensor, weight: Tensor, uniforms: Tensor, sampling: Sampling, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row.

    Args:
        states: (R, H) hidden states that predict the next token.
        weight: (V, H) output head.
        uniforms: (R,) in [0, 1), float64 where the device has it.

    Returns:
        (R,) token ids, and (R,) their logprobs at the sampling temperature (over all tokens, before any filter).
    """
    logits = product(states, weight).to(torch.promote_types(states.dtype, torch.float32))
    if sampling.on_policy and kernels.ready(logits):
        return kernels.draw(logits, uniforms, sampling.temperature, softcap)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if sampling.temperature != 1:
        logits = logits.div_(sampling.temperature)
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    weights = logits.exp()  # the likeliest token's is 1
    token = logits.argmax(-1) if sampling.greedy else inverse_cdf(filtered(weights, sampling), uniforms)
    return token, logits.gather(-1, token[:, None])[:, 0] - weights.sum(-1).log()


def filtered(weights: Tensor, sampling: Sampling) -> Tensor:
    """(R, V) unnormalised probabilities with those outside top-k, top-p or min-p set to 0; the likeliest stays."""
    if 0 < sampling.top_k < weights.shape[-1]:
        last = weights.topk(sampling.top_k, -1).values[:, -1:]
        weights = weights.masked_fill(weights < last, 0.0)
    if sampling.top_p < 1.0:
        ordered, index = weights.sort(stable=True, dim=-1, descending=True)
        reached = ordered.cumsum(-1, dtype=exact(weights))
        before = reached - ordered
        drop = torch.zeros_like(index, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p * reached[:, -1:])
        weights = weights.masked_fill(drop, 0.0)
    if sampling.min_p > 0.0:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0.0)
    return weights


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds u times the total; (R, V), (R,) -> (R,).

    Two levels, blocks and then the tokens of one block, so that a large vocabulary is read once. Weights are at least 0
    and need not sum to 1; a token of weight 0 is never drawn.
    """
    rows, size = weights.shape
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=exact(weights)).cumsum(-1)
    target = _below(uniforms * ends[:, -1], ends[:, -1])
    block = torch.searchsorted(ends, target[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    # no torch.where with a number: on CUDA that copies the number there, and waits for it
    start = ends.gather(-1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)[:, 0]
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]].cumsum(-1, dtype=exact(weights))
    rest = _below(target - start, inside[:, -1])
    token = torch.searchsorted(inside, rest[:, None], right=True)
    return (block * BLOCK + token)[:, 0].clamp_(max=size - 1)


def _below(x: Tensor, end: Tensor) -> Tensor:
    """x, or the largest number below `end`: rounding must not push a target past the last positive weight."""
    return torch.minimum(x, torch.nextafter(end, torch.zeros_like(end)))


def exact(like: Tensor) -> torch.dtype:
    """The dtype of running sums: float64 wherever the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
