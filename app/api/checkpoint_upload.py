"""A checkpoint on its way from a request to a folder of its own: streamed, bounded, then checked.

Either a zip of a checkpoint (as the body, or as the form field `file`), or a form with `manifest`,
`weights` and perhaps `golden`, `seen` and `sha256`. Nothing of it is in the store before it was
checked.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from app.api.multipart import FormReader
from app.api.upload import Sink, pour
from app.errors import BadInput, BodyTooLarge, MediaTypeRefused
from models.archive import Archive, ArchiveLimits
from models.checkpoint import GOLDEN, MANIFEST, MAX_MANIFEST_BYTES
from models.intake import Intake
from models.intake_error import FilesUnexpected
from models.manifest import WEIGHTS
from models.seen import SEEN

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

ZIP: Final = "upload.zip"
MAX_PARTS: Final = 8
MAX_TEXT_BYTES: Final = 1024
MAX_FILES: Final = 64
ZIP_TYPES: Final = ("application/zip", "application/x-zip-compressed", "application/octet-stream")
FILES: Final = {"file": ZIP, "weights": WEIGHTS, "golden": GOLDEN, "seen": SEEN}


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


async def receive_upload(
    stream: AsyncIterator[bytes], content_type: str, folder: Path, max_bytes: int
) -> Upload:
    """Write the body into `folder`, and find out what it is.

    Raises:
        MediaTypeRefused, BadRequest, BadInput, BodyTooLarge, DiskFull; and as `Upload.unpack`.
    """
    upload = Upload(folder, max_bytes)
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        form = _CheckpointForm(content_type, upload)
        try:
            await pour(stream, form.feed)
        finally:
            form.close()
        form.check_end()
    elif media_type in ZIP_TYPES:
        with Sink(folder / ZIP, max_bytes) as sink:
            await pour(stream, sink.write)
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


class _CheckpointForm(FormReader):
    """A form whose files go to disk as they come; its texts stay in memory."""

    def __init__(self, content_type: str, upload: Upload) -> None:
        super().__init__(content_type, "", MAX_PARTS)
        self._upload = upload
        self._seen: set[str] = set()
        self._field = ""
        self._text = bytearray()
        self._sink: Sink | None = None

    def close(self) -> None:
        """Let go of the file that is being written, if one is."""
        if self._sink is not None:
            self._sink.__exit__()

    def _callbacks(self) -> "MultipartCallbacks":
        return {**super()._callbacks(), "on_headers_finished": self._open}

    def _open(self) -> None:
        self._text.clear()
        self._field = self._field_name()
        if self._field not in {*FILES, "manifest", "sha256"} or self._field in self._seen:
            raise BadInput(
                f"the form has an unexpected field {self._field[:80]!r}; known are file, or "
                "manifest, weights, golden and sha256, each once"
            )
        self._seen.add(self._field)
        if self._field in FILES:
            name = FILES[self._field]
            self._sink = Sink(self._upload.folder / name, self._upload.limit_of(name))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
            return
        self._text += data[start:end]
        limit = MAX_MANIFEST_BYTES if self._field == "manifest" else MAX_TEXT_BYTES
        if len(self._text) > limit:
            raise BodyTooLarge(f"the field {self._field} has more than {limit} bytes")

    def _part_end(self) -> None:
        if self._sink is not None:
            self._sink.__exit__()
            self._sink = None
        elif self._field == "manifest":
            self._upload.take_manifest(bytes(self._text))
        else:
            self._upload.sha256 = self._text.decode("utf-8", "replace").strip().lower()
