"""Runs in a process of its own, started by `_sandbox`: a job on standard input -> one line of JSON for each test.

There are two processes. The *program* runs foreign code and knows neither the tests nor what is expected. The *judge*
runs the tests, in which the program's functions are proxies: a call hands plain values over and gets plain values
back. So nothing that the program prints, patches, raises or leaves behind can make a test pass; only the right value
can. Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import fractions
import importlib
import importlib.util
import json
import os
import random
import signal
import sys
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NoReturn

LARGEST_MESSAGE = 1 << 25
"""Bytes."""
LARGEST_INT = 1 << 53
"""Larger ones are written in hexadecimal digits, which takes no quadratic time."""
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, arguments, named: thing(*arguments, **named),
    "attribute": getattr,
    "item": lambda thing, key: thing[key],
    "list": list,
    "next": next,
    "length": len,
    "contains": lambda thing, value: value in thing,
    "text": str,
    "itself": lambda thing: thing,
}
"""What may be done with an object that stays with the program."""


# ---- values, written down --------------------------------------------------------------------------------------------


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """A value as JSON; what is no plain value becomes what `keep` makes of it."""
    if value is None or isinstance(value, str | float) or value is True or value is False:
        return value
    if isinstance(value, int):
        return int(value) if -LARGEST_INT < value < LARGEST_INT else {"i": hex(value)}
    if isinstance(value, list):
        return [encode(x, keep) for x in value]
    if isinstance(value, dict):
        return {"d": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    for letter, kind in (("t", tuple), ("s", set), ("f", frozenset)):
        if isinstance(value, kind):
            return {letter: [encode(x, keep) for x in value]}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, range):
        return {"r": [value.start, value.stop, value.step]}
    if isinstance(value, Decimal):
        return {"D": str(value)}
    if isinstance(value, fractions.Fraction):
        return {"F": str(value)}
    return {"h": keep(value)}


def decode(value: Any, held: Callable[[Any], Any]) -> Any:
    """The value of what `encode` wrote; what stayed on the other side is what `held` makes of it."""
    if isinstance(value, list):
        return [decode(x, held) for x in value]
    if not isinstance(value, dict):
        return value
    ((letter, content),) = value.items()
    if letter == "d":
        return {decode(k, held): decode(v, held) for k, v in content}
    if letter in ("t", "s", "f"):
        return {"t": tuple, "s": set, "f": frozenset}[letter](decode(x, held) for x in content)
    plain: dict[str, Callable[[Any], Any]] = {
        "i": lambda digits: int(digits, 16),
        "b": bytes.fromhex,
        "c": lambda parts: complex(*parts),
        "r": lambda parts: range(*parts),
        "D": Decimal,
        "F": fractions.Fraction,
        "h": held,
    }
    return plain[letter](content)


class Gone(BaseException):
    """The other side has ended, or says what nobody can read."""


class Wire:
    """Messages between the two: their length in eight bytes, then JSON."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = os.fdopen(source, "rb"), os.fdopen(sink, "wb")

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode("ascii")
        self._sink.write(len(data).to_bytes(8, "big") + data)
        self._sink.flush()

    def receive(self) -> Any:
        size = int.from_bytes(self._read(8), "big")
        if size > LARGEST_MESSAGE:
            raise Gone
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise Gone
        return data

    def close(self) -> None:
        for end in (self._sink, self._source):
            end.close()


# ---- the program -----------------------------------------------------------------------------------------------------


def serve(wire: Wire) -> NoReturn:
    """Runs the program, then does what is asked with what it defined, until nobody asks any more."""
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    try:
        job = wire.receive()
        random.seed(0)
        before = _run(job["setup"], names)
        _run(job["program"], names)
        own = {k: v for k, v in names.items() if not k.startswith("__") and before.get(k) is not v}
        wire.send({k: "module" if isinstance(v, types.ModuleType) else keep(v) for k, v in own.items()})
    except Gone:
        os._exit(0)
    except BaseException as error:
        wire.send({"raise": _told(error)})
        os._exit(0)
    while True:
        try:
            operation, number, arguments = wire.receive()
        except BaseException:
            os._exit(0)
        try:
            given = decode(arguments, objects.__getitem__)
            answer = {"value": encode(OPERATIONS[operation](objects[number], *given), keep)}
            wire.send(answer)
        except BaseException as error:
            wire.send({"raise": _told(error)})


def _run(source: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(source, "<program>", "exec", dont_inherit=True), names)
    return dict(names)


def _told(error: BaseException) -> list[str]:
    try:
        return [type(error).__name__, str(error)[:200]]
    except BaseException:
        return [type(error).__name__, ""]


