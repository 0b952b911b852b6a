"""Follows the framing of a chunked body, so that it is known where the next request starts.

Extensions and trailers are checked and left out: nobody here reads them, llhttp would add trailers
to the headers of a request that is already under way, and the parsers differ on both.
"""

import re
from typing import Final

from app.http.head import FIELD, malformed
from app.http.refusal import HttpRefusal

MAX_LINE_BYTES: Final = 512
SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,12})([ \t]*;[\t -~\x80-\xff]*)?\r\n")
# Chunks of 1 to 15 bytes: a body of a million of them is passed at the speed of the matcher.
TINY_CHUNKS: Final = re.compile(
    b"(?:%s)++" % b"|".join(b"%x\\r\\n.{%d}\\r\\n" % (size, size) for size in range(1, 16)),
    re.DOTALL,
)
TRAILER: Final = re.compile(FIELD)


class ChunkedBody:
    """The body of one request; trailers take at most `max_trailer_bytes` and `max_fields`."""

    def __init__(self, max_trailer_bytes: int, max_fields: int) -> None:
        self._trailer_bytes_left = max_trailer_bytes
        self._fields_left = max_fields
        self._held = b""
        self._left = 0
        self._in_trailer = False

    def follow(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Return what the parser may read of `data`, and what lies behind the body.

        The second is None while the body goes on. Raises HttpRefusal.
        """
        data = self._held + data
        self._held = b""
        passed: list[bytes] = []
        position = 0 if self._in_trailer else self._chunks(data, passed)
        rest = self._trailer(data, position, passed) if self._in_trailer else None
        return b"".join(passed), rest

    def _chunks(self, data: bytes, passed: list[bytes]) -> int:
        """Pass on whole and partial chunks; return where the trailer starts, or the end."""
        start = 0
        position = self._left
        while position < len(data):
            tiny = TINY_CHUNKS.match(data, position)
            if tiny is not None:
                position = tiny.end()
                continue
            line = SIZE_LINE.match(data, position)
            if line is None:
                self._hold(data, position)
                break
            if line[2] is not None:
                start = self._leave_out(line, data, start, passed)
            size = int(line[1], 16)
            if size == 0:
                self._in_trailer = True
                passed.append(data[start : line.end()])
                return line.end()
            position = line.end() + size + 2
        passed.append(data[start : min(position, len(data))])
        self._left = max(0, position - len(data))
        return len(data)

    def _leave_out(
        self, line: re.Match[bytes], data: bytes, start: int, passed: list[bytes]
    ) -> int:
        """Pass `data` on up to the extension of `line`; return where to go on behind it."""
        if line.end() - line.start() > MAX_LINE_BYTES:
            raise malformed("The extension of a chunk is too long")
        passed.append(data[start : line.end(1)])
        return line.end() - 2

    def _hold(self, data: bytes, position: int) -> None:
        """Keep the start of a line until its end arrives; refuse what cannot become one."""
        held = data[position:]
        if b"\n" in held or len(held) > MAX_LINE_BYTES:
            raise malformed("A chunk of the body does not start with a line that gives its size")
        self._held = held

    def _trailer(self, data: bytes, position: int, passed: list[bytes]) -> bytes | None:
        """Skip trailer fields; return what lies behind the empty line, or None before it."""
        while not data.startswith(b"\r\n", position):
            field = TRAILER.match(data, position)
            if field is None:
                self._hold_trailer(data[position:])
                return None
            self._spend(field.end() - position)
            position = field.end()
        passed.append(b"\r\n")
        return data[position + 2 :]

    def _hold_trailer(self, held: bytes) -> None:
        if b"\n" in held:
            raise malformed("A trailer behind the body is not of the form 'name: value'")
        if len(held) > self._trailer_bytes_left:
            raise trailer_too_large()
        self._held = held

    def _spend(self, num_bytes: int) -> None:
        self._trailer_bytes_left -= num_bytes
        self._fields_left -= 1
        if self._trailer_bytes_left < 0 or self._fields_left < 0:
            raise trailer_too_large()


def trailer_too_large() -> HttpRefusal:
    return HttpRefusal(431, "header_too_large", "The trailer behind the body is too large.")
