"""Who may ask, and how much: the outermost ASGI layer, before the framework.

A web page of another origin cannot change anything, and a foreign Host is refused, also on loopback
without keys: DNS rebinding makes an attacker's name point at 127.0.0.1, but cannot make the browser
send another Host. Bodies are bounded, and every answer gets its safe headers and request id.
"""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.answer import Answer, CountedBody, SafeHeaders, body_too_large, safe_headers
from app.http.refusal import HttpRefusal

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
PROBES: Final = frozenset({"/livez", "/readyz"})
OTHER_SITES: Final = frozenset({b"cross-site", b"same-site"})
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PORT: Final = re.compile(r":[0-9]*$")
MAX_KNOWN_HOSTS: Final = 256

Fields = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """Hosts besides loopback's, origins besides our own, limits of bodies, headers by path.

    A host is a name, `*.` and a domain, or `*`. Of the path prefixes the longest decides,
    and before them the endings.
    """

    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 64 * 1024 * 1024
    max_body_bytes_by_prefix: Mapping[str, int] = field(default_factory=dict)
    max_body_bytes_by_ending: Mapping[str, int] = field(default_factory=dict)
    headers_by_prefix: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class OriginGuard:
    """ASGI middleware; put it around the whole application."""

    def __init__(self, app: ASGIApp, policy: OriginPolicy | None = None) -> None:
        self._app = app
        self._hosts = HostList((policy or OriginPolicy()).allowed_hosts)
        self._policy = policy = policy or OriginPolicy()
        self._origins = frozenset(origin.encode().lower() for origin in policy.allowed_origins)
        self._body_endings = longest_first(policy.max_body_bytes_by_ending)
        self._body_prefixes = longest_first(policy.max_body_bytes_by_prefix)
        self._header_prefixes = longest_first(policy.headers_by_prefix)
        self._headers = {"": safe_headers({})} | {
            prefix: safe_headers(headers) for prefix, headers in policy.headers_by_prefix.items()
        }
        self._request_ids = itertools.count(1)
        self._process_id = os.urandom(4).hex().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request; let any other through, with `request_id` in its state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fields: Fields = dict(scope["headers"])
        answer = self.answer(scope, fields, send)
        try:
            self.check(scope, fields)
            await self._app(scope, self.bounded(receive, scope, fields, answer), answer.send)
        except HttpRefusal as refusal:
            await answer.refuse(refusal, scope["path"])
        except ClientDisconnect:
            return  # there is nobody to answer

    def answer(self, scope: Scope, fields: Fields, send: Send) -> Answer:
        """Return the answer that `scope` will get; its `request_id` is in the state from now on."""
        request_id = self.request_id(fields.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        return Answer(send, self.headers_of(scope["path"]), request_id)

    def check(self, scope: Scope, fields: Fields) -> None:
        """Raise HttpRefusal for a request that may not come in."""
        host = fields.get(b"host", b"")
        if host not in self._hosts.known and scope["path"] not in PROBES:
            self._hosts.check(host, scope)
        if scope["method"] not in SAFE_METHODS:
            self._check_origin(fields)

    def bounded(self, receive: Receive, scope: Scope, fields: Fields, answer: Answer) -> Receive:
        """Return a `receive` whose body keeps to the limit; raises HttpRefusal where it cannot."""
        length = fields.get(b"content-length")
        if length is not None:
            # The protocol holds the sender to the length it names.
            limit = self.max_body_bytes(scope["path"])
            if not length.strip().isdigit() or int(length) > limit:
                raise body_too_large(limit)
            return receive
        if scope["method"] in SAFE_METHODS and b"transfer-encoding" not in fields:
            return receive
        limit = self.max_body_bytes(scope["path"])
        return CountedBody(receive, answer, limit, scope["path"]).receive

    def _check_origin(self, fields: Fields) -> None:
        """Refuse what a web page of another origin makes a browser send."""
        origin = fields.get(b"origin")
        if origin is not None and origin.lower() in self._origins:
            return
        if fields.get(b"sec-fetch-site", b"").lower() in OTHER_SITES or (
            origin is not None
            and origin.lower().partition(b"://")[2] != fields.get(b"host", b"").lower()
        ):
            raise HttpRefusal(
                403,
                "foreign_origin",
                "A web page of another origin may not change anything here; "
                "PYTORCHLIB_ALLOWED_ORIGINS names the origins that may.",
            )

    def request_id(self, given: bytes | None) -> bytes:
        """The client's own, if it is short and harmless in a log and a header; else a new one."""
        if given is not None and REQUEST_ID.fullmatch(given):
            return given
        return b"%s-%x" % (self._process_id, next(self._request_ids))

    def headers_of(self, path: str) -> SafeHeaders:
        """The headers that every answer at `path` gets."""
        if path.startswith(self._header_prefixes):
            return self._headers[longest_prefix(path, self._header_prefixes)]
        return self._headers[""]

    def max_body_bytes(self, path: str) -> int:
        """The largest body that may be sent to `path`."""
        if path.endswith(self._body_endings):
            ending = next(one for one in self._body_endings if path.endswith(one))
            return self._policy.max_body_bytes_by_ending[ending]
        if path.startswith(self._body_prefixes):
            prefix = longest_prefix(path, self._body_prefixes)
            return self._policy.max_body_bytes_by_prefix[prefix]
        return self._policy.max_body_bytes


class HostList:
    """The names that this server answers to: loopback's, its own address, and the allowed ones."""

    def __init__(self, allowed_hosts: tuple[str, ...]) -> None:
        names = [host.lower() for host in allowed_hosts]
        self._any = "*" in names
        self._names = frozenset({"localhost", *names})
        self._domains = tuple(name[1:] for name in names if name.startswith("*."))
        self.known: set[bytes] = set()

    def check(self, host: bytes, scope: Scope) -> None:
        """Raise HttpRefusal unless `host`, a Host header, is one of ours."""
        if not self._any and not self._is_ours(PORT.sub("", host.decode("latin-1").lower()), scope):
            raise HttpRefusal(
                400,
                "foreign_host",
                f"This server does not answer to the host {host.decode('latin-1')[:100]!r}; "
                "PYTORCHLIB_ALLOWED_HOSTS names the hosts that it answers to.",
            )
        if len(self.known) < MAX_KNOWN_HOSTS:
            self.known.add(host)

    def _is_ours(self, name: str, scope: Scope) -> bool:
        if name in self._names or name.endswith(self._domains):
            return True
        try:
            address = ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or str(address) == (scope.get("server") or ("",))[0]


def longest_first(prefixes: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(sorted(prefixes, key=len, reverse=True))


def longest_prefix(path: str, prefixes: tuple[str, ...]) -> str:
    """Return the first of `prefixes` that `path` starts with."""
    return next(prefix for prefix in prefixes if path.startswith(prefix))
