"""What a caller may do: the scope that a route asks for, and the key that must have it.

A route of FastAPI says its scope with `dependencies=[requires("data:write")]`, a plain one is made
with `gate.guarded("predict", endpoint)`. Both are checked at the route and before the body is read:
FastAPI itself would take a whole upload first, and ask for the key then.
"""

import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Final

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, request_response
from starlette.types import ASGIApp, Receive, Send

from app.auth.attempts import FailedAttempts
from app.auth.key import MADE_HERE
from app.auth.ring import Grant
from app.auth.scope import Scope
from app.auth.signed_link import LinkSigner
from app.auth.watch import KeyWatch
from app.errors import KeyRefused, ScopeMissing, TooManyBadKeys

__all__ = ["Gate", "Scope", "key_name", "requires", "requires_or_signed", "signed_link"]

LOCAL: Final = "local"
LINK: Final = "signed-link"
PUBLIC: Final = frozenset(
    {"/livez", "/readyz", "/docs", "/docs/assets", "/favicon.ico", "/openapi.json"}
)
"""The paths of all routes that need no key."""

Endpoint = Callable[[Request], Awaitable[Response]]
Connection = MutableMapping[str, Any]


def requires(scope: Scope) -> Any:
    """A dependency for a FastAPI route: `dependencies=[requires("data:write")]`."""
    return Depends(_Need(scope, by_link=False))


def requires_or_signed(scope: Scope) -> Any:
    """The same for a page that a browser opens: a signed link stands in for the key, to read."""
    return Depends(_Need(scope, by_link=True))


def signed_link(request: Request, path: str) -> str:
    """`path` as a link that opens in a browser; as it is where there are no keys."""
    gate: Gate = request.app.state.gate
    return gate.signed_link(path)


def key_name(connection: Mapping[str, Any]) -> str:
    """Who asked, for a history: the name of their key, or `local` where there are no keys."""
    name: str = connection.get("state", {}).get("key", LOCAL)
    return name


class _Need:
    """What a route declares; whoever guards the routes reads it."""

    def __init__(self, scope: Scope, *, by_link: bool) -> None:
        self.scope = scope
        self.by_link = by_link

    async def __call__(self) -> None:
        """Nothing: the gate was passed before the body was read."""


