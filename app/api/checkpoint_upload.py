"""A checkpoint on its way from a request to a folder of its own: streamed, bounded, then checked.

Either a zip of a checkpoint (as the body, or as the form field `file`), or a form with `manifest`,
`weights` and perhaps `golden`, `seen` and `sha256`. Nothing of it is in the store before it was
checked.
"""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from app.errors import BadInput, BadRequest, BodyTooLarge, DiskFull, MediaTypeRefused
from models.archive import Archive, ArchiveLimits
from models.checkpoint import GOLDEN, MANIFEST, MAX_MANIFEST_BYTES
from models.intake import Intake
from models.intake_error import FilesUnexpected
from models.manifest import WEIGHTS
from models.seen import SEEN

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

ZIP: Final = "upload.zip"
PIECE_BYTES: Final = 1 << 20
MAX_PARTS: Final = 8
MAX_HEADER_BYTES: Final = 4096
MAX_TEXT_BYTES: Final = 1024
MAX_FILES: Final = 64
ZIP_TYPES: Final = ("application/zip", "application/x-zip-compressed", "application/octet-stream")
FILES: Final = {"file": ZIP, "weights": WEIGHTS, "golden": GOLDEN, "seen": SEEN}
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Upload:
    """What one request brings, written into `folder`; its methods belong in a thread.

    Args:
        folder: empty, and nobody else's.
        max_bytes: of all of it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.intake: Intake | None = None
        self.sha256: str | None = None
        self._max_bytes = max_bytes

    def limit_of(self, name: str) -> int:
        """The most bytes that the file `name` may have, as far as is known now."""
        if name == GOLDEN:
            return min(self._max_bytes, Intake.max_golden_bytes())
        if name == SEEN:
            return min(self._max_bytes, Intake.max_seen_bytes())
        if name == WEIGHTS and self.intake is not None:
            return min(self._max_bytes, self.intake.max_weights_bytes)
        return self._max_bytes

    def take_manifest(self, text: bytes) -> None:
        """From now on it is known how large the weights may be."""
        self.intake = Intake(text)

    def unpack(self) -> None:
        """Take the zip file apart; every name in it must be one that a checkpoint has.

        Raises:
            models.archive.ArchiveError: the archive, or a member of it, breaks the rules.
            models.intake_error.IntakeRefused: of its manifest or its files.
        """
        path = self.folder / ZIP
        limits = ArchiveLimits(
            max_bytes=self._max_bytes,
            max_entries=MAX_FILES,
            max_member_bytes=self._max_bytes,
            max_total_bytes=self._max_bytes,
        )
        with Archive(path, limits) as archive:
            members = {member.name: member for member in archive.members}
            if MANIFEST not in members:
                raise FilesUnexpected(f"the archive has no {MANIFEST} at its top")
            if members[MANIFEST].num_bytes > MAX_MANIFEST_BYTES:
                raise BodyTooLarge(f"{MANIFEST} has more than {MAX_MANIFEST_BYTES} bytes")
            intake = self.intake = Intake(archive.read(members[MANIFEST]))
            known = {MANIFEST, WEIGHTS, GOLDEN, SEEN, *intake.manifest.files}
            extra = sorted(members.keys() - known)
            if extra:
                raise FilesUnexpected(f"the manifest does not list {ascii(extra[0][:80])}")
            for name in (WEIGHTS, GOLDEN, SEEN):
                if name in members:
                    sink = Sink(self.folder / name, self.limit_of(name))
                    with sink:
                        for piece in archive.chunks(members[name]):
                            sink.write(piece)
        path.unlink()


class Sink:
    """A file that grows up to a bound."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file: BinaryIO = path.open("xb")
        self._name = path.name
        self._left = self._max_bytes = max_bytes

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        """One piece more.

        Raises:
            BodyTooLarge: beyond the bound. DiskFull: the disk takes no more.
        """
        self._left -= len(piece)
        if self._left < 0:
            raise BodyTooLarge(
                f"{self._name} has more than the {self._max_bytes} bytes it may have"
            )
        try:
            self._file.write(piece)
        except OSError as error:
            raise disk_full(error) from error


def disk_full(error: OSError) -> Exception:
    """What a failed write is told as."""
    if error.errno in _FULL:
        return DiskFull("there is no room on disk; nothing was stored")
    return error


