"""The one thread of a device: takes whose turn it is, computes, hands the result to the event loop.

One thread, because CUDA graphs and caches belong to a thread, and because order is then obvious.
"""

import asyncio
import threading
import time
from collections.abc import Callable
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
    """Runs the work of one schedule; `lock` guards both.

    Args:
        deliver: called on `loop`, once for each work that ran.
        ended: called on `loop` when the thread ends, however it ends, with what it died of.
    """

    def __init__(
        self,
        schedule: Schedule,
        lock: threading.Lock,
        loop: asyncio.AbstractEventLoop,
        *,
        num_threads: int,
        deliver: Callable[[Work], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self.running: Work | None = None
        self.running_since = 0.0
        self._schedule = schedule
        self._lock = lock
        self._work_came = threading.Condition(lock)
        self._loop = loop
        self._num_threads = num_threads
        self._deliver = deliver
        self._ended = ended
        self._asleep = False
        self._stopping = False
        # A daemon, because a forward that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self) -> None:
        """Begin to take work."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there is work; the caller holds the lock."""
        if self._asleep:
            self._asleep = False
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
            compute_with(self._num_threads)
            self._serve()
        except BaseException as error:
            # However this thread ends, its owner must hear of it: callers wait.
            died_of = error
        self._post(self._ended, died_of)

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            work.run()
            with self._lock:
                self.running = None
                self._schedule.running_until = 0.0
                work.finish(time.monotonic())
            self._post(self._deliver, work)
            if work.lost is not None:
                return
            # Asleep, this frame must not keep a closed lane's network in memory.
            del work

    def _next(self) -> Work | None:
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                work = self._schedule.next(now)
                if work is not None:
                    self.running, self.running_since = work, now
                    return work
                self._asleep = True
                self._work_came.wait(self._schedule.wait_s(now))
                self._asleep = False
        return None

    def _post(self, callback: Callable[[Any], None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            self._stopping = True
