"""A batch as one packed row without padding, each shared prompt once: row shapes -> Layout, and its attention.

A decoder's linear layers, norms and rotary tables do not care which row a token is of; only attention does. So all
tokens of a microbatch stand in one row (N,): first the roots (a prompt that several rows share, or a whole row), then
the leaves (the completions of shared prompts). Attention takes them apart again: a root attends to itself, a leaf to
its root and itself. Values and gradients are those of padded rows, up to the order of additions; what is saved is
padding, and a prompt's forward and backward pass for all but one sibling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.forward.decoder import AttentionKind
from alignlab.types import RowShapes


@dataclass(frozen=True, slots=True)
class Segments:
    """Stretches of the packed row that attention handles side by side: S of them, of L queries and K keys at most.

    Padded queries repeat their segment's last one, so that there is always something they attend to.
    """

    start: int  # first packed place of the queries
    lengths: tuple[int, ...]  # queries of each segment; they lie one after the other
    queries: Tensor | None  # (S * L,) packed place of each query; None: all segments have length L
    results: Tensor | None  # (sum of lengths,) which of the S * L each query is; None: all of them
    keys: Tensor | None  # (S * K,) packed place of each key; None: the queries' own
    query_positions: Tensor  # (S, L)
    key_positions: Tensor  # (S, K), beyond every query where there is no key
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return max(self.lengths)

    def mask(self, window: int | None) -> Tensor | None:
        """(S, 1, L, K) bool, True = attended; None where plain causal attention says the same."""
        if window not in self.masks:
            if self.keys is None and (window is None or self.width <= window):
                self.masks[window] = None
            else:
                distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
                allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                self.masks[window] = allowed[:, None]
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every token of a batch (B, T) lies in its packed row (N,)."""

    tokens: Tensor  # (N,) index of each into the flat (B * T) tokens
    positions: Tensor  # (N,)
    place: Tensor  # (B, T) index into the packed row; 0 on padding
    segments: tuple[Segments, ...]


BEYOND = 2**40
"""Position of a key that is not there."""


def make_layout(shapes: RowShapes, width: int, device: torch.device) -> Layout:
    """Computed on the host from lengths alone, so that no accelerator has to be waited for; `width` is T."""
    members: dict[int, list[int]] = {}
    for row, prompt in enumerate(shapes.prompts):
        members.setdefault(prompt, []).append(row)
    roots: list[tuple[int, int]] = []  # (row that shows it, its length)
    leaves: list[tuple[int, int]] = []  # (row, its root)
    place = torch.zeros(len(shapes.prompts), width, dtype=torch.long)
    tokens: list[Tensor] = []
    total = 0

    def placed(row: int, first: int, last: int) -> Tensor:
        nonlocal total
        places = torch.arange(total, total + last - first)
        place[row, first:last] = places
        tokens.append(row * width + torch.arange(first, last))
        total += last - first
        return places

    for rows in members.values():
        prompt = shapes.prompt_lengths[rows[0]]
        if len(rows) == 1 or prompt == 0:
            for row in rows:
                roots.append((row, shapes.lengths[row]))
                placed(row, 0, shapes.lengths[row])
            continue
        leaves += [(row, len(roots)) for row in rows if shapes.lengths[row] > prompt]
        roots.append((rows[0], prompt))
        place[rows, :prompt] = placed(rows[0], 0, prompt)
    segments = [_roots([length for _, length in roots], device)]
    if leaves:
        start = total
        for row, _ in leaves:
            placed(row, shapes.prompt_lengths[row], shapes.lengths[row])
        segments.append(_leaves(shapes, leaves, place, start, device))
    return Layout(
        tokens=(flat := torch.cat(tokens)).to(device, non_blocking=True),
        positions=(flat % width).to(device, non_blocking=True),
        place=place.to(device, non_blocking=True),
        segments=tuple(segments),
    )


