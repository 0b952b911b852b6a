"""How fast rows are asked of one lane, whether they are admitted or refused."""

WINDOW_S = 0.25


class ArrivalRate:
    """Rows a second over the last windows, the newest of which counts for half.

    A window ends with the first arrival after it, so that a pause makes the rate lower.
    """

    def __init__(self) -> None:
        self.per_s = 0.0
        self._num_rows = 0
        self._since = 0.0

    def count(self, num_rows: int, now: float) -> None:
        """So many rows were asked for."""
        self._num_rows += num_rows
        elapsed_s = now - self._since
        if elapsed_s >= WINDOW_S:
            self.per_s = (self.per_s + self._num_rows / elapsed_s) / 2
            self._num_rows, self._since = 0, now
