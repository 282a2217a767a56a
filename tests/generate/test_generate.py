"""The sampler against a loop without cache, padding or batches, and what a completion may not depend on."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch.testing import assert_close

from alignlab import generate as module
from alignlab.forward import score
from alignlab.forward.packed import runs_packed
from alignlab.generate import CACHE_MB, Sampled, Sampling, SamplingKey
from alignlab.generate.decode import cache_bytes
from alignlab.models import AdapterOff, make_value_model, trunk, unwrap
from tests.stand_ins import (
    ARCHITECTURES,
    PROMPTS,
    VOCABULARY,
    WINDOW,
    adapted,
    batch_of,
    nudge,
    plain_logits,
    policy_of,
    random_ids,
    tiny,
)
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT32, Tolerance

SAMPLED32 = Tolerance(rtol=5e-5, atol=5e-5)
"""One token at a time from a cache against the whole row at once, in single precision, after a log-softmax."""
LEAST_P = 0.001
"""Smallest p-value that numbers drawn with a fixed seed may have."""
NO_STOP: frozenset[int] = frozenset()
KEYS = tuple(SamplingKey(42, 3, f"prompt/{i}") for i in range(len(PROMPTS)))


@pytest.fixture
def generate() -> ModuleType:
    return module


def sample(
    policy: Any,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    keys: Sequence[SamplingKey] = KEYS,
    *,
    num_samples: int = 3,
    stop_ids: frozenset[int] | Sequence[frozenset[int]] = NO_STOP,
    pad_id: int = 0,
    max_rows: int = 512,
    cache_mb: int = CACHE_MB,
    limits: Sequence[int] | None = None,
    using: ModuleType = module,
    **sampling: Any,
) -> list[list[Sampled]]:
    choice = Sampling(**{"max_completion_tokens": 12, **sampling})
    return using.generate(  # type: ignore[no-any-return]
        policy,
        prompts,
        keys,
        choice,
        num_samples=num_samples,
        stop_ids=stop_ids,
        pad_id=pad_id,
        max_rows=max_rows,
        cache_mb=cache_mb,
        limits=limits,
    )


def ids(groups: list[list[Sampled]]) -> list[list[tuple[int, ...]]]:
    return [[s.token_ids for s in group] for group in groups]


@torch.no_grad()
def chosen(
    policy: Any, prompt: Sequence[int], completion: Sequence[int], uniforms: np.ndarray, temperature: float
) -> list[int]:
    """After each prefix of the completion: the first token whose sum of probabilities exceeds u, by the plain model.

    Equal to the completion, it is what a loop of plain forwards without a cache would have drawn, token by token.
    """
    logits = plain_logits(policy, [*prompt, *completion])[len(prompt) - 1 : -1].double()
    sums = (logits / temperature).softmax(-1).cumsum(-1)
    return (sums <= torch.from_numpy(uniforms)[:, None] * sums[:, -1:]).sum(-1).tolist()  # type: ignore[no-any-return]


@contextmanager
def widths(policy: Any) -> Iterator[list[int]]:
    """How many tokens pass through the trunk at once, after the first look at it."""
    runs_packed(trunk(policy), unwrap(policy))
    seen: list[int] = []
    hook = trunk(policy).embed_tokens.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, given: seen.append(given[0].numel())
    )
    yield seen
    hook.remove()


# What is drawn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_a_plain_loop(architecture: str, adapter: bool) -> None:
    """Ragged left-padded prompts with a cache, shorter and longer than the window: the very same tokens."""
    policy = policy_of(architecture, adapter)
    for temperature in (1.0, 0.7):
        groups = sample(policy, num_samples=2, temperature=temperature)
        for prompt, key, group in zip(PROMPTS, KEYS, groups, strict=True):
            for k, completion in enumerate(group):
                own = list(completion.token_ids)
                assert own == chosen(policy, prompt, own, key.uniforms(k, 12), temperature)
    for prompt, group in zip(PROMPTS, sample(policy, num_samples=1, greedy=True), strict=True):
        own = list(group[0].token_ids)
        with torch.no_grad():
            assert own == plain_logits(policy, [*prompt, *own])[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_sampled_logprobs_are_the_scored_ones(architecture: str, adapter: bool) -> None:
    """At the sampling temperature, so that the ratio of a fresh rollout is 1; also under a filter and greedily."""
    policy = policy_of(architecture, adapter)
    for choice in ({"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5}, {"greedy": True}):
        groups = sample(policy, **choice)
        flat = [s for group in groups for s in group]
        batch = batch_of([p for p in PROMPTS for _ in range(3)], [s.token_ids for s in flat])
        temperature = float(choice.get("temperature", 1.0))
        scored = score(policy, batch, temperature=temperature).logprobs[batch.completion_mask]
        recorded = torch.tensor([x for s in flat for x in s.logprobs])
        assert_close(recorded, scored, **SAMPLED32)
        other = score(policy, batch, temperature=temperature + 0.1).logprobs[batch.completion_mask]
        assert (recorded - other).abs().max() > 100 * SAMPLED32["atol"]


@torch.no_grad()
def test_the_adapter_reaches_the_sampler() -> None:
    """A fresh adapter samples what the base does; after an update the policy differs and the reference does not."""
    base = ids(sample(tiny()))
    policy = adapted(tiny(), perturbed=False)
    assert ids(sample(policy)) == ids(sample(AdapterOff(policy))) == base
    nudge(policy)
    groups = sample(policy)
    assert ids(groups) != base and ids(sample(AdapterOff(policy))) == base
    batch = batch_of([p for p in PROMPTS for _ in range(3)], [s.token_ids for g in groups for s in g])
    recorded = torch.tensor([x for g in groups for s in g for x in s.logprobs])
    reference = score(AdapterOff(policy), batch).logprobs[batch.completion_mask]
    assert_close(recorded, score(policy, batch).logprobs[batch.completion_mask], **SAMPLED32)
    assert (recorded - reference).abs().max() > 100 * SAMPLED32["atol"]


# What it may not depend on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_neighbours_and_waves_change_nothing(architecture: str) -> None:
    """Alone, in another order, with more siblings, in waves of any size: the same tokens."""
    policy = policy_of(architecture, True, torch.float64)
    expected = ids(sample(policy))
    for max_rows in (1, 4, 5):
        assert ids(sample(policy, max_rows=max_rows)) == expected, max_rows
    assert ids(sample(policy, PROMPTS[::-1], KEYS[::-1])) == expected[::-1]
    assert [group[:3] for group in ids(sample(policy, num_samples=7))] == expected
    for prompt, key, group in zip(PROMPTS, KEYS, expected, strict=True):
        assert ids(sample(policy, [prompt], [key])) == [group]
        assert ids(sample(policy, [prompt], [key], num_samples=1)) == [group[:1]]


@pytest.mark.parametrize("look_every", [1, 5], ids=["cpu", "accelerator"])
def test_finished_rows_change_nothing(generate: ModuleType, look_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stop ids every completion is the one without them, cut after its first stop token."""
    monkeypatch.setitem(generate.LOOK_EVERY, "cpu", look_every)
    policy, stop_ids = tiny(dtype=torch.float64), frozenset(range(5, 11))
    endless = sample(policy, num_samples=8, max_completion_tokens=24, using=generate)
    stopped = sample(policy, num_samples=8, max_completion_tokens=24, stop_ids=stop_ids, using=generate)
    reasons = []
    for long, short in zip((s for g in endless for s in g), (s for g in stopped for s in g), strict=True):
        assert len(long.token_ids) == 24 and long.finish_reason == "length"
        first = next((i for i, token in enumerate(long.token_ids) if token in stop_ids), None)
        length = 24 if first is None else first + 1
        assert short.token_ids == long.token_ids[:length]
        assert short.finish_reason == ("length" if first is None else "stop")
        assert_close(torch.tensor(short.logprobs), torch.tensor(long.logprobs[:length]), **FLOAT32)
        reasons.append(short.finish_reason)
    assert {"stop", "length"} == set(reasons)


