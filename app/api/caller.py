"""The caller of a request: the body they send, the time they give, and whether they still wait."""

import asyncio
from types import TracebackType
from typing import Final, Self

from starlette.types import Receive

from app.errors import BadRequest, BodyTooLarge

WATCH_AFTER_S: Final = 0.02
MAX_LENGTH_DIGITS: Final = 18
LONGEST_TIMEOUT_S: Final = 86_400.0


class CallerGone(BadRequest):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__("the connection ended before the answer")


async def read_body(
    receive: Receive, content_length: bytes | None, max_bytes: int, lead_bytes: int = 0
) -> bytes | bytearray:
    """The whole body; memory grows only with what has arrived.

    Args:
        lead_bytes: zeros to put before it, for whoever wants what it holds at an even address.

    Raises:
        BodyTooLarge: announced or arriving, it is over `max_bytes`.
        CallerGone: the connection ended first.
    """
    if content_length is not None and _announced(content_length) > max_bytes:
        raise _too_large(max_bytes)
    body: bytes | bytearray = bytearray(lead_bytes) if lead_bytes else b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerGone
        chunk: bytes = message.get("body", b"")
        if len(body) - lead_bytes + len(chunk) > max_bytes:
            raise _too_large(max_bytes)
        if not body:
            body = chunk
        else:
            body = body if isinstance(body, bytearray) else bytearray(body)
            body += chunk
        if not message.get("more_body", False):
            return body


def timeout_s(header: bytes) -> float:
    """`X-Request-Timeout-Ms` in seconds.

    Raises:
        BadRequest: not a number above 0, or more than a day.
    """
    try:
        seconds = float(header) / 1000
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise BadRequest(
            f"X-Request-Timeout-Ms is {header[:40].decode('latin-1')!r}; it must be a number of "
            "milliseconds above 0 and at most a day",
            param="X-Request-Timeout-Ms",
        )
    return seconds


class WhileCallerWaits:
    """Inside `with`, the running task is cancelled once its caller has hung up.

    A request that is answered quickly never pays for being watched.

    Args:
        receive: of the request, its body read to the end.

    Raises:
        CallerGone: on leaving, where that happened.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._listener: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(WATCH_AFTER_S, self._watch)
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._listener is not None:
            self._listener.remove_done_callback(self._hung_up)
            self._listener.cancel()
        if self._gone and self._task is not None:
            self._task.uncancel()
            if isinstance(error, asyncio.CancelledError):
                raise CallerGone from None

    def _watch(self) -> None:
        self._listener = self._loop.create_task(self._listen())
        self._listener.add_done_callback(self._hung_up)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _hung_up(self, listener: "asyncio.Task[None]") -> None:
        """A connection that can no longer be read has nobody at its other end either."""
        if not listener.cancelled():
            listener.exception()
        self._gone = True
        if self._task is not None:
            self._task.cancel()


def _announced(content_length: bytes) -> int:
    """What the header says; the HTTP parser refuses what is no number."""
    if not content_length.isdigit():
        return 0
    return int(content_length[:MAX_LENGTH_DIGITS])


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the limit of {max_bytes} bytes")
