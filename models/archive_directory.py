"""The directory of a zip file and the headers before its members, read strictly and within bounds.

Layout: PKWARE's APPNOTE 6.3.10, sections 4.3 (records) and 4.5.3 (zip64). Python's `zipfile` is not
used: it takes memory for every entry before a limit can be asked, and believes what overlaps.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from models.archive_error import NotAnArchive

DEFLATED: Final = 8
_HAS_DESCRIPTOR: Final = 1 << 3
_UTF8: Final = 1 << 11
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_EXTRA: Final = struct.Struct("<2H")
_ZIP64: Final = 1
_FULL16: Final = 0xFFFF
_FULL32: Final = 0xFFFFFFFF
_MAX_COMMENT: Final = 0xFFFF
_MAX_ENTRY_BYTES: Final = 512
"""Header, name and extra fields of an entry, on average; the directory is read as one piece."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the directory says of one member or folder.

    Attributes:
        raw_name: as it stands there.
        is_utf8: whether it says that this is UTF-8.
        flags, method, checksum, attributes: as in the format.
        num_bytes, packed_bytes, offset: zip64's where it has them.
        fault: what is wrong with its zip64 field; empty for nothing.
    """

    raw_name: bytes
    flags: int
    method: int
    checksum: int
    attributes: int
    packed_bytes: int
    num_bytes: int
    offset: int
    fault: str

    @property
    def is_utf8(self) -> bool:
        """Whether the entry says that its name is UTF-8."""
        return bool(self.flags & _UTF8)


@dataclass(frozen=True, slots=True)
class Directory:
    """All entries, at most one more than were asked for.

    Attributes:
        entries: in the order of the directory.
        num_declared: how many the archive says there are.
        start: where the directory begins, and the members must have ended.
    """

    entries: tuple[Entry, ...]
    num_declared: int
    start: int


def read_directory(descriptor: int, num_bytes: int, max_entries: int) -> Directory:
    """The directory of a zip file of `num_bytes` bytes.

    Raises:
        NotAnArchive: it is no zip file, or its directory cannot be followed.
    """
    end, record = _end_record(descriptor, num_bytes)
    disk, first_disk, here, count, size, start, _ = record
    limit = end
    if end >= _LOCATOR.size and _pread(descriptor, 4, end - _LOCATOR.size) == b"PK\x06\x07":
        limit, (disk, first_disk, here, count, size, start) = _zip64(descriptor, end, record)
    elif _FULL32 in (size, start):
        raise NotAnArchive("the archive points to a zip64 record that is not there")
    if disk or first_disk or here != count:
        raise NotAnArchive("the archive is one volume of several")
    if start + size != limit:
        raise NotAnArchive(
            "the archive's directory is not where its last record says; it may be cut, or have "
            "bytes before or behind it"
        )
    if count > max_entries:  # so many are not read: the count alone refuses it
        return Directory((), count, start)
    if size > max_entries * _MAX_ENTRY_BYTES:
        raise NotAnArchive(f"the archive's directory has {size} bytes, which no reader needs")
    entries = tuple(_entries(_pread(descriptor, size, start), max_entries))
    if len(entries) != count:
        raise NotAnArchive(f"the archive says {count} entries and has {len(entries)}")
    return Directory(entries, count, start)


def read_local(descriptor: int, entry: Entry, directory_start: int) -> int:
    """Where the bytes of `entry` begin.

    Raises:
        ValueError: its local header is not there, or says something else than the directory.
    """
    if entry.offset + _LOCAL.size > directory_start:
        raise ValueError("its header lies outside the archive")
    header = _pread(descriptor, _LOCAL.size + len(entry.raw_name), entry.offset)
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise ValueError("there is no header where the directory says")
    fields = _LOCAL.unpack_from(header)
    _, _, flags, method, _, _, checksum, packed, size, name_bytes, extra_bytes = fields
    if name_bytes != len(entry.raw_name) or header[_LOCAL.size :] != entry.raw_name:
        raise ValueError("its header and the directory give it different names")
    if method != entry.method or (flags ^ entry.flags) & ~_UTF8 & _FULL16:
        raise ValueError("its header and the directory do not agree on how it is packed")
    data_start: int = entry.offset + _LOCAL.size + name_bytes + extra_bytes
    if packed == _FULL32 or size == _FULL32:
        extra = _pread(descriptor, extra_bytes, data_start - extra_bytes)
        size, packed = _local_sizes(extra, size, packed)
    told = (checksum, packed, size)
    untold = bool(flags & _HAS_DESCRIPTOR) and not any(told)
    if not untold and told != (entry.checksum, entry.packed_bytes, entry.num_bytes):
        raise ValueError("its header and the directory do not agree on its sizes")
    return data_start


def _end_record(descriptor: int, num_bytes: int) -> tuple[int, tuple[int, ...]]:
    """Where the last record is, and its numbers. Its comment must end where the file does."""
    length = min(num_bytes, _END.size + _MAX_COMMENT)
    tail = _pread(descriptor, length, num_bytes - length)
    at = len(tail) - _END.size
    while (at := tail.rfind(b"PK\x05\x06", 0, at + 4)) >= 0:
        record = _END.unpack_from(tail, at)
        if at + _END.size + record[-1] == len(tail):
            return num_bytes - length + at, record[1:]
        at -= 1
    raise NotAnArchive("this is no zip file, or it is cut short, or something follows it")


def _zip64(
    descriptor: int, end: int, record: tuple[int, ...]
) -> tuple[int, tuple[int, int, int, int, int, int]]:
    """Where the zip64 record is, and what it says in place of the last record's numbers."""
    _, disk, at, num_disks = _LOCATOR.unpack(_pread(descriptor, _LOCATOR.size, end - _LOCATOR.size))
    if disk or num_disks > 1:
        raise NotAnArchive("the archive is one volume of several")
    if at + _END64.size != end - _LOCATOR.size:
        raise NotAnArchive("the archive's zip64 record is not where its locator says")
    signature, length, _, _, *numbers = _END64.unpack(_pread(descriptor, _END64.size, at))
    if signature != b"PK\x06\x06" or length != _END64.size - 12:
        raise NotAnArchive("the archive's zip64 record is damaged")
    for short, long, full in zip(record, numbers, (_FULL16,) * 4 + (_FULL32,) * 2, strict=False):
        if short not in (full, long):
            raise NotAnArchive("the archive's two last records contradict each other")
    return at, (numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5])