async def receive_upload(
    stream: AsyncIterator[bytes], content_type: str, folder: Path, max_bytes: int
) -> Upload:
    """Write the body into `folder`, and find out what it is.

    Raises:
        MediaTypeRefused, BadRequest, BadInput, BodyTooLarge, DiskFull; and as `Upload.unpack`.
    """
    upload = Upload(folder, max_bytes)
    media_type, parameters = parse_options_header(content_type)
    if media_type == b"multipart/form-data":
        form = _Form(upload, parameters.get(b"boundary", b""))
        try:
            await _pour(stream, form.write)
        finally:
            form.close()
        form.check_end()
    elif media_type.decode("latin-1") in ZIP_TYPES:
        with Sink(folder / ZIP, max_bytes) as sink:
            await _pour(stream, sink.write)
    else:
        raise MediaTypeRefused(
            "a version is uploaded as application/zip (the folder of a checkpoint), or as "
            "multipart/form-data with `manifest` (JSON) and `weights` (safetensors); .pt files "
            "are converted by `pytorchlib import`, never here"
        )
    if (folder / ZIP).is_file():
        if (folder / WEIGHTS).exists():
            raise BadInput("the form holds an archive and weights; send one of them")
        await asyncio.to_thread(upload.unpack)
    if upload.intake is None:
        raise BadInput("the form has no field `manifest`", param="manifest")
    return upload


async def _pour(stream: AsyncIterator[bytes], write: Callable[[bytes], None]) -> None:
    """Large pieces, because each is handed to a thread."""
    piece = bytearray()
    async for chunk in stream:
        piece += chunk
        if len(piece) >= PIECE_BYTES:
            await asyncio.to_thread(write, bytes(piece))
            piece.clear()
    if piece:
        await asyncio.to_thread(write, bytes(piece))


class _Form:
    """What the push parser calls: files go to disk as they come, texts stay in memory."""

    def __init__(self, upload: Upload, boundary: bytes) -> None:
        if not 0 < len(boundary) <= 70:
            raise BadRequest("the multipart body names no boundary, or one of over 70 bytes")
        self._upload = upload
        self._parser = MultipartParser(boundary, self._callbacks())
        self._ended = False
        self._seen: set[str] = set()
        self._header = [bytearray(), bytearray()]
        self._disposition = b""
        self._name = ""
        self._text = bytearray()
        self._sink: Sink | None = None

    def write(self, piece: bytes) -> None:
        """One piece of the body; in a thread."""
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise BadRequest(f"the multipart body is malformed: {error}") from None

    def close(self) -> None:
        """Let go of the file that is being written, if one is."""
        if self._sink is not None:
            self._sink.__exit__()

    def check_end(self) -> None:
        """Refuse a form that is cut short."""
        if not self._ended:
            raise BadRequest("the multipart body ends before its closing boundary")

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_header_field": lambda data, start, end: self._grow(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._grow(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = b""
        self._text.clear()

    def _grow(self, which: int, piece: bytes) -> None:
        self._header[which] += piece
        if len(self._header[which]) > MAX_HEADER_BYTES:
            raise BadRequest(f"a part of the form has a header of over {MAX_HEADER_BYTES} bytes")

    def _end_header(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _open(self) -> None:
        _, parameters = parse_options_header(self._disposition)
        self._name = parameters.get(b"name", b"").decode("utf-8", "replace")[:80]
        if self._name not in {*FILES, "manifest", "sha256"} or self._name in self._seen:
            raise BadInput(
                f"the form has an unexpected field {self._name!r}; known are file, or manifest, "
                "weights, golden and sha256, each once"
            )
        self._seen.add(self._name)
        if self._name in FILES:
            name = FILES[self._name]
            self._sink = Sink(self._upload.folder / name, self._upload.limit_of(name))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
            return
        self._text += data[start:end]
        limit = MAX_MANIFEST_BYTES if self._name == "manifest" else MAX_TEXT_BYTES
        if len(self._text) > limit:
            raise BodyTooLarge(f"the field {self._name} has more than {limit} bytes")

    def _end_part(self) -> None:
        if self._sink is not None:
            self._sink.__exit__()
            self._sink = None
        elif self._name == "manifest":
            self._upload.take_manifest(bytes(self._text))
        else:
            self._upload.sha256 = self._text.decode("utf-8", "replace").strip().lower()

    def _end(self) -> None:
        self._ended = True
