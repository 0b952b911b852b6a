"""Zip files from strangers: real ones are read, hostile ones refused by name, soon and cheaply."""

import io
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zip_forge import Forged, deflated, end64, forged, named, zip64

from models.archive import (
    Archive,
    ArchiveError,
    ArchiveLimits,
    ArchiveRefused,
    ArchiveTooLarge,
    MemberDamaged,
    NotAnArchive,
)

FULL = 0xFFFFFFFF
PICTURE = b"\x89PNG picture " * 20


def written(folder: Path, data: bytes) -> Path:
    path = folder / "upload"
    path.write_bytes(data)
    return path


def kinds_of(error: ArchiveRefused) -> set[str]:
    return {fault.kind for fault in error.faults}


def entry(name: str, **fields: object) -> bytes:
    """An archive whose second entry is at fault."""
    return forged(Forged(b"ants/0.png"), Forged(name.encode(), **fields))  # type: ignore[arg-type]


def mode(bits: int) -> dict[str, int]:
    return {"attributes": bits << 16}


def sparse_file(path: Path, num_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(num_bytes)
    return path


def quine_overlap() -> bytes:
    """A hundred entries that share the bytes of one member."""
    kernel = Forged(b"ants/1.png", b"\0" * 1000)
    return forged(kernel, *[Forged(b"ants/1.png", b"\0" * 1000, reuse=True)] * 99)


def nested_overlap() -> bytes:
    """The second member's header lies inside the first one's bytes, as in Fifield's bombs."""
    inner = forged(Forged(b"ants/2.png"))[: 30 + 10 + 7]
    return forged(Forged(b"ants/1.png", inner), Forged(b"ants/2.png", reuse=True, at=30 + 10))


def many_entries(count: int) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("a", b"")
    data = body.getvalue()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    record, last = data[start:end], bytearray(data[end:])
    size = len(record) * count
    struct.pack_into("<2H2L", last, 8, 0xFFFF, 0xFFFF, size, start)
    return data[:start] + record * count + end64(count, size, start, start + size) + bytes(last)


def lying_count() -> bytes:
    """A million entries, of which the last record admits one."""
    data = bytearray(many_entries(120_000))
    end = data.rindex(b"PK\x05\x06")
    del data[end - 76 : end]
    struct.pack_into("<2H", data, len(data) - 14, 1, 1)
    return bytes(data)


def with_zip64(**told: object) -> bytes:
    plain = forged(Forged())
    end = plain.rindex(b"PK\x05\x06")
    start = plain.index(b"PK\x01\x02")
    middle = end64(1, end - start, start, end, **told)
    return forged(Forged(), middle=middle, end={"here": 0xFFFF, "count": 0xFFFF})


HOSTILE_NAMES = {
    "parent": ("../x.png", "name_traversal"),
    "parent inside": ("ants/../../x.png", "name_traversal"),
    "dot": ("./ants/x.png", "name_traversal"),
    "empty part": ("ants//x.png", "name_traversal"),
    "absolute": ("/etc/x.png", "name_absolute"),
    "drive": ("C:/x.png", "name_drive"),
    "drive and backslash": ("C:\\x.png", "name_backslash"),
    "backslash": ("a\\..\\b.png", "name_backslash"),
    "NUL": ("a\0b.png", "name_control"),
    "newline": ("a\nb.png", "name_control"),
    "escape": ("a\x1b[2Jb.png", "name_control"),
    "bidi override": ("a\u202egnp.exe", "name_control"),
    "line separator": ("a\u2028b.png", "name_control"),
    "zero width": ("a\u200bb.png", "name_control"),
    "long": ("a" * 256, "name_length"),
    "deep": ("a/b/c/d/e/f.png", "name_depth"),
    "empty": ("", "name_empty"),
    "slash": ("/", "name_empty"),
    "exact twin": ("ants/0.png", "duplicate"),
    "twin by case": ("ANTS/0.PNG", "duplicate"),
    "file as folder": ("ants/0.png/x.png", "duplicate"),
    "folder as file": ("ants", "duplicate"),
    "zip in it": ("ants/more.zip", "nested"),
    "tar in it": ("ants/more.TAR.gz", "nested"),
}
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    **{key: (lambda name=name: entry(name), kind) for key, (name, kind) in HOSTILE_NAMES.items()},
    "NFC and NFD twins": (
        lambda: forged(*named("\u00e4/1.png", "a\u0308/1.png")),
        "duplicate",
    ),
    "sharp s twins": (lambda: forged(*named("stra\u00dfe", "STRASSE")), "duplicate"),
    "false UTF-8": (lambda: forged(Forged(b"a\xff\xfe.png", flags=1 << 11)), "name_encoding"),
    "symlink": (lambda: entry("ants/x", data=b"/etc/passwd", **mode(0o120777)), "symlink"),
    "character device": (lambda: entry("ants/x", **mode(0o020666)), "not_regular"),
    "block device": (lambda: entry("ants/x", **mode(0o060666)), "not_regular"),
    "pipe": (lambda: entry("ants/x", **mode(0o010666)), "not_regular"),
    "socket": (lambda: entry("ants/x", **mode(0o140777)), "not_regular"),
    "folder with content": (lambda: entry("ants/x/"), "not_regular"),
    "folder by mode": (lambda: entry("ants/x", **mode(0o040755)), "not_regular"),
    "encrypted": (lambda: entry("ants/x", flags=1), "encrypted"),
    "strongly encrypted": (lambda: entry("ants/x", flags=1 | 1 << 6), "encrypted"),
    "masked headers": (lambda: entry("ants/x", flags=1 << 13), "encrypted"),
    "AES": (lambda: entry("ants/x", method=99), "encrypted"),
    "bzip2": (lambda: entry("ants/x", method=12), "method"),
    "lzma": (lambda: entry("ants/x", method=14), "method"),
    "zstd": (lambda: entry("ants/x", method=93), "method"),
    "patch": (lambda: entry("ants/x", flags=1 << 5), "method"),
    "deflate bomb": (lambda: forged(Forged(data=b"\0" * 20_000_000, method=8)), "member_ratio"),
    "bomb in all": (
        lambda: forged(
            *[Forged(b"ants/%d.png" % i, b"\0" * 1_000_000, method=8) for i in range(40)]
        ),
        "total_ratio",
    ),
    "member too large": (
        lambda: entry("ants/x", central={"size": 33 << 20, "packed": 1 << 20}),
        "member_bytes",
    ),
    "4 GiB declared": (lambda: entry("ants/x", central={"size": FULL - 1}), "member_bytes"),
    "too much in all": (
        lambda: forged(
            *[
                Forged(b"%d" % i, method=8, central={"size": 30 << 20, "packed": 1 << 20})
                for i in range(280)
            ]
        ),
        "total_bytes",
    ),
    "2 EiB by zip64": (
        lambda: entry("ants/x", extra=zip64(1 << 61), central={"size": FULL}),
        "member_bytes",
    ),
    "a million entries": (lambda: many_entries(1_000_000), "entries"),
    "one entry too many": (lambda: many_entries(100_001), "entries"),
    "shared member": (quine_overlap, "overlap"),
    "nested members": (nested_overlap, "overlap"),
    "member over directory": (
        lambda: forged(
            Forged(central={"packed": 500, "size": 500}, local={"packed": 500, "size": 500})
        ),
        "overlap",
    ),
    "offset beyond end": (lambda: entry("ants/x", at=1 << 30), "local_header"),
    "offset into bytes": (lambda: entry("ants/x", at=7), "local_header"),
    "other local name": (lambda: entry("ants/x", local={"name": b"../../x"}), "local_header"),
    "other local name, same length": (
        lambda: entry("ants/x", local={"name": b"ants/y"}),
        "local_header",
    ),
    "other local size": (lambda: entry("ants/x", local={"size": 8}), "local_header"),
    "other local checksum": (lambda: entry("ants/x", local={"checksum": 8}), "local_header"),
    "other local method": (lambda: entry("ants/x", local={"method": 8}), "local_header"),
    "secretly encrypted": (lambda: entry("ants/x", local={"flags": 1}), "local_header"),
    "stored with two sizes": (
        lambda: entry("ants/x", central={"size": 70}, local={"size": 70}),
        "lying_size",
    ),
    "bytes before": (lambda: forged(Forged(), prefix=b"#!/bin/sh\n"), "prefix"),
    "zip64 field missing": (lambda: entry("ants/x", central={"size": FULL}), "zip64"),
    "zip64 field short": (
        lambda: entry("ants/x", extra=zip64(7), central={"size": FULL, "packed": FULL}),
        "zip64",
    ),
    "zip64 field twice": (
        lambda: entry("ants/x", extra=zip64(7) + zip64(9), central={"size": FULL}),
        "zip64",
    ),
    "extra field over its end": (
        lambda: entry("ants/x", extra=b"\1\0\xff\0abcdefgh", central={"size": FULL}),
        "zip64",
    ),
    "local zip64 missing": (lambda: entry("ants/x", local={"size": FULL}), "local_header"),
    "another volume": (lambda: entry("ants/x", central={"disk": 3}), "zip64"),
}
NO_ARCHIVE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"file,label\n1.png,ant\n",
    "tar": lambda: b"x" * 257 + b"ustar\0" + b"\0" * 2000,
    "cut": lambda: forged(Forged(data=PICTURE))[:-5],
    "last record only, lying": lambda: forged(end={"count": 5, "here": 5}),
    "bytes behind": lambda: forged(Forged(), suffix=b"more"),
    "shifted": lambda: b"x" * 10 + forged(Forged()),
    "bytes between": lambda: forged(Forged(), middle=b"more"),
    "several volumes": lambda: forged(Forged(), end={"disk": 1}),
    "count too small": lambda: forged(*named("1", "2"), end={"count": 1, "here": 1}),
    "count too large": lambda: forged(*named("1", "2"), end={"count": 3, "here": 3}),
    "lying count": lying_count,
    "directory of another kind": lambda: forged(Forged(central={"signature": b"PK\x01\x03"})),
    "directory size too large": lambda: forged(Forged(), end={"size": 1 << 30}),
    "directory elsewhere": lambda: forged(Forged(), end={"start": 3}),
    "zip64 record missing": lambda: forged(Forged(), end={"start": FULL}),
    "zip64 record elsewhere": lambda: with_zip64(where=3),
    "zip64 record damaged": lambda: with_zip64(signature=b"PK\x06\x05"),
    "zip64 record too long": lambda: with_zip64(length=1 << 40),
    "zip64 on several volumes": lambda: with_zip64(disks=2),
    "zip64 contradicts": lambda: forged(Forged(), middle=end64(2, 57, 47, 104)),
    "a comment with a record": lambda: forged(
        Forged(), comment=b"PK\x05\x06" + b"\0" * 16 + b"\4\0abcd"
    ),
}
DAMAGED: dict[str, Callable[[], bytes]] = {
    "stored, checksum": lambda: entry("ants/x", packed=b"forgery"),
    "deflated, checksum": lambda: entry(
        "x", data=PICTURE, method=8, packed=deflated(b"!" + PICTURE[1:])
    ),
    "more than declared": lambda: entry(
        "x",
        data=PICTURE,
        method=8,
        packed=(more := deflated(PICTURE * 9)),
        central={"packed": len(more)},
        local={"packed": len(more)},
    ),
    "fewer than declared": lambda: entry(
        "x",
        data=PICTURE,
        method=8,
        packed=(less := deflated(b"few")),
        central={"packed": len(less)},
        local={"packed": len(less)},
    ),
    "bytes behind the end": lambda: entry(
        "x",
        data=PICTURE,
        method=8,
        packed=(tail := deflated(PICTURE) + b"secret"),
        central={"packed": len(tail)},
        local={"packed": len(tail)},
    ),
    "no deflate": lambda: entry("x", data=PICTURE, method=8, packed=b"\xff" * 999),
    "deflate cut": lambda: entry(
        "x", data=PICTURE, method=8, central={"packed": 9}, local={"packed": 9}
    ),
    "zip under another name": lambda: entry("x.png", data=forged(Forged())),
    "gzip under another name": lambda: entry("x.png", data=b"\x1f\x8b\x08" + b"0" * 50),
    "tar under another name": lambda: entry("x.png", data=b"0" * 257 + b"ustar\0"),
}


