"""The way from the evaluating thread to the predictors, and what others ask meanwhile."""

import asyncio
import math
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from torch import Tensor

from app.engine.lane import Lane
from app.engine.live import LiveModels
from app.engine.predictor import Prediction, Predictor
from app.engine.schedule import LOWEST
from app.errors import DeadlineExceeded, Overloaded

QUIET_S: Final = 1.0
"""After so long without a request of anybody else, batches are as large as they may be."""
POLL_S: Final = 0.5


class Stopped(Exception):
    """The evaluation was cancelled."""


class Asking:
    """The way from the evaluating thread to the predictors, and what others ask meanwhile."""

    def __init__(self, live: LiveModels, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._live, self._loop, self._deadline = live, loop, deadline
        self._stopped = threading.Event()
        self._counted: weakref.WeakKeyDictionary[Lane, int] = weakref.WeakKeyDictionary()
        self._num_answered = self._num_own = 0
        self._num_others = self._answered_to_others()
        self._others_at = -math.inf

    def stop(self) -> None:
        """Let `wait` and `check` raise from now on."""
        self._stopped.set()

    def check(self) -> None:
        """Raise when there is no sense in going on.

        Raises:
            Stopped, DeadlineExceeded.
        """
        if self._stopped.is_set():
            raise Stopped
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded("the time was up before the evaluation was done")

    @property
    def left_s(self) -> float:
        """Time until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def is_quiet(self) -> bool:
        """Whether nobody else has asked for a while."""
        return time.monotonic() - self._others_at > QUIET_S

    def ask(self, predictor: Predictor, batch: Tensor) -> "Future[Prediction]":
        """Begin to ask; the answer comes through the future."""
        return asyncio.run_coroutine_threadsafe(self._ask(predictor, batch), self._loop)

    def wait(self, future: "Future[Prediction]") -> Prediction:
        """The answer.

        Raises:
            Stopped, DeadlineExceeded, and as `Predictor.predict`.
        """
        while True:
            try:
                return future.result(timeout=POLL_S)
            except TimeoutError:
                self.check()

    def rest(self, seconds: float) -> None:
        """Ask nothing for so long, or until nobody else has asked for a while.

        Raises:
            Stopped, DeadlineExceeded.
        """
        until = time.monotonic() + seconds
        while not self.is_quiet and (left_s := until - time.monotonic()) > 0:
            self._stopped.wait(min(left_s, QUIET_S / 4))
            self.check()
            self._loop.call_soon_threadsafe(self._look)

    def folder_of(self, predictor: Predictor) -> Path:
        """Where its version rests."""
        return self._live.store.version(predictor.name, predictor.version).folder

    def folder_of_run(self, run: str | None) -> Path | None:
        """Where a job left what it found; None for none."""
        return self._live.store.folder.parent / "runs" / run if run else None

    async def _ask(self, predictor: Predictor, batch: Tensor) -> Prediction:
        while True:
            self._look()
            self._num_own += 1
            try:
                return await predictor.predict(batch, self._deadline, LOWEST)
            except Overloaded as error:
                self._num_own -= 1
                # Those who are waited for come first; this can wait until they are through.
                self.check()
                self._others_at = time.monotonic()
                await asyncio.sleep(min(error.retry_after_s, POLL_S))

    def _look(self) -> None:
        """See whether others were answered; on the event loop."""
        num_others = self._answered_to_others()
        if num_others > self._num_others:
            self._others_at = time.monotonic()
            self._num_others = num_others

    def _answered_to_others(self) -> int:
        """Fewer than there were by the own requests that are on their way, never more."""
        for lane in [one.lane for one in self._live.loaded()]:
            num_requests = lane.statistics.num_requests
            self._num_answered += max(0, num_requests - self._counted.get(lane, 0))
            self._counted[lane] = num_requests
        return self._num_answered - self._num_own
