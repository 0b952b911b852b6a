"""Multipart bodies: parsed in memory where they are bounded before, or as they come.

Starlette's own form parser writes files over one mebibyte to disk through a thread pool, which
costs more than decoding the picture; file names are ignored either way.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from app.errors import BadRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS: Final = 1024
MAX_FIELD_BYTES: Final = 64 * 1024
MAX_BOUNDARY_BYTES: Final = 70
MAX_PART_HEADER_BYTES: Final = 4096
USUAL_TYPE: Final = re.compile(r"multipart/form-data; boundary=([0-9A-Za-z_-]{1,70})")
# A name, maybe a file name and a content type, in letters that need no second look.
USUAL_HEAD: Final = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([0-9A-Za-z_.-]{1,256})"'
    rb'(?:; filename="[ !#-\[\]-~]{0,1024}")?(?:\r\nContent-Type: [!-~]{1,256})?\r\n\r\n'
)


@dataclass(slots=True)
class Form:
    """Files in the order they came, and plain fields by name (the last one of a name)."""

    files: list[bytes] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: bytes, file_field: str) -> None:
        """One part; raises BadRequest for a plain field that is too large."""
        if name == file_field:
            self.files.append(content)
            return
        if len(content) > MAX_FIELD_BYTES:
            raise BadRequest(f"the field {name!r} has more than {MAX_FIELD_BYTES} bytes")
        self.fields[name] = content.decode("utf-8", "replace")


def parse_form(content_type: str, body: bytes, *, file_field: str, max_parts: int) -> Form:
    """The form in `body`.

    Args:
        content_type: the request's header, with its boundary.
        body: all of it.
        file_field: the field whose parts are files; any other is a plain text field.
        max_parts: most parts of either kind.

    Raises:
        BadRequest: no boundary, malformed, too many parts, or a field too large.
    """
    form = _usual_form(content_type, body, file_field, min(max_parts, MAX_PARTS))
    if form is not None:
        return form
    reader = FormReader(content_type, file_field, min(max_parts, MAX_PARTS))
    reader.feed(body)
    reader.check_end()
    return reader.form


def _usual_form(content_type: str, body: bytes, file_field: str, max_parts: int) -> Form | None:
    """A whole body as clients write it; None for any other, which the parser reads or refuses.

    To look for the delimiter takes a tenth of the time of a parser that takes any piece.

    Raises:
        BadRequest: a plain field that is too large.
    """
    named = USUAL_TYPE.fullmatch(content_type)
    if named is None:
        return None
    delimiter = b"\r\n--" + named[1].encode()
    if not body.startswith(delimiter[2:]):
        return None
    parts: list[tuple[bytes, int, int]] = []
    start = len(delimiter) - 2
    while (end := body.find(delimiter, start)) >= 0:
        head = USUAL_HEAD.match(body, start, end)
        if head is None or len(parts) == max_parts:
            return None
        parts.append((head[1], head.end(), end))
        start = end + len(delimiter)
    if body[start : start + 5] not in (b"--\r\n", b"--"):
        return None
    form = Form()
    for name, begin, end in parts:
        form.add(name.decode(), body[begin:end], file_field)
    return form


class FormReader:
    """Reads one form; slices of what it is fed, joined only where that splits a part.

    Args:
        content_type, file_field, max_parts: as `parse_form` takes them.

    Raises:
        BadRequest: the content type names no boundary.
    """

    def __init__(self, content_type: str, file_field: str, max_parts: int) -> None:
        _, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary", b"")
        if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
            raise BadRequest("the multipart body names no boundary, or one of over 70 bytes")
        self.form = Form()
        self._parser = MultipartParser(boundary, self._callbacks())
        self._ended = False
        self._file_field = file_field
        self._max_parts = max_parts
        self._num_parts = 0
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._name = bytearray()
        self._value = bytearray()

    def feed(self, piece: bytes) -> None:
        """One piece of the body, or all of it.

        Raises:
            BadRequest: it is malformed, or breaks a limit.
        """
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise BadRequest(f"the multipart body is malformed: {error}") from None

    def check_end(self) -> None:
        """Refuse a form that is cut short."""
        if not self._ended:
            raise BadRequest("the multipart body ends before its closing boundary")

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_parts:
            raise BadRequest(f"the form has more than {self._max_parts} parts")
        self._pieces, self._headers = [], {}

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _part_end(self) -> None:
        self.form.add(self._field_name(), b"".join(self._pieces), self._file_field)

    def _field_name(self) -> str:
        disposition = self._headers.get(b"content-disposition", b"")
        kind, parameters = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in parameters:
            raise BadRequest("a part of the form has no name; send each file as the field `file`")
        return parameters[b"name"].decode("utf-8", "replace")[:256]

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._name, data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._value, data[start:end])

    def _grow(self, buffer: bytearray, piece: bytes) -> None:
        if len(buffer) + len(piece) > MAX_PART_HEADER_BYTES:
            raise BadRequest("a part of the form has a header of over 4096 bytes")
        buffer += piece

    def _header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        self._ended = True
