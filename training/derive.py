"""One dataset made of another: samples dropped, relabelled, moved, added; files shared on disk."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from models.picture import PictureLimits
from training.dataset_manifest import SampleRecord
from training.dataset_names import PARTS, label_fault
from training.dataset_report import Expectation, concerned, report_of
from training.dataset_store import FILES, Draft, StoredDataset, write_file
from training.faults import DatasetError
from training.picture_check import SUFFIXES, UnusablePicture, check_picture
from training.progress import Progress

MAX_CHANGES: Final = 100_000


class ChangeRefused(DatasetError):
    """A change names what is not there, or cannot be made."""


@dataclass(frozen=True)
class Addition:
    """A picture to add."""

    name: str
    label: str
    part: str
    data: bytes


@dataclass(frozen=True)
class Changes:
    """What to change.

    Attributes:
        drop: names or sha256 of samples that go.
        drop_faults: kinds of faults whose samples go; of duplicates one of each stays.
        relabel: name or sha256 of a sample -> its label from now on.
        rename: class -> its name from now on; two that get one name become one.
        move: name or sha256 of a sample -> the part it belongs to from now on.
        add: pictures.
    """

    drop: Sequence[str] = ()
    drop_faults: Sequence[str] = ()
    relabel: Mapping[str, str] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    move: Mapping[str, str] = field(default_factory=dict)
    add: Sequence[Addition] = ()


def derive(
    base: StoredDataset,
    changes: Changes,
    staging: Path,
    name: str,
    expected: Expectation | None = None,
    limits: PictureLimits | None = None,
) -> Generator[Progress, None, Draft]:
    """The draft of `base` with `changes`, in `staging`.

    Yields:
        Samples done so far, in the phase `read`.

    Raises:
        ChangeRefused: all that cannot be done.
        training.picture_check.UnusablePicture: an added file is no picture.
    """
    are_numbers = base.manifest.kind != "pictures"
    if are_numbers and changes.add:
        raise ChangeRefused(
            f"{base.id} holds numbers, to which no picture can be added; rows can be dropped, "
            "relabelled, renamed and moved, and more of them come as a whole file"
        )
    before = base.samples()
    _check(before, changes)
    dropped, faulty = set(changes.drop), _faulty(base, before, changes.drop_faults)
    staying = [
        (position, _changed(one, changes))
        for position, one in enumerate(before)
        if not (one.name in dropped or one.sha256 in dropped or position in faulty)
    ]
    if are_numbers:
        from training.derive_numbers import rewritten  # which takes torch

        yield Progress("read", 0, len(staying))
        return rewritten(base, staying, staging, name)
    kept = [one for _, one in staying]
    (staging / FILES).mkdir()
    records: list[SampleRecord] = []
    total = len(kept) + len(changes.add)
    for one in kept:
        records.append(_carried(base, one, staging, len(records)))
        yield Progress("read", len(records), total)
    for addition in changes.add:
        records.append(_added(addition, staging, len(records), limits))
        yield Progress("read", len(records), total)
    report = report_of(records, expected=expected)
    num_bytes = sum(one.num_bytes for one in records)
    classes = tuple(report.classes)
    return Draft(name, "pictures", tuple(records), classes, report, num_bytes, parent=base.id)


def _check(samples: Sequence[SampleRecord], changes: Changes) -> None:
    known = {one.name for one in samples} | {one.sha256 for one in samples}
    named = [*changes.drop, *changes.relabel, *changes.move]
    faults = [f"there is no sample {one[:100]!r}" for one in named if one not in known]
    labels = {one.label for one in samples}
    faults += [f"there is no class {one[:100]!r}" for one in changes.rename if one not in labels]
    parts = [*changes.move.values(), *(one.part for one in changes.add)]
    faults += [f"{one[:40]!r} is none of {', '.join(PARTS)}" for one in parts if one not in PARTS]
    new_labels = [*changes.relabel.values(), *changes.rename.values()]
    new_labels += [one.label for one in changes.add]
    faults += [sentence for one in new_labels if (sentence := label_fault(one))]
    faults += [
        f"{one[:100]!r} is added twice, or there already" for one in _taken(samples, changes)
    ]
    if len(named) > MAX_CHANGES:
        faults.append(f"{len(named)} changes are too many; {MAX_CHANGES} may be")
    if faults:
        raise ChangeRefused("; ".join(faults[:20]))


def _taken(samples: Sequence[SampleRecord], changes: Changes) -> Iterator[str]:
    """Names of additions that are another sample's."""
    names = {one.name for one in samples} - set(changes.drop)
    for one in changes.add:
        if one.name in names:
            yield one.name
        names.add(one.name)


def _faulty(base: StoredDataset, samples: Sequence[SampleRecord], kinds: Sequence[str]) -> set[int]:
    """Positions of the samples that must go so that faults of these kinds are gone."""
    faults = {one.kind: one for one in base.manifest.report.faults}
    unknown = [kind for kind in kinds if kind not in faults]
    if unknown:
        known = ", ".join(sorted(faults)) or "none"
        raise ChangeRefused(f"its report has no fault {unknown[0][:60]!r}; it has {known}")
    going: set[int] = set()
    for kind in kinds:
        found = concerned(samples, kind)
        if found is None:
            names = set(faults[kind].files)
            found = [one for one in samples if one.name in names]
        chosen = {id(one) for one in found}  # a table may name one file twice
        going.update(at for at, one in enumerate(samples) if id(one) in chosen)
    return going


def _changed(sample: SampleRecord, changes: Changes) -> SampleRecord:
    relabel, rename, move = changes.relabel, changes.rename, changes.move
    label = rename.get(sample.label, sample.label)
    label = relabel.get(sample.name, relabel.get(sample.sha256, label))
    part = move.get(sample.name, move.get(sample.sha256, sample.part))
    return sample.model_copy(update={"label": label, "part": part})


def _carried(
    base: StoredDataset, sample: SampleRecord, staging: Path, position: int
) -> SampleRecord:
    file = f"{position:08d}{Path(str(sample.file)).suffix}"
    try:
        os.link(base.file(sample), staging / FILES / file)
    except OSError:  # another disk, or one without hard links
        write_file(staging / FILES / file, base.file(sample).read_bytes())
    return sample.model_copy(update={"file": file})


def _added(
    addition: Addition, staging: Path, position: int, limits: PictureLimits | None
) -> SampleRecord:
    try:
        look = check_picture(addition.data, limits)
    except UnusablePicture as error:
        raise UnusablePicture(error.kind, f"{addition.name}: {error}") from None
    file = f"{position:08d}{SUFFIXES[look.format]}"
    sha256, num_bytes = write_file(staging / FILES / file, addition.data)
    return SampleRecord(
        name=addition.name,
        part=addition.part,
        label=addition.label,
        sha256=sha256,
        file=file,
        num_bytes=num_bytes,
        look=look,
    )
