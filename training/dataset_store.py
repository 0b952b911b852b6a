"""Datasets that somebody sent: folders below one, checked, complete or absent. Imports no torch.

    <store>/dset-1f0c…/manifest.json   what it is and what was found in it, written last
    <store>/dset-1f0c…/samples.json    every sample: name, part, label, digest, how it looks
    <store>/dset-1f0c…/samples/…       the pictures, under names of ours; or `data.npz`, `data.csv`
    <store>/keys/…                     idempotency keys that led to a dataset

An id is made of the fingerprint, so the same samples are the same dataset, however often and in
whatever order they are sent.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from models.file_lock import locked
from models.staging import new_name, staging_folder, sweep
from models.store_error import StoreBusy
from models.sync import sync_folder
from training.dataset_manifest import (
    DatasetManifest,
    DatasetReport,
    Kind,
    SampleRecord,
    Samples,
)
from training.faults import DatasetError

MANIFEST: Final = "manifest.json"
SAMPLES: Final = "samples.json"
FILES: Final = "samples"
_KEYS: Final = "keys"
_ID: Final = re.compile(r"dset-[0-9a-f]{24}")
MAX_SAMPLES_BYTES: Final = 1 << 28
LOCK_TIMEOUT_S: Final = 60.0


class DatasetUnknown(DatasetError):
    """There is no dataset of this id."""


class DatasetDamaged(DatasetError):
    """What rests on disk is not what was stored."""


class DatasetRefused(DatasetError):
    """It is stored, and its report says why nothing can be learned from it."""


class KeyReused(DatasetError):
    """An idempotency key that led to other bytes before."""


@dataclass(frozen=True)
class Draft:
    """A dataset in a staging folder, ready to be published.

    Attributes:
        samples: all of them; files below `samples/` are in the folder.
        num_bytes: of all files.
    """

    name: str
    kind: Kind
    samples: tuple[SampleRecord, ...]
    classes: tuple[str, ...]
    report: DatasetReport
    num_bytes: int
    parent: str | None = None


@dataclass(frozen=True)
class StoredDataset:
    """One dataset and where it lies."""

    folder: Path
    manifest: DatasetManifest

    @property
    def id(self) -> str:
        """Its id."""
        return self.manifest.id

    def samples(self) -> tuple[SampleRecord, ...]:
        """Every sample, read from disk at each call.

        Raises:
            DatasetDamaged: the list is missing or was changed.
        """
        try:
            text = (self.folder / SAMPLES).read_bytes()
            found = Samples.model_validate_json(text).samples
        except (OSError, ValidationError):
            raise DatasetDamaged(f"{self.id}: {SAMPLES} cannot be read") from None
        if fingerprint_of(self.manifest.kind, found) != self.manifest.fingerprint:
            raise DatasetDamaged(f"{self.id}: {SAMPLES} was changed after it was stored")
        return found

    def file(self, sample: SampleRecord) -> Path:
        """Where the picture of `sample` lies."""
        return self.folder / FILES / str(sample.file)

    def picture(self, position: int) -> Path | None:
        """Where the picture of the sample at `position` lies, without reading the list of all."""
        if not 0 <= position < self.manifest.num_samples:
            return None
        return next((self.folder / FILES).glob(f"{position:08d}.*"), None)

    def check_usable(self) -> None:
        """Raise DatasetRefused where its report holds an error."""
        if not self.manifest.report.usable:
            errors = [one for one in self.manifest.report.faults if one.severity == "error"]
            raise DatasetRefused(f"{self.id} cannot be used: {errors[0].sentence}")


class DatasetStore:
    """Datasets in one folder, made when something is first stored; any process may use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> list[str]:
        """Every dataset, newest first."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if _ID.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        made = {entry.name: _made(Path(entry.path)) for entry in entries}
        return sorted(made, key=lambda name: (-made[name], name))

    def get(self, dataset_id: str) -> StoredDataset:
        """The dataset of this id.

        Raises:
            DatasetUnknown: the sentence lists the nearest. DatasetDamaged: it cannot be read.
        """
        folder = self.folder / dataset_id
        if not _ID.fullmatch(dataset_id) or not (folder / MANIFEST).is_file():
            near = difflib.get_close_matches(dataset_id, self.ids()[:1000], n=3, cutoff=0.5)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise DatasetUnknown(f"there is no dataset {dataset_id[:80]!r}{hint}")
        return stored_in(folder)

    def by_key(self, key: str, digest: str) -> StoredDataset | None:
        """What was stored under an idempotency key, if it still is.

        Args:
            digest: of the request; the same key with another is an error.

        Raises:
            KeyReused: the key came with another request before.
        """
        try:
            known, _, dataset_id = self._key_path(key).read_text().strip().partition(" ")
        except FileNotFoundError:
            return None
        if known != digest:
            raise KeyReused("this Idempotency-Key was used with another request before")
        with contextlib.suppress(DatasetUnknown):
            return self.get(dataset_id)
        return None

    def keep_key(self, key: str, digest: str, dataset_id: str) -> None:
        """Let the next request with this key lead to `dataset_id`."""
        path = self._key_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = new_name(path.parent)
        _write(aside, f"{digest} {dataset_id}\n".encode())
        os.replace(aside, path)
        sync_folder(path.parent)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the store's disk; what is left in it at the end is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(self.folder, self._locked()) as folder:
            yield folder

    def publish(self, staging: Path, draft: Draft, *, by: str = "local") -> StoredDataset:
        """Store the draft whose files lie in `staging`; the same samples give what is there."""
        fingerprint = fingerprint_of(draft.kind, draft.samples)
        manifest = DatasetManifest(
            id=f"dset-{fingerprint[:24]}",
            name=draft.name,
            kind=draft.kind,
            by=by,
            parent=draft.parent,
            classes=draft.classes,
            num_samples=len(draft.samples),
            num_bytes=draft.num_bytes,
            fingerprint=fingerprint,
            report=draft.report,
        )
        samples = Samples(samples=draft.samples)
        _write(staging / SAMPLES, samples.model_dump_json().encode())
        if (staging / FILES).is_dir():
            sync_folder(staging / FILES)
        _write(staging / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
        sync_folder(staging)
        final = self.folder / manifest.id
        with self._locked():
            if not (final / MANIFEST).is_file():
                staging.rename(final)
                sync_folder(self.folder)
        return stored_in(final)

    def delete(self, dataset_id: str) -> None:
        """Remove a dataset; raises as `get`, except that a damaged one can be removed."""
        with contextlib.suppress(DatasetDamaged):
            self.get(dataset_id)  # before a lock is made where there is no store yet
        with self._locked():
            with contextlib.suppress(DatasetDamaged):
                self.get(dataset_id)
            doomed = new_name(self.folder)
            (self.folder / dataset_id).rename(doomed)
            sync_folder(self.folder)
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what dead writers left behind."""
        if self.folder.is_dir():
            with self._locked():
                sweep(self.folder)

    def _key_path(self, key: str) -> Path:
        return self.folder / _KEYS / hashlib.sha256(key.encode()).hexdigest()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self.folder / ".lock", LOCK_TIMEOUT_S):
                yield
        except TimeoutError:
            raise StoreBusy(
                f"another process has been changing the datasets for {LOCK_TIMEOUT_S:g} s"
            ) from None


