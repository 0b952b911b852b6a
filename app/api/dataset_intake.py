"""Datasets on their way in: a few files at a time, each checked on a thread of its own."""

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request

from app.api.caller import WhileCallerWaits
from app.api.upload import Upload, receive_file
from app.errors import (
    BadInput,
    Conflict,
    DeadlineExceeded,
    MediaTypeRefused,
    NotFound,
    Overloaded,
)
from models.archive import ArchiveLimits
from models.picture import PictureLimits
from models.preprocessing import Preprocessing
from models.store import ModelStore
from training.dataset_report import Expectation
from training.dataset_store import (
    DatasetDamaged,
    DatasetStore,
    DatasetUnknown,
    Draft,
    KeyReused,
    StoredDataset,
)
from training.derive import ChangeRefused, Changes, derive
from training.faults import DatasetFaults
from training.intake import FileKind, IntakeLimits, take_in
from training.picture_check import UnusablePicture
from training.progress import Progress

KINDS: Final[dict[str, FileKind]] = {
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
    "text/csv": "csv",
    "application/csv": "csv",
    "application/x-npz": "npz",
}
SUFFIXES: Final[dict[str, FileKind]] = {".zip": "zip", ".csv": "csv", ".npz": "npz"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the sender says of a file.

    Attributes:
        name: what to call it; the file's name if empty.
        label_column: of a CSV.
        model: that is to see it.
    """

    name: str
    label_column: str
    model: str

    def completed(self, upload: Upload) -> "Wanted":
        """With what stands in the form."""
        name = upload.fields.get("name") or self.name or upload.file_name
        column = upload.fields.get("label_column", self.label_column)
        return replace(self, name=name[:255], label_column=column[:255])

    def digest(self, sha256: str) -> str:
        """Of the whole request, for an idempotency key."""
        parts = (sha256, self.name, self.label_column, self.model)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """Bounds; see the settings of these names."""

    max_dataset_bytes: int
    max_checks: int
    picture: PictureLimits
    check_timeout_s: float = 600.0


class Intake:
    """Checks what comes in, a few files at a time, each on a thread of its own."""

    def __init__(self, folder: Path, models: ModelStore, options: DatasetOptions) -> None:
        self.store, self.models, self.options = DatasetStore(folder), models, options
        self._running = 0
        self._threads = ThreadPoolExecutor(options.max_checks, thread_name_prefix="datasets")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the few places.

        Raises:
            Overloaded: all are taken.
        """
        if self._running >= self.options.max_checks:
            raise Overloaded(
                f"{self._running} datasets are being received already; send this again later",
                retry_after_s=5.0,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def run(
        self, request: Request, work: Callable[[threading.Event], StoredDataset]
    ) -> StoredDataset:
        """What `work` gives, on a thread; it is told when nobody waits any more.

        Raises:
            DeadlineExceeded: it took too long. CallerGone: the sender of `request` has left.
        """
        limit_s = self.options.check_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                with WhileCallerWaits(request.receive):
                    return await self._run(work)
        except TimeoutError:
            raise DeadlineExceeded(
                f"checking took more than {limit_s:g} s; send the dataset in smaller pieces"
            ) from None

    async def _run(self, work: Callable[[threading.Event], StoredDataset]) -> StoredDataset:
        given_up = threading.Event()
        done = asyncio.get_running_loop().run_in_executor(self._threads, work, given_up)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            given_up.set()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await done
            raise

    def expectation(self, model: str) -> Expectation | None:
        """What `model`, if one is named, sees; reads the disk."""
        if not model:
            return None
        return expectation_of(self.models.resolve(model).manifest().preprocessing)

    async def receive(
        self, request: Request, wanted: Wanted, key: str | None, by: str
    ) -> tuple[StoredDataset, bool]:
        """Store the file in the body of `request`; says whether it is new here.

        Raises:
            As `app.api.upload.receive_file` and what `told` names.
        """
        await asyncio.to_thread(self.expectation, wanted.model)  # unknown, before the body
        async with self.arriving(request) as upload:
            wanted = wanted.completed(upload)
            digest = wanted.digest(upload.sha256)
            if key is not None:
                known = await asyncio.to_thread(self.store.by_key, key, digest)
                if known is not None:
                    return known, False
            before = await asyncio.to_thread(self.store.ids)
            stored = await self.check(request, upload, wanted, by, self.store)
        if key is not None:
            await asyncio.to_thread(self.store.keep_key, key, digest, stored.id)
        return stored, stored.id not in before

    @contextlib.asynccontextmanager
    async def arriving(self, request: Request) -> AsyncIterator[Upload]:
        """The file in the body of `request`, on disk until the block ends.

        Raises:
            As `app.api.upload.receive_file`.
        """
        async with staging_in(self.store) as arrival:
            yield await receive_file(request, arrival / "upload", self.options.max_dataset_bytes)

    async def check(
        self, request: Request, upload: Upload, wanted: Wanted, by: str, kept_in: DatasetStore
    ) -> StoredDataset:
        """What has arrived as a dataset of `kept_in`; raises what `run` does and `told` names."""
        expected = await asyncio.to_thread(self.expectation, wanted.model)
        # A folder beside that of the file: what a killed server leaves of either is swept.
        async with staging_in(kept_in) as staging:

            def work(given_up: threading.Event) -> StoredDataset:
                draft = _driven(self._take_in(upload, wanted, staging, expected), given_up)
                return _as_told(kept_in.publish(staging, draft, by=by), draft)

            return await self.run(request, work)

    async def derive(
        self, request: Request, dataset_id: str, changes: Changes, name: str | None, by: str
    ) -> StoredDataset:
        """Store a changed copy of a dataset; raises what `told` names."""
        base = await asyncio.to_thread(self.store.get, dataset_id)
        async with staging_in(self.store) as staging:

            def work(given_up: threading.Event) -> StoredDataset:
                called = name or base.manifest.name
                limits = self.options.picture
                draft = _driven(derive(base, changes, staging, called, limits=limits), given_up)
                return _as_told(self.store.publish(staging, draft, by=by), draft)

            return await self.run(request, work)

    def _take_in(
        self, upload: Upload, wanted: Wanted, staging: Path, expected: Expectation | None
    ) -> Generator[Progress, None, Draft]:
        return take_in(
            upload.path,
            kind_of(upload),
            wanted.name or "unnamed",
            staging,
            label_column=wanted.label_column,
            expected=expected,
            limits=_limits(self.options),
        )

    def close(self) -> None:
        """Take no more; what runs is given up with its request."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _as_told(stored: StoredDataset, draft: Draft) -> StoredDataset:
    """With the report on what was just sent, also where the same samples were there before."""
    manifest = stored.manifest.model_copy(update={"report": draft.report})
    return replace(stored, manifest=manifest)


def expectation_of(preprocessing: Preprocessing) -> Expectation | None:
    """Channels, pixels and normalisation that pictures are brought to; None for tensors."""
    if not preprocessing.accepts_pictures:
        return None
    channels, height, width = preprocessing.raw_shape
    steps = {step.step: step for step in preprocessing.steps}
    normalize: Any = steps.get("normalize")
    mean, deviation = (normalize.mean, normalize.std) if normalize else (None, None)
    return Expectation(channels, height, width, mean, deviation)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the store and the intake refuse, as errors of the service."""
    try:
        yield
    except DatasetUnknown as error:
        raise NotFound(str(error)) from None
    except KeyReused as error:
        raise Conflict(str(error), param="Idempotency-Key") from None
    except (DatasetFaults, ChangeRefused, UnusablePicture) as error:
        raise BadInput(str(error)) from None
    except DatasetDamaged as error:
        raise Conflict(f"{error}; delete it and send it again") from None


@contextlib.asynccontextmanager
async def staging_in(store: DatasetStore) -> AsyncIterator[Path]:
    """`DatasetStore.staging`, entered and left on a thread."""
    staging = store.staging()
    folder: Path = await asyncio.to_thread(staging.__enter__)
    try:
        yield folder
    finally:
        await asyncio.to_thread(staging.__exit__, None, None, None)


def _driven(loop: Any, given_up: threading.Event) -> Draft:
    while True:
        try:
            next(loop)
        except StopIteration as end:
            draft: Draft = end.value
            return draft
        if given_up.is_set():
            loop.close()
            raise asyncio.CancelledError


def _limits(options: DatasetOptions) -> IntakeLimits:
    return IntakeLimits(ArchiveLimits(max_bytes=options.max_dataset_bytes), options.picture)


def kind_of(upload: Upload) -> FileKind:
    """By the type or the name that the sender gives; its content is checked in any case."""
    kind = KINDS.get(upload.media_type) or SUFFIXES.get(Path(upload.file_name).suffix.lower())
    if kind is None and upload.media_type == "application/octet-stream":
        kind = "zip"
    if kind is None:
        raise MediaTypeRefused(
            f"{upload.media_type[:80]!r} is not read here; send a zip, an NPZ or a CSV"
        )
    return kind
