"""A stopwatch that always runs: named spans of the code -> seconds by path, each without what is nested in it.

At any moment one path, such as `collect/sampling/decode`, is being charged; entering a span charges the time so far to
what was going on and goes on one level deeper. So the parts of a stretch of time always add up to all of it. A span
costs about a microsecond. Whoever wants to know asks before and after.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Path = tuple[str, ...]
COLLECT = "collect"
"""A span whose parts count beside it, not below: what is left of it is preparing data."""


class Clock:
    """Seconds by path since the thread began."""

    def __init__(self) -> None:
        self.path: Path = ()
        self.seconds: dict[Path, float] = {}
        self.wait: Callable[[], None] | None = None
        """Called at every boundary: what waits for an accelerator that is still at work on the span before."""
        self._since = time.perf_counter()

    def turn(self, path: Path) -> None:
        """Charges the time since the last turn to the path that ends, and goes on with another."""
        if self.wait is not None:
            self.wait()
        now = time.perf_counter()
        self.seconds[self.path] = self.seconds.get(self.path, 0.0) + now - self._since
        self.path, self._since = path, now

    def read(self) -> dict[Path, float]:
        """Everything so far."""
        self.turn(self.path)
        return dict(self.seconds)

    def since(self, before: Mapping[Path, float]) -> dict[Path, float]:
        """What has been added to an earlier reading."""
        return {path: s - before.get(path, 0.0) for path, s in self.read().items() if s > before.get(path, 0.0)}


class span:
    """`with span("sampling"):` charges what happens inside to that name, below whatever is going on, and
    `@span("sampling")` every call of a function."""

    __slots__ = ("_above", "_clock", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._clock = clock()
        self._above = self._clock.path
        self._clock.turn((*self._above, self._name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.turn(self._above)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(self._name):
                return function(*args, **kwargs)

        return timed


def by_part(seconds: Mapping[Path, float]) -> dict[str, float]:
    """Seconds by the outermost name of each path; by the next one in `collect`; "" for what is in no span."""
    parts: dict[str, float] = {}
    for path, spent in seconds.items():
        part = path[1] if path[:1] == (COLLECT,) and len(path) > 1 else path[0] if path else ""
        parts[part] = parts.get(part, 0.0) + spent
    return parts


_local = threading.local()


def clock() -> Clock:
    """The stopwatch of this thread."""
    found: Clock | None = getattr(_local, "clock", None)
    if found is None:
        found = _local.clock = Clock()
    return found


@contextmanager
def waiting(wait: Callable[[], None] | None) -> Iterator[Clock]:
    """Inside, spans end only when `wait` says that what they started is done: exact, and slower, on an accelerator."""
    found = clock()
    before, found.wait = found.wait, wait
    try:
        yield found
    finally:
        found.wait = before


# ---- limits ----------------------------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """Raised inside `time_limit`. No `except Exception` there stops it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Inside, `OutOfTime` is raised after so many seconds, and again every second for those who catch it.

    None is no limit. There is none outside the main thread and on Windows either, and native code that does not come
    back to Python is not interrupted.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
