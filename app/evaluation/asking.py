"""The way from the evaluating thread to the predictors, and what others ask meanwhile."""

import asyncio
import math
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from torch import Tensor

from app.engine.lane import LOWEST
from app.engine.live import LiveModels
from app.engine.predictor import Prediction, Predictor
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
        self._num_own = 0
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
        lanes = [one.lane for one in self._live.loaded()]
        return sum(lane.statistics.num_requests for lane in lanes) - self._num_own
