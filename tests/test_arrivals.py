"""Who comes in a crowd is let in as a crowd, also when the server is about to stop."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from raw_http import RawClient, RunningServer, connected, running

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BLOCK = GET.replace(b"GET /", b"GET /block")
NUM_CALLERS = 100


class Rounds:
    """An application that tells in which round of the event loop it was asked.

    `GET /block` holds the loop until `go_on` is set, so that others gather outside; any other
    request for `busy_s` seconds.
    """

    def __init__(self, busy_s: float = 0.0) -> None:
        self._busy_s = busy_s
        self.go_on = threading.Event()
        self.is_blocked = threading.Event()
        self.number = 0

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["path"] == "/block":
            self._count()
            self.is_blocked.set()
            self.go_on.wait(10)
        elif self._busy_s:
            time.sleep(self._busy_s)
        body = b"%d" % self.number
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    def _count(self) -> None:
        self.number += 1
        asyncio.get_running_loop().call_later(0, self._count)


@contextmanager
def crowd(
    application: Rounds, server: RunningServer, num_callers: int = NUM_CALLERS
) -> Iterator[list[RawClient]]:
    """Callers who came while the loop was held, and have asked."""
    with ExitStack() as stack:
        blocking = stack.enter_context(connected(server.port))
        blocking.send(BLOCK)
        assert application.is_blocked.wait(10)
        yield [stack.enter_context(connected(server.port)).send(GET) for _ in range(num_callers)]
        assert blocking.answer().status == 200


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_a_crowd_is_let_in_within_a_few_rounds(parser: str) -> None:
    application = Rounds()
    with (
        running(application, parser=parser) as server,
        crowd(application, server) as callers,
    ):
        application.go_on.set()
        rounds = [int(caller.answer().body) for caller in callers]
    assert max(rounds) - min(rounds) < NUM_CALLERS // 4


def test_nobody_is_left_outside_when_the_server_stops() -> None:
    application = Rounds(busy_s=0.002)
    with running(application) as server, crowd(application, server, 300) as callers:
        server.server.should_exit = True
        application.go_on.set()
        assert [caller.answer().status for caller in callers] == [200] * 300


def test_a_caller_who_has_gone_again_holds_up_nobody() -> None:
    application = Rounds()
    with running(application) as server, crowd(application, server) as callers:
        for caller in callers[::2]:
            caller.connection.close()
        application.go_on.set()
        assert {caller.answer().status for caller in callers[1::2]} == {200}
        assert server.ask(GET).status == 200


def test_one_caller_after_the_other_is_let_in_as_ever() -> None:
    with running(Rounds()) as server:
        began = time.monotonic()
        assert {server.ask(GET).status for _ in range(20)} == {200}
        assert time.monotonic() - began < 5
