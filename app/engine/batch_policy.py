"""How one lane batches: its options, and the three decisions that follow from measured times."""

import math
from collections import deque
from dataclasses import dataclass

import torch

from app.engine.batch_time import RECENT, BatchSizes, BatchTime

TINY_S = 0.001
# A network that used the processor for so long lately stays off the event loop, however quick it
# was beside that: who else asks would wait, and nobody could end a forward that never returns.
TOO_LONG_INLINE_S = 0.05
# A promise is the estimate times a margin. It grows with every promise that was broken and
# shrinks with every one that was kept, so that it settles where one in two hundred is broken.
MARGIN, LEAST_MARGIN, MOST_MARGIN = 1.1, 1.0, 2.0
BROKEN_STEP, KEPT_STEP = 0.02, 0.0001
# A batch is taken to fill up where so many times its rows are expected.
PLENTY = 1.5


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """How one lane queues and batches.

    Args:
        max_batch_items: the most rows that share a forward.
        max_queue_items: rows that may wait; beyond them `QueueFull`.
        max_wait_ms: the longest expected wait before its turn; beyond it `QueueFull` as well.
        max_delay_ms: how long a batch may wait to fill; 0 takes what is there.
        inline_below_ms: on a processor, forwards below it run on the event loop; 0 never.
        sizes: the batch sizes that the device sees; 1, 2, 4, 8, ... unless said. All of them
            (`tuple(range(1, largest + 1))`) means no padding.
        dtype: the type of the rows.
    """

    max_batch_items: int = 32
    max_queue_items: int = 1024
    max_wait_ms: float | None = None
    max_delay_ms: float = 0.0
    inline_below_ms: float = 0.3
    sizes: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32


class BatchPolicy:
    """How many rows to take, who is beyond help, and which thread to run on."""

    def __init__(self, options: LaneOptions, device: torch.device) -> None:
        self.time = BatchTime()
        self.sizes = BatchSizes.doubling(options.max_batch_items)
        if options.sizes is not None:
            self.sizes = BatchSizes(options.sizes).up_to(options.max_batch_items)
        self._inline_below_s = options.inline_below_ms / 1000
        if device.type != "cpu" or options.max_delay_ms:
            self._inline_below_s = 0.0
        self._fastest_s: float | None = None
        self._full_s = self._row_s = self._shortest_s = 0.0
        self._num_unlearnt = 0
        self._processor_s: deque[float] = deque(maxlen=RECENT)
        self.margin = MARGIN

    def promise(self, kept: bool) -> None:
        """An admitted request with a deadline was answered in time, or was not."""
        if kept:
            self.margin = max(LEAST_MARGIN, self.margin - KEPT_STEP)
        else:
            self.margin = min(MOST_MARGIN, self.margin + BROKEN_STEP)

    def learn(
        self,
        size: int,
        seconds: float,
        now: float,
        elapsed_s: float | None = None,
        processor_s: float = 0.0,
    ) -> None:
        """A batch of `size` rows, padding included, took `seconds`; see `BatchTime.add`.

        It used the processor for `processor_s`: a pause of the machine is no part of it.

        Once their time is known, only every eighth of the tiny batches is learnt from: they come
        by the thousand, and learning costs as much as a tenth of one.
        """
        self._num_unlearnt += 1
        known = self.time.num_batches >= 64 and seconds < TINY_S
        if known and self._num_unlearnt < 8:
            return
        self._num_unlearnt = 0
        self.time.add(size, seconds, now, elapsed_s)
        self._processor_s.append(processor_s)
        self._fastest_s = self.time.fastest_recent_s()
        self._full_s = self.time.seconds(self.sizes.largest)
        self._row_s = self._full_s / self.sizes.largest
        if self._fastest_s is not None:
            self._shortest_s = min(self._fastest_s, self.time.seconds(self.sizes.sizes[0]))

    def learn_decoding(self, num_rows: int, seconds: float) -> None:
        """Before a batch of `num_rows` rows computed, its pictures were decoded in `seconds`."""
        if seconds or self.time.before_row_s:
            self.time.add_before(num_rows, seconds)

    def at_most_s(self, num_rows: int) -> float:
        """An upper bound of `seconds`, for one multiplication."""
        return num_rows * self._row_s + self._full_s if num_rows else 0.0

    def seconds(self, num_rows: int) -> float:
        """How long `num_rows` rows take when nothing else runs; 0 while nothing is known."""
        return self.sizes.seconds(num_rows, self.time)

    def rows_filled(self, rate_per_s: float, patience_s: float) -> int:
        """The largest batch that those fill who come when it is about to start.

        They are the ones who can wait for all of it. 0 where time is short or too few come, so
        that every row that can be had is needed.

        Args:
            rate_per_s: of rows that are asked for.
            patience_s: how long each can wait from its arrival.
        """
        if patience_s == math.inf:
            return 0
        for size in reversed(self.sizes.sizes):
            spare_s = patience_s - self.margin * self.time.seconds(size)
            if spare_s * rate_per_s >= PLENTY * size:
                return size
        return 0

    def rows_to_take(self, num_rows: int, left_s: float, is_inline: bool) -> int:
        """How many of `num_rows` waiting rows, the first of which has `left_s` seconds left."""
        if num_rows <= self.sizes.sizes[0]:
            return num_rows
        limit = self.sizes.favoured(num_rows, self.time)
        if is_inline:
            # What a batch costs whatever its size cannot be made shorter by a smaller one.
            most = self.time.rows_within(self.time.start_s + 2 * self._inline_below_s)
            limit = min(limit, self.sizes.at_most(most))
        return limit if left_s == math.inf else self._within(left_s, limit)

    def too_late_s(self, num_rows: int, limit: int, now: float) -> float:
        """Who of `num_rows` has less than this left is not worth one of the `limit` rows to take.

        Nobody is answered sooner than the smallest batch takes. And where enough others wait to
        fill this batch and another, whoever would be late in it only takes their place.
        """
        if not self.time.is_trusted(now):
            return 0.0
        if num_rows < 2 * limit:
            return self._shortest_s
        return max(self._shortest_s, self.time.seconds(self.sizes.padded(limit)))

    def prefers_inline(self, is_inline: bool) -> bool:
        """Whether forwards are so short that a thread costs more; with hysteresis."""
        if self._fastest_s is None:
            return is_inline
        is_quick = self._fastest_s < (2 if is_inline else 1) * self._inline_below_s
        return is_quick and max(self._processor_s) < TOO_LONG_INLINE_S

    def lower(self, largest: int) -> None:
        """Take no batches beyond `largest` any more, because they do not fit into memory."""
        self.sizes = self.sizes.up_to(largest)

    def _within(self, left_s: float, limit: int) -> int:
        """Fewer rows, where that keeps the first deadline and most of the throughput.

        Without the second condition one deadline that is nearly due would let the device compute
        a single row where sixty wait, and make the next ones late too.
        """
        size = self.sizes.padded(limit)
        fewer = self.sizes.at_most(self.time.rows_within(left_s))
        if fewer >= size or self.time.seconds(fewer) > left_s:
            return limit
        throughput = size / self.time.seconds(size)
        keeps_most = fewer / self.time.seconds(fewer) >= 0.8 * throughput
        return min(fewer, limit) if keeps_most else limit
