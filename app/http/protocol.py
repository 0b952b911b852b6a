"""HTTP guarded below the framework: uvicorn's two protocols, with deadlines and one strict grammar.

A framework never sees a half-sent header, so slow and malformed senders are met here. Bytes reach
uvicorn's parser only after `HeadGrammar` or `ChunkedBody` let them pass, one request at a time;
one sweep over all connections keeps the deadlines, so that a request sets no timer of its own.
"""

import asyncio
import math
import os
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import Any, Final, Literal
from urllib.parse import unquote

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from app.http.chunks import ChunkedBody
from app.http.head import CHUNKED, HeadGrammar, UpgradeAsked, check_unfinished, without_upgrade
from app.http.limits import HttpLimits
from app.http.refusal import CLOSED_CONTENT_POLICY, SAFE_HEADERS, HttpRefusal
from app.http.repeat import EXTENSION, Repeat
from app.http.watch import Watch

try:
    import httptools
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

    from app.http.cycle import Cycle, HeaderLines
except ImportError:  # h11 comes with uvicorn, httptools is faster
    httptools = None  # type: ignore[assignment]

Parser = Literal["httptools", "h11"]


class Phase(Enum):
    """What a connection is at.

    WAITING -> (HEAD ->) (BODY ->) ANSWERING -> WAITING; any -> LINGERING, which is the last.
    """

    WAITING = "for the first byte of a request"
    HEAD = "a part of a header came"
    BODY = "the header is complete, the body is not"
    ANSWERING = "the request is complete, its answer is not"
    LINGERING = "closing: what still comes is discarded"


# Bound once: looking a member up in the class costs a request more than the comparison.
WAITING: Final = Phase.WAITING
ANSWERING: Final = Phase.ANSWERING
NEVER: Final = math.inf
HEAD_END: Final = b"\r\n\r\n"
STOP_GRACE_S: Final = 0.2
MAX_KNOWN_BYTES: Final = 2048

HEAD_TOO_SLOW = HttpRefusal(408, "header_too_slow", "The header took too long to arrive.")
BODY_TOO_SLOW = HttpRefusal(408, "body_too_slow", "The body took too long to arrive.")
UNREADABLE = HttpRefusal(400, "malformed_request", "The request is not valid HTTP.")


class GuardedHttp:
    """Makes the protocol of each new connection; give it to uvicorn as `Config(http=...)`.

    One for each server. `on_refusal` is told the code of every request refused here.
    """

    def __init__(
        self,
        limits: HttpLimits | None = None,
        parser: Parser | None = None,
        on_refusal: Callable[[str], None] | None = None,
    ) -> None:
        self.limits = limits or HttpLimits()
        self.grammar = HeadGrammar(self.limits.max_head_bytes, self.limits.max_fields)
        self.watch = Watch(self.limits.tick_s)
        self.lines: Any = None if httptools is None else HeaderLines()
        self.on_refusal = on_refusal or (lambda _code: None)
        self._connection = connection_class(parser)

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        return self._connection(self, config, server_state, app_state, _loop)


