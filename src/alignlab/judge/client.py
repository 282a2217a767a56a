"""A judge behind an OpenAI-compatible endpoint: conversations -> replies, cached, retried, bounded and paid for once.

Whatever the endpoint does, `complete` ends: with one reply a conversation, or with one line about what to mend. What
was answered until then is in the cache. The key is read from the environment when a call is made; it is never printed
or stored, and taken out of whatever the endpoint sends back.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from alignlab.errors import UserError
from alignlab.judge.budget import Budget, OverBudget, Spent
from alignlab.judge.cache import Cache, Reply
from alignlab.types import Message

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o-mini"
LIST_PRICES = {"gpt-4o-mini": (0.15, 0.60)}
"""US dollars a million tokens of input and output at OpenAI, where no price is given."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first repetition, and at most; each wait is twice the one before."""
LONGEST_ORDERED_WAIT = 120.0
"""Seconds that a Retry-After may ask for; what is to wait for longer ends with a message."""
LARGEST_REPLY = 4 * 2**20
"""Bytes of an answer's body; what is longer is no verdict."""
TOKENS_A_MESSAGE = 16
"""Most tokens that a message costs besides its text, whose bytes are the most tokens it can have."""


class Client(Protocol):
    """Whatever answers conversations: an endpoint, a local model, a test's stand-in."""

    def complete(self, conversations: Sequence[Sequence[Message]]) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, which model, and within which bounds."""

    base_url: str | None = None
    """Such as http://localhost:8000/v1; None is OpenAI's."""
    model: str = DEFAULT_MODEL
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; it may be unset where `base_url` is given."""
    temperature: float = 0.0
    max_tokens: int = 512
    """Of a reply."""
    timeout: float = 60.0
    """Seconds that one attempt may take."""
    max_retries: int = 5
    """Repetitions after a busy, failing or silent endpoint."""
    concurrency: int = 8
    """Calls at a time."""
    max_calls: int | None = None
    """Calls that this client may make, failed attempts included; 0 = replay the cache and call nothing."""
    max_cost: float | None = None
    """US dollars that it may spend, by the prices below."""
    input_price: float | None = None
    """US dollars a million tokens that are sent."""
    output_price: float | None = None
    """US dollars a million tokens that are received."""
    cache: Path | None = None
    """Folder of replies; None keeps them for this process only."""

    def __post_init__(self) -> None:
        positive = {"max_tokens": self.max_tokens, "timeout": self.timeout, "concurrency": self.concurrency}
        not_negative = {
            "temperature": self.temperature, "max_retries": self.max_retries, "max_calls": self.max_calls,
            "max_cost": self.max_cost, "input_price": self.input_price, "output_price": self.output_price,
        }  # fmt: skip
        for name, value in (positive | not_negative).items():
            if value is not None and not (0 <= value < math.inf and (value or name in not_negative)):
                least = "above 0" if name in positive else "0 or more"
                raise UserError(f"judge: {name} is {value}, but must be {least} and finite")
        if not self.model.strip():
            raise UserError(f"judge: model is empty; name one, such as {DEFAULT_MODEL}")
        if self.max_cost is not None and self.prices is None:
            raise UserError(
                f"judge: max_cost needs prices, and those of {self.model!r} at {self.where} are not known: give the "
                "price of a million tokens of input and of output"
            )
        url = urlsplit(self.where)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"judge: base_url {self.where!r} is no address; write one like http://localhost:8000/v1")
        if url.username or url.password or url.query:
            raise UserError(
                "judge: base_url must hold no user, password or query; put the key into the environment variable that "
                f"api_key_env names ({self.api_key_env})"
            )

    @property
    def where(self) -> str:
        return (self.base_url or OPENAI_URL).rstrip("/")

    @property
    def prices(self) -> tuple[float, float] | None:
        """US dollars a million tokens of input and output; None where they are not known."""
        if self.input_price is not None and self.output_price is not None:
            return self.input_price, self.output_price
        return LIST_PRICES.get(self.model) if self.where == OPENAI_URL else None

    @property
    def sends_key_safely(self) -> bool:
        """Whether the line is encrypted or does not leave this machine."""
        return self.is_local or urlsplit(self.where).scheme == "https"

    @property
    def is_local(self) -> bool:
        return urlsplit(self.where).hostname in ("localhost", "127.0.0.1", "::1")


class ChatClient:
    """Replies of one endpoint. Several threads may share it; caps count from when it was made."""

    def __init__(self, endpoint: Endpoint, *, progress: Callable[[int, int], None] | None = None) -> None:
        """`progress` is told how many of how many open questions are answered, after each reply."""
        self.endpoint = endpoint
        self.name = endpoint.model
        self.cache = Cache(endpoint.cache)
        self.budget = Budget(max_calls=endpoint.max_calls, max_cost=endpoint.max_cost, prices=endpoint.prices)
        self.replayed = 0
        """Replies that came from the cache."""
        self._resume_at = 0.0  # when the endpoint wants to hear from anybody again
        self._progress = progress
        self._answered = False
        self._limit = "max_tokens"  # what the endpoint calls the longest reply
        self._lock = threading.Lock()

    def complete(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The reply to each conversation, in order; "" where the model answered without a text.

        Raises:
            UserError: the budget is used up, or the endpoint cannot be used: one line, what to do about it, and what
                was spent. What was answered is in the cache, so the same command goes on from there.
        """
        questions = [self._question(conversation) for conversation in conversations]
        replies = [self.cache.find(question) for question in questions]
        missing: dict[str, list[int]] = {}
        for i, (question, reply) in enumerate(zip(questions, replies, strict=True)):
            if reply is None:
                missing.setdefault(repr(question["messages"]), []).append(i)
        self.replayed += len(questions) - sum(map(len, missing.values()))
        if missing:
            found = self._ask_all([questions[same[0]] for same in missing.values()])
            for same, reply in zip(missing.values(), found, strict=True):
                for i in same:
                    replies[i] = reply
        return [reply.text for reply in replies if reply is not None]

    def spent(self) -> Spent:
        """What this client has used so far."""
        return self.budget.spent()

    # ---- many --------------------------------------------------------------------------------------------------------

    def _ask_all(self, questions: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Asks side by side. The first failure ends the rest, but not what is under way: it is paid, so it is kept."""
        if self.endpoint.max_calls != 0:
            try:
                _ = self._connection  # without a key or the package nothing is begun, and no call counted
            except UserError as problem:
                raise UserError(f"judge: {problem}") from problem
        stop = threading.Event()
        workers = ThreadPoolExecutor(min(self.endpoint.concurrency, len(questions)), "judge")
        running: list[Future[Reply]] = []
        answered = 0

        def ask(question: Mapping[str, Any]) -> Reply:
            nonlocal answered
            try:
                reply = self._ask(question, stop)
            except BaseException:
                stop.set()
                raise
            with self._lock:
                answered += 1
                if self._progress is not None:
                    self._progress(answered, len(questions))
            return reply

        try:
            running = [workers.submit(ask, question) for question in questions]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            workers.shutdown(wait=True, cancel_futures=True)
        over = [future for future in running if not future.cancelled()]
        failures = [error for future in over if (error := future.exception()) and not isinstance(error, _Stopped)]
        if failures:
            raise self._summed_up(failures, len(questions), answered)
        return [future.result() for future in running]

    def _summed_up(self, failures: Sequence[BaseException], asked: int, answered: int) -> BaseException:
        """The failure that says most, with what was spent."""
        told = [error for error in failures if not isinstance(error, UserError)]
        told += sorted((e for e in failures if isinstance(e, UserError)), key=lambda e: isinstance(e, OverBudget))
        if not isinstance(told[0], UserError):
            return told[0]
        kept = "in the cache, so the same command goes on" if self.cache.folder else "kept for this process only"
        spent = self.spent()
        used = (
            f"; spent: {spent}; {answered} of {asked} open questions were answered and are {kept}"
            if spent.calls
            else ""
        )
        if isinstance(told[0], OverBudget):
            return OverBudget(f"judge: the budget is used up: {told[0]}{used}")
        return UserError(f"judge: {told[0]}{used}")

    # ---- one ---------------------------------------------------------------------------------------------------------

    def _question(self, conversation: Sequence[Message]) -> dict[str, Any]:
        """All that a reply may depend on, and nothing secret."""
        endpoint = self.endpoint
        return {
            "endpoint": endpoint.where,
            "model": endpoint.model,
            "messages": [{"role": m.role, "content": _encodable(m.content)} for m in conversation],
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }

    def _ask(self, question: Mapping[str, Any], stop: threading.Event) -> Reply:
        """One conversation, as often as it takes."""
        endpoint, pause = self.endpoint, 0.0
        sent = sum(len(m["content"].encode()) + TOKENS_A_MESSAGE for m in question["messages"])
        for attempt in range(endpoint.max_retries + 1):
            stop.wait(max(0.0, pause, self._resume_at - time.monotonic()))
            if stop.is_set():
                raise _Stopped
            reserved = self.budget.reserve(sent, endpoint.max_tokens)
            used = 0, 0
            try:
                reply = self._call(question)
                used = reply.usage.get("input", sent), reply.usage.get("output", endpoint.max_tokens)
                self._answered = True
                return self.cache.keep(question, reply)
            except _Transient as problem:
                if problem.perhaps_paid:
                    used = sent, endpoint.max_tokens
                if attempt == endpoint.max_retries:
                    raise UserError(f"{endpoint.where} {problem} ({attempt + 1} attempts); try again later") from None
                pause = self._until_next(problem, question, attempt)
            finally:
                self.budget.settle(reserved, *used)
        raise AssertionError("the last attempt returns or raises")

    def _until_next(self, problem: _Transient, question: Mapping[str, Any], attempt: int) -> float:
        """Seconds to wait before the next attempt; what the endpoint orders holds for everybody.

        Raises:
            UserError: it orders more than anybody wants to wait.
        """
        if problem.after is None:
            digest = hashlib.sha256(f"{question['messages']}{attempt}".encode()).digest()
            apart = 0.75 + digest[0] / 512  # so that those who failed together do not come back together
            return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * apart
        if problem.after > LONGEST_ORDERED_WAIT:
            raise UserError(
                f"{self.endpoint.where} {problem} and asks to wait for {problem.after:.0f} s; run it again then"
            )
        with self._lock:
            self._resume_at = max(self._resume_at, time.monotonic() + problem.after)
        return problem.after

    def _call(self, question: Mapping[str, Any]) -> Reply:
        """One attempt.

        Raises:
            _Transient: it may go well another time.
            UserError: it will not.
        """
        client, key = self._connection
        import openai

        limit = self._limit
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=question["model"],
                messages=question["messages"],
                temperature=question["temperature"],
                extra_body={limit: question["max_tokens"]},
            )
            body = raw.http_response.content
        except _Endless as error:
            raise _Transient(str(error), perhaps_paid=True) from None
        except openai.APITimeoutError:
            raise _Transient(f"does not answer within {self.endpoint.timeout:g} s", perhaps_paid=True) from None
        except openai.APIConnectionError as error:
            raise self._unreachable(error, key) from None
        except openai.APIStatusError as error:
            raise self._refused(error, key, limit) from None
        return _read_reply(body, key)

    @cached_property
    def _connection(self) -> tuple[OpenAI, str]:
        """The `openai` client, and the key; made when something has to be asked.

        Raises:
            UserError: the package is not installed, or there is no key.
        """
        endpoint = self.endpoint
        try:
            import openai
        except ImportError as error:
            raise UserError("a judge behind an endpoint needs openai; run `pip install alignlab[judge]`") from error
        key = os.environ.get(endpoint.api_key_env, "").strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"the key in {endpoint.api_key_env} holds blanks or other characters that no key has")
        if not key and endpoint.base_url is None:
            raise UserError(
                f"no key for {endpoint.model!r} in the environment variable {endpoint.api_key_env}; set it, or name "
                "another one in `api_key_env`, or an endpoint of your own in `base_url`"
            )
        if not endpoint.sends_key_safely and endpoint.api_key_env == type(endpoint).api_key_env:
            key = ""  # OpenAI's key is not for whoever listens on the way to another machine
        http = openai.DefaultHttpxClient(
            follow_redirects=False,
            trust_env=not endpoint.is_local,  # no proxy stands between this machine and itself
            event_hooks={"response": [_bounded(endpoint.timeout)]},
            headers={"Accept-Encoding": "identity"},
        )
        client = openai.OpenAI(
            api_key=key or "none", base_url=endpoint.where, timeout=endpoint.timeout, max_retries=0, http_client=http
        )
        return client, key

    def _unreachable(self, error: Exception, key: str) -> Exception:
        """No answer at all, or half of one."""
        cause = error.__cause__ or error
        what = _line(str(cause), key) or type(cause).__name__
        if isinstance(cause, _Endless):
            return _Transient(what, perhaps_paid=True)
        if type(cause).__name__ != "ConnectError":
            return _Transient(f"breaks off the connection ({what})", perhaps_paid=True)
        if self._answered:
            return _Transient(f"cannot be reached any more ({what})")
        return UserError(f"{self.endpoint.where} cannot be reached ({what}); is the server running, the address right?")

    def _refused(self, error: Any, key: str, limit: str) -> Exception:
        """The endpoint answers, but not with a reply."""
        endpoint, status = self.endpoint, int(error.status_code)
        said = _line(str(_message(error.body)), key)
        quoted = f": {said}" if said else ""
        if status in (401, 403):
            held = f"the key in {endpoint.api_key_env}" if key else f"calls without a key ({endpoint.api_key_env})"
            return UserError(f"{endpoint.where} refuses {held} ({status}){quoted}; mend the key, or what it may do")
        if status == 404:
            return UserError(
                f"{endpoint.where} knows no model {endpoint.model!r} (404){quoted}; mend model or base_url"
            )
        if status == 429 and "quota" in said.lower():
            return UserError(f"{endpoint.where} says that the account has no quota left{quoted}")
        if status in (408, 409, 425, 429) or status >= 500:
            busy = "is busy" if status == 429 else "fails"
            return _Transient(f"{busy} ({status}){quoted}", after=_retry_after(error.response.headers))
        if status == 400 and limit == "max_tokens" and "max_completion_tokens" in said:
            self._limit = "max_completion_tokens"
            return _Transient(f"wants another name for max_tokens{quoted}", after=0.0)
        return UserError(f"{endpoint.where} refuses the question ({status}){quoted}")


class _Stopped(Exception):
    """Somebody else failed, so this was not asked."""


class _Endless(Exception):
    """An answer that is not read to its end."""


class _Transient(Exception):
    """A failure that another attempt may not have."""

    def __init__(self, problem: str, *, after: float | None = None, perhaps_paid: bool = False) -> None:
        """`after` are the seconds that the endpoint asks to wait for."""
        super().__init__(problem)
        self.after, self.perhaps_paid = after, perhaps_paid


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_reply(body: bytes, key: str) -> Reply:
    """The reply in an answer's body.

    Raises:
        _Transient: it cannot be read.
    """
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content")
        text = message.get("refusal") if text is None else text
        if isinstance(text, list):  # parts, as some servers write them
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is not None and not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Transient("sends what is no chat completion", perhaps_paid=True) from None
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    tokens = {"input": counts.get("prompt_tokens"), "output": counts.get("completion_tokens")}
    return Reply(
        text=_hidden(_encodable(text or ""), key),
        finish_reason=_hidden(str(choice.get("finish_reason") or ""), key)[:40],
        usage={k: n for k, n in tokens.items() if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9},
        model=_hidden(str(answer.get("model") or ""), key)[:200],
    )


def _message(body: object) -> object:
    """What an error's body says."""
    for _ in range(2):
        if isinstance(body, dict):
            body = body.get("error") or body.get("message") or body.get("detail") or ""
    return body or ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait for: a number, milliseconds, or a date; None where it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _bounded(seconds: float) -> Callable[[Any], None]:
    """A hook that ends an answer that goes on for longer than this, or is larger than any reply."""

    def chunks(stream: Any, until: float) -> Iterator[bytes]:
        size = 0
        for chunk in stream:
            size += len(chunk)
            if size > LARGEST_REPLY:
                raise _Endless("sends more than a reply can be")
            if time.monotonic() > until:
                raise _Endless(f"does not end its answer within {seconds:g} s")
            yield chunk

    def hook(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _Endless("sends a compressed answer, though asked not to")  # it may be of any size
        stream, until = response.stream, time.monotonic() + seconds
        # The base that `openai`'s HTTP library checks for, whichever library its version has (httpx, httpx2).
        base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")
        methods = {"__iter__": lambda self: chunks(stream, until), "close": lambda self: stream.close()}
        response.stream = type("Bounded", (base,), methods)()

    return hook


def _hidden(text: str, key: str) -> str:
    return text.replace(key, "***") if key else text


def _line(text: str, key: str) -> str:
    """What somebody else says, in one short line without the key or control characters."""
    text = " ".join(_hidden(_encodable(text), key).split())
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _encodable(text: str) -> str:
    """The text with halves of surrogate pairs replaced, as no file or request can hold them."""
    return text.encode("utf-8", "replace").decode()
