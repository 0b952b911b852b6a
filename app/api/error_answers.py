"""Every error as an answer, in the shape of the interface that was asked."""

import logging
import math

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.complaint import complaint
from app.errors import STATUS, BadInput, Refusal, refusal_of, v1_body
from app.http.refusal import HttpRefusal

log = logging.getLogger(__name__)

JSON = "application/json"


class RequestEdge:
    """ASGI middleware: what no handler knows is logged with its traceback and answered as a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (HttpRefusal, ClientDisconnect):
            raise  # the guard around this one answers it
        except Exception as error:
            if started:
                raise
            log_unless_known(error, scope)
            await error_response(Request(scope), refusal_of(error))(scope, receive, send)


def log_unless_known(error: Exception, scope: Scope) -> None:
    """Write the traceback of an error that the table of statuses does not know."""
    if not any(known in STATUS for known in type(error).__mro__):
        request_id = scope.get("state", {}).get("request_id")
        log.error("request %s failed", request_id, exc_info=error)


def install_error_answers(app: FastAPI) -> None:
    """One answer for every error, in the shape of the interface that was asked."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(request, refusal_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # The first part of each place says which part of the request it is in.
        sentence, field = complaint([{**one, "loc": one["loc"][1:]} for one in error.errors()])
        return error_response(request, refusal_of(BadInput(sentence, param=field)))

    async def http(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        code = {404: "not_found", 405: "method_not_allowed"}.get(status, "http_error")
        message = {
            404: f"there is no {request.url.path}; /docs lists what there is",
            405: f"{request.method} is not offered at {request.url.path}",
            400: "The body cannot be read: it is no JSON in UTF-8, or nested too deeply.",
        }.get(status, str(getattr(error, "detail", error)))
        return error_response(
            request,
            Refusal(status, code, "invalid_request_error", message),
            dict(getattr(error, "headers", None) or {}),
        )

    for known in STATUS:
        app.add_exception_handler(known, answer)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def error_response(
    request: Request, refusal: Refusal, headers: dict[str, str] | None = None
) -> Response:
    """The answer that tells `refusal` at this path."""
    headers = dict(headers or {})
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after_s)))
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if request.scope["path"].startswith("/v2"):
        # That protocol knows one status for a request that is understood and wrong.
        status = 400 if refusal.status == 422 else refusal.status
        return Response(orjson.dumps({"error": refusal.message}), status, headers, JSON)
    return Response(orjson.dumps(v1_body(refusal)), refusal.status, headers, JSON)
