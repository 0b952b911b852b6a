"""Progress: what every loop yields. The caller drives the loop, and to cancel is to close it."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Progress:
    """One sign of life of a loop.

    Attributes:
        phase: what is being done: `read`, `features`, `train`, `validate`, `evaluate`; or what
            is done: `epoch`.
        step: steps done; a step is a batch where weights change, a sample everywhere else.
        num_steps: steps in all, 0 where unknown.
        epoch: the pass over the data that this step belongs to, counted from 1.
        num_epochs: passes in all.
        loss: mean loss since the last report; the last reported one in between.
        accuracy: share of right answers: in the last reported batch, in the validation part
            (phase `epoch`), or so far (phase `evaluate`).
        learning_rate: of the last step.
        images_per_second: since the last report.
        seconds_left: an estimate of the rest of this phase.
        metrics: further named numbers, only where they are new.
    """

    phase: str
    step: int
    num_steps: int
    epoch: int = 0
    num_epochs: int = 0
    loss: float | None = None
    accuracy: float | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def drive(loop: Generator[Progress, None, Result]) -> Result:
    """Drive `loop` to its end, drop its progress, and give what it returns."""
    while True:
        try:
            next(loop)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def mapped(
    loop: Generator[Progress, None, Result], change: Callable[[Progress], Progress]
) -> Generator[Progress, None, Result]:
    """The same loop with every progress put through `change`; closing this closes the loop."""
    try:
        while True:
            try:
                progress = next(loop)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            yield change(progress)
    finally:
        loop.close()
