"""An ideal batcher on a clock of its own: it never waits, and nothing but its batches costs time.

Whenever its device is free it takes what waits, up to the largest size. Batches have a few fixed
sizes, and take as long as batches of that size usually take, on a machine that is as slow at times
as it was measured to be. So a server can be held against what its own batches allow at a load.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.pace import Pace, Span

STEADY: Final = Pace([Span(1.0, 1.0)])


@dataclass(frozen=True)
class BatchTimes:
    """How long batches take.

    Attributes:
        usual_s: size of a batch -> what it usually takes in seconds; sizes in growing order.
    """

    usual_s: Mapping[int, float]

    @property
    def sizes(self) -> list[int]:
        """That a batch may have."""
        return list(self.usual_s)

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
            if self.usual_s[below] + self.usual_s[rest] < self.usual_s[padded]:
                return below, below
        return num_waiting, padded


def latencies_s(
    moments: Sequence[float],
    times: BatchTimes,
    pace: Pace = STEADY,
    *,
    constant_s: float = 0.0,
    at_s: float = 0.0,
) -> np.ndarray:
    """From each request's arrival to the end of its batch, in seconds.

    Args:
        moments: of arrivals, sorted; one row each.
        constant_s: added to every latency.
        at_s: the moment of the pace at which it begins.
    """
    arrivals = np.asarray(moments)
    plan = [(0, 0), *(times.take(count) for count in range(1, times.sizes[-1] + 1))]
    done = np.empty(len(arrivals))
    first, free_at = 0, 0.0
    listed = arrivals.tolist()
    while first < len(listed):
        begins = max(free_at, listed[first])
        waiting = bisect_right(listed, begins, first) - first
        num_rows, size = plan[min(waiting, times.sizes[-1])]
        free_at = pace.after(at_s + begins, times.usual_s[size]) - at_s
        done[first : first + num_rows] = free_at
        first += num_rows
    return done - arrivals + constant_s
