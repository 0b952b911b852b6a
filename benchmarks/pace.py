"""How quick a machine was from moment to moment, as a loop that always computes saw it.

A shared machine stands still for milliseconds, and does half of what it does otherwise for tenths
of a second. Such times come together, and so they are told as spans, and not as a distribution.
"""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from benchmarks.rounds import Sample, numbered, rows_of

STEP_S: Final = 0.005
SLOW: Final = 1.2
"""Times the usual; steps below it are one span."""
FIELDS: Final = ("s", "slowness")


class Span(NamedTuple):
    """So many seconds in which everything took `slowness` times what it usually does."""

    seconds: float
    slowness: float


class Pace:
    """A machine that goes through `spans` again and again.

    Work is told in seconds that it usually takes.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._ends_s = list(accumulate(span.seconds for span in spans))
        self._work_s = list(accumulate(span.seconds / span.slowness for span in spans))

    @property
    def length_s(self) -> float:
        """Until it begins anew."""
        return self._ends_s[-1]

    def after(self, begin_s: float, work_s: float) -> float:
        """When work is done that was begun at `begin_s`."""
        times, rest_s = divmod(begin_s, self.length_s)
        index = bisect_right(self._ends_s, rest_s, hi=len(self._spans) - 1)
        left_s = (self._ends_s[index] - rest_s) / self._spans[index].slowness
        if work_s <= left_s:  # nearly always: it ends in the span in which it began
            return begin_s + work_s * self._spans[index].slowness
        again, work_s = divmod(self._work_s[index] - left_s + work_s, self._work_s[-1])
        index = bisect_right(self._work_s, work_s, hi=len(self._spans) - 1)
        left_s = (self._work_s[index] - work_s) * self._spans[index].slowness
        return (times + again) * self.length_s + self._ends_s[index] - left_s


def spans_of(times_s: Sequence[float]) -> list[Span]:
    """By the times of equal pieces of work, one right after the other."""
    usual_s = statistics.median(times_s)
    spans: list[Span] = []
    seconds, count = 0.0, 0
    for time_s in times_s:
        seconds, count = seconds + time_s, count + 1
        if seconds >= STEP_S:
            _join(spans, Span(seconds, seconds / (count * usual_s)))
            seconds, count = 0.0, 0
    return spans or [Span(sum(times_s), 1.0)]


def told(spans: Sequence[Span]) -> Sample:
    """As figures of a sample."""
    return numbered("span", FIELDS, spans)


def heard(sample: Sample) -> list[Span]:
    """The spans that are told in a sample."""
    return [Span(*row) for row in rows_of(sample, "span", FIELDS)]


def _join(spans: list[Span], span: Span) -> None:
    """Make one of the last span and this one, where neither is slow."""
    if spans and max(spans[-1].slowness, span.slowness) < SLOW:
        seconds = spans[-1].seconds + span.seconds
        work_s = spans[-1].seconds / spans[-1].slowness + span.seconds / span.slowness
        spans[-1] = Span(seconds, seconds / work_s)
    else:
        spans.append(span)
