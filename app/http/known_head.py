"""A head that was good: another one that differs in what every request has anew is as good.

That is the length of its body, and the boundary of its form, which clients draw each time.
"""

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

MAX_HEAD_BYTES: Final = 2048
MAX_DIGITS: Final = 10
MAX_BOUNDARY_BYTES: Final = 70
LENGTH: Final = re.compile(
    rb"\r\ncontent-length:[ \t]*([0-9]{1,%d})[ \t]*\r" % MAX_DIGITS, re.IGNORECASE
)
CONTENT_TYPE: Final = re.compile(rb"\r\ncontent-type:", re.IGNORECASE)
LETTERS: Final = re.compile(rb"[0-9A-Za-z_-]{1,%d}" % MAX_BOUNDARY_BYTES)
BOUNDARY: Final = re.compile(
    rb"\r\ncontent-type: multipart/form-data; boundary=(%b)\r" % LETTERS.pattern, re.IGNORECASE
)

Fields = list[tuple[bytes, bytes]]


class Repeated(NamedTuple):
    """What a known head says anew.

    Attributes:
        head_bytes, request_bytes: how long the head is, and the whole request; zeros for a head
            that is not known.
        boundary: of its form; None where it brings none.
    """

    head_bytes: int
    request_bytes: int
    boundary: bytes | None


OTHER: Final = Repeated(0, 0, None)


class KnownHead:
    """The head of a request; long ones are not known. Those are equal that may repeat each other.

    Args:
        head: as `HeadGrammar` let it pass, not chunked; empty where none is known.
    """

    __slots__ = ("_before", "_hash", "_rest")

    def __init__(self, head: bytes = b"") -> None:
        self._before = b""
        # What differs, and what follows it until the next that does: longest, is it the length.
        self._rest: tuple[tuple[int, bool, bytes], ...] = ()
        self._hash = 0
        if len(head) > MAX_HEAD_BYTES:
            return
        boundary = BOUNDARY.search(head) if len(CONTENT_TYPE.findall(head)) == 1 else None
        found = sorted(
            (*one.span(1), one is not boundary)
            for one in (LENGTH.search(head), boundary)
            if one is not None
        )
        starts = [start for start, _, _ in found] + [len(head)]
        self._before = head[: starts[0]]
        self._rest = tuple(
            (MAX_DIGITS if is_length else MAX_BOUNDARY_BYTES, is_length, head[end:until])
            for (_, end, is_length), until in zip(found, starts[1:], strict=True)
        )
        self._hash = hash((self._before, self._rest))

    def __bool__(self) -> bool:
        return bool(self._before)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KnownHead)
            and self._hash == other._hash
            and self._before == other._before
            and self._rest == other._rest
        )

    def matches(self, data: bytes) -> Repeated:
        """What the head that `data` begins with says anew."""
        before = self._before
        if not before or not data.startswith(before):
            return OTHER
        at, length, boundary = len(before), 0, None
        for longest, is_length, after in self._rest:
            end = data.find(b"\r", at, at + longest + 1)
            if end < 0 or not data.startswith(after, end):
                return OTHER
            said = data[at:end]
            if is_length:
                if not said.isdigit():
                    return OTHER
                length = int(said)
            elif LETTERS.fullmatch(said):
                boundary = said
            else:
                return OTHER
            at = end + len(after)
        return Repeated(at, at + length, boundary)


def with_length(fields: Iterable[tuple[bytes, bytes]], num_bytes: int) -> Fields:
    """The fields of a head for another body, where they say its length at all."""
    length = b"%d" % num_bytes
    return [(name, length if name == b"content-length" else said) for name, said in fields]


def with_boundary(fields: Iterable[tuple[bytes, bytes]], boundary: bytes) -> Fields:
    """The fields of a head that brings a form, for another form."""
    return [
        (name, said[: said.rindex(b"=") + 1] + boundary if name == b"content-type" else said)
        for name, said in fields
    ]
