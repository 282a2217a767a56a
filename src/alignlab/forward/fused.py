"""Parts of a decoder layer with a backward pass of their own: tensors and modules in, tensors out.

The sums are those of the `transformers` modules, taken in fewer passes over memory: RMS norms (also with the residual
that they are added to), rotary embeddings, linear layers under a LoRA adapter. What a part does not cover (quantised
weights, dropout on an adapter, norms in half precision, whose rounding is the module's own) goes through the module.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        if ctx.needs_input_grad[0]:
            grad_x = torch.addcmul(grad, grad, weight) if ctx.offset else grad * weight
            along = torch.linalg.vecdot(grad_x, x)[..., None].mul_(factor).mul_(factor).div_(x.shape[-1])
            grad_x.addcmul_(x, along, value=-1).mul_(factor)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x).mul_(factor).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None, None, grad if ctx.needs_input_grad[4] else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of x (N, heads, D); cos and sin (N, 1, D), sin negated in its first half."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Rotate.apply(x, cos, sin))  # type: ignore[no-untyped-call]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # sin is odd in the halves, so rolling it back only changes its sign
        return torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


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


def _product(x: Tensor, layer: nn.Linear) -> Tensor:
    if torch.is_grad_enabled() or layer.bias is not None:
        return F.linear(x, layer.weight, layer.bias)
    return few_rows(x, layer.weight)


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) @ weight.T (in, out), by whichever order of the factors is faster for so few rows."""
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
