"""The one form of request head that is let through to a parser.

llhttp and h11 each accept some heads that the other refuses, and both accept some that a proxy in
front may read differently. What passes here, both read alike (RFC 9112, sections 2 to 6).
"""

import re
from typing import Final

from app.http.refusal import HttpRefusal

CHUNKED: Final = -1

METHODS: Final = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE")
REQUEST_LINE: Final = rb"(?:" + b"|".join(METHODS) + rb') /[!-"$-~]* HTTP/1\.[01]\r\n'
FIELD: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n"

FRAMING: Final = re.compile(
    rb"\r\n(host|content-length|transfer-encoding|upgrade):[ \t]*([^\r]*)", re.IGNORECASE
)
HOST: Final = re.compile(
    rb"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?[ \t]*"
)
LENGTH: Final = re.compile(rb"([0-9]{1,15})[ \t]*")
UPGRADE: Final = re.compile(rb"(?<=\r\n)upgrade:[^\r]*\r\n", re.IGNORECASE)

UNPRINTABLE: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
BROKEN_LINE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
FOLDED: Final = re.compile(rb"\r\n[ \t]")
TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class UpgradeAsked(Exception):
    """The head asks to change the protocol, which a server may ignore."""


def without_upgrade(data: bytes, end: int) -> bytes:
    """Return `data` with the Upgrade fields of its head (the first `end` bytes) left out."""
    return UPGRADE.sub(b"", data[:end]) + data[end:]


def check_unfinished(data: bytes, seen_bytes: int = 0) -> None:
    """Refuse a head that can no longer become good, without waiting for its end.

    `seen_bytes` at the front were checked before. Raises HttpRefusal.
    """
    start = max(0, seen_bytes - 1)
    if UNPRINTABLE.search(data, start):
        raise malformed("The request holds a control character, or is not HTTP")
    if BROKEN_LINE.search(data, start):
        raise malformed("A line of the request ends in a bare line feed or carriage return")


def malformed(sentence: str) -> HttpRefusal:
    return HttpRefusal(400, "malformed_request", sentence + ".")


class HeadGrammar:
    """Checks whole heads of at most `max_bytes` and `max_fields`."""

    def __init__(self, max_bytes: int, max_fields: int) -> None:
        self._max_bytes = max_bytes
        self._max_fields = max_fields
        self._whole = re.compile(REQUEST_LINE + b"(?:%s){0,%d}\r\n" % (FIELD, max_fields))

    def body_bytes(self, data: bytes, end: int) -> int:
        """Return how long the body is that follows the head `data[:end]`, or CHUNKED.

        `end` lies just behind the empty line. Raises HttpRefusal, or UpgradeAsked.
        """
        if end > self._max_bytes or self._whole.fullmatch(data, 0, end) is None:
            raise self._fault(data[:end])
        host = length = coding = None
        for name, value in FRAMING.findall(data, 0, end):
            kind = name.lower()
            if kind == b"host" and host is None:
                host = value
            elif kind == b"content-length" and length is None:
                length = value
            elif kind == b"transfer-encoding" and coding is None:
                coding = value
            else:
                raise repeated(kind)
        if host is None or HOST.fullmatch(host) is None:
            raise malformed("The request needs exactly one Host header that names a host")
        if coding is not None:
            return chunked(coding, length, data)
        return 0 if length is None else declared(length)

    def too_large(self) -> HttpRefusal:
        limit = f"{self._max_bytes} bytes and {self._max_fields} fields"
        return HttpRefusal(431, "header_too_large", f"The header is limited to {limit}.")

    def _fault(self, head: bytes) -> HttpRefusal:
        """Return the refusal for a head that is not of the form."""
        if len(head) > self._max_bytes or head.count(b"\r\n") > self._max_fields + 2:
            return self.too_large()
        try:
            check_unfinished(head)
            check_request_line(head.partition(b"\r\n")[0])
        except HttpRefusal as refusal:
            return refusal
        if FOLDED.search(head):
            return malformed("A header is folded over two lines")
        return malformed("A header line is not of the form 'name: value'")


def repeated(kind: bytes) -> Exception:
    """Return what to raise for a field that came twice, or for Upgrade."""
    if kind == b"upgrade":
        return UpgradeAsked()
    return malformed(f"The request has more than one {kind.decode().title()} header")


def declared(length: bytes) -> int:
    """Return the value of a Content-Length; raises HttpRefusal if it is no plain number."""
    digits = LENGTH.fullmatch(length)
    if digits is None:
        raise malformed("Content-Length must be one plain number of bytes")
    return int(digits[1])


def chunked(coding: bytes, length: bytes | None, data: bytes) -> int:
    """Return CHUNKED if the body may be framed so; raises HttpRefusal."""
    if length is not None:
        raise malformed("Content-Length and Transfer-Encoding exclude each other")
    if coding.rstrip(b" \t").lower() != b"chunked":
        raise malformed("The only known Transfer-Encoding is chunked")
    if data.partition(b"\r\n")[0].endswith(b"0"):
        raise malformed("HTTP/1.0 has no Transfer-Encoding")
    return CHUNKED


def check_request_line(line: bytes) -> None:
    """Raise the HttpRefusal that fits a request line, if it is at fault."""
    parts = line.split(b" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        raise malformed("The first line is not of the form 'METHOD /path HTTP/1.1'")
    method, target, version = parts
    if not re.fullmatch(rb"HTTP/[0-9]\.[0-9]", version):
        raise malformed("The first line does not end in an HTTP version")
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise HttpRefusal(505, "http_version", "This server speaks HTTP/1.1 and HTTP/1.0.")
    if method not in METHODS:
        raise HttpRefusal(501, "unknown_method", "This server does not know the request method.")
    if not re.fullmatch(rb'/[!-"$-~]*', target):
        raise malformed("The request target must be a path that starts with '/', without '#'")