def read_whole(path: Path) -> None:
    with Archive(path) as archive:
        for member in archive.members:
            for _ in archive.chunks(member):
                pass


def refused(path: Path) -> ArchiveError:
    """The error that opening or reading the archive at `path` raises, within two seconds."""
    started = time.monotonic()
    with pytest.raises(ArchiveError) as caught:
        read_whole(path)
    assert time.monotonic() - started < 2
    return caught.value


def test_the_corpus_has_more_than_forty_archives() -> None:
    assert len(HOSTILE) + len(NO_ARCHIVE) + len(DAMAGED) >= 100


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_by_name(tmp_path: Path, case: str) -> None:
    build, kind = HOSTILE[case]
    error = refused(written(tmp_path, build()))
    assert isinstance(error, ArchiveRefused)
    assert kind in kinds_of(error)
    assert str(error).isprintable()


@pytest.mark.parametrize("case", NO_ARCHIVE)
def test_what_is_no_archive_is_refused(tmp_path: Path, case: str) -> None:
    assert isinstance(refused(written(tmp_path, NO_ARCHIVE[case]())), NotAnArchive)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_member_that_lies_is_refused_while_it_is_read(tmp_path: Path, case: str) -> None:
    error = refused(written(tmp_path, DAMAGED[case]()))
    assert isinstance(error, MemberDamaged)
    assert error.name.startswith(("ants/x", "x"))


