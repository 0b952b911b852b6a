"""Shadows: a version gets a copy of the requests, and its answers are compared and thrown away.

A copy never makes a caller wait for more than the forward that runs already: it has the lowest
priority, is made only while nothing waits, and there are few at a time.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from app.engine.pictures import Rows
from app.engine.predictor import Prediction, Predictor
from app.engine.schedule import LOWEST
from app.errors import ServiceError

log = logging.getLogger(__name__)

MAX_COPIES: Final = 4
COPY_S: Final = 2.0
"""How long a copy may take before it is given up."""


@dataclass(slots=True)
class ShadowCounts:
    """What came of the copies; rows are pictures or tensors.

    Attributes:
        num_agreed: rows to which both gave the same label.
        num_differed: rows to which they did not.
        num_dropped: rows that were not copied, because the device had other things to do.
        num_failed: rows that the shadow did not answer.
        largest_difference: between two probabilities of one label, over all rows.
    """

    num_agreed: int = 0
    num_differed: int = 0
    num_dropped: int = 0
    num_failed: int = 0
    largest_difference: float = 0.0


class Mirror:
    """The copies that one alias makes for one shadow; belongs to the event loop."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.counts = ShadowCounts()
        self._copies: set[asyncio.Task[None]] = set()

    def offer(self, answering: Predictor, batch: Rows, prediction: Prediction) -> None:
        """Copy a request that was answered, unless there is something better to do."""
        lane = self.predictor.lane
        if len(self._copies) >= MAX_COPIES or lane.is_behind or answering.lane.is_behind:
            self.counts.num_dropped += len(batch)
            return
        num_rows = min(len(batch), lane.largest_batch)
        self.counts.num_dropped += len(batch) - num_rows
        copy = asyncio.get_running_loop().create_task(
            self._compare(answering.labels, batch[:num_rows], prediction.probabilities[:num_rows])
        )
        self._copies.add(copy)
        copy.add_done_callback(self._end)

    def close(self) -> None:
        """Give up what is under way."""
        for copy in self._copies:
            copy.cancel()

    async def _compare(self, labels: tuple[str, ...], batch: Rows, theirs: Tensor) -> None:
        try:
            answer = await self.predictor.predict(batch, time.monotonic() + COPY_S, LOWEST)
        except ServiceError:
            self.counts.num_failed += len(batch)
            return
        agreed, difference = compare(labels, theirs, self.predictor.labels, answer.probabilities)
        self.counts.num_agreed += agreed
        self.counts.num_differed += len(batch) - agreed
        self.counts.largest_difference = max(self.counts.largest_difference, difference)

    def _end(self, copy: "asyncio.Task[None]") -> None:
        self._copies.discard(copy)
        if not copy.cancelled() and copy.exception() is not None:
            log.error("comparing with a shadow failed", exc_info=copy.exception())


class Shadowed(Predictor):
    """A predictor whose requests are copied: it shares everything with the one it stands for."""

    def __init__(self, answering: Predictor, mirror: Mirror) -> None:
        self.__dict__.update(answering.__dict__)
        self._answering, self._mirror = answering, mirror

    @property
    def loaded_as(self) -> Predictor:
        """The one that it stands for."""
        return self._answering

    @property
    def is_copied(self) -> bool:
        """Always."""
        return True

    async def predict(self, batch: Rows, deadline: float, priority: int = 0) -> Prediction:
        """As the one it stands for; the answer is compared after it was given."""
        prediction = await self._answering.predict(batch, deadline, priority)
        self._mirror.offer(self._answering, batch, prediction)
        return prediction


def compare(
    labels: tuple[str, ...], theirs: Tensor, other_labels: tuple[str, ...], others: Tensor
) -> tuple[int, float]:
    """How many rows got the same label, and the largest difference between two probabilities.

    Labels are compared by their names, of which a version may have more, or in another order.

    Args:
        theirs, others: float32 `[n, classes]`, probabilities.
    """
    if labels == other_labels:
        same = theirs.argmax(1) == others.argmax(1)
        return int(same.sum()), float((theirs - others).abs().max())
    place = {label: index for index, label in enumerate(labels)}
    mapped = torch.tensor([place.get(label, -1) for label in other_labels])
    same = theirs.argmax(1) == mapped[others.argmax(1)]
    known = mapped >= 0
    if not known.any():
        return int(same.sum()), 1.0
    difference = (theirs[:, mapped[known]] - others[:, known]).abs().max()
    return int(same.sum()), float(difference)
