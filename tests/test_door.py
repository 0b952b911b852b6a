"""Who comes before the service has started: probes hear at once, everybody else is served later."""

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from app.http.door import MAX_CONNECTIONS, EarlyDoor
from app.http.listener import listen
from benchmarks.system import free_port

T = TypeVar("T")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen("127.0.0.1", 0) as opened:
        yield opened


def ask(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as caller:
        caller.sendall(request)
        return b"".join(iter(lambda: caller.recv(4096), b""))


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def until(look: Callable[[], T], deadline_s: float = 5.0) -> T:
    deadline = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return found


def test_probes_are_answered_and_hung_up(listener: socket.socket) -> None:
    port, door = listener.getsockname()[1], EarlyDoor(listener)
    assert ask(port, get("/livez")).startswith(b"HTTP/1.1 200 OK\r\n")
    ready = ask(port, get("/readyz"))
    assert ready.startswith(b"HTTP/1.1 503 ")
    assert ready.endswith(b'{"ready":false,"reason":"the service is starting"}')
    assert door.hand_over() == []


@pytest.mark.parametrize(
    "sent", [b"", get("/livez")[:-1], get("/livez") * 2, get("/livezx"), b"POST /livez ", b"\0"]
)
def test_all_others_are_handed_over_with_what_they_sent(
    listener: socket.socket, sent: bytes
) -> None:
    door = EarlyDoor(listener)
    with socket.create_connection(listener.getsockname(), 5) as caller:
        caller.sendall(sent)
        until(lambda: door._kept if sent else door._unread)
        (kept,) = door.hand_over()
        with kept:
            assert not sent or kept.recv(4096) == sent


def test_a_crowd_stays_in_line_and_nobody_is_lost(listener: socket.socket) -> None:
    door = EarlyDoor(listener)
    with contextlib.ExitStack() as open_ones:
        for _ in range(MAX_CONNECTIONS + 5):
            caller = open_ones.enter_context(socket.create_connection(listener.getsockname(), 5))
            caller.sendall(b"POST / ")
        until(lambda: len(door._kept) == MAX_CONNECTIONS)
        kept = door.hand_over()
        for connection in kept:
            open_ones.enter_context(connection)
        assert len(kept) == MAX_CONNECTIONS
        listener.setblocking(True)
        for _ in range(5):
            open_ones.enter_context(listener.accept()[0])


@pytest.mark.slow
def test_a_starting_service_is_alive_and_answers_early_requests(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--home", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:

        def alive() -> bytes:
            with contextlib.suppress(OSError):
                return ask(port, get("/livez"))
            return b""

        assert until(alive, 60).startswith(b"HTTP/1.1 200 ")
        assert b"the service is starting" in ask(port, get("/readyz"))
        early = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(early):
            early.request("GET", "/v1/models")
            answer = early.getresponse()
            assert (answer.status, answer.getheader("content-type")) == (200, "application/json")
        assert b'"ready":true' in ask(
            port, get("/readyz").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