class Gate:
    """Lets a request pass that has a key with the scope.

    Args:
        keys: the ring in use.
        links: signs and checks links.
        open_without_keys: whether everybody may do everything while there are no keys.
    """

    def __init__(self, keys: KeyWatch, links: LinkSigner, *, open_without_keys: bool) -> None:
        self._keys = keys
        self._links = links
        self._open_without_keys = open_without_keys
        self._attempts = FailedAttempts()

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._open_without_keys and not self._keys.ring.exists

    def admit(self, connection: Connection, scope: Scope) -> None:
        """Return if the request may pass, its key's name in its state.

        A hash and a look into a dictionary, for a key that was seen before.

        Raises:
            KeyRefused: no key, or one that opens nothing.
            TooManyBadKeys: the address has sent ten bad ones within a minute.
            ScopeMissing: the key may do other things.
        """
        if self.is_open:
            return
        token = _bearer(connection["headers"])
        if token is None:
            raise KeyRefused
        grant = self._keys.ring.remembered(token, time.time()) or self._find(connection, token)
        connection.setdefault("state", {})["key"] = grant.name
        if scope not in grant.scopes:
            raise ScopeMissing(
                f"the key {grant.name!r} lacks the scope {scope!r}; `pytorchlib keys create` makes "
                "one that has it"
            )

    def admit_link(self, connection: Connection, scope: Scope) -> None:
        """As `admit`, but a signed link to this path does as well, to read."""
        reads = connection["method"] in ("GET", "HEAD")
        if reads and self._links.holds(connection["path"], connection["query_string"]):
            connection.setdefault("state", {})["key"] = LINK
        else:
            self.admit(connection, scope)

    def signed_link(self, path: str) -> str:
        """`path`, signed where keys are asked for."""
        return path if self.is_open else self._links.sign(path)

    def guarded(self, scope: Scope, endpoint: Endpoint | ASGIApp) -> "Guarded":
        """An endpoint, or an ASGI application, behind this gate: the endpoint of a plain route."""
        takes_request = inspect.isfunction(endpoint) or inspect.ismethod(endpoint)
        app: Any = request_response(endpoint) if takes_request else endpoint  # type: ignore[arg-type]
        return Guarded(self, scope, app)

    def guard(self, routes: Iterable[BaseRoute]) -> None:
        """Put every route of FastAPI behind this gate, by the scope that it declares.

        Raises:
            Unguarded: a route says no scope, and is not one of the public ones.
        """
        for path, route in every_route(routes):
            if not scopes_of(route) and path not in PUBLIC:
                raise Unguarded(
                    f"the route {path} says no scope: give it dependencies=[requires(...)]"
                )
            for need in _needs_of(route):
                admit = self.admit_link if need.by_link else self.admit
                handle: Any = Guarded(self, need.scope, route.handle, admit)
                route.handle = handle  # type: ignore[method-assign]

    def _find(self, connection: Connection, token: bytes) -> Grant:
        """A key that is seen for the first time.

        Keys that were made here cannot be guessed, so an address that is told to wait may still
        use one: behind a proxy all clients have one address, and a bad one must not shut out the
        others. What may be guessed, a key from outside, has to wait.
        """
        address, now = (connection.get("client") or ("",))[0], time.monotonic()
        wait_s = self._attempts.wait_s(address, now)
        grant = None
        if not wait_s or MADE_HERE.fullmatch(token):
            grant = self._keys.ring.find(token, time.time())
        if grant is not None:
            return grant
        if wait_s:
            raise TooManyBadKeys(
                "too many bad keys came from this address; wait a minute, then send a good one",
                retry_after_s=wait_s,
            )
        self._attempts.count(address, now)
        raise KeyRefused


class Unguarded(Exception):
    """A route would answer anybody, and nobody has said that it should."""


class Guarded:
    """An ASGI application behind the gate."""

    __slots__ = ("_admit", "_app", "scope")

    def __init__(
        self,
        gate: Gate,
        scope: Scope,
        app: ASGIApp,
        admit: Callable[[Connection, Scope], None] | None = None,
    ) -> None:
        self.scope: Scope = scope
        self._admit = admit or gate.admit
        self._app = app

    def __call__(self, scope: Any, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on; not a coroutine of its own, which would cost more than it does."""
        self._admit(scope, self.scope)
        return self._app(scope, receive, send)

    def admit(self, connection: Connection) -> None:
        """Return if the request may pass; raises as `Gate.admit`."""
        self._admit(connection, self.scope)


def every_route(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[str, BaseRoute]]:
    """Every route with its whole path, also those of routers that were included."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is None:
            yield prefix + getattr(route, "path", repr(route)), route
        else:
            context: Any = getattr(route, "include_context", None)
            yield from every_route(inner.routes, prefix + context.prefix)


def scopes_of(route: BaseRoute) -> tuple[Scope, ...]:
    """The scopes that a route asks for, all of them; none where it says none."""
    endpoint = getattr(route, "endpoint", None)
    if isinstance(endpoint, Guarded):
        return (endpoint.scope,)
    return tuple(need.scope for need in _needs_of(route))


def _needs_of(route: BaseRoute) -> list[_Need]:
    """What it says itself, and what its router says for all of its routes."""
    wanted = [one.dependency for one in getattr(route, "dependencies", ())]
    return [one for one in wanted if isinstance(one, _Need)]


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """What stands behind `Bearer` in the first Authorization header."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            token = token.strip()
            return token if token and scheme.lower() == b"bearer" else None
    return None
