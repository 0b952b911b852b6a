"""An ideal batcher on a clock of its own: it never waits, and nothing but its batches costs time.

Whenever its device is free it takes what waits, up to the largest size. Batches have a few fixed
sizes, and take as long as batches of that size were measured to take: each time is drawn anew from
what was measured. So a server can be held against what its own batches allow at a given load.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWN = 256


@dataclass(frozen=True)
class BatchTimes:
    """How long batches take.

    Attributes:
        measured_s: size of a batch -> some of its times in seconds, all as likely as each other;
            sizes in growing order.
    """

    measured_s: Mapping[int, Sequence[float]]

    @property
    def sizes(self) -> list[int]:
        """That a batch may have."""
        return list(self.measured_s)

    def median_s(self, size: int) -> float:
        """Of batches of one size."""
        return float(np.median(self.measured_s[size]))

    def take(self, num_waiting: int) -> tuple[int, int]:
        """How many rows to take of those that wait, and the size of their batch.

        All of them in a padded batch, unless two batches without padding are quicker.
        """
        sizes = self.sizes
        if num_waiting >= sizes[-1]:
            return sizes[-1], sizes[-1]
        padded = sizes[bisect_left(sizes, num_waiting)]
        below = sizes[max(0, bisect_right(sizes, num_waiting) - 1)]
        if below < num_waiting:
            rest = sizes[bisect_left(sizes, num_waiting - below)]
            if self.median_s(below) + self.median_s(rest) < self.median_s(padded):
                return below, below
        return num_waiting, padded

    def draws_s(self, size: int, random: np.random.Generator) -> Iterator[float]:
        """Times of batches of one size, without end."""
        while True:
            yield from random.choice(self.measured_s[size], NUM_DRAWN).tolist()


def latencies_s(
    moments: Sequence[float], times: BatchTimes, *, constant_s: float = 0.0, seed: int = 0
) -> np.ndarray:
    """From each request's arrival to the end of its batch, in seconds.

    Args:
        moments: of arrivals, sorted; one row each.
        constant_s: added to every latency.
    """
    random = np.random.default_rng(seed)
    arrivals = np.asarray(moments)
    drawn = {size: times.draws_s(size, random) for size in times.sizes}
    plan = [(0, 0), *(times.take(count) for count in range(1, times.sizes[-1] + 1))]
    done = np.empty(len(arrivals))
    first, free_at = 0, 0.0
    listed = arrivals.tolist()
    while first < len(listed):
        begins = max(free_at, listed[first])
        waiting = bisect_right(listed, begins, first) - first
        num_rows, size = plan[min(waiting, times.sizes[-1])]
        free_at = begins + next(drawn[size])
        done[first : first + num_rows] = free_at
        first += num_rows
    return done - arrivals + constant_s
