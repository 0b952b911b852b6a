"""One answer on its way out: the headers that every answer has, and a refusal in its place."""

from collections.abc import Awaitable, Iterable, Mapping
from typing import Final

from starlette.types import Message, Receive, Send

from app.http.refusal import CLOSED_CONTENT_POLICY, SAFE_HEADERS, HttpRefusal

# nginx's number for a caller who left before the answer: nothing was sent, so nothing was a status.
CALLER_LEFT: Final = 499


def lines_of(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header fields as they are on the wire; nothing is checked."""
    return b"".join([b"%b: %b\r\n" % field for field in fields])


class SafeHeaders:
    """Headers that every answer gets unless the application has set its own.

    Attributes:
        lines: all of them as they are on the wire.
    """

    def __init__(self, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.lines = lines_of(headers)
        self._headers = headers
        self._names = frozenset(name for name, _ in headers)

    def add_to(
        self, headers: Iterable[tuple[bytes, bytes]], request_id: bytes
    ) -> list[tuple[bytes, bytes]]:
        """Return `headers` of an answer with the missing ones behind them."""
        for name, _ in headers:
            if name in self._names:
                own = {name for name, _ in headers}
                missing = [each for each in self._headers if each[0] not in own]
                return [*headers, *missing, (b"x-request-id", request_id)]
        return [*headers, *self._headers, (b"x-request-id", request_id)]


def safe_headers(changed: Mapping[str, str]) -> SafeHeaders:
    """Return the safe headers with some of them changed, or more of them."""
    headers = dict(SAFE_HEADERS)
    headers[b"content-security-policy"] = CLOSED_CONTENT_POLICY
    headers.update({name.lower().encode(): value.encode() for name, value in changed.items()})
    return SafeHeaders(tuple(headers.items()))


class Answer:
    """The answer to one request on its way out: it gets headers, and is given once."""

    __slots__ = ("_headers", "_refused", "_send", "request_id", "status")

    def __init__(self, send: Send, headers: SafeHeaders, request_id: bytes) -> None:
        self.request_id = request_id
        self.status = CALLER_LEFT
        self._refused = False
        self._send = send
        self._headers = headers

    @property
    def started(self) -> bool:
        """Whether its status has gone out."""
        return self.status != CALLER_LEFT

    def send(self, message: Message) -> Awaitable[None]:
        """What the application sees as `send`; nothing goes out behind a refusal.

        Not a coroutine of its own: each would cost more than what it does.
        """
        if self._refused:
            return nothing()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = self._headers.add_to(message.get("headers", ()), self.request_id)
        return self._send(message)

    async def refuse(self, refusal: HttpRefusal, path: str) -> None:
        """Answer `refusal` in the application's place, unless it has begun its own answer."""
        if not self.started:
            body = refusal.body(path.encode())
            start = {"type": "http.response.start", "status": refusal.status}
            await self.send({**start, "headers": refusal.headers(body)})
            await self.send({"type": "http.response.body", "body": body})
        self._refused = True


class CountedBody:
    """A body that names no length: counted as it arrives, and cut off with 413 at its limit."""

    def __init__(self, receive: Receive, answer: Answer, max_bytes: int, path: str) -> None:
        self._receive = receive
        self._answer = answer
        self._max_bytes = max_bytes
        self._left = max_bytes
        self._path = path

    async def receive(self) -> Message:
        """What the application sees as `receive`: at the limit its client seems gone."""
        if self._left < 0:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            await self._answer.refuse(body_too_large(self._max_bytes), self._path)
            return {"type": "http.disconnect"}
        return message


async def nothing() -> None:
    """Send nothing."""


def body_too_large(max_bytes: int) -> HttpRefusal:
    return HttpRefusal(413, "body_too_large", f"The body is limited to {max_bytes} bytes here.")
