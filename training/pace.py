"""How fast a loop goes, when it should speak, and how long it still needs."""

import time


class Pace:
    """A clock over `num_steps` steps."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.start(0, 0.0)

    def start(self, step: int, seconds: float) -> None:
        """Begin at `step`, after `seconds` of earlier attempts."""
        now = time.perf_counter()
        self._started, self._before, self._first_step, self._step = now, seconds, step, step
        self._images, self._images_since = 0, now
        self._last: dict[str, float] = {}

    def did(self, num_images: int) -> None:
        """One more step, of so many images."""
        self._step += 1
        self._images += num_images

    @property
    def seconds(self) -> float:
        """Spent so far, earlier attempts included."""
        return self._before + time.perf_counter() - self._started

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the steps of this attempt; None before the first."""
        done = self._step - self._first_step
        if not done:
            return None
        elapsed = time.perf_counter() - self._started
        return elapsed / done * (self._num_steps - self._step)

    def images_per_second(self) -> float:
        """Since this was asked last."""
        now = time.perf_counter()
        pace = self._images / max(1e-9, now - self._images_since)
        self._images, self._images_since = 0, now
        return pace

    def is_due(self, what: str, every_seconds: float) -> bool:
        """Whether `what` was last due so long ago; if so, its time begins again."""
        now = time.perf_counter()
        if now - self._last.setdefault(what, now) < every_seconds:
            return False
        self._last[what] = now
        return True
