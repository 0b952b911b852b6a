"""What uvicorn is given to make its connections with: guarded ones, over either of its parsers."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from app.http.connection import GuardedConnection, Shared
from app.http.head import HeadGrammar
from app.http.known_heads import KnownHeads
from app.http.limits import HttpLimits
from app.http.watch import Watch

try:
    from app.http.cycle import HeaderLines
    from app.http.httptools_connection import HttpToolsConnection
except ImportError:  # h11 comes with uvicorn, httptools is faster
    HttpToolsConnection = None  # type: ignore[assignment, misc]

Parser = Literal["httptools", "h11"]


class GuardedHttp:
    """Makes the protocol of each new connection; give it to uvicorn as `Config(http=...)`.

    One for each server. `on_refusal` is told the code of every request refused here;
    `on_connection`, which may be set, is called with every connection.
    """

    def __init__(
        self,
        limits: HttpLimits | None = None,
        parser: Parser | None = None,
        on_refusal: Callable[[str], None] | None = None,
    ) -> None:
        self.limits = limits = limits or HttpLimits()
        self.heads = KnownHeads()
        self._shared = Shared(
            limits,
            HeadGrammar(limits.max_head_bytes, limits.max_fields),
            Watch(limits.tick_s),
            None if HttpToolsConnection is None else HeaderLines(),
            self.heads,
            on_refusal or (lambda _code: None),
        )
        self._connection = connection_class(parser)
        self.on_connection: Callable[[], None] = lambda: None

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        self.on_connection()
        return self._connection(self._shared, config, server_state, app_state, _loop)


class H11Connection(GuardedConnection, H11Protocol):
    """The guard before h11."""

    def _feed(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()

    def on_response_complete(self) -> None:
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
        super().on_response_complete()


def connection_class(parser: Parser | None) -> type[GuardedConnection]:
    """Return the protocol over `parser`; None takes httptools where it is installed."""
    if parser == "h11" or (parser is None and HttpToolsConnection is None):
        return H11Connection
    if HttpToolsConnection is None:
        raise ValueError("the HTTP parser 'httptools' is not installed; 'h11' always is")
    return HttpToolsConnection
