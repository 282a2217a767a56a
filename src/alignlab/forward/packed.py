"""A batch as one packed row without padding, each shared prompt once: row shapes -> Layout, and its attention.

A decoder's linear layers, norms and rotary tables do not care which row a token is of; only attention does. So all
tokens of a microbatch stand in one row (N,): first the roots (a prompt that several rows share, or a whole row), then
the leaves (the completions of shared prompts). Attention takes them apart again, into stretches of queries with the
keys that they may see, and handles stretches of about the same size side by side, so that neither the spread of lengths
nor the half of each square that is masked costs much. Values and gradients are those of padded rows, up to the order of
additions; what is saved is padding, and a prompt's forward and backward pass for all but one sibling.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab.forward.decoder import KNOWN, AttentionKind, decode
from alignlab.types import RowShapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRETCH = 64
"""Queries of a stretch at most: shorter ones mask less of their square, and are more to handle."""
ROUND = 16
"""Numbers of keys are told apart up to multiples of this."""
OVERHEAD = 4096
"""What a further group of stretches costs, in pairs of a query and a key."""
REMEMBERED = 8192
"""Tokens up to which a layout is kept for the next model that sees the same rows: its masks take memory."""
NOWHERE = 2**40
"""Index of a state that is not there."""


Wanted = Literal["all", "actions", "last"]
"""Whose states are read: every token's, those that predict a completion token, or each row's last one."""


class Stretch(NamedTuple):
    """Queries first .. last - 1 of a row; they see what stands before them in the row, and themselves."""

    row: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Group:
    """S stretches side by side, padded to L queries and K keys. Padded queries repeat their stretch's last one."""

    queries: Tensor  # (S * L,) packed place of each
    keys: Tensor  # (S * K,) packed place of each
    allowed: Tensor  # (S, L, K) bool
    masks: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    def mask(self, like: Tensor, shared: int) -> Tensor:
        """(S, 1, shared * L, K), added to logits: 0 where a query sees a key, else the least number there is."""
        if (like.dtype, shared) not in self.masks:
            least = torch.finfo(like.dtype).min
            mask = torch.zeros(self.allowed.shape, dtype=like.dtype, device=like.device)
            mask = mask.masked_fill_(~self.allowed, least)
            self.masks[like.dtype, shared] = mask.repeat(1, shared, 1)[:, None]
        return self.masks[like.dtype, shared]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every token of a batch (B, T) lies in its packed row (N,), and what each sees there.

    The last layer has only M of them ask, whose states are wanted: the row it gives is (M,). Earlier ones have all.
    """

    tokens: Tensor  # (N,) index of each into the flat (B * T) tokens
    positions: Tensor  # (N,)
    kept: Tensor | None  # (M,) places that the last layer keeps; None: all
    state: Tensor  # (B, T) index into the last layer's row; one that is an error where no state is wanted
    asking: tuple[tuple[Stretch, ...], tuple[Stretch, ...]]  # in earlier layers, in the last one
    places: tuple[Tensor, Tensor]  # on the host, (B, T) index into the row of earlier layers and of the last one
    known: dict[tuple[int | None, bool], tuple[list[Group], Tensor]] = field(default_factory=dict)

    def groups(self, window: int | None, last: bool) -> tuple[list[Group], Tensor]:
        """What asks, in groups, and (N,) or (M,) where in all their results, one group after the other, each is."""
        asking, place = self.asking[last], self.places[last]
        if window is not None and window >= self.places[0].shape[1]:
            window = None  # which no row is long enough for
        if (window, last) not in self.known:
            device, found, start = self.tokens.device, [], 0
            where = torch.zeros(sum(s.last - s.first for s in asking), dtype=torch.long)
            for members in _grouped(asking, window):
                group, rows, columns = _group(members, window, place, self.places[0], device)
                where[place[rows, columns]] = start + torch.arange(rows.numel()).view(rows.shape)
                found.append(group)
                start += rows.numel()
            self.known[window, last] = found, where.to(device, non_blocking=True)
        return self.known[window, last]


def make_layout(shapes: RowShapes, width: int, device: torch.device, wanted: Wanted = "all") -> Layout:
    """Computed on the host from lengths alone, so that no accelerator has to be waited for; `width` is T.

    The last ones are remembered: critic, reference and policy see the same rows, epoch by epoch.
    """
    make = _remembered if sum(shapes.lengths) <= REMEMBERED else _made
    return make(shapes, width, device, wanted)


def _made(shapes: RowShapes, width: int, device: torch.device, wanted: Wanted) -> Layout:
    members: dict[int, list[int]] = {}
    for row, prompt in enumerate(shapes.prompts):
        members.setdefault(prompt, []).append(row)
    spans: list[Stretch] = []  # in packed order: roots, then leaves
    leaves: list[Stretch] = []
    siblings: dict[int, list[int]] = {}  # of the row that shows their prompt
    for rows in members.values():
        prompt = shapes.prompt_lengths[rows[0]]
        if len(rows) == 1 or prompt == 0:
            spans += [Stretch(row, 0, shapes.lengths[row]) for row in rows]
        else:
            spans.append(Stretch(rows[0], 0, prompt))
            leaves += [Stretch(row, prompt, shapes.lengths[row]) for row in rows]
            siblings[rows[0]] = rows
    spans += leaves

    def laid(spans: Sequence[Stretch]) -> Tensor:
        """(B, T): the spans one after the other, and an index that no row has where there is none."""
        place, total = torch.full((len(shapes.prompts), width), NOWHERE), 0
        for row, first, last in spans:
            rows = siblings.get(row, [row]) if first < shapes.prompt_lengths[row] else [row]
            place[rows, first:last] = torch.arange(total, total + last - first)
            total += last - first
        return place

    place = laid(spans)
    flat = torch.cat([s.row * width + torch.arange(s.first, s.last) for s in spans])
    wants = [s for s in (_wanted(s, shapes, siblings, wanted) for s in spans) if s.last > s.first]
    all_kept = wants == spans
    state = place if all_kept else laid(wants)
    kept = None if all_kept else torch.cat([place[s.row, s.first : s.last] for s in wants])
    return Layout(
        tokens=flat.to(device, non_blocking=True),
        positions=(flat % width).to(device, non_blocking=True),
        kept=None if kept is None else kept.to(device, non_blocking=True),
        state=state.to(device, non_blocking=True),
        asking=(_cut(spans), _cut(wants)),
        places=(place, state),
    )


_remembered = lru_cache(maxsize=4)(_made)


def _wanted(span: Stretch, shapes: RowShapes, siblings: dict[int, list[int]], wanted: Wanted) -> Stretch:
    """The part of a span whose states are read."""
    row, first, last = span
    prompt = shapes.prompt_lengths[row]
    shared = row in siblings and first < prompt
    if wanted == "all":
        return span
    if wanted == "actions":
        return Stretch(row, max(first, prompt - 1), last if shared else max(first, prompt - 1, last - 1))
    ends = shared and any(shapes.lengths[sibling] == prompt for sibling in siblings[row])
    return Stretch(row, max(first, last - 1) if ends or not shared else last, last)


def _cut(spans: Sequence[Stretch]) -> tuple[Stretch, ...]:
    return tuple(
        Stretch(row, at, min(at + STRETCH, last)) for row, first, last in spans for at in range(first, last, STRETCH)
    )


def _first_key(stretch: Stretch, window: int | None) -> int:
    return 0 if window is None else max(0, stretch.first + 1 - window)


def _grouped(stretches: Sequence[Stretch], window: int | None) -> list[list[Stretch]]:
    """Stretches of about as many keys together: the cheapest cuts through their order by size, groups costing their
    padded area and an overhead each."""
    bins: dict[int, list[Stretch]] = {}
    for stretch in stretches:
        bins.setdefault(-(-(stretch.last - _first_key(stretch, window)) // ROUND), []).append(stretch)
    sizes = sorted(bins)
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n sizes: what they cost, and where their last group begins
    for end in range(1, len(sizes) + 1):
        options = []
        count = width = 0
        for begin in range(end - 1, -1, -1):
            count += len(bins[sizes[begin]])
            width = max(width, max(s.last - s.first for s in bins[sizes[begin]]))
            options.append((best[begin][0] + count * width * sizes[end - 1] * ROUND + OVERHEAD, begin))
        best.append(min(options))
    groups, end = [], len(sizes)
    while end:
        begin = best[end][1]
        groups.append([s for size in sizes[begin:end] for s in bins[size]])
        end = begin
    return groups


def _group(
    stretches: Sequence[Stretch], window: int | None, place: Tensor, key_place: Tensor, device: torch.device
) -> tuple[Group, Tensor, Tensor]:
    """The group, and its queries' (S, L) rows and columns."""
    rows, first, last = (torch.tensor(numbers)[:, None] for numbers in zip(*stretches, strict=True))
    begin = torch.tensor([_first_key(s, window) for s in stretches])[:, None]
    columns = torch.minimum(first + torch.arange(int((last - first).max())), last - 1)  # (S, L)
    keys = begin + torch.arange(int((last - begin).max()))  # (S, K)
    distance = columns.int()[:, :, None] - keys.int()[:, None, :]  # below 0 for keys that are not real, too
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    rows = rows.expand(columns.shape)
    group = Group(
        queries=place[rows, columns].flatten().to(device, non_blocking=True),
        keys=key_place[rows[:, :1], torch.where(keys < last, keys, 0)].flatten().to(device, non_blocking=True),
        allowed=allowed.to(device, non_blocking=True),
    )
    return group, rows, columns


