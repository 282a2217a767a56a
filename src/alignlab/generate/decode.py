"""From prompts to the states that predict each next token: prompts -> states, tokens -> states, with a cache between.

Two ways that say the same. `PlainDecoder` leaves padding, masks and the growing cache to transformers and so works for
every architecture. `FastDecoder` runs the prompts packed, without padding, writes keys and values where they stay, and
cuts every layer's mask from one that is made once. `graphs` has a third way, for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from alignlab import kernels
from alignlab.data import left_pad
from alignlab.forward.decoder import AttentionKind, decode
from alignlab.forward.packed import attend, make_layout
from alignlab.models import Model, trunk, unwrap
from alignlab.types import RowShapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder(Protocol):
    """Rows (R,) that are decoded side by side."""

    states: Tensor
    """(R, H) of the last token of each row, which predict its next."""

    def step(self, tokens: Tensor) -> None:
        """Takes the next token of each row, (R,)."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with the given rows alone; states are then stale until the next step."""


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Of the keys and values of one row of so many tokens; 0 where the configuration does not say."""
    config: Any = model.config.get_text_config()
    layers, queries = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, queries)
    return int(2 * layers * heads * size * tokens * model.dtype.itemsize)


class PlainDecoder:
    """Through transformers' own cache; prompts are padded on the left."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int) -> None:
        device = rows.device
        ids, mask, positions = (t.to(device) for t in left_pad(prompts, pad_id))
        from transformers import DynamicCache

        self._trunk, self._cache = trunk(model), DynamicCache(config=unwrap(model).config)
        states = self._forward(ids, mask, positions)
        self._cache.batch_select_indices(rows)
        self.states, mask = states[rows], mask[rows]
        self._length, self._seen = mask.sum(-1), ids.shape[1]
        self._mask = torch.cat([mask, mask.new_ones(len(rows), limit)], 1)

    def step(self, tokens: Tensor) -> None:
        self._seen += 1
        self.states = self._forward(tokens[:, None], self._mask[:, : self._seen], self._length[:, None])
        self._length = self._length + 1

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask, self._length = self._mask[rows], self._length[rows]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self._trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        return cast(Tensor, output.last_hidden_state)[:, -1]


class FastDecoder:
    """Through a cache that is allocated once, for architectures whose layers `decode` knows."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int) -> None:
        device, self._trunk = rows.device, trunk(model)
        ids, mask, _ = left_pad(prompts, pad_id)
        count, width = ids.shape
        lengths = mask.sum(-1)
        layout = make_layout(
            RowShapes(tuple(lengths.tolist()), (0,) * count, tuple(range(count))), int(lengths.max()), device, "last"
        )
        first = lengths.cumsum(0) - lengths
        at = (first[:, None] + (torch.arange(width)[None] - (width - lengths)[:, None])).clamp(min=0)
        at = torch.where(mask, at, 0).to(device)[rows]  # (R, width): where each row's keys lie in the packed row
        self._layers: list[_Keys] = []

        def read(kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen = at[:, first_seen(width + 1, kind.window) :]
            self._layers.append(_Keys(key, value, seen, limit))
            return attend(layout, kind, query, key, value)

        self.states = decode(self._trunk, ids[mask].to(device), layout.positions, read, layout.kept)[rows]
        self._length, self._seen = lengths.to(device)[rows], width
        known = mask.to(device)[rows]
        self._mask = None if bool(mask.all()) else torch.cat([known, known.new_ones(len(rows), limit)], 1)

    def step(self, tokens: Tensor) -> None:
        self._seen += 1
        masks: dict[int | None, Tensor | None] = {}

        def look_back(kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._layers[kind.layer].append(key, value, kind.window)
            if kind.window not in masks:
                columns = slice(first_seen(self._seen, kind.window), self._seen)
                masks[kind.window] = None if self._mask is None else self._mask[:, None, None, columns]
            return _attend(kind, query, keys, values, masks[kind.window])

        self.states = decode(self._trunk, tokens, self._length, look_back)
        self._length = self._length + 1

    def keep(self, rows: Tensor) -> None:
        for layer in self._layers:
            layer.keep(rows)
        self._length = self._length[rows]
        self._mask = None if self._mask is None else self._mask[rows]


def first_seen(seen: int, window: int | None) -> int:
    """The first of the columns seen so far that is not behind the window."""
    return 0 if window is None else max(0, seen - window)


def _attend(kind: AttentionKind, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries (R, heads, D), keys and values (R, key heads, K, D), mask (R, 1, 1, K), True = attended, or None for all
    -> (R, heads, D). Heads that share keys ask together, so that no key is copied."""
    # keys are cut from a longer buffer, whose rows and heads have equal distances in both
    if query.dtype == torch.float32 and kernels.ready(query) and keys.stride()[2:] == (query.shape[-1], 1):
        return kernels.attention(
            query, keys, values, None if mask is None else mask[:, 0, 0], kind.scaling, kind.softcap
        )
    rows, heads, size = query.shape
    grouped = query.view(rows, keys.shape[1], -1, size) * kind.scaling
    logits = grouped @ keys.transpose(-1, -2)
    if kind.softcap is not None:
        logits = logits.div_(kind.softcap).tanh_().mul_(kind.softcap)
    if mask is not None:
        logits = logits.masked_fill_(~mask, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return (weights.to(values.dtype) @ values).view(rows, heads, size)


class _Keys:
    """Keys and values of one layer, (R, key heads, width + limit, D): first those of the prompts, taken apart from
    their packed row, then one column a step. What a window has passed is neither kept of prompts nor handed out."""

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor, limit: int) -> None:
        """Packed (N, key heads, D), and (R, width) where each row's lie in them."""
        self.seen = at.shape[1]
        """Columns that are filled."""
        self.held: list[Tensor] = []
        for packed in (keys, values):
            held = packed.new_empty(len(at), packed.shape[1], self.seen + limit, packed.shape[2])
            held[:, :, : self.seen] = packed[at].transpose(1, 2)
            self.held.append(held)

    def append(self, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """(R, key heads, D) of one more token -> (R, key heads, K, D) of all that it sees."""
        for held, new in zip(self.held, (keys, values), strict=True):
            held[:, :, self.seen] = new
        self.seen += 1
        first = first_seen(self.seen, window)
        return self.held[0][:, :, first : self.seen], self.held[1][:, :, first : self.seen]

    def put(self, keys: Tensor, values: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one more token where (1,) says -> (R, key heads, width + limit, D), all there is; `count` it."""
        for held, new in zip(self.held, (keys, values), strict=True):
            held.index_copy_(2, column, new[:, :, None])
        return self.held[0], self.held[1]

    def count(self) -> None:
        """One more column has been put."""
        self.seen += 1

    def blank(self) -> None:
        """Makes numbers of what is not written yet: a mask hides a number, but not a NaN."""
        for held in self.held:
            held[:, :, self.seen :] = 0

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows, and copies only what is filled."""
        for i, held in enumerate(self.held):
            kept = held.new_empty(len(rows), *held.shape[1:])
            kept[:, :, : self.seen] = held[rows, :, : self.seen]
            self.held[i] = kept