def _entries(data: bytes, max_entries: int) -> Iterator[Entry]:
    position = 0
    for _ in range(max_entries + 1):
        if position == len(data):
            return
        if len(data) - position < _CENTRAL.size:
            raise NotAnArchive("the archive's directory is damaged")
        fields = _CENTRAL.unpack_from(data, position)
        signature, _, _, flags, method, _, _, checksum, packed, size = fields[:10]
        name_bytes, extra_bytes, comment_bytes, disk, _, attributes, offset = fields[10:]
        name_start = position + _CENTRAL.size
        extra_start = name_start + name_bytes
        position = extra_start + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or position > len(data):
            raise NotAnArchive("the archive's directory is damaged")
        extra = data[extra_start : extra_start + extra_bytes]
        size, packed, offset, fault = _sizes(extra, size, packed, offset, disk)
        raw_name = data[name_start:extra_start]
        yield Entry(raw_name, flags, method, checksum, attributes, packed, size, offset, fault)


def _sizes(
    extra: bytes, size: int, packed: int, offset: int, disk: int
) -> tuple[int, int, int, str]:
    """Sizes and offset with zip64's in place of those that are full, and what is wrong."""
    if disk not in (0, _FULL16):
        return size, packed, offset, "it begins on another volume"
    full = [number == _FULL32 for number in (size, packed, offset)]
    if not any(full):
        return size, packed, offset, ""
    try:
        wide = iter(_wide_numbers(extra, sum(full)))
    except ValueError as error:
        return size, packed, offset, str(error)
    size, packed, offset = (
        next(wide) if is_full else number
        for is_full, number in zip(full, (size, packed, offset), strict=True)
    )
    return size, packed, offset, ""


def _local_sizes(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """A local header with a zip64 field has both sizes in it."""
    wide_size, wide_packed = _wide_numbers(extra, 2)
    return (
        wide_size if size == _FULL32 else size,
        wide_packed if packed == _FULL32 else packed,
    )


def _wide_numbers(extra: bytes, count: int) -> tuple[int, ...]:
    """The first `count` numbers of the one zip64 field in `extra`."""
    fields = [body for kind, body in _extra_fields(extra) if kind == _ZIP64]
    if len(fields) != 1:
        raise ValueError(f"its sizes are in a zip64 field, of which it has {len(fields)}")
    if len(fields[0]) < 8 * count:
        raise ValueError("its zip64 field is too short")
    return struct.unpack_from(f"<{count}Q", fields[0])


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if position + length > len(extra):
            raise ValueError("its extra fields are damaged")
        yield kind, extra[position : position + length]
        position += length


def _pread(descriptor: int, length: int, position: int) -> bytes:
    """`length` bytes from `position`, or as many as there are."""
    pieces: list[bytes] = []
    while length and (piece := os.pread(descriptor, length, position)):
        pieces.append(piece)
        position, length = position + len(piece), length - len(piece)
    return b"".join(pieces)
