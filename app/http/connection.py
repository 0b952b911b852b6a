"""One connection, guarded below the framework: deadlines and one strict grammar before any parser.

A framework never sees a half-sent header, so slow and malformed senders are met here. Bytes reach
uvicorn's parser only after `HeadGrammar` or `ChunkedBody` let them pass, one request at a time;
one sweep over all connections keeps the deadlines, so that a request sets no timer of its own.
"""

import asyncio
import math
import os
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Final, NamedTuple

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from app.http.chunks import ChunkedBody
from app.http.head import CHUNKED, HeadGrammar, UpgradeAsked, check_unfinished, without_upgrade
from app.http.known_head import OTHER, KnownHead
from app.http.known_heads import KnownHeads
from app.http.limits import HttpLimits
from app.http.refusal import CLOSED_CONTENT_POLICY, SAFE_HEADERS, HttpRefusal
from app.http.watch import Watch


class Phase(Enum):
    """What a connection is at.

    WAITING -> (HEAD ->) (BODY ->) ANSWERING -> WAITING, or WAITING -> GATHERING -> ANSWERING;
    any -> LINGERING, which is the last.
    """

    WAITING = "for the first byte of a request"
    GATHERING = "a known head came, its body is not complete, and nobody waits for a part of it"
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
REQUEST_LINE_BYTES: Final = 256
"""As much of a head is looked at to answer what no parser has seen."""

HEAD_TOO_SLOW = HttpRefusal(408, "header_too_slow", "The header took too long to arrive.")
BODY_TOO_SLOW = HttpRefusal(408, "body_too_slow", "The body took too long to arrive.")
UNREADABLE = HttpRefusal(400, "malformed_request", "The request is not valid HTTP.")


class Shared(NamedTuple):
    """What all connections of a server have in common.

    Attributes:
        lines: header lines that were made before, where the parser makes use of them.
        heads: those that were answered, so far as the parser makes use of them.
        on_refusal: told the code of every request refused here.
    """

    limits: HttpLimits
    grammar: HeadGrammar
    watch: Watch
    lines: Any
    heads: KnownHeads
    on_refusal: Callable[[str], None]


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
        shared: Shared,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)  # type: ignore[call-arg]
        self.deadline = NEVER
        self._shared = shared
        self._limits = shared.limits
        self._grammar = shared.grammar
        self._watch = shared.watch
        self._phase = WAITING
        self._head_until: float | None = None
        self._held = b""
        self._known_head = KnownHead()
        self._repeated = OTHER
        self._gathered = bytearray()
        self._chunks: ChunkedBody | None = None
        self._left = 0
        self._body_since = 0.0
        self._body_received = 0
        self._expects_100 = False

    def _feed(self, data: bytes) -> None:
        """Give checked bytes to the parser."""
        raise NotImplementedError

    def _feed_again(self, data: bytes) -> None:
        """Give it a whole request whose head is known."""
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
            repeated = self._known_head.matches(data)
            if repeated.head_bytes and len(data) <= repeated.request_bytes:
                self._repeated = repeated
                self._repeat_head(data)
            else:
                self._begin(data)
        elif phase is Phase.GATHERING:
            self._gather(data)
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

    def _adopt(self, data: bytes, request_bytes: int) -> bool:
        """Whether the known head was answered on another connection, and so it can be here."""
        del data, request_bytes
        return False

    def _may_gather(self) -> bool:
        """Whether a request with the known head is answered by its whole body only."""
        return False

    def _repeat_head(self, data: bytes) -> None:
        """Take a request with the known head, or the start of its body."""
        if len(data) == self._repeated.request_bytes:
            self._phase = ANSWERING
            self.deadline = NEVER
            self._feed_again(data)
        elif self._may_gather():
            self._phase = Phase.GATHERING
            self._restart_body_clock()
            self._gather(data)
        else:
            self._begin(data)

    def _gather(self, data: bytes) -> None:
        """Take a further part of a body, and go on once it is whole."""
        gathered, request_bytes = self._gathered, self._repeated.request_bytes
        gathered += data
        if len(gathered) < request_bytes:
            self._extend_body_deadline(len(data))
            return
        self._phase = ANSWERING
        self.deadline = NEVER
        self._held = bytes(gathered[request_bytes:])
        del gathered[request_bytes:]
        self._gathered = bytearray()
        self._feed_again(bytes(gathered))

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
        # What the parser makes of a head is kept for the last one that it read, and no other.
        self._known_head = KnownHead() if length == CHUNKED else KnownHead(data[:end])
        if len(data) <= end + length and self._adopt(data, end + length):
            self._held = b""
            self._repeat_head(data)
        elif length == len(data) - end:
            self._phase = ANSWERING
            self.deadline = NEVER
            self._held = b""
            self._feed(data)
        else:
            self._begin_body(data, end, length)

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
        elif self._phase is Phase.GATHERING:
            self._refuse(BODY_TOO_SLOW, bytes(self._gathered[:REQUEST_LINE_BYTES]))
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
        self._shared.on_refusal(refusal.code)
        if head is not None or self._abandon_request():
            line = head[:REQUEST_LINE_BYTES] if head is not None else self._open_request_line()
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
        self._held, self._gathered = b"", bytearray()
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
