"""The client against a fake endpoint that is busy, broken, hostile, slow or expensive; the cache; the key."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from alignlab.errors import UserError
from alignlab.judge import ChatClient, Endpoint
from alignlab.judge import client as module
from alignlab.judge.budget import Budget, OverBudget
from alignlab.judge.cache import Cache, Reply
from alignlab.types import Message
from tests.judge.server import Act, Fake, always, error, in_turn, serving
from tests.runs import files_of

KEY = "sk-test-4f9d0c7a11"
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits of milliseconds, and a key in the environment."""
    monkeypatch.setattr(module, "FIRST_WAIT", 0.005)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield


def asks(*texts: str) -> list[list[Message]]:
    return [[Message("system", "Judge."), Message("user", text)] for text in texts]


def numbered(count: int) -> list[list[Message]]:
    return asks(*(f"question {i}" for i in range(count)))


def client_of(fake: Fake, **changes: Any) -> ChatClient:
    return ChatClient(Endpoint(**{"base_url": fake.url, "timeout": 5.0, **changes}))


def echo(number: int, body: dict[str, Any]) -> Act:
    return Act(f"reply to {body['messages'][-1]['content']}")


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_replies_come_in_order_and_the_question_is_sent_whole() -> None:
    with serving(echo) as fake:
        client = client_of(fake, model="some/model", temperature=0.3, max_tokens=77)
        assert client.complete(numbered(20)) == [f"reply to question {i}" for i in range(20)]
        assert fake.calls == 20
        asked = fake.requests[0]
        assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("some/model", 0.3, 77)
        assert asked["messages"][0] == {"role": "system", "content": "Judge."}
        assert client.spent().calls == 20 and client.spent().output_tokens == 200
        assert client.spent().cost is None


def test_no_more_calls_at_a_time_than_said() -> None:
    with serving(lambda n, b: Act("x", wait=0.03)) as fake:
        client_of(fake, concurrency=3).complete(numbered(12))
        assert 2 <= fake.most_busy <= 3


def test_the_same_question_is_asked_once() -> None:
    with serving(echo) as fake:
        assert client_of(fake).complete(asks("a", "b", "a", "a")) == [
            "reply to a",
            "reply to b",
            "reply to a",
            "reply to a",
        ]
        assert fake.calls == 2


def test_no_proxy_stands_between_this_machine_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(always("fine")) as fake:
        assert client_of(fake).complete(asks("q")) == ["fine"]


def test_nothing_to_ask() -> None:
    assert ChatClient(Endpoint(base_url="http://127.0.0.1:9/v1")).complete([]) == []


