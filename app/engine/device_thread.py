"""The one thread of a device: takes whose turn it is, computes, hands the result to the event loop.

One thread, because CUDA graphs and caches belong to a thread, and because order is then obvious.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from app.engine.schedule import Schedule, Work


def compute_with(num_threads: int) -> None:
    """Let torch compute with so many threads when it is called by the calling thread.

    The number belongs to each thread, but a thread that computes for the first time takes over
    what was set last, by whichever thread. Asking first makes that happen before it is set here.
    """
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


class DeviceThread:
    """Runs the work of its schedules on one device; `lock` guards all of it.

    What a device computes by itself flies: this thread lands it later. A second batch is started
    behind it only where it is a full one, because a smaller one had better wait for company.

    Args:
        schedules: whose work it takes, the most urgent first; the first is shared by all devices.
        place: number of the device, told to the work.
        call_another: wakes another device's thread, where there is more than one; under the lock.
        deliver: called on `loop`, once for each work that ran.
        ended: called on `loop` when the thread ends, however it ends, with what it died of.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule],
        lock: threading.Lock,
        loop: asyncio.AbstractEventLoop,
        *,
        device: torch.device,
        place: int = 0,
        num_threads: int,
        call_another: Callable[[], None] = lambda: None,
        deliver: Callable[[Work], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        # Oldest first; one, but for a device that computes by itself.
        self.running: list[Work] = []
        self.running_since = 0.0
        self.is_asleep = False
        self._schedules = schedules
        self._lock = lock
        self._work_came = threading.Condition(lock)
        self._loop = loop
        self._device = device
        self._place = place
        self._num_threads = num_threads
        self._call_another = call_another
        self._deliver = deliver
        self._ended = ended
        self._stopping = False
        # A daemon, because a forward that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self) -> None:
        """Begin to take work."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there is work; the caller holds the lock."""
        if self.is_asleep:
            self.is_asleep = False
            self._work_came.notify()

    def stop(self) -> None:
        """End after the work that runs now, whatever waits; the caller holds the lock."""
        self._stopping = True
        self._work_came.notify()

    def join(self) -> None:
        """Wait out the last moments of a thread that has said that it ends."""
        self._thread.join(timeout=1.0)

    def _main(self) -> None:
        died_of: BaseException | None = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            compute_with(self._num_threads)
            self._serve()
        except BaseException as error:
            # However this thread ends, its owner must hear of it: callers wait.
            died_of = error
        self._post(self._ended, died_of)

    def _serve(self) -> None:
        is_lost = False
        while (work := self._next()) is not None or self.running:
            flies = False
            if work is not None:
                # Again each time, for a part of torch knows only what was set last, by any thread.
                torch.set_num_threads(self._num_threads)
                flies = work.start(self._place)
            first = self.running[0]
            if first is not work:
                first.land()
                is_lost |= self._over(first)
            if work is not None and not flies:
                is_lost |= self._over(work)
            if is_lost:
                self._stopping = True
            # Asleep, this frame must not keep a closed lane's network in memory.
            del work, first

    def _over(self, work: Work) -> bool:
        """It has run; whether the device was lost over it."""
        with self._lock:
            self.running.remove(work)
            now = self.running_since = time.monotonic()
            until = now + self.running[0].expected_s if self.running else 0.0
            self._schedules[0].running_until = until
            # The event loop wakes while this thread learns, under the lock that both need.
            self._post(self._deliver, work)
            work.finish(now)
        return work.lost is not None

    def _next(self) -> Work | None:
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                work = self._take(now)
                if work is not None:
                    if not self.running:
                        self.running_since = now
                    self.running.append(work)
                    if len(self._schedules) > 1 and self._schedules[0].has_waiting():
                        self._call_another()
                    return work
                if self.running:
                    return None
                self.is_asleep = True
                self._work_came.wait(self._wait_s(now))
                self.is_asleep = False
        return None

    def _take(self, now: float) -> Work | None:
        shared = self._schedules[0]
        if self.running:
            return shared.next_full(now) if len(self.running) == 1 else None
        if len(self._schedules) == 1:
            return shared.next(now)
        for schedule in sorted(self._schedules, key=lambda one: one.head_key(now)):
            work = schedule.next(now)
            if work is not None:
                return work
        return None

    def _wait_s(self, now: float) -> float | None:
        waits = [schedule.wait_s(now) for schedule in self._schedules]
        return min((one for one in waits if one is not None), default=None)

    def _post(self, callback: Callable[[Any], None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            self._stopping = True
