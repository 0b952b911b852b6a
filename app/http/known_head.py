"""A head that was good: another one that differs in the length of its body alone is as good."""

import re
from typing import Final

MAX_HEAD_BYTES: Final = 2048
MAX_DIGITS: Final = 10
LENGTH: Final = re.compile(
    rb"\r\ncontent-length:[ \t]*([0-9]{1,%d})[ \t]*\r" % MAX_DIGITS, re.IGNORECASE
)


class KnownHead:
    """The head of the last request on a connection; long ones are not known.

    Args:
        head: as `HeadGrammar` let it pass, not chunked; empty where none is known.
    """

    __slots__ = ("_after", "_before", "has_length")

    def __init__(self, head: bytes = b"") -> None:
        found = LENGTH.search(head)
        self.has_length = found is not None
        start, end = (len(head), len(head)) if found is None else found.span(1)
        known = len(head) <= MAX_HEAD_BYTES
        self._before, self._after = (head[:start], head[end:]) if known else (b"", b"")

    def __bool__(self) -> bool:
        return bool(self._before)

    def matches(self, data: bytes) -> tuple[int, int]:
        """How long the head that `data` begins with is, and the request; zeros for another head."""
        before, after = self._before, self._after
        if not before or not data.startswith(before):
            return 0, 0
        start = end = len(before)
        length = 0
        if self.has_length:
            end = data.find(b"\r", start, start + MAX_DIGITS + 1)
            digits = data[start:end]
            if end < 0 or not digits.isdigit() or not data.startswith(after, end):
                return 0, 0
            length = int(digits)
        return end + len(after), end + len(after) + length
