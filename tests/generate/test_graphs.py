"""Steps of fixed shapes: what they sample, which rows they drop, and that a replay needs nothing but the device.

Without CUDA a capture is played: PyTorch's operations are noted while they run, what they changed is put back, and a
replay runs the same operations on the same tensors. So a number that Python computed and that should move shows as it
would in a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignlab import generate as sampler
from alignlab import kernels
from alignlab.generate import graphs
from alignlab.generate.decode import FastDecoder
from alignlab.generate.draw import Sampling, draw_tokens
from alignlab.generate.graphs import CAPTURE_FROM, StaticDecoder, pays
from alignlab.models import AdapterOff, head, trunk
from tests.generate.test_decode import KEPT, LIMIT, ROWS, STATES, follow
from tests.generate.test_generate import ids, sample, widths
from tests.stand_ins import ARCHITECTURES, PROMPTS, policy_of, random_ids, tiny
from tests.statistics.mutants import mutated
from tests.tolerances import FLOAT64

CUDA = torch.device("cuda", 0)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need CUDA")
STOPS = frozenset(range(5, 11))
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "repeat_interleave",
    "scalar_tensor",
    "unique2",
)
"""Operations that ask the device for a number, or copy one there."""


class Notes(TorchDispatchMode):
    """What runs inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @property
    def names(self) -> set[str]:
        return {func._schema.name.removeprefix("aten::") for func, *_ in self.calls}


class PlayedGraph:
    """A stand-in for `torch.cuda.CUDAGraph`."""

    made: ClassVar[list[PlayedGraph]] = []

    def __init__(self) -> None:
        self.notes = Notes()
        self.replays = 0
        PlayedGraph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, noted in self.notes.calls:
            for old, new in zip(tree_leaves(noted), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None: ...


@contextmanager
def played_capture(graph: PlayedGraph, **_: Any) -> Iterator[None]:
    with graph.notes:
        yield
    for tensor, before in reversed(graph.notes.before):
        tensor.copy_(before)


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PlayedGraph]]:
    """Captures are played on the CPU, without the loops in C, which nothing can note; the graphs made, in order."""
    monkeypatch.setattr(kernels, "_library", lambda: None)
    PlayedGraph.made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", played_capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(graphs, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(graphs, "_failed", [])
    yield PlayedGraph.made
    PlayedGraph.made.clear()


def captured(*arguments: Any) -> StaticDecoder:
    return StaticDecoder(*arguments, capture=True)


@contextmanager
def starting(monkeypatch: pytest.MonkeyPatch, kind: Any) -> Iterator[None]:
    """The sampler with this decoder."""
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "start", kind)
        yield


# Without a graph ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_the_eager_decoder(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without an adapter, with it switched off, to the end and with rows that stop: the very same."""
    monkeypatch.setattr(graphs, "CAPTURE_FROM", 4)
    policy = policy_of(architecture, True, torch.float64)
    for model in (tiny(architecture, dtype=torch.float64), policy, AdapterOff(policy)):
        for stop_ids in (frozenset[int](), STOPS):
            expected = sample(model, num_samples=4, max_completion_tokens=20, stop_ids=stop_ids)
            with starting(monkeypatch, StaticDecoder):
                own = sample(model, num_samples=4, max_completion_tokens=20, stop_ids=stop_ids)
            assert ids(own) == ids(expected)
            for one, other in zip(chain(*own), chain(*expected), strict=True):
                assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), **FLOAT64)


