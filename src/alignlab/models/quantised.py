"""Quantised weights: the linear layers of a model, its head left out -> NF4 or 8-bit codes, frozen (bitsandbytes).

Weights are stored in few bits and computed with in the model's own type; activations are not quantised. So a token's
logprob depends on nothing else in the batch, sampling and scoring agree, and gradients flow through to the adapter.
"""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignlab.models.roles import Quantization
from alignlab.models.store import few_values


class NF4Linear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A linear layer in NormalFloat4, the scales of its blocks of 64 quantised once more (QLoRA, arXiv:2305.14314)."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        weight = linear.weight.detach()
        super().__init__(linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, device="meta")
        self.original = few_values(weight)
        options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        self.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=self, **options).to(device)
        self.bias = linear.bias
        # bitsandbytes would repack the weights at the first forward in evaluation mode on some CPUs, for products that
        # are in bfloat16 whatever the type and that no gradient passes.
        self.support_avx512bf16_for_cpu = False


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A linear layer in 8-bit integers with one scale for each output (the weights' half of arXiv:2208.07339).

    The paper quantises activations too, all but outliers that it finds in each batch: then a row's logprobs depend on
    its neighbours, and inputs pass through float16, in which Gemma overflows. Here they stay as they are.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        weight = linear.weight.detach()
        super().__init__(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta")
        self.original = few_values(weight)
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(device, torch.float16))
        self.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = cast(Tensor, _Int8Product.apply(x, self.weight.data, self.scales))  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Int8Product(torch.autograd.Function):
    """x @ W.T with W dequantised in the forward and again in the backward pass, so that it is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return functional.linear(x, dequantised(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        return gradient @ dequantised(codes, scales, gradient.dtype), None, None


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) int8 codes and (out,) largest absolute values -> weights."""
    return (codes * (scales / 127.0)[:, None]).to(dtype)


def quantise(model: PreTrainedModel, kind: Quantization, device: torch.device) -> None:
    """Replaces the model's linear layers one by one, in place, on `device`; the head stays.

    Raises:
        TypeError: some of its layers are linear but of a class that cannot be quantised (GPT-2's).
    """
    top = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    make = NF4Linear if kind == "4bit" else Int8Linear
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                raise TypeError(f"{type(model).__name__} has layers that cannot be quantised")
            if isinstance(child, nn.Linear) and child is not top:
                setattr(parent, name, make(child, device).train(child.training))
    model.quantization = kind  # type: ignore[assignment]
    setattr(model, f"is_loaded_in_{kind}", True)  # where peft looks
