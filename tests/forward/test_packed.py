"""Packed rows say what padded rows say: logprobs, values, gradients; whatever is shared, for every architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from alignlab import forward, kernels
from alignlab.data import collate
from alignlab.forward import packed as module
from alignlab.forward.decoder import KNOWN
from alignlab.forward.packed import runs_packed
from alignlab.models import AdapterOff, make_reference, make_reward_model, make_value_model, trunk
from alignlab.types import Batch, Row, RowShapes
from tests.stand_ins import ARCHITECTURES, WINDOW, policy_of, random_ids, tiny
from tests.statistics.mutants import mutated
from tests.tolerances import Tolerance

VALUES = Tolerance(rtol=2e-6, atol=1e-5)
GRADIENTS = 1e-4
"""Of the gradient's norm, in single precision."""
SHORT, LONG, ONE = (tuple(random_ids(n, seed=n)[0]) for n in (3, 3 * WINDOW, 1))
MADE: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "nothing shared, all alike": [(SHORT, 4), (SHORT[::-1], 4)],
    "nothing shared, ragged": [(SHORT, 2 * WINDOW), (LONG, 1), (ONE, 5)],
    "one group, all alike": [(LONG, 4)] * 3,
    "ragged groups and a single row": [
        (LONG, 2),
        (SHORT, 2 * WINDOW),
        (LONG, 7),
        (SHORT, 1),
        (ONE, 3),
        (LONG, 2 * WINDOW),
    ],
    "a prompt of one token": [(ONE, 3), (ONE, 6)],
    "a sibling that says nothing": [(SHORT, 0), (SHORT, 4), (SHORT, 2)],
    "no prompt": [((), 4), ((), 6)],
}


def batch_of(name: str) -> Batch:
    """Every completion with other tokens."""
    rows = [
        Row(prompt_ids=prompt, completion_ids=tuple(random_ids(length, seed=100 + i)[0]) if length else ())
        for i, (prompt, length) in enumerate(MADE[name])
    ]
    return collate(rows, pad_id=0)


@pytest.fixture
def packed() -> ModuleType:
    return module


class Ways:
    """The same numbers the packed and the plain way."""

    def __init__(self, packed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("make_layout", "attend"):
            monkeypatch.setattr(forward, name, getattr(packed, name))
        for name, small in {"STRETCH": 4, "ROUND": 2, "OVERHEAD": 8}.items():  # as large ones are to long rows
            monkeypatch.setattr(packed, name, small)
        packed._remembered.cache_clear()

    def both(self, function: Any, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """What the function gives, and the gradients of all that is trained; packed first."""
        results = []
        for pack in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(forward, "PACK", pack)
                model.zero_grad()
                found = function()
                total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in found)
                total.backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            results.append([*(x.detach() for x in found), torch.cat(gradients)])
        return results[0], results[1]

    def agree(self, function: Any, model: nn.Module) -> None:
        (*values, gradient), (*plain, expected) = self.both(function, model)
        for own, other in zip(values, plain, strict=True):
            assert_close(own, other, **VALUES)
        assert expected.norm() > 0 and (gradient - expected).norm() <= GRADIENTS * expected.norm()


@pytest.fixture
def ways(packed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(packed, monkeypatch)


def scores(policy: Any, batch: Batch) -> list[Tensor]:
    found = forward.score(policy, batch, temperature=0.7, entropy=True)
    assert found.entropy is not None
    return [found.logprobs, found.entropy]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_is_padded(architecture: str, made: str, adapter: bool, ways: Ways) -> None:
    policy, batch = policy_of(architecture, adapter), batch_of(made)
    assert runs_packed(trunk(policy), forward.unwrap(policy))
    ways.agree(lambda: scores(policy, batch), policy)


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip
WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
TYPES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 20, **WINDOWS},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 20, **WINDOWS},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **WINDOWS},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}


