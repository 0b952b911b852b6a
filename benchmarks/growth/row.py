"""One row: something is measured at several sizes, and some of its costs are judged."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.growth.exponent import Exponent, fit
from benchmarks.record import tell
from benchmarks.rounds import Cell, Round, Sample, measure_rounds, undisturbed
from benchmarks.verdict import Verdict

Measure = Callable[[int], Sample]
TOLERANCE: Final = {"CPU": 0.05, "wall": 0.10, "count": 0.05}
"""What an exponent may lie above its target, by what the cost is measured in."""

FLAT: Final = 0.1
"""Up to this target a cost is not to grow, and what little it rises may rise as it likes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A cost that is judged.

    Attributes:
        figure: its name in the samples.
        what: for people, with its unit.
        target: the largest exponent that it is to have.
        kind: processor time, time on the clock, or bytes and other counts.
    """

    figure: str
    what: str
    target: float
    kind: str = "CPU"


@dataclass(frozen=True, slots=True)
class Row:
    """What grows, and what it costs.

    Attributes:
        name: for `--rows`.
        size: what the sizes count.
        sizes: ascending.
        curves: what is judged.
        open: given a folder, a context in which a size can be measured.
        num_rounds: usual number of rounds; fewer where each starts processes.
        in_order: whether sizes are visited ascending, because each goes on where the last ended.
        further: what is judged besides, from undisturbed rounds.
    """

    name: str
    size: str
    sizes: Sequence[int]
    curves: Sequence[Curve]
    open: Callable[[Path], AbstractContextManager[Measure]]
    num_rounds: int = 7
    in_order: bool = False
    further: Callable[[Sequence[Round]], list[Verdict]] = lambda _: []

    def measure(self, folder: Path, num_rounds: int, sizes: Sequence[int]) -> list[Round]:
        """Every size once a round, in random order unless they go on from each other."""
        with self.open(folder) as measure:
            cells = [Cell(str(size), lambda size=size: measure(size)) for size in sizes]
            return measure_rounds(cells, num_rounds, in_order=self.in_order, tell=tell)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one row: its rounds, and an exponent for each of its curves."""

    row: Row
    rounds: Sequence[Round]

    @property
    def sizes(self) -> list[int]:
        """That were measured."""
        return sorted(map(int, self.rounds[0].samples))

    def costs(self, curve: Curve) -> list[list[float]]:
        """A row a round, a column a size."""
        sizes = [str(size) for size in self.sizes]
        return [
            [one.samples[size][curve.figure] for size in sizes] for one in undisturbed(self.rounds)
        ]

    def medians(self, curve: Curve) -> list[float]:
        """Over rounds, one a size."""
        return [statistics.median(column) for column in zip(*self.costs(curve), strict=True)]

    def exponent(self, curve: Curve) -> Exponent:
        """Of one of the curves."""
        return fit(self.sizes, self.costs(curve), with_marginal=curve.target > FLAT)

    def verdicts(self) -> list[Verdict]:
        """One a curve, then what is judged besides."""
        verdicts = [self._verdict(curve) for curve in self.row.curves]
        return verdicts + self.row.further(undisturbed(self.rounds))

    def points(self) -> Iterator[dict[str, Any]]:
        """Everything that was measured, one size of one round after the other."""
        for number, one in enumerate(self.rounds):
            facts = {"steal_share": one.steal_share, "spin_ms": one.spin_ms}
            for size, sample in one.samples.items():
                yield {"row": self.row.name, "round": number, "x": int(size), **facts, **sample}

    def _verdict(self, curve: Curve) -> Verdict:
        exponent = self.exponent(curve)
        limit = curve.target + TOLERANCE[curve.kind]
        state = "met" if exponent.high <= limit else "open" if exponent.low <= limit else "missed"
        what = f"{self.row.size}: {curve.what}"
        return Verdict(
            what, str(exponent), f"at most {curve.target:g} + {limit - curve.target:.2f}", state
        )


def found_in(row: Row, points: Sequence[Mapping[str, Any]]) -> Found:
    """A row as it was measured before, from its points."""
    rounds: dict[int, Round] = {}
    for point in points:
        facts = {"row", "round", "x", "steal_share", "spin_ms"}
        sample = {name: value for name, value in point.items() if name not in facts}
        one = rounds.setdefault(point["round"], Round({}, point["steal_share"], point["spin_ms"]))
        one.samples[str(point["x"])] = sample
    return Found(row, list(rounds.values()))
