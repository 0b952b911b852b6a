"""How a loop looks while it runs: a bar in a terminal, plain lines elsewhere, JSON for machines."""

import json
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from types import FrameType
from typing import Any, Final, Protocol, TypeVar

import typer

from training.progress import Progress

Result = TypeVar("Result")
SILENCE_S: Final = 5.0
"""A loop without an epoch to tell of says at least this often, in plain lines, how far it is."""


class Display(AbstractContextManager[Any], Protocol):
    """Shows progress until it is closed."""

    def show(self, progress: Progress) -> None:
        """Take in one sign of life."""


def follow(loop: Generator[Progress, None, Result], *, as_json: bool = False) -> Result:
    """Drive `loop` to its end and show how it goes; give what it returns.

    Raises:
        KeyboardInterrupt: asked to stop by Ctrl-C or SIGTERM; the loop was closed between two
            steps, which leaves its snapshot. A second Ctrl-C does not wait for the step.
    """
    with closing(loop), display_for(as_json) as display, stop_requests() as is_asked_to_stop:
        while not is_asked_to_stop():
            try:
                progress = next(loop)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            display.show(progress)
    raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came, as a question instead of an exception.

    An exception in the middle of a step would leave weights half changed and nothing to save.
    """
    asked = False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])

    before = {int(one): signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def display_for(as_json: bool) -> Any:
    """The display that suits where the output goes."""
    if as_json:
        return JsonLines()
    return Bar() if sys.stderr.isatty() else PlainLines()


class JsonLines(nullcontext[None]):
    """One object a line for every epoch and every newly reported loss."""

    def __init__(self) -> None:
        super().__init__()
        self._last_loss: float | None = None

    def __enter__(self) -> "JsonLines":  # type: ignore[override]
        return self

    def show(self, progress: Progress) -> None:
        """Print what is new."""
        if progress.phase != "epoch" and progress.loss in (None, self._last_loss):
            return
        self._last_loss = progress.loss
        numbers = {key: value for key, value in asdict(progress).items() if value is not None}
        typer.echo(json.dumps(numbers))


class PlainLines(nullcontext[None]):
    """A line an epoch, one for every newly reported loss, and signs of life in between."""

    def __init__(self) -> None:
        super().__init__()
        self._last_loss: float | None = None
        self._said_at = time.monotonic()

    def __enter__(self) -> "PlainLines":  # type: ignore[override]
        return self

    def show(self, progress: Progress) -> None:
        """Print what is new."""
        new_loss = progress.loss is not None and progress.loss != self._last_loss
        silent = time.monotonic() - self._said_at > SILENCE_S
        if (
            progress.phase != "epoch"
            and not silent
            and not (new_loss and progress.phase == "train")
        ):
            return
        self._last_loss = progress.loss
        self._said_at = time.monotonic()
        typer.echo(f"{_where(progress)}  {_numbers(progress)}".rstrip(), err=True)


class Bar:
    """A bar, and below it loss, accuracy, images a second and the time that is left.

    Two lines, because one with all of that is longer than most terminals are wide.
    """

    def __init__(self) -> None:
        from rich.console import Console, Group  # 50 ms that only a terminal needs
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        self._bar = RichProgress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            expand=True,
        )
        self._numbers = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._bar, self._numbers), console=Console(stderr=True))
        self._task: Any = None
        self._phase = ""

    def __enter__(self) -> "Bar":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar; a finished epoch leaves a line above it."""
        if progress.phase == "epoch":
            self._live.console.print(f"{_where(progress)}  {_numbers(progress)}", highlight=False)
            return
        if progress.phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._phase = progress.phase
            self._task = self._bar.add_task(progress.phase, total=None)
        self._numbers.plain = _numbers(progress)
        self._bar.update(self._task, completed=progress.step, total=progress.num_steps or None)


def _where(progress: Progress) -> str:
    if progress.num_epochs:
        return f"{progress.phase} {progress.epoch}/{progress.num_epochs}, step {progress.step}"
    total = f"/{progress.num_steps}" if progress.num_steps else ""
    return f"{progress.phase} {progress.step}{total}"


def _numbers(progress: Progress) -> str:
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.accuracy is not None:
        parts.append(f"accuracy {progress.accuracy:.2%}")
    if progress.images_per_second is not None:
        parts.append(f"{progress.images_per_second:,.0f} images/s")
    if progress.seconds_left is not None:
        parts.append(f"{progress.seconds_left:.0f} s left")
    return "  ".join(parts)
