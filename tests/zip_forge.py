"""Zip files by hand, so that every field can lie."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REGULAR = 0o100644 << 16


@dataclass(frozen=True)
class Forged:
    """One entry; what is None is told truly.

    Attributes:
        central, local: fields that say something else there, by name.
        packed: the bytes that follow the local header in place of those that belong there.
        at: where the directory says that the local header is.
        reuse: whether no local header is written at all, and the first one is pointed to.
    """

    name: bytes = b"ants/1.png"
    data: bytes = b"picture"
    method: int = 0
    flags: int = 0
    attributes: int = REGULAR
    extra: bytes = b""
    local_extra: bytes = b""
    central: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    packed: bytes | None = None
    at: int | None = None
    reuse: bool = False
    descriptor: bytes = b""


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def zip64(*numbers: int) -> bytes:
    """A zip64 extra field."""
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def forged(
    *entries: Forged,
    prefix: bytes = b"",
    gap: bytes = b"",
    middle: bytes = b"",
    comment: bytes = b"",
    suffix: bytes = b"",
    end: dict[str, int] | None = None,
) -> bytes:
    """A zip file of `entries`.

    Args:
        prefix: bytes before everything, which offsets do not count unless an entry's `at` does.
        gap: bytes between the last member and the directory.
        middle: bytes between the directory and the last record, such as a zip64 record.
        comment, suffix: behind the last record, within it and beyond it.
        end: fields of the last record that say something else.
    """
    body = bytearray(prefix)
    directory = bytearray()
    for entry in entries:
        offset = 0 if entry.reuse else len(body)
        if not entry.reuse:
            body += _local(entry)
        directory += _central(entry, offset if entry.at is None else entry.at)
    body += gap
    numbers = {
        "disk": 0,
        "first_disk": 0,
        "here": len(entries),
        "count": len(entries),
        "size": len(directory),
        "start": len(body),
        "comment": len(comment),
    } | (end or {})
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", *numbers.values())
    return bytes(body + directory + middle + last + comment + suffix)


def end64(count: int, size: int, start: int, at: int, **told: Any) -> bytes:
    """A zip64 record at `at`, with its locator."""
    record = struct.pack(
        "<4sQ2H2L4Q",
        told.get("signature", b"PK\x06\x06"),
        told.get("length", 44),
        *(45, 45, told.get("disk", 0), 0, count, count, size, start),
    )
    where, disks = told.get("where", at), told.get("disks", 1)
    return record + struct.pack("<4sLQL", b"PK\x06\x07", 0, where, disks)


def _local(entry: Forged) -> bytes:
    packed = _packed(entry)
    told = {"checksum": zlib.crc32(entry.data), "packed": len(packed), "size": len(entry.data)}
    told |= {"flags": entry.flags, "method": entry.method, "name": entry.name} | entry.local
    header = struct.pack(
        "<4s5H3L2H",
        told.get("signature", b"PK\x03\x04"),
        *(20, told["flags"], told["method"], 0, 0x21),
        *(told["checksum"], told["packed"], told["size"]),
        *(len(told["name"]), len(entry.local_extra)),
    )
    body = packed if entry.packed is None else entry.packed
    return header + told["name"] + entry.local_extra + body + entry.descriptor


def _central(entry: Forged, offset: int) -> bytes:
    told = {"checksum": zlib.crc32(entry.data), "packed": len(_packed(entry))}
    told |= {"size": len(entry.data), "name": entry.name, "offset": offset, "disk": 0}
    told |= {"flags": entry.flags, "method": entry.method} | entry.central
    header = struct.pack(
        "<4s6H3L5H2L",
        told.get("signature", b"PK\x01\x02"),
        *(3 << 8 | 20, 20, told["flags"], told["method"], 0, 0x21),
        *(told["checksum"], told["packed"], told["size"]),
        *(len(told["name"]), len(entry.extra), 0, told["disk"], 0),
        *(entry.attributes, told["offset"]),
    )
    return header + told["name"] + entry.extra


def _packed(entry: Forged) -> bytes:
    return deflated(entry.data) if entry.method == 8 else entry.data


def named(*names: str) -> Sequence[Forged]:
    """Entries of these names, with a little content each."""
    return [Forged(name.encode()) for name in names]
