"""What waits in one lane, earliest deadline first within a priority.

Plain data without threads, clocks or event loops: the caller holds the lock and says the time.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from app.engine.pictures import Rows
from app.engine.schedule import Key
from app.engine.waiter import Waiter

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
    decode_ms: float = 0.0


class Item:
    """One request's rows on their way; who waits for its answer travels with it."""

    __slots__ = (
        "batch_size",
        "compute_s",
        "deadline",
        "decode_s",
        "inputs",
        "key",
        "next_row",
        "num_answered",
        "num_rows",
        "pieces",
        "submitted_at",
        "taken_at",
        "waiter",
        "waiting",
    )

    def __init__(
        self,
        inputs: Rows,
        waiter: Waiter[Answer],
        now: float,
        deadline: float | None,
        priority: int,
        sequence: int,
    ) -> None:
        self.inputs: Rows | None = inputs
        self.num_rows: int = inputs.shape[0]
        self.waiter = waiter
        self.submitted_at = now
        self.taken_at = now
        self.deadline = math.inf if deadline is None else deadline
        self.key: Key = (priority, now + PATIENCE_S if deadline is None else deadline, sequence)
        self.waiting = False
        self.next_row = 0
        self.num_answered = 0
        self.pieces: list[tuple[int, Outputs]] | None = None
        self.compute_s = 0.0
        self.decode_s = 0.0
        self.batch_size = 0

    @property
    def patience_s(self) -> float:
        """How long it could wait for its answer when it came."""
        return self.deadline - self.submitted_at


class Part(NamedTuple):
    """Rows `start` to `stop` of one item, as they ride in one batch."""

    item: Item
    rows: Rows
    start: int
    stop: int


class ItemQueue:
    """A sorted list of items, the next one first.

    Sorted and not a heap, because admission asks how much is before a key: that is a bisection
    here, and under overload it is asked for every request that is refused. Taking and inserting
    move pointers, a fraction of a microsecond for a thousand items.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._entries: list[tuple[Key, Item]] = []

    def __iter__(self) -> Iterator[Item]:
        return (item for _, item in self._entries)

    def push(self, item: Item) -> None:
        """Add an item that waits from now on."""
        insort(self._entries, (item.key, item))
        item.waiting = True
        self.num_rows += item.num_rows

    def head(self) -> Item | None:
        """The item whose turn is next; who was cancelled is dropped on the way to it."""
        while self._entries:
            item = self._entries[0][1]
            if not item.waiter.done():
                return item
            self._drop_head()
        return None

    def discard(self, item: Item) -> None:
        """Let a waiting item wait no more; its tensor is free at once."""
        if item.waiting:
            del self._entries[self._index(item.key)]
            self._forget(item)

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

    def earliest_deadline(self) -> float:
        """Of all that wait; infinite where nobody has one. Looks at all of them."""
        return min((item.deadline for item in self), default=math.inf)

    def rows_before(self, key: Key) -> int:
        """About how many waiting rows have their turn before `key`: items, at their mean size."""
        num_items = len(self._entries)
        return self.num_rows * self._index(key) // num_items if num_items else 0

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
            self._drop_head()
        return Part(item, rows, start, stop)

    def _drop_head(self) -> None:
        self._forget(self._entries.pop(0)[1])

    def _forget(self, item: Item) -> None:
        item.waiting = False
        item.inputs = None
        self.num_rows -= item.num_rows - item.next_row

    def _index(self, key: Key) -> int:
        # One element is less than two that begin with it: items are never compared.
        return bisect_left(self._entries, (key,))