# ---- the judge -------------------------------------------------------------------------------------------------------


class Remote:
    """Something that stays with the program: it can be called and read, and is equal to nothing."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self._ask, self._number = ask, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("attribute", self._number, name)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self._number, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("list", self._number))

    def __next__(self) -> Any:
        return self._ask("next", self._number)

    def __len__(self) -> int:
        return int(self._ask("length", self._number))

    def __contains__(self, value: Any) -> bool:
        return bool(self._ask("contains", self._number, value))

    def __str__(self) -> str:
        return str(self._ask("text", self._number))

    def __eq__(self, other: object) -> bool:
        raise TypeError("the program's answer is an object of its own, which cannot be compared")

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return True


def judge(wire: Wire, job: dict[str, Any], say: Callable[[bool, str], None]) -> None:
    """Runs the tests one after the other and says of each whether it passed, or why not."""

    def held(number: Any) -> Remote:
        return Remote(ask, int(number))

    def away(value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"a {type(value).__name__} cannot be handed to the program")

    def ask(operation: str, number: int, *arguments: Any) -> Any:
        wire.send([operation, number, encode(list(arguments), away)])
        answer = wire.receive()
        if "raise" in answer:
            name, message = answer["raise"]
            kind = getattr(builtins, str(name), None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError
            raise kind(message) if known else RuntimeError(f"{name}: {message}")  # type: ignore[misc]
        return decode(answer["value"], held)

    wire.send({"setup": job["setup"], "program": job["program"]})
    try:
        defined = wire.receive()
    except Gone:
        return say(False, "the program ended the process")
    if "raise" in defined:
        return say(False, "the program raised " + ": ".join(defined["raise"]))
    names: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        _run(job["setup"], names)
    except Exception as error:
        names["__setup__"] = error  # what it lacks, its tests will say
    for name in offered(defined, job["tests"], job.get("entry_point"), names):
        names[name] = importlib.import_module(name) if defined[name] == "module" else ask("itself", defined[name])
    for test in job["tests"]:
        try:
            exec(compile(test, "<test>", "exec", dont_inherit=True), names)
        except Gone:
            return say(False, "the program ended the process")
        except Exception as error:
            say(False, ": ".join(filter(None, _told(error))))
        else:
            say(True, "")


def offered(defined: dict[str, Any], tests: list[str], entry: str | None, given: dict[str, Any]) -> list[str]:
    """Which of the program's names the tests see: those they use, but none in the place of what judges it.

    A builtin (`set`, `sorted`), or a module that the tests brought along, is not the program's to replace; unless what
    is asked for is itself called like a builtin.
    """
    used = set()
    for test in tests:
        try:
            used |= {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
        except (SyntaxError, ValueError, RecursionError):
            continue
    wanted = [n for n in defined if n in used and not isinstance(given.get(n), types.ModuleType)]
    wanted = [n for n in wanted if defined[n] != "module" or n in sys.stdlib_module_names]
    own = [n for n in wanted if n == entry or not hasattr(builtins, n)]
    return own if any(defined[n] != "module" for n in own) else wanted


# ---- both ------------------------------------------------------------------------------------------------------------


def main(seconds: float, memory_mb: int) -> None:
    """Parts in two before anything foreign is read, so that the program's process has never seen a test."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_isolation.py")
    spec = importlib.util.spec_from_file_location("_isolation", source)
    assert spec is not None and spec.loader is not None
    isolation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(isolation)
    sys.path = sys.path[1:] if sys.path[:1] == [os.path.dirname(source)] else sys.path
    to_program, to_judge = os.pipe(), os.pipe()
    nothing = os.open(os.devnull, os.O_RDWR)
    child = os.fork()
    isolation.limit(seconds, memory_mb)
    if not child:
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        os.close(to_program[1])
        os.close(to_judge[0])
        wire = Wire(to_program[0], to_judge[1])
        try:
            isolation.isolate(judge=False)
        except OSError:
            os._exit(1)
        serve(wire)
    results = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.close(to_program[0])
    os.close(to_judge[1])
    job = json.loads(sys.stdin.buffer.read())
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    wire = Wire(to_judge[0], to_program[1])

    def say(passed: bool, why: str) -> None:
        results.write(json.dumps({"passed": passed, "why": why}) + "\n")
        results.flush()

    def late(*_: Any) -> NoReturn:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        say(False, f"not done within {seconds:g} s")
        os._exit(0)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        isolation.isolate(judge=True)
    except OSError as error:
        results.write(json.dumps({"error": str(error)}) + "\n")
        results.flush()
        os._exit(1)
    try:
        judge(wire, job, say)
    except BaseException as error:
        say(False, ": ".join(filter(None, _told(error))))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
