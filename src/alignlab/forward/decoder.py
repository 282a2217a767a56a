"""A decoder's layers, run over tokens that stand in one row: (N,) token ids and positions -> hidden states (N, H).

Weights, biases, adapters and rotary frequencies are those of the `transformers` modules; the sums between them are
written here, once for all architectures that share this form, so that a token may belong to any row: only attention
knows which, and the caller brings it. Nothing is padded, no mask or table is made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignlab.forward.fused import gated, linear, norm, rotate

KNOWN = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Types of models whose layers have this form; any other architecture goes the plain way."""


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What a layer's attention is, besides its weights."""

    layer: int
    window: int | None
    """How many positions back it sees, its own included; None: all."""
    scaling: float
    """Factor on the products of queries and keys."""
    softcap: float | None
    """c of c * tanh(logit / c); None = no cap."""
    dropout: float


Attend = Callable[[AttentionKind, Tensor, Tensor, Tensor], Tensor]
"""Queries (N, heads, D), keys and values (N, key heads, D) -> (N, heads, D); in the last layer perhaps M queries."""


def decode(
    decoder: nn.Module, input_ids: Tensor, positions: Tensor, attend: Attend, kept: Tensor | None = None
) -> Tensor:
    """The decoder's hidden states after its final norm, (N, H), of tokens (N,) at positions (N,).

    With `kept` only those of the M tokens it names, (M, H): in the last layer the others are keys and values, no more.
    """
    inner: Any = getattr(decoder, "language_model", decoder)
    config = inner.config
    hidden: Tensor = inner.embed_tokens(input_ids)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    by_kind = config.model_type == "gemma3_text"
    tables = {kind: rotary(inner, hidden, positions, kind if by_kind else None) for kind in dict.fromkeys(kinds)}
    recomputes = decoder.training and torch.is_grad_enabled()
    for index, (layer, kind) in enumerate(zip(inner.layers, kinds, strict=True)):
        keeps = kept if index + 1 == len(inner.layers) else None
        run = partial(_layer, layer, tables[kind], attention_kind(layer.self_attn, index), attend, keeps)
        if recomputes and getattr(layer, "gradient_checkpointing", False):
            hidden = cast(Tensor, checkpoint(run, hidden, use_reentrant=False))
        else:
            hidden = run(hidden)
    return norm(inner.norm, hidden)


def attention_kind(attention: Any, layer: int = 0) -> AttentionKind:
    """Read off a module of `transformers`."""
    config = attention.config
    window = attention.sliding_window if hasattr(attention, "sliding_window") else None
    if config.model_type == "mistral":
        window = config.sliding_window
    return AttentionKind(
        layer=layer,
        window=window,
        scaling=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        dropout=attention.attention_dropout if attention.training else 0.0,
    )


def rotary(inner: Any, hidden: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
    """cos and sin as `rotate` takes them, (N, 1, D) each."""
    cos, sin = inner.rotary_emb(hidden[None], positions[None], *([] if kind is None else [kind]))
    sin = sin[0, :, None].clone()
    sin[..., : sin.shape[-1] // 2].neg_()
    return cos[0, :, None].contiguous(), sin


def _layer(
    layer: Any, table: tuple[Tensor, Tensor], kind: AttentionKind, attend: Attend, kept: Tensor | None, hidden: Tensor
) -> Tensor:
    """One layer (N, H) -> (N, H), or (M, H) of what is kept. Gemma 2 and 3 norm what they add, too."""
    norms_both = hasattr(layer, "post_feedforward_layernorm")
    attention = layer.self_attn
    given = norm(layer.input_layernorm, hidden)
    key, value = (
        linear(projection, given).view(len(given), -1, attention.head_dim)
        for projection in (attention.k_proj, attention.v_proj)
    )
    asking = table
    if kept is not None:
        hidden, given = hidden.index_select(0, kept), given.index_select(0, kept)
        asking = table[0].index_select(0, kept), table[1].index_select(0, kept)
    query = linear(attention.q_proj, given).view(len(given), -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        query, key = norm(attention.q_norm, query), norm(attention.k_norm, key)
    if getattr(attention, "use_rope", True):
        query, key = rotate(query, *asking), rotate(key, *table)
    found = linear(attention.o_proj, attend(kind, query, key, value).reshape(len(hidden), -1))
    if norms_both:
        hidden = norm(layer.post_attention_layernorm, found, hidden)
        given = norm(layer.pre_feedforward_layernorm, hidden)
    else:
        hidden = hidden + found
        given = norm(layer.post_attention_layernorm, hidden)
    mlp = layer.mlp
    found = linear(mlp.down_proj, gated(mlp.act_fn, linear(mlp.gate_proj, given), linear(mlp.up_proj, given)))
    return norm(layer.post_feedforward_layernorm, found, hidden) if norms_both else hidden + found
