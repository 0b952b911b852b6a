"""One request and its answer on a connection of httptools: uvicorn's, made cheaper.

The head and the body of an answer leave in one write, header lines that repeat are checked and
joined once, and a body that came whole is handed over as it came.
"""

from typing import Any, Final

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

MAX_KNOWN_LINES: Final = 1024
UNLIKE: Final = frozenset({b"x-request-id", b"content-length"})
# What decides on the framing or the end of the connection is left to uvicorn.
LEFT_TO_UVICORN: Final = frozenset({b"connection", b"transfer-encoding"})


class HeaderLines:
    """Header fields as the lines they are on the wire; those that repeat are made once."""

    def __init__(self) -> None:
        self.known: dict[tuple[bytes, bytes], bytes] = {}
        self._usual: tuple[object, bytes] = (None, b"")

    def usual(self, fields: list[tuple[bytes, bytes]]) -> bytes:
        """The lines of the server's own `fields`, a new list of which comes once a second."""
        if self._usual[0] is not fields:
            self._usual = (fields, b"".join([self.made(field) for field in fields]))
        return self._usual[1]

    def made(self, field: tuple[bytes, bytes]) -> bytes:
        """The line of a `field` that is not known; raises RuntimeError where it would be two."""
        name, value = field
        if name == b"content-length" and value.isdigit():
            return b"content-length: %b\r\n" % value
        if HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
            raise RuntimeError("An HTTP header has an invalid name or value.")
        line = b"%b: %b\r\n" % (name.lower(), value)
        if name not in UNLIKE:
            if len(self.known) >= MAX_KNOWN_LINES:
                self.known.clear()
            self.known[field] = line
        return line


class Cycle(RequestResponseCycle):
    """What the application sees of one request: `receive` and `send`."""

    whole_body: bytes | None = None
    _head: bytes | None = None

    def __init__(self, lines: HeaderLines, **parts: Any) -> None:
        super().__init__(**parts)
        self._lines = lines

    async def receive(self) -> Any:
        """The body in one piece where it came so; then as uvicorn has it."""
        body = self.whole_body
        if body is None or self.disconnected:
            return await super().receive()
        self.whole_body = None
        self.more_body = False
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:  # type: ignore[override]
        """Hold the head of a usual answer until its body comes; leave the others to uvicorn."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            self._head = self._usual_head(message)
            if self._head is not None:
                self.response_started = True
                self.waiting_for_100_continue = False
                return
        elif self._head is not None:
            head, self._head = self._head, None
            body = message.get("body", b"")
            if len(body) == self.expected_content_length and not message.get("more_body"):
                self._complete(head + body)
                return
            self.transport.write(head)
        await super().send(message)  # type: ignore[arg-type]

    def _usual_head(self, message: Message) -> bytes | None:
        """The head of an answer that says its length; None for what uvicorn is to send."""
        length = None
        content = [STATUS_LINE[message["status"]]] if "status" in message else []
        lines, known = self._lines, self._lines.known
        for field in (*self.default_headers, *message.get("headers", ())):
            line = known.get(field)
            if line is None:
                if field[0] in LEFT_TO_UVICORN:
                    return None
                if field[0] == b"content-length":
                    length = int(field[1])
                line = lines.made(field)
            content.append(line)
        if length is None or not self.keep_alive or self.scope["method"] == "HEAD":
            return None
        self.expected_content_length, self.chunked_encoding = length, False
        content.append(b"\r\n")
        return b"".join(content)

    def _complete(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.expected_content_length = 0
        self.response_complete = True
        self.message_event.set()
        self.on_response()
