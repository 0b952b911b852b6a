"""One picture of a dataset, looked at once: can it be read, and how does it look?"""

from typing import Final

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from models.picture import (
    PictureError,
    PictureLimits,
    PictureTooLarge,
    PictureUnsupported,
    open_picture,
    oriented,
    picture_format,
    to_mode,
)
from training.near_duplicates import perceptual_hash

SUFFIXES: Final = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
_ORIENTATION_TAG: Final = 0x0112
_MEASURED_SIDE: Final = 64
_GREY: Final = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "F"})


class PictureLook(BaseModel):
    """How one readable picture looks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    """`JPEG`, `PNG` or `WEBP`, by its first bytes."""
    mode: str
    """Pillow's name of the pixels that the file has, such as `RGB`, `L`, `CMYK` or `I;16`."""
    width: int
    height: int
    """In pixels, upright."""
    orientation: int
    """Of EXIF, 1 to 8; 1 is upright."""
    alpha: bool
    hash: str | None
    """16 hex digits of `training.near_duplicates.perceptual_hash`."""
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    """Of each colour (or of the grey), 0 to 255, at no more than 64 pixels a side."""

    @property
    def channels(self) -> int:
        """1 for grey pictures, 3 for all others."""
        return 1 if self.mode in _GREY else 3


class UnusablePicture(Exception):
    """A file is no picture that can be used.

    Attributes:
        kind: `unreadable`, `wrong_type` or `too_large`.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def check_picture(data: bytes, limits: PictureLimits | None = None) -> PictureLook:
    """Decode the bytes of one file and look at it.

    Raises:
        UnusablePicture: it is truncated, damaged, of another type, or over a limit.
    """
    try:
        image = open_picture(data, limits or PictureLimits())
    except PictureTooLarge as error:
        raise UnusablePicture("too_large", str(error)) from None
    except PictureUnsupported as error:
        raise UnusablePicture("wrong_type", f"{error}{_what_it_is(data)}") from None
    except PictureError as error:
        raise UnusablePicture("unreadable", str(error)) from None
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    upright = oriented(image)
    grey = to_mode(upright, "L")
    one = perceptual_hash(grey)
    small = grey if image.mode in _GREY else to_mode(upright, "RGB")
    mean, deviation = _moments(small)
    return PictureLook(
        format=picture_format(data),
        mode=image.mode,
        width=upright.width,
        height=upright.height,
        orientation=orientation,
        alpha=image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
        hash=None if one is None else f"{one:016x}",
        mean=mean,
        deviation=deviation,
    )


def _moments(image: Image.Image) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = (min(image.width, _MEASURED_SIDE), min(image.height, _MEASURED_SIDE))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX), dtype=np.float64)
    pixels = pixels.reshape(size[0] * size[1], -1)
    return _rounded(pixels.mean(0)), _rounded(pixels.std(0))


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 1) for value in values)


_OTHERS: Final = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"\0\0\0\x0cjP", "a JPEG 2000"),
    (b"8BPS", "a Photoshop file"),
    (b"<svg", "an SVG"),
)


def _what_it_is(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "; it is a HEIC, AVIF or video"
    for beginning, name in _OTHERS:
        if data.startswith(beginning):
            return f"; it is {name}"
    return ""
