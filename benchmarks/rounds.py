"""Everything compared is measured in the same rounds, in random order, and compared round by round.

What disturbs a machine lasts longer than one measurement, so figures of one round share it and
their ratio does not show it. The median over rounds is reported with a 95 % bootstrap interval;
rounds in which the machine was visibly not ours are left out, and their number is told.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.machine import cpu_times, spin_ms

MAX_STEAL_SHARE = 0.02
MAX_SPIN_CHANGE = 0.10
MIN_KEPT = 3
NUM_RESAMPLES = 10_000

Sample = Mapping[str, float]
Samples = Mapping[str, Sample]
Statistic = Callable[[Samples], float]


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing that is measured once a round; its name is unique in a benchmark."""

    name: str
    measure: Callable[[], Sample]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round gave.

    Attributes:
        samples: cell's name -> figure's name -> value.
        steal_share: of all processors' time, given to others by the hypervisor.
        spin_ms: what the fixed piece of work took before the round.
    """

    samples: Samples
    steal_share: float
    spin_ms: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median over rounds with the ends of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float
    num_rounds: int

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def numbered(what: str, fields: Sequence[str], rows: Iterable[Sequence[float]]) -> Sample:
    """Rows of numbers as figures of a sample, to 1e-6: `span0_s`, `span0_slowness`, `span1_s`."""
    return {
        f"{what}{index}_{field}": round(value, 6)
        for index, row in enumerate(rows)
        for field, value in zip(fields, row, strict=True)
    }


def rows_of(sample: Sample, what: str, fields: Sequence[str]) -> Iterator[tuple[float, ...]]:
    """The rows that `numbered` put into a sample."""
    for index in itertools.count():
        names = [f"{what}{index}_{field}" for field in fields]
        if names[0] not in sample:
            return
        yield tuple(sample[name] for name in names)


def measure_rounds(
    cells: Sequence[Cell],
    num_rounds: int,
    *,
    seed: int = 0,
    in_order: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Round]:
    """Visit every cell `num_rounds` times, in another order each time.

    Args:
        in_order: visit them as they are listed instead, where one goes on from the one before.
        tell: called with one line after each cell.
    """
    order = random.Random(seed)
    rounds = []
    for number in range(1, num_rounds + 1):
        spin, before = spin_ms(), cpu_times()
        samples: dict[str, Sample] = {}
        for cell in cells if in_order else order.sample(cells, len(cells)):
            samples[cell.name] = cell.measure()
            tell(f"round {number} of {num_rounds}, {cell.name}: {brief(samples[cell.name])}")
        rounds.append(Round(samples, cpu_times().steal_share_since(before), spin))
    return rounds


def undisturbed(rounds: Sequence[Round]) -> list[Round]:
    """Those without much stolen time and with the usual speed; all, where too few would be left."""
    usual = statistics.median(one.spin_ms for one in rounds)
    kept = [
        one
        for one in rounds
        if one.steal_share <= MAX_STEAL_SHARE and abs(one.spin_ms / usual - 1) <= MAX_SPIN_CHANGE
    ]
    return kept if len(kept) >= min(MIN_KEPT, len(rounds)) else list(rounds)


def estimate(rounds: Sequence[Round], statistic: Statistic, seed: int = 0) -> Estimate:
    """The median of `statistic` over rounds.

    Args:
        statistic: takes one round's samples, so that what it divides or subtracts is paired.
    """
    values = np.array([_value(statistic, one.samples) for one in rounds])
    resampled = np.random.default_rng(seed).choice(values, (NUM_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
    return Estimate(float(np.median(values)), float(low), float(high), len(values))


def _value(statistic: Statistic, samples: Samples) -> float:
    try:
        return statistic(samples)
    except ZeroDivisionError:  # nothing was answered in a round: there is no ratio
        return math.nan


def ratio(cell: str, other: str, figure: str) -> Statistic:
    """`figure` of one cell divided by that of another."""
    return lambda samples: samples[cell][figure] / samples[other][figure]


def difference(cell: str, other: str, figure: str) -> Statistic:
    """`figure` of one cell minus that of another."""
    return lambda samples: samples[cell][figure] - samples[other][figure]


def brief(sample: Sample) -> str:
    """The figures that a watcher wants to see."""
    shown = ("rate_per_s", "goodput_per_s", "p50_ms", "p99_ms", "cpu_us", "faults")
    return ", ".join(f"{name} {sample[name]:.4g}" for name in shown if name in sample)
