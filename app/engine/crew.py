"""Threads that share many small pieces of work, for a thread that waits for all of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.engine.device_thread import compute_with

One = TypeVar("One")
Result = TypeVar("Result")


class Crew:
    """Each computes alone, on a core of its own.

    Args:
        num_threads: of them, and into how many pieces what is shared is best cut.
    """

    def __init__(self, num_threads: int) -> None:
        self.count = num_threads
        self._threads = ThreadPoolExecutor(
            num_threads, "crew", initializer=compute_with, initargs=(1,)
        )

    def map(self, function: Callable[[One], Result], many: Sequence[One]) -> list[Result]:
        """`function` of each, in their order.

        The asker does not help: a thread that computes on all cores would wait, within each of its
        steps, for a core that a helper has.
        """
        return list(self._threads.map(function, many))

    def share(self, function: Callable[[One], Result], pieces: Sequence[One]) -> list[Result]:
        """`function` of each, in their order; the first by who asks.

        Args:
            function: computes without torch, and so on one core, whoever calls it.
        """
        others = self._threads.map(function, pieces[1:])
        return [function(pieces[0]), *others]

    def close(self) -> None:
        """End the threads after what they do."""
        self._threads.shutdown(wait=True, cancel_futures=True)
