"""Each part of a layer says what the module of transformers says: values, gradients, and where it leaves off."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from alignlab import kernels
from alignlab.forward import fused as module
from alignlab.models import disable_dropout
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT32, FLOAT64

NORMS = {"llama": LlamaRMSNorm, "gemma": Gemma3RMSNorm}
TYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=["torch", "c"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with the loops in C and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "ready", lambda *_: False)
    elif not kernels.ready():
        pytest.skip("there is no C compiler")
    return module


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def agree(own: Callable[..., Tensor], other: Callable[..., Tensor], *given: Tensor) -> None:
    """The same values and the same gradients of everything given."""
    results = []
    for function in (own, other):
        found = function(*given)
        weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
        results.append((found, *torch.autograd.grad((found * weights).sum(), given)))
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, **FLOAT32 if mine.dtype == torch.float32 else FLOAT64)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind: str, residual: bool, fused: ModuleType) -> None:
    theirs = NORMS[kind](6, eps=0.1)
    nn.init.normal_(theirs.weight)
    x, before = (numbers(2, 3, 6, seed=seed, dtype=torch.float32) for seed in (0, 1))
    if residual:
        agree(lambda x, b, _: fused.norm(theirs, x, b), lambda x, b, _: b + theirs(x), x, before, theirs.weight)
    else:
        agree(lambda x, _: fused.norm(theirs, x), lambda x, _: theirs(x), x, theirs.weight)
    with torch.no_grad():
        assert_close(fused.norm(theirs, x), theirs(x), **FLOAT32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_round_as_their_modules_do(kind: str, dtype: torch.dtype) -> None:
    theirs = NORMS[kind](6, eps=1e-6).to(dtype)
    nn.init.normal_(theirs.weight)
    x = numbers(5, 6, dtype=dtype)
    assert_close(module.norm(theirs, x), theirs(x), **FLOAT32 if dtype == torch.float32 else FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rotary_embeddings(fused: ModuleType, dtype: torch.dtype) -> None:
    angles = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    odd = sin.clone()
    odd[..., :4].neg_()
    x = numbers(3, 2, 8, dtype=dtype)
    agree(lambda x: fused.rotate(x, cos, odd), lambda x: apply_rotary_pos_emb(x, x, cos, sin, 0)[0][0], x)
    with torch.no_grad():
        expected = apply_rotary_pos_emb(x, x, cos, sin, 0)[0][0]
        assert_close(fused.rotate(x, cos, odd), expected, **FLOAT32 if dtype == torch.float32 else FLOAT64)


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "silu", "relu", "gelu"])
def test_gates(name: str, fused: ModuleType) -> None:
    activation = ACT2FN[name]
    gate, up = (3 * numbers(5, 7, seed=seed, dtype=torch.float32).detach() for seed in (0, 1))
    agree(lambda g, u: fused.gated(activation, g, u), lambda g, u: activation(g) * u,
          gate.requires_grad_(), up.requires_grad_())  # fmt: skip
    with torch.no_grad():
        assert_close(fused.gated(activation, gate, up), activation(gate) * up, **FLOAT32)


class _One(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def adapted(bias: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        _One(bias).double(),  # type: ignore[arg-type]
        LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, **options),
        autocast_adapter_dtype=False,
    ).double()
    return model.base_model.model.layer


@pytest.mark.parametrize("rows", [1, 3, 8, 17])
@pytest.mark.parametrize("inner, outer", [(5, 8), (40, 12), (8, 6)])
def test_products(rows: int, inner: int, outer: int, fused: ModuleType) -> None:
    x, weight = numbers(rows, inner, dtype=torch.float32), numbers(outer, inner, seed=1, dtype=torch.float32)
    with torch.no_grad():
        found = fused.product(x, weight)
        assert found.is_contiguous()
        assert_close(found, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_adapters(bias: bool, fused: ModuleType) -> None:
    layer = adapted(bias)
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    x = numbers(9, 5)
    agree(lambda x, *_: fused.linear(layer, x), lambda x, *_: layer(x), x, *trained)
    with torch.no_grad():
        for few in (x, x[:3]):
            assert_close(fused.linear(layer, few), layer(few), **FLOAT64)
            assert_close(fused.linear(layer.base_layer, few), layer.base_layer(few), **FLOAT64)
    layer.enable_adapters(False)
    assert torch.equal(fused.linear(layer, x), layer.base_layer(x))


@pytest.mark.parametrize("case", ["dropout", "two adapters", "dora", "merged", "another dtype", "bias of B"])
def test_other_adapters_are_the_module_s(case: str) -> None:
    options = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "bias of B": {"lora_bias": True}}
    layer = adapted(False, **options.get(case, {}))  # type: ignore[arg-type]
    x = numbers(9, 5)
    if case == "two adapters":
        layer.update_layer("second", 2, 6, config=LoraConfig(r=2, lora_alpha=6, init_lora_weights=False))
        layer.double()
        layer.set_adapter(["default", "second"])
    if case == "merged":
        layer.merge()
    if case == "another dtype":
        layer.lora_A.float(), layer.lora_B.float()
    torch.manual_seed(1)
    found = module.linear(layer, x)
    torch.manual_seed(1)
    assert torch.equal(found, layer(x))
    if case == "dropout":
        disable_dropout(layer)
        assert_close(module.linear(layer, x), layer(x), **FLOAT64)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        (".addcmul_(x, along, value=-1)", "", lambda f: test_norms("llama", False, f)),
        ("mul_(factor).mul_(factor).div_", "mul_(factor).div_", lambda f: test_norms("gemma", True, f)),
        (
            "scaled.addcmul_(scaled, weight) if offset",
            "scaled.mul_(weight) if offset",
            lambda f: test_norms("gemma", False, f),
        ),
        ("cos, sin, -1.0), None", "cos, sin, 1.0), None", lambda f: test_rotary_embeddings(f, torch.float32)),
        ("(grad @ up).mul_(ctx.scale)", "(grad @ up)", lambda f: test_adapters(False, f)),
        (".addmm_(to_inner, down)", "", lambda f: test_adapters(False, f)),
        ("F.linear(x, weight, bias).addmm_", "F.linear(x, weight).addmm_", lambda f: test_adapters(True, f)),
    ],
)
def test_mutants_are_noticed(
    text: str, replacement: str, test: Callable[[ModuleType], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "ready", lambda *_: False)
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
