"""The turns of one lane: what waits becomes batches, and what was computed finds its owners.

A lane has one runner at a time, the device thread or the event loop, so its batches are in order.
"""

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

from app.engine.arrival_rate import ArrivalRate
from app.engine.batch import Batch, Run, joined
from app.engine.batch_policy import BatchPolicy, LaneOptions
from app.engine.batch_time import OUTLIER
from app.engine.device_error import free_cached_memory, is_device_lost, is_out_of_memory
from app.engine.dispatch import Dispatch
from app.engine.item_queue import Answer, Item, ItemQueue, Outputs
from app.engine.lane_statistics import LaneStatistics
from app.engine.pipeline import Pipeline
from app.engine.schedule import NORMAL, Key, Schedule
from app.engine.scratch import Scratch
from app.engine.waiter import Step, go_on
from app.errors import (
    DeadlineExceeded,
    DeviceLost,
    ForwardFailed,
    QueueTooSlow,
    ServiceError,
    Unavailable,
)

logger = logging.getLogger(__name__)

LONG_WAIT = 0.1
"""A wait of this share of a request's time is not its own doing; a shorter one may be chance."""

CROWDED_S = 1.0
"""For so long after others were turned away for want of time, it is a crowd that makes one late."""

AT_RISK = 0.25
"""Who used less of its time than this was never in danger, and says nothing about promises: those
of a calm hour would make the first ones of a crowd too bold."""


class OutOfDeviceMemory(Unavailable):
    """Even half of the batch did not fit into the memory of the device."""


