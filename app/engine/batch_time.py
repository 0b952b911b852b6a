"""How long a batch takes, learnt from the batches that ran, and which batch sizes that favours.

`T(n) = start + n * (before_row + per_row)`: the model behind admission, the cut of a batch and
`Retry-After`.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable

MEMORY_BATCHES = 50
RECENT = 16
TRUSTED_FOR_S = 5.0
OUTLIER = 4.0
# The quickest of a size's last batches says what it takes: a busy machine makes them longer only.
LAST_OF_SIZE = 5
# Trials of a size that seems slower may cost this share of the time, and are so many batches apart;
# those of all sizes together are so many.
TRIALS_SHARE = 0.01
BETWEEN_TRIALS = 16
BETWEEN_ANY_TRIALS = 8
# A larger batch has to compute a row quicker by more than this to be worth the wait of the first.
NEARLY = 1.02
# Batches of fewer rows, or that take less time, are not cut for that.
LEAST_CUT = 8
LEAST_CUT_S = 0.005


class BatchTime:
    """Least squares over (rows, seconds), older batches counting less and less.

    The first batch of each size is not counted: it pays for what is set up once. One batch far
    above what is expected counts as four times the expected, so that a pause is not a trend; while
    little is known, four times the longest of the last ones is what can be expected.
    """

    def __init__(self) -> None:
        self.start_s = 0.0
        self.per_row_s = 0.0
        # What a row takes before it can be computed: a picture is decoded.
        self.before_row_s = 0.0
        self.num_batches = 0
        # Whether batches of different sizes were seen, so that the two above are known apart.
        self.is_fitted = False
        self._seen: set[int] = set()
        self._recent: deque[float] = deque(maxlen=RECENT)
        # Of the last batch that was the first of its size, and of the first ones that counted.
        self._first_s = 0.0
        self._learnt: list[float] = []
        self._measured_at = float("-inf")
        # By size: seconds of its last batches, and how many of any size there had been by then.
        self._by_size: dict[int, tuple[deque[float], int]] = {}
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(
        self, num_rows: int, seconds: float, now: float, elapsed_s: float | None = None
    ) -> None:
        """Learn that a batch of `num_rows` rows, padding included, took `seconds`.

        `elapsed_s` is the time on the clock, where `seconds` is time on the processor.
        """
        if num_rows not in self._seen:
            self._seen.add(num_rows)
            self._first_s = seconds
            return
        expected_s = self.compute_s(num_rows)
        if self.num_batches < 8:
            expected_s = max(expected_s, self._first_s, *self._learnt)
        seconds = min(seconds, OUTLIER * expected_s)
        if self.num_batches < 8:
            self._learnt.append(seconds)
        keep = 1.0 - 1.0 / MEMORY_BATCHES
        self._weight = keep * self._weight + 1.0
        self._x = keep * self._x + num_rows
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + num_rows * num_rows
        self._xy = keep * self._xy + num_rows * seconds
        self.num_batches += 1
        last, _ = self._by_size.get(num_rows) or (deque[float](maxlen=LAST_OF_SIZE), 0)
        last.append(seconds)
        self._by_size[num_rows] = (last, self.num_batches)
        self._recent.append(seconds if elapsed_s is None else elapsed_s)
        self._measured_at = now
        if self.num_batches < 16 or self.num_batches % 8 == 0:
            self._fit()

    def add_before(self, num_rows: int, seconds: float) -> None:
        """Learn that `num_rows` rows had to be made in `seconds` before they were computed."""
        row_s = seconds / num_rows
        if self.before_row_s:  # a pause is no trend
            row_s = min(row_s, OUTLIER * self.before_row_s)
        self.before_row_s += (row_s - self.before_row_s) * (0.2 if self.before_row_s else 1.0)

    def seconds(self, num_rows: int, size: int | None = None) -> float:
        """T of `num_rows` rows, padded up to `size`; 0 while nothing is known."""
        return self.before_row_s * num_rows + self.compute_s(size or num_rows)

    def compute_s(self, size: int) -> float:
        """T(size) without what comes before, of which padding rows need nothing."""
        return self.start_s + self.per_row_s * size

    def seen_s(self, num_rows: int) -> tuple[float, int] | None:
        """What batches of just this size took, and how many of any size there were since the last.

        None where there was none. Unlike `seconds` it knows where time grows faster than the rows,
        as where a batch no longer fits into what a processor keeps near, or its memory comes fresh
        from the system each time.
        """
        if num_rows not in self._by_size:
            return None
        last, seen_at = self._by_size[num_rows]
        return min(last), self.num_batches - seen_at

    def rows_within(self, seconds: float) -> int:
        """The most rows whose batch ends within `seconds`; may be 0 or below."""
        row_s = self.before_row_s + self.per_row_s
        if row_s <= 0.0:
            return 1 << 30 if self.start_s <= seconds else 0
        return int(min((seconds - self.start_s) / row_s, 1 << 30))

    def fastest_recent_s(self) -> float | None:
        """The shortest of the last 16 batches; None before three: one may be a fluke."""
        return min(self._recent) if len(self._recent) >= 3 else None

    def is_trusted(self, now: float) -> bool:
        """Whether a batch was measured lately.

        An estimate that refuses everybody would never be corrected; an old one refuses nobody.
        """
        return now - self._measured_at < TRUSTED_FOR_S

    def _fit(self) -> None:
        spread = self._weight * self._xx - self._x * self._x
        if spread <= 1e-9 * self._weight * self._xx:
            # One size only says nothing of the others: take the time as proportional to the rows.
            self.start_s, self.per_row_s = 0.0, self._y / self._x
            self.is_fitted = False
            return
        self.is_fitted = True
        slope = (self._weight * self._xy - self._x * self._y) / spread
        start = (self._y - slope * self._x) / self._weight
        if slope < 0.0:
            slope, start = 0.0, self._y / self._weight
        elif start < 0.0:
            slope, start = self._xy / self._xx, 0.0
        self.start_s, self.per_row_s = start, slope


class BatchSizes:
    """The few sizes that a batch may have on the device; compiled code knows no other."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"batch sizes are at least 1, not {self.sizes}")
        self.largest = self.sizes[-1]

    @classmethod
    def doubling(cls, largest: int) -> "BatchSizes":
        """1, 2, 4, 8, ... and `largest` itself."""
        return cls([1 << power for power in range(largest.bit_length())] + [largest])

    def padded(self, num_rows: int) -> int:
        """The smallest size that holds `num_rows`, which are at most the largest."""
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def at_most(self, num_rows: int) -> int:
        """The largest size of at most `num_rows`, or the smallest there is."""
        return self.sizes[max(0, bisect_right(self.sizes, num_rows) - 1)]

    def up_to(self, largest: int) -> "BatchSizes":
        """The same without what is larger than `largest`; the smallest always stays."""
        return BatchSizes([size for size in self.sizes if size <= largest] or self.sizes[:1])

    def seconds(self, num_rows: int, time: BatchTime) -> float:
        """How long `num_rows` rows take when nothing else runs: full batches, then a padded one."""
        full, rest = divmod(num_rows, self.largest)
        rest_s = time.seconds(rest, self.padded(rest)) if rest else 0.0
        return full * time.seconds(self.largest) + rest_s

    def favoured(self, num_rows: int, time: BatchTime) -> int:
        """How many of `num_rows` waiting rows to take now.

        No more than a long batch was seen to be good for. Otherwise all of them, padded up, unless
        two unpadded batches are quicker than one padded: on a
        processor, where time grows with the rows, five rows are 4 and 1; on a graphics card,
        where a batch costs nearly the same whatever its size, they are 8.
        """
        quickest = self._quickest(min(num_rows, self.largest), time)
        if quickest is not None:
            return quickest
        if num_rows >= self.largest:
            return self.largest
        below = self.at_most(num_rows)
        if below >= num_rows or not time.is_fitted:
            return num_rows
        in_two = time.compute_s(below) + time.compute_s(self.padded(num_rows - below))
        return below if in_two < time.compute_s(self.padded(num_rows)) else num_rows

    def _quickest(self, num_rows: int, time: BatchTime) -> int | None:
        """Of sizes that were all seen, the smallest that is nearly as quick a row as any; or one
        that is to be tried: what was slow in a bad hour need not be now.

        None for few rows, and for what is soon done: there is little to gain, and a request of a
        few rows had better be one batch each time.
        """
        padded = self.padded(num_rows)
        if time.compute_s(padded) < LEAST_CUT_S:
            return None
        sizes = self._doubling_to(padded)
        if len(sizes) < 2:
            return None
        row_s: dict[int, float] = {}
        num_since: dict[int, int] = {}
        for size in sizes:
            seen, rows = time.seen_s(size), min(size, num_rows)
            if seen is None:
                return size if size <= num_rows else None
            seconds, num_since[rows] = seen
            row_s[rows] = seconds / rows
        least_s = min(row_s.values())
        best = next(rows for rows, cost_s in row_s.items() if cost_s <= NEARLY * least_s)
        between = max(BETWEEN_TRIALS, BETWEEN_ANY_TRIALS * (len(row_s) - 1))
        for rows, cost_s in row_s.items():
            # A trial costs so many batches of the best size, so it is due after so many of them.
            lost = (cost_s / row_s[best] - 1.0) * rows / best
            if rows != best and num_since[rows] >= max(between, lost / TRIALS_SHARE):
                return rows
        return best

    def _doubling_to(self, largest: int) -> list[int]:
        """Those from `LEAST_CUT` on that are worth a trial, each at least twice the one before; and
        `largest`.
        """
        found = [LEAST_CUT // 2]
        for size in self.sizes:
            if 2 * found[-1] <= size < largest:
                found.append(size)
        return [*found[1:], largest]