_agreed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def runs_packed(decoder: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a model runs on packed rows: its type is known, and its own forward pass says the same of a few tokens.

    The second is looked at once for each decoder: a configuration or release of `transformers` that does something else
    costs speed and a warning, and no wrong number.
    """
    if model.config.get_text_config().model_type not in KNOWN:
        return False
    if decoder not in _agreed:
        _agreed[decoder] = difference(decoder) <= _tolerance(model)
        if not _agreed[decoder]:
            warnings.warn(
                f"{type(decoder).__name__} computes something else than packed rows do (another release of "
                "transformers?); rows are padded, which is slower",
                stacklevel=2,
            )
    return _agreed[decoder]


def _tolerance(model: PreTrainedModel) -> float:
    exact = model.dtype.itemsize >= 4 and getattr(model, "quantization", None) is None
    return 1e-3 if exact else 5e-2


@torch.no_grad()
def difference(decoder: nn.Module) -> float:
    """||packed - plain|| / ||plain|| of the states of a few tokens, without dropout."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        embedding = cast(nn.Embedding, cast(Any, decoder).get_input_embeddings())
        device, size = embedding.weight.device, embedding.num_embeddings
        ids = torch.arange(11, 11 + 9 * 7, 7, device=device) % size
        layout = make_layout(RowShapes((len(ids),), (0,), (0,)), len(ids), device)
        own = decode(decoder, ids, layout.positions, partial(attend, layout)).float()
        plain = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0].float()
    finally:
        for module in training:
            module.training = True
    return float((own - plain).norm() / plain.norm())


