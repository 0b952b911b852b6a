"""Who waits for an item's answer: a future, or who goes on where his batch ends."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

Step: TypeAlias = Callable[[], "Step | None"]
"""Does one part of a work, and returns the next; None where nothing is left."""
TOGETHER: Final = 32
"""So many go on together: the first shall not wait for hundreds, nor all their answers be kept."""


class Waiter(Protocol[T_contra]):
    """As much of an `asyncio.Future` as the engine needs; other threads ask `done` only."""

    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""

    def cancelled(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: T_contra, /) -> Step | None:
        """Answer; once, and only who is not `done`. What is returned is for `go_on`."""

    def set_exception(self, error: BaseException, /) -> None:
        """Answer with an error; once, and only who is not `done`."""


def go_on(steps: Iterable[Step | None]) -> None:
    """Take the first of all steps, then what each of them returned, until none of a group is left.

    Alike steps in a row find their code and their data in the caches, which a system call between
    them, as every answer is one, would empty: a third of what a small request costs. What a step
    raises goes to the event loop's handler, because others have theirs still to take.
    """
    all_left = [step for step in steps if step is not None]
    for begin in range(0, len(all_left), TOGETHER):
        left = all_left[begin : begin + TOGETHER]
        while left:
            left = [further for step in left if (further := _taken(step)) is not None]


def _taken(step: Step) -> Step | None:
    try:
        return step()
    except Exception as error:
        message = "an answer could not be given"
        asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
        return None


class Outcome(Generic[T]):
    """A future whose one callback needs no further round of the loop.

    That round is a system call, and what an idle core has forgotten by then is read anew.

    Args:
        then: the first step of who waits, taken once: when there is a result, an error, or nobody
            who waits.
    """

    __slots__ = ("_error", "_is_cancelled", "_result", "_then")

    def __init__(self, then: Step) -> None:
        self._then: Step | None = then
        self._result: T | None = None
        self._error: BaseException | None = None
        self._is_cancelled = False

    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self._then is None

    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Wait no more; of no effect where it is `done`."""
        if self._then is not None:
            self._is_cancelled = True
            go_on([self._first_step()])

    def set_result(self, result: T, /) -> Step:
        """Answer; once. The first step is still to be taken."""
        self._result = result
        return self._first_step()

    def set_exception(self, error: BaseException, /) -> None:
        """Answer with an error; once."""
        self._error = error
        go_on([self._first_step()])

    def take(self) -> T:
        """The result, or the error raised; called once, because it forgets both.

        Raises:
            asyncio.CancelledError: nobody was to wait any more.
            asyncio.InvalidStateError: there is nothing yet, or it was taken.
        """
        result, error = self._result, self._error
        self._result = self._error = None
        if result is not None:
            return result
        if self._is_cancelled:
            raise asyncio.CancelledError
        if error is None:
            raise asyncio.InvalidStateError
        try:
            raise error
        finally:
            # An error knows this frame: no ring, no garbage.
            del error

    def _first_step(self) -> Step:
        then, self._then = self._then, None
        if then is None:
            raise asyncio.InvalidStateError
        return then
