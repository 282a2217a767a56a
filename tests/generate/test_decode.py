"""All decoders give the states of plain forward passes, through prefill, steps and dropped rows."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

from alignlab import generate, kernels
from alignlab.forward.packed import runs_packed
from alignlab.generate import decode as module
from alignlab.generate.compiled import CompiledDecoder
from alignlab.generate.decode import FastDecoder, PlainDecoder
from alignlab.generate.graphs import StaticDecoder
from alignlab.models import trunk, unwrap
from tests.stand_ins import ARCHITECTURES, PROMPTS, WINDOW, plain_states, policy_of, random_ids, tiny
from tests.statistics.mutants import mutated
from tests.tolerances import Tolerance

STATES = Tolerance(rtol=2e-5, atol=2e-5)
LIMIT = 2 * WINDOW + 2
ROWS = (0, 0, 1, 2, 2, 2)
KEPT = {2: (0, 2, 3, 5), WINDOW + 3: (1, 2)}
"""Step -> which rows go on."""


def follow(kind: Any, policy: Any) -> None:
    """Rows of ragged prompts with tokens of their own, compared at every step."""
    texts = [[*PROMPTS[prompt]] for prompt in ROWS]
    tokens = torch.tensor(random_ids(*[LIMIT] * len(ROWS), seed=5))
    decoder = kind(policy, PROMPTS, torch.tensor(ROWS), LIMIT, 0)
    alive = list(range(len(ROWS)))

    def check(states: Tensor) -> None:
        expected = torch.stack([plain_states(policy, texts[row])[-1] for row in alive])
        assert states.shape == expected.shape
        assert_close(states, expected, **STATES)

    check(decoder.states)
    for step in range(LIMIT - 1):
        if step in KEPT:
            decoder.keep(torch.tensor(KEPT[step]))
            alive = [alive[i] for i in KEPT[step]]
        for row in alive:
            texts[row].append(int(tokens[row, step]))
        decoder.step(tokens[alive, step])
        check(decoder.states)


@pytest.mark.parametrize("kind", [PlainDecoder, FastDecoder, StaticDecoder])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_states_are_those_of_plain_passes(architecture: str, adapter: bool, kind: Any) -> None:
    policy = policy_of(architecture, adapter)
    assert runs_packed(trunk(policy), unwrap(policy))
    follow(kind, policy)


@pytest.mark.parametrize("kind", [FastDecoder, StaticDecoder])
@torch.no_grad()
def test_a_window_in_every_layer(kind: Any) -> None:
    """Mistral's, which says so by one number."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=WINDOW, initializer_range=0.3,
    )  # fmt: skip
    policy = MistralForCausalLM(config).eval()
    assert runs_packed(trunk(policy), policy)
    follow(kind, policy)


@torch.no_grad()
def fast(decode: ModuleType, architecture: str) -> None:
    policy = policy_of(architecture, False)
    assert runs_packed(trunk(policy), policy)
    follow(decode.FastDecoder, policy)


def test_which_is_chosen() -> None:
    rows = torch.tensor(ROWS)
    policy = tiny()
    with torch.no_grad():
        assert type(generate.start(policy, PROMPTS, rows, 64, 0)) is (
            CompiledDecoder if kernels.ready() else FastDecoder
        )
        assert type(generate.start(policy, PROMPTS, rows, 4, 0)) is FastDecoder  # too few tokens to lay out weights for
        policy.config.model_type = "something_else"
        assert type(generate.start(policy, PROMPTS, rows, 64, 0)) is PlainDecoder


@pytest.mark.parametrize(
    "text, replacement, architecture",
    [
        ("max(0, seen - window)", "0", "gemma3"),
        ("max(0, seen - window)", "max(0, seen - window - 1)", "gemma3"),
        ("- (width - lengths)[:, None]", "- 0", "llama"),
        ("self._length = self._length + 1\n\n    def keep(self, rows: Tensor) -> None:\n        for", 
         "pass\n\n    def keep(self, rows: Tensor) -> None:\n        for", "llama"),
        ("if bool(mask.all()) else", "if True else", "llama"),
        ("held[rows, :, : self.seen]", "held[: len(rows), :, : self.seen]", "llama"),
        ("read, layout.kept)[rows]", "read, layout.kept)[rows.flip(0)]", "llama"),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, architecture: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        fast(mutated(module, text, replacement), architecture)
