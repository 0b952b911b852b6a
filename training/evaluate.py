"""Evaluation: a function that predicts, batches of samples, and a report at the end.

It does not know what predicts: offline it is a bare network, in the server the serving path itself.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence

from torch import Tensor

from training.progress import Progress
from training.report import Counts, Report


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    labels: Sequence[str],
    num_samples: int | None = None,
) -> Generator[Progress, None, Report]:
    """Predict every batch, count, and report.

    Args:
        predict: takes the inputs of a batch and gives logits, float32 `[n, classes]`.
        batches: pairs of inputs and targets, int64 `[n]`.
        labels: class names in the order of the logits.
        num_samples: how many samples will come, if known; used for the progress only.

    Yields:
        After each batch: samples done, accuracy so far, pace and time left.

    Returns:
        The report.

    Raises:
        training.report.ReportError: logits and targets cannot be counted, or nothing came.
    """
    counts = Counts(len(labels))
    started = time.perf_counter()
    for inputs, targets in batches:
        counts.update(predict(inputs), targets)
        yield _progress(counts, num_samples or 0, time.perf_counter() - started)
    return counts.report(labels)


def _progress(counts: Counts, num_samples: int, elapsed_s: float) -> Progress:
    pace = counts.num_samples / max(elapsed_s, 1e-9)
    left = max(0, num_samples - counts.num_samples)
    return Progress(
        phase="evaluate",
        step=counts.num_samples,
        num_steps=num_samples,
        accuracy=counts.accuracy,
        images_per_second=pace,
        seconds_left=left / pace if num_samples and pace else None,
    )
