"""Parts of a decoder layer with a backward pass of their own: tensors and modules in, tensors out.

The sums are those of the `transformers` modules, taken in fewer passes over memory: RMS norms (also with the residual
that they are added to), rotary embeddings, gated activations, linear layers under a LoRA adapter. What a part does not
cover (quantised weights, dropout on an adapter, norms in half precision, whose rounding is the module's own) goes
through the module. Where the loops of `kernels` are there, they do what is not a large matrix product.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alignlab import kernels

NORMS = {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
    "LlamaRMSNorm": 0.0,
    "MistralRMSNorm": 0.0,
    "Qwen2RMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0,
    "SmolLM3RMSNorm": 0.0,
}
"""What is added to the weight of a norm, 0 or 1. All compute in float32; another type is left to the module."""
FEW_ROWS = 8
"""Rows up to which weight @ x.T is the faster product on a CPU, where the weight has more rows than columns."""


def norm(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """RMS norm (arXiv:1910.07467) of x (..., H) by a module of `transformers`, added to a residual if there is one."""
    offset = NORMS.get(type(module).__name__)
    if offset is None or x.dtype != torch.float32:
        normed = cast(Tensor, module(x))
        return normed if residual is None else residual + normed
    weight = cast(Tensor, module.weight)
    eps = cast(float, getattr(module, "eps", None) or getattr(module, "variance_epsilon", None))
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps, offset, residual)[0]
    return cast(Tensor, _Norm.apply(x, weight, eps, offset, residual))  # type: ignore[no-untyped-call]


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and (..., 1) what every row was multiplied by."""
    if kernels.ready(x, weight, residual):
        return kernels.norm(x, weight, eps, offset, residual)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    factor = torch.addcmul(_constant(eps, x.dtype, x.device), length, length, value=1 / x.shape[-1]).rsqrt_()
    scaled = x * factor
    if residual is None:
        return scaled.addcmul_(scaled, weight) if offset else scaled.mul_(weight), factor
    return torch.addcmul(residual + scaled if offset else residual, scaled, weight), factor


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number that need not be made again at every call."""
    return torch.tensor(value, dtype=dtype, device=device)


class _Norm(torch.autograd.Function):
    """x (..., H), weight (H,), residual (..., H) or None -> (..., H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None) -> Tensor:
        result, factor = _normed(x, weight, eps, offset, residual)
        ctx.save_for_backward(x, weight, factor)
        ctx.offset = offset
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, Tensor | None]:
        x, weight, factor = ctx.saved_tensors
        grad_x = grad_weight = None
        grad_residual = grad if ctx.needs_input_grad[4] else None
        if kernels.ready(x, weight, factor):
            wants_weight = ctx.needs_input_grad[1]
            grad_x, grad_weight = kernels.norm_backward(grad.contiguous(), x, weight, factor, ctx.offset, wants_weight)
            return grad_x, grad_weight, None, None, grad_residual
        if ctx.needs_input_grad[0]:
            grad_x = torch.addcmul(grad, grad, weight) if ctx.offset else grad * weight
            along = torch.linalg.vecdot(grad_x, x)[..., None].mul_(factor).mul_(factor).div_(x.shape[-1])
            grad_x.addcmul_(x, along, value=-1).mul_(factor)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x).mul_(factor).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None, None, grad_residual


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of x (N, heads, D); cos and sin (N, 1, D), sin negated in its first half."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Rotate.apply(x, cos, sin))  # type: ignore[no-untyped-call]
    return _rotated(x, cos, sin, 1.0)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if kernels.ready(x, cos, sin):
        return kernels.rotate(x, cos, sin, sign)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=sign)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # sin is odd in the halves, so exchanging them only changes its sign
        return _rotated(grad.contiguous(), cos, sin, -1.0), None, None


GATES = {
    "GELUTanh": (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715),
    "SiLUActivation": (1.0, 0.0),
    "SiLU": (1.0, 0.0),
}
"""Activations of the form x sigmoid(a x + b x^3) -> (a, b); GELU by tanh is one, as (1 + tanh u) / 2 = sigmoid(2 u)."""


def gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up, (N, I) each (arXiv:2002.05202)."""
    form = GATES.get(type(activation).__name__)
    if form is None or not kernels.ready(gate, up):
        return cast(Tensor, activation(gate)) * up
    if not torch.is_grad_enabled():
        return kernels.gate(gate, up, *form)
    return cast(Tensor, _Gate.apply(gate, up, *form))  # type: ignore[no-untyped-call]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, a: float, b: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.form = a, b
        return kernels.gate(gate, up, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *kernels.gate_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.form), None, None


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or one under a LoRA adapter, of x (N, in) -> (N, out)."""
    if type(module) is nn.Linear:
        return _product(x, module)
    base: Any = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or base.weight.requires_grad or not hasattr(module, "lora_A") or module.merged:
        return cast(Tensor, module(x))
    layer = cast(Any, module)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return _product(x, base)
    lora = _plain_lora(layer, names, x.dtype)
    if lora is None:
        return cast(Tensor, module(x))
    down, up, scale = lora
    if not torch.is_grad_enabled():
        return _product(x, base).addmm_(x @ down.T, up.T, alpha=scale)
    return cast(Tensor, _Lora.apply(x, base.weight, base.bias, down, up, scale))  # type: ignore[no-untyped-call]


def plain_weight(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of what `linear` computes, an adapter added to it; None where that is no such layer."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    base: Any = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "lora_A") or module.merged:
        return None
    layer = cast(Any, module)
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return base.weight, base.bias
    lora = _plain_lora(layer, names, base.weight.dtype)
    if lora is None:
        return None
    down, up, scale = lora
    return torch.addmm(base.weight, up, down, alpha=scale), base.bias


def _product(x: Tensor, layer: nn.Linear) -> Tensor:
    if torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    found = product(x, layer.weight)
    return found if layer.bias is None else found.add_(layer.bias)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) @ weight.T (in, out) without gradients, in the fastest way for so few rows."""
    if len(x) <= kernels.PRODUCT_ROWS and len(weight) % 4 == 0 and kernels.ready(x, weight):
        return kernels.product(x, weight)
    if len(x) <= FEW_ROWS and len(weight) >= weight.shape[1] and x.device.type == "cpu":
        return (weight @ x.T).T.contiguous()
    return x @ weight.T


def _plain_lora(layer: Any, names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """A (r, in), B (out, r) and their scale where the layer is x W' + b + scale x A' B', all of one dtype."""
    if len(names) != 1 or getattr(layer, "lora_variant", {}):
        return None
    (name,) = names
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if up.bias is not None or (dropout.training and getattr(dropout, "p", 0.0)):
        return None
    if not dtype == layer.base_layer.weight.dtype == down.weight.dtype == up.weight.dtype:
        return None
    return down.weight, up.weight, float(layer.scaling[name])


class _Lora(torch.autograd.Function):
    """x (N, in), frozen weight (out, in) and bias (out,), A (r, in), B (out, r) -> (N, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        inner = x @ down.T
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(inner, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, weight, down, up, inner = ctx.saved_tensors
        to_inner = (grad @ up).mul_(ctx.scale)
        grad_x = (grad @ weight).addmm_(to_inner, down) if ctx.needs_input_grad[0] else None
        grad_down = to_inner.T @ x if ctx.needs_input_grad[3] else None
        grad_up = (grad.T @ inner).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_down, grad_up, None