def stored_in(folder: Path) -> StoredDataset:
    """The dataset that lies in `folder`.

    Raises:
        DatasetDamaged: its manifest cannot be read.
    """
    try:
        manifest = DatasetManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        raise DatasetDamaged(f"{folder.name}: {MANIFEST} cannot be read") from None
    return StoredDataset(folder, manifest)


def is_stored(folder: Path) -> bool:
    """Whether a stored dataset lies in `folder`."""
    return _ID.fullmatch(folder.name) is not None and (folder / SAMPLES).is_file()


def fingerprint_of(kind: Kind, samples: Sequence[SampleRecord]) -> str:
    """Hex sha256 that depends neither on names nor on the order of the samples."""
    # As JSON, so that no label can look like the end of its line and the begin of another.
    lines = sorted(json.dumps([one.sha256, one.part, one.label]) for one in samples)
    return hashlib.sha256("\n".join([kind, *lines]).encode()).hexdigest()


def write_file(path: Path, chunks: Callable[[], Iterator[bytes]] | bytes) -> tuple[str, int]:
    """Write a new file and sync it; returns its sha256 in hex and its size in bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o644), "wb") as file:
        for chunk in (chunks,) if isinstance(chunks, bytes) else chunks():
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), num_bytes


def _write(path: Path, data: bytes) -> None:
    write_file(path, data)


def _made(folder: Path) -> float:
    try:
        return (folder / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
