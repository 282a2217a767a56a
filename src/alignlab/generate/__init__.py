"""The sampler: prompt token ids -> completions with the logprob of every sampled token and a finish reason.

Each prompt is prefilled once and its cache expanded to its samples. Which token is drawn depends on the model and on a
uniform number that is a pure function of (seed, phase, prompt, sample, attempt, position), so a completion does not
depend on what else is in the batch, beyond float rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alignlab.generate.decode import start
from alignlab.generate.draw import Sampling, draw_tokens, exact
from alignlab.models import Model, active, head, unwrap
from alignlab.types import FinishReason

__all__ = ["Sampled", "Sampling", "SamplingKey", "generate"]

LOOK_EVERY = {"cpu": 1}
"""Decoding steps between two looks at which rows have finished; elsewhere 8, as on an accelerator a look is a wait."""
COMPACT_BELOW = 0.85
"""Share of unfinished rows under which the finished ones are dropped from the cache."""


@dataclass(frozen=True, slots=True)
class SamplingKey:
    """What a completion's random numbers are a function of, besides which of its prompt's samples it is."""

    seed: int
    phase: int
    prompt_id: str
    attempt: int = 0

    def uniforms(self, sample: int, count: int) -> np.ndarray:
        """`count` float64 numbers in [0, 1), the same on every machine; fewer are the first ones of more."""
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
        max_rows: rows decoded at once; more are decoded in turn, which changes no result.

    Returns:
        P lists of `num_samples` completions, in order.

    Raises:
        ValueError: an empty prompt, as many keys as prompts are not given, or num_samples or max_rows is below 1.
    """
    if len(keys) != len(prompts) or num_samples < 1 or max_rows < 1:
        raise ValueError(f"generate: {len(prompts)} prompts, {len(keys)} keys, {num_samples=}, {max_rows=}")
    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(num_samples)]
    flat: list[Sampled] = []
    training = [module for module in unwrap(model).modules() if module.training]
    unwrap(model).eval()  # type: ignore[no-untyped-call]
    try:
        with active(model):
            for start in range(0, len(rows), max_rows):
                flat += _wave(model, prompts, keys, rows[start : start + max_rows], sampling, stop_ids, pad_id)
    finally:
        for module in training:
            module.training = True
    return [flat[start : start + num_samples] for start in range(0, len(flat), num_samples)]


def _wave(
    model: Model,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[SamplingKey],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    pad_id: int,
) -> list[Sampled]:
    """Decodes (prompt, sample) rows side by side, in the order given."""
    top, limit = head(model), sampling.max_completion_tokens
    device = top.weight.device
    first, last = rows[0][0], rows[-1][0]
    prompt_of_row = torch.tensor([prompt - first for prompt, _ in rows], device=device)
    decoder = start(model, prompts[first : last + 1], prompt_of_row, limit, pad_id)
    drawn = np.stack([keys[prompt].uniforms(sample, limit) for prompt, sample in rows])
    uniforms = torch.from_numpy(drawn).to(exact(decoder.states)).to(device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    tokens = torch.full((len(rows), limit), pad_id, dtype=torch.long, device=device)
    dtype = torch.promote_types(decoder.states.dtype, torch.float32)
    logprobs = torch.zeros((len(rows), limit), dtype=dtype, device=device)
    live = torch.arange(len(rows), device=device)  # which of the wave's rows are still being decoded
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    look_every = LOOK_EVERY.get(device.type, 8)
    for step in range(limit):
        token, logprob = draw_tokens(decoder.states, top.weight, uniforms[live, step], sampling, top.softcap)
        tokens[live, step], logprobs[live, step] = token, logprob  # beyond a stop token: ignored
        if step + 1 == limit:
            break
        finished = finished | torch.isin(token, stops)
        if (step + 1) % look_every == 0:
            going = int((~finished).sum())
            if going == 0:
                break
            if going < COMPACT_BELOW * len(live):
                index = (~finished).nonzero()[:, 0]
                decoder.keep(index)
                live, token, finished = live[index], token[index], finished[index]
        decoder.step(token)
    return [_completion(*row, stop_ids) for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def _completion(token_ids: list[int], logprobs: list[float], stop_ids: frozenset[int]) -> Sampled:
    """One row's buffers, cut after the first stop token."""
    end = next((i for i, token in enumerate(token_ids) if token in stop_ids), None)
    length = len(token_ids) if end is None else end + 1
    return Sampled(tuple(token_ids[:length]), tuple(logprobs[:length]), "length" if end is None else "stop")
