"""A file that somebody sent becomes the draft of a dataset: read once, every fault found.

Nothing is written under a name of the sender's, and what is read is bounded before it is.
"""

import re
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final, Literal, TypeAlias

from models.archive import Archive, ArchiveLimits, Member, MemberDamaged
from models.device import thread_count
from models.picture import PictureLimits
from training.dataset_manifest import Fault, SampleRecord
from training.dataset_names import PART_FOLDERS, SKIPPED_SUFFIXES, TRAIN, is_litter
from training.dataset_report import Expectation, fault, report_of
from training.dataset_store import FILES, Draft, write_file
from training.faults import DatasetFaults
from training.label_table import LabelTable, read_label_table
from training.picture_check import SUFFIXES, PictureLook, UnusablePicture, check_picture
from training.progress import Progress

FileKind: TypeAlias = Literal["zip", "npz", "csv"]

MAX_CSV_BYTES: Final = 64 << 20
MAX_CLASSES: Final = 10_000
_AHEAD: Final = 16
"""Pictures that are decoded ahead of the one whose turn it is, per thread."""
_ARRAY: Final = re.compile(r"[xy](_train|_validation|_val|_test)?\.npy")


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of one dataset."""

    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    picture: PictureLimits = field(default_factory=PictureLimits)


@dataclass(frozen=True, slots=True)
class _Found:
    """A picture in an archive: which, and what it is a sample of."""

    member: Member
    part: str
    label: str


def take_in(
    path: Path,
    kind: FileKind,
    name: str,
    staging: Path,
    *,
    label_column: str = "",
    expected: Expectation | None = None,
    limits: IntakeLimits | None = None,
) -> Generator[Progress, None, Draft]:
    """Read `path` into `staging`.

    Args:
        path: the file, which nobody else changes.
        kind: what it is.
        name: what the dataset will be called.
        staging: an empty folder.
        label_column: of a CSV; the last one if empty.
        expected: of a model that is to see the samples.

    Yields:
        Samples read so far, in the phase `read`.

    Returns:
        The draft; its report says whether anything can be learned from it.

    Raises:
        models.archive.ArchiveError: the archive is refused.
        DatasetFaults: nothing of a dataset is in the file.
    """
    limits = limits or IntakeLimits()
    if kind == "zip":
        return (yield from _pictures(path, name, staging, label_column, expected, limits))
    return _numbers(path, kind, name, staging, label_column, limits)


def _pictures(
    path: Path,
    name: str,
    staging: Path,
    label_column: str,
    expected: Expectation | None,
    limits: IntakeLimits,
) -> Generator[Progress, None, Draft]:
    (staging / FILES).mkdir()
    with Archive(path, limits.archive) as archive:
        layout = _Layout(archive, label_column)
        samples: list[SampleRecord] = []
        refused: dict[str, list[str]] = {}
        for done, (found, result) in enumerate(_looked_at(archive, layout.found, limits), 1):
            if isinstance(result, _Sound):
                samples.append(_keep(staging, len(samples), found, result))
            else:
                refused.setdefault(result.kind, []).append(f"{found.member.name}: {result}")
            yield Progress("read", done, len(layout.found))
    faults = [*layout.faults, *_refusals(refused, len(layout.found))]
    report = report_of(samples, faults, expected, layout.classes)
    classes = tuple(report.classes)
    if len(classes) > MAX_CLASSES:
        raise DatasetFaults(name, [f"{len(classes)} classes are too many; {MAX_CLASSES} may be"])
    num_bytes = sum(sample.num_bytes for sample in samples)
    return Draft(name, "pictures", tuple(samples), classes, report, num_bytes)


class _Layout:
    """Which members are samples of what."""

    def __init__(self, archive: Archive, label_column: str) -> None:
        self.found: list[_Found] = []
        self.faults: list[Fault] = []
        self._others: list[str] = []
        self._skipped: list[str] = []
        self._litter: list[str] = []
        members = [one for one in archive.members if self._is_wanted(one.name)]
        self._top = _common_top(members)
        tables = [one for one in members if one.name.lower().endswith(".csv")]
        if len(tables) == 1:
            self._by_table(archive, tables[0], members, label_column)
        else:
            self._by_folders(members)
        folders = [self._inside(name).strip("/") for name in archive.folders if not is_litter(name)]
        named = {name for name in map(_class_of, folders) if name} if not tables else set()
        self.classes = sorted(named | {one.label for one in self.found})
        self._note("litter", "note", self._litter, "files of systems and editors are left out")
        self._note("skipped", "warning", self._skipped, "JPEG, PNG and WebP are read; left out")
        self._note("wrong_type", "warning", self._others, "files that are no pictures are left out")

    def _is_wanted(self, name: str) -> bool:
        if is_litter(name):
            self._litter.append(name)
            return False
        return True

    def _by_folders(self, members: Sequence[Member]) -> None:
        for member in members:
            folders, _, file = self._inside(member.name).rpartition("/")
            part, label = _part_and_label(folders)
            if not label:
                self._others.append(member.name)
            elif self._is_picture(member.name, file):
                self.found.append(_Found(member, part, label))

    def _by_table(
        self, archive: Archive, table: Member, members: Sequence[Member], label_column: str
    ) -> None:
        if table.num_bytes > MAX_CSV_BYTES:
            raise DatasetFaults(table.name, [f"it has more than {MAX_CSV_BYTES} bytes"])
        rows: LabelTable = read_label_table(archive.read(table), table.name, label_column)
        beside = table.name.rpartition("/")[0]
        by_name = {one.name: one for one in members}
        missing = []
        for row in rows.rows:
            member = by_name.get(f"{beside}/{row.file}".strip("/")) or by_name.get(row.file)
            if member is None:
                missing.append(f"line {row.line}: {row.file}")
            else:
                self.found.append(_Found(member, row.part, row.label))
        named = {one.member.name for one in self.found} | {table.name}
        unnamed = [one.name for one in members if one.name not in named]
        self._note("missing", "warning", missing, "the table names files that are not there")
        self._note("unlabelled", "warning", unnamed, "files that the table does not name")

    def _is_picture(self, name: str, file: str) -> bool:
        suffix = Path(file).suffix.lower()
        if suffix in SKIPPED_SUFFIXES:
            self._skipped.append(name)
            return False
        # What it is called does not matter: the first bytes will decide.
        return True

    def _inside(self, name: str) -> str:
        return name.removeprefix(self._top)

    def _note(
        self, kind: str, severity: Literal["warning", "note"], names: list[str], sentence: str
    ) -> None:
        if names:
            self.faults.append(fault(kind, severity, names, sentence))


@dataclass(frozen=True, slots=True)
class _Sound:
    data: bytes
    look: PictureLook


def _looked_at(
    archive: Archive, found: Sequence[_Found], limits: IntakeLimits
) -> Iterator[tuple[_Found, _Sound | UnusablePicture]]:
    """Each with what became of it, in order; decoded on threads, a bounded number ahead."""
    num_threads = thread_count()
    waiting: list[tuple[_Found, Future[_Sound | UnusablePicture]]] = []
    rest = iter(found)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="check pictures") as threads:
        try:
            while True:
                for one in islice(rest, _AHEAD * num_threads - len(waiting)):
                    waiting.append((one, threads.submit(_look, archive, one.member, limits)))
                if not waiting:
                    return
                first, future = waiting.pop(0)
                yield first, future.result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _look(archive: Archive, member: Member, limits: IntakeLimits) -> _Sound | UnusablePicture:
    if member.num_bytes > limits.picture.max_bytes:
        most = limits.picture.max_bytes
        return UnusablePicture("too_large", f"{member.num_bytes} bytes; {most} are allowed")
    try:
        data = archive.read(member)
        return _Sound(data, check_picture(data, limits.picture))
    except MemberDamaged as error:
        return UnusablePicture("unreadable", str(error))
    except UnusablePicture as error:
        return error


def _keep(staging: Path, position: int, found: _Found, sound: _Sound) -> SampleRecord:
    file = f"{position:08d}{SUFFIXES[sound.look.format]}"
    sha256, num_bytes = write_file(staging / FILES / file, sound.data)
    return SampleRecord(
        name=found.member.name,
        part=found.part,
        label=found.label,
        sha256=sha256,
        file=file,
        num_bytes=num_bytes,
        look=sound.look,
    )


def _refusals(refused: dict[str, list[str]], total: int) -> Iterator[Fault]:
    what = {
        "unreadable": "pictures cannot be read and are left out",
        "wrong_type": "files are no JPEG, PNG or WebP and are left out",
        "too_large": "pictures are over a limit and are left out",
    }
    for kind, names in refused.items():
        is_error = len(names) > total / 2
        sentence = f"{len(names)} {what.get(kind, 'are left out')}"
        yield fault(kind, "error" if is_error else "warning", names, sentence)


def _common_top(members: Sequence[Member]) -> str:
    """The one folder that everything lies in, unless it is a class or a part itself."""
    tops = {one.name.partition("/")[0] for one in members}
    deep = all(one.name.count("/") >= 2 for one in members)
    if len(tops) == 1 and deep and members:
        top = tops.pop()
        below = {one.name.split("/")[1] for one in members}
        if top.lower() not in PART_FOLDERS or any(name.lower() in PART_FOLDERS for name in below):
            return f"{top}/"
    # A table with pictures beside it, all of it in one folder.
    tables = [one for one in members if one.name.lower().endswith(".csv")]
    if len(tops) == 1 and len(tables) == 1 and "/" in tables[0].name:
        return f"{tops.pop()}/"
    return ""


def _part_and_label(folders: str) -> tuple[str, str]:
    """`val/bees` is (validation, bees), `bees` is (train, bees); no label where there is none."""
    names = [name for name in folders.split("/") if name]
    if names and names[0].lower() in PART_FOLDERS:
        return PART_FOLDERS[names[0].lower()], names[1] if len(names) > 1 else ""
    return TRAIN, names[0] if names else ""


def _class_of(folder: str) -> str:
    return _part_and_label(folder)[1]


def _numbers(
    path: Path,
    kind: Literal["npz", "csv"],
    name: str,
    staging: Path,
    label_column: str,
    limits: IntakeLimits,
) -> Draft:
    """Arrays and tables are kept as the one file that they are."""
    from training.stored_numbers import MAX_ARRAY_BYTES, checked_csv, checked_npz

    if kind == "csv":
        if path.stat().st_size > MAX_CSV_BYTES:
            raise DatasetFaults(name, [f"a CSV may have {MAX_CSV_BYTES} bytes"])
        return checked_csv(path, name, staging, label_column)
    arrays = replace(
        limits.archive,
        max_entries=8,
        max_member_bytes=MAX_ARRAY_BYTES,
        max_total_bytes=MAX_ARRAY_BYTES,
    )
    with Archive(path, arrays) as archive:
        unknown = [one.name for one in archive.members if not _ARRAY.fullmatch(one.name)]
        if unknown:
            known = "x.npy and y.npy, or x_train.npy, y_train.npy, …"
            raise DatasetFaults(name, [f"{one}: not one of {known}" for one in unknown[:20]])
        return checked_npz(archive, name, staging)