class GuardedConnection(asyncio.Protocol):
    """What both parsers share; stands before one of uvicorn's protocols among the bases."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    flow: FlowControl
    server_state: ServerState
    cycle: Any
    scope: Any

    def __init__(
        self,
        guard: GuardedHttp,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)  # type: ignore[call-arg]
        self.deadline = NEVER
        self._guard = guard
        self._limits = guard.limits
        self._grammar = guard.grammar
        self._watch = guard.watch
        self._phase = WAITING
        self._head_until: float | None = None
        self._held = b""
        self._known_head = HEAD_END
        self._known_bytes = 0
        self._chunks: ChunkedBody | None = None
        self._left = 0
        self._body_since = 0.0
        self._body_received = 0
        self._expects_100 = False

    def _feed(self, data: bytes) -> None:
        """Give checked bytes to the parser."""
        raise NotImplementedError

    def _feed_again(self, data: bytes) -> None:
        """Give it a whole request whose head is the same as that of the one before."""
        self._feed(data)

    # Events of the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch.add(self, self.loop)
        now = self._watch.now
        self._head_until = now + self._limits.head_s
        self.deadline = now + (STOP_GRACE_S if self._watch.stopping else self._limits.first_byte_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.remove(self)
        self._phase = Phase.LINGERING
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase is WAITING:
            # A client repeats its head, and what was good once is good again.
            if data.startswith(self._known_head) and len(data) == self._known_bytes:
                self._phase = ANSWERING
                self.deadline = NEVER
                self._feed_again(data)
            else:
                self._begin(data)
        elif phase is Phase.BODY:
            self._receive_body(data)
        elif phase is Phase.HEAD:
            self._begin(self._held + data, len(self._held))
        elif phase is ANSWERING:
            self._held += data
            if len(self._held) > self._limits.max_pipelined_bytes:
                self.flow.pause_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.deadline = self._watch.now + self._limits.write_idle_s

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._phase is ANSWERING:
            self.deadline = NEVER

    # A request: its head, its body, its answer.

    def _begin(self, data: bytes, seen_bytes: int = 0) -> None:
        """Take the start of a request, of which `seen_bytes` were looked at before."""
        end = data.find(HEAD_END, seen_bytes - 3 if seen_bytes > 3 else 0) + 4
        try:
            if end < 4:
                self._hold_head(data, seen_bytes)
                return
            length = self._grammar.body_bytes(data, end)
        except HttpRefusal as refusal:
            self._refuse(refusal, data)
            return
        except UpgradeAsked:
            self._begin(without_upgrade(data, end))
            return
        if length == len(data) - end:
            self._remember(data, end)
            self._phase = ANSWERING
            self.deadline = NEVER
            self._held = b""
            self._feed(data)
        else:
            self._begin_body(data, end, length)

    def _remember(self, data: bytes, end: int) -> None:
        """The head `data[:end]` needs no second look where it comes again; none, where it is long.

        What the parser makes of a head is kept for the last one that it read, and no other.
        """
        known = 0 < end <= MAX_KNOWN_BYTES
        self._known_head = data[:end] if known else HEAD_END
        self._known_bytes = len(data) if known else 0

    def _hold_head(self, data: bytes, seen_bytes: int) -> None:
        """Keep an unfinished head; its deadline is absolute, whatever trickles in."""
        if len(data) > self._limits.max_head_bytes:
            raise self._grammar.too_large()
        check_unfinished(data, seen_bytes)
        self._held = data
        if self._phase is WAITING:
            self._phase = Phase.HEAD
            self.deadline = self._head_until or self._watch.now + self._limits.head_s

    def _begin_body(self, data: bytes, end: int, length: int) -> None:
        """Feed the head, and watch over a body that is not all there, or ends before `data`."""
        self._phase = Phase.BODY
        self._left = length
        self._remember(b"", 0)
        limits = self._limits
        if length == CHUNKED:
            self._chunks = ChunkedBody(limits.max_head_bytes, limits.max_fields)
        self._restart_body_clock()
        self._feed(data[:end])
        if self._phase is Phase.BODY:
            self._expects_100 = self.cycle.waiting_for_100_continue
            self.cycle.transport = LingeringTransport(self)
            self._receive_body(data[end:])

    def _receive_body(self, data: bytes) -> None:
        try:
            part, rest = self._split_body(data)
        except HttpRefusal as refusal:
            self._refuse(refusal)
            return
        if part:  # to h11, nothing would be the end of the connection
            self._feed(part)
        if self._phase is not Phase.BODY:
            return
        if rest is None:
            self._extend_body_deadline(len(data))
        else:
            self._end_body(rest)

    def _split_body(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return what of `data` belongs to the body, and the rest, or None if more must come."""
        if self._chunks is not None:
            return self._chunks.follow(data)
        if len(data) < self._left:
            self._left -= len(data)
            return data, None
        return data[: self._left], data[self._left :]

    def _end_body(self, rest: bytes) -> None:
        self._chunks = None
        self._held = rest
        if self.cycle.response_complete:
            self._await_request()
        else:
            self._phase = ANSWERING
            self.deadline = NEVER

    def _await_request(self) -> None:
        """The request and its answer are complete; go on with what was sent behind it, if any."""
        self._phase = WAITING
        self._head_until = None
        self.cycle = None
        self.deadline = self._watch.now + self._limits.keep_alive_s
        if self._held:
            held, self._held = self._held, b""
            self._begin(held)
        elif self._watch.stopping:
            self._close()

    def on_response_complete(self) -> None:
        """Called by uvicorn behind the last byte of each answer. It sets no keep-alive timer."""
        self.server_state.total_requests += 1
        if self._phase is Phase.LINGERING:
            return
        if self.transport.is_closing():
            self._phase = Phase.LINGERING
            self.deadline = self._watch.now + self._limits.write_idle_s
            return
        self.flow.resume_reading()
        if self._phase is Phase.BODY:
            self._answered_early()
        else:
            self._await_request()

    def _answered_early(self) -> None:
        """The answer came before the end of the body: discard the rest if it is little."""
        too_much = self._chunks is not None or self._left > self._limits.max_discarded_bytes
        if too_much or self._expects_100:
            self.linger()

    # Deadlines.

    def _restart_body_clock(self) -> None:
        self._body_since = self._watch.now
        self._body_received = 0

    def _extend_body_deadline(self, num_bytes: int) -> None:
        """Allow the longest pause from now, and the least rate since the start."""
        self._body_received += num_bytes
        limits = self._limits
        allowed_s = limits.body_grace_s + self._body_received / limits.min_body_bytes_per_s
        self.deadline = min(self._watch.now + limits.body_idle_s, self._body_since + allowed_s)

    def expire(self) -> None:
        """Called by the watch when `deadline` has passed."""
        if self._phase is WAITING:
            self._close()  # no request, so no answer
        elif self._phase is Phase.HEAD:
            self._refuse(HEAD_TOO_SLOW, self._held)
        elif self._phase is Phase.BODY and self._waits_for_us():
            self._restart_body_clock()
            self.deadline = self._watch.now + self._limits.body_idle_s
        elif self._phase is Phase.BODY:
            self._refuse(BODY_TOO_SLOW)
        else:
            self.transport.abort()

    def _waits_for_us(self) -> bool:
        """Whether the sender of a body may not go on before the application reads."""
        return self.flow.read_paused or bool(self.cycle.waiting_for_100_continue)

    # Ends.

    def shutdown(self) -> None:
        """Called by uvicorn when the server stops: what was received is still answered."""
        self._watch.stopping = True
        if self._phase is WAITING:
            # Not at once: a request may lie in the socket, received but not read.
            self.deadline = self._watch.now + STOP_GRACE_S
        elif self._phase is Phase.HEAD:
            self.deadline = min(self.deadline, self._watch.now + 1.0)

    def send_400_response(self, _message: str) -> None:
        """Called by uvicorn when its parser refuses what passed here."""
        self._refuse(UNREADABLE)

    def _refuse(self, refusal: HttpRefusal, head: bytes | None = None) -> None:
        """Answer `refusal` if no answer has begun, and end the connection.

        `head` is what came of a request that no parser has seen; without it the request is open.
        """
        self._guard.on_refusal(refusal.code)
        if head is not None or self._abandon_request():
            line = head[:256] if head is not None else self._open_request_line()
            self.transport.write(self._refusal_bytes(refusal, line))
        self.linger()

    def _open_request_line(self) -> bytes:
        scope = self.scope or {}
        return f"{scope.get('method')} {scope.get('path')} ".encode()

    def _abandon_request(self) -> bool:
        """Tell the application that its client is gone; return whether an answer is owed."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return cycle is None
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle.response_started:
            self.transport.abort()
            return False
        return True

    def _refusal_bytes(self, refusal: HttpRefusal, request_line: bytes) -> bytes:
        method, _, rest = request_line.partition(b" ")
        body = refusal.body(rest.partition(b" ")[0].partition(b"?")[0])
        fields: Iterable[tuple[bytes, bytes]] = (
            *self.server_state.default_headers,
            *refusal.headers(body),
            *SAFE_HEADERS,
            (b"content-security-policy", CLOSED_CONTENT_POLICY),
            (b"x-request-id", os.urandom(8).hex().encode()),
        )
        lines = [b"%s: %s\r\n" % field for field in dict(fields).items()]
        return b"".join(
            [refusal.status_line(), *lines, b"\r\n", b"" if method == b"HEAD" else body]
        )

    def linger(self) -> None:
        """End our side, and discard what still comes for a moment.

        To close at once with bytes unread would reset the connection, and the reset may destroy
        the answer before the client has read it (RFC 9112, section 9.6).
        """
        self._phase = Phase.LINGERING
        self.deadline = self._watch.now + self._limits.linger_s
        self._held = b""
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def close_after_answer(self) -> None:
        """Close as an answer asks for it, which may come before the request's end."""
        if self._phase is Phase.BODY:
            self.linger()
        else:
            self.transport.close()

    def _close(self) -> None:
        self._phase = Phase.LINGERING
        self.deadline = self._watch.now + self._limits.write_idle_s
        self.transport.close()


