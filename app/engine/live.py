"""Live models: a name becomes a loaded predictor, and a moved alias becomes another one.

The first caller of a name loads it, the others wait for the same load. What a name means is
remembered, so that a request costs one look into a dictionary; a watcher looks at the store and
swaps: load beside, verify, warm, check the golden inputs, flip one reference. The old predictor
goes when its last request does. What nobody asked for the longest goes when memory is needed.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from app.engine.loading import LoadedVersion
from app.engine.loads import Loads, NoRoom
from app.engine.memory import MEBIBYTE, Memory
from app.engine.predictor import Predictor
from app.engine.route import Route
from app.engine.shadow import Mirror, Shadowed
from app.errors import LoadFailed, Unavailable
from models.store import ModelStore, StoreError, Traffic, UnknownModel, UnknownVersion, Version

log = logging.getLogger(__name__)

ALIAS_KEPT_S: Final = 600.0
"""An alias that was asked for within this time is in use, and its versions are not evicted."""
DRAIN_S: Final = 5.0
"""How long a load waits for memory that requests still hold."""
State = Literal["READY", "UNAVAILABLE", "LOADING"]
Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """A version in the store and whether it is live."""

    name: str
    version: int
    state: State
    reason: str = ""


class LiveModels:
    """The predictors of one process; every method belongs to the event loop.

    Args:
        store: where versions rest.
        load: brings a version to the device and checks it; runs in a thread.
        open_predictor: gives what was loaded its place in the batcher; runs on the event loop.
        proven: called on the event loop with each version that answered as it should.
        preload: references that must be live before the service is ready.
        watch_interval_s: how often the store is looked at.
        memory_budget_bytes: for the weights of all that is live; None for no bound.
        on_lost: told the number of a device that was lost while something was loaded, and why.
    """

    def __init__(
        self,
        store: ModelStore,
        load: Callable[[Version], LoadedVersion],
        open_predictor: Callable[[LoadedVersion], Predictor],
        *,
        proven: Callable[[Predictor], None] = lambda _: None,
        preload: tuple[str, ...] = (),
        watch_interval_s: float = 1.0,
        memory_budget_bytes: int | None = None,
        on_lost: Callable[[int, BaseException], None] = lambda *_: None,
    ) -> None:
        self.store = store
        self.preload = preload
        self.memory = Memory(memory_budget_bytes)
        self.loads = Loads(load, open_predictor, proven, self._make_room, self.memory, on_lost)
        self._watch_interval_s = watch_interval_s
        # What a request looks into: of the routes below those where there is nothing to choose.
        self._whole: dict[str, Predictor] = {}
        self._routes: dict[str, Route] = {}
        self._stamps: dict[str, Stamp] = {}
        self._mirrors: dict[tuple[str, str, int], Mirror] = {}
        self._opening: dict[str, asyncio.Task[Route]] = {}
        self._refreshing: dict[str, asyncio.Task[None]] = {}
        self._unloaded: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._preloaded = not preload

    async def start(self) -> None:
        """Begin to watch the store, and to load what must be live first."""
        self._watcher = asyncio.create_task(self._watch(), name="watch the store")

    async def stop(self) -> None:
        """End the watcher and let go of every predictor."""
        tasks = [*self._refreshing.values(), *self._opening.values()]
        if self._watcher is not None:
            tasks.append(self._watcher)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.loads.close()
        for reference in list(self._routes):
            self._forget(reference)

    def ready(self) -> bool:
        """Whether everything that must be live first is live, and the store is being watched."""
        return self._preloaded and self._watcher is not None and not self._watcher.done()

    async def get(
        self, name: str, version: str | None = None, canary_key: str | None = None
    ) -> Predictor:
        """The predictor that `name`, or its version or alias `version`, means now.

        Args:
            canary_key: of two versions that share an alias, one key always gets the same.

        Raises:
            models.store.BadName, UnknownModel, UnknownVersion: there is none.
            LoadFailed: it is in the store and cannot be loaded.
            Unavailable: it was unloaded on request.
        """
        predictor = self.get_nowait(name, version, canary_key)
        if predictor is not None:
            return predictor
        reference = name if version is None else reference_of(name, version)
        return (await self._open(reference)).choose(canary_key)

    def get_nowait(
        self, name: str, version: str | None = None, canary_key: str | None = None
    ) -> Predictor | None:
        """The same where it is live already; None where it is not."""
        reference = name if version is None else reference_of(name, version)
        predictor = self._whole.get(reference)
        if predictor is not None:
            return predictor
        route = self._routes.get(reference)
        return None if route is None else route.choose(canary_key)

    def loaded(self) -> list[Predictor]:
        """Every predictor that a name leads to, each once."""
        found = (one for route in list(self._routes.values()) for one in route.predictors())
        return list({id(one): one for one in found}.values())

    def index(self) -> list[Listing]:
        """Every version in the store; reads the disk, so call it off the event loop."""
        live = {(one.name, one.version) for one in self.loaded()}
        return [
            self._listing(name, number, (name, number) in live)
            for name in self.store.names()
            for number in self.store.versions(name)
        ]

    def listings(self, name: str) -> list[Listing]:
        """The same of one model."""
        live = {one.version for one in self.loaded() if one.name == name}
        return [self._listing(name, number, number in live) for number in self.store.versions(name)]

    def route(self, name: str, alias: str) -> Route | None:
        """Who answers an alias now; None while nobody has asked for it."""
        names = [f"{name}@{alias}", *([name] if alias == "production" else [])]
        return next((self._routes[one] for one in names if one in self._routes), None)

    def mirrors(self) -> dict[tuple[str, str, int], Mirror]:
        """(model, alias, version) of every shadow that gets copies."""
        return dict(self._mirrors)

    async def load(self, name: str) -> Predictor:
        """Make `name` available again after `unload`, and live now; raises as `get` does."""
        self._unloaded.discard(name)
        self.loads.forgive(name)
        return await self.get(name)

    async def unload(self, name: str) -> None:
        """Let go of every version of `name`; requests are refused until `load`."""
        await asyncio.to_thread(self.store.aliases, name)  # an unknown name is an error
        self._unloaded.add(name)
        for reference in self._references(name):
            self._forget(reference)

    async def prepare(self, versions: Iterable[Version]) -> list[Predictor]:
        """Load what an alias is about to need, so that moving it can only succeed.

        Returns:
            What was loaded, to be held until the alias has moved.

        Raises:
            LoadFailed: one of them cannot be loaded; nothing has changed.
        """
        wanted = [version for version in versions if version.name not in self._unloaded]
        return [await self.loads.predictor(version) for version in wanted]

    async def refresh(self, name: str | None = None) -> None:
        """Let every name (of one model) lead to what the store says now; swap where it differs."""
        if name is not None and name in self._refreshing:
            await asyncio.wait([self._refreshing[name]])  # it may have looked too early
        await self._begin_refresh(name)
        await asyncio.gather(*self._refreshing.values())

    async def _begin_refresh(self, name: str | None = None) -> None:
        """Start a swap for each model that has changed; a slow one does not delay the others."""
        names = {name_of(reference) for reference in self._routes}
        wanted = {name} & names if name is not None else names
        stamps = {one: self._stamps.get(one) for one in wanted if one not in self._refreshing}
        for changed, stamp in await asyncio.to_thread(self._changed, stamps):
            if changed not in self._refreshing:
                task = asyncio.create_task(self._refresh(changed, stamp), name=changed)
                self._refreshing[changed] = task
                task.add_done_callback(self._end_refresh)

    def _end_refresh(self, task: "asyncio.Task[None]") -> None:
        self._refreshing.pop(task.get_name(), None)

    def _changed(self, stamps: dict[str, Stamp | None]) -> list[tuple[str, Stamp]]:
        """Two looks at the disk for each model, whatever its history; runs in a thread."""
        found = [(name, self.store.stamp(name)) for name in stamps]
        return [(name, stamp) for name, stamp in found if stamp != stamps[name]]

    async def _refresh(self, name: str, stamp: Stamp) -> None:
        looked_at = self._references(name)
        settled = True
        for reference in looked_at:
            try:
                settled &= await self._refresh_one(reference)
            except Exception:  # a request of the watcher's: it logs, and goes on
                log.exception("looking at %s failed; it is looked at again", reference)
                settled = False
        if settled and looked_at == self._references(name):
            # Taken before looking: what changes meanwhile is seen the next time.
            self._stamps[name] = stamp
        else:
            self._stamps.pop(name, None)

    def _references(self, name: str) -> list[str]:
        return [reference for reference in self._routes if name_of(reference) == name]

    async def _refresh_one(self, reference: str) -> bool:
        """Swap where the store says something else; False where it should be tried again."""
        current = self._routes.get(reference)
        if current is None:
            return True
        try:
            traffic = await asyncio.to_thread(self.store.traffic, reference)
        except (UnknownModel, UnknownVersion) as error:
            log.warning("%s leads nowhere any more: %s", reference, error)
            self._forget(reference)
            return True
        except StoreError as error:
            log.warning("%s stays as it is: %s", reference, error)
            return False
        if traffic == current.traffic and not current.faults:
            return True
        return await self._swap(reference, current, traffic)

    async def _swap(self, reference: str, current: Route, traffic: Traffic) -> bool:
        try:
            route = await self._route_for(traffic)
        except LoadFailed:
            return False  # said by the loader; the version that served goes on serving
        if self._routes.get(reference) is not current:
            return False  # unloaded or evicted meanwhile
        if (route.traffic, route.faults) != (current.traffic, current.faults):
            self._lead(reference, route)
            log.info("%s: %s", reference, _change(current.traffic, traffic))
        return not route.faults

    async def _open(self, reference: str) -> Route:
        task = self._opening.get(reference)
        if task is None:
            task = self._opening[reference] = asyncio.create_task(self._opened(reference))
            task.add_done_callback(lambda done: self._end_opening(reference, done))
        return await asyncio.shield(task)

    async def _opened(self, reference: str) -> Route:
        traffic = await asyncio.to_thread(self.store.traffic, reference)
        name = traffic.holder.name
        route = None if name in self._unloaded else await self._route_for(traffic)
        if route is None or name in self._unloaded:
            raise Unavailable(f"{name} was unloaded; load it through the repository first")
        self._stamps.pop(name, None)  # this reference has not been compared with the store
        self._lead(reference, route)
        return route

    def _end_opening(self, reference: str, task: "asyncio.Task[Route]") -> None:
        del self._opening[reference]
        if not task.cancelled():
            task.exception()  # told to whoever asked, if anybody still waits

    async def _route_for(self, traffic: Traffic) -> Route:
        """Everything that `traffic` needs, live; a canary or shadow that fails is left out."""
        holder = await self.loads.predictor(traffic.holder)
        faults: list[str] = []
        canary = await self._beside(holder, traffic.canary, faults)
        shadow = await self._beside(holder, traffic.shadow, faults)
        if shadow is None or traffic.alias is None:
            return Route(traffic, holder, canary, None, tuple(faults))
        mirror = self._mirror((traffic.holder.name, traffic.alias, shadow.version), shadow)
        shadowed = None if canary is None else Shadowed(canary, mirror)
        return Route(traffic, Shadowed(holder, mirror), shadowed, mirror, tuple(faults))

    async def _beside(
        self, holder: Predictor, version: Version | None, faults: list[str]
    ) -> Predictor | None:
        if version is None:
            return None
        try:
            predictor = await self.loads.predictor(version)
        except LoadFailed as error:
            faults.append(str(error))
            return None
        if predictor.manifest.preprocessing != holder.manifest.preprocessing:
            faults.append(f"{version} prepares its inputs in another way than {holder.version}")
            return None
        return predictor

    def _mirror(self, key: tuple[str, str, int], shadow: Predictor) -> Mirror:
        mirror = self._mirrors.get(key)
        if mirror is None or mirror.predictor is not shadow:
            mirror = self._mirrors[key] = Mirror(shadow)
        return mirror

    def _lead(self, reference: str, route: Route) -> None:
        """Flip: one reference, and whoever asks from now on gets the new one."""
        self._routes[reference] = route
        if route.is_whole:
            self._whole[reference] = route.holder
        else:
            self._whole.pop(reference, None)
        self._close_mirrors()

    def _forget(self, reference: str) -> None:
        self._routes.pop(reference, None)
        self._whole.pop(reference, None)
        self._close_mirrors()

    def _close_mirrors(self) -> None:
        used = {id(route.mirror) for route in self._routes.values()}
        for key in [key for key, mirror in self._mirrors.items() if id(mirror) not in used]:
            self._mirrors.pop(key).close()

    async def _make_room(self, version: Version, size_bytes: int) -> None:
        """Evict what was not used for the longest, until `size_bytes` more bytes fit.

        Raises:
            NoRoom: what is left is in use.
        """
        until = time.monotonic() + DRAIN_S
        while self.memory.lacks(size_bytes):
            victim = self._least_recently_used()
            if victim is not None:
                self._evict(victim)
                del victim  # or it would still be counted
            elif time.monotonic() < until and self._is_draining():
                await asyncio.sleep(0.02)
            else:
                budget_mb = (self.memory.budget_bytes or 0) // MEBIBYTE
                raise NoRoom(
                    f"{version} needs {size_bytes // MEBIBYTE} MiB, and what is in use leaves no "
                    f"room for it in the budget of {budget_mb} MiB (PYTORCHLIB_MEMORY_BUDGET_MB)"
                )

    def _least_recently_used(self) -> Predictor | None:
        """Of what no alias in use needs and no request waits for; None where there is none."""
        idle_since = time.time() - ALIAS_KEPT_S
        kept: set[int] = set()
        for reference, route in self._routes.items():
            recent = max(one.used_at for one in route.predictors()) > idle_since
            if reference in self.preload or (route.traffic.alias is not None and recent):
                kept |= {id(one) for one in route.predictors()}
        free = [one for one in self.loaded() if id(one) not in kept and one.is_idle]
        return min(free, key=lambda one: one.used_at, default=None)

    def _evict(self, victim: Predictor) -> None:
        log.info("%s:%d is evicted to make room", victim.name, victim.version)
        for reference, route in list(self._routes.items()):
            if any(one is victim for one in route.predictors()):
                self._forget(reference)

    def _is_draining(self) -> bool:
        """Whether requests hold predictors that no name leads to any more."""
        return self.memory.used_bytes > sum(one.memory_bytes for one in self.loaded())

    def _listing(self, name: str, number: int, live: bool) -> Listing:
        if live:
            return Listing(name, number, "READY")
        if self.loads.is_loading((name, number)):
            return Listing(name, number, "LOADING")
        if name in self._unloaded:
            return Listing(name, number, "UNAVAILABLE", "unloaded")
        failure = self.loads.failure((name, number))
        reason = failure or "not loaded; the first request loads it"
        return Listing(name, number, "UNAVAILABLE", reason)

    async def _watch(self) -> None:
        await asyncio.to_thread(self._sweep)
        while True:
            for look in (self._preload, self._begin_refresh):
                try:
                    await look()
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
            try:
                await self.get(*split_reference(reference))
            except (LoadFailed, StoreError) as error:
                log.warning("not ready: %s", error)
                return
        self._preloaded = True


def reference_of(name: str, version: str) -> str:
    """`digits` and `3` are `digits:3`; `digits` and `production` are `digits@production`."""
    return f"{name}:{version}" if version.isdecimal() else f"{name}@{version}"


def split_reference(reference: str) -> tuple[str, str | None]:
    """A name, and the version or alias behind it."""
    name, _, version = reference.replace("@", ":").partition(":")
    return name, version or None


def name_of(reference: str) -> str:
    """The model's name in a reference."""
    return split_reference(reference)[0]


def _change(before: Traffic, now: Traffic) -> str:
    """In words, for the log."""
    words = f"version {before.holder.number} to {now.holder.number}"
    if now.canary is not None:
        words += f", {now.share:g} of the requests to {now.canary.number}"
    if now.shadow is not None:
        words += f", {now.shadow.number} in its shadow"
    return words
