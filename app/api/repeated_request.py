"""A request whose head came before: what the head decides is decided once.

Who may ask is asked again each time, because a key may end; host, origin and bounds cannot change.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

from starlette.requests import Request
from starlette.types import Scope

from app.api.error_answers import error_response, log_unless_known
from app.engine.waiter import Step, go_on
from app.errors import refusal_of
from app.http.access import AccessLog
from app.http.answer import CALLER_LEFT, lines_of
from app.http.known_head import with_boundary
from app.http.origin import OriginGuard
from app.http.repeat import Client, Reply

BEGIN: Final = "pytorchlib.begin"
"""Where a route leaves its `Begin` in the scope of a request that may come again."""

KEPT: Final = (*("type", "method", "path", "path_params", "query_string", "headers", "route"),)
Fields = Iterable[tuple[bytes, bytes]]


class Begun(Protocol):
    """Work that goes on by itself."""

    def cancel(self) -> None:
        """Nobody waits any more; of no effect once it is over."""

    def end(self) -> tuple[bytes, Fields]:
        """The body of the answer and its fields without a length, once it is over; called once.

        Raises:
            asyncio.CancelledError: it was cancelled.
        """


Begin = Callable[[Scope, bytes, Step], Begun | None]


class RepeatedRequest:
    """Answers the requests that have the head of `scope`; an `app.http.repeat.Repeat`.

    Args:
        scope: of the first of them, which was answered with 200.
        admit: asks for the key.
        begin: begins with the work, at whose end it goes on with the step that it is given; None
            for what has to take the usual way.
        guard, access: of the usual way.
    """

    def __init__(
        self,
        scope: Scope,
        admit: Callable[[Scope], None],
        begin: Begin,
        guard: OriginGuard,
        access: AccessLog,
    ) -> None:
        self.begin = begin
        self.safe_headers = guard.headers_of(scope["path"])
        self.count = access.count
        self._scope = {name: scope[name] for name in KEPT}
        self._admit = admit
        self._max_body_bytes = guard.max_body_bytes(scope["path"])
        self._request_id = guard.request_id
        self._given_id = dict(scope["headers"]).get(b"x-request-id")

    def __call__(
        self, client: Client, body: bytes, boundary: bytes | None, reply: Reply
    ) -> Callable[[], object] | None:
        """Begin to answer."""
        if len(body) > self._max_body_bytes:
            return None
        began = time.perf_counter()
        request_id = self._request_id(self._given_id)
        scope = {**self._scope, "client": client, "state": {"request_id": request_id.decode()}}
        if boundary is not None:
            scope["headers"] = with_boundary(scope["headers"], boundary)
        exchange = _Exchange(self, scope, request_id, reply, began)
        try:
            self._admit(scope)
            begun = self.begin(scope, body, exchange.settle)
        except Exception as error:  # the edge of the request
            go_on([exchange.failed(error)])
            return nothing
        if begun is None:
            return None
        exchange.begun = begun
        return begun.cancel


class _Exchange:
    """One request and its answer."""

    __slots__ = ("_began", "_head", "_reply", "_request_id", "_scope", "begun")

    def __init__(
        self, head: RepeatedRequest, scope: Scope, request_id: bytes, reply: Reply, began: float
    ) -> None:
        self.begun: Begun | None = None
        self._head = head
        self._scope = scope
        self._request_id = request_id
        self._reply = reply
        self._began = began

    def settle(self) -> Step | None:
        """Make the answer, now that the work is done; to write it is the next step."""
        # Nothing may keep what an error knows: its frames, this one among them, know this object.
        begun, self.begun = self.begun, None
        try:
            body, fields = begun.end()  # type: ignore[union-attr]
        except asyncio.CancelledError:
            self._head.count(self._scope, CALLER_LEFT, time.perf_counter() - self._began)
        except Exception as error:  # the edge of the request
            return self.failed(error)
        else:
            own = b"x-request-id: %b\r\ncontent-length: %d\r\n" % (self._request_id, len(body))
            lines = b"".join((lines_of(fields), own, self._head.safe_headers.lines))
            return partial(self._answer, 200, lines, body)
        return None

    def failed(self, error: Exception) -> Step:
        """Make the answer that the usual way would give."""
        log_unless_known(error, self._scope)
        response = error_response(Request(self._scope), refusal_of(error))
        fields = self._head.safe_headers.add_to(response.raw_headers, self._request_id)
        return partial(self._answer, response.status_code, lines_of(fields), bytes(response.body))

    def _answer(self, status: int, lines: bytes, body: bytes) -> Step:
        """Write it; to count it is the next step."""
        self._reply(status, lines, body)
        seconds = time.perf_counter() - self._began
        return partial(self._head.count, self._scope, status, seconds)


def nothing() -> None:
    """Give up what is over."""