def test_a_limit_only_cuts() -> None:
    policy = tiny(dtype=torch.float64)
    long = ids(sample(policy, max_completion_tokens=12))
    for limit in (1, 5):
        assert ids(sample(policy, max_completion_tokens=limit)) == [[row[:limit] for row in group] for group in long]


def test_a_stop_at_the_limit_is_a_stop() -> None:
    policy = tiny(dtype=torch.float64)
    (endless,) = sample(policy, PROMPTS[:1], KEYS[:1], num_samples=1)[0]
    k = next(k for k in range(3, 12) if endless.token_ids[k] not in endless.token_ids[:k])
    last = frozenset({endless.token_ids[k]})
    (at_limit,) = sample(policy, PROMPTS[:1], KEYS[:1], num_samples=1, stop_ids=last, max_completion_tokens=k + 1)[0]
    (cut,) = sample(policy, PROMPTS[:1], KEYS[:1], num_samples=1, stop_ids=last, max_completion_tokens=k)[0]
    assert (at_limit.token_ids, at_limit.finish_reason) == (endless.token_ids[: k + 1], "stop")
    assert (cut.token_ids, cut.finish_reason) == (endless.token_ids[:k], "length")


def test_the_pad_id_means_nothing() -> None:
    """Pad id 0, a stop id, a token that occurs in prompts: what counts is the mask, and the first stop token."""
    policy, stop_ids = tiny(dtype=torch.float64), frozenset({0, *range(5, 11)})
    expected = ids(sample(policy, num_samples=6, stop_ids=stop_ids, pad_id=63))
    for pad_id in (0, 2, 7):
        assert ids(sample(policy, num_samples=6, stop_ids=stop_ids, pad_id=pad_id)) == expected
    assert all(set(row[:-1]).isdisjoint(stop_ids) for group in expected for row in group)


