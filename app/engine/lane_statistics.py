"""What one lane has done so far: plain counters, read at scrape time, cheap to keep.

Only the event loop writes them, so they need no lock.
"""

from dataclasses import dataclass, field

from app.metrics import Histogram

SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def _seconds() -> Histogram:
    return Histogram(SECONDS)


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
    queue_s: Histogram = field(default_factory=_seconds)  # per answered request
    compute_s: Histogram = field(default_factory=_seconds)  # per batch
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
