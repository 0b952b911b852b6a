"""One request that a model has begun with, and how its answer is written."""

from collections.abc import Callable
from typing import Final

from starlette.types import Send

from app.api.choice import Asked
from app.engine.item_queue import Answer as Outputs
from app.engine.item_queue import Item
from app.engine.live import LiveModels
from app.engine.pictures import Rows
from app.engine.predictor import Prediction, Predictor
from app.engine.waiter import Outcome, Step

# Below this many bytes zlib and a parser hold the event loop for a few milliseconds at most.
INLINE_BYTES: Final = 1024 * 1024

Fields = list[tuple[bytes, bytes]]
Encode = Callable[[Prediction], tuple[bytes, Fields]]


def at_once(live: LiveModels, asked: Asked, body: bytes) -> Predictor | None:
    """Who may begin with `body` now; None where something has to be waited for first."""
    predictor = live.get_nowait(*asked)
    if predictor is None or predictor.is_copied or len(body) > INLINE_BYTES:
        return None
    return predictor


async def send_answer(send: Send, body: bytes, fields: Fields) -> None:
    """Answer 200 with `body` and `fields`, which say nothing of its length."""
    headers = [*fields, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Inference:
    """Rows on their way through a model, without a task of their own.

    Args:
        predictor: lives for as long as somebody holds on to it.
        rows: as `Predictor.predict` takes them.
        encode: makes the body of the answer, and the fields that describe it but for its length.
        settle: the first step once it is over.

    Raises:
        As `Lane.begin`.
    """

    __slots__ = ("_encode", "_item", "_lane", "_outcome", "_predictor")

    def __init__(
        self,
        predictor: Predictor,
        rows: Rows,
        deadline: float,
        priority: int,
        encode: Encode,
        settle: Step,
    ) -> None:
        self._predictor = predictor
        self._encode = encode
        self._lane = predictor.lane_of(rows)
        self._outcome: Outcome[Outputs] = Outcome(settle)
        self._item: Item = self._lane.begin(self._outcome, rows, deadline, priority)

    def cancel(self) -> None:
        """Nobody waits any more; of no effect once it is over."""
        self._outcome.cancel()

    def end(self) -> tuple[bytes, Fields]:
        """What `encode` makes, once it is over; called once.

        Raises:
            asyncio.CancelledError: it was cancelled.
            ServiceError, V2Error, PictureError: as the route would tell them.
        """
        self._lane.end(self._item)
        return self._encode(self._predictor.prediction(self._outcome.take()))
