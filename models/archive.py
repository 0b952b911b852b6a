"""Zip files from strangers: bounded, checked as a whole, never extracted by their own names.

`Archive` reads the directory and every local header before any member, and refuses with all that
is wrong. What it lets through is read as a stream that is held to the size and checksum it named.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from models.archive_directory import DEFLATED, Directory, Entry, read_directory, read_local
from models.archive_error import (
    ArchiveError,
    ArchiveFault,
    ArchiveRefused,
    ArchiveTooLarge,
    MemberDamaged,
    NotAnArchive,
    refusal,
)
from models.archive_name import NameRegister

__all__ = [
    "Archive",
    "ArchiveError",
    "ArchiveFault",
    "ArchiveLimits",
    "ArchiveRefused",
    "ArchiveTooLarge",
    "Member",
    "MemberDamaged",
    "NotAnArchive",
]

GIBIBYTE: Final = 1 << 30
MEBIBYTE: Final = 1 << 20
_READ_BYTES: Final = 1 << 16
_FREE_BYTES: Final = MEBIBYTE
"""What expands to no more than this may be packed however well: a column of equal labels is."""
_ENCRYPTED: Final = 1 | 1 << 6 | 1 << 13
_PATCHED: Final = 1 << 5
_METHODS: Final = frozenset({0, DEFLATED})
_ARCHIVE_SUFFIXES: Final = frozenset(
    {
        *(".zip", ".npz", ".jar", ".whl", ".egg", ".apk", ".pt", ".pth", ".docx", ".xlsx"),
        *(".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".lz", ".lz4"),
        *(".lzma", ".z", ".7z", ".rar", ".cab", ".iso", ".dmg"),
    }
)
_ARCHIVE_BEGINNINGS: Final = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"),
    *(b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"),
)


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Bounds that hold before a member is read, and again while it is.

    Attributes:
        max_bytes: of the file.
        max_entries: members and folders.
        max_member_bytes, max_total_bytes: unpacked.
        max_member_ratio, max_total_ratio: unpacked to packed bytes, above one mebibyte.
        max_name_bytes: of one name, in UTF-8.
        max_depth: folders above a member.
    """

    max_bytes: int = 2 * GIBIBYTE
    max_entries: int = 100_000
    max_member_bytes: int = 32 * MEBIBYTE
    max_total_bytes: int = 8 * GIBIBYTE
    max_member_ratio: int = 200
    max_total_ratio: int = 100
    max_name_bytes: int = 255
    max_depth: int = 4


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive.

    Attributes:
        name: its path inside, `/` between the parts, in NFC; a text to show, never a path to open.
        num_bytes: unpacked, as the archive says; reading holds it to that.
        packed_bytes: what it takes in the archive.
        data_start: where they begin.
        is_deflated: stored as it is otherwise.
        checksum: CRC-32 of the unpacked bytes.
    """

    name: str
    num_bytes: int
    packed_bytes: int
    data_start: int
    is_deflated: bool
    checksum: int


class Archive:
    """A zip file whose every entry has been checked; use it in `with`.

    Args:
        path: the file; nobody else may change it meanwhile.
        limits: bounds.

    Raises:
        NotAnArchive: no zip file, or one whose directory cannot be followed.
        ArchiveTooLarge: all that is over a limit, if nothing else is wrong.
        ArchiveRefused: all that is wrong.
    """

    def __init__(self, path: Path, limits: ArchiveLimits | None = None) -> None:
        self._limits = limits or ArchiveLimits()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self.members = _Check(self._descriptor, self._limits).members()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def chunks(self, member: Member) -> Iterator[bytes]:
        """The unpacked bytes of `member`, in pieces of at most 64 KiB; any thread may read.

        Raises:
            MemberDamaged: they are not what the directory says, in number or in checksum, or
                they are an archive themselves. What was yielded before must be thrown away.
        """
        num_bytes, checksum = 0, 0
        for chunk in self._unpacked(member):
            if not num_bytes:
                _refuse_nested(member, chunk)
            num_bytes += len(chunk)
            if num_bytes > member.num_bytes:
                break
            checksum = zlib.crc32(chunk, checksum)
            yield chunk
        if num_bytes != member.num_bytes:
            more = "more" if num_bytes > member.num_bytes else "fewer"
            raise MemberDamaged(
                member.name, f"it unpacks to {more} than the {member.num_bytes} bytes it declares"
            )
        if checksum != member.checksum:
            raise MemberDamaged(member.name, "its bytes do not have the checksum it declares")

    def read(self, member: Member) -> bytes:
        """All bytes of `member`; raises as `chunks` does."""
        return b"".join(self.chunks(member))

    def _unpacked(self, member: Member) -> Iterator[bytes]:
        packed = self._packed(member)
        try:
            yield from _inflated(packed) if member.is_deflated else packed
        except zlib.error:
            raise MemberDamaged(member.name, "its packed bytes are damaged") from None
        except _WrongEnd as error:
            raise MemberDamaged(member.name, str(error)) from None

    def _packed(self, member: Member) -> Iterator[bytes]:
        position, end = member.data_start, member.data_start + member.packed_bytes
        while position < end:
            piece = os.pread(self._descriptor, min(_READ_BYTES, end - position), position)
            if not piece:
                raise MemberDamaged(member.name, "the archive has become shorter")
            position += len(piece)
            yield piece


class _WrongEnd(Exception):
    """A deflated stream ends before or behind the bytes that it was given."""


def _inflated(packed: Iterator[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for piece in packed:
        if inflater.eof:
            raise _WrongEnd("there are bytes behind its end")
        rest = piece
        while rest and not inflater.eof:
            if chunk := inflater.decompress(rest, _READ_BYTES):
                yield chunk
            rest = inflater.unconsumed_tail
        if inflater.unused_data:
            raise _WrongEnd("there are bytes behind its end")
    while not inflater.eof and (chunk := inflater.decompress(b"", _READ_BYTES)):
        yield chunk
    if not inflater.eof:
        raise _WrongEnd("its packed bytes end too early")


class _Check:
    """Everything that is wrong with one archive, found before any member is read."""

    def __init__(self, descriptor: int, limits: ArchiveLimits) -> None:
        self._descriptor, self._limits = descriptor, limits
        self._faults: list[ArchiveFault] = []
        self._names = NameRegister(limits.max_name_bytes, limits.max_depth)
        self._spans: list[tuple[int, int, str]] = []

    def members(self) -> tuple[Member, ...]:
        """The files among the entries; raises as `Archive` does."""
        num_bytes = os.fstat(self._descriptor).st_size
        if num_bytes > self._limits.max_bytes:
            self._refuse("bytes", "", f"{num_bytes} bytes; the limit is {self._limits.max_bytes}")
            raise refusal(self._faults)
        directory = read_directory(self._descriptor, num_bytes, self._limits.max_entries)
        members = [self._member(entry, directory) for entry in directory.entries]
        self._check_overlap(directory)
        self._check_totals(directory)
        if self._faults:
            raise refusal(self._faults)
        return tuple(member for member in members if member is not None)

    def _member(self, entry: Entry, directory: Directory) -> Member | None:
        """The member that `entry` describes; None for a folder, and where it is at fault."""
        name, is_folder, faults = self._names.add(entry.raw_name, entry.is_utf8)
        for kind, sentence in faults:
            self._refuse(kind, name, sentence)
        self._check_entry(entry, name, is_folder)
        try:
            data_start = read_local(self._descriptor, entry, directory.start)
        except ValueError as error:
            self._refuse("local_header", name, str(error))
            return None
        self._spans.append((entry.offset, data_start + entry.packed_bytes, name))
        if is_folder:
            return None
        return Member(
            name,
            entry.num_bytes,
            entry.packed_bytes,
            data_start,
            entry.method == DEFLATED,
            entry.checksum,
        )

    def _check_entry(self, entry: Entry, name: str, is_folder: bool) -> None:
        if entry.flags & _ENCRYPTED or entry.method == 99:
            self._refuse("encrypted", name, "it is encrypted")
        elif entry.method not in _METHODS or entry.flags & _PATCHED:
            self._refuse(
                "method",
                name,
                f"it is packed by method {entry.method}; stored and deflated are read",
            )
        if entry.fault:
            self._refuse("zip64", name, entry.fault)
        self._check_kind(entry, name, is_folder)
        self._check_size(entry, name)
        if not is_folder and _is_archive_name(name):
            self._refuse("nested", name, "it is an archive inside the archive")

    def _check_kind(self, entry: Entry, name: str, is_folder: bool) -> None:
        kind = stat.S_IFMT(entry.attributes >> 16)
        if kind == stat.S_IFLNK:
            self._refuse("symlink", name, "it is a symbolic link")
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            self._refuse("not_regular", name, "it is a device, pipe or socket")
        elif kind == stat.S_IFDIR and not is_folder:
            self._refuse("not_regular", name, "it is a folder with the name of a file")
        if is_folder and entry.num_bytes:
            self._refuse("not_regular", name, "it is a folder with content")

    def _check_size(self, entry: Entry, name: str) -> None:
        limits = self._limits
        if entry.num_bytes > limits.max_member_bytes:
            sentence = f"it has {entry.num_bytes} bytes; the limit is {limits.max_member_bytes}"
            self._refuse("member_bytes", name, sentence)
        if entry.num_bytes > max(_FREE_BYTES, limits.max_member_ratio * entry.packed_bytes):
            self._refuse(
                "member_ratio",
                name,
                f"{entry.packed_bytes} bytes that unpack to {entry.num_bytes}; "
                f"the limit is {limits.max_member_ratio} to 1",
            )
        if entry.method == 0 and entry.num_bytes != entry.packed_bytes:
            self._refuse("lying_size", name, "it is stored, and says two different sizes")

    def _check_overlap(self, directory: Directory) -> None:
        spans = sorted(self._spans)
        if spans and spans[0][0] != 0:
            self._refuse("prefix", "", f"{spans[0][0]} bytes lie before its first member")
        ends = [*(start for start, _, _ in spans[1:]), directory.start]
        for (_, end, name), next_start in zip(spans, ends, strict=False):
            if end > next_start:
                self._refuse("overlap", name, "it shares bytes with what comes after it")

    def _check_totals(self, directory: Directory) -> None:
        limits = self._limits
        if (
            directory.num_declared > limits.max_entries
            or len(directory.entries) > limits.max_entries
        ):
            count = max(directory.num_declared, len(directory.entries))
            self._refuse("entries", "", f"{count} entries; the limit is {limits.max_entries}")
        total_bytes = sum(entry.num_bytes for entry in directory.entries)
        packed_bytes = sum(entry.packed_bytes for entry in directory.entries)
        if total_bytes > limits.max_total_bytes:
            sentence = f"it unpacks to {total_bytes} bytes; the limit is {limits.max_total_bytes}"
            self._refuse("total_bytes", "", sentence)
        if total_bytes > max(_FREE_BYTES, limits.max_total_ratio * packed_bytes):
            self._refuse(
                "total_ratio",
                "",
                f"{packed_bytes} bytes that unpack to {total_bytes}; "
                f"the limit is {limits.max_total_ratio} to 1",
            )

    def _refuse(self, kind: str, name: str, sentence: str) -> None:
        self._faults.append(ArchiveFault(kind, name, sentence))


def _is_archive_name(name: str) -> bool:
    return Path(name).suffix.lower() in _ARCHIVE_SUFFIXES


def _refuse_nested(member: Member, beginning: bytes) -> None:
    if beginning.startswith(_ARCHIVE_BEGINNINGS) or beginning[257:262] == b"ustar":
        raise MemberDamaged(member.name, "it is an archive inside the archive")