def test_the_key_decides() -> None:
    """Seed, phase, prompt, attempt and sample give other completions; equal keys the same ones."""
    policy = tiny("llama", dtype=torch.float64)
    keys = [SamplingKey(1, 2, "a"), SamplingKey(2, 2, "a"), SamplingKey(1, 3, "a"), SamplingKey(1, 2, "b"),
            SamplingKey(1, 2, "a", 1), SamplingKey(1, 2, "a")]  # fmt: skip
    groups = ids(sample(policy, [PROMPTS[0]] * 6, keys, num_samples=2))
    assert groups[0] == groups[5]
    assert len({row for group in groups[:5] for row in group}) == 10


def test_uniforms() -> None:
    """Pure, long ones start with short ones, every field counts, in [0, 1), uniform, and the same on every machine."""
    key = SamplingKey(7, 1, "reasoning/train/12")
    numbers = key.uniforms(0, 5_000)
    assert numbers.dtype == np.float64 and ((numbers >= 0) & (numbers < 1)).all()
    np.testing.assert_array_equal(key.uniforms(0, 17), numbers[:17])
    assert kstest(numbers, "uniform").pvalue > LEAST_P
    others = [
        SamplingKey(8, 1, key.prompt_id), SamplingKey(7, 2, key.prompt_id), SamplingKey(7, 1, "reasoning/train/13"),
        SamplingKey(7, 1, key.prompt_id, attempt=1),
    ]  # fmt: skip
    firsts = [numbers[0], key.uniforms(1, 1)[0], *(other.uniforms(0, 1)[0] for other in others)]
    assert len(set(firsts)) == 6
    assert numbers[:2].tolist() == PINNED


PINNED = [0.9373094421941326, 0.46287586409958525]
"""The first numbers of `test_uniforms`' key, as drawn on x86-64; a regression guard, not a derivation."""