@pytest.mark.parametrize(
    ("act", "reply"),
    [
        (Act(""), ""),
        (Act(None), ""),
        (Act(None, message={"tool_calls": [TOOL_CALL]}), ""),
        (Act(None, message={"refusal": "I will not."}), "I will not."),
        (Act("Größe 🦊 \u2028 \u202e ﷺ"), "Größe 🦊 \u2028 \u202e ﷺ"),
        (Act("x" * 1_000_000), "x" * 1_000_000),
        (Act(message={"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}), "in parts"),
        (Act("x", usage={"prompt_tokens": "many", "completion_tokens": -4}), "x"),
        (Act("x", body=json.dumps({"choices": [{"message": {"content": "bare"}}]}).encode()), "bare"),
        (Act(body=b'{"choices": [{"message": {"content": "half \\ud800"}}]}'), "half ?"),
    ],
)  # fmt: skip
def test_odd_replies_are_replies_and_are_kept(act: Act, reply: str, tmp_path: Path) -> None:
    with serving([act]) as fake:
        assert client_of(fake, cache=tmp_path).complete(asks("q")) == [reply]
        assert client_of(fake, cache=tmp_path).complete(asks("q")) == [reply]
        assert fake.calls == 1


# ---- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, "slow down"),
        error(429, "slow down", Retry_After="0.01"),
        error(429, "slow down", Retry_After="soon"),
        error(429, "slow down", Retry_After="-5"),
        error(429, "slow down", Retry_After="nan"),
        error(500),
        error(502),
        error(503, Retry_After="0"),
        Act(status=529, body=b"<html>overloaded</html>"),
        Act(drop=True),
        Act(body=b"not json"),
        Act(body=b""),
        Act(body=b"[]"),
        Act(body=b"null"),
        Act(body=b'{"choices": []}'),
        Act(body=b'{"choices": [{}]}'),
        Act(body=b'{"choices": [{"message": {"content": 7}}]}'),
        Act(body=b'{"choices": "' + b"[" * 100_000),
        Act(body=b"[" * 100_000),
        Act(body=b"\xff\xfe\x00"),
        Act(body=gzip.compress(b"0" * 1_000_000), headers={"Content-Encoding": "gzip"}),
    ],
)
def test_passing_trouble_is_survived(trouble: Act) -> None:
    with serving([trouble, trouble, Act("fine")]) as fake:
        assert client_of(fake).complete(asks("q")) == ["fine"]
        assert fake.calls == 3


def test_a_server_that_stays_silent_is_asked_again() -> None:
    with serving([Act(wait=0.6), Act("fine")]) as fake:
        assert client_of(fake, timeout=0.2).complete(asks("q")) == ["fine"]


def test_a_reply_that_never_ends_is_given_up() -> None:
    with serving([Act("x" * 200, drip=0.05), Act("fine")]) as fake:
        started = time.monotonic()
        assert client_of(fake, timeout=0.3).complete(asks("q")) == ["fine"]
        assert time.monotonic() - started < 3


def test_a_body_larger_than_any_reply_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_REPLY", 10_000)
    with serving([Act("x" * 3_000_000), Act("fine")]) as fake:
        assert client_of(fake).complete(asks("q")) == ["fine"]


def test_retry_after_is_waited_for_by_everybody() -> None:
    """One refusal that says to wait: nobody comes back before."""
    times: list[float] = []

    def script(number: int, body: dict[str, Any]) -> Act:
        times.append(time.monotonic())
        return error(429, Retry_After="0.3") if number == 0 else Act("x", wait=0.01)

    with serving(script) as fake:
        client_of(fake, concurrency=1).complete(numbered(3))
    assert times[1] - times[0] >= 0.29
    with serving(script) as fake:
        times.clear()
        client_of(fake, concurrency=2).complete(numbered(6))
    assert sum(t - times[0] < 0.25 for t in times) <= 3  # the two under way, and one just behind


def test_retry_after_may_be_a_date_and_is_not_waited_for_too_long() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    with (
        serving([error(429, "quiet", Retry_After=later)]) as fake,
        pytest.raises(UserError, match=r"asks to wait for 3[56]"),
    ):
        client_of(fake).complete(asks("q"))
    assert module._retry_after({"retry-after-ms": "1500"}) == 1.5
    assert module._retry_after({"retry-after": "2"}) == 2.0
    assert module._retry_after({}) is None
    past = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    assert module._retry_after({"retry-after": past}) == 0.0


def test_trouble_that_stays_ends_with_one_line_and_keeps_what_was_answered(tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> Act:
        return error(500, "broken\nbeyond  repair") if "question 3" in str(body) else echo(number, body)

    with serving(script) as fake:
        with pytest.raises(UserError) as caught:
            client_of(fake, max_retries=2, cache=tmp_path, concurrency=1).complete(numbered(5))
        said = str(caught.value)
        assert "\n" not in said
        assert "500" in said and "broken beyond repair" in said and "3 attempts" in said and "spent: 6 calls" in said
        before = fake.calls
        fake.script = echo
        assert client_of(fake, cache=tmp_path).complete(numbered(5)) == [f"reply to question {i}" for i in range(5)]
        assert fake.calls == before + 2  # questions 3 and 4


def test_waits_grow_and_differ() -> None:
    client = ChatClient(Endpoint(base_url="http://127.0.0.1:9/v1"))
    with mock.patch.object(module, "FIRST_WAIT", 1.0):
        waits = [
            client._until_next(module._Transient("x"), {"messages": str(q)}, k) for k in range(8) for q in range(5)
        ]
    for k in range(8):
        few = waits[5 * k : 5 * k + 5]
        assert len(set(few)) > 1
        assert all(0.75 * min(30, 2**k) <= w <= 1.25 * min(30, 2**k) for w in few)


# ---- what the user has to mend ---------------------------------------------------------------------------------------


def failure(act: Act, **changes: Any) -> str:
    with serving([act]) as fake:
        with pytest.raises(UserError) as caught:
            client_of(fake, **changes).complete(numbered(3))
        assert fake.calls <= 3, "not asked again"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_failure_has_its_own_line() -> None:
    lines = {
        "key": failure(error(401, "Incorrect API key provided")),
        "rights": failure(error(403, "not for you")),
        "model": failure(error(404, "The model does not exist"), model="gpt-9"),
        "question": failure(error(400, "maximum context length is 100 tokens")),
        "quota": failure(error(429, "You exceeded your current quota")),
        "redirect": failure(Act(status=307, headers={"Location": "http://127.0.0.1:9/"}, body=b"")),
        "large": failure(Act(status=413, body=b"")),
    }
    assert "refuses the key in OPENAI_API_KEY (401): Incorrect API key" in lines["key"]
    assert "(403): not for you" in lines["rights"]
    assert "knows no model 'gpt-9' (404)" in lines["model"]
    assert "refuses the question (400): maximum context length" in lines["question"]
    assert "no quota left" in lines["quota"]
    assert "(307)" in lines["redirect"]
    assert len(set(lines.values())) == len(lines)


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\); is the server running"):
            ChatClient(Endpoint(base_url=url)).complete(asks("q"))
    with pytest.raises(UserError, match="cannot be reached"):
        ChatClient(Endpoint(base_url="http://no-such-host.invalid/v1")).complete(asks("q"))


def test_no_key_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    client = ChatClient(Endpoint(max_cost=1))
    with pytest.raises(UserError, match=r"judge: no key for 'gpt-4o-mini' in the environment variable OPENAI_API_KEY"):
        client.complete(asks(*map(str, range(20))))
    assert client.spent().calls == 0
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(UserError, match="holds blanks") as caught:
        ChatClient(Endpoint()).complete(asks("q"))
    assert "two words" not in str(caught.value)
    with serving(always("fine")) as fake:
        monkeypatch.delenv("OPENAI_API_KEY")
        assert client_of(fake).complete(asks("q")) == ["fine"]  # an endpoint of one's own may need none


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install alignlab\[judge\]"):
        ChatClient(Endpoint()).complete(asks("q"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timeout": 0}, "timeout is 0, but must be above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1, but must be 0 or more"),
        ({"max_calls": -1}, "max_calls is -1"),
        ({"max_cost": float("inf"), "input_price": 1, "output_price": 1}, "max_cost is inf"),
        ({"model": " "}, "model is empty"),
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": "https://user:secret@host/v1"}, "no user, password or query"),
        ({"base_url": "https://host/v1?key=secret"}, "no user, password or query"),
        ({"max_cost": 1.0, "base_url": "http://localhost:1/v1"}, "max_cost needs prices"),
        ({"max_cost": 1.0, "model": "unknown"}, "max_cost needs prices"),
    ],
)
def test_impossible_endpoints_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Endpoint(**changes)
    assert "secret" not in str(caught.value)


def test_a_newer_model_gets_its_own_name_for_the_limit() -> None:
    def script(number: int, body: dict[str, Any]) -> Act:
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        assert body["max_completion_tokens"] == 512
        return Act("fine")

    with serving(script) as fake:
        assert client_of(fake, concurrency=1).complete(numbered(3)) == ["fine"] * 3
        assert fake.calls == 4


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_second_run_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(echo) as fake:
        first = client_of(fake, cache=tmp_path).complete(numbered(10))
        monkeypatch.delenv("OPENAI_API_KEY")
        again = client_of(fake, cache=tmp_path, max_calls=0)
        assert again.complete(numbered(10)) == first
        assert again.replayed == 10 and again.spent().calls == 0
        assert fake.calls == 10


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 9}])
def test_another_question_is_asked_anew(change: dict[str, Any], tmp_path: Path) -> None:
    with serving(echo) as fake:
        client_of(fake, cache=tmp_path).complete(asks("q"))
        client_of(fake, cache=tmp_path, **change).complete(asks("q"))
        client_of(fake, cache=tmp_path).complete([[Message("user", "Judge."), Message("user", "q")]])
        assert fake.calls == 3


