"""A real server in a thread and a client of raw bytes, for the tests of what lies below HTTP."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp

from app.http.listener import listen
from app.http.server import HttpServer

WAIT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """One response as it lay on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@dataclass
class RawClient:
    """One connection; closes with the test."""

    port: int
    connection: socket.socket = field(init=False)
    received: bytes = b""
    source: str = "127.0.0.1"

    def __post_init__(self) -> None:
        address = ("127.0.0.1", self.port)
        self.connection = socket.create_connection(address, WAIT_S, (self.source, 0))

    def send(self, data: bytes) -> "RawClient":
        with contextlib.suppress(ConnectionError):  # a refused client may be cut off early
            self.connection.sendall(data)
        return self

    def answer(self, has_body: bool = True) -> Answer:
        """Read one response; raises EOFError where the server closes instead."""
        while b"\r\n\r\n" not in self.received:
            self._more()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        length = int(headers.get("content-length", 0)) if has_body else 0
        while len(self.received) < length:
            self._more()
        body, self.received = self.received[:length], self.received[length:]
        return Answer(int(first.split()[1]), headers, body)

    def rest(self) -> bytes:
        """Everything until the server closes; a reset counts as closing."""
        with contextlib.suppress(EOFError):
            while True:
                self._more()
        return self.received

    def closed_after_s(self, begun: float) -> float:
        """Seconds from `begun` until the server closes without a word."""
        assert self.rest() == b""
        return time.monotonic() - begun

    def _more(self) -> None:
        try:
            data = self.connection.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self.received += data


@contextlib.contextmanager
def connected(port: int, source: str = "127.0.0.1") -> Iterator[RawClient]:
    client = RawClient(port, source=source)
    try:
        yield client
    finally:
        client.connection.close()


@dataclass
class RunningServer:
    """A server on a free port, with what it refused."""

    server: HttpServer
    port: int
    refused: list[str]

    def forget_heads(self) -> None:
        """Let every head be read as if nobody had sent it before."""
        http: Any = self.server.config.http
        http.heads._remembered.clear()

    def ask(self, data: bytes) -> Answer:
        with connected(self.port) as client:
            return client.send(data).answer()


@contextlib.contextmanager
def running(app: ASGIApp, **options: Any) -> Iterator[RunningServer]:
    """Serve `app` in a thread until the block ends."""
    listener = listen("127.0.0.1", 0)
    refused: list[str] = []
    server = HttpServer(app, on_refusal=refused.append, **{"drain_s": 0.1, **options})
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield RunningServer(server, listener.getsockname()[1], refused)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server did not stop"
