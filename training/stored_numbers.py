"""Datasets of numbers that are kept as the one file that they came in: NPZ and CSV."""

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final

from numpy.lib import format as npy

from models.archive import Archive, Member
from models.sync import sync_file
from training.arrays import read_npz
from training.dataset_manifest import Kind, SampleRecord
from training.dataset_names import label_fault
from training.dataset_report import report_of
from training.dataset_store import Draft, write_file
from training.faults import DatasetFaults
from training.samples import InMemory, digest_of
from training.source import Part, Source
from training.table import read_csv

ARRAYS, TABLE, LABEL_COLUMN = "data.npz", "data.csv", "label_column"
MAX_ARRAY_BYTES: Final = 1 << 30
MAX_HEADER_BYTES: Final = 4096
MAX_DIMENSIONS: Final = 5
MAX_SAMPLES: Final = 200_000
"""Each is a record of about a kilobyte while the dataset is checked."""
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
    # Copied member by member and piece by piece, so that nothing but the arrays is kept.
    with zipfile.ZipFile(staging / ARRAYS, "w") as copy:
        for member in archive.members:
            with copy.open(zipfile.ZipInfo(member.name), "w", force_zip64=True) as file:
                for chunk in archive.chunks(member):
                    file.write(chunk)
    sync_file(staging / ARRAYS)
    return numbers_draft(name, lambda: read_npz(staging / ARRAYS), "arrays", staging / ARRAYS)


def checked_csv(path: Path, name: str, staging: Path, label_column: str) -> Draft:
    """The rows of a CSV of numbers.

    Raises:
        DatasetFaults: all that is wrong.
    """
    write_file(staging / TABLE, lambda: _text(path, name))
    if label_column:
        write_file(staging / LABEL_COLUMN, label_column.encode())
    return numbers_draft(
        name,
        lambda: read_csv(staging / TABLE, label_column, only_numbers=True, max_rows=MAX_SAMPLES),
        "table",
        staging / TABLE,
    )


def _text(path: Path, name: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_ROW_CHUNK):
            if b"\0" in chunk:
                raise DatasetFaults(name, ["a NUL character is in it"])
            yield chunk


def read_numbers(folder: Path, kind: Kind) -> Source:
    """The samples of a stored dataset of numbers, under the names that its list gives them."""
    if kind == "arrays":
        return _with_names(read_npz(folder / ARRAYS))
    column = folder / LABEL_COLUMN
    label_column = column.read_text("utf-8") if column.is_file() else ""
    return _with_names(
        read_csv(folder / TABLE, label_column, only_numbers=True, max_rows=MAX_SAMPLES)
    )


def _with_names(source: Source) -> Source:
    parts = {
        name: Part(replace(part.samples, names=_names(name, len(part))), part.targets)
        for name, part in source.parts.items()
        if isinstance(part.samples, InMemory)
    }
    return replace(source, parts=parts)


def _names(part: str, count: int) -> list[str]:
    return [f"{part} {index}" for index in range(count)]


def numbers_draft(name: str, read: Callable[[], Source], kind: Kind, path: Path) -> Draft:
    """The draft of what `read` gives from the file at `path`.

    Raises:
        DatasetFaults: all that is wrong, told of `name` and not of a path of ours.
    """
    try:
        source = read()
    except DatasetFaults as error:
        raise DatasetFaults(name, error.faults) from None
    wrong = [sentence for label in source.classes if (sentence := label_fault(label))]
    if wrong:
        raise DatasetFaults(name, wrong)
    samples = tuple(_records(source))
    report = report_of(samples, known_classes=source.classes)
    return Draft(name, kind, samples, source.classes, report, path.stat().st_size)


def _records(source: Source) -> Iterator[SampleRecord]:
    for part_name, part in source.parts.items():
        for index, name in enumerate(_names(part_name, len(part))):
            sample = part.samples.read(index)[0]
            yield SampleRecord(
                name=name,
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
        why = str(error).partition("\n")[0][:200] or type(error).__name__
        yield f"{member.name}: its header cannot be read: {why}"
        return
    if sentence := _header_fault(member, shape, is_fortran, dtype, start.tell()):
        yield f"{member.name}: {sentence}"


def _header_fault(
    member: Member, shape: tuple[int, ...], is_fortran: bool, dtype: Any, header_bytes: int
) -> str:
    kinds = "uibf" if member.name.startswith("x") else "uibU"
    if dtype.kind not in kinds or dtype.fields is not None or dtype.byteorder == ">":
        return f"arrays of {str(dtype)[:80]} are not taken"
    if is_fortran and len(shape) > 1:
        return "its order is Fortran's; save numpy.ascontiguousarray of it"
    if any(type(one) is not int for one in shape):
        return "its shape is not of whole numbers"
    if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
        return f"shape {list(shape)[:8]} has no samples, or too many dimensions"
    if shape[0] > MAX_SAMPLES:
        return f"{shape[0]} samples; {MAX_SAMPLES} are allowed"
    if header_bytes + math.prod(shape) * dtype.itemsize != member.num_bytes:
        return f"shape {list(shape)} does not fit its {member.num_bytes} bytes"
    return ""
