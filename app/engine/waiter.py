"""Who waits for an item's answer: a future, or who is told at once."""

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Waiter(Protocol[T_contra]):
    """As much of an `asyncio.Future` as the engine needs; other threads ask `done` only."""

    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""

    def cancelled(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: T_contra, /) -> None:
        """Answer; once, and only who is not `done`."""

    def set_exception(self, error: BaseException, /) -> None:
        """Answer with an error; once, and only who is not `done`."""


class Outcome(Generic[T]):
    """A future whose one callback is called where its result is set, not in the loop's next round.

    That round is a system call, and what an idle core has forgotten by then is read anew.

    Args:
        then: called once, when there is a result, an error, or nobody who waits. What it raises
            goes to the event loop's handler: whoever answers has others to answer.
    """

    __slots__ = ("_error", "_is_cancelled", "_result", "_then")

    def __init__(self, then: Callable[[], object]) -> None:
        self._then: Callable[[], object] | None = then
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
            self._tell()

    def set_result(self, result: T, /) -> None:
        """Answer; once."""
        self._result = result
        self._tell()

    def set_exception(self, error: BaseException, /) -> None:
        """Answer with an error; once."""
        self._error = error
        self._tell()

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

    def _tell(self) -> None:
        then, self._then = self._then, None
        if then is None:
            raise asyncio.InvalidStateError
        try:
            then()
        except Exception as error:
            message = "an answer could not be given"
            asyncio.get_running_loop().call_exception_handler(
                {"message": message, "exception": error}
            )
