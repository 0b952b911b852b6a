"""Work that a thread does piece by piece on the device: each piece waits for its turn."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from app.engine.lane import Lane
from app.engine.schedule import LOWEST
from app.errors import DeadlineExceeded

# How long after its deadline a piece may still be answered; the lane itself ends it before.
GRACE_S = 5.0

T = TypeVar("T")


class Abandoned(Exception):
    """Nobody waits for the rest of this work."""


class DevicePieces:
    """Lets one thread compute on the device of `lane`, behind everybody who predicts.

    Made on the event loop, used on the thread.

    Args:
        deadline: of `time.monotonic`, in seconds.
    """

    def __init__(self, lane: Lane, deadline: float) -> None:
        self.deadline = deadline
        self._lane = lane
        self._loop = asyncio.get_running_loop()
        self._abandoned = threading.Event()
        self._pending: Future[Any] | None = None

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, called on the device thread when its turn comes.

        Raises:
            Abandoned: `abandon` was called.
            As `Lane.call`: app.errors.DeadlineExceeded, QueueFull, DeviceLost, Draining.
        """
        if self._abandoned.is_set():
            raise Abandoned
        turn = self._lane.call(function, self.deadline, LOWEST)
        try:
            self._pending = asyncio.run_coroutine_threadsafe(turn, self._loop)
        except RuntimeError:  # the loop is closed
            turn.close()
            raise Abandoned from None
        if self._abandoned.is_set():  # between the look above and the line above
            self._pending.cancel()
        try:
            answer: T = self._pending.result(max(0.0, self.deadline - time.monotonic()) + GRACE_S)
        except CancelledError:
            raise Abandoned from None
        except TimeoutError:
            self._pending.cancel()
            raise DeadlineExceeded("the time was up before the device was done") from None
        return answer

    def abandon(self) -> None:
        """Let the thread end at its next piece; from any thread."""
        self._abandoned.set()
        if self._pending is not None:
            self._pending.cancel()
