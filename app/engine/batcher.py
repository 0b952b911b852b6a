"""The batcher: a lane for every live model, and a thread a device that computes for them all.

When the device is free it takes what waits, up to the largest batch, and never waits for more.
"""

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from app.engine.batch import Run
from app.engine.batch_policy import LaneOptions
from app.engine.call import Calls
from app.engine.device_error import free_cached_memory
from app.engine.device_thread import compute_with
from app.engine.dispatch import Dispatch
from app.engine.lane import Lane
from app.engine.pipeline import Accelerator, accelerator_of
from app.engine.schedule import LOWEST
from app.errors import DeviceLost, Draining, ServiceError

__all__ = ["LOWEST", "Batcher", "Lane", "LaneOptions"]

# How long the thread gets to end after the last answer.
END_S = 5.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Batcher:
    """Owns the lanes and the threads of the devices; every method belongs to one event loop.

    Args:
        devices: one or several, or accelerators; all of them serve one queue.
        num_threads: threads that torch computes with on a processor; see
            `models.device.thread_count`. What runs on the event loop computes with one.
        on_broken: called once, on the event loop, when the last device or its thread can be used
            no more; everybody was answered with `DeviceLost` by then. The process should end.
        stuck_after_s: a forward that has not returned by then counts as a lost device.
    """

    def __init__(
        self,
        *devices: torch.device | Accelerator,
        num_threads: int = 1,
        on_broken: Callable[[BaseException], None] | None = None,
        stuck_after_s: float = 300.0,
    ) -> None:
        # In the order of the devices; None for a processor.
        self.accelerators = tuple(
            one if isinstance(one, Accelerator) else accelerator_of(one) for one in devices
        )
        self.devices = tuple(one.device if isinstance(one, Accelerator) else one for one in devices)
        # Weak: a lane that its owner forgot, without closing it, takes its network along.
        self.lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self.broken_by: BaseException | None = None
        self._num_threads = num_threads
        self._on_broken = on_broken
        self._stuck_after_s = stuck_after_s
        self._started: tuple[Dispatch, Calls] | None = None
        self._draining = False
        self._freeing: set[asyncio.Task[None]] = set()

    @property
    def device(self) -> torch.device:
        """The first one."""
        return self.devices[0]

    @property
    def lost(self) -> set[int]:
        """Numbers of the devices that can be used no more."""
        return set() if self._started is None else self._started[0].lost

    @property
    def broken(self) -> bool:
        """Whether no device can be used any more."""
        return self.broken_by is not None

    def start(self) -> None:
        """Start the device thread; the running event loop is the batcher's from now on."""
        # Small forwards run on this thread. Several threads would only disturb the other cores.
        compute_with(1)
        dispatch = Dispatch(
            asyncio.get_running_loop(),
            *self.devices,
            num_threads=self._num_threads,
            stuck_after_s=self._stuck_after_s,
            on_lost=self._break,
        )
        self._started = dispatch, Calls(dispatch)
        dispatch.start()

    def open_lane(
        self,
        name: str,
        run: Run,
        options: LaneOptions | None = None,
        *,
        row_shape: tuple[int, ...],
        elsewhere: Sequence[Run] = (),
    ) -> Lane:
        """A lane for a live model, see `Lane`; may be called on any thread.

        Args:
            run: forward on the first device.
            elsewhere: on the others, in their order.

        Raises:
            DeviceLost, Draining: nothing is computed here any more.
        """
        dispatch, _ = self._open()
        runs = (run, *elsewhere)
        if len(runs) != len(self.devices):
            raise ValueError(f"{len(self.devices)} devices need a forward each, not {len(runs)}")
        lane = Lane(name, runs, row_shape, options or LaneOptions(), dispatch)
        self.lanes.add(lane)
        return lane

    async def close_lane(self, lane: Lane, drain_s: float) -> None:
        """Admit nobody to `lane` any more, answer who waits, let go of its network."""
        await lane.close(drain_s)
        self.lanes.discard(lane)

    async def call(
        self,
        function: Callable[[], T],
        deadline: float | None = None,
        priority: int = LOWEST,
        place: int = 0,
    ) -> T:
        """What `function` returns or raises, called on a device's thread when its turn comes."""
        _, calls = self._open()
        return await calls.call(function, deadline, priority, place)

    def lose(self, place: int, cause: BaseException) -> None:
        """The device number `place` failed at something that was not the batcher's."""
        if self._started is not None:
            self._started[0].lose(place, cause)

    def free_soon(self) -> None:
        """Give memory of what has gone back to the devices and the system; from any thread.

        It takes no lock, because the garbage collector may call it.
        """
        if self._started is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._started[0].loop.call_soon_threadsafe(self._free)

    def _free(self) -> None:
        if self._draining:
            return
        for place, device in enumerate(self.devices):
            task = asyncio.create_task(self._freed(place, device))
            self._freeing.add(task)
            task.add_done_callback(self._freeing.discard)

    async def _freed(self, place: int, device: torch.device) -> None:
        """On an accelerator's thread, where nothing is being recorded; beside others' batches."""
        if self.accelerators[place] is None:
            await asyncio.to_thread(free_cached_memory, device)
            return
        with contextlib.suppress(ServiceError):  # too busy, lost, or stopping
            await self.call(lambda: free_cached_memory(device), place=place)

    async def stop(self, drain_s: float) -> None:
        """Admit nobody, answer who waits within `drain_s` seconds, refuse the rest, end the thread.

        Calling it again, at the same time too, does no harm.
        """
        if self._started is None:
            return
        self._draining = True
        dispatch, calls = self._started
        lanes = list(self.lanes)
        for lane in lanes:
            lane.refuse(_draining)
        if not self.broken:
            await asyncio.gather(*(lane.drain(drain_s) for lane in lanes))
        calls.fail(_draining())
        dispatch.stop()
        try:
            async with asyncio.timeout(END_S):
                await dispatch.ended.wait()
        except TimeoutError:
            logger.warning("the device thread has not ended: its forward does not return")

    def _open(self) -> tuple[Dispatch, Calls]:
        if self.broken_by is not None:
            raise _lost()
        if self._started is None or self._draining:
            raise _draining()
        return self._started

    def _break(self, cause: BaseException) -> None:
        if self.broken_by is not None:
            return
        self.broken_by = cause
        logger.critical("the device is lost", exc_info=cause)
        for lane in list(self.lanes):
            lane.fail(_lost)
        if self._started is not None:
            dispatch, calls = self._started
            calls.fail(_lost())
            dispatch.stop()
        if self._on_broken is not None:
            self._on_broken(cause)


def _draining() -> Draining:
    return Draining("the service is stopping and takes no more work")


def _lost() -> DeviceLost:
    return DeviceLost("the device failed and answers no more; the service is about to restart")