def test_damaged_files_are_asked_anew(tmp_path: Path) -> None:
    with serving(echo) as fake:
        client_of(fake, cache=tmp_path).complete(asks("q"))
        (file,) = tmp_path.rglob("*.json")
        for damage in (b"", b"{", b"null", b'{"reply": {"text": 3}}', file.read_bytes()[:-40], b"\xff"):
            file.write_bytes(damage)
            assert client_of(fake, cache=tmp_path).complete(asks("q")) == ["reply to q"]
            assert json.loads(file.read_text("utf-8"))["reply"]["text"] == "reply to q"
        assert fake.calls == 7


def test_a_full_or_forbidden_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(UserError, match="cannot be the judge's cache"):
        ChatClient(Endpoint(cache=tmp_path / "file" / "below"))
    with serving(echo) as fake, mock.patch("alignlab.judge.cache.os.fsync", side_effect=OSError(28, "No space left")):
        with pytest.raises(UserError, match=r"a reply cannot be kept .No space left"):
            client_of(fake, cache=tmp_path / "cache").complete(asks("q"))
        assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]


def _race(folder: str, start: Any, who: int, out: Any) -> None:
    cache = Cache(Path(folder))
    start.wait()
    out.put([cache.keep({"q": i}, Reply(text=f"{i} by {who}")).text for i in range(30)])


