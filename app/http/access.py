"""What every request leaves behind: one count, and at most one log line."""

import logging
import re
import time
from typing import Any, Final, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.answer import CALLER_LEFT
from app.metrics import Metrics

log = logging.getLogger(__name__)

UNMATCHED: Final = "unmatched"
# Refused for want of room; where these come by the hundred a second, telling each costs as much as
# answering it, on the processors that the others wait for.
CROWDED: Final = 429
TOLD_A_WINDOW: Final = 10
WINDOW_S: Final = 1.0
# A key has no business in an address, and a log is no place to keep it.
A_KEY: Final = re.compile(r"ptl_[0-9a-f]{8}_[A-Za-z0-9_-]+")


class AccessLog:
    """ASGI middleware around everything else, so that refusals are counted as well.

    Args:
        metrics: counts each request by route, model, version and status.
        logged: every request, those that were refused or failed, or none. Of the refused, where
            only those are logged, the first ten of a second, and then how many more there were.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, logged: Literal["all", "errors", "none"]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._least_status = {"all": 0, "errors": 400, "none": 1000}[logged]
        self._crowd = Crowd() if logged == "errors" else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CALLER_LEFT

        def watched(message: Message) -> Any:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, watched)
        finally:
            self.count(scope, status, time.perf_counter() - began)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that is over, and log it where that is wanted."""
        predictor = scope.get("model")
        model, version = (predictor.name, str(predictor.version)) if predictor else ("", "")
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.count_request(route, model, version, status, seconds)
        crowd = self._crowd
        if crowd is not None and crowd.num_untold:
            crowd.tell_the_rest(time.monotonic())
        if status >= self._least_status:
            if crowd is not None and status == CROWDED and not crowd.is_told(time.monotonic()):
                return
            log.info(
                "%s %s %d in %.1f ms",
                scope["method"],
                A_KEY.sub("ptl_…", scope["path"][:200]),
                status,
                seconds * 1000,
                extra={
                    "request_id": scope.get("state", {}).get("request_id"),
                    "model": model,
                    "version": version,
                    "key": scope.get("state", {}).get("key"),
                    "trace_id": scope.get("state", {}).get("trace_id"),
                },
            )


class Crowd:
    """Which of many refusals get a line of their own."""

    def __init__(self) -> None:
        self.num_untold = 0
        self._num_told = 0
        self._since = float("-inf")

    def is_told(self, now: float) -> bool:
        """Whether one more refusal gets a line; otherwise it is counted for `tell_the_rest`."""
        if now - self._since >= WINDOW_S:
            self._since, self._num_told = now, 0
        if self._num_told < TOLD_A_WINDOW:
            self._num_told += 1
            return True
        self.num_untold += 1
        return False

    def tell_the_rest(self, now: float) -> None:
        """One line for all that had none, once their second is over."""
        if now - self._since >= WINDOW_S:
            log.info("%d more requests were answered with %d", self.num_untold, CROWDED)
            self.num_untold = 0
