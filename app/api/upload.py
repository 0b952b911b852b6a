"""Large bodies on their way to disk: a form with one file, or the file itself, never in memory."""

import asyncio
import errno
import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from app.api.multipart import MAX_BOUNDARY_BYTES, MAX_FIELD_BYTES, FormReader
from app.errors import BadInput, BadRequest, BodyTooLarge, DiskFull

WRITE_BYTES: Final = 1 << 20
SPARE_BYTES: Final = 64 << 20
MAX_PARTS: Final = 16


@dataclass(slots=True)
class Upload:
    """A file that has arrived.

    Attributes:
        path: where it lies.
        media_type: of the file: of the body, or what its part of the form says.
        file_name: what the sender calls it; a text to show, never a path to open.
        fields: of the form.
        sha256: hex.
    """

    path: Path
    media_type: str
    file_name: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    num_bytes: int = 0


async def receive_file(request: Request, path: Path, max_bytes: int) -> Upload:
    """Write the file in the body of `request` to `path`.

    Args:
        path: a new file.
        max_bytes: of the file.

    Raises:
        BodyTooLarge: it is larger. DiskFull: there is no room for it.
        BadRequest, BadInput: the form is malformed, or holds no file, or several.
        starlette.requests.ClientDisconnect: the sender left.
    """
    _check_room(request, path)
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    upload = Upload(path, media_type)
    sink = _FormSink(content_type) if media_type == "multipart/form-data" else _PlainSink()
    digest = hashlib.sha256()
    try:
        with path.open("xb") as file:
            async for chunk in request.stream():
                sink.feed(chunk)
                if len(sink.buffer) >= WRITE_BYTES:
                    await _flush(sink, file, digest, upload, max_bytes)
            sink.end()
            await _flush(sink, file, digest, upload, max_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "the disk of this service is full; delete datasets or versions"
            ) from None
        raise
    upload.sha256 = digest.hexdigest()
    sink.describe(upload)
    if not upload.num_bytes:
        raise BadInput("the file is empty")
    return upload


def _check_room(request: Request, path: Path) -> None:
    announced = request.headers.get("content-length", "0")
    wanted = int(announced) if announced.isdigit() and len(announced) < 18 else 0
    if shutil.disk_usage(path.parent).free < 2 * wanted + SPARE_BYTES:
        raise DiskFull(f"there is no room on disk for {wanted} bytes; delete datasets or versions")


async def _flush(
    sink: "_PlainSink | _FormSink", file: IO[bytes], digest: object, upload: Upload, max_bytes: int
) -> None:
    data = bytes(sink.buffer)
    sink.buffer.clear()
    upload.num_bytes += len(data)
    if upload.num_bytes > max_bytes:
        raise BodyTooLarge(f"the file is larger than the limit of {max_bytes} bytes")

    def write() -> None:
        file.write(data)
        digest.update(data)  # type: ignore[attr-defined]

    await asyncio.to_thread(write)


class _PlainSink:
    """The body is the file."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, chunk: bytes) -> None:
        self.buffer += chunk

    def end(self) -> None:
        """Nothing is left open."""

    def describe(self, upload: Upload) -> None:
        """The body says no more of itself."""


class _FormSink(FormReader):
    """A form with one file part, whose bytes are handed on as they come."""

    def __init__(self, content_type: str) -> None:
        super().__init__("file", MAX_PARTS)
        self.buffer = bytearray()
        self._is_file = False
        self._num_files = self._field_bytes = 0
        self._file_name = self._media_type = ""
        _, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary", b"")
        if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
            raise BadRequest("the multipart body names no boundary, or one of over 70 bytes")
        callbacks = {**self.callbacks(), "on_headers_finished": self._part_named}
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise BadRequest(f"the multipart body is malformed: {error}") from None

    def end(self) -> None:
        if not self.ended:
            raise BadRequest("the multipart body ends before its closing boundary")
        if self._num_files != 1:
            raise BadInput(
                f"the form holds {self._num_files} files; send one as the field `file`",
                param="file",
            )

    def describe(self, upload: Upload) -> None:
        upload.fields = self.form.fields
        upload.file_name, upload.media_type = self._file_name, self._media_type

    def _part_named(self) -> None:
        self._is_file = self._field_name() == "file"
        self._field_bytes = 0
        if self._is_file:
            self._num_files += 1
            _, parameters = parse_options_header(self._headers.get(b"content-disposition", b""))
            self._file_name = parameters.get(b"filename", b"").decode("utf-8", "replace")[:255]
            media_type = self._headers.get(b"content-type", b"").decode("latin-1")
            self._media_type = media_type.partition(";")[0].strip().lower()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.buffer += data[start:end]
            return
        self._field_bytes += end - start
        if self._field_bytes > MAX_FIELD_BYTES:
            raise BadRequest(f"a field of the form has more than {MAX_FIELD_BYTES} bytes")
        super()._part_data(data, start, end)

    def _part_end(self) -> None:
        if not self._is_file:
            super()._part_end()