@pytest.mark.parametrize(
    "case", ["deflate bomb", "2 EiB by zip64", "shared member", "a million entries"]
)
def test_refusing_takes_little_memory(tmp_path: Path, case: str) -> None:
    path = written(tmp_path, HOSTILE[case][0]())
    tracemalloc.start()
    refused(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_bomb_under_the_ratio_is_held_to_its_word(tmp_path: Path) -> None:
    """Fewer bytes are declared than the stream has: it is stopped there, not at its end."""
    bomb = deflated(b"\0" * 50_000_000)
    sizes = {"size": 1000, "packed": len(bomb)}
    data = entry("x", data=b"\0" * 1000, method=8, packed=bomb, central=sizes, local=sizes)
    with Archive(written(tmp_path, data)) as archive:
        chunks = archive.chunks(archive.members[1])
        with pytest.raises(MemberDamaged, match="more than the 1000 bytes"):
            next(chunks)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    data = forged(
        Forged(b"../a"), Forged(b"b", **mode(0o120777)), Forged(b"c.zip"), Forged(b"d", flags=1)
    )
    error = refused(written(tmp_path, data))
    assert isinstance(error, ArchiveRefused)
    assert kinds_of(error) == {"name_traversal", "symlink", "nested", "encrypted"}
    assert "'../a': " in str(error)


def test_what_is_only_too_large_is_told_apart(tmp_path: Path) -> None:
    assert isinstance(refused(written(tmp_path, HOSTILE["deflate bomb"][0]())), ArchiveTooLarge)
    large = sparse_file(tmp_path / "large", (2 << 30) + 1)
    assert isinstance(refused(large), ArchiveTooLarge)


def test_limits_hold_to_the_entry_and_the_byte(tmp_path: Path) -> None:
    path = written(tmp_path, forged(*named("1", "2", "3")))
    with Archive(path, ArchiveLimits(max_entries=3, max_member_bytes=7, max_total_bytes=21)) as one:
        assert len(one.members) == 3
    for limits in (
        ArchiveLimits(max_entries=2),
        ArchiveLimits(max_member_bytes=6),
        ArchiveLimits(max_total_bytes=20),
        ArchiveLimits(max_bytes=path.stat().st_size - 1),
    ):
        with pytest.raises(ArchiveTooLarge):
            Archive(path, limits)


def test_a_link_in_place_of_the_archive_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path, forged(Forged())))
    with pytest.raises(OSError, match="symbolic"):
        Archive(tmp_path / "link")