# How it is drawn ------------------------------------------------------------------------------------------------------


def test_the_cache_is_used() -> None:
    """A prefill of every prompt once, whatever the group and without padding, then one token a row and step; finished
    rows are dropped."""
    policy = tiny(dtype=torch.float64)
    with widths(policy) as seen:
        sample(policy, num_samples=4, max_completion_tokens=9)
    assert seen == [sum(map(len, PROMPTS)), *[12] * 8]
    with widths(policy) as seen:
        groups = sample(policy, num_samples=8, max_completion_tokens=40, stop_ids=frozenset(range(5, 15)))
    rows = seen[1:]
    assert rows == sorted(rows, reverse=True)
    lengths = [len(s.token_ids) for group in groups for s in group]
    assert len(seen) == max(lengths)  # the prefill gives the first token
    needed = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert all(n <= own <= n / module.COMPACT_BELOW + 1 for n, own in zip(needed, rows, strict=True))
    assert rows[-1] < rows[0]


def test_waves_hold_at_most_max_rows() -> None:
    """Also where one prompt has more samples than that; its prompt is then prefilled again."""
    policy = tiny()
    with widths(policy) as seen:
        sample(policy, num_samples=5, max_rows=4, max_completion_tokens=2)
    a, b, c = map(len, PROMPTS)  # rows 0-3, 4-7, 8-11, 12-14 of 3 x 5
    assert seen == [a, 4, a + b, 4, b + c, 4, c, 3]


