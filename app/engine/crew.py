"""Threads that share many small pieces of work, for a thread that waits for all of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.engine.device_thread import compute_with

One = TypeVar("One")
Result = TypeVar("Result")


class Crew:
    """Each computes alone; a single piece is done by who asks, without a hand-over.

    The one who asks does not help with several: a thread that computes on all cores would wait,
    within each of its steps, for a core that a helper has.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(
            num_threads, "crew", initializer=compute_with, initargs=(1,)
        )

    def map(self, function: Callable[[One], Result], many: Sequence[One]) -> list[Result]:
        """`function` of each, in their order."""
        if len(many) == 1:
            return [function(many[0])]
        return list(self._threads.map(function, many))

    def close(self) -> None:
        """End the threads after what they do."""
        self._threads.shutdown(wait=True, cancel_futures=True)
