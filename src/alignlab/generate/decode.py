"""From prompts to the states that predict each next token: prompts -> states, tokens -> states, with a cache between.

Two ways that say the same. `PlainDecoder` leaves padding, masks and the growing cache to transformers and so works for
every architecture. `FastDecoder` runs the prompts packed, without padding, writes keys and values where they stay, and
hands every layer a mask that is only cut, never made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from alignlab.data import left_pad
from alignlab.forward.packed import OneToken, make_layout, next_states, packed_states, takes_layout
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


def start(model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int) -> Decoder:
    """Reads the prompts, each once.

    Args:
        rows: (R,) the prompt of each row to decode.
        limit: tokens that will be decoded at most.
    """
    kind = FastDecoder if takes_layout(unwrap(model)) else PlainDecoder
    return kind(model, prompts, rows, limit, pad_id)


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
    """Through a cache that is allocated once, for models whose attention takes layouts."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int) -> None:
        device, self._inner, self._trunk = rows.device, unwrap(model), trunk(model)
        ids, mask, _ = left_pad(prompts, pad_id)
        count, width = ids.shape
        lengths = mask.sum(-1)
        layout = make_layout(
            RowShapes(tuple(lengths.tolist()), (0,) * count, tuple(range(count))), int(lengths.max()), device
        )
        right = torch.cat([row[keep] for row, keep in zip(ids, mask, strict=True)])  # without padding, one by one
        first = lengths.cumsum(0) - lengths
        at = (first[:, None] + (torch.arange(width)[None] - (width - lengths)[:, None])).clamp(min=0)
        at = torch.where(mask, at, 0).to(device)[rows]  # (R, width): where each row's keys lie in the packed row
        self._windows = _windows(self._inner)
        self._layers = [_Keys(at[:, _first(width + 1, window) :], limit, window) for window in self._windows]
        self._cache = Cache(layers=[*self._layers])
        packed = packed_states(
            self._trunk, self._inner, right.to(device), layout, past_key_values=self._cache, use_cache=True
        )
        self.states = packed[(first + lengths - 1).to(device)[rows]]
        self._length, self._seen = lengths.to(device)[rows], width
        known = mask.to(device)[rows]
        self._mask = None if bool(mask.all()) else torch.cat([known, known.new_ones(len(rows), limit)], 1)

    def step(self, tokens: Tensor) -> None:
        self._seen += 1
        masks: dict[int | None, Tensor | None] = dict.fromkeys(self._windows)
        if self._mask is not None:
            masks = {w: self._mask[:, None, None, _first(self._seen, w) : self._seen] for w in masks}
        layout = OneToken(self._length[:, None], masks)
        self.states = next_states(self._trunk, self._inner, tokens, layout, past_key_values=self._cache, use_cache=True)
        self._length = self._length + 1

    def keep(self, rows: Tensor) -> None:
        for layer in self._layers:
            layer.keep(rows)
        self._length = self._length[rows]
        self._mask = None if self._mask is None else self._mask[rows]


def _windows(model: PreTrainedModel) -> list[int | None]:
    """How far back each layer sees; None: to the beginning."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return [window] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _first(seen: int, window: int | None) -> int:
    """The first of the columns seen so far that is not behind the window."""
    return 0 if window is None else max(0, seen - window)


class _Keys(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (R, key heads, width + limit, D): first those of the prompts, taken apart from
    their packed row, then one column a step. What a window has passed is neither kept of prompts nor handed out."""

    is_sliding = False

    def __init__(self, at: Tensor, limit: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at, self._limit, self._window, self._seen = at, limit, window, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        count, width = self._at.shape
        for name, given in (("keys", key_states), ("values", value_states)):
            buffer = given.new_empty(count, given.shape[1], width + self._limit, given.shape[3])
            # transposed so that a row of the packed keys is one stretch of memory
            buffer[:, :, :width] = given[0].transpose(0, 1)[self._at].transpose(1, 2)
            setattr(self, name, buffer)
        self._seen, self.is_initialized = width, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self._seen] = key_states[:, :, 0]
        self.values[:, :, self._seen] = value_states[:, :, 0]
        self._seen += 1
        first = _first(self._seen, self._window)
        return self.keys[:, :, first : self._seen], self.values[:, :, first : self._seen]

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows, and copies only what is filled."""
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            kept = buffer.new_empty(len(rows), *buffer.shape[1:])
            kept[:, :, : self._seen] = buffer[rows, :, : self._seen]
            setattr(self, name, kept)

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        return -1
