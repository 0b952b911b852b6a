"""What the bytes of a picture say before any decoder sees them.

Pillow reads the parts of a file in Python, and libjpeg visits every pixel once a scan: a few
megabytes made for it would keep a processor busy for minutes. Here the parts are walked once and
within bounds, and what no pixel depends on (EXIF, colour profiles, comments, previews) is left
out of what the decoder gets.

Layouts: ITU-T T.81 annex B (JPEG), W3C PNG and RFC 9649 (WebP), CIPA DC-008 (EXIF).
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

MAX_PARTS: Final = 10_000
"""Segments of a JPEG or chunks of a PNG or WebP; a camera writes dozens, an encoder thousands."""

_ORIENTATION: Final = 0x0112
_SHORT, _LONG = 3, 4

_SCAN, _END, _APP0, _EXIF, _ADOBE, _COMMENT = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1, 0xC9})
_PLAIN: Final = frozenset({(0xC0, 8), (0xC1, 8)})
_ALONE: Final = frozenset({0x01, 0xD8})
# Comments and applications' segments, but for the two that say what the colours are.
_METADATA: Final = frozenset({*range(_APP0, 0xF0), _COMMENT}) - {_APP0, _ADOBE}
# A marker that is no fill byte, no escaped byte of the pixels and no restart between them.
_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")

_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})


class PictureHeader(NamedTuple):
    """The facts of one picture.

    Attributes:
        width, height: in pixels, as the file has them.
        bytes_per_pixel: what decoding takes at its peak, turning and converting included.
        num_scans: how often the decoder visits every pixel.
        animated: whether there is more than one frame.
        orientation: of EXIF, 1 to 8; 1 is upright.
        is_plain: a JPEG that any decoder reads: one scan of eight bits, grey or with the usual
            three colours, with its end.
        spans: the parts that the pixels depend on, as (start, end).
    """

    width: int
    height: int
    bytes_per_pixel: int
    num_scans: int = 1
    animated: bool = False
    orientation: int = 1
    is_plain: bool = False
    spans: tuple[tuple[int, int], ...] = ()

    def essence(self, data: bytes) -> bytes:
        """The file without what no pixel depends on; `data` is what the header was read from."""
        return b"".join([data[start:end] for start, end in self.spans]) if self.spans else data


def read_header(kind: str, data: bytes) -> PictureHeader:
    """The header of a `JPEG`, `PNG` or `WEBP` file.

    Raises:
        ValueError, struct.error: it is damaged, or in more parts than `MAX_PARTS`.
    """
    return _READERS[kind](data)


def orientation_of(exif: bytes) -> int:
    """The orientation in a TIFF header with its first directory; 1 where it says none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}L", exif, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", exif, directory)
        for index in range(num_entries):
            entry = directory + 2 + 12 * index
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _ORIENTATION and kind in (_SHORT, _LONG):
                letter = "H" if kind == _SHORT else "L"
                (value,) = struct.unpack_from(f"{order}{letter}", exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _exif_payload(block: bytes) -> bytes:
    return block.removeprefix(b"Exif\0\0")


class _Part(NamedTuple):
    kind: int | bytes
    start: int
    body: int
    end: int


def _jpeg(data: bytes) -> PictureHeader:
    segments = _jpeg_segments(data)
    head: list[_Part] = []
    for segment in segments:
        head.append(segment)
        if segment.kind == _SCAN:
            break
    frames = [segment for segment in head if segment.kind in _FRAMES]
    if len(frames) != 1 or head[-1].kind != _SCAN:
        raise ValueError("it has no frame header before its pixels, or several")
    bits, height, width, components = struct.unpack_from(">BHHB", data, frames[0].body)
    end, num_scans, per_pixel = len(data), 1, 8
    is_whole = frames[0].kind in _SEQUENTIAL and data[head[-1].body] == components
    if not is_whole:
        # Several scans: libjpeg keeps the coefficients of the whole picture, two bytes each.
        end, num_scans = _scans(segments, end)
        per_pixel = max(per_pixel, 4 + 2 * components)
    spans = [(0, 2), *((one.start, one.end) for one in head[:-1] if one.kind not in _METADATA)]
    return PictureHeader(
        width,
        height,
        bytes_per_pixel=per_pixel,
        num_scans=num_scans,
        orientation=_jpeg_orientation(data, head),
        is_plain=is_whole
        and (frames[0].kind, bits) in _PLAIN
        and (components == 1 or (components == 3 and not _says_colours(head)))
        and data.endswith(b"\xff\xd9"),
        spans=_joined([*spans, (head[-1].start, end)]),
    )


def _jpeg_segments(data: bytes) -> Iterator[_Part]:
    """Segments in order, as libjpeg finds them; what lies between them is skipped."""
    position = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, position)
        if found is None:
            return
        marker, body = data[found.start() + 1], found.end()
        if marker in _ALONE or marker == _END:
            position = body
            yield _Part(marker, found.start(), body, body)
        else:
            (length,) = struct.unpack_from(">H", data, body)
            position = body + max(2, length)
            yield _Part(marker, found.start(), body + 2, position)
        if marker == _END:
            return
    raise ValueError(f"it has more than {MAX_PARTS} segments")


