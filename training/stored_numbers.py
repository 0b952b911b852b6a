"""Datasets of numbers that are kept as the one file that they came in: NPZ and CSV."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Final

import numpy as np
from numpy.lib import format as npy

from models.archive import Archive, Member
from training.arrays import read_npz
from training.dataset_manifest import Kind, SampleRecord
from training.dataset_report import report_of
from training.dataset_store import Draft, write_file
from training.faults import DatasetFaults
from training.picture_files import PictureFiles
from training.samples import digest_of
from training.source import Source
from training.table import read_csv

ARRAYS, TABLE = "data.npz", "data.csv"
MAX_ARRAY_BYTES: Final = 1 << 30
MAX_HEADER_BYTES: Final = 4096
MAX_DIMENSIONS: Final = 5
MAX_SAMPLES: Final = 1_000_000
_ROW_CHUNK: Final = 1 << 20
# numpy reads a header with Python's own tokenizer and parser.
_HEADER_ERRORS: Final = (
    *(ValueError, KeyError, EOFError, TypeError, OverflowError),
    *(SyntaxError, TokenError, RecursionError, MemoryError),
)


def checked_npz(archive: Archive, name: str, staging: Path) -> Draft:
    """The arrays of an NPZ, each looked at before memory is taken for it.

    Raises:
        DatasetFaults: all that is wrong. models.archive.MemberDamaged: a member is.
    """
    faults = [sentence for member in archive.members for sentence in _array_faults(archive, member)]
    if faults:
        raise DatasetFaults(name, faults)
    # Copied member by member, so that nothing but the arrays is kept.
    arrays = {
        member.name.removesuffix(".npy"): np.load(
            io.BytesIO(archive.read(member)), allow_pickle=False
        )
        for member in archive.members
    }
    np.savez(staging / ARRAYS, **arrays)
    return _draft(read_npz(staging / ARRAYS), "arrays", name, staging / ARRAYS)


def checked_csv(path: Path, name: str, staging: Path, label_column: str) -> Draft:
    """The rows of a CSV of numbers.

    Raises:
        DatasetFaults: all that is wrong.
    """
    write_file(staging / TABLE, lambda: _text(path, name))
    source = read_csv(staging / TABLE, label_column)
    if any(isinstance(part.samples, PictureFiles) for part in source.parts.values()):
        fault = "a CSV that names files comes as a zip together with them"
        raise DatasetFaults(name, [fault])
    if label_column:
        (staging / "label_column").write_text(label_column)
    return _draft(source, "table", name, staging / TABLE)


def _text(path: Path, name: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_ROW_CHUNK):
            if b"\0" in chunk:
                raise DatasetFaults(name, ["a NUL character is in it"])
            yield chunk


def read_numbers(folder: Path, kind: Kind) -> Source:
    """The samples of a stored dataset of numbers."""
    if kind == "arrays":
        return read_npz(folder / ARRAYS)
    column = folder / "label_column"
    return read_csv(folder / TABLE, column.read_text() if column.is_file() else "")


def _draft(source: Source, kind: Kind, name: str, path: Path) -> Draft:
    samples = tuple(_records(source))
    report = report_of(samples, known_classes=source.classes)
    return Draft(name, kind, samples, source.classes, report, path.stat().st_size)


def _records(source: Source) -> Iterator[SampleRecord]:
    for part_name, part in source.parts.items():
        for index in range(len(part)):
            sample = part.samples.read(index)[0]
            yield SampleRecord(
                name=f"{part_name} {index}",
                part=part_name,
                label=source.classes[int(part.targets[index])],
                sha256=digest_of(sample).hex(),
                num_bytes=sample.numel() * sample.element_size(),
            )


def _array_faults(archive: Archive, member: Member) -> Iterator[str]:
    """What the header of one array says that it must not; nothing of its data is read."""
    if member.num_bytes > MAX_ARRAY_BYTES:
        yield f"{member.name}: {member.num_bytes} bytes; {MAX_ARRAY_BYTES} are allowed"
        return
    start = io.BytesIO(next(archive.chunks(member), b""))
    try:
        version = npy.read_magic(start)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(start, max_header_size=MAX_HEADER_BYTES)
    except _HEADER_ERRORS as error:
        yield f"{member.name}: its header cannot be read: {str(error).splitlines()[0][:200]}"
        return
    wanted = "uib" if member.name.startswith("x") else "uibU"
    kinds = wanted + ("f" if member.name.startswith("x") else "")
    if dtype.kind not in kinds or dtype.fields is not None or dtype.byteorder == ">":
        yield f"{member.name}: arrays of {dtype} are not taken"
    elif is_fortran and len(shape) > 1:
        yield f"{member.name}: its order is Fortran's; save numpy.ascontiguousarray of it"
    elif not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape, default=0) < 1:
        yield f"{member.name}: shape {list(shape)[:8]} has no samples, or too many dimensions"
    elif shape[0] > MAX_SAMPLES:
        yield f"{member.name}: {shape[0]} samples; {MAX_SAMPLES} are allowed"
    elif start.tell() + math.prod(shape) * dtype.itemsize != member.num_bytes:
        yield f"{member.name}: shape {list(shape)} does not fit its {member.num_bytes} bytes"
