"""Versions on their way to the device: each is loaded once, proven as it will serve, or refused.

A version that failed is remembered with its reason, and not tried again for every request.
"""

import asyncio
import logging
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from app.engine.device_thread import compute_with
from app.engine.execution import Reference
from app.engine.loading import LoadedVersion, LostWhileLoading
from app.engine.memory import Memory
from app.engine.predictor import Predictor
from app.engine.rehearsal import rehearse
from app.engine.short_slices import short_slices
from app.errors import DeviceLost, LoadFailed, ServiceError
from models.checkpoint import CheckpointError
from models.manifest import WEIGHTS
from models.networks import NetworkError
from models.store import Version

log = logging.getLogger(__name__)

FAILURE_KEPT_S: Final = 5.0
LONGEST_KEPT_S: Final = 300.0
MAX_FAILURES: Final = 1000
NUM_THREADS: Final = 2
WARM_UP_S: Final = 2.0
"""How long a new version may try its batch sizes, while the device has nothing else to do."""
PROOF_S: Final = 60.0
Key = tuple[str, int]


class NoRoom(LoadFailed):
    """What is in use leaves no memory for it; that may change at any moment."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version could not be loaded. A sentence: an exception would keep its tensors."""

    reason: str
    until: float
    kept_s: float


class Loads:
    """Brings versions to the device; every method belongs to the event loop.

    Args:
        load: reads and checks a version; runs in a thread.
        open_predictor: gives what was loaded its place in the batcher.
        proven: called with each version that is live from now on.
        make_room: called with a version and its size in bytes before it is loaded.
        memory: counts what is live and what is coming.
        on_lost: told the number of a device that was lost over it, and why.
    """

    def __init__(
        self,
        load: Callable[[Version], LoadedVersion],
        open_predictor: Callable[[LoadedVersion], Predictor],
        proven: Callable[[Predictor], None],
        make_room: Callable[[Version, int], Awaitable[None]],
        memory: Memory,
        on_lost: Callable[[int, BaseException], None] = lambda *_: None,
    ) -> None:
        self.load = load
        self._open_predictor = open_predictor
        self._tell_proven = proven
        self._make_room = make_room
        self._memory = memory
        self._on_lost = on_lost
        # Weak: what nobody holds any more is gone, what somebody still holds need not be loaded.
        self._loaded: weakref.WeakValueDictionary[Key, Predictor] = weakref.WeakValueDictionary()
        self._running: dict[Key, asyncio.Task[Predictor]] = {}
        self._failures: dict[Key, Failure] = {}
        # Few, and computing with one thread each: a load must not take the device's processors.
        self._threads = ThreadPoolExecutor(
            NUM_THREADS, "load", initializer=compute_with, initargs=(1,)
        )

    async def predictor(self, version: Version) -> Predictor:
        """The predictor of `version`, loaded if nobody holds one; callers share one load.

        Raises:
            LoadFailed: it cannot be loaded, or could not a moment ago.
        """
        key = (version.name, version.number)
        loaded = self._loaded.get(key)
        if loaded is not None:
            return loaded
        failure = self._failures.get(key)
        if failure is not None and time.monotonic() < failure.until:
            raise LoadFailed(failure.reason)
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._loading(version, key))
            task.add_done_callback(lambda done: self._end(key, done))
        # A caller who leaves does not stop the load that others wait for.
        return await asyncio.shield(task)

    def is_loading(self, key: Key) -> bool:
        """Whether it is on its way."""
        return key in self._running

    def failure(self, key: Key) -> str | None:
        """Why it could not be loaded, if that was its last try."""
        failure = self._failures.get(key)
        return failure.reason if failure else None

    def forgive(self, name: str) -> None:
        """Let the next caller try again what failed of `name`."""
        self._failures = {key: one for key, one in self._failures.items() if key[0] != name}

    def close(self) -> None:
        """End the threads; what is being loaded is thrown away."""
        for task in self._running.values():
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _loading(self, version: Version, key: Key) -> Predictor:
        began = time.monotonic()
        try:
            predictor = await self._proven(version)
        except LostWhileLoading as error:
            # The device's fault and not the version's, which is not remembered as a failure.
            self._on_lost(error.place, error.__cause__ or error)
            raise
        except DeviceLost:
            raise
        except (CheckpointError, NetworkError, ServiceError, OSError) as error:
            longest_s = FAILURE_KEPT_S if isinstance(error, NoRoom) else LONGEST_KEPT_S
            failure = self._remember(key, f"{version} cannot be loaded: {error}", longest_s)
            # Its frames hold the network that is of no use.
            traceback.clear_frames(error.__traceback__)
            log.error("%s", failure.reason)
            raise LoadFailed(failure.reason) from None
        self._failures.pop(key, None)
        self._loaded[key] = predictor
        self._tell_proven(predictor)
        log.info("%s is live after %.0f ms", version, (time.monotonic() - began) * 1000)
        return predictor

    async def _proven(self, version: Version) -> Predictor:
        """Loaded beside what serves, warmed up, and checked through the lane that will serve."""
        loop = asyncio.get_running_loop()
        size_bytes = await loop.run_in_executor(self._threads, _size_bytes, version)
        await self._make_room(version, size_bytes)
        with self._memory.coming(size_bytes):
            with short_slices():
                loaded = await loop.run_in_executor(self._threads, self.load, version)
            predictor = self._open_predictor(loaded)
        self._memory.count(predictor)
        await rehearse(predictor)
        for lane in predictor.lanes:
            await lane.warm_up(within_s=WARM_UP_S)
        await self._prove(predictor, loaded.reference)
        predictor.forget_warm_up()
        return predictor

    async def _prove(self, predictor: Predictor, reference: Reference) -> None:
        """Ask the golden inputs as anybody would, in every way that they may be asked."""
        ways = [] if reference.outputs is None else [reference.inputs.cpu()]
        if predictor.pixels is not None and reference.sent_bytes is not None:
            ways.append(reference.sent_bytes)
        precision = predictor.loaded.execution.form.precision
        for inputs in ways:
            answer = await predictor.predict(inputs, time.monotonic() + PROOF_S)
            _, fault = reference.judged(answer.logits, precision)
            if fault:
                raise LoadFailed(f"served, it {fault}")

    def _remember(self, key: Key, reason: str, longest_s: float) -> Failure:
        """Each further failure is kept twice as long, so that a damaged version costs little."""
        before = self._failures.pop(key, None)
        kept_s = FAILURE_KEPT_S if before is None else min(2 * before.kept_s, longest_s)
        if len(self._failures) >= MAX_FAILURES:
            self._failures.pop(next(iter(self._failures)))
        failure = self._failures[key] = Failure(reason, time.monotonic() + kept_s, kept_s)
        return failure

    def _end(self, key: Key, task: "asyncio.Task[Predictor]") -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # told to whoever asked, if anybody still waits


def _size_bytes(version: Version) -> int:
    return (version.folder / WEIGHTS).stat().st_size
