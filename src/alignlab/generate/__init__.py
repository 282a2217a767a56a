"""The sampler: prompt token ids -> completions with the logprob of every sampled token and a finish reason.

Each prompt is prefilled once and its cache expanded to its samples. Which token is drawn depends on the model and on a
uniform number that is a pure function of (seed, phase, prompt, sample, attempt, position), so a completion does not
depend on what else is in the batch, beyond float rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignlab.forward.packed import runs_packed
from alignlab.generate.compiled import compiled_decoder
from alignlab.generate.decode import Decoder, FastDecoder, PlainDecoder, cache_bytes
from alignlab.generate.draw import Sampling, draw_tokens, exact
from alignlab.generate.graphs import StaticDecoder, pays
from alignlab.models import Model, active, head, trunk, unwrap
from alignlab.timing import span
from alignlab.types import FinishReason

__all__ = ["CACHE_MB", "Sampled", "Sampling", "SamplingKey", "generate"]

LOOK_EVERY = {"cpu": 1}
"""Decoding steps between two looks at which rows have finished; elsewhere 8, as on an accelerator a look is a wait."""
CACHE_MB = 2048
"""What keys and values may take unless told."""
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
    stop_ids: frozenset[int] | Sequence[frozenset[int]],
    pad_id: int,
    limits: Sequence[int] | None = None,
    max_rows: int = 512,
    cache_mb: int = CACHE_MB,
) -> list[list[Sampled]]:
    """Samples `num_samples` completions of every prompt.

    Args:
        prompts: P lists of token ids, of any lengths.
        keys: P sampling keys.
        stop_ids: tokens that end a completion: of all prompts, or one set for each.
        limits: P cut-off lengths where they are below `sampling.max_completion_tokens`.
        max_rows: rows decoded at once; more are decoded in turn, which changes no result.
        cache_mb: megabytes that the keys and values of rows decoded at once may take; one row is always decoded.

    Returns:
        P lists of `num_samples` completions, in order.

    Raises:
        ValueError: an empty prompt; keys, stops or limits are not as many as prompts; num_samples, max_rows or a limit
            is below 1.
    """
    stops = [stop_ids] * len(prompts) if isinstance(stop_ids, frozenset) else list(stop_ids)
    most = sampling.max_completion_tokens
    ends = [most] * len(prompts) if limits is None else [min(limit, most) for limit in limits]
    counts = {len(keys), len(stops), len(ends), len(prompts)}
    if len(counts) > 1 or num_samples < 1 or max_rows < 1 or min(ends, default=1) < 1:
        raise ValueError(
            f"generate: {len(prompts)} prompts, {len(keys)} keys, {len(stops)} sets of stop ids, {len(ends)} limits, "
            f"{num_samples=}, {max_rows=}, smallest limit {min(ends, default=1)}"
        )
    requests = [
        _Request(prompt, key.uniforms(sample, end), stop, end)
        for prompt, key, stop, end in zip(prompts, keys, stops, ends, strict=True)
        for sample in range(num_samples)
    ]
    flat: list[Sampled] = []
    training = [module for module in unwrap(model).modules() if module.training]
    unwrap(model).eval()  # type: ignore[no-untyped-call]
    try:
        with active(model):
            for wave in _waves(model, requests, max_rows, cache_mb):
                flat += _wave(model, wave, sampling, pad_id)
    finally:
        for module in training:
            module.training = True
    return [flat[start : start + num_samples] for start in range(0, len(flat), num_samples)]


@dataclass(frozen=True, slots=True)
class _Request:
    """One row to decode."""

    prompt: Sequence[int]
    uniforms: np.ndarray
    stop_ids: frozenset[int]
    limit: int


def _waves(model: Model, requests: Sequence[_Request], max_rows: int, cache_mb: int) -> Iterator[Sequence[_Request]]:
    """Neighbours that fit side by side: in number, and with the cache they will fill."""
    first, width = 0, 0
    for i, request in enumerate(requests):
        wider = max(width, len(request.prompt) + request.limit)
        count = i - first + 1
        if count > 1 and (count > max_rows or count * cache_bytes(unwrap(model), wider) > cache_mb * 2**20):
            yield requests[first:i]
            first, wider = i, len(request.prompt) + request.limit
        width = wider
    if requests:
        yield requests[first:]


def _wave(model: Model, requests: Sequence[_Request], sampling: Sampling, pad_id: int) -> list[Sampled]:
    """Decodes rows side by side, in the order given."""
    top, limit = head(model), max(request.limit for request in requests)
    device = top.weight.device
    prompts: dict[int, int] = {}  # siblings bring the very same object
    which = [prompts.setdefault(id(request.prompt), len(prompts)) for request in requests]
    distinct = {number: request.prompt for number, request in zip(which, requests, strict=True)}
    with span("prefill"):
        decoder = start(model, list(distinct.values()), torch.tensor(which, device=device), limit, pad_id)
    drawn = np.zeros((len(requests), limit))
    for row, request in zip(drawn, requests, strict=True):
        row[: request.limit] = request.uniforms
    uniforms = torch.from_numpy(drawn).to(exact(decoder.states)).to(device)
    most = max(len(request.stop_ids) for request in requests)
    stops = torch.tensor(
        [sorted(r.stop_ids) + [-1] * (most - len(r.stop_ids)) for r in requests], dtype=torch.long, device=device
    )
    limits = torch.tensor([request.limit for request in requests], device=device)
    tokens = torch.full((len(requests), limit), pad_id, dtype=torch.long, device=device)
    dtype = torch.promote_types(decoder.states.dtype, torch.float32)
    logprobs = torch.zeros((len(requests), limit), dtype=dtype, device=device)
    live = torch.arange(len(requests), device=device)  # which of the wave's rows are still being decoded
    finished = torch.zeros(len(requests), dtype=torch.bool, device=device)
    look_every = LOOK_EVERY.get(device.type, 8)
    for step in range(limit):
        with span("draw"):
            token, logprob = draw_tokens(decoder.states, top.weight, uniforms[live, step], sampling, top.softcap)
        tokens[live, step], logprobs[live, step] = token, logprob  # beyond a stop token or limit: ignored
        if step + 1 == limit:
            break
        finished = finished | (token[:, None] == stops).any(-1) | (limits == step + 1)
        if (step + 1) % look_every == 0:
            going = int((~finished).sum())
            if going == 0:
                break
            if going < COMPACT_BELOW * len(live):
                index = (~finished).nonzero()[:, 0]
                decoder.keep(index)
                live, token, finished = live[index], token[index], finished[index]
                stops, limits = stops[index], limits[index]
        with span("decode"):
            decoder.step(token)
    return [_completion(*row) for row in zip(requests, tokens.tolist(), logprobs.tolist(), strict=True)]


def start(model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int) -> Decoder:
    """Reads the prompts, each once, with the fastest decoder that knows the model.

    Args:
        rows: (R,) the prompt of each row to decode.
        limit: tokens that will be decoded at most.
    """
    if not runs_packed(trunk(model), unwrap(model)):
        return PlainDecoder(model, prompts, rows, limit, pad_id)
    if pays(model, rows.device, limit):
        return StaticDecoder(model, prompts, rows, limit, pad_id, capture=True)
    return compiled_decoder(model, prompts, rows, limit, pad_id) or FastDecoder(model, prompts, rows, limit, pad_id)


def _completion(request: _Request, token_ids: list[int], logprobs: list[float]) -> Sampled:
    """One row's buffers, cut after the first stop token or at its limit."""
    end = next((i for i, token in enumerate(token_ids[: request.limit]) if token in request.stop_ids), None)
    length = request.limit if end is None else end + 1
    return Sampled(tuple(token_ids[:length]), tuple(logprobs[:length]), "length" if end is None else "stop")
