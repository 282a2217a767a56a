"""The sampler: prompt token ids -> completions with the logprob of every sampled token and a finish reason.

Each prompt is prefilled once and its cache expanded to the group. Which token is drawn depends on the model and on a
uniform number that is a pure function of (seed, phase, prompt, sample, attempt, position), so a completion does not depend
on what else is in the batch, beyond float rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from alignlab.data import left_pad
from alignlab.forward import head
from alignlab.generate.draw import draw
from alignlab.models import Model, active, unwrap
from alignlab.types import FinishReason

CHECK_EVERY = {"cpu": 1}
"""Decoding steps between two looks at which rows have finished; a look costs an accelerator a wait."""
COMPACT_BELOW = 0.85
"""Share of unfinished rows under which the finished ones are dropped from the cache."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Defaults draw from the policy itself, which is what policy-gradient methods need."""

    temperature: float = 1.0
    """Logits are divided by it; recorded logprobs are at this temperature."""
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with at least this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest token."""
    greedy: bool = False
    """Take the likeliest token; logprobs are still those of the distribution."""
    max_completion_tokens: int = 64
    """Cut-off length, the stop token included."""

    @property
    def on_policy(self) -> bool:
        """Whether samples come from the very distribution that scoring assumes."""
        return not self.greedy and self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0


@dataclass(frozen=True, slots=True)
class SamplingKey:
    """What a completion's random numbers are a function of, besides which of its prompt's samples it is."""

    seed: int
    phase: int
    prompt_id: str
    attempt: int = 0

    def uniforms(self, sample: int, count: int) -> np.ndarray:
        """`count` float64 numbers in [0, 1), the same on every machine."""
        text = f"{self.seed}/{self.phase}/{self.prompt_id}/{sample}/{self.attempt}"
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled completion as ids: (N,) tokens, stop token included, and their logprobs in nats."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[SamplingKey],
    sampling: Sampling,
    *,
    num_samples: int,
    stop_ids: frozenset[int],
    pad_id: int,
    max_rows: int = 512,
) -> list[list[Sampled]]:
    """Samples `num_samples` completions of every prompt.

    Args:
        prompts: P lists of token ids, of any lengths.
        keys: P sampling keys.
        max_rows: rows decoded at once; more prompts are decoded in turn, which changes no result.

    Returns:
        P lists of `num_samples` completions, in order.
    """
    module = unwrap(model)
    was_training = module.training
    module.eval()
    results: list[list[Sampled]] = []
    wave = max(1, max_rows // num_samples)
    try:
        with active(model):
            for start in range(0, len(prompts), wave):
                here = slice(start, start + wave)
                results += _wave(model, prompts[here], keys[here], sampling, num_samples, stop_ids, pad_id)
    finally:
        module.train(was_training)
    return results


@dataclass(frozen=True, slots=True)
class _Live:
    """The rows still being decoded. R shrinks as rows finish; `row` says which of all rows each one is."""

    row: Tensor  # (R,)
    mask: Tensor  # (R, width) bool, attended so far
    position: Tensor  # (R,) of the next token
    finished: Tensor  # (R,) bool


def _wave(
    model: Model,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[SamplingKey],
    sampling: Sampling,
    num_samples: int,
    stop_ids: frozenset[int],
    pad_id: int,
) -> list[list[Sampled]]:
    module, top = unwrap(model), head(model)
    device, limit = top.weight.device, sampling.max_completion_tokens
    decoder = module.get_decoder()
    input_ids, attention_mask, position_ids = (t.to(device) for t in left_pad(prompts, pad_id))
    cache = DynamicCache(config=module.config)
    states = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    if num_samples > 1:
        cache.batch_repeat_interleave(num_samples)
        states = states.repeat_interleave(num_samples, 0)
        attention_mask = attention_mask.repeat_interleave(num_samples, 0)

    total = len(prompts) * num_samples
    uniforms = torch.from_numpy(
        np.stack([key.uniforms(sample, limit) for key in keys for sample in range(num_samples)])
    ).to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    tokens = torch.full((total, limit), pad_id, dtype=torch.long, device=device)
    logprobs = torch.zeros((total, limit), dtype=torch.float64, device=device)
    live = _Live(
        row=torch.arange(total, device=device),
        mask=attention_mask,
        position=attention_mask.sum(-1),
        finished=torch.zeros(total, dtype=torch.bool, device=device),
    )
    check_every = CHECK_EVERY.get(device.type, 8)
    for step in range(limit):
        token, logprob = draw(states, top.weight, uniforms[live.row, step], sampling, top.softcap)
        going = ~live.finished
        tokens[live.row, step] = torch.where(going, token, pad_id)
        logprobs[live.row, step] = torch.where(going, logprob, 0.0).double()
        live = replace(live, finished=live.finished | torch.isin(token, stops))
        if step + 1 == limit:
            break
        if (step + 1) % check_every == 0:
            left = int((~live.finished).sum())
            if left == 0:
                break
            if left < COMPACT_BELOW * len(live.row):
                keep = (~live.finished).nonzero(as_tuple=True)[0]
                cache.batch_select_indices(keep)
                live = _Live(live.row[keep], live.mask[keep], live.position[keep], live.finished[keep])
                token = token[keep]
        live = replace(live, mask=torch.cat([live.mask, live.mask.new_ones((len(live.row), 1))], 1))
        states = decoder(
            input_ids=token[:, None],
            attention_mask=live.mask,
            position_ids=live.position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        live = replace(live, position=live.position + 1)
    return _collect(tokens, logprobs, stop_ids, num_samples)


def _collect(tokens: Tensor, logprobs: Tensor, stop_ids: frozenset[int], num_samples: int) -> list[list[Sampled]]:
    """(rows, limit) buffers -> completions, each cut after its first stop token."""
    flat: list[Sampled] = []
    for ids, logs in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        length = len(ids) if end is None else end + 1
        flat.append(Sampled(tuple(ids[:length]), tuple(logs[:length]), "length" if end is None else "stop"))
    return [flat[i : i + num_samples] for i in range(0, len(flat), num_samples)]
