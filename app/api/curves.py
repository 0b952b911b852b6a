"""The curves of a training run as a picture: loss, accuracy and learning rate over the steps.

Here numbers become lines; `app/pages/curves.svg` puts them on the picture.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from app.api.page_template import template
from app.jobs.job import Event, Job

WIDTH, HEIGHT = 720, 170
"""Of one plot, in pixels, without what is written around it."""
NUM_TICKS: Final = 5
MOST_DOTS: Final = 40
"""Lines of so few points show each of them."""
Points = list[tuple[int, float]]


@dataclass(slots=True)
class Curves:
    """What was measured, by step.

    Attributes:
        reports: from within the epochs, each the mean of the steps since the one before.
        epochs: at the end of each epoch.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, data: dict[str, Any]) -> None:
        """One event; what lay behind its step was lost in an interruption, and is done again."""
        ours = {"train": self.reports, "epoch": self.epochs}.get(data["phase"])
        if ours is None:
            return
        for series in (self.reports, self.epochs):
            while series and series[-1]["step"] > data["step"]:
                series.pop()
        if ours and ours[-1]["step"] == data["step"]:
            ours.pop()
        ours.append(data)

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch whose weights are kept: the most right, then the least loss, the first such."""
        validated = [one for one in self.epochs if one.get("accuracy") is not None]
        return max(validated, key=lambda one: (one["accuracy"], -one["loss"]), default=None)


def curves_of(events: Iterable[Event]) -> Curves:
    """The curves in events with numbers, which come in order."""
    curves = Curves()
    for event in events:
        curves.add(dict(event.data))
    return curves


def curves_picture(job: Job, curves: Curves, *, is_whole: bool) -> str:
    """The picture as SVG.

    Args:
        job: whose name and state it shows.
        curves: what was measured.
        is_whole: whether no event was left out; otherwise the best epoch may be among those.
    """
    every = [*curves.reports, *curves.epochs]
    last_step = max((one["step"] for one in every), default=0)
    best = curves.best if is_whole else None
    plots = [plot(title, unit, lines, last_step) for title, unit, lines in _plots(curves) if lines]
    return template("curves.svg").render(
        job=job,
        plots=plots,
        width=WIDTH,
        height=HEIGHT,
        steps=ticks(0, last_step),
        scale=WIDTH / max(last_step, 1),
        best=best,
        num_epochs=len(curves.epochs),
    )


def _plots(curves: Curves) -> Iterable[tuple[str, str, list[tuple[str, str, Points]]]]:
    """Title, unit, and lines as (class, name, points) of each plot."""
    reports, epochs = curves.reports, curves.epochs
    every = sorted([*reports, *epochs], key=lambda one: int(one["step"]))
    means = [{**one, **one.get("metrics", {})} for one in epochs]
    yield (
        "loss",
        "in nats",
        _drawn(
            ("faint", "training, as reported", _points(reports, "loss")),
            ("train", "training, mean of the epoch", _points(means, "train_loss")),
            ("held", "validation", _points(epochs, "loss")),
        ),
    )
    yield (
        "accuracy",
        "in %",
        _drawn(
            ("faint", "training, last batch", _points(reports, "accuracy", 100)),
            ("held", "validation", _points(epochs, "accuracy", 100)),
        ),
    )
    yield (
        "learning rate",
        "of a step",
        _drawn(("train", "learning rate", _points(every, "learning_rate"))),
    )


def _drawn(*lines: tuple[str, str, Points]) -> list[tuple[str, str, Points]]:
    """Those that can be seen: a faint line shows none of its points, so it needs two."""
    return [line for line in lines if len(line[2]) > (line[0] == "faint")]


def _points(found: Sequence[dict[str, Any]], name: str, factor: float = 1.0) -> Points:
    """What is a finite number, by step."""
    return [
        (one["step"], factor * one[name])
        for one in found
        if one.get(name) is not None and math.isfinite(one[name])
    ]


def plot(
    title: str, unit: str, lines: Sequence[tuple[str, str, Points]], last_step: int
) -> dict[str, Any]:
    """Lines in a rectangle of `WIDTH` times `HEIGHT`, y downwards, with the marks of its axis."""
    values = [value for _, _, points in lines for _, value in points]
    marks = ticks(min(values), max(values))
    low, high = marks[0][0], marks[-1][0]

    def y(value: float) -> float:
        return round(HEIGHT * (high - value) / (high - low), 1)

    def drawn(points: Points) -> list[tuple[float, float]]:
        return [(round(WIDTH * step / max(last_step, 1), 1), y(value)) for step, value in points]

    return {
        "title": title,
        "unit": unit,
        "marks": [(y(value), text) for value, text in marks],
        "lines": [
            {
                "kind": kind,
                "name": name,
                "points": " ".join(f"{x},{height}" for x, height in drawn(points)),
                "dots": drawn(points) if len(points) <= MOST_DOTS and kind != "faint" else [],
            }
            for kind, name, points in lines
        ],
    }


LEAST_SPAN: Final = 1e-300
"""Below it two numbers count as one: a share of their distance could be no number."""


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers from at or below `low` to at or above `high`, with their texts."""
    if high - low < LEAST_SPAN:
        around = abs(high) if abs(high) >= LEAST_SPAN else 1.0
        low, high = low - around / 2, high + around / 2
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step)))
    return [(number * step, _text(number * step, decimals)) for number in range(first, last + 1)]


def _text(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if decimals < 5 else f"{value:.{max(decimals - 4, 0)}g}"