class Unseekable(io.BytesIO):
    """Makes `zipfile` write sizes behind the members, as tools do that stream."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise OSError

    def seek(self, *_: object) -> int:
        raise OSError


def real_archive(file: io.BytesIO, force_zip64: bool = False) -> bytes:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/", b"")
        for name in ("train/ants/\u00e4.png", "train/bees/1.png"):
            with archive.open(name, "w", force_zip64=force_zip64) as member:
                member.write(name.encode() * 1000)
        archive.writestr("train/bees/stored.png", PICTURE, zipfile.ZIP_STORED)
        archive.comment = b"made by hand"
    return file.getvalue()


@pytest.mark.parametrize("force_zip64", [False, True])
@pytest.mark.parametrize("file", [io.BytesIO, Unseekable])
def test_real_archives_are_read(
    tmp_path: Path, file: Callable[[], io.BytesIO], force_zip64: bool
) -> None:
    with Archive(written(tmp_path, real_archive(file(), force_zip64))) as archive:
        read = {member.name: archive.read(member) for member in archive.members}
    assert read["train/ants/\u00e4.png"] == "train/ants/\u00e4.png".encode() * 1000
    assert read["train/bees/stored.png"] == PICTURE
    assert len(read) == 3


@pytest.mark.slow
def test_more_entries_than_fit_sixteen_bits_are_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(70_000):
            archive.writestr(f"{number % 9}/{number}.png", b"")
    with Archive(written(tmp_path, file.getvalue())) as opened:
        assert len(opened.members) == 70_000


def test_names_of_old_tools_and_of_every_script_are_read(tmp_path: Path) -> None:
    persian = "\u0645\u06cc\u200c\u0634\u0648\u062f.png"
    data = forged(Forged(b"k\x84fer.png"), Forged(persian.encode()))
    with Archive(written(tmp_path, data)) as archive:
        assert [member.name for member in archive.members] == ["k\u00e4fer.png", persian]


def test_a_column_of_equal_labels_may_be_packed_well(tmp_path: Path) -> None:
    data = forged(Forged(b"y.npy", b"\0" * 500_000, method=8))
    with Archive(written(tmp_path, data)) as archive:
        assert archive.read(archive.members[0]) == b"\0" * 500_000


REAL = real_archive(io.BytesIO())


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), num_changes=st.integers(1, 6), cut=st.integers(0, 40))
def test_a_mutated_archive_gives_named_errors_or_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_changes: int, cut: int
) -> None:
    """Whatever is changed, nothing but the named errors; and never bytes that were not there."""
    rng = random.Random(seed)
    data = bytearray(REAL)
    headers = [at for at in range(len(data)) if data[at : at + 2] == b"PK"]
    for _ in range(num_changes):
        at = (
            rng.choice(headers) + rng.randrange(64)
            if rng.random() < 0.8
            else rng.randrange(len(data))
        )
        data[min(at, len(data) - 1)] = rng.choice((0, 1, 8, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if cut > 35:
        del data[rng.randrange(len(data)) :]
    contents = {b"train/bees/1.png" * 1000, "train/ants/\u00e4.png".encode() * 1000, PICTURE}
    try:
        with Archive(written(tmp_path_factory.getbasetemp(), bytes(data))) as archive:
            for member in archive.members:
                assert archive.read(member) in contents
    except ArchiveError:
        pass


def test_python_reads_the_same_where_both_read(tmp_path: Path) -> None:
    """A second opinion: of what passes here, `zipfile` sees the same names, sizes and bytes."""
    for seed in range(200):
        rng = random.Random(seed)
        data = bytearray(REAL)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            with Archive(written(tmp_path, bytes(data))) as archive:
                ours = {member.name: archive.read(member) for member in archive.members}
        except ArchiveError:
            continue
        try:
            theirs = zipfile.ZipFile(io.BytesIO(bytes(data)))
        except NotImplementedError:
            continue  # it asks for a newer reader, and needs none
        with theirs:
            names = [name for name in theirs.namelist() if not name.endswith("/")]
            assert [theirs.read(name) for name in names] == list(ours.values())