def test_waves_fit_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many neighbours as fit, counted at the longest of them; one row is always decoded."""
    policy = tiny()
    expected = ids(sample(policy, max_completion_tokens=4))
    a, b, c = map(len, PROMPTS)
    assert b > max(a, c)
    room = 4 * cache_bytes(policy, b + 4)
    monkeypatch.setattr(module, "cache_bytes", lambda model, tokens: cache_bytes(model, tokens) * 2**20 // room)
    with widths(policy) as seen:
        assert ids(sample(policy, cache_mb=1, max_completion_tokens=4)) == expected
    rows = seen[1::4]  # a prefill and three steps
    assert sum(rows) == 9 and max(rows) >= 4 and len(rows) > 1
    monkeypatch.setattr(module, "cache_bytes", lambda model, tokens: 2**30)
    with widths(policy) as seen:
        assert ids(sample(policy, cache_mb=1, max_completion_tokens=4)) == expected
    assert [n for n in seen if n not in (a, b, c)] == [1] * 27


def test_cache_bytes_are_those_of_the_cache() -> None:
    for architecture in ARCHITECTURES:
        policy = policy_of(architecture, False)
        cache = policy(torch.tensor([random_ids(WINDOW - 1)[0]]), use_cache=True).past_key_values
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        assert cache_bytes(policy, WINDOW - 1) == held, architecture


def test_each_prompt_has_its_stops_and_its_limit() -> None:
    """As if it were sampled alone, with what is its own."""
    policy = tiny(dtype=torch.float64)
    stops, limits = [frozenset(range(5, 15)), NO_STOP, frozenset({7, 9, 30})], [20, 3, 9]
    together = sample(policy, num_samples=4, max_completion_tokens=12, stop_ids=stops, limits=limits)
    for prompt, key, stop, limit, group in zip(PROMPTS, KEYS, stops, limits, together, strict=True):
        (alone,) = sample(policy, [prompt], [key], num_samples=4, max_completion_tokens=min(limit, 12), stop_ids=stop)
        assert ids([group]) == ids([alone])
        assert [s.finish_reason for s in group] == [s.finish_reason for s in alone]
    assert {s.finish_reason for group in together for s in group} == {"stop", "length"}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_mode_is_left_as_it_was() -> None:
    """Module by module, after an error too; dropout and gradient checkpointing play no part in sampling."""
    expected = ids(sample(tiny(attention_dropout=0.0)))
    policy = tiny(attention_dropout=0.5)
    policy.gradient_checkpointing_enable()
    policy.train()
    trunk(policy).layers[1].eval()  # type: ignore[union-attr, operator]
    modes = {name: m.training for name, m in policy.named_modules()}
    with widths(policy) as seen:
        assert ids(sample(policy)) == expected
    assert seen == [sum(map(len, PROMPTS)), *[9] * 11]
    assert {name: m.training for name, m in policy.named_modules()} == modes
    with pytest.raises(ValueError, match="empty"):
        sample(policy, [(2, 3), (), (2,)])
    assert {name: m.training for name, m in policy.named_modules()} == modes
    policy.eval()  # type: ignore[no-untyped-call]
    sample(policy)
    assert not any(m.training for m in policy.modules())


def test_adapters_with_dropout_sample_without_it() -> None:
    policy = adapted(tiny())
    expected = ids(sample(policy))
    for layer in policy.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    policy.train()
    assert ids(sample(policy)) == expected
    assert all(m.training for m in policy.get_base_model().modules())


def test_nothing_is_recorded_for_gradients_or_drawn_from_torch() -> None:
    policy, state = tiny(), torch.get_rng_state()
    sample(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in policy.parameters())


def test_a_critic_on_the_same_trunk_does_not_matter() -> None:
    policy = tiny()
    expected = ids(sample(policy))
    make_value_model(policy, "shared")
    assert ids(sample(policy)) == expected


def test_no_prompts_and_wrong_arguments() -> None:
    policy = tiny()
    assert sample(policy, [], []) == []
    few: dict[str, Any]
    for few in ({"keys": KEYS[:2]}, {"num_samples": 0}, {"max_rows": 0}, {"limits": [4, 4]}, {"limits": [4, 0, 4]},
                {"stop_ids": [NO_STOP]}):  # fmt: skip
        with pytest.raises(ValueError, match="generate: 3 prompts"):
            sample(policy, **few)


def test_every_token_can_be_drawn() -> None:
    """At a high temperature all of a small vocabulary turns up, the first and the last token included."""
    (group,) = sample(tiny(), [random_ids(6)[0]], KEYS[:1], num_samples=64, max_completion_tokens=16, temperature=1e3)
    assert {token for s in group for token in s.token_ids} == set(range(VOCABULARY))


# Mutants --------------------------------------------------------------------------------------------------------------


def neighbours(generate: ModuleType) -> None:
    """`test_neighbours_and_waves_change_nothing`, `test_tokens_are_those_of_a_plain_loop` in short."""
    policy = tiny(dtype=torch.float64)
    groups = sample(policy, num_samples=2, using=generate)
    for prompt, key, group in zip(PROMPTS, KEYS, groups, strict=True):
        for k, completion in enumerate(group):
            own = list(completion.token_ids)
            assert own == chosen(policy, prompt, own, key.uniforms(k, 12), 1.0)


def stopping(generate: ModuleType) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_finished_rows_change_nothing(generate, 1, patch)


@pytest.mark.parametrize(
    "text, replacement, test",
    [
        ("prompts.setdefault(id(request.prompt), len(prompts)) for", "0 for", neighbours),
        ("uniforms(sample, end)", "uniforms(0, end)", neighbours),
        ("uniforms[live, step], sampling", "uniforms[: len(live), step], sampling", stopping),
        ("tokens[live, step], logprobs", "tokens[: len(live), step], logprobs", stopping),
        ("token, finished = live[index], token[index]", "token, finished = live[index], token[: len(index)]", stopping),
        ("decoder.keep(index)", "decoder.keep(index * 0)", stopping),
        ("request.limit if end is None else end + 1", "request.limit if end is None else end", stopping),
    ],
)  # fmt: skip
def test_mutants_are_noticed(text: str, replacement: str, test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{module.__name__}_mutant", module)  # where dataclasses look names up
    with pytest.raises(AssertionError):
        test(mutated(module, text, replacement))
