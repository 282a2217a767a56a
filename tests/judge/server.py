"""A stand-in for an OpenAI-compatible endpoint: a thread that answers as a script says, well or badly."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """What the server does with one request."""

    text: str | None = "Score: 8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """In place of a chat completion."""
    wait: float = 0.0
    """Seconds before it answers."""
    drip: float = 0.0
    """Seconds between two bytes of the answer."""
    drop: bool = False
    """Closes the connection instead of answering."""
    message: Mapping[str, Any] = field(default_factory=dict)
    """More keys of the message."""
    usage: Mapping[str, Any] | None = None


Script = Callable[[int, dict[str, Any]], Act]
"""The number of a request, from 0, and its body -> what to do."""


class Fake:
    """The server's address and what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def calls(self) -> int:
        return len(self.requests)


def error(status: int, message: str = "no", **headers: str) -> Act:
    """An answer as OpenAI words its errors; `Retry_After` names the header Retry-After."""
    body = json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()
    return Act(status=status, body=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def always(text: str) -> Script:
    return lambda number, body: Act(text)


def in_turn(*acts: Act) -> Script:
    """One act a request; the last one from then on."""
    return lambda number, body: acts[min(number, len(acts) - 1)]


@contextlib.contextmanager
def serving(script: Script | Sequence[Act]) -> Iterator[Fake]:
    fake = Fake(script if callable(script) else in_turn(*script))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                number = len(fake.requests)
                fake.requests.append(body)
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                fake.busy += 1
                fake.most_busy = max(fake.most_busy, fake.busy)
            try:
                self.act(fake.script(number, body), body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with fake.lock:
                    fake.busy -= 1

        def act(self, act: Act, asked: dict[str, Any]) -> None:
            time.sleep(act.wait)
            if act.drop:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            answer = act.body if act.body is not None else json.dumps(completion(act, asked)).encode()
            self.send_response(act.status)
            for name, value in {"Content-Type": "application/json", **act.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if act.drip:
                for i in range(len(answer)):
                    self.wfile.write(answer[i : i + 1])
                    self.wfile.flush()
                    time.sleep(act.drip)
            else:
                self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            """A client that hangs up is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(act: Act, asked: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion as the endpoint writes it."""
    sent = sum(len(m["content"]) for m in asked["messages"]) // 4
    return {
        "id": "x",
        "object": "chat.completion",
        "model": f"{asked['model']}-2024",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": act.text, **act.message}}
        ],
        "usage": {"prompt_tokens": sent, "completion_tokens": 10} if act.usage is None else act.usage,
    }
