"""Brings work to its runner: the device thread, or the event loop itself for what is tiny.

Handing a batch to a thread and back costs more than a small perceptron computes, so a lane whose
forwards are that short runs on the event loop, in the tick after its requests came in, and never
for longer than a millisecond at a time. Everything else runs on the device thread.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from itertools import count

import torch

from app.engine.device_thread import DeviceThread
from app.engine.schedule import Schedule, Source, Work
from app.engine.scratch import Scratch
from app.errors import DeviceLost

INLINE_BUDGET_S = 0.001
SWEEP_EVERY_S = 0.02
# A sweep that comes so much too late was not delayed by work: the process stood still.
PAUSE_S = 0.5

logger = logging.getLogger(__name__)


class Dispatch:
    """The two runners of one device, the lock that guards what waits for them, and the sweep.

    The sweep answers, every 20 ms while something waits or runs, those whose deadline has passed;
    it sleeps a hundred times as long as it took, so that it never costs more than a hundredth.

    Args:
        on_lost: called on `loop` when the device or its thread can be used no more.
        stuck_after_s: a forward that runs for longer counts as a lost device.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        device: torch.device,
        *,
        num_threads: int,
        stuck_after_s: float,
        on_lost: Callable[[BaseException], None],
    ) -> None:
        self.loop = loop
        self.device = device
        self.lock = threading.Lock()
        self.numbers = count()
        self.threaded = Schedule()
        self.inline = Schedule()
        self.scratch = Scratch(device)
        self.inline_scratch = Scratch(device)
        self.ended = asyncio.Event()
        self._on_lost = on_lost
        self._stuck_after_s = stuck_after_s
        self._inline_soon = False
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_due = 0.0
        self._stood_still_until = -math.inf
        self._stopping = False
        self._thread = DeviceThread(
            self.threaded,
            self.lock,
            loop,
            num_threads=num_threads,
            deliver=self._deliver,
            ended=self._thread_ended,
        )

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    def offer(self, source: Source, now: float) -> None:
        """`source` wants a turn; on the event loop, under the lock."""
        source.home.offer(source, now)
        if source.home is self.inline:
            self._run_inline_soon()
        else:
            self._thread.wake()
            self._sweep_soon(SWEEP_EVERY_S)

    def move(self, source: Source, home: Schedule, now: float) -> None:
        """From now on `source` has its turns in `home`; by its runner, under the lock."""
        source.home, source.offered, source.ripening = home, None, False
        home.offer(source, now)
        if home is self.threaded:
            self._thread.wake()
            self._sweep_soon(SWEEP_EVERY_S)

    def stood_still(self, now: float) -> bool:
        """Whether the process has just stood still, so that nobody can be blamed for a delay."""
        overslept = self._sweep_timer is not None and now - self._sweep_due > PAUSE_S
        return overslept or now < self._stood_still_until

    def stop(self) -> None:
        """End the thread after the work that it runs; `ended` is set when it has."""
        self._stopping = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        with self.lock:
            self._thread.stop()

    def _run_inline_soon(self) -> None:
        if not self._inline_soon:
            self._inline_soon = True
            self.loop.call_soon(self._run_inline)

    def _run_inline(self) -> None:
        self._inline_soon = False
        now = time.monotonic()
        until = now + INLINE_BUDGET_S
        while now < until and self.inline.has_waiting():
            with self.lock:
                work = self.inline.next(now)
            if work is None:
                return
            try:
                work.run()
            except BaseException as error:
                self._on_lost(error)
                raise
            now = time.monotonic()
            with self.lock:
                self.inline.running_until = 0.0
                work.finish(now)
            self._deliver(work)

    def _deliver(self, work: Work) -> None:
        work.deliver()
        if work.lost is not None:
            self._on_lost(work.lost)
        if self.inline.has_waiting():
            self._run_inline_soon()

    def _thread_ended(self, died_of: BaseException | None) -> None:
        self._thread.join()
        self.ended.set()
        if died_of is not None:
            logger.error("the device thread died", exc_info=died_of)
        if died_of is not None or not self._stopping:
            self._on_lost(died_of or DeviceLost("the device thread ended"))

    def _sweep_soon(self, after_s: float) -> None:
        if self._sweep_timer is None and not self._stopping:
            self._sweep_due = time.monotonic() + after_s
            self._sweep_timer = self.loop.call_later(after_s, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        late_s = now - self._sweep_due
        self._sweep_timer = None
        with self.lock:
            if late_s > PAUSE_S:
                # Stopped by a signal, or with the whole machine: a forward could not go on either.
                self._stood_still_until = now + PAUSE_S
                self._thread.running_since += late_s
            sources = list(self.threaded.sources())
            running, since = self._thread.running, self._thread.running_since
        for source in sources:
            source.expire(now)
        if running is not None:
            running.expire(now)
            if now - since > self._stuck_after_s:
                self._on_lost(DeviceLost(f"a forward has not returned for {now - since:.0f} s"))
                return
        if sources or running is not None:
            self._sweep_soon(max(SWEEP_EVERY_S, 100 * (time.monotonic() - now)))