class Turns:
    """What a schedule sees of a lane."""

    def __init__(
        self, name: str, runs: Sequence[Run], options: LaneOptions, dispatch: Dispatch
    ) -> None:
        if len(runs) > 1 or isinstance(runs[0], Pipeline):
            # The event loop cannot stand in for several devices, nor for one that has a thread.
            options = replace(options, inline_below_ms=0.0)
        self.name = name
        self.items = ItemQueue()
        self.policy = BatchPolicy(options, dispatch.devices[0])
        self.statistics = LaneStatistics()
        self.arrivals = ArrivalRate()
        self.home: Schedule = dispatch.threaded
        self.offered: Key | None = None
        self.ripening = False
        self._backlog_s = 0.0
        # One a device, in their order; None once the network is let go of.
        self.runs: Sequence[Run] | None = runs
        self.num_out = 0
        # Called after every turn while somebody waits for the lane to be empty.
        self.on_over: Callable[[], None] | None = None
        self.drain_row_s = 0.0
        # When somebody was last turned away because of others.
        self.turned_away_at = -math.inf
        self._backlogged_since: float | None = None
        self._delay_s = options.max_delay_ms / 1000
        self._dispatch = dispatch

    @property
    def is_inline(self) -> bool:
        """Whether its batches run on the event loop."""
        return self.home is self._dispatch.inline

    @property
    def retry_after_s(self) -> float:
        """How long what waits will take, as fast as it went lately."""
        return self.items.num_rows * self.drain_row_s or self.home.backlog_s or 1.0

    @property
    def is_full(self) -> bool:
        """Whether a batch may be started behind another: none smaller would come of it."""
        flies = self.runs is not None and isinstance(self.runs[0], Pipeline)
        return flies and self.items.num_rows >= self.policy.sizes.largest

    def scratch(self, place: int) -> Scratch:
        """Of the thread that its batches run on."""
        return self._dispatch.inline_scratch if self.is_inline else self._dispatch.scratches[place]

    # Under the lock, on any thread

    def head_key(self) -> Key | None:
        """The turn of the item that is first."""
        head = self.items.head()
        return None if head is None or self.runs is None else head.key

    def ripe_at(self, now: float) -> float:
        """Now, unless a delay is allowed and the largest batch is not full."""
        full = self.items.num_rows >= self.policy.sizes.largest
        return now if full else now + self._delay_s

    def count_arrival(self, num_rows: int, key: Key, now: float) -> None:
        """Rows were asked for; those who give way to others do not count."""
        if key[0] <= NORMAL:
            self.arrivals.count(num_rows, now)

    def push(self, item: Item, now: float) -> None:
        """Let `item` wait; on the event loop."""
        self.items.push(item)
        if not self.is_inline:
            self._dispatch.sweep_by(item.deadline, now)
        self.count_arrival(item.num_rows, item.key, now)
        self._recount()
        if self.offered is None or item.key < self.offered:
            self._dispatch.offer(self, now)

    def take(self, now: float) -> "Turn | None":
        """The next batch, and those found late on the way to it."""
        runs, head = self.runs, self.items.head()
        if runs is None or head is None:
            return None
        limit = self.policy.rows_to_take(self.items.num_rows, head.deadline - now, self.is_inline)
        too_late = now + self.policy.too_late_s(self.items.num_rows, limit, now)
        parts, num_rows, late = self.items.take(limit, self.policy.sizes.padded, too_late)
        self._recount()
        self.num_out += 1
        batches = [Batch(parts, num_rows, self.policy.sizes.padded)] if parts else []
        return Turn(self, runs, batches, late, now)

    def waiting_before_s(self, key: Key) -> float:
        """About how long the rows before `key` will take."""
        return self.policy.seconds(self.items.rows_before(key))

    def learn(self, batches: Sequence[Batch], halved: bool, now: float) -> None:
        """Learn from batches that ran: times, drain rate, memory, and where to run the next."""
        for batch in batches:
            if batch.error is None:
                # On the event loop a pause of the thread is no property of the batch, and would
                # cut the next ones short.
                seconds = batch.processor_s if self.is_inline else batch.compute_s
                if batch.parts:
                    self.policy.learn(batch.size, seconds, now, batch.compute_s, batch.processor_s)
                    self.policy.learn_decoding(batch.num_rows, batch.decode_s)
                for item, _ in batch.unusable:
                    self.discard(item)
                continue
            for part in batch.parts:
                # At once, before the event loop tells them: the rest of their rows is in vain.
                self.discard(part.item)
        self._learn_drain(sum(batch.num_rows for batch in batches), now)
        if halved:
            self.policy.lower(max(batch.size for batch in batches))
        dispatch = self._dispatch
        inline = self.policy.prefers_inline(self.is_inline)
        if inline is not self.is_inline:
            self.home.backlog_s -= self._backlog_s
            self._backlog_s = 0.0
            dispatch.move(self, dispatch.inline if inline else dispatch.threaded, now)
        self._recount()

    def discard(self, item: Item) -> None:
        """Let a waiting item wait no more."""
        if item.waiting:
            self.items.discard(item)
            self._recount()

    # On the event loop, without the lock

    def answer(self, item: Item, outputs: Outputs, now: float) -> Step | None:
        """Answer `item`, unless its caller has gone or its time is up; what is left to do then."""
        if item.waiter.done():
            return None
        if item.deadline < now:
            self.expire_item(item, now)
            return None
        queue_s = item.taken_at - item.submitted_at
        step = item.waiter.set_result(
            Answer(
                outputs,
                queue_s * 1000,
                item.compute_s * 1000,
                item.batch_size,
                item.decode_s * 1000,
            )
        )
        if now - item.submitted_at > AT_RISK * item.patience_s:
            self.policy.promise(kept=True)
        self.statistics.count_answer(item.num_rows, queue_s, now - item.submitted_at)
        return step

    def fail_item(self, item: Item, error: Exception) -> None:
        """Answer `item` with `error`, and let the rest of its rows wait no more."""
        if not item.waiter.done():
            item.waiter.set_exception(error)
            self.statistics.num_failed += 1
        with self._dispatch.lock:
            self.discard(item)

    def expire_item(self, item: Item, now: float, *, waiting: bool = False) -> None:
        """Answer `item` that its time is up.

        Others were too many where it was still `waiting`, or had waited for so long that it would
        have been in time without, or where there is a crowd: to read and refuse it takes the
        processors that its batch needed.
        """
        if not item.waiter.done():
            waited_s = item.taken_at - item.submitted_at
            error = DeadlineExceeded("the time was up before the answer")
            is_crowded = now - self.turned_away_at < CROWDED_S
            long_s = max(now - item.deadline, LONG_WAIT * item.patience_s)
            if waiting or is_crowded or waited_s > long_s:
                error = QueueTooSlow(
                    "the time was up before its turn" if waiting else "its turn came too late",
                    retry_after_s=self.retry_after_s,
                )
            item.waiter.set_exception(error)
            if not self._dispatch.stood_still(time.monotonic()):
                self.policy.promise(kept=False)
            self.statistics.num_expired += 1
        with self._dispatch.lock:
            self.discard(item)

    def expire(self, now: float) -> float:
        """Answer all waiting items whose time is up; the earliest deadline that is left."""
        with self._dispatch.lock:
            late = self.items.take_late(now)
            self._recount()
            earliest = self.items.earliest_deadline()
        for item in late:
            self.expire_item(item, now, waiting=True)
        return earliest

    def lose(self, error: BaseException) -> None:
        """Nothing: a lane waits for no device in particular."""

    def over(self, turn: "Turn") -> None:
        """Count a turn that was delivered."""
        for batch in turn.batches:
            if batch.error is None and batch.parts:
                self.statistics.count_batch(batch.num_rows, batch.size, batch.compute_s)
        self.statistics.num_halved += turn.halved
        with self._dispatch.lock:
            self.num_out -= 1
        if self.on_over is not None:
            self.on_over()

    def is_lost(self, error: Exception, place: int) -> bool:
        """Whether `error` says that the device answers no more; asks the device."""
        return is_device_lost(error, self._dispatch.devices[place])

    def free_memory(self, place: int) -> None:
        """Give memory that torch keeps for later back to the device."""
        free_cached_memory(self._dispatch.devices[place])

    @property
    def lock(self) -> threading.Lock:
        """What guards all that several threads see."""
        return self._dispatch.lock

    def _recount(self) -> None:
        """Keep the home's sum of what waits up to date with this lane."""
        backlog_s = self.policy.at_most_s(self.items.num_rows)
        self.home.backlog_s += backlog_s - self._backlog_s
        self._backlog_s = backlog_s

    def _learn_drain(self, num_rows: int, now: float) -> None:
        """How long a row takes while others wait behind it, whatever else the device does."""
        if self._backlogged_since is not None and num_rows:
            row_s = (now - self._backlogged_since) / num_rows
            if self.drain_row_s:  # a pause is no trend
                row_s = min(row_s, OUTLIER * self.drain_row_s)
            self.drain_row_s = 0.7 * (self.drain_row_s or row_s) + 0.3 * row_s
        self._backlogged_since = now if self.items.num_rows else None


