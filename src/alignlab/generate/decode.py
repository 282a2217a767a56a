"""From prompts to the states that predict each next token: prompts -> states, tokens -> states, with a cache between.

Two ways that say the same. `PlainDecoder` leaves padding, masks and the growing cache to transformers and so works for
every architecture. `FastDecoder` runs the prompts packed, without padding, writes keys and values where they stay, and
hands every layer a mask that is only cut, never made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from alignlab.data import left_pad
from alignlab.forward.packed import MASK_A_KIND, attention_of, make_layout, packed_states, takes_layout
from alignlab.models import Model, trunk, unwrap
from alignlab.types import RowShapes


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
        config = self._inner.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        if config.model_type == "mistral" and window is not None:
            kinds = ["sliding_attention"] * config.num_hidden_layers
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
        self._layers = [_Keys(at, limit, w) for w in windows]
        self._cache = Cache(layers=[*self._layers])
        packed = packed_states(
            self._trunk, self._inner, right.to(device), layout, past_key_values=self._cache, use_cache=True
        )
        self.states = packed[(first + lengths - 1).to(device)[rows]]
        self._length, self._seen, self._window = lengths.to(device)[rows], width, window
        known = mask.to(device)[rows]
        self._mask = torch.cat([known, known.new_ones(len(rows), limit)], 1)
        self._masks_by_kind = config.model_type in MASK_A_KIND
        self._additive = attention_of(self._inner) == "eager"
        self._slides = any(w is not None for w in windows)
        self._all_slide = self._slides and not self._masks_by_kind

    def step(self, tokens: Tensor) -> None:
        self._seen += 1
        full = self._as_mask(self._mask[:, : self._seen])
        masks: Any = full
        if self._slides:
            first = max(0, self._seen - cast(int, self._window))
            sliding = self._as_mask(self._mask[:, first : self._seen])
            masks = sliding if self._all_slide else {"full_attention": full, "sliding_attention": sliding}
        elif self._masks_by_kind:
            masks = {"full_attention": full, "sliding_attention": full}
        output = self._trunk(
            input_ids=tokens[:, None],
            attention_mask=masks,
            position_ids=self._length[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self.states = cast(Tensor, output.last_hidden_state)[:, -1]
        self._length = self._length + 1

    def keep(self, rows: Tensor) -> None:
        for layer in self._layers:
            layer.keep(rows)
        self._mask, self._length = self._mask[rows], self._length[rows]

    def _as_mask(self, attended: Tensor) -> Tensor:
        """(R, K) -> (R, 1, 1, K), as the model's attention takes it."""
        mask = attended[:, None, None]
        if not self._additive:
            return mask
        least = torch.finfo(self.states.dtype).min
        return torch.zeros(mask.shape, dtype=self.states.dtype, device=mask.device).masked_fill(~mask, least)


class _Keys(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, (R, key heads, width + limit, D): first those of the prompts, taken apart from
    their packed row, then one column a step. What a window has passed is not handed out."""

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
        first = 0 if self._window is None else max(0, self._seen - self._window)
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
