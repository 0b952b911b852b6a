"""Brings work to its runner: a device thread, or the event loop itself for what is tiny.

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
from functools import partial
from itertools import count

import torch

from app.engine.device_thread import DeviceThread
from app.engine.schedule import Schedule, Source, Work
from app.engine.scratch import Scratch
from app.errors import DeviceLost

INLINE_BUDGET_S = 0.001
# Between two sweeps: who is late is told this soon, and a pause or a stuck forward is noticed.
SHORTEST_SWEEP_S, LONGEST_SWEEP_S = 0.02, 0.25
# A timer may ring so much too soon.
TIMER_S = 0.002
# A sweep that comes so much too late was not delayed by work: the process stood still.
PAUSE_S = 0.5

logger = logging.getLogger(__name__)


class Dispatch:
    """The runners, the lock that guards what waits for them, and the sweep.

    Several devices share one schedule: whichever is free takes what is next. What must run on a
    certain one waits in a schedule of that device's own.

    While something waits or runs, the sweep answers those whose deadline has passed, soon after the
    earliest has; an event loop that wakes takes a core from a forward, and a forward waits for all
    of its threads. It sleeps a hundred times as long as it took.

    Args:
        devices: a thread each; the event loop stands in for a single processor only.
        on_lost: called on `loop` when the last device or its thread can be used no more.
        stuck_after_s: a forward that runs for longer counts as a lost device.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *devices: torch.device,
        num_threads: int,
        stuck_after_s: float,
        on_lost: Callable[[BaseException], None],
    ) -> None:
        self.loop = loop
        self.devices = devices
        self.lock = threading.Lock()
        self.numbers = count()
        self.threaded = Schedule(len(devices))
        self.own = [self.threaded] if len(devices) == 1 else [Schedule() for _ in devices]
        self.inline = Schedule()
        self.scratches = [Scratch() for _ in devices]
        self.inline_scratch = Scratch()
        self.ended = asyncio.Event()
        self.lost: set[int] = set()
        self._on_lost = on_lost
        self._stuck_after_s = stuck_after_s
        self._inline_soon = False
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_due = 0.0
        self._stood_still_until = -math.inf
        self._stopping = False
        self._num_ended = 0
        self._threads = [
            DeviceThread(
                [self.threaded] if own is self.threaded else [self.threaded, own],
                self.lock,
                loop,
                device=device,
                place=place,
                num_threads=num_threads,
                call_another=partial(self._wake, self.threaded),
                deliver=partial(self._deliver, place=place),
                ended=partial(self._thread_ended, place),
            )
            for place, (device, own) in enumerate(zip(devices, self.own, strict=True))
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def offer(self, source: Source, now: float) -> None:
        """`source` wants a turn; on the event loop, under the lock."""
        source.home.offer(source, now)
        if source.home is self.inline:
            self._run_inline_soon()
        else:
            self._wake(source.home)

    def sweep_by(self, deadline: float, now: float) -> None:
        """Sweep soon after `deadline`, if it does not before; on the event loop."""
        due = max(now + SHORTEST_SWEEP_S, min(deadline + TIMER_S, now + LONGEST_SWEEP_S))
        if self._sweep_timer is not None:
            if self._sweep_due <= due:
                return
            self._sweep_timer.cancel()
            self._sweep_timer = None
        if not self._stopping:
            self._sweep_due = due
            self._sweep_timer = self.loop.call_later(due - now, self._sweep)

    def move(self, source: Source, home: Schedule, now: float) -> None:
        """From now on `source` has its turns in `home`; by its runner, under the lock."""
        source.home, source.offered, source.ripening = home, None, False
        home.offer(source, now)
        if home is self.threaded:
            self._wake(home)
            self.sweep_by(now, now)

    def stood_still(self, now: float) -> bool:
        """Whether the process has just stood still, so that nobody can be blamed for a delay."""
        overslept = self._sweep_timer is not None and now - self._sweep_due > PAUSE_S
        return overslept or now < self._stood_still_until

    def stop(self) -> None:
        """End the threads after the work that they run; `ended` is set when all have."""
        self._stopping = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        with self.lock:
            for thread in self._threads:
                thread.stop()

    def lose(self, place: int, cause: BaseException) -> None:
        """The device number `place` can be used no more; the others go on."""
        if place in self.lost:
            return
        self.lost.add(place)
        with self.lock:
            self._threads[place].stop()
            running = list(self._threads[place].running)
        if len(self.lost) == len(self.devices):
            self._on_lost(cause)
            return
        logger.critical("%s is lost, the others go on", self.devices[place], exc_info=cause)
        for work in running:
            work.lose(cause)
            work.deliver()
        for source in list(self.own[place].sources()):
            source.lose(cause)

    def _wake(self, home: Schedule) -> None:
        """Whoever sleeps and may take what waits in `home`; under the lock."""
        for thread, own in zip(self._threads, self.own, strict=True):
            if home in (self.threaded, own) and thread.is_asleep:
                thread.wake()
                return

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
                self.lose(0, error)
                raise
            now = time.monotonic()
            with self.lock:
                self.inline.running_until = 0.0
                work.finish(now)
            self._deliver(work)

    def _deliver(self, work: Work, place: int = 0) -> None:
        work.deliver()
        if work.lost is not None:
            self.lose(place, work.lost)
        if self.inline.has_waiting():
            self._run_inline_soon()

    def _thread_ended(self, place: int, died_of: BaseException | None) -> None:
        self._threads[place].join()
        self._num_ended += 1
        if self._num_ended == len(self.devices):
            self.ended.set()
        if died_of is not None:
            logger.error("the device thread died", exc_info=died_of)
        if died_of is not None or not self._stopping:
            self.lose(place, died_of or DeviceLost("the device thread ended"))

    def _sweep(self) -> None:
        now = time.monotonic()
        late_s = now - self._sweep_due
        self._sweep_timer = None
        with self.lock:
            if late_s > PAUSE_S:
                # Stopped by a signal, or with the whole machine: a forward could not go on either.
                self._stood_still_until = now + PAUSE_S
                for thread in self._threads:
                    thread.running_since += late_s
            sources = [one for home in {self.threaded, *self.own} for one in home.sources()]
            flying = [(list(one.running), one.running_since) for one in self._threads]
        earliest = min((source.expire(now) for source in sources), default=math.inf)
        for place, (running, since) in enumerate(flying):
            earliest = min(earliest, *(work.expire(now) for work in running), math.inf)
            if running and place not in self.lost and now - since > self._stuck_after_s:
                self.lose(place, DeviceLost(f"a forward has not returned for {now - since:.0f} s"))
        alive = len(self.lost) < len(self.devices)
        if alive and (sources or any(running for running, _ in flying)):
            took_s = time.monotonic() - now
            self.sweep_by(max(earliest, now + 100 * took_s), now + took_s)