def test_of_several_processes_the_first_answer_is_everybodys(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    start, out = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_race, args=(str(tmp_path), start, who, out)) for who in range(3)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]
    assert len(list(tmp_path.rglob("*.json"))) == 30
    assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".")]


def _ask_forever(url: str, folder: str) -> None:
    endpoint = Endpoint(base_url=url, cache=Path(folder), concurrency=2)
    ChatClient(endpoint).complete(numbered(500))


def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path) -> None:
    with serving(lambda n, b: Act(f"reply to {b['messages'][-1]['content']}", wait=0.01)) as fake:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        worker = context.Process(target=_ask_forever, args=(fake.url, str(tmp_path)))
        worker.start()
        deadline = time.monotonic() + 30
        while fake.calls < 25 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        kept = len(list(tmp_path.rglob("*.json")))
        assert 20 <= kept < 500
        before, fake.script = fake.calls, echo
        assert client_of(fake, cache=tmp_path).complete(numbered(40)) == [f"reply to question {i}" for i in range(40)]
        assert fake.calls - before == 40 - kept


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_the_cap_on_calls_holds_with_many_at_once(tmp_path: Path) -> None:
    with serving(lambda n, b: Act("x", wait=0.01)) as fake:
        client = client_of(fake, max_calls=10, concurrency=16, cache=tmp_path)
        with pytest.raises(OverBudget) as caught:
            client.complete(numbered(50))
        assert fake.calls == 10
        said = str(caught.value)
        assert (
            "max_calls is 10" in said and "spent: 10 calls" in said and "10 of 50 open questions were answered" in said
        )
        assert client_of(fake, cache=tmp_path, max_calls=40).complete(numbered(50)) == ["x"] * 50
        assert fake.calls == 50


def test_failed_attempts_count() -> None:
    with serving([error(500)]) as fake:
        with pytest.raises(OverBudget, match="max_calls is 3"):
            client_of(fake, max_calls=3, max_retries=9).complete(asks("q"))
        assert fake.calls == 3


