"""TensorBoard events of a run, written while its loop is driven."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from training.progress import Progress, mapped

Result = TypeVar("Result")
EVENTS = "events"
"""Where in a run's folder its events lie."""


def recorded(
    loop: Generator[Progress, None, Result], folder: Path
) -> Generator[Progress, None, Result]:
    """The same loop, with every reported number written to `folder`.

    `tensorboard --logdir FOLDER` shows the curves.
    """
    from torch.utils.tensorboard import SummaryWriter  # half a second that nothing else needs

    with closing(SummaryWriter(str(folder))) as writer:
        return (yield from mapped(loop, _Record(writer)))


class _Record:
    """Writes what is reported for the first time."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._last_loss: float | None = None

    def __call__(self, progress: Progress) -> Progress:
        if progress.phase == "epoch":
            self._write(progress, "validation")
        elif progress.phase == "train" and progress.loss is not self._last_loss:
            self._last_loss = progress.loss
            self._write(progress, "train")
        return progress

    def _write(self, progress: Progress, part: str) -> None:
        numbers = {
            f"{part}/loss": progress.loss,
            f"{part}/accuracy": progress.accuracy,
            "learning_rate": progress.learning_rate,
            "images_per_second": progress.images_per_second,
            **progress.metrics,
        }
        for tag, value in numbers.items():
            if value is not None:
                self._writer.add_scalar(tag, value, progress.step)
