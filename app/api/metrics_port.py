"""A second port for Prometheus: it answers with the figures, without a key, and nothing else.

One server listens on both ports, so that scrapes are answered until the last request is.
"""

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.health import PROMETHEUS, written
from app.errors import Refusal, v1_body
from app.http.origin import HostList
from app.http.refusal import SAFE_HEADERS, HttpRefusal
from app.metrics import Metrics


class MetricsPort:
    """ASGI middleware around the whole application.

    Args:
        metrics: what is told.
        port: the second port, as the socket says it; no header can.
        allowed_hosts: names that it answers to besides loopback's and its own address.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, port: int, allowed_hosts: tuple[str, ...]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._port = port
        self._hosts = HostList(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what came in at the second port; pass everything else on."""
        answers = scope["type"] == "http" and scope["server"][1] == self._port
        answer = await self._answer(scope) if answers else self._app
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response:
        headers = {name.decode(): value.decode() for name, value in SAFE_HEADERS}
        try:
            self._hosts.check(dict(scope["headers"]).get(b"host", b""), scope)
        except HttpRefusal as refusal:
            body = refusal.body(b"/metrics")
            return Response(body, refusal.status, headers, "application/json")
        if scope["path"] != "/metrics" or scope["method"] not in ("GET", "HEAD"):
            nothing = Refusal(
                404, "not_found", "invalid_request_error", "this port answers GET /metrics only"
            )
            return Response(orjson.dumps(v1_body(nothing)), 404, headers, "application/json")
        return Response(await written(self._metrics), headers=headers, media_type=PROMETHEUS)
