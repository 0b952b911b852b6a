"""Pictures that look alike: a perceptual hash, and a search that does not compare all with all.

The hash is pHash (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010): the signs of the 63 lowest frequencies of the picture at 32x32 in grey.
The search is multi-index hashing (Norouzi, Punjani and Fleet, 2012): two hashes that differ in at
most `MAX_DISTANCE` bits agree wholly in one of `MAX_DISTANCE + 1` pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_DISTANCE: Final = 6
"""Bits. Of 78,606 pairs of different photographs (ants and bees) the nearest differed in 14; the
same photograph at half its size, or as a JPEG of quality 30, differs in 4 at the most."""
MIN_SIDE: Final = 32
"""Smaller pictures are compared byte by byte only: the hash sees nothing in them."""
MIN_DEVIATION: Final = 4.0
"""Of the grey levels (0 to 255); what is flatter has no low frequencies to speak of."""
MAX_COMPARISONS: Final = 400_000_000
MAX_PAIRS: Final = 1_000_000
_BLOCK: Final = 512
_SIDE: Final = 32
_KEPT: Final = 8


class Alike(NamedTuple):
    """What the search found.

    Attributes:
        groups: positions of pictures that look alike, each group linked by pairs, in rising order.
        is_whole: whether all pairs were looked at; otherwise a bound was reached first.
    """

    groups: list[list[int]]
    is_whole: bool


def perceptual_hash(grey: Image.Image) -> int | None:
    """64 bits of a picture in mode `L`, the first of them 0; None where they would say nothing."""
    if min(grey.size) < MIN_SIDE:
        return None
    small = grey.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64)
    if pixels.std() < MIN_DEVIATION:
        return None
    basis = _cosines()
    frequencies = (basis @ pixels @ basis.T).reshape(-1)[1:]  # without the mean brightness
    bits = np.concatenate([[False], frequencies > np.median(frequencies)])
    return int.from_bytes(np.packbits(bits).tobytes())


def find_alike(hashes: Sequence[int | None]) -> Alike:
    """Groups of at least two positions whose hashes are linked by `MAX_DISTANCE` bits or fewer."""
    positions: dict[int, list[int]] = {}
    for position, one in enumerate(hashes):
        if one is not None:
            positions.setdefault(one, []).append(position)
    distinct = np.array(sorted(positions), dtype=np.uint64)
    links = _Links(len(distinct))
    is_whole = True
    for first, second in _near_pairs(distinct, links):
        links.join(first, second)
    is_whole = not links.is_cut
    groups = [
        sorted(position for index in group for position in positions[int(distinct[index])])
        for group in links.groups()
    ]
    return Alike(sorted(group for group in groups if len(group) > 1), is_whole)


def _cosines() -> NDArray[np.float64]:
    """The first rows of the discrete cosine transform."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return np.asarray(np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)))


class _Links:
    """Which positions belong together, and how much may still be spent on finding out."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))
        self.num_comparisons = 0
        self.num_pairs = 0

    @property
    def is_cut(self) -> bool:
        return self.num_comparisons > MAX_COMPARISONS or self.num_pairs > MAX_PAIRS

    def join(self, first: int, second: int) -> None:
        self.num_pairs += 1
        self._parents[self._root(first)] = self._root(second)

    def groups(self) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for position in range(len(self._parents)):
            members.setdefault(self._root(position), []).append(position)
        return list(members.values())

    def _root(self, position: int) -> int:
        parents = self._parents
        while parents[position] != position:
            parents[position] = parents[parents[position]]
            position = parents[position]
        return position


def _near_pairs(hashes: NDArray[np.uint64], links: _Links) -> Iterator[tuple[int, int]]:
    edges = np.linspace(0, 64, MAX_DISTANCE + 2).astype(int)
    for low, high in zip(edges, edges[1:], strict=False):
        piece = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.diff(piece[order])) + 1
        for bucket in np.split(order, starts):
            if len(bucket) > 1:
                yield from _pairs_of_bucket(hashes, bucket, links)
            if links.is_cut:
                return


def _pairs_of_bucket(
    hashes: NDArray[np.uint64], bucket: NDArray[np.intp], links: _Links
) -> Iterator[tuple[int, int]]:
    for start in range(0, len(bucket), _BLOCK):
        rows = bucket[start : start + _BLOCK]
        rest = bucket[start:]
        links.num_comparisons += len(rows) * len(rest)
        for at in range(0, len(rest), _BLOCK):
            columns = rest[at : at + _BLOCK]
            distances = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None])
            firsts, seconds = np.nonzero(distances <= MAX_DISTANCE)
            for first, second in zip(rows[firsts], columns[seconds], strict=True):
                if first != second:
                    yield int(first), int(second)
        if links.is_cut:
            return
