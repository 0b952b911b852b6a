"""Whose turn it is: the one ordered list of lanes and calls that wait for one runner.

A lane that has nothing to do is in no list, so that a hundred idle ones cost nothing.
"""

import math
import sys
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

# Priority (smaller is sooner), deadline, number of arrival.
Key = tuple[int, float, int]
NORMAL = 0
LOWEST = 1000
LAST: Key = (sys.maxsize, math.inf, 0)


class Work(Protocol):
    """What a runner runs: `run` alone, `finish` under the lock, `deliver` on the event loop."""

    expected_s: float
    lost: BaseException | None

    def run(self) -> None:
        """Compute; keeps every `Exception` for `deliver`."""

    def start(self, place: int) -> bool:
        """Compute on the device number `place`, or let it begin; whether it must be landed."""

    def land(self) -> None:
        """Wait for what was begun; keeps every `Exception` for `deliver`."""

    def lose(self, error: BaseException) -> None:
        """It will never come back; on the event loop, before `deliver`."""

    def finish(self, now: float) -> None:
        """Learn from how it went and say where the next turn is; right after `run`."""

    def deliver(self) -> None:
        """Answer whoever asked."""

    def expire(self, now: float) -> float:
        """Answer those whose deadline passes while it runs, and tell the earliest that is left; on
        the event loop.
        """


class Source(Protocol):
    """What has a turn: a lane, or a single call."""

    home: "Schedule"
    offered: Key | None
    ripening: bool

    @property
    def is_full(self) -> bool:
        """Whether its next work may be started behind another that flies."""

    def head_key(self) -> Key | None:
        """The turn it wants; None when it wants none."""

    def ripe_at(self, now: float) -> float:
        """When it may be taken: `now`, or later where a batch is to fill up first."""

    def take(self, now: float) -> Work | None:
        """The work of this turn; None when those who waited have gone."""

    def waiting_before_s(self, key: Key) -> float:
        """About how long what has its turn before `key` will take."""

    def expire(self, now: float) -> float:
        """Answer those whose deadline passed while they waited, and tell the earliest that is left;
        on the event loop.
        """

    def lose(self, error: BaseException) -> None:
        """The device that it waits for is gone; on the event loop."""


class Schedule:
    """Earliest deadline first within a priority, over all sources; every call needs the lock.

    Args:
        num_runners: devices that share what waits here.
    """

    def __init__(self, num_runners: int = 1) -> None:
        self.num_runners = num_runners
        # How long all that waits takes, at most; what waits keeps it up to date.
        self.backlog_s = 0.0
        self.running_until = 0.0
        # The counted number keeps two entries of one source from ever being compared further.
        self._number = count()
        self._ready: list[tuple[Key, int, Source]] = []
        self._ripening: list[tuple[float, int, Source]] = []

    def offer(self, source: Source, now: float) -> None:
        """Give `source` the turn that its head deserves."""
        key = source.head_key()
        if key is None or (source.offered is not None and source.offered <= key):
            return
        ripe_at = source.ripe_at(now)
        if ripe_at <= now:
            self._make_ready(source, key)
        elif not source.ripening:
            source.ripening = True
            heappush(self._ripening, (ripe_at, next(self._number), source))

    def next(self, now: float) -> Work | None:
        """The work whose turn it is; None when nothing is ripe."""
        self._ripen(now)
        while self._ready:
            key, _, source = heappop(self._ready)
            if source.home is not self or source.offered != key:
                continue
            source.offered = None
            work = source.take(now)
            self._offer_rest(source)
            if work is not None:
                self.running_until = max(now, self.running_until) + work.expected_s
                return work
        return None

    def head_key(self, now: float) -> Key:
        """The turn that is next; `LAST` where none is."""
        self._ripen(now)
        while self._ready:
            key, _, source = self._ready[0]
            if source.home is self and source.offered == key:
                return key
            heappop(self._ready)
        return LAST

    def next_full(self, now: float) -> Work | None:
        """The work whose turn it is, if it may be started behind another."""
        is_full = self.head_key(now) is not LAST and self._ready[0][2].is_full
        return self.next(now) if is_full else None

    def wait_s(self, now: float) -> float | None:
        """Seconds until something ripens; None when nothing will by itself."""
        return max(0.0, self._ripening[0][0] - now) if self._ripening else None

    def has_waiting(self) -> bool:
        """Whether anything waits here (or did, and was cancelled since)."""
        return bool(self._ready or self._ripening)

    def sources(self) -> Iterator[Source]:
        """Everything that waits here, each once."""
        seen: set[int] = set()
        for entry in (*self._ready, *self._ripening):
            source = entry[2]
            if source.home is self and id(source) not in seen:
                seen.add(id(source))
                yield source

    def before_s(self, key: Key, now: float) -> float:
        """About how long until everything before `key` is done; asks all that have work."""
        ahead_s = sum(source.waiting_before_s(key) for source in self.sources())
        return (max(0.0, self.running_until - now) + ahead_s) / self.num_runners

    def _offer_rest(self, source: Source) -> None:
        """What is left after a turn has waited already: it never waits to fill up again."""
        key = source.head_key()
        if key is not None:
            self._make_ready(source, key)

    def _make_ready(self, source: Source, key: Key) -> None:
        source.offered = key
        heappush(self._ready, (key, next(self._number), source))

    def _ripen(self, now: float) -> None:
        while self._ripening and self._ripening[0][0] <= now:
            source = heappop(self._ripening)[2]
            if source.home is self and source.ripening:
                source.ripening = False
                if source.offered is None:
                    self._offer_rest(source)
