"""Another piece of work on the device thread: a chunk of an explanation, a check at load."""

import asyncio
import math
import time
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from app.engine.device_error import is_device_lost
from app.engine.dispatch import Dispatch
from app.engine.item_queue import PATIENCE_S
from app.engine.schedule import Key
from app.errors import DeadlineExceeded, DeviceLost, QueueFull

MAX_WAITING_CALLS = 64

T = TypeVar("T")


class Call(Generic[T]):
    """A function that takes one turn on the device thread; it is both what waits and what runs.

    It is called with gradients on and outside inference mode, because explanations need both.
    """

    def __init__(
        self,
        function: Callable[[], T],
        dispatch: Dispatch,
        *,
        deadline: float | None,
        priority: int,
        place: int,
    ) -> None:
        order = time.monotonic() + PATIENCE_S if deadline is None else deadline
        self.future: asyncio.Future[T] = dispatch.loop.create_future()
        self.home = dispatch.own[place]
        self.offered: Key | None = None
        self.ripening = False
        self.expected_s = 0.0
        self.lost: BaseException | None = None
        self._key: Key = (priority, order, next(dispatch.numbers))
        self.deadline = math.inf if deadline is None else deadline
        self._function = function
        self._device = dispatch.devices[place]
        self._taken = self._late = False
        self._result: list[T] = []
        self._error: Exception | None = None

    @property
    def is_full(self) -> bool:
        """Never: it wants the device for itself."""
        return False

    def head_key(self) -> Key | None:
        """Its turn, until it is taken or nobody waits for it any more."""
        return None if self._taken or self.future.done() else self._key

    def ripe_at(self, now: float) -> float:
        """At once."""
        return now

    def take(self, now: float) -> "Call[T] | None":
        """Itself, once; nothing when its caller has gone."""
        self._taken = True
        self._late = self.deadline < now
        return None if self.future.done() else self

    def waiting_before_s(self, key: Key) -> float:
        """Unknown, and counted as nothing."""
        del key
        return 0.0

    def run(self) -> None:
        """Call the function, unless it is late; whatever it raises is kept for its caller."""
        if self._late:
            return
        try:
            self._result.append(self._function())
        except Exception as error:
            # The edge of a request, as for a batch: the caller gets it, the thread lives on.
            self._error = error
            if is_device_lost(error, self._device):
                self.lost = error

    def start(self, place: int) -> bool:
        """At once: a call never flies."""
        del place
        self.run()
        return False

    def land(self) -> None:
        """Has landed already."""

    def lose(self, error: BaseException) -> None:
        """Its device is gone."""
        self.lost = error
        self.fail(DeviceLost("the device failed and answers no more"))

    def finish(self, now: float) -> None:
        """Nothing is learnt from a call."""

    def deliver(self) -> None:
        """Hand over what the function returned or raised."""
        if self.future.done():
            return
        if self._late:
            self.expire(math.inf)
        elif self.lost is not None:
            self.fail(DeviceLost("the device failed and answers no more"))
        elif isinstance(self._error, StopIteration):
            # A future cannot carry this one.
            self.fail(RuntimeError("the function raised StopIteration"))
        elif self._error is not None:
            # Its frames hold the tensors of what failed, and this call, which holds it.
            traceback.clear_frames(self._error.__traceback__)
            self.fail(self._error)
        else:
            self.future.set_result(self._result[0])

    def expire(self, now: float) -> float:
        """Answer the caller whose deadline has passed."""
        if self.deadline < now:
            self.fail(DeadlineExceeded("the time was up before the device was done"))
        return math.inf if self.future.done() else self.deadline

    def fail(self, error: Exception) -> None:
        """Answer the caller with `error`, if it still waits."""
        if not self.future.done():
            self.future.set_exception(error)


class Calls:
    """The calls that one owner has waiting; bounded, and failed together when the owner ends."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._waiting: set[Call[Any]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    async def call(
        self, function: Callable[[], T], deadline: float | None, priority: int, place: int = 0
    ) -> T:
        """What `function` returns or raises, once it had its turn on the device number `place`.

        Raises:
            QueueFull: too many calls wait already.
            DeadlineExceeded: it was not ready in time.
            DeviceLost: the device failed.
        """
        if place in self._dispatch.lost:
            raise DeviceLost("the device failed and answers no more")
        if len(self._waiting) >= MAX_WAITING_CALLS:
            raise QueueFull(f"{len(self._waiting)} calls wait for the device", retry_after_s=1.0)
        call = Call(function, self._dispatch, deadline=deadline, priority=priority, place=place)
        self._waiting.add(call)
        try:
            now = time.monotonic()
            with self._dispatch.lock:
                self._dispatch.offer(call, now)
            self._dispatch.sweep_by(call.deadline, now)
            return await call.future
        finally:
            self._waiting.discard(call)
            del call

    def fail(self, error: Exception) -> None:
        """Answer all that wait or run with `error`."""
        for call in list(self._waiting):
            call.fail(error)
