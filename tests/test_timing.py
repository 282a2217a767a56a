"""The stopwatch: parts that add up, whatever happens inside."""

import threading
import time
from contextlib import suppress

import pytest

from alignlab.timing import OutOfTime, by_part, clock, span, time_limit, waiting


def test_parts_add_up_and_nothing_counts_twice() -> None:
    before, started = clock().read(), time.perf_counter()
    with span("outer"):
        time.sleep(0.02)
        with span("inner"):
            time.sleep(0.03)
        time.sleep(0.01)
    found, whole = clock().since(before), time.perf_counter() - started
    assert sum(found.values()) == pytest.approx(whole, abs=1e-3)
    assert found["outer",] >= 0.03 and found["outer", "inner"] >= 0.03
    assert found["outer",] + found["outer", "inner"] <= whole
    assert min(found.values()) >= 0 and clock().path == ()


def test_a_name_below_collect_is_a_part_of_its_own() -> None:
    seconds = {(): 1.0, ("collect",): 2.0, ("collect", "sampling"): 3.0, ("collect", "sampling", "draw"): 4.0,
               ("loss", "body"): 5.0, ("evaluation", "sampling"): 6.0}  # fmt: skip
    assert by_part(seconds) == {"": 1.0, "collect": 2.0, "sampling": 7.0, "loss": 5.0, "evaluation": 6.0}


def test_an_error_leaves_every_span() -> None:
    with pytest.raises(KeyError), span("outer"), span("inner"):
        raise KeyError
    assert clock().path == ()


def test_a_function_is_charged_at_every_call_and_keeps_its_name() -> None:
    @span("doubling")
    def double(x: int) -> int:
        """Twice x."""
        assert clock().path[-1] == "doubling"
        return 2 * x if x > 2 else double(x + 1)

    assert double(1) == 6 and (double.__name__, double.__doc__) == ("double", "Twice x.")
    assert clock().path == ()


def test_threads_do_not_disturb_each_other() -> None:
    other = threading.Thread(target=lambda: span("elsewhere").__enter__())
    with span("here"):
        other.start()
        other.join()
        assert clock().path == ("here",)
    assert not any("elsewhere" in path for path in clock().read())


def test_waiting_is_asked_at_every_boundary() -> None:
    calls: list[None] = []
    with waiting(lambda: calls.append(None)), span("one"):
        pass
    assert len(calls) == 2
    with span("two"):
        pass
    assert len(calls) == 2


def test_a_time_limit_ends_what_catches_exceptions_and_is_none_in_other_threads() -> None:
    with pytest.raises(OutOfTime), time_limit(0.05):
        while True:
            with suppress(Exception):
                time.sleep(0.01)
    with time_limit(None):
        pass

    def elsewhere() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        finished.append(True)

    finished: list[bool] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert finished == [True]
