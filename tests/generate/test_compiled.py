"""Steps in C give the states of plain forward passes, and whatever they do not cover goes the eager way."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    SmolLM3Config,
)

from alignlab import generate, kernels
from alignlab.forward.packed import runs_packed
from alignlab.generate import compiled as module
from alignlab.generate.compiled import CompiledDecoder, compiled_decoder
from alignlab.models import trunk, unwrap
from tests.generate.test_decode import LIMIT, ROWS, follow
from tests.stand_ins import ARCHITECTURES, PROMPTS, SHAPE, UNPADDED, WINDOW, adapted, nudge, policy_of, tiny
from tests.statistics.mutants import mutated

pytestmark = [
    pytest.mark.skipif(not kernels.ready(), reason="there is no C compiler"),
    pytest.mark.usefixtures("without_gradients"),
]


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**SHAPE, **UNPADDED, **changes}, tie_word_embeddings=False)


MORE: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral": lambda: MistralConfig(**{**SHAPE, **UNPADDED}, sliding_window=WINDOW),
    "qwen3": lambda: Qwen3Config(**{**SHAPE, **UNPADDED}),
    "smollm3": lambda: SmolLM3Config(**{**SHAPE, **UNPADDED}, no_rope_layers=[1, 0]),
    "biases everywhere": lambda: llama(attention_bias=True, mlp_bias=True),
    "one head, odd sizes": lambda: llama(
        hidden_size=20, num_attention_heads=1, num_key_value_heads=1, head_dim=20, intermediate_size=18
    ),
}


@pytest.fixture
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def made(model: Any) -> CompiledDecoder | None:
    return compiled_decoder(model, PROMPTS, torch.tensor(ROWS), LIMIT, 0)


def step_by_step(model: Any, of: ModuleType = module) -> None:
    assert runs_packed(trunk(model), unwrap(model))

    def start(*arguments: Any) -> CompiledDecoder:
        decoder = of.compiled_decoder(*arguments)
        assert decoder is not None
        return cast(CompiledDecoder, decoder)

    follow(start, model)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_plain_passes(architecture: str, adapter: bool) -> None:
    step_by_step(policy_of(architecture, adapter))


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MORE[name]()).eval()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    nudge(model, scale=0.2)
    return cast(PreTrainedModel, model)


@pytest.mark.parametrize("name", MORE)
def test_other_shapes(name: str) -> None:
    step_by_step(random_model(name))


def test_threads_share_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(kernels, "SPLIT", 8)
    torch.set_num_threads(3)
    kernels._threads.cache_clear()
    try:
        step_by_step(tiny())
    finally:
        torch.set_num_threads(before)
        kernels._threads.cache_clear()


def test_a_wave_sees_the_weights_of_its_own_time() -> None:
    policy = policy_of("gemma3", True)
    step_by_step(policy)
    nudge(policy, scale=0.05, seed=7)
    step_by_step(policy)


def test_whatever_is_not_plain_goes_the_eager_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(tiny()) is not None
    assert made(tiny(dtype=torch.float64)) is None
    assert made(tiny(dtype=torch.bfloat16)) is None
    dropping = adapted(tiny())
    for part in dropping.modules():
        if isinstance(part, nn.Dropout | nn.Identity):
            part.p = 0.5  # type: ignore[assignment]
            part.train()
    assert made(dropping) is None
    two = adapted(tiny())
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    assert made(two) is None
    stretched = tiny()
    stretched.model.rotary_emb.rope_type = "dynamic"  # type: ignore[union-attr, assignment]
    assert made(stretched) is None
    mixed = tiny()
    mixed.model.layers[0].input_layernorm.eps = 0.5  # type: ignore[union-attr, index, assignment]
    assert made(mixed) is None
    odd = tiny()
    odd.model.layers[1].mlp.act_fn = nn.ReLU()  # type: ignore[union-attr, index]
    assert made(odd) is None
    monkeypatch.setattr(module, "MOST_WEIGHTS", 1000)
    assert made(tiny()) is None
    assert type(generate.start(tiny(), PROMPTS, torch.tensor(ROWS), LIMIT, 0)).__name__ == "FastDecoder"


@pytest.mark.parametrize(
    "text, replacement, architecture",
    [
        ("(layer.seen - 1, first_seen(layer.seen, window))", "(layer.seen - 1, 0)", "gemma3"),
        ("super().keep(rows)\n        self._point()", "super().keep(rows)", "llama"),
        ("attention.q_proj, attention.k_proj, attention.v_proj", "attention.q_proj, attention.v_proj, attention.k_proj",
         "llama"),
        ("mlp.gate_proj, mlp.up_proj", "mlp.up_proj, mlp.gate_proj", "llama"),
        ("return panels, F.pad(torch.cat(filled), (0, missing))", "return panels, None", "qwen2"),
        ("self._length = self._length + 1", "pass", "llama"),
        ("kind.softcap or 0.0", "0.0", "gemma2"),
        ("self._length, self._mask, program", "self._length, None, program", "llama"),
        ("NORMS[kind]", "1.0 - NORMS[kind]", "gemma3"),
        ('_weight(attention, "q_norm")', 'None', "gemma3"),
        ('_weight(layer, "post_feedforward_layernorm")', 'None', "gemma3"),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, architecture: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        step_by_step(policy_of(architecture, False), mutated(module, text, replacement))
