"""Pictures from strangers: bounded before memory is taken, opened by Pillow, turned upright.

JPEG, PNG and WebP are read; the first bytes decide which, never a file name or a declared type.
"""

import io
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.picture_header import PictureHeader, read_header

FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers raise on damaged input, over all three formats.
_PARSER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    Warning,  # where a process makes errors of them, as the tests do
)


class PictureError(Exception):
    """A picture cannot be used."""


class PictureUnreadable(PictureError):
    """Truncated, damaged or empty."""


class PictureUnsupported(PictureError):
    """A format or a kind of picture that is not read here."""


class PictureTooLarge(PictureError):
    """More bytes, pixels or a longer side than the limit."""


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """Bounds that hold before a picture's memory and time are taken.

    Attributes:
        max_bytes: of the encoded picture.
        max_pixels, max_side: of the decoded one.
        max_memory_bytes: at the peak of decoding, estimated from the format and the size.
        max_pixel_visits: pixels times scans, for progressive JPEGs.
    """

    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 25_000_000
    max_side: int = 8192
    max_memory_bytes: int = 240 * 1024 * 1024
    max_pixel_visits: int = 500_000_000


class EncodedPicture(NamedTuple):
    """A picture as it came; its header was read and is within the limits.

    Attributes:
        data: the whole file.
        kind: `JPEG`, `PNG` or `WEBP`.
    """

    data: bytes
    kind: str
    header: PictureHeader

    @property
    def num_pixels(self) -> int:
        """Of the decoded picture."""
        return self.header.width * self.header.height


def picture_format(data: bytes) -> str:
    """`JPEG`, `PNG` or `WEBP` by the first bytes.

    Raises:
        PictureUnsupported: anything else.
        PictureUnreadable: no bytes at all.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise PictureUnreadable("the picture is empty: 0 bytes")
    raise PictureUnsupported("the picture is not a JPEG, PNG or WebP; these three are read")


def open_picture(source: bytes | EncodedPicture, limits: PictureLimits) -> Image.Image:
    """Decode one picture.

    Args:
        limits: of bytes; what came through `encoded_picture` was held to its limits there.

    Returns:
        A loaded Pillow image in the mode that the file has; of its metadata only the EXIF
        orientation is there.

    Raises:
        PictureTooLarge: over a limit; known before the pixels are decoded.
        PictureUnsupported: not a JPEG, PNG or WebP, or animated.
        PictureUnreadable: truncated or damaged.
    """
    data, kind, header = encoded_picture(source, limits) if isinstance(source, bytes) else source
    try:
        image = Image.open(io.BytesIO(header.essence(data)), formats=[kind])
        if image.size != (header.width, header.height):
            # No such file is known; were there one, its size would not have been checked.
            raise PictureUnreadable(  # pragma: no cover
                f"the {kind} picture says two sizes of itself"
            )
        image.load()
    except UnidentifiedImageError:
        raise PictureUnreadable(
            f"the picture begins as a {kind}, but its header is damaged"
        ) from None
    except _PARSER_ERRORS as error:
        raise PictureUnreadable(f"the {kind} picture is damaged: {error}") from None
    for metadata in ("exif", "xmp"):  # where a WebP brought them along: what they say is known
        image.info.pop(metadata, None)
    if header.orientation != 1:
        image.getexif()[_ORIENTATION_TAG] = header.orientation
    return image


def encoded_picture(data: bytes, limits: PictureLimits) -> EncodedPicture:
    """The bytes of one picture with what its header says; raises as `open_picture` does."""
    if len(data) > limits.max_bytes:
        raise PictureTooLarge(
            f"the picture has {len(data)} bytes; the limit is {limits.max_bytes} bytes"
        )
    kind = picture_format(data)
    try:
        header = read_header(kind, data)
    except _PARSER_ERRORS as error:
        raise PictureUnreadable(f"the header of the {kind} picture is damaged: {error}") from None
    _check_size(header, limits)
    if header.animated:
        raise PictureUnsupported("the picture is animated; send one frame as a picture of its own")
    return EncodedPicture(data, kind, header)


def _check_size(header: PictureHeader, limits: PictureLimits) -> None:
    width, height = header.width, header.height
    pixels = width * height
    if pixels < 1:
        raise PictureUnreadable(f"the picture is {width}x{height} pixels; it has no content")
    if max(width, height) > limits.max_side or pixels > limits.max_pixels:
        raise PictureTooLarge(
            f"the picture is {width}x{height} pixels; the limits are {limits.max_side} pixels "
            f"a side and {limits.max_pixels} pixels in all"
        )
    memory_bytes = pixels * header.bytes_per_pixel
    if memory_bytes > limits.max_memory_bytes:
        raise PictureTooLarge(
            f"the picture of {width}x{height} pixels takes {memory_bytes} bytes to decode from its "
            f"format; the limit is {limits.max_memory_bytes} bytes"
        )
    if pixels * header.num_scans > limits.max_pixel_visits:
        raise PictureTooLarge(
            f"the picture has {header.num_scans} scans of {width}x{height} pixels; "
            f"the limit is {limits.max_pixel_visits} pixels over all scans"
        )


def oriented(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says; a picture whose EXIF cannot be read stays as it is."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _PARSER_ERRORS:
        return image
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """To `L` or `RGB`. Transparency is dropped; 16 bits keep their upper eight."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "P":
        # Straight to RGB, Pillow warns about palettes with transparency and then ignores it.
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "CMYK":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey at 255 when it converts; the upper byte is the picture."""
    pixels = np.asarray(image)
    pixels = pixels >> 8  # of 32 bits too, where Pillow keeps 16-bit pictures in them
    return Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))
