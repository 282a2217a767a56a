"""Decoding steps of fixed shapes and addresses, so that a CUDA graph can hold one: tokens -> states, in one launch.

An eager step starts hundreds of small kernels, and on an accelerator starting them takes longer than running them. A
graph is recorded once a wave and then replayed: it looks back over every column of the cache, under a mask that hides
those that are not written yet or that a window has passed, and finds the current column and positions on the device.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakSet

import torch
from torch import Tensor, nn

from alignlab.forward.decoder import AttentionKind, decode
from alignlab.generate.decode import FastDecoder, _attend, first_seen
from alignlab.models import Model, quantization, trunk

CAPTURE_FROM = 32
"""Tokens still to decode from which a capture is expected to pay: it costs about four eager steps and a wait."""
AGREEMENT = 0.05
"""By how much of its largest number a first replay may differ from the eager step; a wrong one differs by all of it."""

_capturing = threading.Lock()  # CUDA allows one capture at a time
_refused: WeakSet[nn.Module] = WeakSet()  # trunks that could not be captured, and are not tried again
_failed: list[torch.cuda.CUDAGraph] = []  # the allocator may go on asking them


def pays(model: Model, device: torch.device, limit: int) -> bool:
    """Whether to capture the steps of a model that `decode` knows: on CUDA, for many tokens, unquantised weights."""
    fits = device.type == "cuda" and limit >= CAPTURE_FROM and quantization(model) is None
    return fits and trunk(model) not in _refused


class StaticDecoder(FastDecoder):
    """Steps over all columns of the cache, replayed from a CUDA graph with `capture` and eager without.

    Rows that are not kept go on unseen, as dropping them takes another capture: they are dropped once fewer than half
    of those captured go on and `CAPTURE_FROM` tokens are still to come. Where a capture fails, a warning is given and
    the steps are those of `FastDecoder`. `states` are overwritten by the next step. Gradients have to be off.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        rows: Tensor,
        limit: int,
        pad_id: int,
        *,
        capture: bool = False,
    ) -> None:
        super().__init__(model, prompts, rows, limit, pad_id)
        self._capture, self._gave_up = capture, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._kept: Tensor | None = None  # which of the rows go on; None: all
        self._width, self._end = self._seen, self._seen + limit
        self._settle()

    def step(self, tokens: Tensor) -> None:
        if self._gave_up:
            super().step(tokens)
            return
        if self._kept is None:
            self._tokens.copy_(tokens)
        else:
            self._tokens.index_copy_(0, self._kept, tokens)
        if self._graph is not None:
            self._graph.replay()
        elif not self._capture:
            self._advance()
        elif (error := self._record()) is not None:
            self._give_up(error)
            super().step(tokens)
            return
        self._seen += 1
        for layer in self._layers:
            layer.count()
        self.states = self._found if self._kept is None else self._found.index_select(0, self._kept)

    def keep(self, rows: Tensor) -> None:
        if self._gave_up:
            super().keep(rows)
            return
        kept = rows if self._kept is None else self._kept[rows]
        if 2 * len(kept) < len(self._length) and self._end - self._seen > CAPTURE_FROM:
            super().keep(kept)
            self._settle()
        else:
            self._kept = kept

    def _settle(self) -> None:
        """Everything that a step reads and writes, for the rows there are."""
        for layer in self._layers:
            layer.blank()
        self._graph = self._kept = None
        self._tokens = torch.zeros_like(self._length)
        self._column = torch.full((1,), self._seen, device=self._length.device)
        self._columns = torch.arange(self._end, device=self._length.device)
        self._found = self.states.new_empty(len(self._length), self.states.shape[1])

    def _advance(self) -> None:
        """One step for all rows: only the contents of tensors change, and no number is asked of the device."""
        sights: dict[int | None, tuple[Tensor, Tensor]] = {}

        def look_back(kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if kind.window not in sights:
                sights[kind.window] = self._sight(kind.window)
            column, mask = sights[kind.window]
            keys, values = self._layers[kind.layer].put(key, value, column)
            return _attend(kind, query, keys, values, mask)

        self._found.copy_(decode(self._trunk, self._tokens, self._length, look_back))
        self._length.add_(1)
        self._column.add_(1)

    def _sight(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Of layers with this window: (1,) the column to write, and the mask of columns to read, (R, 1, 1, K)."""
        first = first_seen(self._width + 1, window)  # where their cache begins
        age = self._column - self._columns[first:]
        seen = age >= 0 if window is None else (age >= 0) & (age < window)
        if self._mask is not None:
            seen = seen & self._mask[:, first:]
        return self._column - first, seen.expand(len(self._length), -1)[:, None, None]

    def _record(self) -> RuntimeError | None:
        """Captures the step, and takes it by a first replay that has to agree with an eager one; or says why not."""
        device, length = self._length.device, self._length.clone()
        current, side = torch.cuda.current_stream(device), _side_stream(device)
        graph: torch.cuda.CUDAGraph | None = None

        def rewind() -> None:
            self._length.copy_(length)
            self._column.fill_(self._seen)

        try:
            # the outer stream context is the one that ends if the capture does not
            with _capturing, torch.cuda.device(device), torch.cuda.stream(side):
                side.wait_stream(current)
                self._advance()  # what libraries set up at their first call on this stream must not be captured
                expected = self._found.clone()
                rewind()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    self._advance()
            current.wait_stream(side)
            self._found.fill_(torch.nan)
            graph.replay()
            if not bool((self._found - expected).abs().amax() <= AGREEMENT * expected.abs().amax()):
                raise RuntimeError("its first replay differs from an eager step")
        except RuntimeError as error:
            if graph is not None:
                graph.reset()
                _failed.append(graph)
            current.wait_stream(side)
            rewind()
            return error
        self._graph = graph
        return None

    def _give_up(self, error: RuntimeError) -> None:
        warnings.warn(
            f"sampling goes on without a CUDA graph, which is slower: {error.__context__ or error}", stacklevel=2
        )
        _refused.add(self._trunk)
        self._gave_up = True
        if self._kept is not None:
            super().keep(self._kept)


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: libraries keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
