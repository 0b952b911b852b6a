"""Files as a zip that is sent while it is made: the same bytes each time, nothing packed again."""

import contextlib
import io
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final

PIECE_BYTES: Final = 1024 * 1024
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)


def zipped(files: Iterable[tuple[str, BinaryIO]]) -> Iterator[bytes]:
    """A zip of opened files under the names that they get; each is closed when it was sent."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, file in files:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o100644 << 16
            with contextlib.closing(file), archive.open(entry, "w", force_zip64=True) as member:
                while piece := file.read(PIECE_BYTES):
                    member.write(piece)
                    yield pipe.taken()
    yield pipe.taken()


class _Pipe(io.RawIOBase):
    """What is written into it is taken out again; nobody can seek."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, piece: Any) -> int:
        """Keep it until it is taken."""
        self._pieces.append(bytes(piece))
        return len(piece)

    def taken(self) -> bytes:
        """All that was written since."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