class Turn:
    """One batch on its way through the runner, and the items that were late for it."""

    def __init__(
        self,
        turns: Turns,
        runs: Sequence[Run],
        batches: list[Batch],
        late: Sequence[Item],
        now: float,
    ) -> None:
        self.batches = batches
        self.halved = False
        self.expected_s = 0.0
        self.lost: BaseException | None = None
        self._turns = turns
        self._runs = runs
        self._place = 0
        self._is_delivered = False
        self.late = late
        self._answers: list[tuple[Item, Outputs]] = []
        self._failed: list[tuple[Item, Exception]] = []
        for batch in batches:
            self.expected_s += turns.policy.time.seconds(batch.num_rows, batch.size)
            for part in batch.parts:
                if part.start == 0:
                    part.item.taken_at = now

    def run(self) -> None:
        """Compute; what did not fit into memory is tried once more, as two halves."""
        for batch in self.batches:
            batch.run(self._runs[self._place], self._turns.scratch(self._place))
        self._complete()

    def start(self, place: int) -> bool:
        """The same on the device number `place`; or begin it, where that computes by itself."""
        self._place = place
        run = self._runs[place]
        if not (self.batches and isinstance(run, Pipeline)):
            self.run()
            return False
        self.batches[0].start(run)
        if self.batches[0].error is None:
            return True
        self._complete()
        return False

    def land(self) -> None:
        """Wait for what was begun."""
        run = self._runs[self._place]
        if isinstance(run, Pipeline):
            self.batches[0].land(run)
        self._complete()

    def lose(self, error: BaseException) -> None:
        """Whoever is in it shall hear that its device is gone."""
        self.lost = error
        for batch in self.batches:
            batch.error = batch.error or DeviceLost(str(error))

    def _complete(self) -> None:
        if self.batches and is_out_of_memory(self.batches[0].error):
            self._run_halves()
        for batch in self.batches:
            if batch.error is None:
                self._bring_back(batch)
            elif self.lost is None and self._turns.is_lost(batch.error, self._place):
                self.lost = batch.error

    def finish(self, now: float) -> None:
        """Learn from it, under the lock."""
        self._turns.learn(self.batches, self.halved, now)

    def deliver(self) -> None:
        """Answer everybody in it, on the event loop; once, though a lost device may come back."""
        if self._is_delivered:
            return
        self._is_delivered = True
        now = time.monotonic()
        for item in self.late:
            self._turns.expire_item(item, now, waiting=True)
        go_on([self._turns.answer(item, outputs, now) for item, outputs in self._answers])
        for batch in self.batches:
            for item, error in batch.unusable:
                self._turns.fail_item(item, error)
            if batch.error is not None:
                self._failed += [(part.item, batch.error) for part in batch.parts]
        if self._failed:
            self._tell_failed()
        self._turns.over(self)

    def expire(self, now: float) -> float:
        """Answer those whose time is up while it runs; the earliest deadline that is left."""
        earliest = math.inf
        for item in self._items():
            if item.deadline < now:
                self._turns.expire_item(item, now)
            elif not item.waiter.done():
                earliest = min(earliest, item.deadline)
        return earliest

    def _run_halves(self) -> None:
        """Once the `except` is left: its traceback would keep the tensors of what failed."""
        whole = self.batches[0]
        whole.error = None
        self._turns.free_memory(self._place)
        self.batches = whole.halves()
        self.halved = len(self.batches) > 1
        for half in self.batches:
            half.run(self._runs[self._place], self._turns.scratch(self._place))

    def _bring_back(self, batch: Batch) -> None:
        for part, outputs in zip(batch.parts, batch.outputs, strict=True):
            item = part.item
            if part.stop - part.start == item.num_rows:
                item.compute_s, item.batch_size = batch.compute_s, batch.num_rows
                item.decode_s = batch.decode_s
                self._answers.append((item, outputs))
                continue
            with self._turns.lock:  # another device may have the rest of its rows
                item.compute_s += batch.compute_s
                item.decode_s += batch.decode_s
                item.batch_size = max(item.batch_size, batch.num_rows)
                item.num_answered += part.stop - part.start
                item.pieces = [*(item.pieces or ()), (part.start, outputs)]
                is_whole = item.num_answered == item.num_rows
            if is_whole:
                self._join(item, item.pieces)

    def _join(self, item: Item, pieces: Sequence[tuple[int, Outputs]]) -> None:
        try:
            self._answers.append((item, joined(pieces)))
        except (RuntimeError, KeyError) as error:
            # Memory that runs out, or outputs that differ from batch to batch: this item's alone.
            self._failed.append((item, error))

    def _tell_failed(self) -> None:
        """Fail those whose forward raised; the traceback is logged once, not once a request."""
        logger.error(
            "%s failed %d requests",
            self._turns.name,
            len(self._failed),
            exc_info=self._failed[0][1],
        )
        for item, cause in self._failed:
            error = self._error(cause)
            error.__cause__ = cause
            self._turns.fail_item(item, error)
            # Its frames hold the tensors of the failed forward, and this turn, which holds it.
            traceback.clear_frames(cause.__traceback__)

    def _error(self, cause: Exception) -> ServiceError:
        if self.lost is not None:
            return DeviceLost("the device failed and answers no more")
        if is_out_of_memory(cause):
            return OutOfDeviceMemory("the device has too little memory for this request")
        return ForwardFailed(f"{self._turns.name} failed on this batch")

    def _items(self) -> list[Item]:
        batches = list(self.batches)
        return [part.item for batch in batches for part in batch.parts]
