"""What one lane has done so far: plain counters, read at scrape time, cheap to keep.

Only the event loop writes them, so they need no lock.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Histogram:
    """Counts of values up to each bound, the last for what is above them all, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class BatchCount:
    """The batches of one size: how many there were and how long they computed."""

    num_batches: int = 0
    compute_s: float = 0.0


@dataclass(slots=True)
class LaneStatistics:
    """Requests are what callers submit, rows what they consist of."""

    num_requests: int = 0  # answered
    num_rows: int = 0  # answered
    num_padding_rows: int = 0  # computed for nobody
    num_failed: int = 0  # their forward raised, or the device was lost
    num_refused_full: int = 0  # the queue was full
    num_refused_late: int = 0  # the deadline could not be met
    num_expired: int = 0  # the deadline passed after admission
    num_abandoned: int = 0  # the caller had gone
    num_halved: int = 0  # batches that did not fit into memory at once
    success_s: float = 0.0  # from submit to answer, summed over answered requests
    queue_s: Histogram = field(default_factory=Histogram)  # per answered request
    compute_s: Histogram = field(default_factory=Histogram)  # per batch
    batches: dict[int, BatchCount] = field(default_factory=dict)  # by rows, without padding

    def count_batch(self, num_rows: int, size: int, compute_s: float) -> None:
        """One batch of `num_rows` rows, padded to `size`, was computed."""
        self.compute_s.observe(compute_s)
        self.num_padding_rows += size - num_rows
        count = self.batches.get(num_rows)
        if count is None:
            count = self.batches[num_rows] = BatchCount()
        count.num_batches += 1
        count.compute_s += compute_s

    def count_answer(self, num_rows: int, queue_s: float, total_s: float) -> None:
        """One request of `num_rows` rows was answered `total_s` after it was submitted."""
        self.num_requests += 1
        self.num_rows += num_rows
        self.success_s += total_s
        self.queue_s.observe(queue_s)
