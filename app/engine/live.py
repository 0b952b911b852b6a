"""Live models: a name becomes a loaded predictor, and a moved alias becomes another one.

The first caller of a name loads it, the others wait for the same load. What a name means is
remembered, so that a request costs one look into a dictionary; a watcher looks at the store and
swaps: load beside, verify, warm, check the golden inputs, flip one reference. The old predictor
goes when its last request does.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from app.engine.loading import LoadedVersion
from app.engine.predictor import Predictor
from app.errors import LoadFailed, Unavailable
from models.checkpoint import CheckpointError
from models.networks import NetworkError
from models.store import ModelStore, StoreError, UnknownModel, UnknownVersion, Version

log = logging.getLogger(__name__)

# A version that failed to load is not tried again for every request that asks for it.
FAILURE_KEPT_S: Final = 5.0
State = Literal["READY", "UNAVAILABLE", "LOADING"]


@dataclass(frozen=True, slots=True)
class Listing:
    """A version in the store and whether it is live."""

    name: str
    version: int
    state: State
    reason: str = ""


class LiveModels:
    """The predictors of one process.

    Args:
        store: where versions rest.
        load: brings a version to the device and checks it; runs in a thread.
        open_predictor: gives what was loaded its place in the batcher; runs on the event loop.
        preload: references that must be live before the service is ready.
        watch_interval_s: how often the store is looked at.
    """

    def __init__(
        self,
        store: ModelStore,
        load: Callable[[Version], LoadedVersion],
        open_predictor: Callable[[LoadedVersion], Predictor],
        *,
        preload: tuple[str, ...] = (),
        watch_interval_s: float = 1.0,
    ) -> None:
        self.store = store
        self.preload = preload
        self._load = load
        self._open_predictor = open_predictor
        self._watch_interval_s = watch_interval_s
        self._routes: dict[str, Predictor] = {}
        self._loads: dict[tuple[str, int], asyncio.Task[Predictor]] = {}
        self._failures: dict[tuple[str, int], tuple[float, Exception]] = {}
        self._unloaded: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._preloaded = not preload

    async def start(self) -> None:
        """Begin to watch the store, and to load what must be live first."""
        self._watcher = asyncio.create_task(self._watch(), name="watch the store")

    async def stop(self) -> None:
        """End the watcher and let go of every predictor."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._routes.clear()

    def ready(self) -> bool:
        """Whether everything that must be live first is live, and the store is being watched."""
        return self._preloaded and self._watcher is not None and not self._watcher.done()

    async def get(self, name: str, version: str | None = None) -> Predictor:
        """The predictor that `name`, or its version or alias `version`, means now.

        Raises:
            models.store.BadName, UnknownModel, UnknownVersion: there is none.
            LoadFailed: it is in the store and cannot be loaded.
            Unavailable: it was unloaded on request.
        """
        reference = name if version is None else _reference(name, version)
        predictor = self._routes.get(reference)
        return predictor if predictor is not None else await self._open(reference)

    def loaded(self) -> list[Predictor]:
        """Every predictor that a name leads to, each once."""
        return list({id(one): one for one in self._routes.values()}.values())

    def index(self) -> list[Listing]:
        """Every version in the store; reads the disk, so call it off the event loop."""
        live = {(one.name, one.version) for one in self.loaded()}
        return [
            self._listing(name, number, (name, number) in live)
            for name in self.store.names()
            for number in self.store.versions(name)
        ]

    async def load(self, name: str) -> Predictor:
        """Make `name` available again after `unload`, and live now; raises as `get` does."""
        self._unloaded.discard(name)
        return await self.get(name)

    async def unload(self, name: str) -> None:
        """Let go of every version of `name`; requests are refused until `load`."""
        await asyncio.to_thread(self.store.aliases, name)  # an unknown name is an error
        self._unloaded.add(name)
        for reference in [key for key, one in self._routes.items() if one.name == name]:
            del self._routes[reference]

    async def refresh(self) -> None:
        """Let every name lead to what the store says now; swap where that is another version."""
        for reference in list(self._routes):
            await self._refresh(reference)

    async def _open(self, reference: str) -> Predictor:
        version = await asyncio.to_thread(self.store.resolve, reference)
        if version.name in self._unloaded:
            raise Unavailable(f"{version.name} was unloaded; load it through the repository first")
        predictor = await self._live(version)
        self._routes[reference] = predictor
        return predictor

    async def _live(self, version: Version) -> Predictor:
        key = (version.name, version.number)
        for one in self._routes.values():
            if (one.name, one.version) == key:
                return one
        self._raise_recent_failure(key)
        task = self._loads.get(key)
        if task is None:
            task = self._loads[key] = asyncio.create_task(self._loading(version))
            task.add_done_callback(lambda _: self._loads.pop(key, None))
        # A caller who leaves does not stop the load that others wait for.
        return await asyncio.shield(task)

    async def _loading(self, version: Version) -> Predictor:
        began = time.monotonic()
        try:
            predictor = self._open_predictor(await asyncio.to_thread(self._load, version))
        except (CheckpointError, NetworkError, LoadFailed, OSError) as error:
            failure = LoadFailed(f"{version} cannot be loaded: {error}")
            self._failures[(version.name, version.number)] = (time.monotonic(), failure)
            log.error("%s", failure)
            raise failure from error
        self._failures.pop((version.name, version.number), None)
        log.info("%s is live after %.0f ms", version, (time.monotonic() - began) * 1000)
        return predictor

    def _raise_recent_failure(self, key: tuple[str, int]) -> None:
        failed = self._failures.get(key)
        if failed is not None and time.monotonic() - failed[0] < FAILURE_KEPT_S:
            raise failed[1].with_traceback(None)

    def _listing(self, name: str, number: int, live: bool) -> Listing:
        if live:
            return Listing(name, number, "READY")
        if (name, number) in self._loads:
            return Listing(name, number, "LOADING")
        if name in self._unloaded:
            return Listing(name, number, "UNAVAILABLE", "unloaded")
        failed = self._failures.get((name, number))
        reason = str(failed[1]) if failed else "not loaded; the first request loads it"
        return Listing(name, number, "UNAVAILABLE", reason)

    async def _watch(self) -> None:
        await asyncio.to_thread(self._sweep)
        while True:
            try:
                await self._preload()
                await self.refresh()
            except Exception:  # the watcher is this class's request: it logs, and goes on
                log.exception("looking at the store failed; it is looked at again")
            await asyncio.sleep(self._watch_interval_s)

    def _sweep(self) -> None:
        try:
            self.store.sweep()
        except StoreError as error:
            log.warning("what dead writers left in the store stays there: %s", error)

    async def _preload(self) -> None:
        if self._preloaded:
            return
        for reference in self.preload:
            await self.get(reference)
        self._preloaded = True

    async def _refresh(self, reference: str) -> None:
        current = self._routes.get(reference)
        if current is None:
            return
        try:
            version = await asyncio.to_thread(self.store.resolve, reference)
        except (UnknownModel, UnknownVersion) as error:
            log.warning("%s leads nowhere any more: %s", reference, error)
            self._routes.pop(reference, None)
            return
        except StoreError as error:
            log.warning("%s stays at version %d: %s", reference, current.version, error)
            return
        if version.number == current.version:
            return
        try:
            self._routes[reference] = await self._live(version)
        except LoadFailed:
            return  # said by the loader; the version that served goes on serving
        log.info("%s moved from version %d to %d", reference, current.version, version.number)


def _reference(name: str, version: str) -> str:
    return f"{name}:{version}" if version.isdecimal() else f"{name}@{version}"
