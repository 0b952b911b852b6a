"""Evaluates live models, one evaluation at a time: what is measured is what is served."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from app.engine.live import LiveModels
from app.engine.short_slices import short_slices
from app.evaluation.answer import Evaluation
from app.evaluation.asking import Asking
from app.evaluation.question import Question
from app.evaluation.sitting import Sitting
from training.progress import Progress


class Evaluator:
    """Evaluates live models, one evaluation at a time.

    Args:
        live: where predictors come from.
        num_threads: that read samples ahead.
    """

    def __init__(self, live: LiveModels, num_threads: int) -> None:
        self._live = live
        self._num_threads = num_threads
        self._one = asyncio.Lock()

    async def evaluate(
        self,
        question: Question,
        deadline: float,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> Evaluation:
        """Answer `question`; cancelling the task stops it within a batch.

        Args:
            question: what is to be evaluated.
            deadline: of `time.monotonic`, in seconds.
            watch: called on another thread after every batch; what it raises ends the evaluation.

        Raises:
            DeadlineExceeded: the time was up.
            training.trial.ClassesUnknown, NoEvidence, training.faults.DatasetError,
            training.report.ReportError: as their sentences say.
            As `LiveModels.get` and `Predictor.predict`.
        """
        async with self._one:
            references = [question.model] + ([question.compare_to] if question.compare_to else [])
            predictors = [await self._live.get(*_split(one)) for one in references]
            asking = Asking(self._live, asyncio.get_running_loop(), deadline)
            sitting = Sitting(question, predictors, asking, self._num_threads, watch)
            with short_slices(), ThreadPoolExecutor(1, "evaluate") as thread:
                running = asyncio.wrap_future(thread.submit(sitting.run))
                try:
                    return await asyncio.shield(running)
                except asyncio.CancelledError:
                    asking.stop()
                    # Within a batch; the samples that are being read come to their end.
                    await asyncio.wait([running])
                    running.exception()
                    raise


def _split(reference: str) -> tuple[str, str | None]:
    name, _, version = reference.replace("@", ":").partition(":")
    return name, version or None
