"""A guarded connection whose parser is httptools, which may not be installed."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.http.connection import UNREADABLE, GuardedConnection
from app.http.cycle import Cycle, HeaderLines
from app.http.known_head import KnownHead, with_boundary, with_length
from app.http.repeat import EXTENSION, Repeat

MAX_GATHERED_BYTES: Final = 1024 * 1024


class HttpToolsConnection(GuardedConnection, HttpToolsProtocol):
    """The guard before httptools, which is not asked again about a head that it has read.

    What an application offers for such a head answers without a task and without ASGI.
    """

    _known_scope: dict[str, Any] | None = None
    _lines: HeaderLines
    # What the application offers for the head that is known, here or on another connection first,
    # and what gives up its work.
    _repeat: Repeat | None = None
    _give_up: Callable[[], object] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._lines = self._shared.lines

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # The scopes know this object: no ring, no garbage.
        self._repeat = self._known_scope = self.scope = None
        if self._give_up is not None:
            self._give_up()

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        self.scope |= {
            "method": self.parser.get_method().decode("ascii"),
            "http_version": version,
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
        }
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        usual = keep_alive and not self.expect_100_continue
        self._repeat = None
        if usual and self._known_head:
            self.scope["extensions"] = {EXTENSION: partial(self._take, self._known_head)}
        self._known_scope = self._repeatable(self.scope) if usual else None
        self._start(self.scope, keep_alive)

    def _adopt(self, data: bytes, request_bytes: int) -> bool:
        found = self._shared.heads.find(self._known_head)
        if found is None or request_bytes > MAX_GATHERED_BYTES:
            return False
        self._repeated = found.head.matches(data)
        if self._repeated.request_bytes != request_bytes:
            return False
        self._known_head, self._repeat = found.head, found.repeat
        self._known_scope = {
            **found.scope,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "extensions": {EXTENSION: partial(self._take, self._known_head)},
        }
        return True

    def _may_gather(self) -> bool:
        return self._repeat is not None and self._repeated.request_bytes <= MAX_GATHERED_BYTES

    def _take(self, head: KnownHead, repeat: Repeat) -> None:
        """Take an offer, unless it comes so late that another head is known by now."""
        if head is self._known_head and self._known_scope is not None:
            self._repeat = repeat
            self._shared.heads.keep(head, self._known_scope, repeat)

    def _feed_again(self, data: bytes) -> None:
        """The scope as before: only the body is new, with its length and its boundary."""
        if self._known_scope is None:
            self._feed(data)
            return
        head_bytes, _, boundary = self._repeated
        body = data[head_bytes:]
        if self._repeat is not None and not self.flow.write_paused:
            self._give_up = self._repeat(self.client, body, boundary, self._reply)
            if self._give_up is not None:
                return
        self.scope = self._repeatable(self._known_scope)
        self.scope["headers"] = with_length(self.scope["headers"], len(body))
        if boundary is not None:
            self.scope["headers"] = with_boundary(self.scope["headers"], boundary)
        self._start(self.scope, True).whole_body = body

    def _reply(self, status: int, lines: bytes, body: bytes) -> None:
        """Answer what had its head known."""
        self._give_up = None
        usual = self._lines.usual(self.server_state.default_headers)
        if not self.transport.is_closing():
            self.transport.write(b"".join((STATUS_LINE[status], usual, lines, b"\r\n", body)))
        self.on_response_complete()

    def _repeatable(self, scope: dict[str, Any]) -> dict[str, Any]:
        """A copy that the application may change."""
        return {
            **scope,
            "headers": list(scope["headers"]),
            "state": self.app_state.copy(),
        }

    def _start(self, scope: dict[str, Any], keep_alive: bool) -> Cycle:
        """Let the application answer the request; there is no other under way here."""
        self.cycle = cycle = Cycle(
            self._lines,
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        task = self.loop.create_task(cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        return cycle

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(UNREADABLE)
