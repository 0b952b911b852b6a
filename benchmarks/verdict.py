"""What was to be reached, what was measured, and whether the one is in the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.record import Table
from benchmarks.rounds import Cell, Estimate, Round, Sample, Statistic, estimate

MEBIBYTE = 1024 * 1024
# A cell's figures, in the order of the table's columns.
COLUMNS: Sequence[tuple[str, Callable[[Sample], float | None]]] = (
    ("per s", lambda sample: sample.get("rate_per_s", sample.get("goodput_per_s"))),
    ("p50 ms", lambda sample: sample.get("p50_ms")),
    ("p99 ms", lambda sample: sample.get("p99_ms")),
    ("CPU us/request", lambda sample: sample.get("cpu_us")),
    ("memory MiB", lambda sample: _mebibytes(sample.get("memory_bytes"))),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One goal and how it stands: `met`, `missed`, or `open` where the interval spans the goal."""

    what: str
    measured: str
    goal: str
    state: str


def at_least(what: str, rounds: Sequence[Round], statistic: Statistic, goal: float) -> Verdict:
    """Met where even the lower end of the interval reaches the goal."""
    found = estimate(rounds, statistic)
    return Verdict(what, str(found), f"at least {goal:g}", _state(found, goal, upwards=True))


def at_most(what: str, rounds: Sequence[Round], statistic: Statistic, goal: float) -> Verdict:
    """Met where even the upper end of the interval keeps the goal."""
    found = estimate(rounds, statistic)
    return Verdict(what, str(found), f"at most {goal:g}", _state(found, goal, upwards=False))


def none_of(what: str, rounds: Sequence[Round], cell: str, figures: Sequence[str]) -> Verdict:
    """Met where these figures of a cell are zero in all rounds."""
    total = sum(one.samples[cell][figure] for one in rounds for figure in figures)
    return Verdict(what, f"{total:g}", "none", "met" if total == 0 else "missed")


def goals_table(heading: str, verdicts: Sequence[Verdict]) -> Table:
    """One row a goal."""
    rows = [("what", "median (95 % interval)", "goal", "state")]
    rows += [(one.what, one.measured, one.goal, one.state) for one in verdicts]
    return Table(heading, rows)


def cells_table(heading: str, cells: Sequence[Cell], rounds: Sequence[Round]) -> Table:
    """One row a cell: medians over rounds, and faults over all of them."""
    rows = [("cell", *(title for title, _ in COLUMNS), "faults")]
    for cell in cells:
        faults = sum(one.samples[cell.name]["faults"] for one in rounds)
        rows.append((cell.name, *(_median(cell, rounds, of) for _, of in COLUMNS), f"{faults:g}"))
    return Table(heading, rows)


def _median(cell: Cell, rounds: Sequence[Round], of: Callable[[Sample], float | None]) -> str:
    if any(of(one.samples[cell.name]) is None for one in rounds):
        return ""
    found = estimate(rounds, lambda samples: of(samples[cell.name]) or 0.0)
    return f"{found.median:.4g}"


def _state(found: Estimate, goal: float, *, upwards: bool) -> str:
    ends = (found.low, found.high) if upwards else (-found.high, -found.low)
    wanted = goal if upwards else -goal
    if ends[0] >= wanted:
        return "met"
    return "open" if ends[1] >= wanted else "missed"  # NaN is missed


def _mebibytes(value: float | None) -> float | None:
    return None if value is None else value / MEBIBYTE