def test_equal_prompts_need_no_mask_of_theirs(played: list[PlayedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("gemma3", True, torch.float64)
    prompts = random_ids(7, 7, 7)
    expected = ids(sample(policy, prompts))
    for kind in (StaticDecoder, captured):
        with starting(monkeypatch, kind):
            assert ids(sample(policy, prompts)) == expected
    assert [graph.replays for graph in played] == [11]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_equal_prompts_eagerly(architecture: str) -> None:
    """In single precision, with the loops in C where they are there."""
    policy, prompts = policy_of(architecture, True), random_ids(7, 7)
    rows = torch.tensor([1, 0, 1])
    own, other = (kind(policy, prompts, rows, LIMIT, 0) for kind in (StaticDecoder, FastDecoder))
    for tokens in torch.tensor(random_ids(*[3] * (LIMIT - 1), seed=5)):
        own.step(tokens)
        other.step(tokens)
        assert_close(own.states, other.states, **STATES)


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
@torch.no_grad()
def test_dropped_rows_change_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `test_decode` does, where more than half go on at first, and then so few that they are dropped."""
    monkeypatch.setattr(graphs, "CAPTURE_FROM", 1)
    follow(StaticDecoder, policy_of(architecture, False))


@torch.no_grad()
def test_when_rows_are_dropped() -> None:
    """Fewer than half of the rows, with CAPTURE_FROM tokens to come after the next: not one more, not one fewer."""
    policy = tiny()
    rows = torch.tensor([0, 1, 2, 0, 1, 2])
    for kept, limit, expected in (
        ((0, 1, 2), CAPTURE_FROM + 1, 6),
        ((4, 5), CAPTURE_FROM + 1, 2),
        ((4, 5), CAPTURE_FROM, 6),
        ((1,), CAPTURE_FROM, 6),
    ):
        decoder = StaticDecoder(policy, PROMPTS, rows, limit, 0)
        decoder.keep(torch.tensor(kept))
        with widths(policy) as seen:
            decoder.step(torch.full((len(kept),), 7))
        assert seen == [expected]
        assert decoder.states.shape == (len(kept), 32)


def test_when_a_capture_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny()
    assert pays(policy, CUDA, CAPTURE_FROM)
    assert not pays(policy, CUDA, CAPTURE_FROM - 1)
    assert not pays(policy, torch.device("cpu"), CAPTURE_FROM)
    policy.quantization = "nf4"
    assert not pays(policy, CUDA, CAPTURE_FROM)
    policy.quantization = None
    graphs._refused.add(trunk(policy))
    assert not pays(policy, CUDA, CAPTURE_FROM) and pays(tiny(), CUDA, CAPTURE_FROM)


@pytest.mark.parametrize(
    "choice", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"greedy": True}]
)
@torch.no_grad()
def test_nothing_waits_for_the_device(choice: dict[str, Any]) -> None:
    """Neither a step nor a draw asks for a number, whatever is drawn and whichever the decoder."""
    policy = policy_of("gemma3", True)
    for kind in (FastDecoder, StaticDecoder):
        decoder, tokens = kind(policy, PROMPTS, torch.tensor(ROWS), LIMIT, 0), torch.full((len(ROWS),), 7)
        decoder.step(tokens)
        uniforms, top = torch.full((len(ROWS),), 0.5, dtype=torch.float64), head(policy)
        with Notes() as notes:
            decoder.step(tokens)
            draw_tokens(decoder.states, top.weight, uniforms, Sampling(**choice), top.softcap)
        assert not notes.names.intersection(WAITS), notes.names
    with Notes() as notes:
        torch.where(tokens > 3, uniforms, 0.0)
    assert notes.names.intersection(WAITS)


# With a graph that is played ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_replay_is_a_step(
    architecture: str, adapter: bool, played: list[PlayedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays give the states of plain passes: every number that changes from step to step is on the device."""
    monkeypatch.setattr(graphs, "CAPTURE_FROM", 1)
    follow(captured, policy_of(architecture, adapter))
    last = max(KEPT)
    assert [graph.replays for graph in played] == [last, LIMIT - 1 - last]


def test_captured_samples(played: list[PlayedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole sampler, with rows that stop and another capture when many have."""
    monkeypatch.setattr(graphs, "CAPTURE_FROM", 4)
    policy = policy_of("gemma3", True, torch.float64)
    expected = ids(sample(policy, num_samples=8, max_completion_tokens=24, stop_ids=STOPS))
    with starting(monkeypatch, captured):
        assert ids(sample(policy, num_samples=8, max_completion_tokens=24, stop_ids=STOPS)) == expected
    assert len(played) > 1 and all(graph.replays for graph in played)


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("how", ["warm-up", "capture", "replay"])
def test_a_failed_capture_loses_nothing(
    how: str, fails_at: int, played: list[PlayedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first capture or at a later one: one warning, the same tokens, and no second try with this model."""
    monkeypatch.setattr(graphs, "CAPTURE_FROM", 4)
    monkeypatch.setattr(graphs, "_refused", type(graphs._refused)())
    policy = tiny(dtype=torch.float64)
    choice: dict[str, Any] = {"num_samples": 8, "max_completion_tokens": 24, "stop_ids": STOPS}
    expected = ids(sample(policy, **choice))

    @contextmanager
    def failing(graph: PlayedGraph, **options: Any) -> Iterator[None]:
        with played_capture(graph):
            yield
            if len(played) == fails_at:
                raise RuntimeError("not permitted when a stream is capturing")

    advance, tries = StaticDecoder._advance, []

    def halfway(self: StaticDecoder) -> None:
        tries.append(1)  # two an attempt
        if len(tries) == 2 * fails_at - 1:
            self._layers[0].blank()
            raise torch.OutOfMemoryError("out of memory")
        advance(self)

    def nothing(self: PlayedGraph) -> None:
        if played.index(self) != fails_at - 1:
            replay(self)

    replay = PlayedGraph.replay
    if how == "warm-up":
        monkeypatch.setattr(StaticDecoder, "_advance", halfway)
    elif how == "capture":
        monkeypatch.setattr(torch.cuda, "graph", failing)
    else:
        monkeypatch.setattr(PlayedGraph, "replay", nothing)
    with starting(monkeypatch, captured), pytest.warns(UserWarning, match="without a CUDA graph") as said:
        assert ids(sample(policy, **choice)) == expected
    assert len(said) == 1
    assert not pays(policy, CUDA, CAPTURE_FROM)


@pytest.mark.parametrize(
    "text, replacement",
    [
        ("self._column - self._columns[first:]", "self._seen - self._columns[first:]"),
        ("self._column.add_(1)", "pass"),
        ("self._length.add_(1)", "self._length = self._length + 1"),
        ("(age >= 0) & (age < window)", "age >= 0"),
        ("(age >= 0) & (age < window)", "(age >= 0) & (age <= window)"),
        ("seen = seen & self._mask[:, first:]", "pass"),
        ("self._tokens.index_copy_(0, self._kept, tokens)", "self._tokens[: len(tokens)] = tokens"),
        ("self._found.index_select(0, self._kept)", "self._found[: len(self._kept)]"),
        ("else self._kept[rows]", "else rows"),
        ("self._tokens.copy_(tokens)", "self._tokens = tokens"),
        ("layer.count()", "pass"),
    ],
)
@torch.no_grad()
def test_mutants_are_noticed(text: str, replacement: str, played: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(graphs, text, replacement)
    mutant.CAPTURE_FROM = 1  # type: ignore[attr-defined]
    mutant._side_stream = lambda device: Stream()  # type: ignore[attr-defined]
    with pytest.raises((AssertionError, RuntimeError, IndexError)), warnings.catch_warnings(action="error"):
        follow(lambda *arguments: mutant.StaticDecoder(*arguments, capture=True), policy_of("gemma3", False))


# On CUDA --------------------------------------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_captured_states_are_the_eager_ones(architecture: str, adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, rows kept unseen, then dropped with another capture; without a warning."""
    monkeypatch.setattr(graphs, "CAPTURE_FROM", 1)
    policy = policy_of(architecture, adapter).to(CUDA)
    rows = torch.tensor(ROWS, device=CUDA)
    tokens = torch.tensor(random_ids(*[LIMIT] * len(ROWS), seed=5), device=CUDA)
    alive = torch.arange(len(ROWS), device=CUDA)
    with warnings.catch_warnings(action="error"):
        own, eager = captured(policy, PROMPTS, rows, LIMIT, 0), FastDecoder(policy, PROMPTS, rows, LIMIT, 0)
        made = []
        for step in range(LIMIT - 1):
            if step in KEPT:
                kept = torch.tensor(KEPT[step], device=CUDA)
                own.keep(kept)
                eager.keep(kept)
                alive = alive[kept]
            own.step(tokens[alive, step])
            eager.step(tokens[alive, step])
            assert_close(own.states, eager.states, **STATES)
            made.append(own._graph)
    assert None not in made and len(set(map(id, made))) == 2


@on_cuda
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_samples_are_the_eager_ones(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole sampler, chosen by itself; nothing is drawn from torch, and nothing is left of the graphs."""
    limit = 2 * CAPTURE_FROM
    policy = policy_of(architecture, True, torch.float64).to(CUDA)
    for model in (policy, AdapterOff(policy)):
        for stop_ids in (frozenset[int](), STOPS):
            choice: dict[str, Any] = {"num_samples": 8, "max_completion_tokens": limit, "stop_ids": stop_ids}
            with starting(monkeypatch, FastDecoder):
                expected = ids(sample(model, **choice))
            state = torch.cuda.get_rng_state(CUDA)
            with warnings.catch_warnings(action="error"):
                assert ids(sample(model, **choice)) == expected
            assert torch.equal(torch.cuda.get_rng_state(CUDA), state)
    torch.rand(1, device=CUDA)


@on_cuda
def test_waits_do_not_grow_with_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens, as many waits."""
    monkeypatch.setitem(sampler.LOOK_EVERY, "cuda", 10**6)
    policy = policy_of("gemma3", True).to(CUDA)

    def waits(length: int, **choice: Any) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                sample(policy, max_completion_tokens=length, **choice)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(one.message) for one in said)

    filters: Sequence[dict[str, Any]] = ({}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01})
    for choice in filters:
        sample(policy, max_completion_tokens=CAPTURE_FROM, **choice)
        assert waits(2 * CAPTURE_FROM, **choice) == waits(CAPTURE_FROM, **choice) > 0


@on_cuda
@torch.no_grad()
def test_a_step_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself refuses; the eager steps go on, and the device is as before."""
    monkeypatch.setattr(graphs, "_refused", type(graphs._refused)())
    policy = tiny(dtype=torch.float64).to(CUDA)
    with starting(monkeypatch, FastDecoder):
        expected = ids(sample(policy, max_completion_tokens=CAPTURE_FROM))

    def ask(_: object, given: tuple[Tensor]) -> None:
        given[0].sum().item()

    hook = trunk(policy).norm.register_forward_pre_hook(ask)  # type: ignore[union-attr, operator]
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert ids(sample(policy, max_completion_tokens=CAPTURE_FROM)) == expected
    hook.remove()
    stream = torch.cuda.current_stream(CUDA)
    assert stream == torch.cuda.default_stream(CUDA)
    torch.rand(1, device=CUDA)
    other = tiny(dtype=torch.float64).to(CUDA)
    with warnings.catch_warnings(action="error"):
        assert ids(sample(other, max_completion_tokens=CAPTURE_FROM)) == expected