class LingeringTransport:
    """What uvicorn's cycle sees as its transport while the body of its request still comes."""

    def __init__(self, connection: GuardedConnection) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self._connection.close_after_answer()


class H11Connection(GuardedConnection, H11Protocol):
    """The guard before h11."""

    def _feed(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()

    def on_response_complete(self) -> None:
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
        super().on_response_complete()


if httptools is not None:

    class HttpToolsConnection(GuardedConnection, HttpToolsProtocol):
        """The guard before httptools, which is not asked again about a head that it has read."""

        _known_scope: dict[str, Any] | None = None
        _lines: HeaderLines
        # What the application offers for the head that is known, and what gives up its work.
        _repeat: Repeat | None = None
        _give_up: Callable[[], object] | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._lines = self._guard.lines

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
            if usual and self._known_bytes:
                self.scope["extensions"] = {EXTENSION: partial(self._take, self._known_head)}
            self._known_scope = self._repeatable(self.scope) if usual else None
            self._start(self.scope, keep_alive)

        def _take(self, head: bytes, repeat: Repeat) -> None:
            """Take an offer, unless it comes so late that another head is known by now."""
            if head is self._known_head:
                self._repeat = repeat

        def _feed_again(self, data: bytes) -> None:
            """The scope as before: only the body is new."""
            if self._known_scope is None:
                self._feed(data)
                return
            body = data[len(self._known_head) :]
            if self._repeat is not None and not self.flow.write_paused:
                self._give_up = self._repeat(body, self._reply)
                if self._give_up is not None:
                    return
            self.scope = self._repeatable(self._known_scope)
            self._start(self.scope, True).whole_body = body

        def _reply(self, status: int, lines: bytes, body: bytes) -> None:
            """Answer what had its head known."""
            self._give_up = None
            usual = self._lines.usual(self.server_state.default_headers)
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


def connection_class(parser: Parser | None) -> type[GuardedConnection]:
    """Return the protocol over `parser`; None takes httptools where it is installed."""
    if parser == "h11" or (parser is None and httptools is None):
        return H11Connection
    if httptools is None:
        raise ValueError("the HTTP parser 'httptools' is not installed; 'h11' always is")
    return HttpToolsConnection