def test_the_cap_on_money_holds_with_many_at_once() -> None:
    """Each call is priced at 1,000 tokens of input and 100 of output: $0.0011 + $0.00022 by the prices below."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    with serving(lambda n, b: Act("x", wait=0.005, usage=usage)) as fake:
        client = client_of(
            fake, max_cost=0.01, input_price=1.1, output_price=2.2, max_tokens=100, concurrency=8, max_retries=0
        )
        long = asks(*(f"{i} " + "word " * 199 for i in range(60)))  # about 1,000 bytes, so at most as many tokens
        with pytest.raises(OverBudget) as caught:
            client.complete(long)
        cost = client.spent().cost
        assert cost is not None
        assert 0.01 - 2 * 0.00132 < cost <= 0.01  # used up nearly whole, and never broken
        assert f"${cost:.4f}" in str(caught.value)
        assert fake.calls == client.spent().calls == round(cost / 0.00132)


def test_a_silent_endpoint_is_taken_to_have_charged() -> None:
    with serving([Act(wait=0.5), Act("x")]) as fake:
        client = client_of(fake, timeout=0.1, max_cost=1.0, input_price=10.0, output_price=10.0, max_tokens=100)
        client.complete(asks("q"))
        assert client.spent().output_tokens == 100 + 10


def test_without_usage_the_most_is_taken_to_be_used() -> None:
    with serving([Act("x", usage={})]) as fake:
        client = client_of(fake, max_tokens=64)
        client.complete(asks("q"))
        assert client.spent().output_tokens == 64
        assert client.spent().input_tokens >= len("Judge.q")


def test_known_prices_are_openais_only() -> None:
    assert Endpoint().prices == (0.15, 0.60)
    assert Endpoint(base_url="https://elsewhere.example/v1").prices is None
    assert Endpoint(input_price=1.0, output_price=2.0).prices == (1.0, 2.0)


def test_a_budget_waits_for_what_others_may_give_back() -> None:
    """Two calls that may cost all there is: the second has to wait, and goes on when the first turns out cheap."""
    budget = Budget(max_calls=None, max_cost=1.0, prices=(1e6, 0.0))
    first = budget.reserve(1, 0)
    done: list[float] = []
    waiting = threading.Thread(target=lambda: done.append(budget.reserve(1, 0)))
    waiting.start()
    time.sleep(0.05)
    assert not done
    budget.settle(first, 0, 0)
    waiting.join(5)
    assert done == [1.0]
    budget.settle(1.0, 1, 0)
    with pytest.raises(OverBudget, match="max_cost is \\$1"):
        budget.reserve(1, 0)


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_nowhere_else(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """An endpoint that sends the key back, in replies and in errors, does not bring it into files or messages."""
    caplog.set_level(logging.DEBUG)
    telling = [Act(f"your key is {KEY}", message={"refusal": KEY}), error(401, f"Incorrect key: Bearer {KEY}")]
    with serving(telling) as fake:
        client = client_of(fake, cache=tmp_path, concurrency=1)
        assert client.complete(asks("q")) == ["your key is ***"]
        assert fake.headers[0]["authorization"] == f"Bearer {KEY}"
        try:
            client.complete(asks("another"))
        except UserError as problem:
            said = "".join(traceback.format_exception(problem))
            assert "Incorrect key: Bearer ***" in said
            assert KEY not in said
        else:
            raise AssertionError("refused")
    files = files_of(tmp_path)
    assert files
    assert not [name for name, content in files.items() if KEY.encode() in content or KEY in name]
    out, err = capfd.readouterr()
    assert KEY not in out + err + caplog.text
    assert KEY not in repr(client.endpoint) + repr(client.__dict__.keys())


def test_openais_key_does_not_cross_a_network_in_the_clear() -> None:
    """Plain http to another machine gets no key, unless a variable of its own was named for it."""
    for url, safe in (
        ("http://10.0.0.5:8000/v1", False),
        ("https://10.0.0.5/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
    ):
        _, key = ChatClient(Endpoint(base_url=url))._connection
        assert (key == KEY) is safe, url
    with mock.patch.dict(os.environ, {"MY_KEY": "mine"}):
        _, key = ChatClient(Endpoint(base_url="http://10.0.0.5:8000/v1", api_key_env="MY_KEY"))._connection
    assert key == "mine"


def test_in_turn_repeats_its_last_act() -> None:
    script = in_turn(Act("a"), Act("b"))
    assert [script(i, {}).text for i in range(3)] == ["a", "b", "b"]
