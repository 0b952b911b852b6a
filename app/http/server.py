"""The process that serves: a listening socket, uvicorn with the guarded protocol, a graceful stop.

SIGTERM drains: the application learns it at once (so `/readyz` fails), every answer asks for its
connection to be closed, new requests are still served for `drain_s`, then the socket closes and
what was received is answered. SIGINT does the same without the wait; a second one stops waiting.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Any, Final, cast

from starlette.types import ASGIApp
from uvicorn import Config, Server

from app.http.arrivals import Arrivals
from app.http.door import EarlyDoor
from app.http.limits import HttpLimits
from app.http.listener import BACKLOG, listen
from app.http.protocol import GuardedHttp, Parser

CLOSE: Final = (b"connection", b"close")
STARTUP_FAILED: Final = 3
BROKEN: Final = 70  # EX_SOFTWARE of sysexits.h
FORCED: Final = 130

log = logging.getLogger(__name__)


class Breakdown:
    """How the application ends the process that serves it, when it can do its work no more."""

    def __init__(self) -> None:
        self.cause: BaseException | None = None
        self._stop: Callable[[], None] | None = None

    def happened(self, cause: BaseException) -> None:
        """Stop the server; called on its loop."""
        self.cause = cause
        if self._stop is not None:
            self._stop()

    def told_to(self, stop: Callable[[], None]) -> None:
        """Let `stop` be called when it happens."""
        self._stop = stop


class HttpServer(Server):
    """uvicorn's server with a drain; `on_drain` is called once, on the loop, when a stop begins."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: HttpLimits | None = None,
        parser: Parser | None = None,
        drain_s: float = 5.0,
        grace_s: float = 20.0,
        on_drain: Callable[[], object] | None = None,
        on_refusal: Callable[[str], None] | None = None,
        door: EarlyDoor | None = None,
    ) -> None:
        self._http = http = GuardedHttp(limits, parser, on_refusal)
        config = Config(
            cast(Any, app),
            http=cast(Any, http),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=cast(int, grace_s),
            h11_max_incomplete_event_size=2 * http.limits.max_head_bytes,
        )
        super().__init__(config)
        self._drain_s = drain_s
        self._on_drain = on_drain or (lambda: None)
        self._draining = False
        self._door = door
        self._arrivals: Arrivals | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then keep what is there by now out of the garbage collector.

        It stays for as long as the process does, and to walk it would stop every request for a
        tenth of a second, again and again.
        """
        await super().startup(sockets)
        if self.started:
            self._let_in(sockets or [])
        gc.collect()
        gc.freeze()

    def _let_in(self, listeners: Sequence[socket.socket]) -> None:
        """Serve who came while the service started, and from now on who comes with others."""

        def made() -> asyncio.Protocol:
            return self._http(self.config, self.server_state, self.lifespan.state)

        self._arrivals = arrivals = Arrivals(listeners, made)
        self._http.on_connection = arrivals.one_came
        for connection in self._door.hand_over() if self._door is not None else ():
            arrivals.take_over(connection)

    def drain(self) -> None:
        """Begin a graceful stop, unless one has begun. Call it on the loop."""
        if not self._begin_stop():
            return
        if self.started:
            log.info("Draining: new requests are served for %g s more", self._drain_s)
            asyncio.get_running_loop().call_later(self._drain_s, self._close)
        else:
            self._close()

    def stop(self) -> None:
        """Stop at once, but answer what was received; the second call stops waiting for that."""
        if self.should_exit:
            self._force()
            return
        self.end()

    def end(self) -> None:
        """Stop at once, but answer what was received; again it does no harm."""
        self._begin_stop()
        self._close()

    def _begin_stop(self) -> bool:
        """Tell clients and the application; return whether they did not know before."""
        if self._draining:
            return False
        self._draining = True
        # Read again by every tick, and by every answer: clients go elsewhere by themselves.
        self.config.encoded_headers.append(CLOSE)
        self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        self._on_drain()
        return True

    def _close(self) -> None:
        self.should_exit = True

    def _force(self) -> None:
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Act on SIGTERM and SIGINT; unlike uvicorn's own, raise neither again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        actions = {signal.SIGTERM: self.drain, signal.SIGINT: self.stop}
        patience = iter(range(2))

        def act(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and next(patience, None) is None:
                signal.default_int_handler(number, frame)  # the third time: the loop may be stuck
            loop.call_soon_threadsafe(actions[signal.Signals(number)])

        before = {number: signal.signal(number, act) for number in actions}
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the sockets, after taking in the connections that already wait in them."""
        for _ in range(2):
            await asyncio.sleep(0.01)
        if self._arrivals is not None:
            await self._arrivals.all_in()
        await super().shutdown(sockets)
        gc.unfreeze()  # libraries that count what they leave behind would count all of it


def raise_open_files_limit() -> None:
    """Let the process have as many connections as the system allows it."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(
    app: ASGIApp,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    sockets: Sequence[socket.socket] | None = None,
    limits: HttpLimits | None = None,
    parser: Parser | None = None,
    drain_s: float = 5.0,
    grace_s: float = 20.0,
    on_drain: Callable[[], object] | None = None,
    on_refusal: Callable[[str], None] | None = None,
    breakdown: Breakdown | None = None,
    door: EarlyDoor | None = None,
) -> int:
    """Serve `app` until a signal; return the exit code of the process.

    `sockets` that already listen stand in for `host` and `port`. `drain_s` seconds after SIGTERM
    the sockets close, and what was received then has `grace_s` seconds to be answered. The code is
    0 after a stop, 130 if one was forced, 3 if the application failed to start, 70 if it told
    `breakdown` that it can go on no more. `door` answered probes on the first socket until now.
    Raises ListenError.
    """
    raise_open_files_limit()
    listeners = [listen(host, port)] if sockets is None else list(sockets)
    server = HttpServer(
        app,
        limits=limits,
        parser=parser,
        drain_s=drain_s,
        grace_s=grace_s,
        on_drain=on_drain,
        on_refusal=on_refusal,
        door=door,
    )
    if breakdown is not None:
        breakdown.told_to(server.end)
    try:
        server.run(sockets=listeners)
    except SystemExit:  # uvicorn's way to end when the application's start-up failed
        return STARTUP_FAILED
    finally:
        for listener in listeners:
            listener.close()
    if not server.started:  # the same, with older versions of uvicorn
        return STARTUP_FAILED
    if breakdown is not None and breakdown.cause is not None:
        return BROKEN
    return FORCED if server.force_exit else 0