def _scans(segments: Iterator[_Part], end: int) -> tuple[int, int]:
    """Where the picture ends and how many scans it has, the first of which is behind us."""
    num_scans = 1
    for segment in segments:
        if segment.kind == _END:
            return segment.end, num_scans
        num_scans += segment.kind == _SCAN
    return end, num_scans


def _says_colours(head: list[_Part]) -> bool:
    """Whether an application's segment says of the colours what decoders read differently."""
    return any(segment.kind == _ADOBE for segment in head)


def _jpeg_orientation(data: bytes, head: list[_Part]) -> int:
    for segment in head:
        if segment.kind == _EXIF and data[segment.body : segment.body + 6] == b"Exif\0\0":
            return orientation_of(_exif_payload(data[segment.body : segment.end]))
    return 1


def _png(data: bytes) -> PictureHeader:
    width, height = struct.unpack_from(">LL", data, 16)
    spans: list[tuple[int, int]] = [(0, 8)]
    orientation, animated = 1, False
    for chunk in _png_chunks(data):
        if chunk.kind in _PNG_KEPT:
            spans.append((chunk.start, chunk.end))
        elif chunk.kind == b"eXIf":
            orientation = orientation_of(_exif_payload(data[chunk.body : chunk.end]))
        elif chunk.kind == b"acTL":
            animated = int.from_bytes(data[chunk.body : chunk.body + 4]) > 1
    return PictureHeader(
        width,
        height,
        bytes_per_pixel=8,
        animated=animated,
        orientation=orientation,
        spans=_joined(spans),
    )


def _png_chunks(data: bytes) -> Iterator[_Part]:
    position = 8
    for index in range(MAX_PARTS):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">L4s", data, position)
        if (kind == b"IHDR") != (index == 0):
            raise ValueError("it does not begin with its header, or has several")
        yield _Part(kind, position, position + 8, position + 12 + length)
        if kind == b"IEND":
            return
        position += 12 + length
    raise ValueError(f"it has more than {MAX_PARTS} chunks")


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours become one."""
    joined = spans[:1]
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def _webp(data: bytes) -> PictureHeader:
    """Pillow's decoder takes the memory of two canvases as soon as it sees their size."""
    width, height = _webp_size(data)
    orientation, num_frames = 1, 0
    for chunk in _webp_chunks(data):
        num_frames += chunk.kind == b"ANMF"
        if chunk.kind == b"EXIF":
            orientation = orientation_of(_exif_payload(data[chunk.body : chunk.end]))
    return PictureHeader(
        width, height, bytes_per_pixel=16, animated=num_frames > 1, orientation=orientation
    )


def _webp_size(data: bytes) -> tuple[int, int]:
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and body[:1] == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise ValueError("it does not begin with its header")


def _webp_chunks(data: bytes) -> Iterator[_Part]:
    position = 12
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            return
        kind, size = struct.unpack_from("<4sL", data, position)
        yield _Part(kind, position, position + 8, position + 8 + size)
        position += 8 + size + size % 2
    raise ValueError(f"it has more than {MAX_PARTS} chunks")


_READERS: Final[Mapping[str, Callable[[bytes], PictureHeader]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
}