@pytest.mark.parametrize("made", ["nothing shared, ragged", "ragged groups and a single row"])
@pytest.mark.parametrize("kind", KNOWN)
def test_every_known_type(kind: str, made: str, ways: Ways) -> None:
    """With what its configuration can do: biases, windows, scales, layers without rotary embeddings."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **TYPES[kind])
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "gemma" not in kind else 0.0, 0.2)
    assert module.difference(trunk(policy)) < 1e-5
    batch = batch_of(made)
    ways.agree(lambda: scores(policy, batch), policy)


@pytest.mark.parametrize("made", ["nothing shared, ragged", "ragged groups and a single row"])
def test_of_the_starter_s_shape(made: str, ways: Ways) -> None:
    """Also by name, for mutants of the parts."""
    policy, batch = policy_of("gemma3", False), batch_of(made)
    ways.agree(lambda: scores(policy, batch), policy)


def test_soft_caps_by_hand(ways: Ways) -> None:
    policy, batch = policy_of("gemma2", False), batch_of("ragged groups and a single row")
    ways.agree(lambda: scores(policy, batch), policy)


@pytest.mark.parametrize("made", ["ragged groups and a single row", "a sibling that says nothing"])
def test_values_and_rewards(made: str, ways: Ways) -> None:
    """Read before each action and at the last token, of groups that share their prompt."""
    policy, batch = tiny(), batch_of(made)
    model = make_reward_model(policy, seed=3)
    ways.agree(lambda: [forward.values(model, batch), forward.rewards(model, batch)], model)
    critic = make_value_model(policy, "shared")
    nn.init.normal_(critic.head.weight)

    def both() -> list[Tensor]:
        found, values = forward.score_and_values(policy, critic, batch)
        return [found.logprobs, values]

    ways.agree(both, policy)


def test_the_reference_is_the_adapter_off(ways: Ways) -> None:
    policy, batch = policy_of("llama", True), batch_of("ragged groups and a single row")
    reference = make_reference(policy, fresh_adapter=True)
    assert isinstance(reference, AdapterOff)
    (off, _), (plain, _) = ways.both(
        lambda: [forward.score(reference, batch).logprobs + 0 * sum(p.sum() for p in policy.parameters())], policy
    )
    assert_close(off, plain, **VALUES)
    assert (forward.score(policy, batch).logprobs - off).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("made", ["nothing shared, ragged", "ragged groups and a single row"])
def test_recomputed_activations(made: str, ways: Ways) -> None:
    """The layout goes into the layers, so what is computed again is the same."""
    policy, batch = tiny(), batch_of(made)
    ways.agree(lambda: scores(policy, batch), policy)
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).clone()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    ways.agree(lambda: scores(policy, batch), policy)
    found = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert (found - expected).norm() <= GRADIENTS * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_does_something_else_goes_the_plain_way(dtype: torch.dtype) -> None:
    """A release whose layers add something new is noticed before a number is wrong, once and in one line."""
    policy, batch = tiny("llama", dtype=dtype), batch_of("ragged groups and a single row")
    forget = policy.model.layers[0].register_forward_hook(lambda module, args, out: out + 1)
    with pytest.warns(UserWarning, match="another release of transformers") as told:
        found = forward.score(policy, batch).logprobs
    assert len(told) == 1 and not policy.training
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "PACK", False)
        assert torch.equal(found, forward.score(policy, batch).logprobs)
    forget.remove()
    policy.train()
    assert runs_packed(trunk(other := tiny("llama", dtype=dtype).train()), other) and other.training
    assert all(module.training for module in other.modules())


def test_a_batch_without_shapes_and_an_unknown_architecture_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("packed")

    monkeypatch.setattr(forward, "decode", fail)
    policy, batch = tiny(), batch_of("nothing shared, ragged")
    forward.score(policy, replace(batch, shapes=None))
    with pytest.raises(AssertionError, match="packed"):
        forward.score(policy, batch)
    policy.config.model_type = "something_else"
    forward.score(policy, batch)


def test_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of several sizes, as they are."""
    lengths = [(200, 150), (200, 20), (70, 130), (1, 64), (64, 65), (9, 3)]
    prompts = {n: tuple(random_ids(n, seed=n)[0]) for n, _ in lengths}
    rows = [Row(prompt_ids=prompts[p], completion_ids=random_ids(c, seed=900 + c)[0]) for p, c in lengths]
    policy, batch = tiny(max_position_embeddings=512), collate(rows)
    assert batch.shapes is not None
    layout = module.make_layout(batch.shapes, batch.input_ids.shape[1], batch.input_ids.device, "actions")
    for window in (None, WINDOW):
        groups, where = layout.groups(window, False)
        assert len(groups) > 1 and len(where) == len(layout.tokens) == sum({p: p for p, _ in lengths}.values()) + sum(
            c for _, c in lengths
        )
    ways = Ways(module, monkeypatch)
    monkeypatch.undo()
    ways.agree(lambda: scores(policy, batch), policy)


