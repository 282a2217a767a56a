"""The order of items, and rows of ids as tensors.

(seed, phase) -> indices; Row -> Row within limits; rows -> Batch; prompts -> left-padded ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from alignlab.types import Batch, Row, RowShapes

PER_TOKEN = ("old_logprobs", "reference_logprobs", "advantages", "returns", "old_values")
"""Fields of a Batch that hold one number a completion token."""


@lru_cache(maxsize=8)
def order(num_items: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0 .. num_items - 1; the same on every machine, because items are sorted by a hash."""
    return tuple(sorted(range(num_items), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{i}".encode()).digest()))


def take(num_items: int, count: int, seed: int, phase: int) -> tuple[int, ...]:
    """The `count` items of a phase: positions phase * count, .. in the permutations of all epochs, one after the other.

    Raises:
        ValueError: there are no items.
    """
    if num_items < 1:
        raise ValueError("cannot take items from an empty data set")
    positions = range(phase * count, (phase + 1) * count)
    return tuple(order(num_items, seed, p // num_items)[p % num_items] for p in positions)


def fit(row: Row, max_prompt_tokens: int, max_completion_tokens: int) -> Row | None:
    """The row within the limits. A completion too long is cut and keeps its stop token; a prompt too long gives None.

    A prompt is never cut: it would lose its BOS, its system message or the question. The stop token stays, because a
    model that never sees one never learns to stop.
    """
    if len(row.prompt_ids) > max_prompt_tokens:
        return None
    if len(row.completion_ids) <= max_completion_tokens:
        return row
    return replace(row, completion_ids=row.completion_ids[: max_completion_tokens - 1] + row.completion_ids[-1:])


def plan_microbatches(
    lengths: Sequence[int], max_rows: int, max_tokens: int | None = None, prompts: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of rows grouped by length, the longest first, so that little is padding.

    Each group has at most `max_rows` rows and, padded, at most `max_tokens` tokens; a longer row is a group of its own.
    Rows of one prompt (equal numbers in `prompts`) stay side by side, so that they can share its forward pass.

    Raises:
        ValueError: max_rows < 1.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; a microbatch has at least 1 row")
    families = range(len(lengths)) if prompts is None else prompts
    longest: dict[int, int] = {}
    for family, length in zip(families, lengths, strict=True):
        longest[family] = max(length, longest.get(family, 0))
    groups: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-longest[families[i]], families[i], -lengths[i], i)):
        full = not groups or len(groups[-1]) == max_rows
        if full or (max_tokens is not None and max(width, lengths[i]) * (len(groups[-1]) + 1) > max_tokens):
            groups.append([])
            width = 0
        groups[-1].append(i)
        width = max(width, lengths[i])
    return groups


def collate(
    rows: Sequence[Row], *, pad_id: int = 0, per_token: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> Batch:
    """Rows -> Batch, right-padded; masks come from lengths, never from ids.

    `per_token` gives fields of the Batch, one list a row with one number a completion token; they are 0 elsewhere.

    Raises:
        ValueError: no rows, an empty row, an unknown field, or numbers that do not match the completion tokens.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("cannot collate no rows or an empty row")
    shape = len(rows), max(map(len, rows))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row.prompt_ids + row.completion_ids)
        attention_mask[i, : len(row)] = True
        completion_mask[i, len(row.prompt_ids) : len(row)] = True
    tensors: dict[str, Tensor] = {}
    for name, values in (per_token or {}).items():
        if name not in PER_TOKEN:
            raise ValueError(f"{name!r} is no per-token field of a Batch; there are: {', '.join(PER_TOKEN)}")
        if [len(numbers) for numbers in values] != [len(row.completion_ids) for row in rows]:
            raise ValueError(f"{name} needs one number for each completion token of each row")
        flat = [number for numbers in values for number in numbers]
        tensors[name] = torch.zeros(shape).masked_scatter(completion_mask, torch.tensor(flat, dtype=torch.float32))
    numbers: dict[tuple[int, ...], int] = {}
    shapes = RowShapes(
        lengths=tuple(map(len, rows)),
        prompt_lengths=tuple(len(row.prompt_ids) for row in rows),
        prompts=tuple(numbers.setdefault(row.prompt_ids, len(numbers)) for row in rows),
    )
    return Batch(
        input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask, shapes=shapes, **tensors
    )


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt ids -> (input_ids, attention_mask, position_ids), each (B, T), padded on the left for sampling.

    Positions count from 0 at each row's first real token (and are 0 on padding), so padding changes nothing.

    Raises:
        ValueError: no prompts or an empty one, which a model cannot continue.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("cannot sample from no prompts or from an empty one")
    shape = len(prompts), max(map(len, prompts))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        input_ids[i, -len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[i, -len(prompt) :] = True
    return input_ids, attention_mask, (attention_mask.cumsum(1) - 1).clamp(min=0)