def _padded(lengths: list[int], start: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(S, L) which query of its segment each is, the last one repeated; packed places, results (None: all alike)."""
    width, count = max(lengths), torch.tensor(lengths)
    number = torch.minimum(torch.arange(width)[None], count[:, None] - 1)
    if min(lengths) == width:
        return number, None, None
    first = start + count.cumsum(0) - count
    real = torch.arange(width)[None] < count[:, None]
    return number, (first[:, None] + number).flatten(), real.flatten().nonzero()[:, 0]


def _roots(lengths: list[int], device: torch.device) -> Segments:
    number, queries, results = _padded(lengths, 0)
    real = torch.arange(number.shape[1])[None] < torch.tensor(lengths)[:, None]
    return Segments(
        start=0,
        lengths=tuple(lengths),
        queries=_on(queries, device),
        results=_on(results, device),
        keys=None,
        query_positions=number.to(device),
        key_positions=torch.where(real, number, BEYOND).to(device),
    )


def _leaves(
    shapes: RowShapes, leaves: list[tuple[int, int]], place: Tensor, start: int, device: torch.device
) -> Segments:
    """Completions; their keys are those of the root, then their own, each padded to the longest."""
    prompts = torch.tensor([shapes.prompt_lengths[row] for row, _ in leaves])
    lengths = [shapes.lengths[row] - shapes.prompt_lengths[row] for row, _ in leaves]
    number, queries, results = _padded(lengths, start)
    rows = torch.tensor([row for row, _ in leaves])
    before, own = torch.arange(int(prompts.max()))[None], torch.arange(max(lengths))[None]
    in_prompt, in_completion = before < prompts[:, None], own < torch.tensor(lengths)[:, None]
    columns = torch.cat([before.expand(len(rows), -1), (prompts[:, None] + own)], 1)
    real = torch.cat([in_prompt, in_completion], 1)
    keys = place[rows[:, None], torch.where(real, columns, 0)]
    return Segments(
        start=start,
        lengths=tuple(lengths),
        queries=_on(queries, device),
        results=_on(results, device),
        keys=keys.flatten().to(device),
        query_positions=(prompts[:, None] + number).to(device),
        key_positions=torch.where(real, columns, BEYOND).to(device),
    )


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def attend(layout: Layout, kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries (N, heads, D), keys and values (N, key heads, D) of a packed row -> (N, heads, D)."""
    found = []
    for segments in layout.segments:
        count, width = len(segments.lengths), segments.width
        own = slice(segments.start, segments.start + sum(segments.lengths))
        at = segments.queries if segments.keys is None else segments.keys
        asked = _split(query, segments.queries, own, count)
        keys, values = _split(key, at, own, count), _split(value, at, own, count)
        result = _attention(asked, keys, values, segments.mask(kind.window), kind)
        flat = result.transpose(1, 2).reshape(count * width, *query.shape[1:])
        found.append(flat if segments.results is None else flat.index_select(0, segments.results))
    return found[0] if len(found) == 1 else torch.cat(found)


def _split(x: Tensor, index: Tensor | None, own: slice, count: int) -> Tensor:
    """The segments' part of (N, heads, D), side by side: (S, heads, L, D)."""
    x = x[own] if index is None else x.index_select(0, index)
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    """(S, heads, L, D): queries that share a key head are laid one after the other, so that no key is copied."""
    options: dict[str, Any] = {"dropout_p": kind.dropout, "scale": kind.scaling}
    if kind.softcap is None and mask is None:
        shared = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared, **options)
    segments, heads, length, size = query.shape
    grouped = query.reshape(segments, key.shape[1], -1, size)
    if mask is None:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    mask = mask.repeat(1, 1, heads // key.shape[1], 1)
    if kind.softcap is None:
        result = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, **options)
    else:
        logits = kind.softcap * torch.tanh(grouped @ key.transpose(-1, -2) * (kind.scaling / kind.softcap))
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        weights = weights.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        result = F.dropout(weights.to(query.dtype), kind.dropout) @ value
    return result.reshape(segments, heads, length, size)
