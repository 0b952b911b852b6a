"""Pictures brought to size and cropped, to the bit as torchvision's `Resize` and `CenterCrop` do.

Pillow makes only the part that the crop keeps, and in bands on several threads where somebody
lends them: along a side where that gives the same bits. There every edge of a pixel is a number
that Pillow holds exactly; so it is where the shorter side becomes 256, whatever it was.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar

from PIL import Image

BAND_PIXELS: Final = 1 << 16
"""Of the picture as it came, for each band: with fewer, handing over costs more than it saves."""

MAX_BANDS: Final = 16

# Pillow holds a box in fp32: whole numbers up to this one, and their halves, quarters and so on.
_EXACT_UP_TO: Final = 1 << 24

One = TypeVar("One")
Result = TypeVar("Result")


class Threads(Protocol):
    """Threads that compute beside the one that asks; `count` of them in all, with that one."""

    count: int

    def share(self, function: Callable[[One], Result], pieces: Sequence[One]) -> list[Result]:
        """`function` of each, in their order."""


class Box(NamedTuple):
    """Edges in pixels; those to the right and below are not in it any more."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top


def by_shorter_side(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height, rounded down as torchvision's `Resize` does."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def centred(side: int, wanted: int) -> int:
    """Where a crop begins; torchvision rounds otherwise where it has to add pixels."""
    return round((side - wanted) / 2.0) if side >= wanted else -((wanted - side) // 2)


def cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`size`, width and height, from the centre; outside the picture is black."""
    return image if image.size == size else image.crop(_from_centre(image.size, size))


def resized(
    image: Image.Image,
    size: tuple[int, int],
    resampling: Image.Resampling,
    *,
    kept: tuple[int, int] | None = None,
    threads: Threads | None = None,
) -> Image.Image:
    """The picture brought to `size`, both as width and height.

    Args:
        kept: what is needed of it from its centre. Along a side where the bits would differ it is
            not cut, so that `cropped` has to follow in any case.
        threads: who makes bands of a large one.
    """
    if size == image.size:
        return image
    num_bands = 1
    if threads is not None:
        num_bands = min(threads.count, MAX_BANDS, image.width * image.height // BAND_PIXELS)
    parts = _parts(image.size, size, kept or size, max(1, num_bands))

    def made(part: Box) -> Image.Image:
        (width, height), (width_after, height_after) = image.size, size
        source = (
            part.left * width / width_after,
            part.top * height / height_after,
            part.right * width / width_after,
            part.bottom * height / height_after,
        )
        return image.resize(part.size, resampling, source)

    if threads is None or len(parts) == 1:
        return made(parts[0])
    (left, top), (right, bottom) = parts[0][:2], parts[-1][2:]
    joined = Image.new(image.mode, (right - left, bottom - top))
    for part, pixels in zip(parts, threads.share(made, parts), strict=True):
        joined.paste(pixels, (part.left - left, part.top - top))
    return joined


def _parts(
    before: tuple[int, int], after: tuple[int, int], kept: tuple[int, int], num_bands: int
) -> list[Box]:
    """What to make of a picture: in bands, up to so many, that have the bits of the whole."""
    whole = Box(0, 0, *after)
    needed = _from_centre(after, [min(pair) for pair in zip(kept, after, strict=True)])
    across, down = (_is_exact(*sides) for sides in zip(before, after, strict=True))
    if not across:
        needed = needed._replace(left=0, right=after[0])
    if not down:
        needed = needed._replace(top=0, bottom=after[1])
    for number in range(num_bands if across or down else 1, 0, -1):
        bands = _bands(needed, number, by_rows=down)
        if all(_is_across_first(before, part.size) for part in (whole, *bands)):
            return bands
    return [whole]


def _is_across_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether every Pillow brings the width to size before the height; bytes lie between the two.

    From 13 on, it begins with the height where that loses more than twice what the width does.
    """
    (width, height), (width_after, height_after) = before, after
    return height_after >= height or 2 * (width - width_after) >= height - height_after


def _is_exact(before: int, after: int) -> bool:
    """Whether a side of `before` pixels may be brought to `after` in parts."""
    steps = after // math.gcd(before, after)
    return steps & (steps - 1) == 0 and before * steps <= _EXACT_UP_TO


def _from_centre(size: tuple[int, int], wanted: Sequence[int]) -> Box:
    left, top = (centred(side, part) for side, part in zip(size, wanted, strict=True))
    return Box(left, top, left + wanted[0], top + wanted[1])


def _bands(whole: Box, number: int, *, by_rows: bool) -> list[Box]:
    first, last = (whole.top, whole.bottom) if by_rows else (whole.left, whole.right)
    number = min(number, last - first)
    edges = [first + (last - first) * index // number for index in range(number + 1)]
    return [
        whole._replace(top=begin, bottom=end) if by_rows else whole._replace(left=begin, right=end)
        for begin, end in itertools.pairwise(edges)
    ]