@torch.no_grad()
def test_states_that_are_not_wanted_are_not_there() -> None:
    """Nobody reads another token's state by mistake."""
    policy, batch = tiny(), batch_of("ragged groups and a single row")
    states = forward.trunk_states(policy, batch, "actions")
    assert batch.shapes is not None and len(states.flat) == 3 + sum(
        n - p - 1 for n, p in zip(batch.shapes.lengths, batch.shapes.prompt_lengths, strict=True)
    )
    with pytest.raises(IndexError, match="masks name other tokens than its `shapes`"):
        states.at(torch.tensor([0]), torch.tensor([1]))


@torch.no_grad()
def test_the_prompt_is_computed_once_and_nothing_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ready", lambda *_: False)  # so that activations are modules' own
    seen = []
    policy, batch = tiny(), batch_of("ragged groups and a single row")
    assert runs_packed(trunk(policy), policy)  # which is looked at once
    policy.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    forward.score(policy, batch)
    completions = 2 + 2 * WINDOW + 7 + 1 + 3 + 2 * WINDOW
    assert seen == [len(LONG) + len(SHORT) + len(ONE) + completions]


def test_what_is_selected_keeps_its_shapes() -> None:
    batch = batch_of("ragged groups and a single row")
    few = batch.select(torch.tensor([3, 0, 4]))
    assert few.shapes == RowShapes(
        lengths=(len(SHORT) + 1, len(LONG) + 2, 4), prompt_lengths=(len(SHORT), len(LONG), 1), prompts=(1, 0, 2)
    )
    assert few.input_ids.shape == (3, len(LONG) + 2)
    assert few.attention_mask.sum(-1).tolist() == list(few.shapes.lengths)


STARTER, GROUPS = "nothing shared, ragged", "ragged groups and a single row"


@pytest.mark.parametrize(
    "text, replacement, test, made",
    [
        ("distance >= 0) & (distance < window)", "distance >= 0)", test_of_the_starter_s_shape, STARTER),
        ("distance >= 0) & (distance < window)", "distance >= 0)", test_of_the_starter_s_shape, GROUPS),
        ("distance < window", "distance <= window", test_of_the_starter_s_shape, GROUPS),
        ("positions=(flat % width)", "positions=torch.arange(len(flat))",
         test_of_the_starter_s_shape, GROUPS),
        ("max(0, stretch.first + 1 - window)", "max(0, stretch.first + 2 - window)",
         test_of_the_starter_s_shape, GROUPS),
        ("return Stretch(row, max(first, prompt - 1), last if", "return Stretch(row, max(first, prompt), last if",
         test_of_the_starter_s_shape, GROUPS),
        ("where[place[rows, columns]] = start + ", "where[place[rows, columns]] = ",
         test_of_the_starter_s_shape, GROUPS),
        ("max(first, last - 1) if ends or not shared else last", "max(first, last - 1) if not shared else last",
         test_values_and_rewards, "a sibling that says nothing"),
        ("scale=kind.scaling", "scale=1.0", test_of_the_starter_s_shape, GROUPS),
        ("kind.softcap * torch.tanh(grouped @ key.transpose(-1, -2) * (kind.scaling / kind.softcap))",
         "grouped @ key.transpose(-1, -2) * kind.scaling", test_soft_caps_by_hand, None),
    ],
)  # fmt: skip
def test_mutants_are_noticed(
    text: str, replacement: str, test: Any, made: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = mutated(module, text, replacement)
    arguments: Sequence[Any] = (made,) if made else ()
    with pytest.raises((AssertionError, IndexError)):
        test(*arguments, ways=Ways(mutant, monkeypatch))
