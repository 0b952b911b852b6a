"""Large bodies on their way to disk: a form with one file, or the file itself, never in memory."""

import asyncio
import errno
import hashlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from app.api.multipart import MAX_FIELD_BYTES, FormReader
from app.errors import BadInput, BadRequest, BodyTooLarge, DiskFull

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

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


class Sink:
    """A new file that grows up to a bound; its methods belong in a thread.

    Args:
        digest: is told of every byte.
    """

    def __init__(self, path: Path, max_bytes: int, digest: "hashlib._Hash | None" = None) -> None:
        self.num_bytes = 0
        self._file: BinaryIO = path.open("xb")
        self._name, self._max_bytes, self._digest = path.name, max_bytes, digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        """One piece more.

        Raises:
            BodyTooLarge: beyond the bound. DiskFull: the disk takes no more.
        """
        self.num_bytes += len(piece)
        if self.num_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"{self._name} has more than the limit of {self._max_bytes} bytes that it may have"
            )
        try:
            self._file.write(piece)
        except OSError as error:
            raise disk_full(error) from error
        if self._digest is not None:
            self._digest.update(piece)


def disk_full(error: OSError) -> Exception:
    """What a failed write is told as."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("the disk of this service is full; delete datasets or versions")
    return error


async def pour(stream: AsyncIterator[bytes], write: Callable[[bytes], None]) -> None:
    """Everything to `write`, on threads, in pieces that are large enough for that."""
    piece = bytearray()
    async for chunk in stream:
        piece += chunk
        if len(piece) >= WRITE_BYTES:
            await asyncio.to_thread(write, bytes(piece))
            piece.clear()
    if piece:
        await asyncio.to_thread(write, bytes(piece))


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
    upload = Upload(path, content_type.partition(";")[0].strip().lower())
    digest = hashlib.sha256()
    with Sink(path, max_bytes, digest) as sink:
        if upload.media_type == "multipart/form-data":
            form = _FileForm(content_type, sink)
            await pour(request.stream(), form.feed)
            form.check_end()
            form.describe(upload)
        else:
            await pour(request.stream(), sink.write)
    upload.num_bytes, upload.sha256 = sink.num_bytes, digest.hexdigest()
    if not upload.num_bytes:
        raise BadInput("the file is empty")
    return upload


def _check_room(request: Request, path: Path) -> None:
    announced = request.headers.get("content-length", "0")
    wanted = int(announced) if announced.isdigit() and len(announced) < 18 else 0
    if shutil.disk_usage(path.parent).free < 2 * wanted + SPARE_BYTES:
        raise DiskFull(f"there is no room on disk for {wanted} bytes; delete datasets or versions")


class _FileForm(FormReader):
    """A form with one file part, whose bytes are written as they come."""

    def __init__(self, content_type: str, sink: Sink) -> None:
        super().__init__(content_type, "file", MAX_PARTS)
        self._sink = sink
        self._is_file = False
        self._num_files = self._field_bytes = 0
        self._file_name = self._media_type = ""

    def check_end(self) -> None:
        """Refuse a form that is cut short, or holds another number of files than one."""
        super().check_end()
        if self._num_files != 1:
            raise BadInput(
                f"the form holds {self._num_files} files; send one as the field `file`",
                param="file",
            )

    def describe(self, upload: Upload) -> None:
        """Say what the form says of its file."""
        upload.fields = self.form.fields
        upload.file_name, upload.media_type = self._file_name, self._media_type

    def _callbacks(self) -> "MultipartCallbacks":
        return {**super()._callbacks(), "on_headers_finished": self._part_named}

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
            self._sink.write(data[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > MAX_FIELD_BYTES:
            raise BadRequest(f"a field of the form has more than {MAX_FIELD_BYTES} bytes")
        super()._part_data(data, start, end)

    def _part_end(self) -> None:
        if not self._is_file:
            super()._part_end()