def attend(layout: Layout, kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries (N or M, heads, D), keys and values (N, key heads, D) of a packed row -> (N or M, heads, D)."""
    groups, where = layout.groups(kind.window, len(query) < len(key))
    found = []
    for group in groups:
        count = len(group.allowed)
        asked, keys, values = (
            x.index_select(0, index).view(count, -1, *x.shape[1:]).transpose(1, 2)
            for x, index in ((query, group.queries), (key, group.keys), (value, group.keys))
        )
        found.append(_attention(asked, keys, values, group, kind).transpose(1, 2).flatten(0, 1))
    return (found[0] if len(found) == 1 else torch.cat(found)).index_select(0, where)


def _attention(query: Tensor, key: Tensor, value: Tensor, group: Group, kind: AttentionKind) -> Tensor:
    """(S, heads, L, D): queries that share a key head are laid one after the other, so that no key is copied."""
    segments, heads, length, size = query.shape
    grouped = query.reshape(segments, key.shape[1], -1, size)
    mask = group.mask(query, heads // key.shape[1])
    if kind.softcap is None:
        result = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, dropout_p=kind.dropout, scale=kind.scaling
        )
    else:
        logits = kind.softcap * torch.tanh(grouped @ key.transpose(-1, -2) * (kind.scaling / kind.softcap))
        weights = (logits + mask).softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        result = F.dropout(weights.to(query.dtype), kind.dropout) @ value
    return result.reshape(segments, heads, length, size)
