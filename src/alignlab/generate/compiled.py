"""Decoding steps of a small model in one call: tokens -> states, all layers in a loop in C.

An eager step of a small model starts a hundred operations of a few microseconds each, and starting them takes as long
as what they do. Weights are laid out anew for every wave of rows, adapters added, so the model has to be small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignlab import kernels
from alignlab.forward.decoder import attention_kind, rotary
from alignlab.forward.fused import GATES, NORMS, plain_weight
from alignlab.generate.decode import FastDecoder, first_seen
from alignlab.models import Model, trunk

MOST_WEIGHTS = 8_000_000
"""Of all layers; beyond this, products take so long that starting them does not matter."""
FEWEST_TOKENS = 8
"""To decode: laying out the weights has to pay."""
PANEL = 32
"""Outputs that stand side by side in a weight as `cpu.c` reads it."""
STEADY = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose table does not depend on how long a row is."""


class Program(NamedTuple):
    """What the loop in C reads of a decoder."""

    layers: Tensor
    """(depth, 21) int64: `Layer` in `cpu.c`; the last five columns are about keys and values."""
    numbers: Tensor
    """(depth, 2): scaling and cap of the attention."""
    sizes: tuple[int, int, int, int]
    """Heads, key heads, size of a head, intermediate size."""
    norms: tuple[float, float]
    """eps, and what is added to a norm's weight."""
    form: tuple[float, float]
    """Of the gate's activation."""
    weights: int
    windows: tuple[int | None, ...]
    held: list[Tensor]
    """What the addresses are of."""


def make_program(decoder: nn.Module, length: int) -> Program | None:
    """The program of a decoder that `decode` knows, for positions below `length`.

    None where it has to go the eager way: too large, on another device or in another type, or a layer is not plain.
    """
    inner: Any = getattr(decoder, "language_model", decoder)
    weights = sum(x.numel() for x in inner.layers.parameters())
    norms = {(type(m).__name__, _eps(m)) for m in inner.modules() if type(m).__name__.endswith("RMSNorm")}
    forms = {GATES.get(type(layer.mlp.act_fn).__name__) for layer in inner.layers}
    if len(norms) != 1 or len(forms) != 1 or weights > MOST_WEIGHTS or not kernels.ready(inner.norm.weight):
        return None
    (kind, eps), form = norms.pop(), forms.pop()
    if kind not in NORMS or form is None or not _steady(inner.rotary_emb):
        return None
    held: list[Tensor] = []
    lines, kinds = [], [attention_kind(layer.self_attn, i) for i, layer in enumerate(inner.layers)]
    names = getattr(inner.config, "layer_types", None) if inner.config.model_type == "gemma3_text" else None
    tables: dict[str | None, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(inner.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, None if names is None else names[index]
        both = hasattr(layer, "post_feedforward_layernorm")
        middle = layer.pre_feedforward_layernorm if both else layer.post_attention_layernorm
        if name not in tables:
            tables[name] = rotary(inner, inner.norm.weight.new_empty(0), torch.arange(length), name)
        packed = [
            _packed(modules)
            for modules in (
                (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
            )
        ]  # fmt: skip
        if not all(packed):
            return None
        to_heads, from_heads, to_gate, from_gate = filter(None, packed)
        line = [
            layer.input_layernorm.weight, *to_heads, _weight(attention, "q_norm"), _weight(attention, "k_norm"),
            *from_heads, layer.post_attention_layernorm.weight if both else None, middle.weight, *to_gate, *from_gate,
            _weight(layer, "post_feedforward_layernorm"),
            *(tables[name] if getattr(attention, "use_rope", True) else (None, None)),
        ]  # fmt: skip
        held += [x for x in line if x is not None]
        lines.append([0 if x is None else x.data_ptr() for x in line] + [0] * 5)
    if not kernels.ready(*held):
        return None
    config = inner.config
    return Program(
        layers=torch.tensor(lines),
        numbers=torch.tensor([(kind.scaling, kind.softcap or 0.0) for kind in kinds]),
        sizes=(config.num_attention_heads, config.num_key_value_heads, attention.head_dim, config.intermediate_size),
        norms=(eps, NORMS[kind]),
        form=form,
        weights=weights,
        windows=tuple(kind.window for kind in kinds),
        held=held,
    )


def _eps(norm: Any) -> float:
    return float(getattr(norm, "eps", None) or norm.variance_epsilon)


def _steady(rotary_embedding: Any) -> bool:
    kinds = getattr(rotary_embedding, "rope_type", "default")
    return set(kinds.values() if isinstance(kinds, dict) else [kinds]) <= STEADY


def _weight(parent: Any, name: str) -> Tensor | None:
    module = getattr(parent, name, None)
    return None if module is None else module.weight


def _packed(modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Linear layers of one input as one: weights (panels, in, PANEL) and biases (panels * PANEL) or None, filled up
    with zeros; None where one of them is not plain."""
    found = [plain_weight(module) for module in modules]
    if any(x is None for x in found):
        return None
    weights = [weight for weight, _ in filter(None, found)]
    biases = [bias for _, bias in filter(None, found)]
    weight = torch.cat(weights)
    missing = -len(weight) % PANEL
    panels = F.pad(weight, (0, 0, 0, missing)).view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()
    if all(bias is None for bias in biases):
        return panels, None
    filled = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    return panels, F.pad(torch.cat(filled), (0, missing))


class CompiledDecoder(FastDecoder):
    """`FastDecoder` with its steps in C."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int, program: Program
    ) -> None:
        super().__init__(model, prompts, rows, limit, pad_id)
        self._program = program
        self._inner: Any = getattr(self._trunk, "language_model", self._trunk)
        self._point()

    def step(self, tokens: Tensor) -> None:
        self._seen += 1
        program = self._program
        cache = []
        for layer, window in zip(self._layers, program.windows, strict=True):
            layer.count()
            cache.append((layer.seen - 1, first_seen(layer.seen, window)))
        program.layers[:, -2:] = torch.tensor(cache)
        self.states = kernels.decode_step(
            program.layers, program.numbers, self._inner.norm.weight, self._inner.embed_tokens(tokens).contiguous(),
            self._length, self._mask, program.sizes, self._seen, program.norms, program.form, program.weights,
        )  # fmt: skip
        self._length = self._length + 1

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self._point()

    def _point(self) -> None:
        """Tells the program where keys and values are."""
        where = [(k.data_ptr(), v.data_ptr(), k.shape[2]) for k, v in (layer.held for layer in self._layers)]
        self._program.layers[:, -5:-2] = torch.tensor(where)


def compiled_decoder(
    model: Model, prompts: Sequence[Sequence[int]], rows: Tensor, limit: int, pad_id: int
) -> CompiledDecoder | None:
    """The decoder of a small model on a CPU where loops in C are there; None for any other."""
    if limit < FEWEST_TOKENS or rows.device.type != "cpu" or not kernels.ready():
        return None
    program = make_program(trunk(model), max(map(len, prompts)) + limit)
    return None if program is None else CompiledDecoder(model, prompts, rows, limit, pad_id, program)
