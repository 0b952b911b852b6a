"""What waits in one lane, earliest deadline first within a priority.

Plain data without threads, clocks or event loops: the caller holds the lock and says the time.
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from torch import Tensor

from app.engine.schedule import Key

Outputs = dict[str, Tensor]
# Without a deadline an item takes its turn as if it had this one, so that it never starves.
PATIENCE_S = 60.0


class Answer(NamedTuple):
    """What the network said to one request.

    `outputs` has as many rows as the request had, in its order, in host memory. They are inference
    tensors: read them or compute with them, but change them in place only after a `clone()`.
    """

    outputs: Outputs
    queue_ms: float
    compute_ms: float
    batch_size: int


class Item:
    """One request's rows on their way; its future travels with it."""

    __slots__ = (
        "batch_size",
        "compute_s",
        "deadline",
        "future",
        "inputs",
        "key",
        "next_row",
        "num_answered",
        "num_rows",
        "pieces",
        "submitted_at",
        "taken_at",
        "waiting",
    )

    def __init__(
        self,
        inputs: Tensor,
        future: "asyncio.Future[Answer]",
        now: float,
        deadline: float | None,
        priority: int,
        sequence: int,
    ) -> None:
        self.inputs: Tensor | None = inputs
        self.num_rows: int = inputs.shape[0]
        self.future = future
        self.submitted_at = now
        self.taken_at = now
        self.deadline = math.inf if deadline is None else deadline
        self.key: Key = (priority, now + PATIENCE_S if deadline is None else deadline, sequence)
        self.waiting = False
        self.next_row = 0
        self.num_answered = 0
        self.pieces: list[tuple[int, Outputs]] | None = None
        self.compute_s = 0.0
        self.batch_size = 0


class Part(NamedTuple):
    """Rows `start` to `stop` of one item, as they ride in one batch."""

    item: Item
    rows: Tensor
    start: int
    stop: int


class ItemQueue:
    """A heap of items; whoever was cancelled stays in it as a stone until it surfaces."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._heap: list[tuple[Key, Item]] = []
        self._num_dead = 0

    def push(self, item: Item) -> None:
        """Add an item that waits from now on."""
        heappush(self._heap, (item.key, item))
        item.waiting = True
        self.num_rows += item.num_rows

    def head(self) -> Item | None:
        """The item whose turn is next."""
        while self._heap:
            item = self._heap[0][1]
            if item.waiting and not item.future.done():
                return item
            self._drop_head()
        return None

    def discard(self, item: Item) -> None:
        """Let a waiting item wait no more; its tensor is free at once."""
        if not item.waiting:
            return
        self._forget(item)
        self._num_dead += 1
        if self._num_dead > 64 and 2 * self._num_dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].waiting]
            heapify(self._heap)
            self._num_dead = 0

    def take(
        self, limit: int, padded: Callable[[int], int], too_late: float
    ) -> tuple[list[Part], int, list[Item]]:
        """Up to `limit` rows in order, how many they are, and the items met that are late.

        Late is who has a deadline before `too_late`; who was cancelled is passed over. A lower
        priority only rides in rows that padding (`padded(rows)`) would have filled with nothing.
        """
        parts: list[Part] = []
        late: list[Item] = []
        num_rows = 0
        priority: int | None = None
        while num_rows < limit and (item := self.head()) is not None:
            if item.deadline < too_late:
                self._drop_head()
                late.append(item)
            elif priority is not None and item.key[0] != priority:
                limit = min(limit, padded(num_rows))
                priority = item.key[0]
            else:
                priority = item.key[0]
                part = self._take_from(item, limit - num_rows)
                parts.append(part)
                num_rows += part.stop - part.start
        return parts, num_rows, late

    def take_late(self, now: float) -> list[Item]:
        """Remove and return every item whose deadline has passed; looks at all that wait."""
        late = [item for item in self if item.deadline < now]
        for item in late:
            self.discard(item)
        return late

    def rows_before(self, key: Key) -> int:
        """How many waiting rows have their turn before `key`; looks at all that wait."""
        return sum(item.num_rows - item.next_row for item in self if item.key < key)

    def __iter__(self) -> Iterator[Item]:
        return (item for _, item in self._heap if item.waiting and not item.future.done())

    def _take_from(self, item: Item, num_rows: int) -> Part:
        rows = item.inputs
        if rows is None:
            raise RuntimeError("an item that waits has lost its inputs")
        start = item.next_row
        stop = min(start + num_rows, item.num_rows)
        if stop - start != item.num_rows:
            rows = rows[start:stop]
        self.num_rows -= stop - start
        item.next_row = stop
        if stop == item.num_rows:
            item.waiting = False
            item.inputs = None
            heappop(self._heap)
        return Part(item, rows, start, stop)

    def _drop_head(self) -> None:
        item = heappop(self._heap)[1]
        if item.waiting:
            self._forget(item)
        else:
            self._num_dead -= 1

    def _forget(self, item: Item) -> None:
        item.waiting = False
        item.inputs = None
        self.num_rows -= item.num_rows - item.next_row
