"""The short way for the routes that compute: one layer instead of the framework's and our own.

Around a small network the layers of a framework cost more than the network: its stack of contexts,
its two error handlers, its walk along the routes. The routes given here are the same as those that
the framework knows; what else is asked for, in path or method, is the framework's to answer.
"""

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.error_answers import error_response, log_unless_known
from app.api.permission import Guarded
from app.api.repeated_request import BEGIN, RepeatedRequest
from app.errors import refusal_of
from app.http.access import AccessLog
from app.http.origin import OriginGuard
from app.http.refusal import HttpRefusal
from app.http.repeat import EXTENSION
from app.tracing import Tracing

# Paths name models, which strangers may invent: what is remembered is bounded.
MAX_KNOWN_PATHS: Final = 4096


class Way(NamedTuple):
    """Where a path leads: the application of its route, what the path names, and the route."""

    app: ASGIApp
    path_params: dict[str, Any]
    route: Route


class HotPath:
    """Answers requests for a few routes, as the layers around the framework would.

    Args:
        routes: plain ones of the method POST.
        guard: who may ask, and how much; it wraps nothing here.
        access: counts and logs; it wraps nothing here.
        repeats: whether requests that repeat a head may skip what is around their route.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        guard: OriginGuard,
        access: AccessLog,
        *,
        repeats: bool = True,
    ) -> None:
        self._repeats = repeats
        self._routes = tuple(routes)
        self._guard = guard
        self._access = access
        self._known: dict[str, Way] = {}

    def way(self, scope: Scope) -> Way | None:
        """Where `scope` leads; None when that is for the framework to say."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
            return None
        return self._known.get(scope["path"]) or self._find(scope)

    async def answer(self, way: Way, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever becomes of it."""
        began = time.perf_counter()
        guard = self._guard
        fields = dict(scope["headers"])
        answer = guard.answer(scope, fields, send)
        scope["path_params"], scope["route"] = way.path_params, way.route
        try:
            guard.check(scope, fields)
            await way.app(scope, guard.bounded(receive, scope, fields, answer), answer.send)
            if BEGIN in scope and self._repeats:
                self._offer_repeat(way, scope)
        except HttpRefusal as refusal:
            await answer.refuse(refusal, scope["path"])
        except ClientDisconnect:
            return  # there is nobody to answer
        except Exception as error:  # the edge of the request
            if answer.started:
                raise
            log_unless_known(error, scope)
            response = error_response(Request(scope), refusal_of(error))
            await response(scope, receive, answer.send)
        finally:
            self._access.count(scope, answer.status, time.perf_counter() - began)

    def _offer_repeat(self, way: Way, scope: Scope) -> None:
        """Let the connection answer by itself what comes with the same head."""
        offer = scope.get("extensions", {}).get(EXTENSION)
        if offer is not None and isinstance(way.app, Guarded):
            offer(RepeatedRequest(scope, way.app.admit, scope[BEGIN], self._guard, self._access))

    def _find(self, scope: Scope) -> Way | None:
        for route in self._routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                if len(self._known) >= MAX_KNOWN_PATHS:
                    self._known.clear()
                way = self._known[scope["path"]] = Way(route.app, found["path_params"], route)
                return way
        return None


class HotApplication(FastAPI):
    """FastAPI, with the hot path before it once there is one."""

    hot_path: HotPath | None = None
    tracing: Tracing | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer on the hot path what leads there, and anything else as ever."""
        if self.tracing is None or scope["type"] != "http":
            await self._answer(scope, receive, send)
        else:
            await self.tracing.request(self._answer, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot_path = self.hot_path
        way = None if hot_path is None else hot_path.way(scope)
        if hot_path is None or way is None:
            await super().__call__(scope, receive, send)
        else:
            await hot_path.answer(way, scope, receive, send)
