"""A batch as one packed row without padding, each shared prompt once: Batch -> Layout -> hidden states (N, H).

Linear layers, norms and rotary tables of a `transformers` decoder do not care which row a token is of; only attention
does. So all tokens of a microbatch stand in one row (1, N): first the roots (a prompt that several rows share, or a
whole row), then the leaves (the completions of shared prompts). Attention, which models look up by name, takes them
apart again: a root attends to itself, a leaf to its root and itself. Values and gradients are those of padded rows, up
to the order of additions; what is saved is padding, and a prompt's forward and backward pass for all but one sibling.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab.types import RowShapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_MASK = ("gemma", "llama", "mistral", "smollm3")
MASK_A_KIND = ("gemma2", "gemma3_text", "qwen2", "qwen3")
"""Types of models whose attention takes a layout, by whether their decoder takes one mask or one for each kind of
layer. Any other architecture goes the plain way."""
NAMES = {"sdpa": "alignlab_sdpa", "eager": "alignlab_eager"}
"""What the attention of such a model is called from then on; without a layout it is what it was."""


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
    """Where every token of a batch (B, T) lies in its packed row (1, N)."""

    tokens: Tensor  # (N,) index of each into the flat (B * T) tokens
    positions: Tensor  # (1, N)
    place: Tensor  # (B, T) index into the packed row; 0 on padding
    segments: tuple[Segments, ...]


@dataclass(frozen=True, slots=True)
class OneToken:
    """Rows that take one token each, with keys of their own before it: what each row's attention sees."""

    positions: Tensor  # (R, 1)
    masks: dict[int | None, Tensor | None]  # window -> (R, 1, 1, K) bool, True = attended; None = all of them


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
        positions=(flat % width)[None].to(device, non_blocking=True),
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


# ---- models ----------------------------------------------------------------------------------------------------------


def takes_layout(model: PreTrainedModel) -> bool:
    """Whether the model can be run on a packed row; if so, from now on its attention understands layouts."""
    config = model.config.get_text_config()
    if config.model_type not in ONE_MASK + MASK_A_KIND:
        return False
    if config._attn_implementation in NAMES:
        register()
        config._attn_implementation = NAMES[config._attn_implementation]
    return config._attn_implementation in NAMES.values()


def register() -> None:
    """Makes the names known to transformers, which takes seconds to import; to do so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, attention, mask in (("sdpa", _attend, sdpa_mask), ("eager", _attend_eagerly, eager_mask)):
        AttentionInterface.register(NAMES[name], attention)
        AttentionMaskInterface.register(NAMES[name], mask)


def attention_of(model: PreTrainedModel) -> str:
    """What the model's attention is, whether it has learned to take layouts or not."""
    name = str(model.config.get_text_config()._attn_implementation)
    return {own: plain for plain, own in NAMES.items()}.get(name, name)


def packed_states(
    decoder: nn.Module, model: PreTrainedModel, input_ids: Tensor, layout: Layout, **options: Any
) -> Tensor:
    """The decoder's last hidden states, after its final norm, of a packed batch: (N, H).

    Args:
        input_ids: (N,), as the layout has them.
        options: for the decoder's forward pass, e.g. a cache.
    """
    return _states(decoder, model, input_ids[None], layout, **options)[0]


def next_states(decoder: nn.Module, model: PreTrainedModel, tokens: Tensor, layout: OneToken, **options: Any) -> Tensor:
    """The decoder's states after one more token of each row: (R,) -> (R, H); options bring the cache."""
    return _states(decoder, model, tokens[:, None], layout, **options)[:, 0]


def _states(
    decoder: nn.Module, model: PreTrainedModel, input_ids: Tensor, layout: Layout | OneToken, **options: Any
) -> Tensor:
    config = model.config.get_text_config()
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # a given mask keeps it from making one
    masks: Any = unused
    if config.model_type in MASK_A_KIND:
        masks = dict.fromkeys(("full_attention", "sliding_attention"), unused)
    output = decoder(
        input_ids=input_ids,
        attention_mask=masks,
        position_ids=layout.positions,
        layout=layout,
        **options,
    )
    return cast(Tensor, output.last_hidden_state)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | OneToken | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _with_layout(query, key, value, layout, **options), None


def _attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | OneToken | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None:
        plain = sys.modules[type(module).__module__].eager_attention_forward
        return cast(tuple[Tensor, Tensor | None], plain(module, query, key, value, attention_mask, **options))
    return _with_layout(query, key, value, layout, **options), None


def _with_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | OneToken,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """What models call: their options, and those of them that count."""
    if isinstance(layout, OneToken):
        return _one_token(query, key, value, layout.masks[sliding_window], scaling, softcap)
    return _by_segment(query, key, value, layout, scaling, dropout, sliding_window, softcap)


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """(R, heads, 1, D) and (R, key heads, K, D) twice -> (R, 1, heads, D), no key copied."""
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    logits = grouped @ key.transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return (weights.to(value.dtype) @ value).reshape(rows, 1, heads, size)


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(1, heads, N, D) and (1, key heads, N, D) twice -> (1, N, heads, D)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    found = []
    for segments in layout.segments:
        count, width = len(segments.lengths), segments.width
        end = segments.start + sum(segments.lengths)

        def split(x: Tensor, index: Tensor | None, span: slice, rows: int = count) -> Tensor:
            x = x[span] if index is None else x.index_select(0, index)
            return x.reshape(rows, -1, *x.shape[1:]).transpose(1, 2)

        own = slice(segments.start, end)
        asked = split(q, segments.queries, own)
        at = segments.queries if segments.keys is None else segments.keys
        keys, values = split(k, at, own), split(v, at, own)
        result = _attention(asked, keys, values, segments.mask(window), scaling, dropout, softcap)
        flat = result.transpose(1, 2).reshape(count * width, *q.shape[1:])
        found.append(flat if segments.results is None else flat.index_select(0, segments.results))
    return (found[0] if len(found) == 1 else torch.cat(found))[None]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """(S, heads, L, D): queries that share a key head are laid one after the other, so that no key is copied."""
    if softcap is None and mask is None:
        shared = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shared
        )
    segments, heads, length, size = query.shape
    grouped = query.reshape(segments, key.shape[1], -1, size)
    if mask is None:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    mask = mask.repeat(1, 1, heads // key.shape[1], 1)
    if softcap is None:
        result = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        scale = size**-0.5 if scaling is None else scaling
        logits = softcap * torch.tanh(grouped @ key.transpose(-1, -2) * (scale / softcap))
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1, dtype=torch.float32)
        result = F.dropout(weights.to(query.dtype), dropout) @ value
    return result.reshape(segments, heads, length, size)
