"""Samples that are files of JPEG, PNG or WebP, decoded when they are read."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from models.preprocessing import Preprocessing
from training.samples import GREY_MODES, Look

_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class PictureFiles:
    """Files below `root`.

    Attributes:
        root: the folder.
        paths: from there.
        preprocessing: what they are read through, once it is known.
        names: what a person would call them; by their paths where there are none.
        digests: hex sha256 that each must have, where they were noted when it was stored.
    """

    root: Path
    paths: tuple[str, ...]
    preprocessing: Preprocessing | None = None
    names: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Tensor, bytes]:
        """See `training.samples.Samples`."""
        if self.preprocessing is None:
            raise TypeError("picture files are read once their preprocessing is known")
        data = (self.root / self.paths[index]).read_bytes()
        digest = hashlib.sha256(data)
        if self.digests and digest.hexdigest() != self.digests[index]:
            raise ValueError("its bytes have changed since it was stored")
        return self.preprocessing.picture(data), digest.digest()

    def name(self, index: int) -> str:
        """See `training.samples.Samples`."""
        return self.names[index] if self.names else self.paths[index]

    def look(self) -> Look:
        """See `training.samples.Samples`; what cannot be opened is left to `read` to name."""
        headers = {_header(self.root / path) for path in self.paths} - {None}
        channels = 1 if all(header and header[0] == 1 for header in headers) else 3
        sizes = {header[1:] for header in headers if header}
        return Look(True, (channels, *sizes.pop()) if len(sizes) == 1 else (channels,))

    def prepared(self, preprocessing: Preprocessing) -> "PictureFiles":
        """See `training.samples.Samples`."""
        if not preprocessing.accepts_pictures:
            raise ValueError("the dataset holds pictures and the model takes numbers")
        return replace(self, preprocessing=preprocessing)

    def select(self, indices: Tensor) -> "PictureFiles":
        """See `training.samples.Samples`."""
        positions = indices.tolist()
        return replace(
            self,
            paths=_chosen(self.paths, positions),
            names=_chosen(self.names, positions),
            digests=_chosen(self.digests, positions),
        )


def _chosen(texts: tuple[str, ...], positions: list[int]) -> tuple[str, ...]:
    return tuple(texts[position] for position in positions) if texts else ()


def _header(path: Path) -> tuple[int, int, int] | None:
    """Channels, height and width as the file's header says, or None where it cannot be read."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            turned = image.getexif().get(_ORIENTATION_TAG) in _TURNED
            height, width = (image.width, image.height) if turned else (image.height, image.width)
            return (1 if image.mode in GREY_MODES else 3, height, width)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None
